"""Commands on finished runs: evaluate, export, report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck._cli_judge import check_run, refuse, run_folder
from limbeck._cli_options import Json, Run
from limbeck._cli_run import emit
from limbeck._cli_show import flat, table
from limbeck.errors import Problem, nearest

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
