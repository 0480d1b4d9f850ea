"""Losses of students that learn together: peers that train beside the student, in the same steps, and stay behind when it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.losses._seam import raised
from limbeck.losses._shared import kl, log_softmax
from limbeck.losses.logits import cross_entropy

__all__ = ["Kdcl", "Mutual", "Peers"]

_Softness = Annotated[float, Field(gt=0, allow_inf_nan=False, description="a number above 0")]


class Peers(nn.Module):
    """Networks that are trained by a loss. models: each takes the student's inputs, by name, and gives (B, C) logits."""

    def __init__(self, models: Sequence[Any]) -> None:
        super().__init__()
        self.peers = nn.ModuleList(model.module for model in models)
        self._models = list(models)

    def answers(self, inputs: Any) -> Tensor:
        """The student's inputs -> (B, K - 1, C) logits of its peers."""
        return torch.stack([raised(model(inputs)) for model in self._models], dim=1)


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
    and are never exported. A weight other than 1 also scales what the peers learn from.

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
    Peers are as in ``mutual``. The authors also give each student a view of its own, which is not done here: all see the student's.

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
