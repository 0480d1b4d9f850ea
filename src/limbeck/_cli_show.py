"""What commands show to a person: tables, and numbers in them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people on a terminal; aligned plain lines, nothing cut, where the output is piped."""
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        made = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            made.add_row(*(Text(cell) for cell in row))
        Console().print(made)
        return
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def flat(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, inner in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(inner, dict):
            yield from flat(inner, name)
        else:
            yield name, inner


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
