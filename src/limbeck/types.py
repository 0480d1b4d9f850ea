"""What flows between the parts: batches in, outputs out, and (from ``preprocessing``) how a model wants its inputs.

Shapes: B samples, C classes, N items (what a loss counts), H x W pixels, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from limbeck.preprocessing import ImagePreprocessing, Preprocessing, TensorPreprocessing, TextPreprocessing

__all__ = [
    "QKV",
    "UNLABELLED",
    "Batch",
    "ImagePreprocessing",
    "Needs",
    "Outputs",
    "Preprocessing",
    "Signal",
    "SparseLogits",
    "TensorPreprocessing",
    "TextPreprocessing",
    "member_input",
    "of_member",
]

QKV = "q,k,v"
"""What of a transformer's layer may be read in place of its output: queries, keys and values side by side, (B, T, 3 D)."""

UNLABELLED = -1
"""The label of a sample that has none: it counts for ``kd`` and not for ``cross_entropy``."""

Inputs = Mapping[str, Tensor]
"""What one model is called with: ``{"image": (B, Ch, H, W)}``, ``{"input_ids": (B, T), "attention_mask": (B, T), ...}`` or
``{"x": (B, ...)}``."""


@dataclass(frozen=True)
class Batch:
    """One batch of samples, ready for both models.

    ids: ``(B, 2)`` uint64, the 128-bit hash of each sample's raw content. keys: ``(B, 2)`` uint64, the hash of all raw content that a view was
    made of (a sample's id, with mixup its partner's too), by which a teacher's answers are kept; None means the ids. labels: ``(B,)`` int64
    with -1 for unlabelled, or ``(B, C)`` float probabilities after mixup (rows of zeros for unlabelled). mask: ``(B,)`` bool, the valid items.
    ``teacher`` is the same object as
    ``student`` where both want the same preparation, and None where nobody will ask the teacher. Of several teachers it has the inputs of each, under
    names of :func:`of_member`. others: the same samples in the student's preparation, each in a view of its own, for models that learn beside the
    student; empty where these see the student's view.
    """

    ids: np.ndarray[Any, np.dtype[np.uint64]]
    view: int
    student: Inputs
    teacher: Inputs | None
    labels: Tensor
    mask: Tensor
    keys: np.ndarray[Any, np.dtype[np.uint64]] | None = None
    others: tuple[Inputs, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labelled(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """``(B,)`` bool, on the CPU: valid samples with a label."""
        labels = self.labels.numpy(force=True)
        known = labels >= 0 if labels.ndim == 1 else labels.sum(-1) > 0
        return np.asarray(known & self.mask.numpy(force=True))

    def part(self, start: int, stop: int) -> Batch:
        """The microbatch of samples ``start .. stop - 1``."""
        student, *others = ({k: v[start:stop] for k, v in inputs.items()} for inputs in (self.student, *self.others))
        if self.teacher is None or self.teacher is self.student:
            teacher: Inputs | None = student if self.teacher is not None else None
        else:
            teacher = {k: v[start:stop] for k, v in self.teacher.items()}
        keys = None if self.keys is None else self.keys[start:stop]
        return Batch(self.ids[start:stop], self.view, student, teacher, self.labels[start:stop], self.mask[start:stop], keys, tuple(others))

    def to(self, device: torch.device, dtype: torch.dtype | None = None, memory_format: torch.memory_format | None = None) -> Batch:
        """A copy on ``device``; floating-point inputs in ``dtype``, image inputs in ``memory_format``."""

        def move(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x.to(device, non_blocking=True)
            if x.ndim == 4 and memory_format is not None:
                return x.to(device, dtype=dtype, non_blocking=True, memory_format=memory_format)
            return x.to(device, dtype=dtype, non_blocking=True)

        student, *others = ({k: move(v) for k, v in inputs.items()} for inputs in (self.student, *self.others))
        teacher: Inputs | None = None
        if self.teacher is not None:
            teacher = student if self.teacher is self.student else {k: move(v) for k, v in self.teacher.items()}
        labels = self.labels.to(device, non_blocking=True)
        return Batch(self.ids, self.view, student, teacher, labels, self.mask.to(device, non_blocking=True), self.keys, tuple(others))

    def pin_memory(self) -> Batch:
        """Page-locked copies, for fast transfers to a CUDA device (the hook that a DataLoader calls)."""
        student, *others = ({k: v.pin_memory() for k, v in inputs.items()} for inputs in (self.student, *self.others))
        teacher: Inputs | None = None
        if self.teacher is not None:
            teacher = student if self.teacher is self.student else {k: v.pin_memory() for k, v in self.teacher.items()}
        return Batch(self.ids, self.view, student, teacher, self.labels.pin_memory(), self.mask.pin_memory(), self.keys, tuple(others))


def member_input(number: int, name: str) -> str:
    """Under which name ``Batch.teacher`` has an input of one of several teachers."""
    return f"{number}:{name}"


def of_member(batch: Batch, number: int) -> Inputs | None:
    """What a batch has for one of several teachers; None where that one is not asked."""
    own = member_input(number, "")
    return {name.removeprefix(own): value for name, value in (batch.teacher or {}).items() if name.startswith(own)} or None


@dataclass(frozen=True)
class Outputs:
    """What a model gave: ``logits`` (B, C) and the features that were asked for, by module path."""

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What an objective asks of one model."""

    logits: bool = True
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class SparseLogits:
    """A teacher's softened probabilities for many classes by a few weighted ones: M entries a sample.

    index: ``(B, M)`` int64 classes (one may occur twice). weight: ``(B, M)``, summing to 1: the exact probabilities of the most probable classes,
    and an unbiased sample of the others. entropy: ``(B,)``, the exact one of all ``classes`` probabilities at ``temperature``, in nats.
    """

    index: Tensor
    weight: Tensor
    entropy: Tensor
    classes: int
    temperature: float

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, C)``, as dense logits would have it."""
        return len(self.index), self.classes

    def __getitem__(self, rows: Any) -> SparseLogits:
        return replace(self, index=self.index[rows], weight=self.weight[rows], entropy=self.entropy[rows])

    def to(self, device: torch.device) -> SparseLogits:
        index, weight, entropy = (x.to(device, non_blocking=True) for x in (self.index, self.weight, self.entropy))
        return SparseLogits(index, weight, entropy, self.classes, self.temperature)


@dataclass(frozen=True)
class Signal:
    """What a teacher gives for a batch, tagged by ``kind``: dense logits, or sparse ones; and named features."""

    logits: Tensor | None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    kind: Literal["dense", "sparse"] = "dense"
    sparse: SparseLogits | None = None

    def to(self, device: torch.device) -> Signal:
        logits = None if self.logits is None else self.logits.to(device, non_blocking=True)
        sparse = None if self.sparse is None else self.sparse.to(device)
        features = {k: v.to(device, non_blocking=True) for k, v in self.features.items()}
        return Signal(logits, features, self.kind, sparse)
