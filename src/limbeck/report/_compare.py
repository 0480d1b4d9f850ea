"""Several runs on one page: a table, the trade-offs, the curves, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from . import _curves, _page
from . import _format as fmt
from ._charts import Point
from ._measures import SHARES, Cell, Chart, Table, deviation, interval, measured, model_name, primary, write_primary
from ._read import Run, number, short_names

__all__ = ["sections"]


def sections(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the page of several runs shows."""
    names = short_names([run.path for run in runs])
    key = primary(runs[0])
    reached = [(value, name) for run, name in zip(runs, names, strict=True) if (value := measured(run, "student", key)) is not None]
    return {
        "count": len(runs),
        "range": (min(reached), max(reached)) if len(reached) > 1 else None,
        "key": key.replace("_", " "),
        "write": write_primary(key),
        "table": _table(runs, names, key),
        "tradeoffs": _page.tradeoffs(partial(_points, runs, names, key), key),
        "training": [chart for chart in (_validation(runs, names, key), _loss(runs, names)) if chart],
        "differences": _differences(runs, names),
        "verdicts": [(name, _page.headline(run), _page.notes(run), str(run.path)) for run, name in zip(runs, names, strict=True)],
        "warnings": _warnings(runs),
    }


def _style(i: int) -> str:
    return f"s{i % 8}"


def _table(runs: Sequence[Run], names: Sequence[str], key: str) -> Table:
    reached = [measured(run, "student", key) for run in runs]
    best = max((value for value in reached if value is not None), default=None)
    rows: list[list[Cell | str]] = []
    for i, (run, name, student) in enumerate(zip(runs, names, reached, strict=True)):
        baseline, spread = measured(run, "baseline", key), deviation(run, "student", key)
        note = f"± {fmt.fixed(100 * spread, 2)}" if spread is not None else ""
        gain = fmt.points(student - baseline, 2) if student is not None and baseline is not None else fmt.UNKNOWN
        bounds = interval(run)
        write = partial(fmt.percent, digits=2) if key in SHARES else fmt.fixed
        rows.append(
            [
                Cell(name, f"key {_style(i)}", model_name(run, "student")),
                Cell(write(student), "best" if student is not None and student == best and len(runs) > 1 else "", note),
                Cell(gain, note=f"[{fmt.points(bounds[0])}, {fmt.points(bounds[1])}]" if bounds else ""),
                fmt.percent(number(run.metrics.get("gap_closed")), 0),
                write(measured(run, "teacher", key)),
                fmt.si(measured(run, "student", "parameters")),
                fmt.size(measured(run, "student", "bytes")),
                fmt.ms(measured(run, "student", "p50")),
                fmt.seconds(
                    number(run.metrics.get("cost", {}).get("train_seconds")) if isinstance(run.metrics.get("cost"), dict) else None
                ),
            ]
        )
    return Table(
        ["run", key.replace("_", " "), "gain, points", "gap closed", "teacher", "parameters", "size", "latency p50", "training"], rows
    )


def _points(runs: Sequence[Run], names: Sequence[str], key: str, what: str) -> list[Point]:
    return [
        Point(name, _style(i), x, y, deviation(run, "student", key), fmt.clip(name, 22))
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
        if (x := measured(run, "student", what)) is not None and (y := measured(run, "student", key)) is not None
    ]


def _validation(runs: Sequence[Run], names: Sequence[str], key: str) -> Chart | None:
    found = [(i, name, _curves.validation(run.seeds, "student", key)) for i, (run, name) in enumerate(zip(runs, names, strict=True))]
    curves = [_curves.Curve(name, _style(i), curve.seeds) for i, name, curve in found if curve]
    reading = "The students, measured after each epoch on data that they were not trained on. Of runs with several seeds: the mean."
    return _page.curve_chart(f"Validation {key}", curves, key, write_primary(key), reading)


def _loss(runs: Sequence[Run], names: Sequence[str]) -> Chart | None:
    found = [(i, name, _curves.losses(run.seeds, "student")) for i, (run, name) in enumerate(zip(runs, names, strict=True))]
    curves = [_curves.Curve(name, _style(i), curve.seeds) for i, name, curve in found if curve]
    reading = "What each training minimised. Runs with other terms or weights have other scales: compare shapes, not heights."
    return _page.curve_chart("Training loss", curves, "loss", "{:.3g}".format, reading)


def _differences(runs: Sequence[Run], names: Sequence[str]) -> Table | None:
    settings = [dict(_page.flat(run.recipe)) for run in runs]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    rows = [[key, *values] for key in keys if len(set(values := [s.get(key, fmt.UNKNOWN) for s in settings])) > 1]
    return Table(["setting", *names], rows) if rows else None


def _warnings(runs: Sequence[Run]) -> list[str]:
    found = []
    for what, values in (
        ("tasks", [run.metrics.get("task") for run in runs]),
        ("primary metrics", [primary(run) for run in runs]),
        ("data", [run.recipe.get("data", {}).get("source") if isinstance(run.recipe.get("data"), dict) else None for run in runs]),
        ("numbers of test items", [run.analysis.get("items") for run in runs]),
    ):
        known = {str(value) for value in values if value is not None}
        if len(known) > 1:
            found.append(f"These runs have different {what} ({', '.join(sorted(known))}): their numbers cannot be compared directly.")
    return found
