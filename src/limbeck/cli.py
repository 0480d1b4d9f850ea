"""Arguments in, one function of the spine out.

Nothing heavy is imported here: ``limbeck --help`` answers without torch, numpy, pydantic or pyarrow. Options are texts, and the
recipe judges them, so that all mistakes of a command line are told at once.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import typer

from limbeck._cli_cache import cache_app
from limbeck._cli_judge import folder_of, load, out_problems, refuse, whole
from limbeck._cli_lists import convert, losses, models, recipes
from limbeck._cli_machine import doctor, watch
from limbeck._cli_options import (
    Alpha,
    BatchSize,
    DataSource,
    DryRun,
    Epochs,
    FitTeacher,
    Ids,
    Json,
    Lr,
    MetricsPort,
    NoBaseline,
    Out,
    RecipeFile,
    Resume,
    Seed,
    Seeds,
    Sets,
    Student,
    Task,
    Teacher,
    Temp,
    Vary,
    VerifyCache,
)
from limbeck._cli_run import call, emit
from limbeck._cli_runs import compare, evaluate, export, report
from limbeck._cli_serve import predict, serve
from limbeck._cli_show import share, table

__all__ = ["app", "console", "main"]

app = typer.Typer(
    name="limbeck",
    help="Knowledge distillation: teacher in, deployable student out, with the proof of what the teacher bought.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"limbeck {version('limbeck')}")
        except PackageNotFoundError:
            print("limbeck (not installed)")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Options of the program itself; the commands follow."""


@app.command()
def demo(out: Out = None, json: Json = False) -> None:
    """The main job on digits, from nothing, in about a minute."""

    def work() -> dict[str, Any]:
        refuse(out_problems(out, resume=False))
        from limbeck.demo import demo as run_demo

        return dict(run_demo(folder_of(out)))

    emit(work, json)


@app.command()
def distill(
    recipe: RecipeFile = None,
    teacher: Teacher = None,
    student: Student = None,
    data: DataSource = None,
    task: Task = None,
    temp: Temp = None,
    alpha: Alpha = None,
    fit_teacher: FitTeacher = False,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    seed: Seed = None,
    seeds: Seeds = None,
    out: Out = None,
    resume: Resume = False,
    no_baseline: NoBaseline = False,
    verify_cache: VerifyCache = None,
    metrics_port: MetricsPort = None,
    dry_run: DryRun = False,
    json: Json = False,
    sets: Sets = None,
) -> None:
    """Teacher in, verified student out.

    Trains the student from the teacher and, as a baseline, without it; evaluates, exports, checks and reports.
    """
    options: dict[str, Any] = {
        "teacher": teacher,
        "temp": temp,
        "alpha": alpha,
        "fit_teacher": fit_teacher or None,
        "student": student,
        "data": data,
    }
    options |= {
        "task": task,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "baseline": False if no_baseline else None,
    }
    asked = _Asked(out, resume, seeds, dry_run, json, verify_cache, metrics_port)
    emit(lambda: _run("distill", recipe, options, sets or [], asked), json)


@app.command()
def label(
    recipe: RecipeFile = None,
    teacher: Teacher = None,
    student: Student = None,
    data: DataSource = None,
    task: Task = None,
    epochs: Epochs = None,
    ids: Ids = None,
    verify_cache: VerifyCache = None,
    dry_run: DryRun = False,
    json: Json = False,
    sets: Sets = None,
) -> None:
    """Fill the teacher's cache, and train nothing.

    Run it again to go on, or several times at once to share the work; the runs of the recipe then never load the teacher.
    """
    options: dict[str, Any] = {"teacher": teacher, "student": student, "data": data, "task": task, "epochs": epochs}

    def work() -> dict[str, Any]:
        problems, count = whole("--verify-cache", verify_cache, 0, 1_000_000)
        loaded, base = load("distill", recipe, options, sets or [], problems)
        from limbeck.label import ids_of
        from limbeck.label import label as fill

        if ids is not None:
            if os.environ.get("RANK", "0") == "0":
                print(f"{ids_of(loaded, base, Path(ids)):,} samples are in {ids}.")
            return {"ids": ids}
        return dict(fill(loaded, base=base, progress="plain" if json else "auto", dry_run=dry_run, verify_cache=count))

    emit(work, json)


@app.command()
def sweep(
    recipe: RecipeFile = None,
    vary: Vary = None,
    teacher: Teacher = None,
    student: Student = None,
    data: DataSource = None,
    task: Task = None,
    temp: Temp = None,
    alpha: Alpha = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    seed: Seed = None,
    seeds: Seeds = None,
    out: Out = None,
    resume: Resume = False,
    no_baseline: NoBaseline = False,
    dry_run: DryRun = False,
    metrics_port: MetricsPort = None,
    json: Json = False,
    sets: Sets = None,
) -> None:
    """Many students on one pass of the teacher.

    Runs every combination of the values, chooses the best on validation, and writes one table, one report and the best recipe.
    """
    options: dict[str, Any] = {"teacher": teacher, "student": student, "data": data, "task": task, "temp": temp, "alpha": alpha}
    options |= {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "baseline": False if no_baseline else None}

    def work() -> dict[str, Any]:
        from limbeck._folder import next_free
        from limbeck._vary import combinations, read_vary
        from limbeck.ranks import joined, refuse_lost_folder
        from limbeck.reading import RecipeError
        from limbeck.sweep import sweep as run_sweep

        varied, problems = read_vary(vary or [])
        wrong, count = whole("--seeds", seeds, 1, 1000)
        problems += [*wrong, *out_problems(out, resume)]
        try:
            points, base = combinations(None if recipe is None else Path(recipe), options, sets or [], varied)
        except RecipeError as error:
            raise RecipeError([*problems, *error.problems], error.source) from None
        refuse(problems)
        folder = folder_of(out)
        if folder is None:
            with joined() as ranks:
                refuse_lost_folder()
                folder = Path(ranks.from_main(lambda: str(next_free(Path("runs"), "sweep"))))
        how: dict[str, Any] = {"progress": "plain" if json else "auto", "dry_run": dry_run, "metrics_port": metrics_port}
        return dict(run_sweep(points, base=base, vary=varied, out=folder, resume=resume, seeds=count or 1, **how))

    result = emit(work, json)
    if not json and not dry_run:
        rows = []
        for row in sorted(result["rows"], key=lambda r: -(r["validation"] or {}).get("accuracy", 0.0)):
            gain = None if row["baseline"] is None else row["student"] - row["baseline"]
            mark = "chosen" if row["name"] == result["best"] else ""
            figures = (
                share((row["validation"] or {}).get("accuracy")),
                share(row["student"]),
                "" if gain is None else f"{100 * gain:+.2f}",
            )
            rows.append((*row["values"].values(), *figures, mark))
        table((*result["vary"], "validation", "test", "gain, points", ""), rows)


@app.command()
def train(
    recipe: RecipeFile = None,
    student: Student = None,
    data: DataSource = None,
    task: Task = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    seed: Seed = None,
    seeds: Seeds = None,
    out: Out = None,
    resume: Resume = False,
    no_baseline: Annotated[bool, typer.Option("--no-baseline", help="Accepted; a training has no baseline.")] = False,
    dry_run: DryRun = False,
    metrics_port: MetricsPort = None,
    json: Json = False,
    sets: Sets = None,
) -> None:
    """Fine-tune --student on labels, without a teacher.

    What it trains can be the teacher of a later run, by the name run:DIR.
    """
    options: dict[str, Any] = {
        "student": student,
        "data": data,
        "task": task,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
    }
    options |= {"baseline": False if no_baseline else None}
    asked = _Asked(out, resume, seeds, dry_run, json, metrics_port=metrics_port)
    emit(lambda: _run("train", recipe, options, sets or [], asked), json)


class _Asked(NamedTuple):
    """Options that are no part of a recipe, as texts."""

    out: str | None
    resume: bool
    seeds: str | None
    dry_run: bool
    plain: bool
    verify_cache: str | None = None
    metrics_port: str | None = None


def _run(
    command: Literal["distill", "train"], recipe: str | None, options: dict[str, Any], sets: Sequence[str], asked: _Asked
) -> dict[str, Any]:
    """Judges everything that was given, then runs the spine."""
    problems, number = whole("--seeds", asked.seeds, 1, 1000)
    wrong, verify = whole("--verify-cache", asked.verify_cache, 0, 1_000_000)
    problems += [*wrong, *out_problems(asked.out, asked.resume)]
    folder = folder_of(asked.out)
    if (
        asked.resume
        and recipe is None
        and folder is not None
        and os.path.isfile(folder / "recipe.yaml")
        and not sets
        and all(value is None for value in options.values())
    ):
        recipe = str(folder / "recipe.yaml")
    loaded, base = load(command, recipe, options, sets, problems)
    from limbeck.spine import run_recipe

    result = run_recipe(
        loaded,
        base=base,
        out=folder,
        resume=asked.resume,
        seeds=number,
        progress="plain" if asked.plain else "auto",
        dry_run=asked.dry_run,
        command=command,
        verify_cache=verify,
        metrics_port=asked.metrics_port,
    )
    return dict(result)


for command in (evaluate, export, report, compare, serve, predict, losses, models, recipes, convert, doctor, watch):
    app.command()(command)
app.add_typer(cache_app, name="cache")


def main(arguments: Sequence[str] | None = None, program: str = "limbeck") -> NoReturn:
    """Runs a command.

    Raises: SystemExit with its exit code.
    """
    sys.exit(call(typer.main.get_command(app), sys.argv[1:] if arguments is None else list(arguments), program))


def console(arguments: Sequence[str] | None = None, program: str = "limbeck") -> NoReturn:
    """The console script: runs a command and ends the process.

    An interpreter that is taken down ends the process with abort() when a native thread still wants it: one of a process group or of a loader that
    lets go of its last work a moment after the main thread. So all that Python does at its end is done, but for taking it down.
    """
    code: Any = 1
    try:
        main(arguments, program)
    except SystemExit as stop:  # of a user's own module it may hold anything
        code = stop.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]  # waits for all threads but daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # None where it was closed
            stream.flush()
    os._exit(code or 0)
