"""Which layers of two models to compare where nobody says: ``layers: auto``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import Problem, UsageError
from limbeck.models._images import sample_inputs
from limbeck.models._model import Model, untouched
from limbeck.types import ImagePreprocessing

__all__ = ["evenly", "exit_layers", "pair_layers"]

_LISTS = (nn.Sequential, nn.ModuleList)
_SAMPLES = 3  # so many that no other dimension is taken for them
_POOLS = (nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.pooling._AvgPoolNd)


def pair_layers(student: Model, teacher: Model) -> list[tuple[str, str]]:
    """Pairs of layers (the student's, the teacher's), the last ones last: of two transformers evenly spaced layers (:func:`evenly`), of two
    convolutional networks the last layers of the stages, counted from the last stage.

    Raises: UsageError for other models, and where one is of each kind.
    """
    stacks, stages = zip(*(_parts(model) for model in (student, teacher)), strict=True)
    if all(stacks):
        return [(stacks[0][i], stacks[1][j]) for i, j in zip(*evenly(len(stacks[0]), len(stacks[1])), strict=True)]
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
    stack, stages = _parts(student)
    found = [stack[i] for i in evenly(min(4, len(stack)), len(stack))[1]] if stack else stages
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


def _parts(model: Model) -> tuple[list[str], list[str]]:
    """The layers of a transformer, or the stages of a convolutional network; attention within one stage of several makes no transformer."""
    stack = _stack(model)
    if stack and not isinstance(model.preprocessing, ImagePreprocessing):
        return stack, []
    stages = _stages(model)
    inside = len(stages) > 2 and any(layer.startswith(f"{stage}.") for layer in stack for stage in stages)
    return ([], stages) if inside or not stack else (stack, [])


def _stack(model: Model) -> list[str]:
    """The layers of a transformer: the longest list of modules of one class that all hold attention, is in no other such list, and gives a row for
    each sample (and not for each place in a patch, as within the stages of a MobileViT)."""
    found: dict[str, list[str]] = {}
    for name, holder in model.module.named_modules():
        children = list(holder.named_children())
        if not isinstance(holder, nn.ModuleList | nn.Sequential) or not children or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if len({type(child) for _, child in children}) == 1 and all(_attends(child) for _, child in children):
            found[name] = [f"{name}.{key}" if name else key for key, _ in children]
    if not found:
        return []
    split: set[str] = set()

    def keep(name: str, _: nn.Module, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and (not first.ndim or len(first) != _SAMPLES):
            split.add(name)

    _look(model, keep)
    return max((layers for layers in found.values() if not split.intersection(layers)), key=len, default=[])


def _attends(module: nn.Module) -> bool:
    return any("attention" in type(part).__name__.lower() for part in module.modules())


def _stages(model: Model) -> list[str]:
    """The last layer that gives maps of each size, in order: the ends of the stages.

    A layer within a block that goes on to another size is none (the first convolution of a bottleneck still has the size of the stage before). Nor is
    what comes behind the global pooling. Where layers of layers end two stages or more, a stem without is left out.
    """
    sizes: dict[str, tuple[int, ...]] = {}  # of maps, by layer, in the order of their ends
    spatial: set[tuple[int, ...]] = set()  # those that a convolution gives; others are of (B, H, W, channels), or of attention
    pooled: list[str] = []

    def keep(name: str, layer: nn.Module, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and name:
            size = tuple(output.shape[2:])
            sizes.pop(name, None)
            sizes[name] = size
            if isinstance(layer, nn.modules.conv._ConvNd):
                spatial.add(size)
            elif isinstance(layer, _POOLS) and size == (1, 1):
                pooled.append(name)

    _look(model, keep)
    larger: dict[str, set[tuple[int, ...]]] = {}  # of layers of layers: the sizes within that shrink on the way out
    for name, size in sizes.items():
        for outer in _around(name):
            if outer in sizes and size in spatial and math.prod(size) > math.prod(sizes[outer]):
                larger.setdefault(outer, set()).add(size)
    # what shrinks once is a block or a stage that begins with one; what shrinks more often is a whole network
    blocks = {name for name, found in larger.items() if len(found) == 1 and type(model.module.get_submodule(name)) not in _LISTS}

    def within(name: str) -> bool:
        others = [outer for outer in _around(name) if outer in sizes and sizes[outer] != sizes[name]]
        # as many places in another shape: patches, unfolded
        return any(outer in blocks or math.prod(sizes[outer]) == math.prod(sizes[name]) for outer in others)

    # a pooling whose surroundings go on with maps is a gate (squeeze and excitation), and ends nothing
    ended = next((name for name in pooled if all(sizes.get(outer, (1, 1)) == (1, 1) for outer in _around(name))), None)
    names = list(sizes)
    maps = [
        name
        for name in names[: len(names) if ended is None else names.index(ended)]
        if sizes[name] in spatial and not isinstance(model.module.get_submodule(name), _POOLS)
    ]
    outside = [name for name in maps if not within(name)]
    whole = [name for name in outside if next(model.module.get_submodule(name).children(), None) is not None]
    found = (_ends(some, sizes) for some in (whole, outside, maps))
    return next((ends for ends in found if len(ends) > 1), _ends(maps, sizes))


def _around(name: str) -> list[str]:
    """The layers that a layer is within."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _ends(names: list[str], sizes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The last name of each size, in order."""
    last: dict[tuple[int, ...], str] = {}
    for name in names:
        last.pop(sizes[name], None)
        last[sizes[name]] = name
    return list(last.values())


def _look(model: Model, keep: Callable[[str, nn.Module, Any], None]) -> None:
    """Show what each layer gives for a few made-up samples, in the order in which they are called; the model is left as it was."""
    handles = [part.register_forward_hook(_told(name, keep)) for name, part in model.module.named_modules()]
    first = next((p for p in model.module.parameters() if p.is_floating_point()), None)
    try:
        inputs = sample_inputs(model.preprocessing, torch.float32 if first is None else first.dtype, _SAMPLES)
        with untouched(model.module):
            model(inputs if first is None else {name: value.to(first.device) for name, value in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()


def _told(name: str, keep: Callable[[str, nn.Module, Any], None]) -> Callable[[nn.Module, Any, Any], None]:
    return lambda layer, _, output: keep(name, layer, output)
