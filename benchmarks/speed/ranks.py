"""S1 and S2: the training step on several ranks of one machine, against threads and against a plain DistributedDataParallel loop."""

from __future__ import annotations

from typing import Any

from speed import measuring, work
from speed.turns import Side, alternate

LEFT_OUT = "the first turn of each side (warm-up); imports, loading, models, joining; validation, evaluation, export"


def scaling(quick: bool) -> dict[str, Any]:
    """S1: two ranks of one thread each against one process of two threads; the same global batch."""
    steps, pairs = (4, 3) if quick else (20, 9)
    prepared = work.cifar("s1", rows=128 * steps * (pairs + 1), layout="channels_last", checkpoint_every=10**6)
    common = {"steps": steps, "out": prepared["work"], "work": prepared["work"], "recipe": prepared["recipe"]}
    sides = [
        Side("2 ranks", "ranks_side.py", {**common, "name": "ranks", "ranks": 2, "script": "limbeck_side.py"}, threads=1),
        Side("2 threads", "limbeck_side.py", {**common, "name": "threads"}, threads=2),
        Side("1 thread", "limbeck_side.py", {**common, "name": "alone"}, threads=1),
    ]
    seconds, facts = alternate(sides, pairs)
    ratio = measuring.ratio(seconds["2 threads"], seconds["2 ranks"])
    figures = [
        measuring.figure("2 ranks x 1 thread, times as fast as 1 x 2", ratio, at_least=0.85),
        measuring.figure("times as fast as 1 x 1", measuring.ratio(seconds["1 thread"], seconds["2 ranks"])),
    ]
    return _result(figures, seconds, facts, steps)


def against_ddp(quick: bool) -> dict[str, Any]:
    """S2: Limbeck and a plain DDP loop, both with two ranks of one thread."""
    steps, pairs = (4, 3) if quick else (20, 9)
    prepared = work.cifar("s2", rows=128 * steps * (pairs + 1), layout="channels_last", checkpoint_every=10**6)
    common = {"steps": steps, "out": prepared["work"], "work": prepared["work"], "ranks": 2}
    sides = [
        Side(
            "limbeck", "ranks_side.py", {**common, "name": "limbeck", "script": "limbeck_side.py", "recipe": prepared["recipe"]}, threads=1
        ),
        Side("plain DDP", "ranks_side.py", {**common, "name": "plain", "script": "plain_side.py"}, threads=1),
    ]
    seconds, facts = alternate(sides, pairs)
    ratio = measuring.ratio(seconds["limbeck"], seconds["plain DDP"])
    return _result([measuring.figure("Limbeck's step / plain DDP", ratio, at_most=1.03)], seconds, facts, steps)


def _result(figures: list[dict[str, Any]], seconds: dict[str, list[float]], facts: dict[str, Any], steps: int) -> dict[str, Any]:
    step_ms = {name: 1000 * measuring.median(times) / steps for name, times in seconds.items()}
    return {"figures": figures, "step_ms": step_ms, "seconds": seconds, "steps_a_turn": steps, "sides": facts, "left_out": LEFT_OUT}
