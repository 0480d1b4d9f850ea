"""A sweep on one page: which values were best on validation, side by side, and what each combination bought on the test split."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.errors import Problem, UsageError
from limbeck.run import read_json

from . import _format as fmt
from ._measures import SHARES, Cell, Table, write_primary
from ._read import number

__all__ = ["sections"]


@dataclass(frozen=True)
class Square:
    """One cell of a grid: ``share`` of the way from the lowest to the highest value, in percent."""

    text: str
    note: str
    share: int
    best: bool
    href: str


@dataclass(frozen=True)
class Grid:
    """Two settings side by side; ``rest`` says what the others are."""

    across: str
    down: str
    columns: list[str]
    rows: list[tuple[str, list[Square | None]]]
    rest: str


def sections(folder: Path) -> dict[str, Any]:
    """Everything that the page of a sweep shows."""
    if not (folder / "sweep.json").is_file():
        raise UsageError(Problem(str(folder), "holds no finished sweep: it has no sweep.json.", "Go on with it: --resume."))
    found = read_json(folder / "sweep.json")
    key, rows = str(found["primary_metric"]), list(found["rows"])
    best = next(row for row in rows if row["name"] == found["best"])
    keys = list(found["vary"])
    write = write_primary(key)
    return {
        "count": len(rows),
        "seeds": len(found["seeds"]),
        "key": key.replace("_", " "),
        "write": write,
        "best": best,
        "chosen": [(_short(k, keys), v) for k, v in best["values"].items()],
        "gain": None if best["baseline"] is None else fmt.points(best["student"] - best["baseline"]),
        "interval": None if not best["interval"] else [fmt.points(b) for b in best["interval"]],
        "grids": _grids(found, rows, keys, key),
        "table": _table(rows, keys, key, best["name"]),
        "effects": _effects(rows, keys, found["vary"], key),
        "cost": {k: number(v) for k, v in found["cost"].items()},
        "time": fmt.seconds,
        "total": fmt.count,
    }


def _short(key: str, keys: list[str]) -> str:
    """The last word of a key, where it is enough to tell it from the others."""
    last = [k.split(".")[-1] for k in keys]
    return key.split(".")[-1] if last.count(key.split(".")[-1]) == 1 else key


def _validation(row: dict[str, Any], key: str) -> float | None:
    return number((row["validation"] or {}).get(key))


def _grids(found: dict[str, Any], rows: list[dict[str, Any]], keys: list[str], key: str) -> list[Grid]:
    """The two settings with the most values side by side (alone: one row), once for each combination of the others."""
    vary = found["vary"]
    axes = sorted(keys, key=lambda k: -len(vary[k]))[:2]
    axes = [k for k in keys if k in axes]
    others = [k for k in keys if k not in axes]
    values = [v for row in rows if (v := _validation(row, key)) is not None]
    low, high = min(values), max(values)
    write = partial(fmt.percent, digits=2) if key in SHARES else fmt.fixed
    grids = []
    for rest in itertools.product(*(vary[k] for k in others)):
        fixed = dict(zip(others, rest, strict=True))
        lines: list[tuple[str, list[Square | None]]] = []
        for down in vary[axes[1]] if len(axes) > 1 else [""]:
            line: list[Square | None] = []
            for across in vary[axes[0]]:
                want = {**fixed, axes[0]: across, **({axes[1]: down} if len(axes) > 1 else {})}
                row = next((r for r in rows if r["values"] == want), None)
                value = None if row is None else _validation(row, key)
                if row is None or value is None:
                    line.append(None)
                    continue
                share = 100 if high == low else round(100 * (value - low) / (high - low))
                line.append(
                    Square(
                        write(value), f"test {write(row['student'])}", share, row["name"] == found["best"], f"{row['folder']}/report.html"
                    )
                )
            lines.append((down, line))
        said = ", ".join(f"{_short(k, keys)} = {v}" for k, v in fixed.items())
        grids.append(Grid(_short(axes[0], keys), _short(axes[1], keys) if len(axes) > 1 else "", vary[axes[0]], lines, said))
    return grids


def _effects(rows: list[dict[str, Any]], keys: list[str], vary: dict[str, list[str]], key: str) -> Table | None:
    """For each value of each setting the mean over all combinations that have it: which settings matter at all."""
    if len(keys) < 2:
        return None
    write = partial(fmt.percent, digits=2) if key in SHARES else fmt.fixed
    lines: list[list[Cell | str]] = []
    for name in keys:
        means = []
        for value in vary[name]:
            held = [v for row in rows if row["values"][name] == value and (v := _validation(row, key)) is not None]
            means.append(sum(held) / len(held) if held else None)
        known = [m for m in means if m is not None]
        for value, mean in zip(vary[name], means, strict=True):
            lines.append([f"{_short(name, keys)} = {value}", Cell(write(mean), "best" if mean is not None and mean == max(known) else "")])
    return Table(["setting", f"validation {key.replace('_', ' ')}, mean"], lines)


def _table(rows: list[dict[str, Any]], keys: list[str], key: str, best: str) -> Table:
    write = partial(fmt.percent, digits=2) if key in SHARES else fmt.fixed
    lines: list[list[Cell | str]] = []
    for row in sorted(rows, key=lambda r: -(_validation(r, key) or 0.0)):
        spread = number(row["student_std"])
        bounds = row["interval"]
        gain = None if row["baseline"] is None else row["student"] - row["baseline"]
        lines.append(
            [
                *[str(row["values"][k]) for k in keys],
                Cell(write(_validation(row, key)), "best" if row["name"] == best else ""),
                Cell(write(row["student"]), note=f"± {fmt.fixed(100 * spread, 2)}" if spread is not None else ""),
                Cell(fmt.points(gain, 2), note=f"[{fmt.points(bounds[0])}, {fmt.points(bounds[1])}]" if bounds else ""),
                fmt.percent(number(row["gap_closed"]), 0),
                fmt.si(number(row["parameters"])),
                fmt.ms(number((row["latency_ms"] or {}).get("p50"))),
                fmt.seconds(number(row["cost"].get("train_seconds"))),
            ]
        )
    name = key.replace("_", " ")
    head = [
        *[_short(k, keys) for k in keys],
        f"validation {name}",
        f"test {name}",
        "gain, points",
        "gap closed",
        "parameters",
        "latency p50",
        "training",
    ]
    return Table(head, lines)
