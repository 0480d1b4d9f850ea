"""limbeck sweep --dry-run: what all combinations together would take, from what the planner measures of one of each kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from limbeck._begin import Begun
from limbeck._folder import finished
from limbeck._planner import duration
from limbeck._sweep_share import Lending, baseline_key, teacher_keys, without_numbers
from limbeck._vary import Combination
from limbeck.progress import Progress
from limbeck.spine import execute

__all__ = ["plan_sweep"]

# Of `train`: what changes no time.
_TIMELESS = ("lr", "momentum", "nesterov", "betas", "weight_decay", "schedule", "warmup", "clip_norm", "checkpoint_every", "log_every")


@dataclass(frozen=True)
class _Kind:
    """Combinations that take the same time, and the plan of the first of them."""

    names: list[str]
    plan: dict[str, Any]


def plan_sweep(points: list[Combination], lending: Lending, begun: Begun | None, progress: Progress) -> dict[str, Any]:
    """How many trainings a sweep is, and what it would take: one teacher's own training and one pass for each teacher and its cache, all students,
    and one baseline a student and seed. Said in a table, and returned with null for what is unknown. Nothing is written.

    begun: what was built for the first combination that is left. Combinations that differ in numbers alone take the same time, so the first of
    them is measured. Of a sweep to be resumed: what is left; a combination that was begun counts whole.
    """
    left = [p for p in points if not finished(lending.folder(p))]
    alike: dict[str, list[Combination]] = {}
    for point in left:
        alike.setdefault(json.dumps(without_numbers(lending.recipe(point), _TIMELESS), sort_keys=True), []).append(point)
    kinds: list[_Kind] = []
    for same in alike.values():
        told = ", ".join(f"{k} = {v}" for k, v in same[0].values.items())
        progress.say(f"Measuring {told}" + (f", for {len(same)} combinations." if len(same) > 1 else "."))
        kinds.append(_Kind([p.name for p in same], execute(lending.job(same[0]), progress, dry_run=True, begun=begun)))
        begun = None
    by_name = {name: kind.plan for kind in kinds for name in kind.names}
    once: dict[str, dict[str, float | None]] = {"teacher_training": {}, "fill": {}, "baselines": {}}
    rows: list[dict[str, Any]] = []
    for point in left:
        plan, recipe = by_name[point.name], lending.recipe(point)
        time, cache = plan["time"], plan["cache"]
        teacher = next(iter(teacher_keys(recipe)), None)  # of several no plan is made
        if teacher is not None and time["teacher_training_seconds"]:
            once["teacher_training"].setdefault(teacher, time["teacher_training_seconds"])
        filling = time["fill_seconds"] if cache is not None and cache["kept"] else 0.0
        if filling != 0:
            # a teacher that is still to be trained has no directory yet
            parts = recipe.model_dump(mode="json", include={"teacher", "data", "teacher_cache"})
            folder = (cache["folders"] or {}).get("teach", json.dumps([teacher, parts], sort_keys=True))
            once["fill"][folder] = _most(once["fill"].get(folder, 0.0), filling)  # more epochs may ask for more views
        key = baseline_key(recipe)
        if recipe.baseline and key not in lending.runs:
            once["baselines"].setdefault(key, time["baseline_seconds"])
        beside = [time["teacher_training_seconds"] or 0.0, time["baseline_seconds"] or 0.0, filling]
        student = None if time["total_seconds"] is None or None in beside else time["total_seconds"] - sum(beside)
        rows.append({"name": point.name, "values": point.values, "student_seconds": student})
    seconds: dict[str, float | None] = {f"{what}_seconds": _sum(list(each.values())) for what, each in once.items()}
    seconds["students_seconds"] = _sum([row["student_seconds"] for row in rows])
    found = {
        "dry_run": True,
        "out": str(lending.out),
        "combinations": len(points),
        "left": len(left),
        "seeds": lending.seeds,
        "trainings": {
            "teachers": len(once["teacher_training"]),
            "students": len(left) * lending.seeds,
            "baselines": len(once["baselines"]) * lending.seeds,
        },
        "teacher_passes": len(once["fill"]),
        "time": {
            **seconds,
            "total_seconds": _sum(list(seconds.values())),
            "left_out": kinds[0].plan["time"]["left_out"] if kinds else None,
        },
        "rows": rows,
        "plans": [{"measured": kind.names[0], "for": kind.names, **kind.plan} for kind in kinds],
    }
    for line in _table(found):
        progress.say(line)
    return found


def _most(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else max(a, b)


def _sum(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None


def _table(found: dict[str, Any]) -> list[str]:
    """What a person reads."""
    trainings, time = found["trainings"], found["time"]
    of = f" of {found['combinations']}" if found["left"] != found["combinations"] else ""
    seeds = f", {found['seeds']} seeds" if found["seeds"] > 1 else ""
    lines = [
        ("teachers' training", time["teacher_training_seconds"], f"{trainings['teachers']} to be trained first"),
        ("filling", time["fill_seconds"], f"{found['teacher_passes']} pass{'es' * (found['teacher_passes'] != 1)} of a teacher"),
        ("students", time["students_seconds"], f"{trainings['students']} trainings"),
        ("baselines", time["baselines_seconds"], f"{trainings['baselines']} training{'s' * (trainings['baselines'] != 1)}"),
        ("together", time["total_seconds"], f"without {time['left_out']}" if time["left_out"] else "nothing is left to do"),
    ]
    shown = [f"  {name:19}{duration(value):>10}  {what}" for name, value, what in lines if value != 0 or name == "together"]
    return [f"The sweep: {found['left']}{of} combinations{seeds}. Nothing is written.", *shown]
