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
SCHEMES = ("int8", "int8-static", "int8-dynamic", "fp16")
LAYOUTS = ("folder", "triton")


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
        typer.Option(
            "--format", metavar="NAME", show_default=False, help="onnx (default), torchscript or pt2; repeatable, or with commas."
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", metavar="SCHEME", help="int8 (static or dynamic, by the operators), int8-static, int8-dynamic or fp16."),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option("--max-drop", metavar="POINTS", help="How far accuracy on validation may fall with --quantize: 0.5 by default."),
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            "--layout", metavar="NAME", show_default=False, help="Of ONNX: folder (which --quantize always makes), or triton too."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Export the student of a run, checked against its weights.

    With --quantize or --layout the ONNX file becomes a folder that can be copied away, RUN/export/onnx-SCHEME, with labels, preprocessing, a few
    lines of Python and a manifest. Fewer bits that cost more accuracy than --max-drop, or save no byte, are refused with 3.
    """

    def work() -> dict[str, Any]:
        formats, layouts = _names(format) or ["onnx"], _names(layout)
        problems = [*_unknown("--format", formats, EXPORTS), *_unknown("--layout", layouts, LAYOUTS)]
        problems += _unknown("--quantize", [] if quantize is None else [quantize], SCHEMES)
        if "onnx" not in formats:
            given = [option for option, value in (("--quantize", quantize), ("--layout", layouts)) if value]
            problems += [Problem(option, "is for ONNX, and --format has none.", "Add --format onnx.") for option in given]
        if max_drop is not None and quantize is None:
            problems.append(Problem("--max-drop", "has no effect without --quantize."))
        drop = 0.5 if max_drop is None else _from_zero("--max-drop", max_drop, problems)
        folder = run_folder(run, problems)
        from limbeck.again import export_run

        def say(text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        return dict(export_run(folder, formats, quantize=quantize, max_drop=drop, layouts=layouts, progress=say))

    result = emit(work, json)
    if json:
        return
    rows = [
        (
            name,
            str(Path(run) / row.get("file", "")),
            f"{row['bytes']:,}",
            f"{row['max_abs_diff']:.2g}",
            f"{row['agreement']:.4f}",
            f"{100 * row['test']['metrics']['accuracy']:.2f} %",
            f"{row['latency_ms']['p50']:.3g} ms",
        )
        for name, row in result.items()
    ]
    table(("format", "file", "bytes", "largest difference", "agreement", "test accuracy", "latency p50"), rows)
    for row in result.values():
        if row.get("quantization"):
            print(f"{row['quantization']['why']} {row['about']}")
        if row.get("triton"):
            print(f"Triton's model repository: {Path(run) / row['triton']}")


def _names(given: list[str] | None) -> list[str]:
    """Of an option that may be repeated, or have commas."""
    return list(dict.fromkeys(name.strip() for text in given or [] for name in text.split(",")))


def _unknown(option: str, given: list[str], allowed: tuple[str, ...]) -> list[Problem]:
    return [
        Problem(option, f"got '{name}', expected one of {', '.join(allowed)}.", nearest(name, allowed))
        for name in given
        if name not in allowed
    ]


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
