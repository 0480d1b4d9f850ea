"""Losses on how the items of a batch stand to one another.

Each returns one value an item, and the mean of these values is the published scalar. A value depends on the whole batch that the loss is given.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from limbeck.losses._seam import raised
from limbeck.losses._shared import log_softmax
from limbeck.losses.logits import Temperature

__all__ = ["dist"]

_Factor = Annotated[float, Field(ge=0, allow_inf_nan=False, description="a number from 0 up")]


def dist(student: Tensor, teacher: Tensor, *, beta: _Factor = 1.0, gamma: _Factor = 1.0, temperature: Temperature = 1.0) -> Tensor:
    """``T^2 * (beta * (1 - mean over items of r) + gamma * (1 - mean over classes of r))``, r the correlation of the probabilities.

    r is Pearson's correlation of the student's with the teacher's probabilities at the temperature T: for an item over its classes (inter), for
    a class over the items of the batch (intra), with 1e-8 added to the product of the two norms. So the student need not give the same
    probabilities, only rank them alike.

    student, teacher: (N, C) logits, of which the teacher's get no gradient. Returns (N,): an item's own inter part, and the batch's intra part. At a
    match it is 0 but for the 1e-8, which shows where a class has next to no probability. What does not vary correlates with nothing: one item in the
    batch gives intra 1, an even teacher inter 1, both without gradient. The paper's tau is T: 4 on CIFAR-100, 1 on
    ImageNet.

    Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher" (DIST), arXiv:2205.10536, section 4; the 1e-8 is the
    authors' code.

    >>> dist(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.0, 3.0], [3.0, 0.0]])).round(decimals=4).abs()
    tensor([0., 0.])
    """
    q = log_softmax(raised(student), temperature).exp()
    p = log_softmax(raised(teacher).detach(), temperature).exp()
    inter = 1 - _pearson(q, p)
    intra = (1 - _pearson(q.T, p.T)).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _pearson(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    """Of the rows of (N, D): (N,)."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1) / (norms + eps)
