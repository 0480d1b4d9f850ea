"""Commands on finished runs: evaluate, export, report, compare."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck._cli_judge import check_run, refuse, run_folder
from limbeck._cli_options import Json, Run
from limbeck._cli_run import emit
from limbeck._cli_show import flat, table
from limbeck.errors import Problem, nearest

REGRESSION = 3
EXPORTS = ("onnx", "torchscript", "pt2")


def evaluate(run: Run, json: Json = False) -> None:
    """Measure the student of a run again, on this machine."""

    def work() -> dict[str, Any]:
        folder = run_folder(run)
        from limbeck.again import evaluate_run

        return dict(evaluate_run(folder))

    result = emit(work, json)
    if not json:
        rows = [(name, str(value)) for name, value in flat(result) if not isinstance(value, dict | list)]
        table(("measure", "value"), rows)


def export(
    run: Run,
    format: Annotated[  # noqa: A002
        list[str] | None,
        typer.Option("--format", metavar="NAME", show_default=False, help="onnx (default), torchscript or pt2; repeatable."),
    ] = None,
    json: Json = False,
) -> None:
    """Export the student of a run, checked against its weights."""

    def work() -> dict[str, Any]:
        formats = list(dict.fromkeys(format or ["onnx"]))
        problems = [
            Problem("--format", f"got '{name}', expected one of {', '.join(EXPORTS)}.", nearest(name, EXPORTS))
            for name in formats
            if name not in EXPORTS
        ]
        folder = run_folder(run, problems)
        from limbeck.again import export_run

        return dict(export_run(folder, formats))

    result = emit(work, json)
    if not json:
        rows = [
            (name, str(Path(run) / row.get("file", "")), f"{row['bytes']:,}", f"{row['max_abs_diff']:.2g}", f"{row['agreement']:.4f}")
            for name, row in result.items()
        ]
        table(("format", "file", "bytes", "largest difference", "agreement"), rows)


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", show_default=False, help="The folders of one run or of several to compare.")
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE.html", help="Default: report.html in the run, or comparison.html beside several."),
    ] = None,
) -> None:
    """Write the report of a run, or one that compares several."""
    problems: list[Problem] = []
    folders = [check_run(run, problems) for run in runs]
    twice = sorted({run for run in runs if runs.count(run) > 1})
    problems += [Problem(run, "is named twice.") for run in twice]
    # A comparison does not take the place of the first run's own report.
    target = Path(out) if out else folders[0] / "report.html" if len(folders) == 1 else folders[0].parent / "comparison.html"
    if out == "" or os.path.isdir(target):
        problems.append(Problem("--out", f"got '{out}', expected the name of an .html file."))
    refuse(problems)
    from limbeck.report import write_report

    print(write_report(folders, target))


def compare(
    old: Annotated[str, typer.Argument(metavar="OLD_RUN", show_default=False, help="The run to be held against.")],
    new: Annotated[str, typer.Argument(metavar="NEW_RUN", show_default=False, help="The run that is judged.")],
    max_drop: Annotated[str, typer.Option("--max-drop", metavar="POINTS", help="How far accuracy may fall, in points.")] = "0.5",
    max_slowdown: Annotated[str, typer.Option("--max-slowdown", metavar="PERCENT", help="How far latency may rise.")] = "20",
    max_growth: Annotated[str, typer.Option("--max-growth", metavar="PERCENT", help="How far bytes may rise.")] = "5",
    json: Json = False,
) -> None:
    """Say whether a new run is worse than an old one.

    Ends with 3 where accuracy, latency or size is worse than allowed, or an export is gone; for CI.
    """

    def work() -> dict[str, Any]:
        problems: list[Problem] = []
        before, after = check_run(old, problems), check_run(new, problems)
        given = {"--max-drop": max_drop, "--max-slowdown": max_slowdown, "--max-growth": max_growth}
        limits = {option: _from_zero(option, text, problems) for option, text in given.items()}
        refuse(problems)
        from limbeck.compare import Allowed
        from limbeck.compare import compare as compare_runs

        return dict(compare_runs(before, after, Allowed(*limits.values())))

    result = emit(work, json)
    if not json:
        rows = [
            (
                r["what"],
                _number(r["old"], r["unit"]),
                _number(r["new"], r["unit"]),
                _change(r),
                r["verdict"] + (f" ({r['why']})" if r["why"] else ""),
            )
            for r in result["rows"]
        ]
        table(("measure", "old", "new", "change (allowed)", ""), rows)
        for note in result["notes"]:
            print(note)
        print(f"Regression: {', '.join(result['regressions'])}." if result["regressions"] else "No regression.")
    if result["regressions"]:
        sys.exit(REGRESSION)


def _from_zero(option: str, text: str, problems: list[Problem]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 0 and math.isfinite(value)):
        problems.append(Problem(option, f"got '{text}', expected a number from 0 up."))
    return value


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if unit == "points" else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _change(row: dict[str, Any]) -> str:
    if row["change"] is None:
        return "-"
    sign = "-" if row["unit"] == "points" else "+"
    return f"{row['change']:+.2f} {row['unit']} ({sign}{row['allowed']:g})"
