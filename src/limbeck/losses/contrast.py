"""Losses that tell a sample from others, which a memory holds."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import Problem, UsageError
from limbeck.losses._seam import Layer, Path, Shape, of_samples, raised, shaped

__all__ = ["Crd"]

_EPSILON = 1e-7


class Crd(nn.Module):
    """``-log h(p_0) - sum over k of log(1 - h(p_k))``, h(p) = p / (p + K / M + 1e-7): is this the teacher's view of the same sample, or another's?

    s and t are learned linear maps of both features, of length 1. A memory keeps the s and t of all M training rows. p_k is
    exp(s . memory_t[k] / T) / Z for the sample itself (k = 0) and K others of another class (without labels: any other sample), and the same the
    other way round, t against memory_s; the two losses are added. Z is M times the mean of the first microbatch of the first step (of the whole step
    only where it is not cut), and stays. The memory is read as it was before the step, and moves behind it: ``momentum`` of the old entry, the rest
    of the new one (of equal samples in one step their mean), of length 1 again. Which others are drawn is a function of (seed, step, sample), so
    neither the order of a batch nor a stop changes it; on several ranks all memories move alike.

    student_shape, teacher_shape: (B, D) or (B, Ch, H, W), flattened. rows: M. dim: of s and t. negatives: K, drawn with replacement, as the
    authors do even where M is smaller. Returns (N,). The authors weigh it by 0.8, on the embedding before the classifier. A step holds
    2 N (K + 1) dim numbers. What was learned here, and the memory, are never exported.

    Source: Tian et al. 2020, "Contrastive Representation Distillation", arXiv:1910.10699, section 3, in the authors' form (RepDistiller, exact).

    >>> _ = torch.manual_seed(0)
    >>> crd = Crd((2, 3), (2, 5), 4, student="a", teacher="b", dim=2, negatives=3)
    >>> crd(torch.eye(2, 3), torch.eye(2, 5), torch.tensor([[0, 2, 3, 3], [1, 3, 2, 2]])).shape
    torch.Size([2])
    """

    of_student: Tensor
    of_teacher: Tensor
    scale: Tensor

    def __init__(
        self,
        student_shape: Shape,
        teacher_shape: Shape,
        rows: int,
        *,
        student: Annotated[str, Path, Layer("student")],
        teacher: Annotated[str, Path, Layer("teacher")],
        dim: Annotated[int, Field(gt=0, description="a whole number of at least 1")] = 128,
        negatives: Annotated[int, Field(gt=0, le=1_000_000, description="a whole number from 1 to 1,000,000")] = 16384,
        temperature: Annotated[float, Field(ge=0.01, allow_inf_nan=False, description="a number of at least 0.01")] = 0.07,
        momentum: Annotated[float, Field(ge=0, lt=1, description="a number from 0 to below 1")] = 0.5,
    ) -> None:
        super().__init__()
        advice = of_samples(student_shape, teacher_shape)
        if advice:
            text = f"crd cannot compare {student} {shaped(student_shape)} with {teacher} {shaped(teacher_shape)}."
            raise UsageError(Problem("student", text, advice))
        if rows < 2:
            raise UsageError(Problem("loss", f"crd tells samples apart, and there is {rows} of them to train on."))
        self.negatives, self._temperature, self._momentum = negatives, temperature, momentum
        self.embed_student = nn.Linear(math.prod(student_shape[1:]), dim)
        self.embed_teacher = nn.Linear(math.prod(teacher_shape[1:]), dim)
        bound = 1 / math.sqrt(dim / 3)
        self.register_buffer("of_student", torch.rand(rows, dim) * 2 * bound - bound)
        self.register_buffer("of_teacher", torch.rand(rows, dim) * 2 * bound - bound)
        self.register_buffer("scale", torch.full((2,), -1.0))  # Z of s and of t; below 0: not known yet
        self._found: Tensor | None = None
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, student: Tensor, teacher: Tensor, samples: Tensor) -> Tensor:
        """(N, ...) features, of which the teacher's get no gradient, and (N, 1 + K) int64 places of a sample and of others -> (N,)."""
        s = F.normalize(self.embed_student(raised(student).flatten(1)), dim=1)
        t = F.normalize(self.embed_teacher(raised(teacher).detach().flatten(1)), dim=1)
        scores = [
            torch.einsum("nkd,nd->nk", memory[samples], x).div(self._temperature).exp()
            for memory, x in ((self.of_teacher, s), (self.of_student, t))
        ]
        if self._found is None:
            means = torch.stack([x.detach().mean() for x in scores]) * len(self.of_student)
            self._found = torch.where(self.scale > 0, self.scale, means.to(self.scale.dtype))
        self._seen.append((samples[:, 0], s.detach(), t.detach()))
        noise = (samples.shape[1] - 1) / len(self.of_student)
        return sum((self._loss(x / z, noise) for x, z in zip(scores, self._found, strict=True)), start=s.new_zeros(len(s)))

    @staticmethod
    def _loss(p: Tensor, noise: float) -> Tensor:
        own, others = p[:, 0], p[:, 1:]
        return -(own / (own + noise + _EPSILON)).log() - (noise / (others + noise + _EPSILON)).log().sum(1)

    @torch.no_grad()
    def stepped(self, keep: bool = True) -> None:
        """Behind an optimiser step: the memory moves to what was seen in it. keep: False forgets that instead."""
        if keep and self._found is not None:
            self.scale.copy_(self._found)
            seen, *new = (torch.cat(each) for each in zip(*self._seen, strict=True))
            places, at, counts = torch.unique(seen, return_inverse=True, return_counts=True)
            for memory, each in zip((self.of_student, self.of_teacher), new, strict=True):
                # of equal samples in one step the mean, so that neither their order nor a cut between them decides
                mean = memory.new_zeros(len(places), memory.shape[1]).index_add_(0, at, each.to(memory.dtype)) / counts[:, None]
                memory[places] = F.normalize(memory[places] * self._momentum + mean * (1 - self._momentum), dim=1)
        self._found, self._seen = None, []
