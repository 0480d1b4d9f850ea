"""``train.accumulate: auto``: the fewest microbatches that fit into memory, by measuring those of the largest step, small ones first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from limbeck._choices import snapshot, student_choice
from limbeck._parts import Parts
from limbeck.data import cuts
from limbeck.engine import Engine
from limbeck.errors import Stopped
from limbeck.memory import available, largest
from limbeck.models import Capture, Model, Recomputed, load_state
from limbeck.objective import Objective
from limbeck.optimizer import make_optimizer
from limbeck.placement import Here, asked_in_the_loop
from limbeck.progress import Progress
from limbeck.randomness import seed_for
from limbeck.recipe import Recipe, Train
from limbeck.teacher import Teacher
from limbeck.types import Batch, Signal

__all__ = ["copies_of", "fewest", "how_to_train", "settled", "with_accumulate"]

SHARE = 0.8
"""Of the memory that is free: the rest is for what is not counted (kernels' own memory, the allocator's gaps, the logs, what else runs)."""

_FIRST = 2  # rows that are measured first; batch statistics cannot be taken of one


def how_to_train(
    recipe: Recipe,
    model: Model,
    teacher: Teacher | None,
    objective: Objective,
    parts: Parts,
    device: torch.device,
    progress: Progress,
    *,
    copies: int,
    ask: bool = False,
) -> tuple[Engine, int, dict[str, Any], dict[str, Any] | None]:
    """Precision and layout of a model's training, its microbatches a step, and why of both: as the recipe says, and measured where it says ``auto``.

    ask: prepare the teacher's inputs. The precision is measured on a microbatch that fits in float32; where it is another one, the microbatches
    are looked for again.
    """
    now = (model, teacher, objective, parts, device, progress)
    accumulate, record = settled(recipe, *now, copies=copies)
    batch = parts.first_batch(with_accumulate(recipe, accumulate), with_teacher=teacher is not None, ask=ask)
    signal = None
    if teacher is not None and objective.needs_teacher and recipe.train.precision == "auto":
        signal = teacher(Engine(device).send(batch), objective.teacher_needs)
    engine, why = student_choice(model, signal, objective, batch, device, recipe.train, recipe.seed)
    if record is not None and accumulate > 1 and recipe.train.precision == "auto" and engine.precision != "float32":
        accumulate, record = settled(recipe, *now, copies=copies, engine=engine)
    return engine, accumulate, why, record


def with_accumulate(recipe: Recipe, accumulate: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"accumulate": accumulate})})


def copies_of(recipe: Recipe, device: torch.device) -> int:
    """How many copies of the student's weights a run holds on the device beside the one that learns."""
    here = device.type == "cpu"  # elsewhere the baseline and the best epoch wait in the host's memory
    held = [here and recipe.baseline, recipe.train.ema is not None, here and recipe.train.select == "best"]
    return sum(held)


def fewest(rows: int, need: Callable[[int], float], most: float) -> int | None:
    """The fewest microbatches into which a step of ``rows`` is cut so that the largest needs at most ``most``; None where no cut is small enough.

    >>> fewest(43, lambda rows: 100 + 10 * rows, 340), fewest(43, lambda rows: 100 + 10 * rows, 110)
    (2, None)
    """
    for parts in range(1, max(1, rows // 2) + 1):
        if need(_most(rows, parts)) <= most:
            return parts
    return None


def _most(rows: int, parts: int) -> int:
    return max(stop - start for start, stop in cuts(rows, parts))


def settled(
    recipe: Recipe,
    model: Model,
    teacher: Teacher | None,
    objective: Objective,
    parts: Parts,
    device: torch.device,
    progress: Progress,
    *,
    copies: int,
    engine: Engine | None = None,
) -> tuple[int, dict[str, Any] | None]:
    """How many microbatches a step has, and the record of how that was chosen; as the recipe says where it says so. The model is left as it was.

    teacher: as it will teach, None where none does. copies: of the model's weights, that the run will hold beside it. engine: how the model will
    be trained; None: not known yet, and float32 is taken.

    Raises: Stopped where not even the smallest microbatches fit, or where the step has to be cut and its result depends on the cut.
    """
    settings = recipe.train
    if settings.accumulate != "auto":
        return settings.accumulate, None
    if engine is None:
        engine = Engine(device, "float32" if settings.precision == "auto" else settings.precision, settings.layout or "channels_first")
    batch = parts.widest_batch(recipe, with_teacher=teacher is not None, ask=asked_in_the_loop(teacher))
    rows = len(batch)
    began = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _put_back(model.module):
            work = _Work(model, teacher, objective, engine, settings, recipe.seed, batch)
            free = available(device, parts.ranks.local_size)
            held = work.held(copies, several=parts.ranks.size > 1)
            most = SHARE * free - held
            measured = _grown(rows, work.peak, most)
            chosen = fewest(rows, partial(_foreseen, measured), most)
            # A step is not a straight line in its rows: what was foreseen is tried.
            while chosen is not None and work.peak(_most(rows, chosen)) > most:
                chosen = next((n for n in range(chosen + 1, rows // 2 + 1) if _most(rows, n) <= 0.9 * _most(rows, chosen)), None)
    finally:
        objective.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    record: dict[str, Any] = {
        "value": chosen,
        "rows": rows,
        "microbatch_rows": None if chosen is None else _most(rows, chosen),
        "free_bytes": free,
        "may_use_bytes": int(SHARE * free),
        "held_bytes": held,
        "measured_bytes": {str(n): _whole(found) for n, found in measured.items()},
        "needed_bytes": None if chosen is None else _whole(held + _foreseen(measured, _most(rows, chosen))),
        "uncut_bytes": _whole(held + _foreseen(measured, rows)),
        "seconds": time.perf_counter() - began,
    }
    _judge(record, model, objective, parts)
    assert chosen is not None
    uncut, may = _gb(record["uncut_bytes"]), _gb(record["may_use_bytes"])
    record["reason"] = f"a step of {rows} rows needs {uncut} uncut, and {may} may be used"
    if chosen > 1:
        progress.say(f"train.accumulate: auto takes {chosen} microbatches of at most {_most(rows, chosen)} rows: {record['reason']}.")
    return chosen, record


@contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    """Afterwards every tensor is where it was, in its own number format, with its values; and every layer in its mode."""
    values, modes = snapshot(module), [(m, m.training) for m in module.modules()]
    parameters = [(p, p.data) for p in module.parameters()]
    buffers = [(m, dict(m._buffers)) for m in module.modules()]
    try:
        yield
    finally:
        module.zero_grad(set_to_none=True)
        for p, data in parameters:
            p.data = data
        for m, held in buffers:
            m._buffers.update(held)
        load_state(module, values)
        for m, training in modes:
            m.training = training


def _judge(record: dict[str, Any], model: Model, objective: Objective, parts: Parts) -> None:
    where, rows = "train.accumulate: auto", record["rows"]
    uncut, may, free = (_gb(record[name]) for name in ("uncut_bytes", "may_use_bytes", "free_bytes"))
    short = f"a step of {rows} rows needs {uncut}, and {may} of the {free} that are free may be used"
    ways = "Use train.gradient_checkpointing: true, a smaller train.batch_size, bf16"
    if record["value"] is None:
        raise Stopped(f"{where}: {short}. Not even {_most(rows, max(1, rows // 2))} rows at a time fit. {ways}, or a smaller model.")
    if record["value"] == 1:
        return
    why = ""
    if parts.batch_statistics:
        why = "the model has batch statistics (BatchNorm), which would be taken of each microbatch alone"
    elif not objective.per_item:
        why = "the objective has a term over the batch, which would be taken over each microbatch alone"
    if why:
        say = f"To cut all the same, say so: train.accumulate: {record['value']}."
        raise Stopped(f"{where}: {short}. The step is not cut, because {why}: the result would be another one. {ways}. {say}")


def _grown(rows: int, peak: Callable[[int], float], most: float) -> dict[int, float]:
    """What 2, 4, 8 ... rows hold, up to the whole step, as long as twice as many are likely to fit."""
    n = min(_FIRST, rows)
    measured = {n: peak(n)}
    while n < rows and measured[n] <= most:
        n = min(2 * n, rows)
        if len(measured) > 1 and _foreseen(measured, n) > most:
            break
        measured[n] = peak(n)
    return {n: found for n, found in measured.items() if found < math.inf} or measured


def _foreseen(measured: Mapping[int, float], rows: int) -> float:
    """Bytes for a number of rows, on straight lines between what was measured and from the last two on."""
    sizes = sorted(measured)
    if len(sizes) == 1:
        return measured[sizes[0]] * rows / sizes[0]
    high = next((i for i, n in enumerate(sizes) if n >= rows and i > 0), len(sizes) - 1)
    low, high = sizes[high - 1], sizes[high]
    return measured[low] + (measured[high] - measured[low]) / (high - low) * (rows - low)


class _Work:
    """Forward and backward passes of microbatches, as the loop does them, where the gradients of others are there already."""

    def __init__(
        self, model: Model, teacher: Teacher | None, objective: Objective, engine: Engine, settings: Train, seed: int, batch: Batch
    ) -> None:
        self._model, self._teacher, self._objective, self._engine, self._settings = model, teacher, objective, engine, settings
        self._seed, self._batch, self._counts = seed, batch, objective.counts(batch)
        engine.place(model.module)
        engine.place(objective)
        model.module.train()

    def held(self, copies: int, *, several: bool) -> int:
        """Bytes that stay through a step: the optimiser's state, the gradients (with several ranks also those that are sent), copies of the weights,
        and the batches that are ready."""
        modules = [self._model.module, self._objective]
        states = make_optimizer(self._settings, modules).state.values()
        optimizer = sum(_bytes(v) for state in states for v in state.values() if isinstance(v, Tensor))
        gradients = sum(_bytes(p) for m in modules for p in m.parameters() if p.requires_grad)
        weights = sum(_bytes(t) for t in (*self._model.module.parameters(), *self._model.module.buffers()))
        inputs = (self._batch.student, *self._batch.others)
        ready = sum(_bytes(v) for each in inputs for v in each.values()) * (4 if self._engine.device.type == "cpu" else 2)
        apart = (
            1 + len(self._objective.balanced) if self._objective.balanced else 0
        )  # a step that measures keeps the terms' gradients apart
        return optimizer + gradients * (apart + (2 if several else 1)) + copies * weights + ready

    def peak(self, rows: int) -> float:
        """The most bytes that a microbatch holds at one time beside its inputs and the gradients; infinity where a GPU has not so many."""
        try:
            return self._peak(rows)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return math.inf

    def _peak(self, rows: int) -> int:
        sent = self._engine.send(self._batch.part(0, rows))
        for module in (self._model.module, self._objective):
            for p in module.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
        teacher = self._teacher if self._objective.needs_teacher else None
        early = isinstance(teacher, Here) and teacher.early
        signal: Signal | None = None
        beside = 0
        if teacher is not None and early:  # of the step that is trained on and of the next one
            signal, beside = self._ahead(teacher, sent)
        with (
            torch.enable_grad(),
            Capture(self._model.module, self._objective.student_needs.features) as capture,
            Recomputed(self._model.module, self._settings.gradient_checkpointing),
            largest(self._engine.device) as peak,
        ):
            if teacher is not None and not early:
                signal = teacher(sent, self._objective.teacher_needs)
            self._engine.seed(seed_for(self._seed, "dropout", 0, 0, 0))
            with self._engine.autocast():
                outputs = capture.outputs(self._model, sent.student)
            loss, _ = self._objective(outputs, signal, sent, progress=0.0, counts=self._counts)
            loss.backward()
            return peak() + beside

    def _ahead(self, teacher: Teacher, sent: Batch) -> tuple[Signal, int]:
        """The answer of a teacher that the run asks a step ahead, and the bytes that are held meanwhile: the answers of two steps, and what it works
        in where that is the same memory."""
        with largest(self._engine.device) as peak:
            signal = teacher(sent, self._objective.teacher_needs)
            works = peak() if isinstance(teacher, Here) and teacher.shares else 0
        answers = sum(_bytes(t) for t in (*([] if signal.logits is None else [signal.logits]), *signal.features.values()))
        return signal, works + 2 * -(-answers * len(self._batch) // len(sent))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _whole(count: float) -> int | None:
    return int(count) if count < math.inf else None


def _gb(count: int | None) -> str:
    if count is None:
        return "more than there is"
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
