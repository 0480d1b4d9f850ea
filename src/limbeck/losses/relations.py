"""Losses on how the items of a batch stand to one another.

Each returns one value an item, and the mean of these values is the published scalar. A value depends on the whole batch that the loss is given.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from limbeck.losses._seam import raised
from limbeck.losses._shared import log_softmax, unit
from limbeck.losses.logits import Temperature

__all__ = ["cka", "correlation_rbf", "dist", "pkt", "rkd_angle", "rkd_distance", "similarity_preserving"]

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


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """``|rows(S S') - rows(T T')|_F^2 / N^2``: which samples of the batch excite a layer alike.

    S, T: the features of the N items, flattened; rows: each row brought to length 1. student: (N, ...), teacher: (N, ...) of any other size, which
    gets no gradient. Returns (N,), an item's own row; their mean is the published scalar. 0 where they agree, and for one item. A row without
    length (a zero feature) stays zero and gets no gradient, where the published code's is of order 1e12.

    Rows have L2 length 1, as in the paper; torchdistill's have L1. The authors weigh it by 3000.

    Source: Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation", arXiv:1907.09682, section 3.

    >>> similarity_preserving(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0], [1.0]]))
    tensor([0.2929, 0.2929])
    """
    s, t = _flat(student), _flat(teacher).detach()
    return (unit(s @ s.T) - unit(t @ t.T)).square().mean(-1)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean over pairs of smooth_l1(d_s / mean d_s - d_t / mean d_t)``, d the distances between the items of the batch.

    The mean is over all N^2 pairs, each item with itself included; the mean distances are over the others. smooth_l1 is x^2 / 2 below 1, and
    |x| - 1/2 above. student: (N, ...), teacher: (N, ...) of any other size, flattened; the teacher gets no gradient. Returns (N,), whose mean is the
    published scalar. 0 where they agree, and for one or two items. Distances are taken straight (no difference of squares), and count as 1e-6 where
    smaller, without gradient.

    The features are not normalised first, unlike in MMRazor. The authors weigh it by 25 beside ``rkd_angle`` by 50.

    Source: Park et al. 2019, "Relational Knowledge Distillation", arXiv:1904.05068, section 3.2.1.

    >>> rkd_distance(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [2.0], [4.0]]))
    tensor([0., 0., 0.])
    """
    s, t = _distances(_flat(student)), _distances(_flat(teacher).detach())
    return F.smooth_l1_loss(s, t, reduction="none").mean(-1)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean over triplets of smooth_l1(cos_s - cos_t)``, cos at item i of the angle between the directions to items j and k.

    The mean is over all N^3 triplets; a direction between equal items is zero and gets no gradient, where the published code's is of order 1e11.
    student: (N, ...), teacher: (N, ...) of any other size, flattened; the teacher gets no gradient. Returns (N,), by the item at the corner, whose
    mean is the published scalar. 0 where they agree, and for one or two items. Memory grows with N^2 D and N^3: give it a layer after pooling.

    Source: Park et al. 2019, "Relational Knowledge Distillation", arXiv:1904.05068, section 3.2.2.

    >>> rkd_angle(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [2.0], [4.0]]))
    tensor([0., 0., 0.])
    """
    s, t = _cosines(_flat(student)), _cosines(_flat(teacher).detach())
    return F.smooth_l1_loss(s, t, reduction="none").mean((1, 2))


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean over pairs of p log((p + 1e-7) / (q + 1e-7))``, p and q how probable the teacher and the student find one item from another.

    These are the cosine similarities (cos + 1) / 2 of the items of the batch, each row divided by its sum, itself included; 1e-7 is added to
    each feature's length. student: (N, ...), teacher: (N, ...) of any other size, flattened; the teacher gets no gradient. Returns (N,), an
    item's own row, whose mean is the published scalar. 0 where they agree, and for one item. A zero feature gets no gradient.

    The mean over N^2 pairs makes it small: RepDistiller weighs it by 30000.

    Source: Passalis and Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer", arXiv:1803.10837, section 3; the
    mean and the 1e-7 are the authors' code.

    >>> pkt(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0], [3.0]])).round(decimals=4)
    tensor([0.0294, 0.0294])
    """
    eps = 1e-7
    q, p = _neighbours(_flat(student), eps), _neighbours(_flat(teacher).detach(), eps)
    return (p * ((p + eps) / (q + eps)).log()).mean(-1)


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 - |Tc' Sc|_F^2 / (|Sc' Sc|_F |Tc' Tc|_F)``: one minus the linear centred kernel alignment.

    Sc, Tc: the features of the N items, flattened, less the mean over the batch. student: (N, ...), teacher: (N, ...) of any other size; the teacher
    gets no gradient. Returns (N,), the published scalar for every item. Between 0 and 1; 0 where one is a rotation, scaling or shift of the other.
    Where either does not vary over the batch (one item, say) the alignment counts as 0, and there is no gradient. The biased form: with few items and
    many features it is close to 0 for anything, so it wants more items than features.

    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", arXiv:1905.00414, section 3; as a loss for distillation:
    Saha et al. 2022, "Distilling Representational Similarity using Centered Kernel Alignment" (BMVC).

    >>> cka(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[2.0], [4.0], [8.0]])).round(decimals=4).abs()
    tensor([0., 0., 0.])
    """
    s, t = _flat(student), _flat(teacher).detach()
    s, t = s - s.mean(0), t - t.mean(0)
    s, t = s @ s.T, t @ t.T
    scale = torch.linalg.vector_norm(s) * torch.linalg.vector_norm(t)
    even = scale == 0
    alignment: Tensor = ((s * t).sum() / scale.masked_fill(even, 1.0)).masked_fill(even, 0.0)
    return (1 - alignment).expand(len(student))


def correlation_rbf(
    student: Tensor,
    teacher: Tensor,
    *,
    gamma: Annotated[float, Field(gt=0, allow_inf_nan=False, description="a number above 0")] = 0.4,
    degree: Annotated[int, Field(ge=1, le=8, description="a whole number from 1 to 8")] = 2,
) -> Tensor:
    """``|C(S) - C(T)|_F^2 / N^2``, with ``C = sum over p of exp(-2 gamma) (2 gamma)^p / p! * (x y')^p``: correlation congruence.

    C compares the items of the batch by the Taylor expansion, up to ``degree``, of a Gaussian kernel on features of length 1. student: (N, ...),
    teacher: (N, ...) of any other size, flattened; the teacher gets no gradient. Returns (N,), an item's own row, whose mean is the published scalar.
    0 where they agree, and for one item. A zero feature gets no gradient.

    This is the paper's loss. RepDistiller has another one of the same name, here ``correlation``; torchdistill does not square the norm.

    Source: Peng et al. 2019, "Correlation Congruence for Knowledge Distillation" (CCKD), arXiv:1904.01802, section 3.

    >>> correlation_rbf(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0], [3.0]])).round(decimals=4)
    tensor([0.1266, 0.1266])
    """
    return (_gaussian(_flat(student), gamma, degree) - _gaussian(_flat(teacher).detach(), gamma, degree)).square().mean(-1)


def _flat(x: Tensor) -> Tensor:
    return raised(x).flatten(1)


def _distances(x: Tensor) -> Tensor:
    """(N, N), in units of their mean over pairs of two; 0 on the diagonal."""
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    distances: Tensor = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=1e-6).masked_fill(itself, 0.0)
    pairs = max(len(x) * (len(x) - 1), 1)
    return distances / (distances.sum() / pairs if len(x) > 1 else 1.0)


def _cosines(x: Tensor) -> Tensor:
    """(N, N, N): at the first, between the directions to the other two."""
    directions = unit(x[None] - x[:, None])
    return directions @ directions.transpose(1, 2)


def _neighbours(x: Tensor, eps: float) -> Tensor:
    """(N, N) probabilities, by row."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    x = (x / (length + eps)).masked_fill(length == 0, 0.0)
    similar = (x @ x.T + 1) / 2
    return similar / similar.sum(-1, keepdim=True)


def _gaussian(x: Tensor, gamma: float, degree: int) -> Tensor:
    """(N, N), but for the constant term, which is the same for every x."""
    x = unit(x)
    cosines = x @ x.T
    terms = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * cosines**p for p in range(1, degree + 1)]
    return torch.stack(terms).sum(0)
