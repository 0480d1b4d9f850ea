"""Which layers of two models to compare where nobody says: ``layers: auto``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import Problem, UsageError
from limbeck.models._images import sample_inputs
from limbeck.models._model import Model, untouched

__all__ = ["evenly", "exit_layers", "pair_layers"]

_POOLS = (nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.pooling._AvgPoolNd)


def pair_layers(student: Model, teacher: Model) -> list[tuple[str, str]]:
    """Pairs of layers (the student's, the teacher's), the last ones last: of two transformers evenly spaced layers (:func:`evenly`), of two
    convolutional networks the last layers of the stages, counted from the last stage.

    Raises: UsageError for other models, and where one is of each kind.
    """
    stacks = [_stack(model.module) for model in (student, teacher)]
    if all(stacks):
        return [(stacks[0][i], stacks[1][j]) for i, j in zip(*evenly(len(stacks[0]), len(stacks[1])), strict=True)]
    stages = [[] if stack else _stages(model) for stack, model in zip(stacks, (student, teacher), strict=True)]
    if all(stages):
        return list(zip(*(each[-min(map(len, stages)) :] for each in stages), strict=True))
    kinds = [
        "a transformer" if stack else "a convolutional network" if stage else "neither" for stack, stage in zip(stacks, stages, strict=True)
    ]
    text = f"layers: auto pairs two transformers or two convolutional networks; the student is {kinds[0]} and the teacher is {kinds[1]}."
    raise UsageError(Problem("objective", text, "Name the layers: student: [...], teacher: [...]."))


def exit_layers(student: Model) -> list[str]:
    """Layers for exits, the last one last: the last layers of the stages of a convolutional network, four evenly spaced ones of a transformer.

    Raises: UsageError for other models.
    """
    stack = _stack(student.module)
    found = [stack[i] for i in evenly(min(4, len(stack)), len(stack))[1]] if stack else _stages(student)
    if not found:
        text = "layers: auto finds the stages of a convolutional network, or the layers of a transformer, and the student is neither."
        raise UsageError(Problem("objective", text, "Name the layers: student: [...]."))
    return found


def evenly(ours: int, theirs: int) -> tuple[list[int], list[int]]:
    """Numbers of layers to compare: every one of the shallower model with evenly spaced ones of the deeper, last with last.

    >>> evenly(4, 12)
    ([0, 1, 2, 3], [2, 5, 8, 11])
    """
    count = min(ours, theirs)
    return tuple([i * depth // count - 1 for i in range(1, count + 1)] for depth in (ours, theirs))  # type: ignore[return-value]


def _stack(module: nn.Module) -> list[str]:
    """The layers of a transformer: the longest list of modules of one class that all hold attention, and is in no other such list."""
    found: dict[str, list[str]] = {}
    for name, holder in module.named_modules():
        children = list(holder.named_children())
        if not isinstance(holder, nn.ModuleList | nn.Sequential) or not children or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if len({type(child) for _, child in children}) == 1 and all(_attends(child) for _, child in children):
            found[name] = [f"{name}.{key}" if name else key for key, _ in children]
    return max(found.values(), key=len, default=[])


def _attends(module: nn.Module) -> bool:
    return any("attention" in type(part).__name__.lower() for part in module.modules())


def _stages(model: Model) -> list[str]:
    """The last layer that gives maps of each size, in order. Where layers of layers end two stages or more, the stem before them is left out."""
    last: dict[tuple[int, ...], str] = {}

    def seen(name: str) -> Any:
        def keep(layer: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and name and not isinstance(layer, _POOLS):
                last.pop(tuple(output.shape[2:]), None)
                last[tuple(output.shape[2:])] = name

        return keep

    handles = [part.register_forward_hook(seen(name)) for name, part in model.module.named_modules()]
    first = next((p for p in model.module.parameters() if p.is_floating_point()), None)
    try:
        inputs = sample_inputs(model.preprocessing, torch.float32 if first is None else first.dtype)
        with untouched(model.module):
            model(inputs if first is None else {name: value.to(first.device) for name, value in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    whole = [name for name in last.values() if next(model.module.get_submodule(name).children(), None) is not None]
    return whole if len(whole) > 1 else list(last.values())
