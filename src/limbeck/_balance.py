"""How a step's gradient comes about: microbatch by microbatch; and, where a term has ``weight: auto``, now and then term by term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.data import Request, StagedPlan
from limbeck.objective import Objective, StagedObjective
from limbeck.ranks import Ranks

__all__ = ["Pull", "Pulls", "pulling"]


class Pull(Protocol):
    """One step. Called with each microbatch in order (and whether it is the last one); gives its share of the loss, each term's part of it, and the
    student's logits. After ``end`` the gradient of the whole step, scaled by the scaler, stands in the parameters, and the shares are final."""

    def __call__(self, last: bool, *microbatch: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]: ...

    def end(self) -> None: ...


Pulls = Callable[[Request], Pull]
"""The way of each step."""


def pulling(
    objective: Objective | StagedObjective,
    work: Any,
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    plan: StagedPlan,
    every: int,
    scaler: Any,
    ranks: Ranks,
) -> Pulls:
    """Backward through every microbatch at once; and, for an objective with terms at ``weight: auto``, a measurement at the first step of each stage
    and every ``every`` steps from there: a function of the step alone, so that a resumed run measures where the run would have.

    work: (microbatch) -> (the sum of the terms with weights, each of the others, all parts for the log, logits), replicated over ranks. module: the
    student, whose parameters are the trunk. parameters: all that are trained.
    """
    plain = _Plain(objective, work, scaler, ranks)
    trunk = {id(p) for p in module.parameters()}

    def pulls(request: Request) -> Pull:
        goal, begun = objective.at(request.stage), plan.starts[request.stage]
        plain.goal = goal
        if not goal.balanced or (request.step - begun) % every:
            return plain
        return _Measured(goal, work, parameters, [id(p) in trunk for p in parameters], scaler, ranks, first=request.step == begun)

    return pulls


class _Plain:
    """The usual way."""

    def __init__(self, objective: Objective | StagedObjective, work: Any, scaler: Any, ranks: Ranks) -> None:
        self.goal, self._work, self._scaler, self._ranks = objective.at(0), work, scaler, ranks

    def __call__(self, last: bool, *microbatch: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        with self._work.no_sync() if self._ranks.size > 1 and not last else nullcontext():
            fixed, apart, values, logits = self._work(*microbatch)
            share = self.goal.joined(fixed, apart)
            self._scaler.scale(share).backward()
        return share.detach(), values, logits

    def end(self) -> None:
        pass


class _Measured:
    """Each term at ``weight: auto`` goes backward by itself, the others together. Over the whole step, all microbatches and ranks, the weight of
    such a term is found by which the norm of its gradient becomes that of the others', on the parameters of the student that both reach; and
    the gradient of the step is put together with it. So neither depends on how the step was cut.

    Gradients are summed over the ranks here: DistributedDataParallel sums only what goes through ``backward``.
    """

    def __init__(
        self,
        goal: Objective,
        work: Any,
        parameters: Sequence[nn.Parameter],
        trunk: Sequence[bool],
        scaler: Any,
        ranks: Ranks,
        *,
        first: bool,
    ) -> None:
        self._goal, self._work, self._scaler, self._ranks, self._first = goal, work, scaler, ranks, first
        self._parameters, self._trunk = list(parameters), trunk
        self._sums: list[list[Tensor | None]] = [[None] * len(self._parameters) for _ in range(1 + len(goal.balanced))]
        self._shares: list[tuple[Tensor, dict[str, Tensor]]] = []

    def __call__(self, last: bool, *microbatch: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        with self._work.no_sync() if self._ranks.size > 1 else nullcontext():
            fixed, apart, values, logits = self._work(*microbatch)
            each = [fixed, *apart.values()]
            for number, value in enumerate(each):
                more = number < len(each) - 1
                found = torch.autograd.grad(self._scaler.scale(value), self._parameters, retain_graph=more, allow_unused=True)
                own = self._sums[number]
                for i, gradient in enumerate(found):
                    kept = own[i]
                    own[i] = gradient if kept is None else kept if gradient is None else kept + gradient
        share = fixed.detach().clone()
        self._shares.append((share, {name: value.detach() for name, value in apart.items()}))
        return share, values, logits

    @torch.no_grad()
    def end(self) -> None:
        self._over_ranks()
        fixed, *others = self._sums
        for number, own in enumerate(others):
            pairs = [
                (f, o) for of_student, f, o in zip(self._trunk, fixed, own, strict=True) if of_student and f is not None and o is not None
            ]
            if pairs:
                self._goal.rebalance(number, _ratio(pairs), first=self._first)
        weights = self._goal.balance
        for i, parameter in enumerate(self._parameters):
            total = fixed[i]
            for weight, own in zip(weights, others, strict=True):
                gradient = own[i]
                if gradient is not None:
                    total = gradient * weight if total is None else total + gradient * weight
            parameter.grad = None if total is None else total.to(parameter.dtype)
        for share, apart in self._shares:
            for weight, value in zip(weights, apart.values(), strict=True):
                share.add_((value * weight).to(share.dtype))

    def _over_ranks(self) -> None:
        if self._ranks.size == 1:
            return
        reached = iter(self._ranks.sum([int(g is not None) for own in self._sums for g in own]))
        for own in self._sums:
            for i, parameter in enumerate(self._parameters):
                if next(reached) and own[i] is None:
                    own[i] = torch.zeros_like(parameter)
            gradients = [g for g in own if g is not None]
            if not gradients:
                continue
            joint = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(joint, group=self._ranks.group)
            for gradient, part in zip(gradients, torch.split(joint, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))


def _ratio(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Length of the first over that of the second, on the parameters where neither is zero: a part of a model that one term alone reaches has no
    say, be its gradient absent or all zeros."""
    lengths = torch.stack([torch.stack([torch.linalg.vector_norm(g) for g in pair]) for pair in pairs])  # (parameters, 2)
    both = (lengths > 0).all(1, keepdim=True)
    first, second = torch.linalg.vector_norm(lengths * both, dim=0)
    found: Tensor = first / second
    return found
