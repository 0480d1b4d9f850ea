"""limbeck sweep: many students on one pass of the teacher, one table, and the best recipe written out."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck._folder import finished, make, put_away, read_recipe, refuse_taken, same_run
from limbeck._recipe_check import differences as differing
from limbeck._recipe_merge import expand_names
from limbeck.again import export_run
from limbeck.data import Data
from limbeck.errors import Problem, UsageError, listed
from limbeck.progress import Progress
from limbeck.reading import RecipeError, absolute, load_recipe, read_yaml
from limbeck.recipe import Recipe
from limbeck.report import write_sweep_report
from limbeck.run import commit_folder, is_left_over, read_json, write_atomic, write_json
from limbeck.spine import execute, job_of

__all__ = ["Combination", "combinations", "read_vary", "sweep"]

_CLASSIC = ("temp", "alpha")
_NOT_VARIED = {
    "seed": "Take several seeds with --seeds N.",
    "export": "The best student alone is exported.",
    "track": "",
    "baseline": "One baseline is trained for each student and seed.",
    "task": "",
}


_COST = ("teacher_items", "cache_hits", "train_seconds", "baseline_seconds", "total_seconds")


@dataclass(frozen=True)
class Combination:
    """One point of a sweep: ``values`` by key as they were written, and the recipe that they make."""

    name: str
    values: dict[str, str]
    recipe: Recipe


def read_vary(texts: Sequence[str]) -> tuple[dict[str, list[str]], list[Problem]]:
    """``KEY=V,V`` or ``KEY=[V, V]`` to the values of each key, as they were written; and what is wrong with them."""
    found: dict[str, list[str]] = {}
    problems: list[Problem] = []
    for text in texts:
        key, equals, written = text.partition("=")
        key, written = key.strip(), written.strip()
        if not equals or not key or not written:
            problems.append(Problem("--vary", f"got '{text}', expected KEY=VALUE,VALUE, e.g. objective.0.temperature=2,4,8."))
            continue
        if key in found:
            problems.append(Problem(f"--vary {key}", "is given twice.", "Give all of its values at once."))
            continue
        if key.split(".")[0] in _NOT_VARIED:
            problems.append(Problem(f"--vary {key}", "cannot be varied.", _NOT_VARIED[key.split(".")[0]]))
            continue
        whole = written[1:-1] if written.startswith("[") and written.endswith("]") else written
        values = [v.strip() for v in _split(whole)]
        twice = sorted({v for v in values if values.count(v) > 1})
        if "" in values or twice:
            what = f"has {listed(twice)} more than once." if twice else "has an empty value."
            problems.append(Problem(f"--vary {key}", what))
            continue
        found[key] = values
    if not texts:
        problems.append(Problem("--vary", "is missing: name at least one key, e.g. --vary objective.0.temperature=2,4,8."))
    return found, problems


def _split(text: str) -> list[str]:
    """At commas that stand in no bracket or quote."""
    pieces, depth, quote, start = [], 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    return [*pieces, text[start:]]


def combinations(
    path: Path | None, options: dict[str, Any], sets: Sequence[str], vary: dict[str, list[str]]
) -> tuple[list[Combination], Path]:
    """Every combination of the values, read as a recipe; and the folder of its relative paths.

    Raises :class:`RecipeError` with all problems of all of them.
    """
    found: list[Combination] = []
    problems: dict[tuple[str, str], Problem] = {}
    base, source = Path.cwd(), "command line"
    classic = _classic_terms(path) if path is not None and set(vary) & set(_CLASSIC) else None
    for number, values in enumerate(itertools.product(*vary.values()), start=1):
        chosen = dict(zip(vary, values, strict=True))
        own = {**options, **{k: v for k, v in chosen.items() if k in _CLASSIC and classic is None}}
        more = [f"{k}={v}" for k, v in chosen.items() if k not in _CLASSIC]
        if classic is not None:
            more += _written_out(classic, chosen)
        try:
            recipe, base = load_recipe(path, own, [*sets, *more], "distill")
            found.append(Combination(_name(number, chosen), chosen, absolute(recipe, base)))
        except RecipeError as error:
            source = error.source
            for p in error.problems:
                key = p.where.removeprefix("--set ").removeprefix("--")
                where = f"--vary {key}" if key in vary else p.where
                problems.setdefault((where, p.message), Problem(where, p.message, p.hint))
    if problems:
        raise RecipeError(list(problems.values()), source)
    return found, base


def _classic_terms(path: Path) -> tuple[int, int] | None:
    """Where a recipe's objective has its one kd and its one cross entropy, which temp and alpha are about; None where it has no such objective
    (what is wrong with it, or with varying them, is then told when the recipe is read)."""
    try:
        objective = expand_names(read_yaml(path)).get("objective")
    except UsageError:
        return None
    if not isinstance(objective, list):
        return None
    losses = [term.get("loss") if isinstance(term, dict) else None for term in objective]
    if sorted(map(str, losses)) != ["cross_entropy", "kd"]:
        return None
    return losses.index("kd"), losses.index("cross_entropy")


def _written_out(terms: tuple[int, int], chosen: dict[str, str]) -> list[str]:
    """What ``temp`` and ``alpha`` say, as keys of the objective."""
    kd, cross_entropy = terms
    sets = [f"objective.{kd}.temperature={chosen['temp']}"] if "temp" in chosen else []
    if "alpha" in chosen:
        sets.append(f"objective.{kd}.weight={chosen['alpha']}")
        with contextlib.suppress(ValueError):  # no number: told of the weight above
            sets.append(f"objective.{cross_entropy}.weight={round(1 - float(chosen['alpha']), 12)!r}")
    return sets


def _name(number: int, values: dict[str, str]) -> str:
    """``03-temperature-4-weight-0.5``, of characters that every file system takes."""
    last = [k.split(".")[-1] for k in values]
    words = [f"{key.split('.')[-1] if last.count(key.split('.')[-1]) == 1 else key}-{_word(value)}" for key, value in values.items()]
    return "-".join([f"{number:02d}", *words])[:100].rstrip("-.")


def _word(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", value.rstrip("/").split("/")[-1].split(":")[-1]).strip("-") or "x"


def sweep(
    points: list[Combination],
    *,
    base: Path,
    vary: dict[str, list[str]],
    out: Path,
    resume: bool = False,
    seeds: int = 1,
    progress: str = "auto",
) -> dict[str, Any]:
    """Run every combination, each in ``out/runs/NAME``; the teacher is asked once for all of them, and a baseline is trained once for each student
    and seed. The best on validation is exported, and stands with its recipe in ``out``.

    Returns what stands in ``sweep.json``: one row a combination, in the order given, and which is the best.
    """
    refuse_taken(out, resume)
    plan = {"vary": vary, "seeds": seeds, "recipes": {p.name: p.recipe.model_dump(mode="json") for p in points}}
    _same_plan(out, plan, resume)
    make(out / "runs")
    # a sweep is a run to whoever asks whether a folder holds one; its recipe becomes the best one's
    if not (out / "plan.json").exists():
        write_atomic(out / "recipe.yaml", points[0].recipe.to_yaml())
        write_json(out / "plan.json", plan)
    rows: list[dict[str, Any]] = []
    lenders: dict[str, Path] = {}
    data: dict[str, Data] = {}
    taught: dict[str, dict[str, Any]] = {}  # teachers that were trained, by all that their training depends on
    with Progress(progress) as shown:
        for number, point in enumerate(points, start=1):
            folder = out / "runs" / point.name
            shown.say(f"[{number}/{len(points)}] {', '.join(f'{k} = {v}' for k, v in point.values.items())}")
            recipe = point.recipe.model_copy(update={"export": [], "track": []})
            own = json.dumps(recipe.model_dump(mode="json", include={"teacher", "data", "task", "seed", "train"}), sort_keys=True)
            trained = taught.get(own)
            if trained is not None:
                recipe = recipe.model_copy(update={"teacher": recipe.teacher and recipe.teacher.model_copy(update=trained)})
            lender = lenders.get(_baseline_key(recipe))
            if lender is not None:
                recipe = _as_measured(recipe, lender)
            if finished(folder):
                same_run(folder, recipe, seeds)
                put_away(folder)
                metrics = dict(read_json(folder / "metrics.json"))
            else:
                key = json.dumps([recipe.data.model_dump(mode="json"), recipe.task])
                job = job_of(recipe, base, folder, resume=True, seeds=seeds, data=data.get(key), uses=seeds * len(points), lender=lender)
                data[key] = job.data
                metrics = execute(job, shown)
            if trained is None and (folder / "teacher" / "model.json").is_file():
                # it was trained for the first combination, and is the same for the others
                taught[own] = {"model": f"run:{(folder / 'teacher').resolve()}", "weights": None, "options": {}, "train": None}
            if recipe.baseline:
                lenders.setdefault(_baseline_key(recipe), folder)
            rows.append(_row(point, metrics, folder.relative_to(out)))
        result = {
            "limbeck": points and metrics["limbeck"],
            "primary_metric": metrics["primary_metric"],
            "vary": vary,
            "seeds": metrics["seeds"],
            "rows": rows,
            **_best(rows),
            "cost": {key: _sum([r["cost"].get(key) for r in rows]) for key in _COST},
        }
        best = next(p for p in points if p.name == result["best"])
        _bring_up(out, best, shown)
        write_json(out / "sweep.json", result)
        write_sweep_report(out, out / "report.html")
        shown.say(
            f"Best on {result['chosen_on']}: {', '.join(f'{k} = {v}' for k, v in best.values.items())} (its recipe: {out / 'recipe.yaml'})"
        )
        shown.say(f"Report: {out / 'report.html'}")
    return result


def _same_plan(out: Path, plan: dict[str, Any], resume: bool) -> None:
    if not resume or not (out / "plan.json").is_file():
        if resume and out.is_dir() and any(not is_left_over(p) for p in out.iterdir()) and not (out / "recipe.yaml").is_file():
            raise UsageError(Problem("--resume", f"{out} holds no sweep (it has no plan.json)."))
        return
    lines = differing(read_json(out / "plan.json"), json.loads(json.dumps(plan)), "")
    if lines:
        raise UsageError(
            [Problem("--resume", f"this sweep was begun with something else: {line}", "Name another --out.") for line in lines[:8]]
        )


def _baseline_key(recipe: Recipe) -> str:
    """What a baseline depends on: everything but the teacher and the terms that read it."""
    plain = recipe.model_dump(mode="json", exclude={"teacher", "objective", "export", "track", "baseline", "teacher_cache"})
    for name in ("precision", "layout", "workers", "device"):  # may have been measured; where they were given they are the same for all
        plain["train"].pop(name)
    term = next((t for t in recipe.objective if t.loss == "cross_entropy"), None)
    own = {} if term is None else term.model_dump(mode="json", exclude={"weight"})
    return json.dumps([plain, own, recipe.teacher_cache.views, recipe.train.precision], sort_keys=True)


def _as_measured(recipe: Recipe, lender: Path) -> Recipe:
    """With the choices that the run which trained the baseline made by measuring, so that both students run alike."""
    made = read_recipe(lender).train
    train = recipe.train
    chosen: dict[str, Any] = {"workers": made.workers if train.workers == "auto" else train.workers}
    if train.precision == "auto":
        chosen |= {"precision": made.precision, "layout": made.layout}
    return recipe.model_copy(update={"train": train.model_copy(update=chosen)})


def _row(point: Combination, metrics: dict[str, Any], folder: Path) -> dict[str, Any]:
    key = metrics["primary_metric"]
    models = metrics["models"]
    student, baseline = models["student"], models.get("baseline")
    runs = metrics.get("validations") or [metrics.get("validation")]
    known = [v for v in runs if v]
    return {
        "name": point.name,
        "values": point.values,
        "folder": str(folder),
        "validation": {k: sum(v[k] for v in known) / len(known) for k in known[0]} if known else None,
        "student": student["metrics"][key],
        "student_std": (student.get("metrics_std") or {}).get(key),
        "baseline": None if baseline is None else baseline["metrics"][key],
        "teacher": models["teacher"]["metrics"][key] if "teacher" in models else None,
        "interval": None if metrics.get("interval") is None else metrics["interval"]["student_minus_baseline"],
        "gap_closed": metrics["gap_closed"],
        "parameters": student["parameters"],
        "latency_ms": student["latency_ms"],
        "cost": {k: v for k, v in metrics["cost"].items() if not isinstance(v, str)},
    }


def _best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Chosen on validation: the highest accuracy, of equal ones the lowest nll, then the first. The test split has no say."""
    if any(row["validation"] is None for row in rows):
        raise UsageError(Problem("data.valid", "a sweep chooses on validation, and there is no validation split."))
    best = max(rows, key=lambda row: (row["validation"]["accuracy"], -row["validation"]["nll"]))
    return {"best": best["name"], "chosen_on": "validation accuracy"}


def _sum(values: list[Any]) -> float | int | None:
    return None if any(v is None for v in values) else sum(values)


def _bring_up(out: Path, best: Combination, progress: Progress) -> None:
    """The best student, its exports, metrics and recipe, in the sweep's own folder."""
    folder = out / "runs" / best.name
    made = read_recipe(folder).model_copy(update={"export": best.recipe.export, "track": best.recipe.track})
    if best.recipe.export and set(best.recipe.export) - set(read_json(folder / "metrics.json")["export"]):
        progress.say(f"exporting {', '.join(best.recipe.export)}")
        export_run(folder, list(best.recipe.export))
    for name in ("student", "baseline", "export"):
        if (folder / name).is_dir():
            with tempfile.TemporaryDirectory(prefix=".copy.", suffix=".tmp", dir=out) as temporary:
                shutil.copytree(folder / name, Path(temporary) / name)
                commit_folder(Path(temporary) / name, out / name)
    for name in ("environment.json", "analysis.json", "log.jsonl", "metrics.json"):
        write_atomic(out / name, (folder / name).read_bytes())
    write_atomic(out / "recipe.yaml", made.to_yaml())
