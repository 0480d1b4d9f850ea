"""The plan of a run: what it will need and take, measured on a few real batches before any work. Nothing is written.

The steps are those of the real loop (:func:`limbeck.loop.fit`), run on copies of the models at a learning rate of 0.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from limbeck._asking import block_rows, engine_of_teacher
from limbeck._machine import processors
from limbeck._microbatch import copies_of, how_to_train, with_accumulate
from limbeck._parts import Parts
from limbeck._teaching import Answers, Identity, Known, directories_of
from limbeck.cache import TableTeacher, missing, read_manifest, row_bytes
from limbeck.data import Data, Plan, StagedPlan, choose_workers
from limbeck.data import Request as BatchRequest
from limbeck.engine import Engine
from limbeck.loop import Feed, Recorder, fit
from limbeck.memory import largest
from limbeck.models import Model
from limbeck.objective import Objective, needs_of
from limbeck.optimizer import make_optimizer
from limbeck.placement import Here, Seat
from limbeck.progress import Progress, resident_bytes
from limbeck.recipe import Recipe
from limbeck.run import NoLog, existing_parent
from limbeck.teacher import Asking, Coming, LiveTeacher, Meter, Teacher
from limbeck.types import Batch, Needs, Signal

__all__ = ["Balance", "balance", "ceiling", "duration", "make_plan", "overlapped"]

_MOST, _LEAST = 9, 4  # steps that are timed
_SECONDS = 6.0  # that timing one model may take, as far as _LEAST steps allow
_LEFT_OUT = "validation, evaluation, export and report"


# What follows from given times: pure functions.


def overlapped(compute: float, loader: float, *, workers: int, threads: int, cores: int) -> float:
    """Seconds of one step that computes for ``compute`` seconds, while the next batch is made in ``loader`` seconds of one processor.

    workers: loader processes; 0 is a background thread. threads: processors that compute, 0 where a GPU does. cores: processors that there are.

    >>> overlapped(1.0, 0.5, workers=0, threads=2, cores=2), overlapped(1.0, 0.5, workers=0, threads=1, cores=2)
    (1.25, 1.0)
    """
    return max(loader / max(1, workers), compute, (compute * threads + loader) / cores)


def ceiling(student: float, teacher: float, *, passes: int, views: int, apart: bool = False) -> float | None:
    """How many times as fast as asking in every step a run can be at most that asks once for each of ``views`` views: P (S + T) / (P S + K T).

    student, teacher: seconds an epoch. passes: epochs of all seeds together. views: K, those that the run uses. apart: the teacher answers to one
    batch while the student trains on another, so that an epoch takes the longer of S and T. None: nothing takes any time.

    >>> ceiling(1.0, 3.0, passes=8, views=2)
    2.2857142857142856
    """
    whole = passes * student + min(views, passes) * teacher
    return passes * (max(student, teacher) if apart else student + teacher) / whole if whole > 0 else None


@dataclass(frozen=True)
class Balance:
    """Seconds of a training that asks its teacher in every step, and of one that keeps its answers, filling included.

    break_even_epoch: after how many epochs (of all seeds together) the second has taken no longer than the first; 0 where nothing is to be filled,
    None where that does not happen in this run.
    """

    live_seconds: float
    cached_seconds: float
    break_even_epoch: int | None


def balance(live_epoch: float, cached_epoch: float, *, fill: float, passes: int) -> Balance:
    """live_epoch, cached_epoch: seconds an epoch of the two ways. fill: seconds to ask for what is not there yet. passes: epochs of all seeds.

    >>> balance(4.0, 1.0, fill=6.0, passes=8)
    Balance(live_seconds=32.0, cached_seconds=14.0, break_even_epoch=2)
    """
    saved = live_epoch - cached_epoch
    # A hair below a whole number of epochs is that number: the times come from divisions.
    even = math.ceil(fill / saved - 1e-9) if saved > 0 else None
    return Balance(passes * live_epoch, fill + passes * cached_epoch, even if even is not None and even <= passes else None)


# Measuring.


class Asked(Protocol):
    """What is used of a job."""

    @property
    def data(self) -> Data: ...
    @property
    def out(self) -> Path: ...
    @property
    def seeds(self) -> int: ...


class Beginning(Protocol):
    """What is used of a job that has been looked at, before anything is written (:class:`limbeck._begin.Begun`)."""

    device: torch.device
    student: Model
    parts: Parts
    known: Known | None
    model: Model | None
    table: TableTeacher | None
    columns: np.ndarray[Any, Any] | None
    to_train: bool
    answers: Answers | None
    found: Identity | None
    cached: tuple[bool, str]
    there: dict[str, Path]
    seat: Seat | None

    @property
    def teacher_device(self) -> torch.device: ...


@dataclass(frozen=True)
class _Few:
    """The requests of a few steps in place of a whole plan."""

    requests: Sequence[BatchRequest]

    @property
    def total_steps(self) -> int:
        return len(self.requests)

    @property
    def starts(self) -> dict[int, int]:
        """The first step of each stage."""
        return {r.stage: step for step, r in reversed(list(enumerate(self.requests)))}

    def request(self, step: int) -> BatchRequest:
        return replace(self.requests[step], step=step)


class _Timed:
    """A teacher, and the seconds of its calls since they were last taken."""

    def __init__(self, teacher: Teacher, device: torch.device) -> None:
        self.teacher, self.device, self.seconds = teacher, device, 0.0
        self.identity = teacher.identity

    def __call__(self, batch: Batch, needs: Needs) -> Signal:
        start = _now(self.device)
        signal = self.teacher(batch, needs).to(self.device)
        self.seconds += _now(self.device) - start
        return signal

    def ahead(self, coming: Coming, asked: Asking) -> Coming:
        return coming

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@dataclass(frozen=True)
class _Training:
    """One step of a training: seconds of the model and of its teacher (ranges: the least and the most that were seen), and bytes.

    weights: with buffers; projections: parameters of the objective.
    """

    seconds: float
    teacher_seconds: float
    range: tuple[float, float]
    teacher_range: tuple[float, float]
    weights: int
    projections: int
    gradients: int
    optimizer: int
    activations: int


def _now(device: torch.device) -> float:
    """The clock, when all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _train(
    student: Model,
    teacher: Teacher | None,
    objective: Objective,
    batches: Sequence[Batch],
    widest: Batch,
    engine: Engine,
    recipe: Recipe,
    *,
    varied: bool,
) -> _Training:
    """Steps of the real loop on a copy of the model, on batches that are ready; the learning rate is 0, so that none diverges.

    widest: the batch that memory is measured on. varied: the batches differ in size, so that their mean counts, and not their median.
    """
    model = replace(student, module=copy.deepcopy(student.module))
    timed = None if teacher is None else _Timed(teacher, engine.device)
    settings = recipe.train.model_copy(
        update={"lr": 0.0, "stages": None, "ema": None, "select": "last", "log_every": 10**9, "checkpoint_every": 10**9}
    )
    nowhere = Path(os.devnull) / "checkpoints"

    def steps(given: Sequence[Batch], stop: Callable[[], bool]) -> None:
        requests = [BatchRequest(i, 0, batch.view, np.arange(len(batch))) for i, batch in enumerate(given)]
        builder: Any = lambda request: given[request.step]  # noqa: E731
        plan: Any = _Few(requests)
        log = NoLog()
        recorder = Recorder("plan", nowhere, log, Progress("none"), stop)
        fit(model, timed, objective, Feed(plan, builder, (len(given),)), engine, settings, recipe.seed, recorder)

    # One step for memory, which also warms everything up.
    held = {"gradients": 0, "optimizer": 0}

    def look() -> bool:
        parameters = [p for m in (model.module, objective) for p in m.parameters()]
        held["gradients"] = sum(_bytes(p.grad) for p in parameters if p.grad is not None)
        return False

    engine.place(model.module)
    engine.place(objective)
    states = make_optimizer(settings, [model.module, objective]).state.values()
    held["optimizer"] = sum(_bytes(v) for state in states for v in state.values())
    del states
    began = _now(engine.device)
    kept = _saved if not settings.gradient_checkpointing else _held  # blocks that are computed again keep theirs where no hook sees it
    with kept(engine.device, [model.module, objective], held) as saved:
        steps([widest], look)
    first = _now(engine.device) - began

    count = int(min(_MOST, max(_LEAST, _SECONDS / max(first, 1e-6))))
    chosen = [batches[(2 * i + 1) * len(batches) // (2 * count)] for i in range(count)]
    moments: list[tuple[float, float]] = []

    def passed() -> bool:
        moments.append((_now(engine.device), 0.0 if timed is None else timed.take()))
        return False

    if timed is not None:
        timed.take()
    steps([chosen[0], *chosen], passed)
    asked = [t for _, t in moments[1:]]
    whole = [b - a for (a, _), (b, _) in pairwise(moments)]
    alone = [max(0.0, w - t) for w, t in zip(whole, asked, strict=True)]
    middle = statistics.fmean if varied else statistics.median
    return _Training(
        middle(alone),
        middle(asked),
        (min(alone), max(alone)),
        (min(asked), max(asked)),
        module_bytes(model.module),
        module_bytes(objective),
        held["gradients"],
        held["optimizer"],
        saved[0],
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def module_bytes(module: nn.Module) -> int:
    """Of its parameters and buffers, a shared one once."""
    return sum(_bytes(t) for t in {id(t): t for t in (*module.parameters(), *module.buffers())}.values())


@contextmanager
def _saved(device: torch.device, modules: list[nn.Module], held: Mapping[str, int]) -> Iterator[list[int]]:
    """``[bytes]`` of what a training step holds at most beside weights, gradients and the optimiser's state.

    On a CPU: the largest sum of what the forward pass saved for the backward pass, each memory block once. On CUDA: the allocator's peak less
    ``held`` (known at the end), so temporary memory of the kernels is in it.
    """
    found = [0]
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found[0] = max(0, torch.cuda.max_memory_allocated(device) - before - sum(held.values()))
        return
    own = {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}
    now, counts = 0, dict[int, int]()

    class Held:
        """A saved tensor; what it stands on is free again when the graph lets it go."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal now
            self.tensor = tensor
            storage = tensor.untyped_storage()
            self.at, self.size = storage.data_ptr(), storage.nbytes()
            counts[self.at] = counts.get(self.at, 0) + 1
            now += self.size if counts[self.at] == 1 else 0
            found[0] = max(found[0], now)

        def __del__(self) -> None:
            nonlocal now
            counts[self.at] -= 1
            now -= self.size if counts[self.at] == 0 else 0

    def pack(tensor: Tensor) -> Tensor | Held:
        return tensor if tensor.untyped_storage().data_ptr() in own else Held(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.tensor if isinstance(x, Held) else x):
        yield found


@contextmanager
def _held(device: torch.device, _: list[nn.Module], held: Mapping[str, int]) -> Iterator[list[int]]:
    """The same by everything that is alive, temporary tensors of the backward pass included."""
    found = [0]
    with largest(device) as peak:
        yield found
        found[0] = max(0, peak() - sum(held.values()))


def _answering(teacher: LiveTeacher, batch: Batch, needs: Needs) -> tuple[float, int]:
    """Seconds that a loaded teacher takes for a batch, and the bytes that it works in beside its weights.

    Seconds: the median of three calls after a warm-up, fewer where they take long. Bytes: on a CPU the largest input and output of one layer, which
    leaves out what is kept beside it (a residual branch); on CUDA the allocator's peak.
    """
    device, largest = teacher.engine.device, 0

    def look(module: nn.Module, given: Any, gave: Any) -> None:
        nonlocal largest
        tensors = [t for t in (*given, *(gave if isinstance(gave, tuple) else (gave,))) if isinstance(t, Tensor)]
        largest = max(largest, sum(_bytes(t) for t in tensors))

    hooks = [m.register_forward_hook(look) for m in teacher.model.module.modules() if not any(m.children())]
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    teacher(batch, needs)
    if device.type == "cuda":
        largest = torch.cuda.max_memory_allocated(device) - before
    for hook in hooks:
        hook.remove()
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < _SECONDS / 2:
        start = _now(device)
        teacher(batch, needs)
        seconds.append(_now(device) - start)
    return statistics.median(seconds), largest


@dataclass(frozen=True)
class _Batches:
    """A few real batches of a feed, those of an epoch's quantiles by width where widths differ; and the seconds that one takes to make."""

    batches: list[Batch]
    widest: Batch
    rows: int
    varied: bool
    seconds: float


def _batches(plan: Plan, builder: Callable[[BatchRequest], Batch], lengths: np.ndarray[Any, Any] | None) -> _Batches:
    epoch = [plan.request(step) for step in range(plan.steps_per_epoch)]
    rows = max(len(request.rows) for request in epoch)
    full = [request for request in epoch if len(request.rows) == rows]
    if lengths is not None:
        full.sort(key=lambda request: int(lengths[request.rows].max()))
    count = min(_MOST, len(full))
    wanted = full[:count] if lengths is None else [full[(2 * i + 1) * len(full) // (2 * count)] for i in range(count)]
    builder(wanted[0])  # makes once what is made once
    made, seconds = [], []
    for request in wanted:
        start = time.perf_counter()
        made.append(builder(request))
        seconds.append(time.perf_counter() - start)
    middle = statistics.median if lengths is None else statistics.fmean
    return _Batches(made, made[0] if lengths is None else builder(full[-1]), rows, lengths is not None, middle(seconds))


# The plan.


def make_plan(job: Asked, begun: Beginning, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """What a run would need, take and choose; said in a table, and returned with null for what is unknown. Nothing is written.

    recipe: the job's, or that of the run which it resumes. Bytes are bytes, ``_ms`` milliseconds, ``_seconds`` seconds.
    """
    progress.say("Measuring a few real batches for the plan.")
    device, parts = begun.device, begun.parts
    kept = begun.cached[0]
    complete = begun.known is not None and begun.model is None
    with_teacher = begun.known is not None

    teacher, choices = _teacher_of(begun, recipe, complete)
    feed = parts.feed(recipe, with_teacher=with_teacher, ask=isinstance(teacher, LiveTeacher), others=True)
    split = job.data.train if with_teacher or parts.unlabelled_too else parts.labelled
    lengths = parts.lengths(split, parts.staged[parts.measured])
    few = _batches(feed.plan.plans[parts.measured], feed.builder, lengths)
    objective = parts.objective(recipe.seed, begun.student).at(parts.measured)
    engine, accumulate, choices["student"], cut = _student_choice(begun, teacher, objective, recipe, progress)
    if cut is not None:
        choices["accumulate"] = cut
    recipe = with_accumulate(recipe, accumulate)
    workers, why = choose_workers(recipe.train.workers, job.data.train, parts.augment)
    choices["workers"] = {"value": workers, "reason": why}
    if with_teacher and begun.table is None:
        choices["teacher_cache"] = {"kept": kept, "reason": begun.cached[1]}
    if begun.seat is not None and begun.model is not None:
        choices["teacher_placement"] = {"value": begun.seat.placement, "reason": begun.seat.reason}

    trained = _train(begun.student, teacher, objective, few.batches, few.widest, engine, recipe, varied=few.varied)
    own = _train_teacher(begun, job.data, recipe, progress) if begun.to_train and begun.model is not None else None
    cache = _cache(begun, recipe, kept, complete)

    # The loader of a step without the teacher's inputs, where they are of another kind.
    loader, first = few.seconds, few.batches[0]
    if first.teacher is not None and first.teacher is not first.student:
        alone = parts.feed(recipe, with_teacher=True, others=True)
        loader = _batches(alone.plan.plans[parts.measured], alone.builder, lengths).seconds
    threads = _threads(device)
    fill_row, working = _fill_row(begun, teacher, recipe, kept, threads) if isinstance(teacher, LiveTeacher) else (None, 0)
    visits = sum(stage.epochs * plan.count for stage, plan in zip(recipe.stages, feed.plan.plans, strict=True))
    times = _times(
        recipe,
        cache,
        few,
        trained,
        loader=loader,
        fill_row=fill_row,
        before=own[1] if own is not None else 0.0,
        # the last batch of an epoch may be smaller; with stages, an epoch is the mean of all
        epoch=lambda compute, loading: (
            visits / recipe.train.epochs / few.rows * overlapped(compute, loading, workers=workers, threads=threads, cores=processors())
        ),
        seeds=job.seeds,
        apart=_apart(begun),
    )

    plan = {
        "dry_run": True,
        "task": recipe.task,
        "out": str(job.out),
        "device": str(device),
        "classes": len(job.data.classes),
        "samples": {"train": len(job.data.train), "valid": len(job.data.valid), "test": len(job.data.test)},
        "seeds": job.seeds,
        "epochs": recipe.train.epochs,
        "steps": feed.plan.total_steps,
        "stages": _stages(recipe, feed.plan, parts),
        "parameters": {
            **({"teacher": begun.known.parameters} if begun.known is not None and begun.known.parameters is not None else {}),
            "student": sum(p.numel() for p in begun.student.module.parameters()),
        },
        "memory": _memory(begun, recipe, trained, kept, working, own[0] if own else None),
        "cache": cache,
        "time": times,
        "choices": choices,
    }
    for line in _table(plan):
        progress.say(line)
    if (job.out / "recipe.yaml").is_file():
        progress.say(f"{job.out} is resumed: what it has done already is not taken off these times.")
    if isinstance(teacher, LiveTeacher):
        teacher.meter.close()
    return plan


def _stages(recipe: Recipe, plan: StagedPlan, parts: Parts) -> list[dict[str, Any]] | None:
    """Each stage with what it changes; None where the recipe has none."""
    if recipe.train.stages is None:
        return None
    return [
        {
            "epochs": stage.epochs,
            "rows": own.count,
            "steps": own.total_steps,
            "lr": recipe.train.lr if stage.lr is None else stage.lr,
            "resolution": stage.resolution,
            "max_length": stage.max_length,
            "objective": [term.model_dump(mode="json") for term in terms],
            "measured": number == parts.measured,
        }
        for number, (stage, own, terms) in enumerate(zip(recipe.stages, plan.plans, recipe.objectives, strict=True))
    ]


def _times(
    recipe: Recipe,
    cache: dict[str, Any] | None,
    few: _Batches,
    trained: _Training,
    *,
    loader: float,
    fill_row: float | None,
    before: float,
    epoch: Callable[[float, float], float],
    seeds: int,
    apart: bool,
) -> dict[str, Any]:
    """The part ``time`` of the plan. loader: seconds of a batch without the teacher's own inputs. fill_row: seconds that asking for one row takes,
    None where the teacher is not loaded. before: seconds of its own training. epoch: seconds of an epoch, from those of a step's work and batch.
    apart: the teacher answers while the student trains."""
    passes, step = recipe.train.epochs * seeds, 1000 * trained.seconds
    student = epoch(trained.seconds, loader)
    baseline = passes * student if recipe.baseline else None
    once = before + (baseline or 0.0)
    times: dict[str, Any] = {
        "batch_rows": few.rows,
        "student_step_ms": step,
        "student_step_range_ms": [1000 * t for t in trained.range],
        "teacher_step_ms": None,
        "teacher_step_range_ms": None,
        "cache_read_step_ms": None,
        "loader_batch_ms": 1000 * loader,
        "loader_batch_with_teacher_ms": None,
        "teacher_fill_row_ms": None,
        "teacher_training_seconds": None if cache is None else before,
        "baseline_seconds": baseline,
        "fill_seconds": None,
        "ceiling": None,
        "live_seconds": None,
        "cached_seconds": None,
        "break_even_epoch": None,
        "total_seconds": once + passes * student,
        "left_out": _LEFT_OUT,
    }
    if cache is not None and fill_row is None:  # every answer is there
        total = once + passes * epoch(trained.seconds + trained.teacher_seconds, loader)
        read = {"cache_read_step_ms": 1000 * trained.teacher_seconds, "fill_seconds": 0.0}
        return {**times, **read, "cached_seconds": total, "total_seconds": total}
    if cache is None or fill_row is None:
        return times
    both = trained.seconds, trained.teacher_seconds
    live = epoch(max(both) if apart else sum(both), few.seconds)
    times |= {
        "teacher_step_ms": 1000 * trained.teacher_seconds,
        "teacher_step_range_ms": [1000 * t for t in trained.teacher_range],
        "loader_batch_with_teacher_ms": 1000 * few.seconds,
        "teacher_fill_row_ms": 1000 * fill_row,
        "live_seconds": once + passes * live,
    }
    if cache["rows_to_ask"] is not None:
        fill = cache["rows_to_ask"]["teach"] * fill_row
        found = balance(live, student, fill=fill, passes=passes)
        times |= {
            "fill_seconds": fill,
            "ceiling": ceiling(*both, passes=passes, views=min(cache["views"], recipe.train.epochs), apart=apart),
            "cached_seconds": once + found.cached_seconds,
            "break_even_epoch": found.break_even_epoch,
        }
    return {**times, "total_seconds": times["cached_seconds" if cache["kept"] else "live_seconds"]}


def _apart(begun: Beginning) -> bool:
    """Whether the teacher answers on a device of its own while the student trains, if it is asked in every step."""
    seat = begun.seat
    return seat is not None and (seat.ranks > 0 or (seat.ahead and seat.device != begun.device))


def _threads(device: torch.device) -> int:
    """Processors that a model's own work keeps busy."""
    return torch.get_num_threads() if device.type == "cpu" else 0


def _teacher_of(begun: Beginning, recipe: Recipe, complete: bool) -> tuple[Teacher | None, dict[str, Any]]:
    """The teacher as the loop would have it (its cache, where every answer is there), and how it runs and why."""
    if begun.known is None or begun.table is not None:
        return begun.table, {}
    if complete:
        assert begun.answers is not None
        cached = begun.answers.teacher(begun.columns, begun.device)
        made = cached.reader.manifest.made
        why = {
            "precision": made["precision"],
            "layout": made["layout"],
            "measured": [],
            "reason": "as its answers were given; it is not loaded",
        }
        return cached, {"teacher": why}
    assert begun.model is not None
    folder = begun.answers.folders.get("teach") if begun.answers is not None else None
    if folder is not None and (folder / "manifest.json").exists():
        made = read_manifest(folder).made
        engine, record = (
            Engine(begun.teacher_device, made["precision"], made["layout"]),
            {"measured": [], "reason": "as the cache was begun"},
        )
    else:
        batch = begun.parts.first_batch(recipe, with_teacher=True, ask=True)
        engine, record = engine_of_teacher(recipe, begun.model, batch, begun.teacher_device)
    teacher = LiveTeacher(begun.model, engine, begun.columns, Meter(begun.model.module))
    return teacher, {"teacher": {"precision": engine.precision, "layout": engine.layout, **record}}


def _student_choice(
    begun: Beginning, teacher: Teacher | None, objective: Objective, recipe: Recipe, progress: Progress
) -> tuple[Engine, int, dict[str, Any], dict[str, Any] | None]:
    student = replace(begun.student, module=copy.deepcopy(begun.student.module))
    ask, copies = isinstance(teacher, LiveTeacher), copies_of(recipe, begun.device)
    here = Here(teacher, begun.device, begun.seat) if isinstance(teacher, LiveTeacher) else teacher
    engine, accumulate, why, cut = how_to_train(
        recipe, student, here, objective, begun.parts, begun.device, progress, copies=copies, ask=ask
    )
    return engine, accumulate, {"precision": engine.precision, "layout": engine.layout, **why}, cut


def _train_teacher(begun: Beginning, data: Data, recipe: Recipe, progress: Progress) -> tuple[_Training, float]:
    """One step of the teacher's own training, and the seconds of all of it."""
    assert begun.model is not None
    [spec] = recipe.teachers
    assert spec.train is not None
    given = spec.train.model_dump(exclude_none=True, exclude={"if_needed"})
    given["gradient_checkpointing"] = recipe.train.gradient_checkpointing is True
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={**given, "stages": None})})
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in begun.model.module.modules())
    parts = Parts(recipe, data, begun.model.preprocessing, None, batch_statistics=norms)
    feed, objective = parts.feed(recipe, with_teacher=False), parts.baseline_objective().at(0)
    few = _batches(feed.plan.plans[0], feed.builder, parts.lengths(parts.labelled))
    model = replace(begun.model, module=copy.deepcopy(begun.model.module))
    engine, accumulate, _, _ = how_to_train(recipe, model, None, objective, parts, begun.device, progress, copies=0)
    recipe = with_accumulate(recipe, accumulate)
    trained = _train(model, None, objective, few.batches, few.widest, engine, recipe, varied=few.varied)
    workers, _ = choose_workers(recipe.train.workers, data.train, parts.augment)
    step = overlapped(trained.seconds, few.seconds, workers=workers, threads=_threads(begun.device), cores=processors())
    return trained, recipe.train.epochs * len(parts.labelled) / few.rows * step


def _fill_row(begun: Beginning, teacher: LiveTeacher, recipe: Recipe, kept: bool, threads: int) -> tuple[float, int]:
    """Seconds a row of filling the cache, in the blocks in which that is done; and the bytes in which the teacher works as it will be asked."""
    parts, split = begun.parts, begun.parts.data.train
    needs = needs_of(parts.recipe.terms)[1] if begun.answers is None else begun.answers.needs
    builder = parts.builder(split, training=True, student=teacher.model.preprocessing)
    lengths = parts.lengths(split, teacher.model.preprocessing)
    block = min(len(split), block_rows(teacher.model.preprocessing, begun.teacher_device))
    order = np.arange(len(split)) if lengths is None else np.argsort(lengths, kind="stable")
    # texts are asked for in blocks of similar length: a short, a middle and a long one
    starts = [0] if lengths is None else [(2 * i + 1) * len(split) // 6 - block // 2 for i in range(3)]
    rows, seconds, working = 0, 0.0, 0
    helpers = 1 if split.source.in_memory else processors()
    for start in starts:
        chosen = order[max(0, min(start, len(split) - block)) :][:block]
        began = time.perf_counter()
        batch = builder(BatchRequest(0, 0, 0, chosen))
        loading = time.perf_counter() - began
        asked = teacher.engine.send(replace(batch, teacher=batch.student))
        took, used = _answering(teacher, asked, needs)
        rows, working = rows + len(chosen), max(working, used)
        seconds += overlapped(took, loading, workers=helpers, threads=threads, cores=processors())
    if not kept:
        batch = parts.first_batch(recipe, with_teacher=True, ask=True)
        _, working = _answering(teacher, teacher.engine.send(batch), needs)
    return seconds / rows, working


def _cache(begun: Beginning, recipe: Recipe, kept: bool, complete: bool) -> dict[str, Any] | None:
    """The teacher's answers on disk, each row once; None without a teacher. Where they are not kept: as they would be."""
    if begun.known is None:
        return None
    nothing = dict.fromkeys(
        ("path", "folders", "views", "codec", "rows", "rows_there", "rows_to_ask", "row_bytes", "bytes", "bytes_to_write")
    )
    cache: dict[str, Any] = {"kept": kept, "reason": begun.cached[1], "complete": complete, **nothing, "disk_free_bytes": None}
    if begun.table is not None:
        return {**cache, "reason": f"the teacher is the file {begun.table.path}"}
    if begun.parts.views is None:
        return cache
    answers = begun.answers or Answers(recipe, begun.parts)
    answers.folders = answers.folders or begun.there
    if complete:
        columns = {purpose: read_manifest(folder).columns for purpose, folder in answers.folders.items()}
    else:
        assert begun.model is not None
        columns = (begun.found or directories_of(answers, begun.model, None)).columns
    each = {purpose: row_bytes(c) for purpose, c in columns.items()}
    rows = {purpose: sum(len(missing(None, r)) for r in answers.requests[purpose]) for purpose in each}
    lacking = {purpose: answers.lacking(purpose) for purpose in each}
    return cache | {
        "path": str(answers.root),
        "folders": {purpose: str(folder) for purpose, folder in answers.folders.items()} or None,
        "views": answers.views,
        "codec": recipe.teacher_cache.codec,
        "rows": rows,
        "rows_there": {purpose: rows[purpose] - lacking[purpose] for purpose in rows},
        "rows_to_ask": lacking,
        "row_bytes": each,
        "bytes": sum(rows[purpose] * each[purpose] for purpose in rows),
        "bytes_to_write": sum(lacking[purpose] * each[purpose] for purpose in rows),
        "disk_free_bytes": shutil.disk_usage(existing_parent(answers.root)).free,
    }


def _memory(begun: Beginning, recipe: Recipe, trained: _Training, kept: bool, working: int, own: _Training | None) -> dict[str, Any]:
    """Bytes on the devices that compute. ``total_bytes``: the largest sum of what is needed at one time on the student's."""
    here = begun.device.type == "cpu"  # elsewhere the baseline and the best epoch wait in the host's memory
    held = {
        "the baseline's": here and recipe.baseline,
        "their average": recipe.train.ema is not None,
        "the best epoch's": here and recipe.train.select == "best",
    }
    copied = [what for what, there in held.items() if there]
    copies = trained.weights * len(copied)
    training = trained.weights + trained.projections + trained.gradients + trained.optimizer + trained.activations + copies
    teacher = None if begun.model is None else module_bytes(begun.model.module)
    beside = 0 if teacher is None or _apart(begun) else teacher + working
    stages = [training if kept else training + beside, trained.weights + beside]
    taught = None if own is None else own.weights + own.gradients + own.optimizer + own.activations
    return {
        "teacher": {
            "loaded": None if begun.known is None else begun.model is not None,
            "weights_bytes": teacher,
            "activations_bytes": None if teacher is None else working,
            "training_bytes": taught,
        },
        "student": {
            "weights_bytes": trained.weights,
            "projections_bytes": trained.projections,
            "gradients_bytes": trained.gradients,
            "optimizer_bytes": trained.optimizer,
            "activations_bytes": trained.activations,
            "copies_bytes": copies,
            "copies": copied,
        },
        "total_bytes": max(*stages, 0 if taught is None else taught + trained.weights),
        "teacher_apart": _apart(begun),
        "process_bytes": resident_bytes(),
    }


# What a person reads.


def _table(plan: dict[str, Any]) -> list[str]:
    train = plan["epochs"], plan["steps"] // plan["epochs"], plan["time"]["batch_rows"]
    seeds = f", for each of {plan['seeds']} seeds" if plan["seeds"] > 1 else ""
    each = f" of {train[1]:,} steps" if plan["stages"] is None else f", {plan['steps']:,} steps"
    return [
        f"Plan: {train[0]:,} epochs{each} of {train[2]:,} samples{seeds}, on {plan['device']}. Nothing is written.",
        "",
        *(_stage_lines(plan["stages"]) if plan["stages"] is not None else []),
        *_memory_lines(plan),
        *(_cache_lines(plan["cache"]) if plan["cache"] is not None else []),
        *_time_lines(plan),
        *_choice_lines(plan["choices"]),
    ]


def _stage_lines(stages: list[dict[str, Any]]) -> list[str]:
    lines = ["Stages"]
    for number, stage in enumerate(stages):
        inputs = [f"{name} {value}" for name, value in (("resolution", stage["resolution"]), ("max_length", stage["max_length"])) if value]
        terms = ", ".join(term["loss"] for term in stage["objective"])
        what = [f"lr {stage['lr']:g}", *inputs, terms]
        lines.append(
            f"  {number:<8} {stage['epochs']:>6,} epochs of {stage['rows']:>10,} rows, {stage['steps']:>8,} steps: {'; '.join(what)}"
        )
    measured = next(number for number, stage in enumerate(stages) if stage["measured"])
    return [
        *lines,
        f"  What follows is measured in stage {measured}, as if a sample cost as much in every stage; an epoch is the mean of all.",
        "",
    ]


def _memory_lines(plan: dict[str, Any]) -> list[str]:
    memory, teacher, student = plan["memory"], plan["memory"]["teacher"], plan["memory"]["student"]
    rows: list[tuple[str, int, str]] = []
    if teacher["weights_bytes"] is not None:
        rows = [
            ("teacher", teacher["weights_bytes"], "weights"),
            ("", teacher["activations_bytes"], "while it answers"),
        ]
        if teacher["training_bytes"] is not None:
            rows.append(("", teacher["training_bytes"], "while it is trained first, all together"))
    rows += [
        ("student", student["weights_bytes"], "weights"),
        ("optimiser", student["optimizer_bytes"], "its state"),
        ("gradients", student["gradients_bytes"], "one for each weight that is trained"),
        ("activations", student["activations_bytes"], "what a forward pass keeps for the backward pass, in the largest batch"),
    ]
    if student["projections_bytes"]:
        rows.append(("projections", student["projections_bytes"], "of the losses"))
    if student["copies_bytes"]:
        rows.append(("copies", student["copies_bytes"], f"of its weights: {', '.join(student['copies'])}"))
    rows += [
        ("together", memory["total_bytes"], f"the most that is needed at one time{', without the teacher' * memory['teacher_apart']}"),
        ("this process", memory["process_bytes"], "as it is now: Python, its libraries, the data and the models"),
    ]
    lines = [f"  {name:13}{_size(value):>10}  {what}" for name, value, what in rows]
    if teacher["loaded"] is False:
        lines.insert(0, f"  {'teacher':13}{'none':>10}  it is not loaded: every answer is there")
    return ["Memory", *lines, ""]


def _cache_lines(cache: dict[str, Any]) -> list[str]:
    if cache["rows"] is None:
        return ["Teacher cache", f"  none: {cache['reason']}", ""]
    rows, each, there = cache["rows"], cache["row_bytes"], cache["rows_there"]
    whether = "is used" if cache["kept"] else "is not used, and would be"
    return [
        "Teacher cache",
        f"  {whether}: {_size(cache['bytes'])} in {cache['path']}, where {_size(cache['disk_free_bytes'])} are free",
        f"  training  {rows['teach']:>10,} answers of {each['teach']:,} bytes; {there['teach']:,} are there",
        f"  test      {rows['test']:>10,} answers of {each['test']:,} bytes; {there['test']:,} are there",
        "",
    ]


def _time_lines(plan: dict[str, Any]) -> list[str]:
    times, cache = plan["time"], plan["cache"]
    passes = plan["epochs"] * plan["seeds"]
    lines = [
        f"Time of a step of {times['batch_rows']:,} samples",
        _step_line("student", times["student_step_ms"], times["student_step_range_ms"]),
    ]
    if cache is not None:
        unknown = f"  teacher      {'unknown':>10}     and not needed: every answer is there"
        lines.append(
            unknown if times["teacher_step_ms"] is None else _step_line("teacher", times["teacher_step_ms"], times["teacher_step_range_ms"])
        )
    if times["cache_read_step_ms"] is not None:
        lines.append(f"  answers      {times['cache_read_step_ms']:10,.1f} ms  to read those of the teacher")
    lines += [f"  loader       {times['loader_batch_ms']:10,.1f} ms  to make the batch, beside the step before", ""]

    rows: list[tuple[str, float | None, str]] = []
    if times["teacher_training_seconds"]:
        rows.append(("teacher's training", times["teacher_training_seconds"], "is in all of the following"))
    if times["baseline_seconds"] is not None:
        rows.append(("baseline", times["baseline_seconds"], "is in all of the following; taken as the student alone"))
    if cache is not None and cache["kept"]:
        rows.append(("filling", times["fill_seconds"], "of the cache, in the second of the following"))
    if times["live_seconds"] is not None:
        rows.append(("live", times["live_seconds"], "the teacher is asked in every step" + (": this run" if not cache["kept"] else "")))
    if times["cached_seconds"] is not None:
        rows.append(("cached", times["cached_seconds"], "its answers are kept, filling included" + (": this run" if cache["kept"] else "")))
    if cache is None:
        rows.append(("training", times["total_seconds"], ""))
    lines.append(f"Time in all, without {times['left_out']}")
    lines += [f"  {name:19}{duration(value):>10}  {what}".rstrip() for name, value, what in rows]
    if times["ceiling"] is not None:
        even = times["break_even_epoch"]
        epochs = f"epoch {even} of {passes}{' (of all seeds together)' if plan['seeds'] > 1 else ''}"
        when = "Keeping answers is not faster in this run." if even is None else f"Keeping answers has paid after {epochs}."
        if even == 0:
            when = "Every answer is there: keeping them has paid already."
        lines.append(f"  {when} The student's training cannot be more than {times['ceiling']:.2f} times as fast by it.")
    return [*lines, ""]


def _step_line(role: str, ms: float, seen: list[float]) -> str:
    return f"  {role:13}{ms:10,.1f} ms  {seen[0]:,.1f} to {seen[1]:,.1f} in those that were measured"


def _choice_lines(choices: dict[str, Any]) -> list[str]:
    lines = ["Chosen"]
    for role in ("teacher", "student"):
        if role not in choices:
            continue
        found = choices[role]
        lines.append(f"  {role:8} {found['precision']} {found['layout']}: {found['reason']}")
        for row in found["measured"]:
            what = "cannot be used here" if row["ms"] is None else f"{row['ms']:8,.1f} ms, agreement {row['cosine']:.4f}"
            lines.append(f"             {row['precision']:8} {row['layout']:14} {what}")
    if "accumulate" in choices:
        lines.append(f"  cut      into {choices['accumulate']['value']} a step: {choices['accumulate']['reason']}")
    lines.append(f"  workers  {choices['workers']['value']}: {choices['workers']['reason']}")
    if "teacher_placement" in choices:
        found = choices["teacher_placement"]
        several = "; the times are those of one process with whole batches" if found["value"].startswith("ranks:") else ""
        lines.append(f"  teacher  sits at {found['value']}: {found['reason']}{several}")
    if "teacher_cache" in choices:
        found = choices["teacher_cache"]
        lines.append(f"  answers  {'kept' if found['kept'] else 'asked for in every step'}: {found['reason']}")
    return lines


def _size(count: float) -> str:
    """Bytes for people: MB, and GB from there."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds >= 7200:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:,.1f} min" if seconds >= 120 else f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:,.0f} ms"
