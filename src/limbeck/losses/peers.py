"""Losses of students that learn without a finished teacher: from peers that train beside them in the same steps, or from their own average. What they
learn from stays behind when they leave."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.losses._seam import raised
from limbeck.losses._shared import kl, log_softmax
from limbeck.losses.logits import cross_entropy

__all__ = ["Kdcl", "MeanTeacher", "Mutual", "Peers"]

_Softness = Annotated[float, Field(gt=0, allow_inf_nan=False, description="a number above 0")]


class Peers(nn.Module):
    """Networks that are trained by a loss. models: each takes the student's inputs, by name, and gives (B, C) logits."""

    def __init__(self, models: Sequence[Any]) -> None:
        super().__init__()
        self.peers = nn.ModuleList(model.module for model in models)
        self.models = list(models)

    def answers(self, inputs: Sequence[Any]) -> Tensor:
        """The inputs of each peer -> (B, K - 1, C) logits."""
        return torch.stack([raised(model(own)) for model, own in zip(self.models, inputs, strict=True)], dim=1)


def _together(student: Tensor, peers: Tensor) -> Tensor:
    """(N, C) and (N, K - 1, C) -> (N, K, C), the student first."""
    return torch.cat([raised(student)[:, None], raised(peers).to(raised(student).dtype)], dim=1)


def _supervised(peers: Tensor, labels: Tensor) -> Tensor:
    """The sum of the peers' own cross entropies; the student's stands in the objective."""
    return torch.stack([cross_entropy(each, labels) for each in peers.unbind(1)]).sum(0)


class Mutual(Peers):
    """``sum over the peers of CE(q_k, y) + 1 / (K - 1) * sum over all k and l != k of KL(p_l || q_k)``: K students that each learn from the others.

    q_k are the probabilities of student k, p_l those of student l as what they are (they get no gradient from teaching); the student of the run is
    one of the K, and its own ``cross_entropy`` belongs beside it, at weight 1. All are moved by one step; the authors move one after the other.
    Peers (``student.peers`` of the recipe) read the student's inputs in at least float32, have initial weights of their own, are in the checkpoints,
    and are kept beside the student (``peer-0`` ..., as they are at the end), not in it. A weight other than 1 also scales what they learn from.

    student: (N, C), peers: (N, K - 1, C) logits. labels: (N,) int64 or (N, C) probabilities. Returns (N,) nats.

    Source: Zhang et al. 2018, "Deep Mutual Learning", arXiv:1706.00384, section 3.3, equation 8.

    >>> import torch
    >>> Mutual([])(torch.tensor([[0.0, 0.0]]), torch.tensor([[[0.0, 0.0]]]), torch.tensor([1]))
    tensor([0.6931])
    """

    def forward(self, student: Tensor, peers: Tensor, labels: Tensor) -> Tensor:
        log_q = log_softmax(_together(student, peers), 1.0)
        log_p, count = log_q.detach(), log_q.shape[1]
        pairs = [kl(log_p[:, other], log_q[:, own]) for own in range(count) for other in range(count) if other != own]
        return _supervised(raised(peers), labels) + torch.stack(pairs).sum(0) / (count - 1)


class Kdcl(Peers):
    """``sum over the peers of CE(q_k, y) + T^2 * sum over all k of KL(p || q_k)``: K students that all learn from the best of what they say together.

    p and q_k are softened by the temperature T. p is, for ``ensemble: min_logit``, the softmax of the smallest of the students' logits class by
    class, each student's logits taken from that of the label; for ``naive`` that of the student which has the smallest cross entropy with the
    label, for each sample. p gets no gradient. The student of the run is one of the K, and its own ``cross_entropy`` belongs beside it, at weight 1.
    Peers are as in ``mutual``, but where images are augmented each sees them in a view of its own, as with the authors.

    student: (N, C), peers: (N, K - 1, C) logits. labels: (N,) int64. Returns (N,) nats.

    Source: Guo et al. 2020, "Online Knowledge Distillation via Collaborative Learning", CVPR 2020, section 3.2, which builds on arXiv:1706.00384.

    >>> import torch
    >>> Kdcl([])(torch.tensor([[0.0, 0.0]]), torch.tensor([[[0.0, 0.0]]]), torch.tensor([1]))
    tensor([0.6931])
    """

    def __init__(
        self, models: Sequence[Any], *, ensemble: Literal["min_logit", "naive"] = "min_logit", temperature: _Softness = 2.0
    ) -> None:
        super().__init__(models)
        self._ensemble, self._temperature = ensemble, temperature

    def forward(self, student: Tensor, peers: Tensor, labels: Tensor) -> Tensor:
        z, t = _together(student, peers), self._temperature
        told = z.detach()
        at = labels[:, None, None].expand(-1, z.shape[1], 1)
        if self._ensemble == "min_logit":
            best = (told - told.gather(2, at)).amin(1)
        else:
            wrong = -log_softmax(told, 1.0).gather(2, at)[..., 0]
            best = told[torch.arange(len(z), device=z.device), wrong.argmin(1)]
        log_p, log_q = log_softmax(best, t), log_softmax(z, t)
        return _supervised(raised(peers), labels) + t**2 * torch.stack([kl(log_p, own) for own in log_q.unbind(1)]).sum(0)


class MeanTeacher(nn.Module):
    """``1 / C * sum over classes of (q - p)^2``, or ``T^2 KL(p || q)`` with ``cost: kl``: the student against the average of its own past weights.

    q are the student's probabilities, p those of its average (at the temperature T for kl), which answers in eval mode and gets no gradient.
    Behind each optimiser step the average moves to a times itself and 1 - a times the student, batch statistics too, a = min(1 - 1 / (t + 1),
    decay) in step t. It learns from all samples, and needs no labels, so it also makes unlabelled ones count without any teacher; beside it
    belongs ``cross_entropy``. The average is in the checkpoints, and never exported (``train.ema`` averages the student that is). Where images
    are augmented it sees them in a view of its own, as with the authors.

    student, average: (N, C) logits. Returns (N,), 0 where both agree. The authors take decay 0.99 at first and 0.999 later, and raise the weight
    to 100 (mse) over the first epochs: ``weight: {start: 0, end: 100, until: 0.2}``.

    Source: Tarvainen and Valpola 2017, "Mean teachers are better role models", arXiv:1703.01780, section 2, equations 1 and 2, and the authors' code.

    >>> import torch
    >>> MeanTeacher()(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.])
    """

    count: Tensor

    def __init__(
        self,
        model: Any = None,
        *,
        decay: Annotated[float, Field(ge=0, lt=1, description="a number from 0 to below 1")] = 0.999,
        cost: Literal["mse", "kl"] = "mse",
        temperature: _Softness = 1.0,
    ) -> None:
        super().__init__()
        self._decay, self._cost, self._temperature = decay, cost, temperature
        self._ask = None if model is None else replace(model, module=copy.deepcopy(model.module).requires_grad_(False).eval())
        self.average = nn.Identity() if self._ask is None else self._ask.module
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._followed: list[nn.Module] = []  # not a part of this one

    def train(self, mode: bool = True) -> MeanTeacher:
        super().train(mode)
        self.average.eval()
        return self

    def follow(self, student: nn.Module) -> None:
        """student: the module that is trained, of the same kind as the average."""
        self._followed = [student]

    @torch.no_grad()
    def answers(self, inputs: Sequence[Any]) -> Tensor:
        """The inputs of the average, alone -> (B, C) logits."""
        assert self._ask is not None
        return raised(self._ask(inputs[0]))

    @torch.no_grad()
    def stepped(self, keep: bool = True) -> None:
        """Behind an optimiser step: the average moves. keep: False where it was none."""
        if not keep or not self._followed:
            return
        self.count += 1
        # each tensor once, whatever names it has
        own, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (self.average, self._followed[0]))
        for name, value in own.items():
            if value.is_floating_point():
                share = (1 / (self.count.to(value.dtype) + 1)).clamp(min=1 - self._decay)
                value.lerp_(theirs[name].to(value.dtype), share)
            else:
                value.copy_(theirs[name])

    def forward(self, student: Tensor, average: Tensor) -> Tensor:
        student, average, t = raised(student), raised(average).detach(), self._temperature
        if self._cost == "kl":
            return t**2 * kl(log_softmax(average, t), log_softmax(student, t))
        return (student.softmax(-1) - average.softmax(-1)).square().mean(-1)
