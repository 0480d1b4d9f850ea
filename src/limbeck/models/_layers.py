"""``options.layers``: a shallower model initialised from chosen layers of a deeper one."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from limbeck.errors import Problem, UsageError, nearest
from limbeck.randomness import forked

__all__ = ["Cut", "check_layers", "cut_pretrained", "cut_stack", "find_stack"]

Cut = dict[str, Any]
"""What was kept, JSON-ready: ``{"of": path of the stack, "layers": [indices], "from": number of layers before}``."""

_LAYER_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "num_encoder_layers", "depth")
_PER_LAYER = ("layer", "window", "types", "pattern")


def find_stack(module: nn.Module, path: str | None, where: str) -> str:
    """The path of the layers that can be chosen from: ``path`` if given, else the longest list of modules of one class."""
    stacks = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 1 and len({type(child) for child in part}) == 1
    }
    if path is not None:
        found = dict(module.named_modules()).get(path)
        if isinstance(found, nn.ModuleList | nn.Sequential):
            return path
        known = ", ".join(stacks) or "none"
        raise UsageError(
            Problem(f"{where}.options.layers_of", f"'{path}' is not a list of layers; there are: {known}.", nearest(path, stacks))
        )
    if not stacks:
        raise UsageError(Problem(f"{where}.options.layers", f"{type(module).__name__} has no list of equal layers to choose from."))
    lengths: dict[str, int] = {name: len(part) for name, part in stacks.items()}
    return max(lengths, key=lengths.__getitem__)


def check_layers(layers: Any, count: int, where: str) -> list[int]:
    """``layers`` as a list of distinct indices below ``count``."""
    key = f"{where}.options.layers"
    if isinstance(layers, bool) or not isinstance(layers, list | tuple) or not layers or not all(type(i) is int for i in layers):
        raise UsageError(Problem(key, f"a list of layer indices is wanted, such as [0, {count - 1}]; got {layers!r}."))
    wrong = [i for i in layers if not 0 <= i < count]
    if wrong:
        raise UsageError(Problem(key, f"{wrong} is out of range: the named model has {count} layers, 0 to {count - 1}."))
    if len(set(layers)) != len(layers):
        raise UsageError(Problem(key, f"{list(layers)} names a layer twice."))
    return list(layers)


def cut_stack(module: nn.Module, layers: Any, path: str | None, where: str) -> Cut:
    """Keep only ``layers`` of one stack of ``module``, in place, named as the first ones were."""
    path = find_stack(module, path, where)
    stack = module.get_submodule(path)
    children = list(stack.named_children())
    chosen = check_layers(layers, len(children), where)
    names = [name for name, _ in children]
    for name in names:
        delattr(stack, name)
    for name, index in zip(names, chosen, strict=False):
        stack.add_module(name, children[index][1])
    return {"of": path, "layers": chosen, "from": len(children)}


def cut_pretrained(module: Any, layers: Any, path: str | None, where: str, seed: int, role: str) -> tuple[Any, Cut]:
    """A smaller Hugging Face model with the weights of chosen layers, and everything else of ``module``.

    The smaller model is built from a shortened configuration, entries that list something for every layer included, so that
    ``from_pretrained`` builds the same thing again; parameters that the shortened model alone has keep fresh weights.
    """
    path = find_stack(module, path, where)
    count = len(list(module.get_submodule(path).children()))
    chosen = check_layers(layers, count, where)
    config = copy.deepcopy(module.config)
    _shorten(config, chosen, count)
    with forked(seed, role):
        small = type(module)(config)
    same = isinstance(dict(small.named_modules()).get(path), nn.Module)
    if not same or len(list(small.get_submodule(path).children())) != len(chosen):
        raise UsageError(
            Problem(
                f"{where}.options.layers",
                f"{type(module).__name__} cannot be cut: its configuration does not say how many layers '{path}' has.",
            )
        )
    state = module.state_dict()
    wanted = {}
    for name in small.state_dict():
        source = name
        if name.startswith(f"{path}."):
            index, _, rest = name[len(path) + 1 :].partition(".")
            source = f"{path}.{chosen[int(index)]}.{rest}"
        if source in state:
            wanted[name] = state[source]
    small.load_state_dict(wanted, strict=False)
    small.tie_weights()
    small.name_or_path = getattr(module, "name_or_path", "")
    return small.to(next(module.parameters()).dtype), {"of": path, "layers": chosen, "from": count}


def _shorten(config: Any, chosen: list[int], count: int) -> None:
    parts = [config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is not None)]
    for part in parts:
        lists = {
            key: value
            for key, value in vars(part).items()
            if isinstance(value, list | tuple) and len(value) == count and any(word in key for word in _PER_LAYER)
        }
        key = next((k for k in _LAYER_KEYS if getattr(part, k, None) == count), None)
        if key is None:
            continue
        setattr(part, key, len(chosen))
        for name, value in lists.items():
            setattr(part, name, type(value)(value[i] for i in chosen))
