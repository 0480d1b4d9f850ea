"""The report: one self-contained HTML page about a run, or about several of them, made from their files alone."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from limbeck.errors import missing_extra
from limbeck.run import write_atomic

__all__ = ["render", "write_report", "write_sweep_report"]


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one page about the runs in the directories ``runs`` to the file ``out`` (in a directory: as ``report.html``).

    One run, with or without seeds as children, gets its full report; several are compared. UsageError where a directory is not a
    finished run.
    """
    page = render(runs)
    target = Path(out) / "report.html" if Path(out).is_dir() else Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, page)
    return target


def write_sweep_report(folder: Path, out: Path) -> Path:
    """Write the page about a sweep: its table, its settings side by side, and what each combination bought. UsageError where there is no sweep."""
    from . import _sweep

    write_atomic(out, _environment().get_template("sweep.html").render(**_sweep.sections(folder), **_assets()))
    return out


def render(runs: Sequence[Path]) -> str:
    """The page as a string; see :func:`write_report`."""
    environment = _environment()
    from . import _code, _compare, _page, _read

    found = _read.read_runs([Path(run) for run in runs])
    if len(found) == 1:
        values = {**_page.sections(found[0]), "snippets": _code.snippets(found[0])}
        return str(environment.get_template("run.html").render(**values, **_assets()))
    return str(environment.get_template("compare.html").render(**_compare.sections(found), **_assets()))


@cache
def _environment() -> Any:
    """It keeps its templates, which take longer to compile than to fill in."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise missing_extra("jinja2", "report", "The report") from None
    from . import _code

    environment = Environment(
        loader=PackageLoader("limbeck.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["code"] = _code.highlight
    return environment


def _assets() -> dict[str, Any]:
    """Style and script, and a policy under which the browser loads nothing else and runs no other script."""
    from markupsafe import Markup

    style, script = (files("limbeck.report").joinpath("templates", name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return {"style": Markup(style), "script": Markup(script), "policy": policy}
