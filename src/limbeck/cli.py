"""Arguments in, one function of the spine out.

Nothing heavy is imported here: ``limbeck --help`` answers without torch, numpy, pydantic or pyarrow. Options are texts, and the
recipe judges them, so that all mistakes of a command line are told at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn

import typer

from limbeck._cli_run import call, emit, print_json
from limbeck.errors import Problem, UsageError, listed, nearest

if TYPE_CHECKING:
    from limbeck.recipe import Recipe

__all__ = ["app", "main"]

EXPORTS = ("onnx", "torchscript", "pt2")

app = typer.Typer(
    name="limbeck",
    help="Knowledge distillation: teacher in, deployable student out, with the proof of what the teacher bought.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[str | None, typer.Argument(metavar="RECIPE.yaml", show_default=False, help="A recipe file (see `limbeck recipes`).")]
Teacher = Annotated[str | None, typer.Option("--teacher", metavar="SPEC", help="The model to learn from (see `limbeck models`).")]
Student = Annotated[str | None, typer.Option("--student", metavar="SPEC", help="The model to train (see `limbeck models`).")]
DataSource = Annotated[
    str | None, typer.Option("--data", metavar="SPEC", help="digits, npz:FILE, imagefolder:DIR, csv:FILE, jsonl:FILE, parquet:FILE, hf:ID.")
]
Task = Annotated[
    str | None, typer.Option("--task", metavar="TASK", help="image-classification or text-classification; where the data do not tell.")
]
Temp = Annotated[str | None, typer.Option("--temp", metavar="T", help="Temperature of the distillation loss (4 by default).")]
Alpha = Annotated[
    str | None, typer.Option("--alpha", metavar="A", help="Weight of the distillation loss; cross entropy has 1 - A (0.7 by default).")
]
FitTeacher = Annotated[
    bool, typer.Option("--fit-teacher", help="Fine-tune the teacher first where its head does not fit the classes of the data.")
]
Epochs = Annotated[str | None, typer.Option("--epochs", metavar="N", help="Passes over the training data.")]
BatchSize = Annotated[str | None, typer.Option("--batch-size", metavar="N", help="Samples of one optimiser step.")]
Lr = Annotated[str | None, typer.Option("--lr", metavar="X", help="Peak learning rate.")]
Seed = Annotated[
    str | None, typer.Option("--seed", metavar="N", help="Of initial weights, order and dropout; splits and views have their own.")
]
Seeds = Annotated[str | None, typer.Option("--seeds", metavar="N", help="Run N seeds; report mean and deviation.")]
Out = Annotated[str | None, typer.Option("--out", metavar="DIR", help="The run's folder; by default a new one under runs/.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")]
NoBaseline = Annotated[bool, typer.Option("--no-baseline", help="Do not train the same student without the teacher beside it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Measure and print the plan: memory, time, cache. Nothing is written.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output; everything else goes to standard error.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", show_default=False, help="Any recipe key, e.g. --set train.optimizer=sgd (a YAML value)."),
]
VerifyCache = Annotated[
    str | None,
    typer.Option(
        "--verify-cache",
        metavar="N",
        show_default=False,
        help="Compare N cached answers with the teacher, which is loaded for it; by default 32 where it is loaded anyway.",
    ),
]
CacheFolder = Annotated[
    str | None,
    typer.Argument(metavar="FOLDER", show_default=False, help="A teacher_cache.path, or one directory in it; by default the user's own."),
]
Run = Annotated[str, typer.Argument(metavar="RUN", show_default=False, help="The folder of a run.")]


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
        _raise(_out_problems(out, resume=False))
        from limbeck.demo import demo as run_demo

        return dict(run_demo(_folder(out)))

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
    asked = _Asked(out=out, resume=resume, seeds=seeds, dry_run=dry_run, plain=json, verify_cache=verify_cache)
    emit(lambda: _run("distill", recipe, options, sets or [], asked), json)


@app.command()
def label(
    recipe: RecipeFile = None,
    teacher: Teacher = None,
    student: Student = None,
    data: DataSource = None,
    task: Task = None,
    epochs: Epochs = None,
    ids: Annotated[
        str | None,
        typer.Option(
            "--ids", metavar="FILE.csv", help="Only write split, row, id and label of every sample: what logits:FILE is keyed by."
        ),
    ] = None,
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
        problems, count = _whole("--verify-cache", verify_cache, 0, 1_000_000)
        loaded, base = _loaded("distill", recipe, options, sets or [], problems)
        from limbeck.label import ids_of
        from limbeck.label import label as fill

        if ids is not None:
            print(f"{ids_of(loaded, base, Path(ids)):,} samples are in {ids}.")
            return {"ids": ids}
        return dict(fill(loaded, base=base, progress="plain" if json else "auto", dry_run=dry_run, verify_cache=count))

    emit(work, json)


@app.command()
def sweep(
    recipe: RecipeFile = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="KEY=V,V",
            show_default=False,
            help="A recipe key and its values, e.g. objective.0.temperature=2,4,8; or temp=2,4 and alpha=0.5,0.9. Repeatable.",
        ),
    ] = None,
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
    json: Json = False,
    sets: Sets = None,
) -> None:
    """Many students on one pass of the teacher.

    Runs every combination of the values, chooses the best on validation, and writes one table, one report and the best recipe.
    """
    options: dict[str, Any] = {"teacher": teacher, "student": student, "data": data, "task": task, "temp": temp, "alpha": alpha}
    options |= {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "baseline": False if no_baseline else None}

    def work() -> dict[str, Any]:
        from limbeck.reading import RecipeError
        from limbeck.sweep import combinations, read_vary
        from limbeck.sweep import sweep as run_sweep

        varied, problems = read_vary(vary or [])
        wrong, count = _whole("--seeds", seeds, 1, 1000)
        problems += [*wrong, *_out_problems(out, resume)]
        try:
            points, base = combinations(None if recipe is None else Path(recipe), options, sets or [], varied)
        except RecipeError as error:
            raise RecipeError([*problems, *error.problems], error.source) from None
        _raise(problems)
        folder = _folder(out) or _free_folder(Path("runs"), "sweep")
        how = "plain" if json else "auto"
        return dict(run_sweep(points, base=base, vary=varied, out=folder, resume=resume, seeds=count or 1, progress=how))

    result = emit(work, json)
    if not json:
        rows = []
        for row in sorted(result["rows"], key=lambda r: -(r["validation"] or {}).get("accuracy", 0.0)):
            gain = None if row["baseline"] is None else row["student"] - row["baseline"]
            mark = "chosen" if row["name"] == result["best"] else ""
            figures = (
                _share((row["validation"] or {}).get("accuracy")),
                _share(row["student"]),
                "" if gain is None else f"{100 * gain:+.2f}",
            )
            rows.append((*row["values"].values(), *figures, mark))
        _table((*result["vary"], "validation", "test", "gain, points", ""), rows)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _free_folder(root: Path, name: str) -> Path:
    from limbeck._folder import next_free

    return next_free(root, name)


cache_app = typer.Typer(help="What teachers have said already: list it, check it, remove it.", add_completion=False, rich_markup_mode=None)
app.add_typer(cache_app, name="cache")


@cache_app.command("ls")
def cache_ls(folder: CacheFolder = None, json: Json = False) -> None:
    """The caches, and what each holds."""

    def work() -> dict[str, Any]:
        from limbeck.cache import default_root, listing

        root = default_root() if folder is None else Path(folder)
        return {"root": str(root), "caches": listing(root)}

    result = emit(work, json)
    if json:
        return
    print(result["root"])
    rows = []
    for row in result["caches"]:
        if "damaged" in row:
            rows.append((row["name"], "damaged", "", "", "", "", ""))
            continue
        what = f"{', '.join(row['stores'])} in {row['codec']}, asked in {row['precision']}"
        state = "being filled" if row["unfinished"] else ""
        rows.append((row["name"], row["teacher"], row["for"], what, f"{row['rows']:,} ({row['views']} views)", f"{row['bytes']:,}", state))
    _table(("name", "teacher", "for", "holds", "rows", "bytes", ""), rows)


@cache_app.command("verify")
def cache_verify(
    folder: CacheFolder = None,
    repair: Annotated[bool, typer.Option("--repair", help="Take out what is damaged; it is asked for again when it is wanted.")] = False,
    json: Json = False,
) -> None:
    """Compare every byte with its checksum."""

    def work() -> dict[str, Any]:
        from limbeck.cache import default_root, verify

        found = verify(default_root() if folder is None else Path(folder), repair=repair)
        problems = [Problem("", text) for one in found for text in one.problems]
        if problems and not repair:
            raise UsageError(problems)
        return {"caches": [{"folder": str(v.folder), "rows": v.rows, "problems": v.problems, "mended": v.mended} for v in found]}

    result = emit(work, json)
    if not json:
        for row in result["caches"]:
            for text in (*row["problems"], *row["mended"]):
                print(text)
            print(f"{row['folder']}: {row['rows']:,} rows are as they were written.")


@cache_app.command("rm")
def cache_rm(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", show_default=False, help="Names as `limbeck cache ls` has them, or beginnings.")
    ],
    path: Annotated[str | None, typer.Option("--path", metavar="FOLDER", help="The teacher_cache.path; by default the user's own.")] = None,
) -> None:
    """Remove caches by name."""
    from limbeck.cache import default_root, remove

    for folder in remove(default_root() if path is None else Path(path), names):
        print(f"{folder} was removed.")


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
    asked = _Asked(out=out, resume=resume, seeds=seeds, dry_run=dry_run, plain=json)
    emit(lambda: _run("train", recipe, options, sets or [], asked), json)


@app.command()
def evaluate(run: Run, json: Json = False) -> None:
    """Measure the student of a run again, on this machine."""

    def work() -> dict[str, Any]:
        folder = _run_folder(run)
        from limbeck.again import evaluate_run

        return dict(evaluate_run(folder))

    result = emit(work, json)
    if not json:
        rows = [(name, str(value)) for name, value in _flat(result) if not isinstance(value, dict | list)]
        _table(("measure", "value"), rows)


@app.command()
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
        folder = _run_folder(run, problems)
        from limbeck.again import export_run

        return dict(export_run(folder, formats))

    result = emit(work, json)
    if not json:
        rows = [
            (name, str(_at(run, row.get("file", ""))), f"{row['bytes']:,}", f"{row['max_abs_diff']:.2g}", f"{row['agreement']:.4f}")
            for name, row in result.items()
        ]
        _table(("format", "file", "bytes", "largest difference", "agreement"), rows)


@app.command()
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
    folders = [_check_run(run, problems) for run in runs]
    twice = sorted({run for run in runs if runs.count(run) > 1})
    problems += [Problem(run, "is named twice.") for run in twice]
    # A comparison does not take the place of the first run's own report.
    target = Path(out) if out else folders[0] / "report.html" if len(folders) == 1 else folders[0].parent / "comparison.html"
    if out == "" or os.path.isdir(target):
        problems.append(Problem("--out", f"got '{out}', expected the name of an .html file."))
    _raise(problems)
    from limbeck.report import write_report

    print(write_report(folders, target))


@app.command()
def losses(name: Annotated[str | None, typer.Argument(metavar="NAME", show_default=False)] = None) -> None:
    """The losses, and when to use each.

    NAME shows the parameters of one.
    """
    from limbeck.losses import LOSSES

    if name is None:
        _table(("loss", "when to use it"), [(entry.name, entry.summary) for entry in LOSSES.values()])
        return
    if name not in LOSSES:
        raise UsageError(Problem("", f"there is no loss '{name}'; there are {listed(list(LOSSES))}.", nearest(name, LOSSES)))
    entry = LOSSES[name]
    print(f"{entry.name}: {entry.summary}\nSource: {entry.source}\nReads: {', '.join(entry.reads)}\n")
    rows = [
        (p.name, "required" if p.required else str(p.default), p.allowed + ("; or a schedule" if p.schedulable else ""))
        for p in entry.parameters.values()
    ]
    _table(("parameter", "default", "allowed"), [("weight", "1.0", "a number from 0 up; or a schedule"), *rows])


@app.command()
def models() -> None:
    """The names of models, and when to use each."""
    from limbeck.models import known_models

    _table(("name", "what it is", "when to use it"), [(str(a), str(b), str(c)) for a, b, c in known_models()])


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", show_default=False, help="Print this recipe.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a recipe file, for editors.")] = False,
) -> None:
    """Recipes to start from, and when to use each.

    `limbeck recipes NAME > my.yaml` starts a recipe. For completion and checks while typing, run `limbeck recipes --schema >
    limbeck.schema.json` beside it; its first line names that file to the editor.
    """
    if schema and name is not None:
        raise UsageError(Problem("--schema", f"takes no name beside it, got '{name}'."))
    if schema:
        from limbeck.reading import json_schema

        print_json(json_schema())
        return
    ready = {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}
    if name is None:
        _table(("recipe", "when to use it"), [(key, _first_comment(path)) for key, path in ready.items()])
    elif name.removesuffix(".yaml") in ready:
        print("# yaml-language-server: $schema=limbeck.schema.json")
        print(ready[name.removesuffix(".yaml")].read_text(encoding="utf-8"), end="")
    else:
        raise UsageError(Problem("", f"there is no recipe '{name}'; there are {listed(list(ready))}.", nearest(name, ready)))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="FILE.pth", show_default=False, help="A foreign .pt, .pth, .bin or .ckpt file.")],
    target: Annotated[str, typer.Argument(metavar="OUT.safetensors", show_default=False)],
    key: Annotated[str | None, typer.Option("--key", metavar="NAME", help="The entry of the file that holds the weights.")] = None,
) -> None:
    """Turn foreign .pth weights into safetensors.

    The one command that opens a pickle, and weights only.
    """
    problems = []
    if not os.path.isfile(source):
        problems.append(_no_such(Path(source), "file"))
    if Path(target).suffix != ".safetensors":
        problems.append(Problem("", f"got the target '{target}', expected a name that ends in .safetensors."))
    _raise(problems)
    from limbeck.convert import convert as convert_file

    convert_file(Path(source), Path(target), key=key)


class _Asked(NamedTuple):
    """Options that are no part of a recipe, as texts."""

    out: str | None
    resume: bool
    seeds: str | None
    dry_run: bool
    plain: bool
    verify_cache: str | None = None


def _run(
    command: Literal["distill", "train"], recipe: str | None, options: dict[str, Any], sets: Sequence[str], asked: _Asked
) -> dict[str, Any]:
    """Judges everything that was given, then runs the spine."""
    problems, number = _whole("--seeds", asked.seeds, 1, 1000)
    wrong, verify = _whole("--verify-cache", asked.verify_cache, 0, 1_000_000)
    problems += [*wrong, *_out_problems(asked.out, asked.resume)]
    folder = _folder(asked.out)
    if asked.resume and recipe is None and folder is not None and os.path.isfile(folder / "recipe.yaml") and not _any(options, sets):
        recipe = str(folder / "recipe.yaml")
    loaded, base = _loaded(command, recipe, options, sets, problems)
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
    )
    return dict(result)


def _loaded(
    command: Literal["distill", "train"], recipe: str | None, options: dict[str, Any], sets: Sequence[str], problems: list[Problem]
) -> tuple[Recipe, Path]:
    """The recipe and the folder of its relative paths; raises everything that is wrong with it, and ``problems``."""
    from limbeck.reading import RecipeError, load_recipe

    try:
        loaded = load_recipe(None if recipe is None else Path(recipe), options, sets, command)
    except RecipeError as error:
        raise RecipeError([*error.problems, *problems], error.source) from None
    except UsageError as error:
        raise UsageError([*error.problems, *problems]) from None
    _raise(problems)
    return loaded


def _any(options: dict[str, Any], sets: Sequence[str]) -> bool:
    return bool(sets) or any(value is not None for value in options.values())


def _whole(option: str, text: str | None, least: int, most: int) -> tuple[list[Problem], int | None]:
    """An option that is a whole number, or None."""
    if text is None:
        return [], None
    if text.isascii() and text.isdigit() and least <= int(text) <= most:
        return [], int(text)
    return [Problem(option, f"got '{text}', expected a whole number of at least {least} and at most {most}.")], None


def _out_problems(out: str | None, resume: bool) -> list[Problem]:
    if out is None:
        return [Problem("--resume", "needs --out DIR, the run to go on with.")] if resume else []
    if not out.strip():
        return [Problem("--out", "got an empty name, expected a folder.")]
    path = Path(out)
    first = next((p for p in [path, *path.parents] if os.path.exists(p)), None)
    if first is not None and not os.path.isdir(first):
        return [Problem("--out", f"'{first}' is a file, expected a folder.")]
    return []


def _folder(out: str | None) -> Path | None:
    return None if out is None else Path(out)


def _run_folder(run: str, problems: Iterable[Problem] = ()) -> Path:
    found = list(problems)
    folder = _check_run(run, found)
    _raise(found)
    return folder


def _check_run(run: str, problems: list[Problem]) -> Path:
    folder = Path(run)
    if not os.path.isdir(folder):
        problems.append(_no_such(folder, "folder"))
    elif not (folder / "recipe.yaml").is_file():
        problems.append(Problem("", f"'{run}' is not a run: it has no recipe.yaml."))
    elif not (folder / "metrics.json").is_file():
        problems.append(Problem("", f"the run '{run}' is not finished: it has no metrics.json.", f"Go on with it: --resume --out {run}"))
    return folder


def _no_such(path: Path, kind: str) -> Problem:
    if os.path.exists(path):
        return Problem("", f"'{path}' is not a {kind}.")
    beside = [p.name for p in path.parent.iterdir()][:2000] if os.path.isdir(path.parent) else []
    return Problem("", f"no such {kind}: '{path}'.", nearest(path.name, beside))


def _raise(problems: Sequence[Problem]) -> None:
    if problems:
        raise UsageError(problems)


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def _flat(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, inner in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(inner, dict):
            yield from _flat(inner, name)
        else:
            yield name, inner


def _at(run: str, file: str) -> Path:
    return Path(run) / file


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people on a terminal; aligned plain lines, nothing cut, where the output is piped."""
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: Sequence[str] | None = None, program: str = "limbeck") -> NoReturn:
    """The console script: runs a command and leaves with its exit code."""
    sys.exit(call(typer.main.get_command(app), sys.argv[1:] if arguments is None else list(arguments), program))
