"""Other ways to compare a student's logits with a teacher's: divergences, hard labels, squares, and classes that do not exclude one another."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from limbeck.losses._seam import Schedulable, raised
from limbeck.losses._shared import kl, log_softmax, soft_ce
from limbeck.losses.logits import Temperature

__all__ = ["fkl", "hard", "jsd", "kd_sigmoid", "mse_logits", "rkl", "soft_cross_entropy"]


def soft_cross_entropy(student: Tensor, teacher: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """``-sum over classes of p log q``, p the teacher's and q the student's probabilities at the temperature T; no T^2.

    student, teacher: (N, C) logits, of which the teacher's get no gradient. Returns (N,) nats. The gradient is that of ``kd`` divided by T^2;
    the value is larger by the teacher's entropy, so its minimum is not 0.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2, without the factor T^2.

    >>> soft_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.6931])
    """
    return soft_ce(log_softmax(raised(teacher).detach(), temperature), log_softmax(raised(student), temperature))


def fkl(student: Tensor, teacher: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """``KL(teacher || student)`` at the temperature T; no T^2. It covers all that the teacher thinks possible.

    student, teacher: (N, C) logits, of which the teacher's get no gradient. Returns (N,) nats, 0 where they agree: ``kd`` divided by T^2, as
    language-model libraries write it.

    Source: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), arXiv:2306.13649, section 2.

    >>> fkl(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([0.4621])
    """
    return kl(log_softmax(raised(teacher).detach(), temperature), log_softmax(raised(student), temperature))


def rkl(student: Tensor, teacher: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """``KL(student || teacher)`` at the temperature T; no T^2. It seeks the teacher's main mode and leaves the rest.

    student, teacher: (N, C) logits, of which the teacher's get no gradient. Returns (N,) nats, 0 where they agree. A class whose logit is -inf on
    both sides adds 0; one that is -inf for the teacher alone makes the value infinite.

    Source: Gu et al. 2024, "MiniLLM: Knowledge Distillation of Large Language Models", arXiv:2306.08543, section 2; Agarwal et al. 2024 (GKD),
    arXiv:2306.13649.

    >>> rkl(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([0.4621])
    """
    return kl(log_softmax(raised(student), temperature), log_softmax(raised(teacher).detach(), temperature))


def jsd(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: Annotated[float, Field(gt=0, lt=1, description="a number between 0 and 1, both left out"), Schedulable()] = 0.5,
    temperature: Temperature = 1.0,
) -> Tensor:
    """``beta * KL(teacher || m) + (1 - beta) * KL(student || m)``, with ``m = beta * teacher + (1 - beta) * student``; no T^2.

    The probabilities are at the temperature T. student, teacher: (N, C) logits, of which the teacher's get no gradient. Returns (N,) nats, 0
    where they agree, and at most ln 2 at beta 0.5. Near the ends it goes to 0 and not to a KL; those are ``fkl`` and ``rkl``, by name.
    DistiLLM's lambda weighs the student: it is 1 - beta.

    Source: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), arXiv:2306.13649, equation 1.

    >>> jsd(torch.tensor([[2000.0, 0.0]]), torch.tensor([[0.0, 2000.0]]))
    tensor([0.6931])
    """
    log_student = log_softmax(raised(student), temperature)
    log_teacher = log_softmax(raised(teacher).detach(), temperature)
    # By the ratio of the two, so that next to an end a small value is not the difference of large ones; e^-1e30 is 0, and -inf has no ratio.
    ratio = log_teacher.clamp(min=-1e30) - log_student.clamp(min=-1e30)
    ours, theirs = math.log1p(-beta), math.log(beta)
    over_student = torch.logaddexp(ratio + theirs, torch.full_like(ratio, ours))  # log of m / student
    over_teacher = torch.logaddexp(torch.full_like(ratio, theirs), ours - ratio)
    return -(beta * log_teacher.exp() * over_teacher + (1 - beta) * log_student.exp() * over_student).sum(-1)


def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """``-log q_k``, where k is the class that the teacher finds most probable: its decision serves as the label.

    student, teacher: (N, C) logits. Returns (N,) nats. Of classes that tie, the first counts. It also learns from unlabelled samples. The authors
    weigh it and ``cross_entropy`` by 0.5 each.

    Source: Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention" (DeiT), arXiv:2012.12877,
    equation 3.

    >>> hard(torch.tensor([[0.0, 0.0]]), torch.tensor([[-1.0, 3.0]]))
    tensor([0.6931])
    """
    return F.cross_entropy(raised(student), teacher.detach().argmax(-1), reduction="none")


def mse_logits(student: Tensor, teacher: Tensor, *, form: Literal["code", "paper"] = "code") -> Tensor:
    """``sum over classes of (s - t)^2``, divided by the number of classes in the form ``code``; ``paper`` does not divide.

    student, teacher: (N, C) logits, of which the teacher's get no gradient. Returns (N,), 0 where they agree. It is the limit of ``kd`` at a
    large temperature, for logits of mean 0; unlike kd, it also wants the teacher's offset. A class that is -inf on both sides adds 0.

    Source: Kim et al. 2021, "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation", arXiv:2105.08919,
    section 3 (``paper``), and the authors' code; first Ba and Caruana 2014, arXiv:1312.6184.

    >>> mse_logits(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([5.])
    """
    student, teacher = raised(student), raised(teacher).detach()
    masked = torch.isneginf(student) & torch.isneginf(teacher)
    difference = student.masked_fill(masked, 0.0) - teacher.masked_fill(masked, 0.0)
    squares = difference.square().sum(-1)
    return squares / student.shape[-1] if form == "code" else squares


def kd_sigmoid(student: Tensor, teacher: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """``T^2 * sum over classes of KL((p, 1 - p) || (q, 1 - q))``, with p and q the sigmoids of teacher and student at the temperature T.

    Each class is a yes or no of its own: for several labels a sample, for heads that were trained with binary cross entropy, and, with a single
    column, for binary classification. student, teacher: (N, C) logits, of which the teacher's get no gradient. Returns (N,) nats, 0 where they
    agree. Computed from log-sigmoids, so it is exact where the authors clamp probabilities at 1e-8.

    Source: Yang et al. 2023, "Multi-Label Knowledge Distillation" (the part MLD), arXiv:2308.06453, section 3, which is T = 1.

    >>> kd_sigmoid(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([0.])
    """
    student, teacher = raised(student) / temperature, raised(teacher).detach() / temperature

    def both(z: Tensor) -> Tensor:
        return torch.stack((F.logsigmoid(z), F.logsigmoid(-z)), dim=-1)

    return temperature**2 * kl(both(teacher), both(student)).sum(-1)
