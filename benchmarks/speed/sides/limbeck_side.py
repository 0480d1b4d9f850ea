"""Limbeck itself, by a recipe. The run goes through the whole spine; its loop reports each step, and the run ends with the training.

Left out: validation at the end of an epoch (no other side validates), evaluation, export and report. ``fixed_padding``: texts are padded to
max_length and come in random order, as without length buckets (P6). ``filling``: the first turn begins with the teacher's pass over what its cache
lacks of the training rows, instead of the first step (P4, P5). Its answers on the test rows, which are evaluation, are asked for before that.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # the first optimiser of a process imports it: imports are outside of every turn
from safetensors.torch import save_file
from speed.turns import Turn

from limbeck import _roles, spine
from limbeck.reading import build_recipe


class Padded:
    """A builder whose texts are all as long as the longest allowed."""

    def __init__(self, builder: Any, length: int) -> None:
        self.builder, self.length = builder, length

    def __call__(self, request: Any) -> Any:
        batch = self.builder(request)
        student = {k: torch.nn.functional.pad(v, (0, self.length - v.shape[1])) for k, v in batch.student.items()}
        teacher = None if batch.teacher is None else student
        return replace(batch, student=student, teacher=teacher)


def main() -> None:
    config = json.loads(sys.argv[1])
    turn = Turn(config["steps"])
    loop, keep_answers, begun = _roles.fit, spine.keep_answers, False

    def begin() -> None:
        nonlocal begun
        if not begun:
            turn.begin()
        begun = True

    def fill_first(answers: Any, *arguments: Any, **named: Any) -> Any:
        if config.get("filling"):
            wanted = answers.requests
            answers.requests = {**wanted, "teach": []}
            keep_answers(answers, *arguments, **named)
            answers.requests = wanted
            begin()
        return keep_answers(answers, *arguments, **named)

    def fit(
        student: Any, teacher: Any, objective: Any, feed: Any, engine: Any, settings: Any, seed: int, recorder: Any, *more: Any
    ) -> None:
        if config.get("fixed_padding"):
            feed.plan._lengths = None
            feed = replace(feed, builder=Padded(feed.builder, config["recipe"]["data"]["max_length"]))

        def stop() -> bool:
            if torch.cuda.is_available() and turn.last:
                torch.cuda.synchronize()  # what this turn has only queued is part of it
            turn.step()
            return False

        recorder = replace(recorder, stop=stop, validate=None)
        begin()
        loop(student, teacher, objective, feed, engine, settings, seed, recorder, *more)
        if int(os.environ.get("RANK", "0")):
            os._exit(0)
        weights = Path(config["out"]) / f"{config['name']}.safetensors"
        save_file({k: v.contiguous() for k, v in student.module.state_dict().items()}, weights)
        turn.end(engine=engine.label())
        if "RANK" in os.environ:
            os._exit(0)  # leaving in order would wait for the other ranks
        sys.exit(0)  # the rest of the run is not measured

    recipe = build_recipe(config["recipe"], command="train" if config["recipe"].get("teacher") is None else "distill")
    # how fast the teacher answers is measured for three seconds before it is let go: evaluation, which is left out of every side
    unmeasured = dict.fromkeys(("parameters", "bytes", "flops", "latency_ms", "throughput"))
    with (
        patch.object(_roles, "fit", fit),
        patch.object(spine, "keep_answers", fill_first),
        patch.object(spine, "measures", lambda *_: unmeasured),
        tempfile.TemporaryDirectory(dir=config["out"]) as folder,
    ):
        spine.run_recipe(recipe, base=Path.cwd(), out=Path(folder) / "run", progress="none")


if __name__ == "__main__":
    main()
