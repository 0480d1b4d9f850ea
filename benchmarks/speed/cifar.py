"""P4 and P5: the CIFAR-10 pair over 10 epochs."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from speed import measuring, work
from speed.turns import Side, alternate

EPOCHS = 10
BATCH = 128


def caching(quick: bool) -> dict[str, Any]:
    """P4: a whole training of 10 epochs with a cache, its filling included, against the same training with the teacher in every step.

    Each training is a fresh process; they alternate. S is the student-only epoch of Limbeck's own loop (the same recipe without a teacher), and T
    the rest of a live epoch. The ceiling of the gain is E(S+T)/(E S + K T), where no more than E views are ever asked for.
    """
    rows, pairs = (3 * BATCH, 1) if quick else (6 * BATCH, 7)
    kept = (1, work.default_views())
    prepared = work.cifar("p4", rows=rows, test=128, epochs=EPOCHS, layout="channels_last", checkpoint_every=10**6)
    plans: dict[str, dict[str, Any]] = {"live": {"mode": "off", "views": "live"}, "student only": {}}
    plans |= {f"K = {views}": {"mode": "auto", "views": views, "codec": "float16"} for views in kept}
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for number in range(pairs + 1):  # the first round is warm-up (file caches)
        for name in plans if number % 2 == 0 else reversed(plans):
            taken = training(prepared, name, plans[name], number)
            if number:
                seconds[name].append(taken)
    live, student = seconds["live"], seconds["student only"]
    figures = [
        measuring.figure(f"{name}: times as fast as live", measuring.ratio(live, seconds[name])) for name in plans if name.startswith("K")
    ]
    for views in kept:
        cached = seconds[f"K = {views}"]
        ideal = [s + min(views, EPOCHS) / EPOCHS * (both - s) for s, both in zip(student, live, strict=True)]
        figures.append(measuring.figure(f"K = {views}: share of the ceiling", measuring.ratio(ideal, cached), at_least=0.9))
    return {
        "figures": figures,
        "floor": {"what": "student-only step", "ms": 1000 * measuring.median(student) / (EPOCHS * rows / BATCH)},
        "seconds": seconds,
        "left_out": "one round (warm-up); imports, loading, models; validation, evaluation, export",
    }


def training(prepared: dict[str, Any], name: str, cache: dict[str, Any], number: int) -> float:
    """The seconds of one training in a fresh process, from the first teacher batch or step on to the last step."""
    folder = Path(prepared["work"])
    recipe = dict(prepared["recipe"])
    if name == "student only":
        recipe = {k: v for k, v in recipe.items() if k not in ("teacher", "baseline", "teacher_cache")}
        recipe["objective"] = [{"loss": "cross_entropy", "weight": 1.0}]
    else:
        recipe["teacher_cache"] = {**cache, **({"path": str(work.fresh(f"p4/cache-{number}-{name[4:]}"))} if "codec" in cache else {})}
    steps = EPOCHS * (len(work.train_rows(prepared)) // BATCH)
    side = Side(name, "limbeck_side.py", {"steps": steps, "out": str(folder), "name": "p4", "recipe": recipe, "filling": True})
    try:
        taken = side.turn()
        side.end()
    finally:
        side.close()
    return taken


def end_to_end(quick: bool) -> dict[str, Any]:
    """P5: 10 epochs of 2,560 images, a turn being an epoch. Float32 channels-first, Adam at 1e-4, T = 6, alpha = 0.7 for all: the article's settings.

    Accuracy is of the trained students on the 10,000 test images, by one and the same code. torchdistill gets the ``num_workers`` (0, 1, 2) that is
    fastest here in a short trial.
    """
    rows = (4 if quick else 20) * BATCH
    settings = {"optimizer": "adam", "lr": 1e-4, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0, "clip_norm": None}
    prepared = work.cifar("p5", trained=True, rows=rows, test=128, epochs=EPOCHS, **settings)
    folder = prepared["work"]
    steps = rows // BATCH
    common = {"steps": steps, "out": folder, "work": folder}
    workers, trial = fastest_workers(common, 4 if quick else 16)
    recipe = prepared["recipe"]
    auto = {**recipe, "train": {**recipe["train"], "precision": "auto"}}
    cached = {**recipe, "teacher_cache": {"mode": "auto", "views": 1, "path": str(work.fresh("p5/cache")), "codec": "float16"}}
    sides = [
        Side("limbeck", "limbeck_side.py", {**common, "name": "limbeck", "recipe": recipe}),
        Side("torchdistill", "torchdistill_side.py", {**common, "name": "torchdistill", "workers": workers}, python=str(measuring.PEERS)),
        Side("article", "article_side.py", {**common, "name": "article"}),
        Side("limbeck auto", "limbeck_side.py", {**common, "name": "auto", "recipe": auto}),
        Side("student only", "plain_side.py", {**common, "name": "floor", "student_only": True}),
    ]
    sides.append(Side("limbeck cached", "limbeck_side.py", {**common, "name": "cached", "recipe": cached, "filling": True}))
    # the first epoch holds the filling of the cache and everybody's warm-up: kept in the sums, left out of the pairs
    everything, facts = alternate(sides, EPOCHS, warm=0)
    seconds = {name: times[1:] for name, times in everything.items()}
    figures = []
    for peer in ("torchdistill", "article"):
        name = "the article's loop" if peer == "article" else peer
        figures.append(measuring.figure(f"live, times as fast as {name}", measuring.ratio(seconds[peer], seconds["limbeck"]), at_least=1.0))
        figures.append(measuring.figure(f"auto, times as fast as {name}", measuring.ratio(seconds[peer], seconds["limbeck auto"])))
    total = {name: sum(times) for name, times in everything.items()}
    student = EPOCHS * statistics.median(seconds["student only"])
    ideal = student + (total["limbeck"] - student) / EPOCHS
    for peer in ("torchdistill", "article"):
        figures.append(measuring.figure(f"cached (filling included), times as fast as {peer}", total[peer] / total["limbeck cached"]))
    figures.append(measuring.figure("cached: share of the ceiling", ideal / total["limbeck cached"], at_least=0.9))
    accuracy = {side.name: 100 * work.accuracy(folder, Path(folder) / f"{side.key}.safetensors") for side in sides if side.key != "floor"}
    figures += [measuring.figure(f"accuracy, {name}", value, "%") for name, value in accuracy.items()]
    return {
        "figures": figures,
        "floor": {"what": "student-only step of the plain loop", "ms": 1000 * measuring.median(seconds["student only"]) / steps},
        "seconds": everything,
        "total_seconds": total,
        "steps_a_turn": steps,
        "torchdistill_workers": {"chosen": workers, "trial_seconds": trial},
        "sides": facts,
        "left_out": "the first epoch of each side from the pairs (not from the totals); imports, loading, models; validation, evaluation, export",
    }


def fastest_workers(common: dict[str, Any], steps: int) -> tuple[int, dict[str, float]]:
    """The number of loader processes with which torchdistill is fastest here: one warm-up turn and one that counts for each."""
    trial: dict[str, float] = {}
    steps = min(steps, common["steps"])
    for workers in (0, 1, 2):
        config = {**common, "steps": steps, "name": "trial", "workers": workers}
        side = Side("torchdistill trial", "torchdistill_side.py", config, python=str(measuring.PEERS))
        try:
            side.turn()
            trial[str(workers)] = side.turn()
        finally:
            side.close()
    return int(min(trial, key=lambda k: trial[k])), trial
