"""Losses on logits: the classic distillation loss, and cross entropy with the labels.

Every function takes N items and returns N values, in at least float32 (half types are raised, float64 stays float64). Nothing is averaged
here: the objective sums and divides.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from limbeck.losses._seam import PerClass, Schedulable, raised
from limbeck.losses._shared import kl, log_softmax, standardized
from limbeck.types import SparseLogits

__all__ = ["Standardize", "Temperature", "cross_entropy", "kd", "kd_sparse"]


Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False, description="a number above 0"), Schedulable()]
Standardize = Annotated[bool, Field(strict=True, description="true or false")]


def kd(student: Tensor, teacher: Tensor, *, temperature: Temperature = 4.0, standardize: Standardize = False) -> Tensor:
    """``T^2 * KL(teacher || student)``, both softened by the temperature T, summed over classes.

    student, teacher: (N, C) logits, of which the teacher's get no gradient. Returns (N,) nats, 0 where they agree. T^2 keeps the size of the
    gradient about the same at every temperature. A class whose logit is -inf on both sides (a masked class) adds 0 and gets a zero
    gradient; one that is -inf for the student alone is infinitely far away, and the value says so.

    standardize: first bring each item's logits, on both sides, to mean 0 and standard deviation 1 (:func:`~limbeck.losses._shared.standardized`),
    so that the student need not have the teacher's range of logits. The authors use weight 9 and T = 2. With two classes only a sign is left, and
    next to no gradient.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2; standardize: Sun et al. 2024,
    "Logit Standardization in Knowledge Distillation", arXiv:2403.01427, section 4.

    >>> kd(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    tensor([0.])
    """
    student, teacher = raised(student), raised(teacher).detach()
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    divergence = kl(log_softmax(teacher, temperature), log_softmax(student, temperature))
    return temperature**2 * divergence


def kd_sparse(student: Tensor, teacher: SparseLogits, *, temperature: float = 4.0, standardize: bool = False) -> Tensor:
    """:func:`kd` where of a teacher's probabilities only a weighted few are kept: ``T^2 * (-entropy - sum of weight * log student)``.

    student: (N, C) logits. teacher: N samples at the same temperature. Returns (N,). Value and gradient are unbiased estimates of kd's, exact
    where all classes are kept: the entropy is the exact one, and the expectation of the weighted sum is that over all classes
    (:func:`limbeck.cache._codec.sparse_of`). A single value may lie below 0.

    >>> import math
    >>> whole = SparseLogits(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]), torch.tensor([math.log(2)]), 2, 1.0)
    >>> round(float(kd_sparse(torch.tensor([[1.0, 1.0]]), whole, temperature=1.0)), 6)
    0.0
    """
    if standardize:
        raise ValueError("standard deviations are of all logits, and a few are kept")
    if temperature != teacher.temperature:
        raise ValueError(f"the kept probabilities are of temperature {teacher.temperature}, not {temperature}")
    log_student = F.log_softmax(raised(student) / temperature, dim=-1).gather(-1, teacher.index)
    weight = teacher.weight.to(log_student.dtype)
    crossed = torch.where(weight == 0, 0.0, weight * log_student).sum(-1)
    return temperature**2 * (-teacher.entropy.to(log_student.dtype) - crossed)


def cross_entropy(
    student: Tensor,
    labels: Tensor,
    *,
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="a number from 0 up to but not including 1")] = 0.0,
    class_weights: Annotated[Tensor | None, PerClass()] = None,
) -> Tensor:
    """``-sum over classes of y log q``, y the label and q the student's probabilities, at temperature 1.

    student: (N, C) logits. labels: (N,) int64 classes, or (N, C) probabilities (mixup). label_smoothing: this share of every label is
    spread evenly over all classes. class_weights: (C,), multiplies each class's part. Returns (N,).

    The objective divides the sum by the number of labelled items, so a class of weight 2 pulls exactly twice as hard as one of weight 1;
    torch's own weighted mean divides by the weights of the labels that are present, which makes the gradient depend on how a step is cut.

    >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([0.6931])
    """
    student = raised(student)
    weight = None if class_weights is None else class_weights.to(student.device, student.dtype)
    if labels.ndim == 1:
        return F.cross_entropy(student, labels, weight, label_smoothing=label_smoothing, reduction="none")
    target = labels.to(student.dtype) * (1 - label_smoothing) + label_smoothing / student.shape[-1]
    if weight is not None:
        target = target * weight
    return -torch.where(target == 0, 0.0, target * F.log_softmax(student, dim=-1)).sum(-1)
