"""Several teachers as one: each answers for itself, and what they say together is their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.losses import raised
from limbeck.objective import temperatures_of
from limbeck.recipe import Recipe
from limbeck.teacher import Asking, Coming, Teacher
from limbeck.types import Batch, Needs, Signal, of_member

__all__ = ["Ensemble", "Mixing"]


@dataclass(frozen=True)
class Mixing:
    """How the logits of K teachers become those of one.

    ``average: probabilities``: ``T log(sum over k of w_k softmax(z_k / T))``, so that a loss at the temperature T reads the weighted mean of the
    teachers' softened probabilities (You et al. 2017, "Learning from Multiple Teacher Networks", section 3.1), and no other temperature does.
    ``average: logits``: ``sum over k of w_k z_k``, at every temperature the geometric mean (Hinton et al. 2015, arXiv:1503.02531, section 1).

    weights: K numbers that sum to 1, or what gives each sample its own: ``confidence``, ``w_k`` in proportion to the largest of softmax(z_k);
    ``entropy``, in proportion to exp(-H), H the entropy of softmax(z_k) in nats, so that a teacher that knows nothing of C classes has 1 / C of the
    weight of one that is sure.
    """

    average: Literal["probabilities", "logits"]
    weights: tuple[float, ...] | Literal["confidence", "entropy"]
    temperature: float = 1.0

    @classmethod
    def of(cls, recipe: Recipe) -> Mixing:
        """What a recipe of several teachers asks for."""
        asked, count = recipe.ensemble, len(recipe.teachers)
        weights = asked.weights if asked.weights is not None else [1.0] * count
        shares = weights if isinstance(weights, str) else tuple(w / math.fsum(weights) for w in weights)
        [own] = temperatures_of(recipe.terms) if asked.temperature is None and asked.average == "probabilities" else [1.0]
        return cls(asked.average, shares, float(own) if asked.temperature is None else asked.temperature)

    def __call__(self, logits: Sequence[Tensor]) -> Tensor:
        """K of (N, C), in the data's classes -> (N, C), in at least float32.

        >>> two = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
        >>> together = Mixing("probabilities", (0.5, 0.5), 2.0)(two)
        >>> bool(torch.isclose((together / 2).softmax(1), sum((z / 2).softmax(1) for z in two) / 2).all())
        True
        """
        each = torch.stack([raised(z) for z in logits])
        shares = self.shares(each)
        if self.average == "logits":
            weighted: Tensor = torch.where(shares[..., None] > 0, each * shares[..., None], 0.0)  # 0 times -inf is not a number
            return weighted.sum(0)
        spread = (each / self.temperature).log_softmax(-1)
        together: Tensor = (spread + shares[..., None].log()).logsumexp(0) * self.temperature
        return together

    def shares(self, logits: Tensor) -> Tensor:
        """(K, N, C) -> (K, N), which sum to 1 over the teachers."""
        if not isinstance(self.weights, str):
            return logits.new_tensor(self.weights)[:, None].expand(logits.shape[:2])
        spread = logits.log_softmax(-1)
        if self.weights == "confidence":
            return spread.amax(-1).softmax(0)  # in proportion to exp of it, the probability
        entropy: Tensor = torch.special.entr(spread.exp()).sum(-1)  # 0 log 0 is 0
        return (-entropy).softmax(0)

    def at_one(self) -> Mixing:
        """The same at temperature 1: the probabilities that the teachers give together, by which they are evaluated."""
        return replace(self, temperature=1.0)


class Ensemble:
    """Teachers that are asked one after the other, live or from their caches; their logits are averaged as ``mixing`` says."""

    def __init__(self, members: Sequence[Teacher], mixing: Mixing, device: torch.device) -> None:
        self.members, self.mixing, self.device = tuple(members), mixing, device
        self.identity: dict[str, Any] = {"members": [member.identity for member in members], "mixing": vars(mixing)}

    def __call__(self, batch: Batch, needs: Needs) -> Signal:
        """batch: with the inputs of every member that is asked live (:func:`limbeck.types.of_member`)."""
        told = [member(replace(batch, teacher=of_member(batch, i)), Needs()).logits for i, member in enumerate(self.members)]
        return Signal(self.mixing([logits.to(self.device) for logits in told if logits is not None]))

    def ahead(self, coming: Coming, asked: Asking) -> Coming:
        return coming
