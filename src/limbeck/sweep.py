"""limbeck sweep: many students on one pass of the teacher, one table, and the best recipe written out."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from limbeck._folder import Stop, bring_up, finished, finished_metrics, goes_on, launched_by, make, own_folder, read_recipe, refuse_taken
from limbeck._recipe_check import differences as differing
from limbeck._sweep_plan import plan_sweep
from limbeck._sweep_share import Lending, judge
from limbeck._vary import Combination
from limbeck.again import export_run
from limbeck.errors import Problem, UsageError
from limbeck.progress import Progress
from limbeck.ranks import joined
from limbeck.report import write_sweep_report
from limbeck.run import finite, is_left_over, read_json, write_atomic, write_json
from limbeck.spine import execute

__all__ = ["sweep"]

_COST = ("teacher_items", "cache_hits", "train_seconds", "baseline_seconds", "total_seconds")


def sweep(
    points: list[Combination],
    *,
    base: Path,
    vary: dict[str, list[str]],
    out: Path,
    resume: bool = False,
    seeds: int = 1,
    progress: str = "auto",
    dry_run: bool = False,
    metrics_port: str | None = None,
) -> dict[str, Any]:
    """Run every combination, each in ``out/runs/NAME``; the teacher is asked once for all of them, and a baseline is trained once for each student
    and seed. The best on validation is exported, and stands with its recipe in ``out``.

    Returns what stands in ``sweep.json``: one row a combination, in the order given, and which is the best. dry_run: what it would take
    instead (:func:`limbeck._sweep_plan.plan_sweep`); nothing is written. Raises UsageError with all that is wrong with any combination, before the
    first step.
    """
    plan = {"vary": vary, "seeds": seeds, "recipes": {p.name: p.recipe.model_dump(mode="json") for p in points}}
    teachers = points[0].recipe.teacher_ranks
    with joined(teachers) as ranks, Progress(progress if ranks.main else "none", metrics_port if ranks.main else None) as shown:
        resume = goes_on(out, resume, ranks)
        if ranks.main:
            refuse_taken(out, resume)
            _same_plan(out, plan, resume)
        lending = Lending(base, out, seeds, seeds * len(points), ranks, plan=dry_run)
        begun = judge(points, lending, vary)
        if dry_run:
            return plan_sweep(points, lending, begun, shown)
        done = ranks.from_main(lambda: _finished(out, points, lending))
        if done is not None:
            shown.say(f"{out} is finished; nothing is left to do.")
            return dict(done)
        with own_folder(out, resume) if ranks.main else nullcontext():
            if ranks.main:
                make(out / "runs")
            # a sweep is a run to whoever asks whether a folder holds one; its recipe becomes the best one's
            if ranks.main and not (out / "plan.json").exists():
                write_atomic(out / "recipe.yaml", points[0].recipe.to_yaml())
                write_json(out / "plan.json", {**plan, **launched_by()})
            rows: list[dict[str, Any]] = []
            for number, point in enumerate(points, start=1):
                folder = lending.folder(point)
                shown.say(f"[{number}/{len(points)}] {', '.join(f'{k} = {v}' for k, v in point.values.items())}")
                metrics = ranks.from_main(partial(finished_metrics, folder))
                if metrics is None:
                    metrics = execute(lending.job(point), shown, begun=begun)
                    begun = None
                lending.took(point)
                lending.keep_data(points[number:])
                rows.append(_row(point, metrics, folder.relative_to(out)))
            with Stop(ranks).listening():
                return dict(ranks.from_main(lambda: finite(_ended(out, points, rows, metrics, vary, shown))))


def _finished(out: Path, points: list[Combination], lending: Lending) -> dict[str, Any] | None:
    if (out / "sweep.json").is_file() and (out / "report.html").is_file() and all(finished(lending.folder(p)) for p in points):
        return dict(read_json(out / "sweep.json"))
    return None


def _ended(
    out: Path, points: list[Combination], rows: list[dict[str, Any]], metrics: dict[str, Any], vary: dict[str, list[str]], shown: Progress
) -> dict[str, Any]:
    """Choose, bring up the best, write the table and the report. metrics: of one combination."""
    result = {
        "limbeck": metrics["limbeck"],
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
    begun = {key: value for key, value in read_json(out / "plan.json").items() if key != "launch"}
    lines = differing(begun, json.loads(json.dumps(plan)), "")
    if lines:
        raise UsageError(
            [Problem("--resume", f"this sweep was begun with something else: {line}", "Name another --out.") for line in lines[:8]]
        )


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
    made = read_recipe(folder).model_copy(update={"export": best.recipe.export})
    if best.recipe.export and set(best.recipe.export) - set(read_json(folder / "metrics.json")["export"]):
        progress.say(f"exporting {', '.join(best.recipe.export)}")
        export_run(folder, list(best.recipe.export))
    bring_up(folder, out)
    for name in ("environment.json", "analysis.json", "log.jsonl", "metrics.json"):
        write_atomic(out / name, (folder / name).read_bytes())
    write_atomic(out / "recipe.yaml", made.to_yaml())
