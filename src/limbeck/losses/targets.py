"""Losses on logits that ask which class is the labelled one: DKD, NKD and WSLD.

Each needs one class a sample. Labels that mixup blends have none, so a recipe that combines the two is refused.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from limbeck.losses._seam import raised
from limbeck.losses._shared import kl, log_softmax, soft_ce, standardized
from limbeck.losses.logits import Standardize, Temperature

__all__ = ["dkd", "nkd", "wsld"]

_Factor = Annotated[float, Field(ge=0, allow_inf_nan=False, description="a number from 0 up")]


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: _Factor = 1.0,
    beta: _Factor = 8.0,
    temperature: Temperature = 4.0,
    standardize: Standardize = False,
) -> Tensor:
    """``T^2 * (alpha * TCKD + beta * NCKD)``: plain distillation cut into how sure the teacher is of the label, and how it ranks the rest.

    TCKD is the KL of (p_y, 1 - p_y), the labelled class against all others; NCKD the KL over the other classes alone, renormalised. Both are
    KL(teacher || student) softened by the temperature T. Plain ``kd`` is TCKD + (1 - p_y of the teacher) * NCKD, in which a sure teacher
    silences the second part.

    student, teacher: (N, C) logits, of which the teacher's get no gradient. labels: (N,) int64. Returns (N,) nats, 0 where they agree. With two
    classes NCKD is 0. The mass of the other classes is a log-sum-exp, so it never underflows, and they are masked with -inf; the authors' sums
    and their -1000 fail where the label's logit is far above the rest.

    standardize: as in ``kd``. The authors take beta from 2 to 8 by pair on CIFAR-100 (T = 4, warmed up over 20 epochs) and 0.5 on ImageNet (T = 1).

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", arXiv:2203.08679, section 3, equation 7.

    >>> dkd(torch.tensor([[0.0, 900.0, 2.0]]), torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([1]), temperature=1.0, beta=1.0)
    tensor([677.5816])
    """
    student, teacher = raised(student), raised(teacher).detach()
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    binary_student, others_student = _apart(student / temperature, labels)
    binary_teacher, others_teacher = _apart(teacher / temperature, labels)
    return temperature**2 * (alpha * kl(binary_teacher, binary_student) + beta * kl(others_teacher, others_student))


def nkd(student: Tensor, teacher: Tensor, labels: Tensor, *, gamma: _Factor = 1.5, temperature: Temperature = 1.0) -> Tensor:
    """``-p_y log q_y - gamma * T^2 * sum over other classes of p' log q'``: the teacher's share of the label, and its ranking of the rest.

    p and q are the teacher's and the student's probabilities, p' and q' those of the other classes alone, renormalised; the first part is at
    temperature 1, the second at T. It is a cross entropy: its minimum is the teacher's own entropy, and not 0.

    student, teacher: (N, C) logits, of which the teacher's get no gradient. labels: (N,) int64. Returns (N,) nats. Beside it belongs
    ``cross_entropy`` at weight 1. With two classes the second part is 0.

    Source: Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized
    Soft Labels", arXiv:2303.13005, section 3.

    >>> nkd(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    tensor([0.2290])
    """
    student, teacher = raised(student), raised(teacher).detach()
    at = labels[:, None]
    target = soft_ce(log_softmax(teacher, 1.0).gather(-1, at), log_softmax(student, 1.0).gather(-1, at))
    others = soft_ce(_apart(teacher / temperature, labels)[1], _apart(student / temperature, labels)[1])
    return target + gamma * temperature**2 * others


def wsld(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: Temperature = 2.0) -> Tensor:
    """``T^2 * w * (-sum over classes of p log q)``, with ``w = 1 - exp(-CE(student) / CE(teacher))``: less teaching where the student is better.

    p and q are the teacher's and the student's probabilities at the temperature T. CE is the cross entropy with the label at temperature 1;
    w lies between 0 and 1 and gets no gradient. It is a cross entropy: its minimum is not 0, but its gradient is 0 where both agree.

    student, teacher: (N, C) logits, of which the teacher's get no gradient. labels: (N,) int64. Returns (N,) nats. The authors add
    ``cross_entropy`` at weight 1, and weigh this term by 2.25 at T = 2. A teacher that is quite sure of the label gives
    w = 1; where both give the label no chance at all, w is 1 - 1/e.

    Source: Zhou et al. 2021, "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective", arXiv:2102.00650,
    section 5; 1e-7 added to CE(teacher) is the authors' code.

    >>> wsld(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([1]), temperature=1.0)
    tensor([0.4382])
    """
    student, teacher = raised(student), raised(teacher).detach()
    hard = F.cross_entropy(student.detach(), labels, reduction="none") / (F.cross_entropy(teacher, labels, reduction="none") + 1e-7)
    weight = 1 - torch.exp(-hard.clamp(min=0).nan_to_num(nan=1.0))
    return temperature**2 * weight * soft_ce(log_softmax(teacher, temperature), log_softmax(student, temperature))


def _apart(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each item: (N, 2) log-probabilities of the label and of all else, and (N, C) those of all else alone, -inf at the label.

    Where all else is masked (-inf), the first is (0, -inf), and the second one even distribution, the same for student and teacher.
    """
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, labels[:, None], True)
    others = logits.masked_fill(chosen, -torch.inf)
    nobody = torch.isneginf(others).all(-1, keepdim=True)
    others = others.masked_fill(nobody, 0.0)
    rest = (others.logsumexp(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)).masked_fill(nobody, -torch.inf)
    label = F.log_softmax(logits, dim=-1).gather(-1, labels[:, None])
    return torch.cat((label, rest), dim=-1), F.log_softmax(others, dim=-1)
