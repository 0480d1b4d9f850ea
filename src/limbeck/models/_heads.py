"""The last layer of a classifier: find it, and put a new one in its place."""

from __future__ import annotations

import torch
from torch import nn

from limbeck.errors import UsageError
from limbeck.randomness import forked

__all__ = ["find_head", "head_size", "resize_head"]

_NAMES = ("classifier", "fc", "head", "heads", "classification_head", "score", "logits")
"""What libraries and people call the last layer, where it is not simply the last one that was declared."""

_Head = nn.Linear | nn.Conv1d | nn.Conv2d


def find_head(module: nn.Module) -> str | None:
    """The path of the layer that gives the logits: the last linear layer or 1 x 1 convolution, in a part with a head's name if any."""
    for scope in [name for name in _NAMES if isinstance(getattr(module, name, None), nn.Module)]:
        found = _last(getattr(module, scope), scope)
        if found is not None:
            return found
    return _last(module, "")


def _last(part: nn.Module, prefix: str) -> str | None:
    found = None
    for name, layer in part.named_modules():
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv1d | nn.Conv2d) and set(layer.kernel_size) == {1}):
            found = ".".join(p for p in (prefix, name) if p)
    return found


def head_size(layer: nn.Module) -> int:
    """The number of outputs of a head layer."""
    return layer.out_features if isinstance(layer, nn.Linear) else int(layer.out_channels)  # type: ignore[arg-type]


def resize_head(module: nn.Module, num_classes: int, seed: int) -> None:
    """Replace the last layer by a new one with ``num_classes`` outputs; its weights are a function of ``(seed, "head")``.

    timm models do it their own way (``reset_classifier``), which also knows models with two heads. Raises ``UsageError`` where no last
    layer can be found.
    """
    with forked(seed, "head"):
        reset = getattr(module, "reset_classifier", None)
        if callable(reset) and hasattr(module, "num_classes"):
            dtype, device = _kind(module)
            reset(num_classes)
            module.to(device=device, dtype=dtype)
        else:
            _replace(module, num_classes)
    if isinstance(getattr(module, "num_classes", None), int):
        module.num_classes = num_classes  # type: ignore[assignment]
    config = getattr(module, "config", None)
    if hasattr(config, "num_labels") and hasattr(config, "id2label"):
        config.num_labels = num_classes  # type: ignore[union-attr]
        if hasattr(module, "num_labels"):
            module.num_labels = num_classes  # type: ignore[assignment]


def _kind(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    return (torch.float32, torch.device("cpu")) if first is None else (first.dtype, first.device)


def _replace(module: nn.Module, num_classes: int) -> None:
    path = find_head(module)
    if path is None:
        raise UsageError(f"{type(module).__name__} has no linear layer that could be its head; build it with {num_classes} outputs.")
    parent_path, _, name = path.rpartition(".")
    parent, old = module.get_submodule(parent_path), module.get_submodule(path)
    assert isinstance(old, nn.Linear | nn.Conv1d | nn.Conv2d)
    new: _Head
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    else:
        make = nn.Conv2d if isinstance(old, nn.Conv2d) else nn.Conv1d
        new = make(old.in_channels, num_classes, kernel_size=1, bias=old.bias is not None)
    spread = getattr(getattr(module, "config", None), "initializer_range", None)
    if isinstance(spread, float):  # what Hugging Face models give to their heads
        nn.init.normal_(new.weight, std=spread)
        if new.bias is not None:
            nn.init.zeros_(new.bias)
    setattr(parent, name, new.to(device=old.weight.device, dtype=old.weight.dtype))
