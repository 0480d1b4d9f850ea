"""Features of named layers, read by hooks that live as long as one ``with`` block."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from limbeck.errors import Problem, UsageError, nearest
from limbeck.models._model import Model, first_tensor, untouched
from limbeck.types import QKV, Inputs, Outputs

__all__ = ["Capture", "called_layers", "probe_shapes", "validate_paths"]


class Capture:
    """Keep the outputs of named layers during forward passes; every hook is gone when the block ends, however it ends.

    ``paths`` are names from ``module.named_modules()``; ``"layer:1"`` or ``"layer:hidden_states"`` picks from a layer that returns a tuple
    or a mapping (without it: the first tensor); ``"layer:q,k,v"`` is the queries, keys and values of the attention inside a layer of a transformer,
    ``(B, T, 3 D)`` side by side, each as its projection gives it. Gradients flow through what was captured, which is a copy: a layer's own output may
    be written over by the one after it (``ReLU(inplace=True)``, ``out += identity``).

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with Capture(net, ["0"]) as capture:
    ...     _ = net(torch.zeros(5, 4))
    >>> capture.features["0"].shape
    torch.Size([5, 3])
    """

    def __init__(self, module: nn.Module, paths: Sequence[str]) -> None:
        if paths:
            validate_paths(module, paths, "features")
        self.features: dict[str, Tensor] = {}
        self._module = module
        self._paths = tuple(dict.fromkeys(paths))
        self._handles: list[RemovableHandle] = []
        self._listening = True

    def outputs(self, model: Model, inputs: Inputs) -> Outputs:
        """Logits and features of one forward pass, and of nothing else: a layer inside a block that is computed again in the backward pass
        (:class:`~limbeck.models.Recomputed`) is called once more then, on values that no loss reads."""
        self.features, self._listening = {}, True
        try:
            return Outputs(model(inputs), self.features)
        finally:
            self.features, self._listening = {}, False

    def __enter__(self) -> Self:
        layers = dict(self._module.named_modules()) if self._paths else {}
        for path in self._paths:
            layer, key = _split(path)
            if key == QKV:
                parts = [layers[name] for name in _projections(self._module, layer)]
                said: dict[int, Tensor] = {}
                for number, part in enumerate(parts):
                    self._handles.append(part.register_forward_hook(self._collector(path, number, len(parts), said)))
            else:
                self._handles.append(layers[layer].register_forward_hook(self._keeper(path, key)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keeper(self, path: str, key: str | None) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not self._listening:
                return
            try:
                self.features[path] = first_tensor(output, key).clone()
            except UsageError as e:
                raise UsageError(Problem(path, e.problems[0].message)) from None

        return keep

    def _collector(self, path: str, number: int, count: int, said: dict[int, Tensor]) -> Any:
        """Of one projection among those whose outputs are one feature."""

        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if not self._listening:
                return
            said[number] = output
            if len(said) == count:
                self.features[path] = said[0].clone() if count == 1 else torch.cat([said[i] for i in range(count)], -1)
                said.clear()

        return keep


def validate_paths(module: nn.Module, paths: Sequence[str], where: str) -> None:
    """Raise one ``UsageError`` that names every path which is no layer of ``module``, each with the nearest layer's name."""
    layers = [name for name, _ in module.named_modules() if name]
    known = set(layers)
    problems = []
    for path in paths:
        layer, key = _split(path)
        if layer in known and key == QKV:
            try:
                _projections(module, layer)
            except UsageError as e:
                problems.append(replace(e.problems[0], where=where))
        if layer not in known:
            hint = nearest(layer, layers)
            top = ", ".join(name for name, _ in module.named_children()) or "none"
            problems.append(
                Problem(where, f"'{path}' is not a layer of {type(module).__name__}.", hint or f"Its outermost layers are: {top}.")
            )
    if problems:
        raise UsageError(problems)


def probe_shapes(model: Model, inputs: Inputs, paths: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of named features for these inputs, by one forward pass in eval mode that leaves the module as it was."""
    with untouched(model.module), Capture(model.module, paths) as capture:
        model(inputs)
    silent = [path for path in paths if path not in capture.features]
    if silent:
        raise UsageError([Problem(path, "this layer is not called in the model's forward pass, so it has no features.") for path in silent])
    return {path: tuple(capture.features[path].shape) for path in paths}


def called_layers(model: Model, inputs: Inputs) -> set[str]:
    """The names of the layers that a forward pass calls, by one pass in eval mode that leaves the module as it was."""
    called: set[str] = set()
    handles = [m.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, m in model.module.named_modules()]
    try:
        with untouched(model.module):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return called


_SEPARATE = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj"))
_FUSED = "qkv"


def _projections(module: nn.Module, path: str) -> list[str]:
    """The linear layers inside a layer that make its queries, keys and values: three, or one for all.

    Known are those of Transformers' BERT, DistilBERT, RoBERTa, ELECTRA, ViT and the like, and timm's ``qkv``. Raises UsageError for others, and where
    attention is not the softmax of ``Q K' / sqrt(d)`` of what they give (rotary or relative positions, normalised or shared heads, causal).
    """
    found: list[tuple[nn.Module, list[str]]] = []
    for name, part in module.get_submodule(path).named_modules(prefix=path):
        linear = {key for key, child in part.named_children() if isinstance(child, nn.Linear)}
        for keys in (*_SEPARATE, (_FUSED,)):
            if linear.issuperset(keys):
                found.append((part, [f"{name}.{key}" for key in keys]))
    inner = "Name a layer of an encoder that has its queries, keys and values from linear layers: query, key, value, or one qkv."
    if len(found) != 1:
        text = f"'{path}' has {len(found) or 'no'} attention{'s' * (len(found) > 1)} whose queries, keys and values can be read."
        raise UsageError(Problem(path, text, inner))
    part, names = found[0]
    widths = {module.get_submodule(name).out_features for name in names}
    normed = [key for key, child in part.named_children() if key in ("q_norm", "k_norm") and not isinstance(child, nn.Identity)]
    moved = [
        key
        for key in inspect.signature(type(part).forward).parameters
        if key in ("position_embeddings", "rel_pos", "rel_embeddings", "rope")
    ]
    moved += [
        key
        for key in ("relative_position_bias_table", "relative_position_bias", "distance_embedding")
        if getattr(part, key, None) is not None
    ]
    why = (
        "shares keys and values between heads"
        if len(widths) > 1
        else "normalises queries and keys"
        if normed
        else "adds positions inside"
        if moved
        else "is causal"
        if getattr(part, "is_causal", False)
        else ""
    )
    if why:
        raise UsageError(Problem(path, f"the attention of '{path}' {why}, so it is not what its queries and keys alone give.", inner))
    return names


def _split(path: str) -> tuple[str, str | None]:
    if path.endswith(f":{QKV}"):
        return path.removesuffix(f":{QKV}"), QKV
    layer, colon, key = path.partition(":")
    return layer, key if colon else None
