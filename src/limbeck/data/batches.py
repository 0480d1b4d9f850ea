"""What is read at each step, and how it becomes a batch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limbeck.data.ids import Ids, pair_ids
from limbeck.data.sources import Raw
from limbeck.data.splits import Split
from limbeck.data.text import Tokens, tokens_of
from limbeck.data.views import Partners, beta, check_augment, draws_views, image_views
from limbeck.errors import LimbeckError, Problem, UsageError
from limbeck.pixels import fit, normalise
from limbeck.randomness import order, seed_for, uniform
from limbeck.recipe import Augment
from limbeck.types import Batch, ImagePreprocessing, Inputs, Preprocessing, TensorPreprocessing, TextPreprocessing, member_input

__all__ = ["BatchBuilder", "Plan", "Request", "StagedBuilder", "StagedPlan", "cuts", "evaluation_requests", "nested", "same_inputs"]

Int64 = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

Several = tuple[Preprocessing | None, ...]
"""How several teachers want their inputs."""

_BUCKET = 50  # batches that are sorted by length together: long enough for little padding, short enough to stay random


@dataclass(frozen=True, eq=False)
class Request:
    """One batch to build. step and epoch: of the whole fit, from 0. rows: ``(B,)`` int64 indices into the split. counted: False where no loss counts
    them. stage: of the fit, from 0. smallest: how many rows the smallest share of its step has; None where it is not shared."""

    step: int
    epoch: int
    view: int
    rows: Int64
    counted: bool = True
    stage: int = 0
    smallest: int | None = None

    def share(self, rank: int, size: int) -> Request:
        """The rows of one of ``size`` ranks; together they are those of this request, in order.

        A batch too small to give every rank two rows gives some ranks none. Such a rank goes along with rows that no loss counts, because every rank
        takes part in every step.
        """
        if size == 1:
            return self
        bounds = cuts(len(self.rows), size)
        along = self.rows[:2]
        smallest = min(stop - start for start, stop in bounds) if len(bounds) == size else len(along)
        if rank < len(bounds):
            start, stop = bounds[rank]
            return replace(self, rows=self.rows[start:stop], smallest=smallest)
        return replace(self, rows=along, counted=False, smallest=smallest)

    def cuts(self, accumulate: int, *, alike: bool = False) -> list[tuple[int, int]]:
        """The bounds of its microbatches, ``accumulate`` of them or fewer. alike: no more than the smallest share of the step has, so that all shares
        have as many."""
        if alike and self.smallest is not None:
            accumulate = len(cuts(self.smallest, accumulate))
        return cuts(len(self.rows), accumulate)


def cuts(count: int, parts: int) -> list[tuple[int, int]]:
    """The bounds of ``parts`` nearly equal parts; fewer where one would have a single sample, which batch statistics cannot be taken of.

    >>> cuts(7, 2), cuts(5, 4), cuts(1, 4)
    ([(0, 4), (4, 7)], [(0, 3), (3, 5)], [(0, 1)])
    """
    parts = min(parts, max(1, count // 2))
    sizes = [count // parts + (i < count % parts) for i in range(parts)]
    return [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(parts)]


class Plan:
    """What is read at each optimiser step of a fit: a pure function of the arguments, so that any step can be the first.

    Each epoch visits every sample once, in an order that depends on (seed, epoch) alone, or, with ``lengths``, in batches of similar
    length. The last batch of an epoch may be smaller; ``drop_single`` leaves out one of a single sample (which BatchNorm cannot take).
    ``views``: view = epoch mod views; None: view = epoch.

    ``total_steps``: instead of ``epochs``, that many steps of exactly ``batch_size`` rows, cut from the epochs laid end to end, so that a
    step may run over an epoch's end and fewer rows than a batch repeat within it. A step belongs to the epoch of its first row.
    ``steps_per_epoch`` is then how many whole batches an epoch has, at least one.

    It may be one stage of a fit (:class:`StagedPlan`). ``rows``: the indices into the split that it visits; None: all. ``first_epoch``: epochs of the
    fit before it; order and view count from there. ``stage``: its number.
    """

    def __init__(
        self,
        split: Split,
        *,
        seed: int,
        data_seed: int,
        epochs: int,
        batch_size: int,
        views: int | None = None,
        lengths: npt.NDArray[Any] | None = None,
        drop_single: bool = False,
        total_steps: int | None = None,
        rows: Int64 | None = None,
        first_epoch: int = 0,
        stage: int = 0,
    ) -> None:
        if lengths is not None and len(lengths) != len(split):
            raise ValueError(f"{len(lengths)} lengths for {len(split)} samples")
        self.seed, self.data_seed, self.epochs, self.batch_size, self.views = seed, data_seed, epochs, batch_size, views
        self._lengths, self._rows, self.first_epoch, self.stage = lengths, rows, first_epoch, stage
        self.count = len(split) if rows is None else len(rows)
        self._endless = total_steps is not None
        single = drop_single and self.count > 1 and batch_size > 1 and self.count % batch_size == 1
        self._used = self.count - 1 if single else self.count
        self.steps_per_epoch = max(1, self.count // batch_size) if self._endless else -(-self._used // batch_size)
        self.total_steps = self.steps_per_epoch * epochs if total_steps is None else total_steps
        self._round: tuple[int, list[Int64]] = (-1, [])

    def request(self, step: int) -> Request:
        """The batch of one optimiser step, ``0 <= step < total_steps``."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")
        wanted, place = divmod(step, self.steps_per_epoch)
        number, batches = self._round
        if number != wanted:
            batches = self._batches(wanted)
            self._round = (wanted, batches)
        epoch = self.first_epoch + (step * self.batch_size // self.count if self._endless else wanted)
        view = epoch if self.views is None else epoch % self.views
        return Request(step, epoch, view, batches[place], stage=self.stage)

    @property
    def rounds(self) -> range:
        """The number of steps that are done at the end of each epoch."""
        return range(self.steps_per_epoch, self.total_steps + 1, self.steps_per_epoch)

    def _batches(self, number: int) -> list[Int64]:
        """The batches of ``steps_per_epoch`` steps: of an epoch, or of as many rows of the epochs laid end to end."""
        chosen = self._stretch(number) if self._endless else self._order(number)[: self._used]
        if self._lengths is None:
            return _cut(chosen, self.batch_size)
        size = self.batch_size * _BUCKET
        batches: list[Int64] = []
        for start in range(0, len(chosen), size):
            bucket = chosen[start : start + size]
            batches += _cut(bucket[np.argsort(self._lengths[bucket], kind="stable")], self.batch_size)
        return [batches[i] for i in order(len(batches), self.seed, "batches", self.first_epoch + number)]

    def _stretch(self, number: int) -> Int64:
        size = self.steps_per_epoch * self.batch_size
        start, stop = number * size, (number + 1) * size
        first, last = start // self.count, (stop - 1) // self.count
        rows = np.concatenate([self._order(epoch) for epoch in range(first, last + 1)])
        return rows[start - first * self.count : stop - first * self.count]

    def _order(self, epoch: int) -> Int64:
        """epoch: of this plan, from 0."""
        found = order(self.count, self.seed, "order", self.first_epoch + epoch)
        return found if self._rows is None else self._rows[found]


class StagedPlan:
    """Plans one after the other, as one: the stages of a fit. Plan i has stage i, and begins at step ``starts[i]``."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = tuple(plans)
        ends = list(accumulate(plan.total_steps for plan in plans))
        self.starts, self.total_steps = [0, *ends[:-1]], ends[-1]

    def request(self, step: int) -> Request:
        """The batch of one optimiser step, ``0 <= step < total_steps``."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")
        stage = bisect_right(self.starts, step) - 1
        start = self.starts[stage]
        found = self.plans[stage].request(step - start)
        return found if not start else replace(found, step=step)

    @property
    def rounds(self) -> Sequence[int]:
        """The number of steps that are done at the end of each epoch."""
        if len(self.plans) == 1:
            return self.plans[0].rounds
        return [start + end for start, plan in zip(self.starts, self.plans, strict=True) for end in plan.rounds]


def nested(ids: Ids, fraction: float, data_seed: int) -> Int64:
    """``(M,)`` rows, in order, of a fraction of all N samples: the round(fraction * N), at least one, that come first in the order of a hash of (data
    seed, id). So a smaller fraction is a part of a larger one, whatever the order of rows. Not stratified; samples with one id go together.
    """
    places = uniform(ids, 1, data_seed, "fraction")[:, 0]
    count = max(1, round(fraction * len(ids)))
    last = np.partition(places, count - 1)[count - 1]
    return np.flatnonzero(places <= last).astype(np.int64)


def _cut(rows: Int64, size: int) -> list[Int64]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def evaluation_requests(split: Split, batch_size: int, lengths: npt.NDArray[Any] | None = None) -> list[Request]:
    """Every sample of a split once, in order, or with ``lengths`` the longest first (what does not fit in memory fails at once)."""
    rows = np.arange(len(split), dtype=np.int64) if lengths is None else np.argsort(-np.asarray(lengths), kind="stable").astype(np.int64)
    return [Request(step, 0, 0, part) for step, part in enumerate(_cut(rows, batch_size))]


def same_inputs(a: Preprocessing, b: Preprocessing) -> bool:
    """Whether two models take the same inputs."""
    if isinstance(a, TextPreprocessing) and isinstance(b, TextPreprocessing):
        same = ("max_length", "inputs", "tokenizer_sha256", "pad_token_id")
        return all(getattr(a, name) == getattr(b, name) for name in same)
    return a == b


class BatchBuilder:
    """Request to batch: a pure function that travels to loader workers by pickle.

    The view is made once, on raw samples; then each model gets it in its own resolution and normalisation. Where both models want the same
    preparation, ``Batch.teacher`` is the same object as ``Batch.student``. ``teacher``: a tuple of several, None in it for one that is not asked.
    ``others``: how many further views of images there are beside the student's (``Batch.others``). ``dtype``: of normalised images and of mixed
    labels; float arrays keep their own.
    """

    def __init__(
        self,
        split: Split,
        *,
        student: Preprocessing,
        teacher: Preprocessing | Several | None = None,
        augment: Augment | None = None,
        data_seed: int = 0,
        num_classes: int,
        others: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        kind = split.source.kind
        teachers = teacher if isinstance(teacher, tuple) else (teacher,)
        for role, wanted in (("student", student), *(("teacher", one) for one in teachers)):
            if wanted is not None and wanted.kind != kind:
                raise UsageError(Problem(role, f"the model takes {wanted.kind} inputs, and the data is of kind {kind}."))
        self._ids, self._labels, self._rows = split.ids, split.labels, split.rows
        self._student, self._teachers, self._several = student, teachers, isinstance(teacher, tuple)
        self._augment, self._seed, self._classes = augment, data_seed, num_classes
        moved = augment is not None and kind == "image" and draws_views(augment)  # else all views of a sample are the same
        self._others = [seed_for(data_seed, "another view", number) for number in range(others)] if moved else []
        self._float: type[np.floating[Any]] = np.float64 if dtype == torch.float64 else np.float32
        # tokens are all that is needed of text: the texts themselves stay behind
        self._source = None if kind == "text" else split.source
        self._tokens: dict[str, Tokens] = {}
        if isinstance(student, TextPreprocessing):
            self._tokens["student"] = tokens_of(split.source, student)
        for number, wanted in enumerate(teachers):
            if isinstance(wanted, TextPreprocessing) and not self._shared(wanted):
                self._tokens[f"teacher {number}"] = tokens_of(split.source, wanted)
        if augment is not None:
            check_augment(augment, kind)
        self._partners = Partners(split, data_seed) if augment is not None and augment.mixup > 0 else None

    def _shared(self, wanted: Preprocessing) -> bool:
        """Whether a teacher takes what the student takes."""
        return same_inputs(self._student, wanted)

    def __getstate__(self) -> dict[str, Any]:
        # a worker gets the tokens of its split alone, and not those of every split of the source
        if not self._tokens:
            return self.__dict__
        tokens = {role: t.take(self._rows) for role, t in self._tokens.items()}
        return {**self.__dict__, "_tokens": tokens, "_rows": np.arange(len(self._rows), dtype=np.int64)}

    def __call__(self, request: Request) -> Batch:
        """The batch of a request; raises :class:`LimbeckError` where a file changed or cannot be read."""
        rows = request.rows
        labels = torch.from_numpy(self._labels[rows])
        share = partners = None
        if self._partners is not None and self._augment is not None:
            partners = self._partners.of(rows, request.view)
            share = beta(self._ids[rows], self._augment.mixup, self._seed, "mixup", request.view)
            labels = self._mixed_labels(rows, partners, share)
        mixed = [rows] if partners is None else [rows, partners]
        read = [self._read(each) for each in mixed]

        def seen(seed: int) -> list[tuple[Raw | None, tuple[int, int] | None]]:
            return [self._view(raw, each, request.view, seed) for raw, each in zip(read, mixed, strict=True)]

        def prepare(role: str, wanted: Preprocessing, raw: Sequence[tuple[Any, tuple[int, int] | None]]) -> Inputs:
            if isinstance(wanted, TextPreprocessing):
                return self._tokens[role].batch(self._rows[rows])
            own = raw[0][1]
            values = self._prepare(raw[0][0], wanted, own)
            if share is not None:
                values = _mix(values, self._prepare(raw[1][0], wanted, own), share)
            name = "image" if isinstance(wanted, ImagePreprocessing) else "x"
            return {name: torch.from_numpy(values)}

        shown = seen(self._seed)
        student = prepare("student", self._student, shown)
        others = tuple(prepare("student", self._student, seen(seed)) for seed in self._others)
        each = {
            number: student if self._shared(wanted) else prepare(f"teacher {number}", wanted, shown)
            for number, wanted in enumerate(self._teachers)
            if wanted is not None
        }
        teacher = each.get(0)
        if self._several:
            teacher = {member_input(i, name): value for i, inputs in each.items() for name, value in inputs.items()} or None
        ids = self._ids[rows]
        keys = ids if partners is None else pair_ids(ids, self._ids[partners])
        return Batch(ids, request.view, student, teacher, labels, torch.full((len(rows),), request.counted), keys, others)

    def _read(self, rows: Int64) -> Any:
        return None if self._source is None else self._source.read(self._rows[rows])

    def _view(self, raw: Any, rows: Int64, view: int, seed: int) -> tuple[Raw | None, tuple[int, int] | None]:
        """Raw samples as this view shows them, and the (height, width) that they all had before."""
        if self._source is None or self._source.kind != "image":
            return raw, None
        own = None if isinstance(raw, list) else raw.shape[1:3]
        return raw if self._augment is None else image_views(raw, self._ids[rows], view, self._augment, seed), own

    def _mixed_labels(self, rows: Int64, other: Int64, share: npt.NDArray[np.float64]) -> Tensor:
        mixed = np.zeros((len(rows), self._classes), dtype=self._float)
        for indices, weight in ((rows, share), (other, 1.0 - share)):
            known = np.flatnonzero(self._labels[indices] >= 0)
            mixed[known, self._labels[indices][known]] += weight[known].astype(self._float)
        return torch.from_numpy(mixed)

    def _prepare(self, raw: Any, wanted: ImagePreprocessing | TensorPreprocessing, own: tuple[int, int] | None) -> npt.NDArray[Any]:
        if isinstance(wanted, TensorPreprocessing):
            return np.ascontiguousarray(raw)
        # a box that a view chose is resized whole; cutting its middle again would throw away what was chosen
        boxed = self._augment is not None and self._augment.resized_crop is not None
        return normalise(_sized(raw, wanted, None if boxed else wanted.resize_shorter, own), wanted, self._float)


@dataclass(frozen=True)
class StagedBuilder:
    """The builder of each stage, as one; it travels as they do."""

    builders: Sequence[Callable[[Request], Batch]]

    def __call__(self, request: Request) -> Batch:
        return self.builders[request.stage](request)


def _sized(raw: Pixels | list[Pixels], wanted: ImagePreprocessing, shorter: int | None, own: tuple[int, int] | None) -> Pixels:
    """Every image at the model's size, or at its own ``(height, width)`` where the model has none."""
    if wanted.height is None or wanted.width is None:
        if own is None:
            raise LimbeckError("Images have several sizes, and the model has none of its own: set options.resolution.")
        height, width = own
        shorter = None
    else:
        height, width = wanted.height, wanted.width
    if shorter is None and not isinstance(raw, list) and raw.shape[1:3] == (height, width):
        return raw
    return np.stack([fit(image, height, width, shorter, wanted.interpolation) for image in raw])


def _mix(first: npt.NDArray[Any], second: npt.NDArray[Any], share: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    weight = share.astype(first.dtype).reshape(-1, *[1] * (first.ndim - 1))
    mixed: npt.NDArray[Any] = first * weight + second * (1 - weight)
    return mixed
