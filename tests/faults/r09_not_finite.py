# ruff: noqa: E402 (the tests' own modules are found by the path that is set here)
"""R9: NaN and infinity, put in wherever one could come from: the run stops at that step and names it, and the weights are those before it.

Each case is a fit of a small student in float64 under settings drawn at random (optimiser, microbatches, clipping, average, whether the device
works behind), with one value put in at one step. The weights in the module, and the newest checkpoint, are compared byte by byte with those of a
fit that was left alone; then the fit goes on from its checkpoint without the value, and must end in the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

TESTS = Path(__file__).parents[1]
sys.path[:0] = [p for p in (str(TESTS), str(TESTS.parent / "src")) if p not in sys.path]

from limbeck import checkpoint
from limbeck.data import BatchBuilder
from limbeck.engine import Engine
from limbeck.errors import Interrupted, NonFinite
from limbeck.losses import LOSSES
from limbeck.models import wrap_module
from limbeck.objective import Objective
from limbeck.optimizer import Step
from limbeck.recipe import Term
from limbeck.teacher import LiveTeacher
from limbeck.types import Batch, Outputs, Signal
from support import CLASSES, KD_MIX, Big, Small, made, run_fit, settings, state_bytes, toy_data

PROMISE = "NaN and Inf in teacher logits, cache, batch, loss, gradient, optimiser state: stops at that step, names it, weights untouched"
SEED, COUNT = 9, 300
STEPS = 12
PLACES = ("teacher", "cache", "batch", "loss", "gradient", "optimiser")


class StopAfter:
    """Asks to leave after ``count`` steps."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


class _Poisoned(torch.autograd.Function):
    """The identity, whose gradient has ``value`` in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Any:
        spoilt = gradient[0].clone()
        spoilt.view(-1)[0] = ctx.value
        return spoilt, None


@contextlib.contextmanager
def put(place: str, value: float, step: int, parts: int, teacher: LiveTeacher, student: Any) -> Iterator[None]:
    """One ``value`` at optimiser step ``step`` (from 0), in its last microbatch."""
    calls = 0

    def due() -> bool:
        nonlocal calls
        calls += 1
        return calls == (step + 1) * parts

    with contextlib.ExitStack() as undo:
        if place in ("teacher", "cache"):
            # live: what the model says; cached: what was read
            target, name = (teacher.model.module, "forward") if place == "teacher" else (LiveTeacher, "__call__")
            real = getattr(target, name)

            def spoilt(*arguments: Any, **named: Any) -> Any:
                found = real(*arguments, **named)
                if due():
                    logits = found if isinstance(found, Tensor) else found.logits
                    logits[-1, 1] = value
                return found

            undo.enter_context(patch.object(target, name, spoilt))
        elif place == "batch":
            build = BatchBuilder.__call__

            def batch(self: Any, request: Any) -> Any:
                found = build(self, request)
                if request.step == step:
                    found.student["x"][-1, 0] = value
                return found

            undo.enter_context(patch.object(BatchBuilder, "__call__", batch))
        elif place in ("loss", "gradient"):
            forward = student.module.forward

            def answer(x: Tensor) -> Tensor:
                logits: Tensor = forward(x)
                if student.module.training and due():
                    if place == "gradient":
                        return _Poisoned.apply(logits, value)  # type: ignore[no-any-return]
                    logits = logits.clone()
                    logits.data[-1, 1] = value
                return logits

            undo.enter_context(patch.object(student.module, "forward", answer))
        else:
            real_step = Step.__call__

            def stepped(self: Step, skipped: Tensor | None) -> None:
                nonlocal calls
                real_step(self, skipped)
                calls += 1
                if calls == step:  # the state that the next step reads
                    one = next(iter(self._optimizer.state.values()))
                    one["momentum_buffer" if "momentum_buffer" in one else "exp_avg"].view(-1)[0] = value

            undo.enter_context(patch.object(Step, "__call__", stepped))
        yield


def one(folder: Path, place: str, rng: random.Random) -> str:
    """What did not hold of one case, or an empty text."""
    value = rng.choice((math.nan, math.inf, -math.inf if place not in ("teacher", "cache") else math.nan))
    step = rng.randrange(1 if place == "optimiser" else 0, STEPS - 1)
    accumulate = rng.choice((1, 2))
    train = settings(
        epochs=3, batch_size=8, accumulate=accumulate, optimizer=rng.choice(("adamw", "adam", "sgd")), clip_norm=rng.choice((None, 0.5)),
        ema=rng.choice((None, 0.9)), checkpoint_every=rng.choice((1, 4, 100)), log_every=rng.choice((1, 5)),
    )  # fmt: skip
    behind = rng.random() < 0.4
    data = toy_data(32)

    def go(name: str, stop: Any = lambda: False, spoil: bool = False) -> tuple[Any, Exception | None]:
        student = wrap_module(made(Small, "student"), role="student", data=data)
        teacher = LiveTeacher(wrap_module(made(Big, "teacher"), role="teacher", data=data), Engine(torch.device("cpu"), "float64"))
        poisoned = put(place, value, step, accumulate, teacher, student) if spoil else contextlib.nullcontext()
        try:
            with poisoned, patch.object(Engine, "asynchronous", behind):
                run_fit(folder / name, data=data, student=student, teacher=teacher, train=train, stop=stop)
        except (NonFinite, Interrupted) as error:
            return student, error
        return student, None

    wrong = []
    expected = go("before", StopAfter(step - 1))[0] if step else wrap_module(made(Small, "student"), role="student", data=data)
    student, error = go("spoilt", spoil=True)
    told = f"{place}, {value}, step {step + 1}, {train.optimizer}, {accumulate} parts, {'behind' if behind else 'at once'}"
    if not isinstance(error, NonFinite):
        return f"{told}: it went on ({error})"
    said = [f"Step {step + 1} of the student: "]
    if place == "optimiser":  # seen by the step that would use it, or by what looks before it saves or validates
        said = [
            f"{said[0]}the optimiser's state of body.weight ",
            f"Step {step} of the student left NaN or infinity in the optimiser's state of body.weight.",
        ]
    if error.exit_code != 3 or not str(error).startswith(tuple(said)):
        wrong.append(f"it said: {str(error)[:160]}")
    if state_bytes(student.module) != state_bytes(expected.module):
        wrong.append("the weights were touched")
    found = checkpoint.load_newest(folder / "spoilt" / "checkpoints")
    # a state that would spoil the next step is not committed either
    sound = step - 1 if place == "optimiser" else step
    if (0 if found is None else found[0]) != sound // train.checkpoint_every * train.checkpoint_every:
        wrong.append(f"the newest checkpoint is of step {found and found[0]}")
    whole, again = go("whole")[0], go("spoilt")[0]
    if state_bytes(whole.module) != state_bytes(again.module):
        wrong.append("it did not end in the same bytes afterwards")
    return f"{told}: {'; '.join(wrong)}" if wrong else ""


@dataclass
class Says:
    """A peer, or the student's average: it answers with what stands in the batch."""

    module: nn.Module = field(default_factory=nn.Identity)

    def __call__(self, inputs: Any) -> torch.Tensor:
        return inputs["said"]


def masked(rng: np.random.Generator) -> list[str]:
    """Every loss on logits, alone and with the others: all items masked, or a class at -inf in both. What is not finite, in words."""
    wrong = []
    losses = [e.name for e in LOSSES.values() if not any("feature" in r for r in e.reads)]
    for name in losses:
        for rows in ([False] * 6, [True, False] * 3):
            for labels in ([-1] * 6, [0, 1, 2, 3, 0, 1]):
                for masks in ("all of a row", "one class", "none"):
                    objective = Objective.build(
                        [Term(loss=name)], classes=list("abcd"), label_counts=[2, 2, 1, 1], peers=[Says(), Says()], student=Says()
                    )
                    student, teacher = (torch.tensor(rng.normal(size=(6, CLASSES))) for _ in range(2))
                    mask = torch.tensor(rows)
                    if masks == "all of a row":
                        student[~mask], teacher[~mask] = -math.inf, -math.inf
                    elif masks == "one class":
                        keep = torch.tensor(list(labels))
                        spare = (keep.clamp(min=0) + 1) % CLASSES
                        student[torch.arange(6), spare] = teacher[torch.arange(6), spare] = -math.inf
                    student.requires_grad_()
                    batch = Batch(
                        ids=torch.zeros(6, 2, dtype=torch.int64).numpy().astype(np.uint64), view=0, student={"said": teacher}, teacher=None,
                        labels=torch.tensor(labels), mask=mask
                    )  # fmt: skip
                    loss, _ = objective(Outputs(student), Signal(teacher), batch, progress=0.0, counts=objective.counts(batch))
                    loss.backward()
                    where = f"{name}, {masks} at -inf, {sum(rows)} of 6 items valid, labels {labels[0]}"
                    if not math.isfinite(float(loss.detach())):
                        wrong.append(f"{where}: the loss is {float(loss)}")
                    if student.grad is None or not bool(student.grad.isfinite().all()):
                        wrong.append(f"{where}: the gradient is {student.grad}")
    return wrong


def commands(folder: Path) -> list[str]:
    """The command line with a value that its own cache gives back, and with a teacher that says NaN while it is asked: exit code 3."""
    from limbeck.cache import CachedTeacher
    from running import limbeck, make_folder, recipe

    wrong = []
    make_folder(folder)
    path = recipe(folder, teacher_cache={"path": str(folder / "cache")}, train={"epochs": 2})
    calls, real = iter(range(100)), CachedTeacher.__call__

    def spoilt(self: Any, batch: Any, needs: Any) -> Signal:
        found = real(self, batch, needs)
        if next(calls) == 4:
            assert found.logits is not None
            found.logits[0, 0] = math.nan
        return found

    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(folder):
        with patch.object(CachedTeacher, "__call__", spoilt):
            code = limbeck("distill", path, "--out", "run")
        text = said.getvalue()
        if code != 3 or "Step 5 of the student: the term kd" not in text or "Traceback" in text:
            wrong.append(f"a cache that gives NaN: exit code {code}: {text[-300:]}")
        (folder / "nan.py").write_text(
            (folder / "nets.py").read_text()
            + "\n\ndef spoilt(num_classes=3):\n    net = teacher(num_classes)\n    net.head.bias.data[1] = float('nan')\n    return net\n"
        )
        for mode in ("auto", "off"):
            path = recipe(folder, f"{mode}.yaml", teacher={"model": "python:nan.py:spoilt"}, teacher_cache={"mode": mode})
            code = limbeck("distill", path, "--out", f"run-{mode}")
            text = said.getvalue()
            if code not in (2, 3) or "Traceback" in text or "nan" not in text.lower():
                wrong.append(f"a teacher that says NaN, cache {mode}: exit code {code}: {text[-300:]}")
    return wrong


def run(count: int | None = None, seed: int = SEED, places: tuple[str, ...] = PLACES, whole: bool = True) -> dict[str, Any]:
    """``count`` cases over all places in turn, then masked batches and whole command lines."""
    count, rng = COUNT if count is None else count, random.Random(seed)
    failed: list[str] = []
    tried: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="r9-") as name:
        for number in range(count):
            place = places[number % len(places)]
            tried[place] += 1
            wrong = one(Path(name) / str(number), place, rng)
            if wrong:
                failed.append(wrong)
            if number % 20 == 19:
                print(f"R9: {number + 1} of {count}, {len(failed)} failed", file=sys.stderr, flush=True)
        extra = masked(np.random.default_rng(seed))
        tried["masked"] = 12 * sum(not any("feature" in r for r in e.reads) for e in LOSSES.values())
        if whole:
            extra += commands(Path(name) / "commands")
            tried["command lines"] = 3
    assert KD_MIX
    total = sum(tried.values())
    details = {"tried": dict(tried), "failed": [*failed, *extra]}
    return {"id": "R9", "promise": PROMISE, "tried": total, "held": total - len(failed) - len(extra), "details": details, "seed": seed}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(int(sys.argv[1]) if len(sys.argv) > 1 else None), indent=2))
