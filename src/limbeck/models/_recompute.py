"""Gradient checkpointing: blocks whose inner values are computed again in the backward pass, and not kept until then."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from limbeck.errors import Problem, UsageError, listed, nearest

__all__ = ["Recomputed", "Which", "which_blocks"]

_KEY = "train.gradient_checkpointing"
_SET = ("forward", "gradient_checkpointing", "_gradient_checkpointing_func")  # what is set on a block, and taken away again


@dataclass(frozen=True)
class Which:
    """The blocks of a model that are computed again. names: from ``named_modules()``; switch: they are those of Transformers' own switch."""

    names: tuple[str, ...] = ()
    switch: bool = False
    reason: str = "off"


def which_blocks(module: nn.Module, setting: bool | Sequence[str]) -> Which:
    """What ``train.gradient_checkpointing`` means for a model.

    True: the blocks of Transformers' own switch where the model has one; else those that it repeats (:func:`_repeated`). Names: these modules;
    ``*`` and ``?`` stand for anything within one part of a dotted name (``blocks.*``).

    Raises: UsageError where there are no such blocks, with the names that there are.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    >>> which_blocks(net, True).names, which_blocks(net, ["?"]).names
    (('1', '2'), ('0', '1', '2'))
    """
    if setting is False:
        return Which()
    if setting is True:
        switched = tuple(name for name, m in module.named_modules() if name and hasattr(m, "gradient_checkpointing"))
        if switched and getattr(module, "supports_gradient_checkpointing", False):
            return Which(switched, True, "those of the model's own switch")
        found = _repeated(module)
        if not found:
            text = f"got true, and {type(module).__name__} neither has Transformers' switch nor repeats a block."
            raise UsageError(
                Problem(_KEY, text, f"Name its blocks, e.g. [{', '.join(_candidates(module)) or 'none, for it has no layers'}].")
            )
        return Which(tuple(found), False, "the blocks that the model repeats")
    return Which(tuple(_named(module, setting)), False, "as named in the recipe")


def _named(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    layers = {name: m for name, m in module.named_modules() if name}
    problems: list[Problem] = []
    found: dict[str, None] = {}
    for pattern in patterns:
        matching = [name for name in layers if re.fullmatch(_expression(pattern), name)]
        hint = nearest(pattern, layers) or f"Its blocks may be: {listed(_candidates(module), 12)}."
        if not matching:
            problems.append(Problem(_KEY, f"'{pattern}' is no layer of {type(module).__name__}.", hint))
        for name in matching:
            block = layers[name]
            if isinstance(block, torch.jit.ScriptModule):
                problems.append(Problem(_KEY, f"'{name}' is a scripted module, which cannot be computed again from outside."))
            elif type(block).forward is nn.Module.forward:
                problems.append(
                    Problem(_KEY, f"'{name}' is a {type(block).__name__}, which is never called itself.", f"Name what is in it: {name}.*")
                )
        found |= dict.fromkeys(matching)
    if problems:
        raise UsageError(problems)
    return list(found)


def _expression(pattern: str) -> str:
    """A pattern as a regular expression; its wildcards stay within one part of a dotted name."""
    return "".join({"*": "[^.]*", "?": "[^.]"}.get(c, re.escape(c)) for c in pattern)


def _repeated(module: nn.Module) -> list[str]:
    """The outermost layers with layers and weights of their own whose class occurs at least twice in the lists of the model (ModuleList, Sequential,
    ModuleDict)."""
    listed_ = nn.ModuleList | nn.Sequential | nn.ModuleDict
    inside = {
        f"{name}.{key}" if name else key: child
        for name, holder in module.named_modules()
        if isinstance(holder, listed_)
        for key, child in holder.named_children()
        if next(child.children(), None) is not None
        and next(child.parameters(), None) is not None
        and type(child).forward is not nn.Module.forward
        and not isinstance(child, torch.jit.ScriptModule)
    }
    counts = Counter(type(child) for child in inside.values())
    chosen: list[str] = []
    for name, child in inside.items():
        if counts[type(child)] > 1 and not any(name.startswith(f"{outer}.") for outer in chosen):
            chosen.append(name)
    return chosen


def _candidates(module: nn.Module) -> list[str]:
    """Layers that a person may mean: those with layers of their own, else all of the outermost."""
    inner = [
        n for n, m in module.named_modules() if n and next(m.children(), None) is not None and type(m).forward is not nn.Module.forward
    ]
    return (inner or [name for name, _ in module.named_children()])[:12]


class Recomputed:
    """For the length of a ``with`` block, the blocks of a model keep only their inputs in a training step, and are computed again in its backward
    pass.

    The gradient is the same to the bit: dropout is drawn from the same state of the generator again, and buffers that a forward pass changes
    (batch statistics, the vectors of spectral norm) are as they were before it, and change once. Names of the state stay, and nothing is left
    behind. Forward hooks on layers *inside* a block fire twice a step; :class:`~limbeck.models.Capture` keeps what the first time gave.

    Source: Chen et al., 2016, arXiv 1604.06174; torch.utils.checkpoint without reentrant autograd.

    Raises: UsageError as :func:`which_blocks`.
    """

    def __init__(self, module: nn.Module, setting: bool | Sequence[str]) -> None:
        self._module, self._which = module, which_blocks(module, setting)
        self._undo: list[tuple[nn.Module, dict[str, Any]]] = []

    def __enter__(self) -> Self:
        layers = dict(self._module.named_modules())
        for name in self._which.names:
            block = layers[name]
            self._undo.append((block, {k: v for k, v in vars(block).items() if k in _SET}))
            # Transformers' layers look at these two themselves; `gradient_checkpointing_enable` would leave hooks on the embeddings behind.
            if self._which.switch:
                block.gradient_checkpointing = True
                block._gradient_checkpointing_func = partial(_again, block)
            else:
                block.forward = partial(_call, block, block.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for m, before in self._undo:
            for key in _SET:
                vars(m).pop(key, None)
            vars(m).update(before)
        self._undo = []


def _call(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return _again(block, forward, *args, **kwargs)


def _again(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``forward``, and once more in the backward pass, from the buffers as they are now."""
    leaves, form = tree_flatten((args, kwargs))  # flat, so that autograd sees a block that writes over its own input

    def called(*leaves: Any) -> Any:
        args, kwargs = tree_unflatten(leaves, form)
        return forward(*args, **kwargs)

    before = [(m, name, b.detach().clone()) for m in block.modules() for name, b in m._buffers.items() if b is not None]
    if not before:
        return checkpoint(called, *leaves, use_reentrant=False)
    return checkpoint(called, *leaves, use_reentrant=False, context_fn=lambda: (nullcontext(), _Swapped(before)))


class _Swapped:
    """Other tensors in the place of buffers, for the length of a ``with`` block: what is computed again neither sees nor changes the real ones.

    They are not written into: autograd counts writes to what it has saved.
    """

    def __init__(self, values: list[tuple[nn.Module, str, Tensor]]) -> None:
        self._values = values
        self._real: list[tuple[nn.Module, str, Tensor | None]] = []

    def __enter__(self) -> None:
        self._real = [(m, name, m._buffers[name]) for m, name, _ in self._values]
        for m, name, value in self._values:
            m._buffers[name] = value.clone()

    def __exit__(self, *_: object) -> None:
        for m, name, real in self._real:
            m._buffers[name] = real
