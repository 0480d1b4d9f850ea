"""limbeck compare: whether a new run is worse than an old one, in accuracy, latency or size; for a CI job that guards a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from limbeck.errors import Problem, UsageError
from limbeck.run import read_json

__all__ = ["Allowed", "compare"]

_SAME_MACHINE = ("device_name", "threads", "platform", "cpu_count")

Verdict = Literal["same or better", "within what is allowed", "regression", "not compared"]


@dataclass(frozen=True)
class Allowed:
    """What a new run may lose. drop: of the primary metric, in points (0.5: from 90.0 % to 89.5 %); slowdown: of the median latency at batch 1,
    in percent; growth: of the bytes of the weights and of each export, in percent."""

    drop: float = 0.5
    slowdown: float = 20.0
    growth: float = 5.0


def compare(old: Path, new: Path, allowed: Allowed | None = None) -> dict[str, Any]:
    """Compare the students of two finished runs, and their exports.

    Returns ``{old, new, rows: [{what, old, new, change, unit, allowed, verdict, why}], notes, regressions: [what]}``. change: in points for metrics,
    in percent for the rest; positive is more. Latencies are compared where both were measured on the same kind of machine with the same threads. An
    export that the old run has and the new one has not is a regression.

    Raises: UsageError where the runs are of different tasks, or were judged by different metrics.
    """
    allowed = allowed or Allowed()
    before, after = (read_json(run / "metrics.json") for run in (old, new))
    for key, what in (("task", "task"), ("primary_metric", "metric")):
        if before[key] != after[key]:
            text = f"{old} has the {what} {before[key]}, and {new} has {after[key]}."
            raise UsageError(Problem("limbeck compare", text, "Compare runs of one task."))
    where = [read_json(run / "environment.json") for run in (old, new)]
    same_machine = all(where[0].get(key) == where[1].get(key) for key in _SAME_MACHINE)
    one, other = before["models"]["student"], after["models"]["student"]
    metric = before["primary_metric"]
    rows = [
        _metric(metric, one["metrics"][metric], other["metrics"][metric], allowed.drop),
        _ratio("latency p50, ms", _p50(one), _p50(other), allowed.slowdown, "" if same_machine else "measured on different machines"),
        _ratio("bytes of the weights", one["bytes"], other["bytes"], allowed.growth),
    ]
    for name, row in before["export"].items():
        if name not in after["export"]:
            rows.append(_row(f"{name}", row["bytes"], None, None, "%", allowed.growth, "regression", "the new run has no such export"))
            continue
        later = after["export"][name]
        rows.append(_ratio(f"{name}: bytes", row["bytes"], later["bytes"], allowed.growth))
        why = "" if same_machine else "measured on different machines"
        rows.append(_ratio(f"{name}: latency p50, ms", _p50(row), _p50(later), allowed.slowdown, why))
    notes = []
    if where[0]["facts"]["data"] != where[1]["facts"]["data"]:
        notes.append("The runs read different data, so a part of the difference may be that of the test samples.")
    if len(before["seeds"]) != len(after["seeds"]):
        notes.append(f"The runs have {len(before['seeds'])} and {len(after['seeds'])} seeds.")
    return {
        "old": str(old),
        "new": str(new),
        "rows": rows,
        "notes": notes,
        "regressions": [row["what"] for row in rows if row["verdict"] == "regression"],
    }


def _metric(name: str, old: float, new: float, drop: float) -> dict[str, Any]:
    change = 100 * (new - old)
    # what two decimals of a point cannot show is no drop beyond the allowed one
    verdict: Verdict = "same or better" if change >= 0 else "within what is allowed" if -change <= drop + 1e-9 else "regression"
    return _row(name, old, new, change, "points", drop, verdict)


def _ratio(name: str, old: float | None, new: float | None, most: float, why_not: str = "") -> dict[str, Any]:
    if old is None or new is None or not old or why_not:
        return _row(name, old, new, None, "%", most, "not compared", why_not or "it was not measured in both")
    change = 100 * (new / old - 1)
    verdict: Verdict = "same or better" if change <= 0 else "within what is allowed" if change <= most + 1e-9 else "regression"
    return _row(name, old, new, change, "%", most, verdict)


def _row(
    what: str, old: float | None, new: float | None, change: float | None, unit: str, allowed: float, verdict: Verdict, why: str = ""
) -> dict[str, Any]:
    return {"what": what, "old": old, "new": new, "change": change, "unit": unit, "allowed": allowed, "verdict": verdict, "why": why}


def _p50(row: dict[str, Any]) -> float | None:
    found = row.get("latency_ms")
    return None if found is None else found["p50"]
