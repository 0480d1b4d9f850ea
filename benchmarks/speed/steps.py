"""P1, P2 and P3: one optimiser step of Limbeck against the plain hand-written loop (speed/sides/plain_side.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speed import measuring, work
from speed.turns import Side, alternate


def live_step(quick: bool) -> dict[str, Any]:
    """P1: the CIFAR-10 pair, batch 128, float32 channels-last for both, the teacher in every step."""
    steps, pairs = (4, 3) if quick else (20, 9)
    prepared = work.cifar("p1", rows=128 * steps * (pairs + 1), layout="channels_last", checkpoint_every=10**6)
    return against_plain(prepared, steps, pairs, at_most=1.03)


def tiny_step(quick: bool) -> dict[str, Any]:
    """P2: two tiny MLPs on 8x8 images, batch 32, float32: what Limbeck's loop costs where the arithmetic costs nothing."""
    steps, pairs = (240, 5) if quick else (960, 11)  # an epoch has 48 steps
    prepared = work.digits("p2", epochs=steps * (pairs + 1) // 48, checkpoint_every=10**6)
    return against_plain(prepared, steps, pairs, at_most=1.15)


def cached_step(quick: bool) -> dict[str, Any]:
    """P3: as P1 with a complete cache of one view, against the plain loop without any teacher."""
    steps, pairs = (20, 3) if quick else (80, 9)
    # the same rows again and again: one view of 2,560 images is a small cache, and reading it is as much work as reading a large one
    rows = 128 * 20
    prepared = work.cifar("p3", rows=rows, epochs=steps * (pairs + 1) // 20, layout="channels_last", checkpoint_every=10**6)
    cache = {"mode": "auto", "views": 1, "path": str(Path(prepared["work"]) / "cache"), "codec": "float16"}
    recipe = work.save_recipe(prepared, {**prepared["recipe"], "teacher_cache": cache})
    measuring.limbeck("label", str(recipe), out=Path(prepared["work"]) / "label")
    prepared["recipe"]["teacher_cache"] = {**cache, "mode": "require"}
    found = against_plain(prepared, steps, pairs, at_most=1.05, floor_only=True)
    return {**found, "left_out": f"{found['left_out']}; filling the cache (limbeck label)"}


def against_plain(prepared: dict[str, Any], steps: int, pairs: int, *, at_most: float, floor_only: bool = False) -> dict[str, Any]:
    """Limbeck, the plain loop, and the plain loop without a teacher (the floor), in turns of ``steps`` steps."""
    folder = prepared["work"]
    common = {"steps": steps, "out": folder, "work": folder}
    sides = [Side("limbeck", "limbeck_side.py", {**common, "name": "limbeck", "recipe": prepared["recipe"]})]
    if not floor_only:
        sides.append(Side("plain", "plain_side.py", {**common, "name": "plain"}))
    sides.append(Side("student only", "plain_side.py", {**common, "name": "floor", "student_only": True}))
    seconds, facts = alternate(sides, pairs)
    against = "student only" if floor_only else "plain"
    step_ms = {name: 1000 * measuring.median(times) / steps for name, times in seconds.items()}
    return {
        "figures": [
            measuring.figure(f"Limbeck's step / {against}", measuring.ratio(seconds["limbeck"], seconds[against]), at_most=at_most),
        ],
        "floor": {"what": "student-only step of the plain loop", "ms": step_ms["student only"]},
        "step_ms": step_ms,
        "seconds": seconds,
        "steps_a_turn": steps,
        "sides": facts,
        "left_out": "the first turn of each side (warm-up); imports, loading, models; validation, evaluation, export",
    }
