"""Losses of exits: classifiers on layers of the student that learn beside it, and stay behind when it leaves.

An exit makes logits of a layer, so that a teacher of any other architecture, or the student's own last layer, can be compared with it.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import Problem, UsageError
from limbeck.losses._seam import Layer, Path, Shape, raised, shaped
from limbeck.losses._shared import kl, log_softmax
from limbeck.losses.logits import Temperature, cross_entropy

__all__ = ["Byot", "OfaExits", "ofa"]

_Gamma = Annotated[float, Field(gt=0, le=10, description="a number above 0 and at most 10")]
_Softness = Annotated[float, Field(gt=0, allow_inf_nan=False, description="a number above 0")]
_SMALL = 7  # the last maps of ImageNet's networks: the published projectors lead there


def ofa(student: Tensor, teacher: Tensor, labels: Tensor, *, gamma: _Gamma = 1.0, temperature: Temperature = 1.0) -> Tensor:
    """``-sum over c of ((p_c + [c = y])^gamma - [c = y]) log q_c``: a cross entropy with the teacher that hears the label louder where it is sure.

    p and q are the teacher's and the student's probabilities at the temperature T, y the labelled class (of blended labels the largest). With
    gamma 1 it is ``soft_cross_entropy`` without its T^2. Its minimum is not 0.

    student, teacher: (N, C) logits, of which the teacher's get no gradient. labels: (N,) int64 or (N, C) probabilities. Returns (N,) nats. The
    authors weigh it by 1 beside ``cross_entropy`` and ``ofa_exits``, with T = 1 and gamma 1, or 1.5 from DeiT-T to ResNet-18 on ImageNet.

    Source: Hao et al. 2023, "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation", arXiv:2310.19444,
    section 3.3, in the authors' form (OFAKD): the paper's expectation over the other classes is their sum there.

    >>> import torch
    >>> ofa(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([1]), gamma=2.0)
    tensor([1.0397])
    """
    student, teacher = raised(student), raised(teacher).detach()
    p = F.softmax(teacher / temperature, dim=-1)
    chosen = F.one_hot(labels if labels.ndim == 1 else labels.argmax(-1), student.shape[-1])
    heard = (p + chosen) ** gamma - chosen
    return -(heard * log_softmax(student, temperature).masked_fill(heard == 0, 0.0)).sum(-1)  # 0 times -inf is not a number


class _Exit(nn.Module):
    """(N, D), (N, T, D) with its mask, or (N, Ch, H, W) -> (N, C) logits.

    Maps: separable convolutions of stride 2, each doubling the channels, until they are at most 7 wide; their mean; a linear layer. The published
    ones at 224 pixels are as many. Normalised by sample where the authors normalise by batch, so that a step may be cut. Tokens: normalised, the mean
    of those that are there, a linear layer.
    """

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        width = shape[1] if len(shape) == 4 else shape[-1]
        body: list[nn.Module] = []
        size = min(shape[2:]) if len(shape) == 4 else 0
        while size > _SMALL:
            body += [
                nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width, bias=False),
                nn.Conv2d(width, 2 * width, 1, bias=False),
                nn.GroupNorm(1, 2 * width),
                nn.ReLU(),
            ]
            width, size = 2 * width, -(-size // 2)
        if len(shape) == 3:
            body.append(nn.LayerNorm(width))
        self.body, self.head = nn.Sequential(*body), nn.Linear(width, classes)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        x = self.body(raised(features))
        if x.ndim == 4:
            x = x.mean((2, 3))
        elif x.ndim == 3:
            there = mask.to(x.dtype)[..., None]
            x = (x * there).sum(1) / there.sum(1).clamp(min=1)
        logits: Tensor = self.head(x)
        return logits


def _exit_of(name: str, shape: Shape, classes: int, student: str) -> _Exit:
    if len(shape) not in (2, 3, 4):
        text = f"{name} cannot make logits of {student} {shaped(shape)}."
        hint = "Choose a layer that gives (B, D), (B, T, D) or (B, channels, height, width)."
        raise UsageError(Problem("student", text, hint))
    return _Exit(shape, classes)


class OfaExits(nn.Module):
    """``-sum over c of ((p_c + [c = y])^gamma - [c = y]) log q_c``, q of an exit: ``ofa`` on logits of a layer, for a teacher of any kind.

    An exit is a small classifier on a layer of the student: maps are halved until they are at most 7 wide (separable convolutions, normalised by
    sample), tokens normalised and averaged, and a linear layer follows. It learns with the student, and is never exported. Layers in a list have an
    exit each, and their losses are added.

    student_shape: (B, D), (B, T, D) or (B, Ch, H, W). Returns (N,) nats. The authors put an exit on every stage, and ``ofa`` on the last logits.
    Theirs have batch statistics, and for tokens merge patches and add transformer blocks.

    Source: Hao et al. 2023, "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation", arXiv:2310.19444,
    section 3.2.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> exit = OfaExits((2, 3, 8, 8), 4, student="layer1")
    >>> exit(torch.randn(2, 3, 8, 8), torch.ones(2, 3), torch.randn(2, 4), torch.tensor([0, 3])).shape
    torch.Size([2])
    """

    def __init__(
        self,
        student_shape: Shape,
        classes: int,
        *,
        student: Annotated[str, Path, Layer("student")],
        gamma: _Gamma = 1.0,
        temperature: _Softness = 1.0,
    ) -> None:
        super().__init__()
        self.exit = _exit_of("ofa_exits", student_shape, classes, student)
        self._how = {"gamma": gamma, "temperature": temperature}

    def forward(self, features: Tensor, mask: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(N, ...) features, (N, T) 0 at padding, (N, C) logits of the teacher, labels -> (N,)."""
        return ofa(self.exit(features, mask), teacher, labels, **self._how)


class Byot(nn.Module):
    """``(1 - alpha) CE(exit, y) + alpha T^2 KL(student || exit)``: an exit on an earlier layer learns from labels and the student's last layer.

    No teacher is needed: what the exits ask of the layers below them is what the student gains. The student's own logits get no gradient from it;
    beside it belongs ``cross_entropy``. Exits are those of ``ofa_exits``; layers in a list have one each, and their losses are added. They are never
    exported.

    student_shape: (B, D), (B, T, D) or (B, Ch, H, W). Returns (N,) nats. The published objective has a third part, hints between the features of the
    exits and the last ones, which is not built.

    Source: Zhang et al. 2019, "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self Distillation",
    arXiv:1905.08094, section 3.2.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> exit = Byot((2, 6), 4, student="layer1")
    >>> exit(torch.randn(2, 6), torch.ones(2, 6), torch.randn(2, 4), torch.tensor([0, 3])).shape
    torch.Size([2])
    """

    def __init__(
        self,
        student_shape: Shape,
        classes: int,
        *,
        student: Annotated[str, Path, Layer("student")],
        alpha: Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")] = 0.5,
        temperature: _Softness = 3.0,
    ) -> None:
        super().__init__()
        self.exit = _exit_of("byot", student_shape, classes, student)
        self._alpha, self._temperature = alpha, temperature

    def forward(self, features: Tensor, mask: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """(N, ...) features, (N, T) 0 at padding, (N, C) logits of the student, labels -> (N,)."""
        own, t = self.exit(features, mask), self._temperature
        taught = t**2 * kl(log_softmax(raised(logits).detach(), t), log_softmax(own, t))
        return (1 - self._alpha) * cross_entropy(own, labels) + self._alpha * taught
