"""metrics.json: what was measured, of one seed and of several."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch

from limbeck import __version__
from limbeck.data import Data
from limbeck.engine import Engine
from limbeck.evaluate import agreement, bootstrap_interval, latency, metrics, seeds_interval, throughput
from limbeck.loop import Trained
from limbeck.models import Model, describe
from limbeck.progress import peak_rss_bytes
from limbeck.recipe import Recipe
from limbeck.types import Inputs
from limbeck.verdict import gap_closed, verdict

__all__ = ["figures", "joint_metrics", "measures", "seed_metrics"]

PRIMARY = "accuracy"


def figures(
    model: Model,
    logits: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
    samples: tuple[Inputs, Inputs],
    engine: Engine,
    speed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything about one model: metrics on the test split, size, work and speed.

    inputs: prepared test samples on the CPU; the model is on ``engine``'s device in its precision. flops: of one sample (a multiply-add is 2).
    speed: latency and throughput, where another run has measured them.
    """
    return {"metrics": metrics(logits, labels), **measures(model, samples, engine, speed)}


def measures(model: Model, samples: tuple[Inputs, Inputs], engine: Engine, speed: dict[str, Any] | None = None) -> dict[str, Any]:
    """Size, work and speed of a model, as in :func:`figures`."""
    one, many = ({k: v.to(engine.device, engine.dtype if v.is_floating_point() else None) for k, v in inputs.items()} for inputs in samples)
    if speed is not None:
        return {**describe(model, one), **speed}
    return {
        **describe(model, one),
        "latency_ms": {**latency(model, one), "threads": torch.get_num_threads()},
        "throughput": {"items_per_second": throughput(model, many), "batch_size": len(next(iter(many.values())))},
    }


def seed_metrics(
    recipe: Recipe,
    data: Data,
    measured: dict[str, Any],
    logits: dict[str, np.ndarray[Any, Any]],
    runs: dict[str, Trained],
    exported: dict[str, Any],
    *,
    cost: dict[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    """The metrics of one seed. measured: figures by role; cost: teacher_items, teacher_seconds and
    total_seconds so far."""
    labels = data.test.labels
    models: dict[str, Any] = {role: dict(measured[role]) for role in ("teacher", "baseline", "student") if role in measured}
    interval = None
    if "teacher" in logits:
        for role in set(models) - {"teacher"}:
            models[role]["agreement"] = agreement(logits[role], logits["teacher"])
    if "baseline" in logits:
        right = {role: (logits[role].argmax(1) == labels).astype(np.float64) for role in ("student", "baseline")}
        interval = bootstrap_interval(right["student"], right["baseline"], recipe.data.seed)
    best = [row["valid"] for row in runs["student"].history if row["valid"] is not None and row["epoch"] == runs["student"].selected_epoch]
    found: dict[str, Any] = {
        "limbeck": __version__,
        "task": recipe.task,
        "primary_metric": PRIMARY,
        "seeds": [recipe.seed],
        "models": models,
        "gap_closed": gap_closed(_primary(models, "teacher"), _primary(models, "baseline"), models["student"]["metrics"][PRIMARY]),
        "interval": None
        if interval is None
        else {"student_minus_baseline": interval, "level": 0.95, "method": "paired bootstrap over test items"},
        "verdict": verdict(models, interval, 1, "over the test items", alone=recipe.teacher is None),
        "distilled": recipe.teacher is not None,
        "validation": best[0] if best else None,
        "cost": {
            **cost,
            "train_seconds": runs["student"].seconds,
            "baseline_seconds": runs["baseline"].seconds if "baseline" in runs else 0.0,
            "steps": runs["student"].steps,
            "peak_rss_bytes": peak_rss_bytes(),
        },
        "export": exported,
        "data": {
            "train": len(data.train),
            "labelled": int((data.train.labels >= 0).sum()),
            "valid": len(data.valid),
            "test": len(data.test),
        },
        "notes": notes,
    }
    return found


def joint_metrics(results: list[dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """Several seeds as one: each metric is the mean, ``metrics_std`` the sample deviation; and the index of the seed that is best on validation."""
    best = max(range(len(results)), key=lambda i: (results[i]["validation"] or {}).get(PRIMARY) or 0.0)
    models = {role: _over_seeds([r["models"][role] for r in results], best) for role in results[best]["models"]}
    interval = None
    if "baseline" in models:
        interval = seeds_interval(
            [r["models"]["student"]["metrics"][PRIMARY] - r["models"]["baseline"]["metrics"][PRIMARY] for r in results]
        )
    count = len(results)
    costs = [r["cost"] for r in results]
    joint = {
        **results[best],
        "seeds": [seed for r in results for seed in r["seeds"]],
        "models": models,
        "gap_closed": gap_closed(_primary(models, "teacher"), _primary(models, "baseline"), models["student"]["metrics"][PRIMARY]),
        "interval": None
        if interval is None
        else {"student_minus_baseline": interval, "level": 0.95, "method": f"t interval over {count} paired seeds"},
        "verdict": verdict(models, interval, count, f"over {count} seeds", alone=not results[best].get("distilled", True)),
        "cost": {k: _joined(k, [c[k] for c in costs]) for k in costs[0]},
        "best_seed": results[best]["seeds"][0],
        "validations": [r["validation"] for r in results],
        "runs": [{"seed": r["seeds"][0], **{role: m["metrics"] for role, m in r["models"].items()}} for r in results],
    }
    return joint, best


def _over_seeds(rows: list[dict[str, Any]], best: int) -> dict[str, Any]:
    """One model of several seeds: its metrics over them, all else of the best seed."""
    chosen = rows[best]
    each = {name: [row["metrics"][name] for row in rows] for name in chosen["metrics"]}
    joined = {
        **chosen,
        "metrics": {name: statistics.fmean(values) for name, values in each.items()},
        "metrics_std": {name: statistics.stdev(values) for name, values in each.items()},
    }
    if "agreement" in chosen:
        joined["agreement"] = statistics.fmean(row["agreement"] for row in rows)
    if all("peers" in row for row in rows):
        joined["peers"] = [_over_seeds(list(peer), best) for peer in zip(*(row["peers"] for row in rows), strict=True)]
    return joined


def _primary(models: dict[str, Any], role: str) -> float | None:
    return models[role]["metrics"][PRIMARY] if role in models else None


def _joined(name: str, values: list[Any]) -> Any:
    """The cost of several seeds: the largest memory, the sum of the rest, unknown where one is unknown."""
    if any(value is None for value in values):
        return None
    return max(values) if name == "peak_rss_bytes" else sum(values)
