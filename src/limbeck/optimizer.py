"""The optimiser of a fit: torch's fused Adam, AdamW or SGD, whose state is there from the start, and its step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.recipe import Train

__all__ = ["Step", "decay_groups", "make_optimizer"]


def make_optimizer(settings: Train, modules: list[nn.Module]) -> torch.optim.Optimizer:
    """The optimiser that a recipe names, over the parameters of ``modules`` that are trained; all of one dtype and on one device.

    Its state is made here, as zeros, and not in its first step. Where a gradient scaler leaves out the very first step, torch's fused SGD keeps
    as its momentum whatever stood in the memory, and calls no later step the first. From zeros every step is the same, and the first one gives
    what torch's gives: momentum x 0 + gradient.
    """
    groups = [g for g in decay_groups(modules, settings.weight_decay) if g["params"]]
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=True)
    else:
        kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(groups, lr=settings.lr, betas=settings.betas, fused=True)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "betas" in group:
                count = torch.zeros((), dtype=torch.float32, device=p.device)
                optimizer.state[p] = {"step": count, "exp_avg": torch.zeros_like(p.detach()), "exp_avg_sq": torch.zeros_like(p.detach())}
            elif group["momentum"]:
                optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p.detach())}
    return optimizer


def decay_groups(modules: list[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels; none for biases, norms and other vectors (the field's usual rule)."""
    named = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    parameters = list(named.values())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


class Step:
    """``optimizer.step()`` by the same kernels and to the same bits, without what torch does around them in every step.

    That is a record for its profiler, hooks, new lists of tensors, and their grouping by device and dtype: as long as the whole backward pass
    of a tiny model. Here the lists are made once, so make this after the optimiser's state was restored. The counts of Adam's steps become views
    of one tensor, which one addition raises, and the moments views of another, at which one look is enough (:meth:`total`).
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._adam = "betas" in optimizer.defaults
        self._counts: Tensor | None = None
        if self._adam:
            states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
            self._counts = torch.stack([state["step"] for state in states])
            for state, count in zip(states, self._counts, strict=True):
                state["step"] = count
        names = ("exp_avg", "exp_avg_sq", "step") if self._adam else ("momentum_buffer",)
        self._moments = _side_by_side(optimizer, names[: 2 if self._adam else 1])
        self._lists = [_columns(group["params"], optimizer.state, names) for group in optimizer.param_groups]

    def total(self) -> Tensor:
        """The sum of all moments, (): it is finite exactly where every one of them is, and costs less than the largest magnitude.

        Finite moments have a finite sum as long as the gradients' norms were: the sum of exp_avg_sq is an average of squared norms.
        """
        return self._moments.sum()

    def spoilt(self) -> list[Tensor]:
        """The parameters some moment of which is not finite."""
        states = self._optimizer.state
        return [p for p, state in states.items() if not all(bool(t.isfinite().all()) for t in state.values())]

    @torch.no_grad()
    def __call__(self, skipped: Tensor | None) -> None:
        """Touch the parameters that have a gradient. skipped: a float on the device that is 1 where nothing is to change, or None."""
        lists = [([p.grad for p in parameters], parameters, *states) for parameters, *states in self._lists]
        whole = not any(g is None for gradients, *_ in lists for g in gradients)
        if not whole:
            lists = [_with_gradients(*columns) for columns in lists]
        if self._counts is not None:
            one = 1.0 if skipped is None else 1.0 - skipped
            for count in (self._counts,) if whole else [count for *_, counts in lists for count in counts]:
                count += one
        for group, (gradients, parameters, *states) in zip(self._optimizer.param_groups, lists, strict=True):
            if gradients:
                self._touch(group, parameters, gradients, states, skipped)

    def _touch(
        self, group: dict[str, Any], parameters: list[Any], gradients: list[Any], states: list[list[Any]], skipped: Tensor | None
    ) -> None:
        common: dict[str, Any] = {"lr": group["lr"], "weight_decay": group["weight_decay"], "maximize": False, "found_inf": skipped}
        if self._adam:
            kernel = torch._fused_adamw_ if isinstance(self._optimizer, torch.optim.AdamW) else torch._fused_adam_
            (beta1, beta2), (first, second, counts) = group["betas"], states
            kernel(parameters, gradients, first, second, [], counts, beta1=beta1, beta2=beta2, eps=group["eps"], amsgrad=False, **common)
        else:
            momentum, nesterov = group["momentum"], group["nesterov"]
            torch._fused_sgd_(
                parameters, gradients, *states, momentum=momentum, nesterov=nesterov, dampening=0.0, is_first_step=False, **common
            )


_ALIGNED = 16  # elements: where the kernels of a device read several at once, a tensor begins where they may


def _side_by_side(optimizer: torch.optim.Optimizer, names: tuple[str, ...]) -> Tensor:
    """The states of these names as views of one tensor, which is returned; the gaps between them are zero."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = [(optimizer.state[p], name) for p in parameters for name in names if name in optimizer.state.get(p, {})]
    starts, end = [], 0
    for state, name in found:
        starts.append(end)
        end += -(-state[name].numel() // _ALIGNED) * _ALIGNED
    joint = torch.zeros(end, dtype=parameters[0].dtype, device=parameters[0].device)
    for (state, name), start in zip(found, starts, strict=True):
        own = state[name]
        state[name] = joint.as_strided(own.shape, own.stride(), start).copy_(own)
    return joint


def _columns(parameters: list[Any], state: Any, names: tuple[str, ...]) -> tuple[list[Any], ...]:
    """The parameters of a group, and a list of each named state of theirs (an empty one where the optimiser keeps none)."""
    return parameters, *([state[p][name] for p in parameters if name in state.get(p, {})] for name in names)


def _with_gradients(gradients: list[Any], *columns: list[Any]) -> tuple[list[Any], ...]:
    kept = [i for i, g in enumerate(gradients) if g is not None]
    return [gradients[i] for i in kept], *([column[i] for i in kept] if column else [] for column in columns)
