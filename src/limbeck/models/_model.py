"""What the rest of the system calls: a module with the way it wants its inputs, and a few pure looks at it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.errors import LimbeckError, Problem, UsageError
from limbeck.randomness import forked
from limbeck.types import Inputs, Preprocessing

__all__ = ["Kind", "Model", "call_module", "describe", "first_tensor", "logits_of", "state_hash", "untouched"]

Kind = Literal["torchvision", "timm", "hf", "python", "module"]


@dataclass
class Model:
    """A classifier: ``model(inputs)`` gives logits ``(B, C)``, whatever the module itself returns.

    ``module`` is the library's or the user's own object, so that its ``state_dict`` has plain names. ``build`` holds what is needed to make
    the same architecture again without a network (see ``limbeck.models.load_saved``). ``class_ids`` are other names of the same classes
    (ImageNet's WordNet ids). ``weights_sha256`` is :func:`state_hash` of the module when the model was built.
    """

    module: nn.Module
    spec: dict[str, Any]
    kind: Kind
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    num_classes: int
    weights_sha256: str = ""
    notes: list[str] = field(default_factory=list)
    build: dict[str, Any] = field(default_factory=dict)
    class_ids: tuple[str, ...] | None = None

    def __call__(self, inputs: Inputs) -> Tensor:
        return logits_of(call_module(self.module, inputs))


def call_module(module: nn.Module, inputs: Inputs) -> Any:
    """Images and float arrays go in by position, text by keyword."""
    if len(inputs) == 1:
        key, value = next(iter(inputs.items()))
        if key in ("image", "x"):
            return module(value)
    return module(**inputs)


def logits_of(output: Any) -> Tensor:
    """The logits in whatever a classifier returns: a tensor, an object or mapping with ``logits``, or a tuple that starts with them."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, Sequence) and not isinstance(output, str) and output and isinstance(output[0], Tensor):
        return output[0]
    raise UsageError(
        Problem(
            "",
            f"The model returned {type(output).__name__}; wanted are logits, an object with 'logits', or a tuple that starts with them.",
        )
    )


def first_tensor(output: Any, key: str | None = None) -> Tensor:
    """The tensor in a module's output: the tensor itself, the first one of a tuple or mapping, or the one at ``key`` (index or name)."""
    if key is not None:
        if isinstance(output, Mapping):
            chosen = output.get(key)
        elif isinstance(output, Sequence):
            chosen = (
                output[int(key)] if key.lstrip("-").isdigit() and -len(output) <= int(key) < len(output) else getattr(output, key, None)
            )
        else:
            chosen = getattr(output, key, None)
        if isinstance(chosen, Tensor):
            return chosen
        raise UsageError(f"There is no tensor at '{key}' in this layer's output, which is {_kind_of(output)}.")
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise UsageError(f"This layer's output is {_kind_of(output)} and holds no tensor.")


def _kind_of(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with the keys {', '.join(map(str, output))}"
    if isinstance(output, Sequence):
        return f"{type(output).__name__} of {len(output)}"
    return type(output).__name__


def state_hash(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of every tensor of ``module.state_dict()``, in name order.

    The memory layout does not count (channels-last hashes as channels-first), and neither do the device and what is no tensor
    (``get_extra_state``), which has no bytes of its own.
    """
    digest = hashlib.sha256()
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    for name in sorted(state):
        value = state[name]
        raw = value.detach().to("cpu").contiguous().reshape(-1)
        digest.update(f"{name}\x1f{raw.dtype}\x1f{tuple(value.shape)}\x1e".encode())
        if raw.numel():
            digest.update(raw.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Look at a module in eval mode, without gradients, and leave modes, buffers and random generators as they were."""
    modes = [(m, m.training) for m in module.modules()]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    module.eval()
    try:
        with torch.no_grad(), forked(0, "look"):
            yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
        for m, training in modes:
            m.training = training


def describe(model: Model, inputs: Inputs) -> dict[str, int | None]:
    """Size and cost: ``parameters`` (shared ones once), ``bytes`` of parameters and buffers, and ``flops`` of one sample.

    inputs: a prepared batch; its first sample is used. FLOPs are counted by ``torch.utils.flop_counter`` (a multiply-add is two;
    elementwise operations are not counted) and are None where the forward pass cannot be counted. The module's modes, buffers and weights
    stay as they are.
    """
    parameters = list(model.module.parameters())
    tensors = [*parameters, *model.module.buffers()]
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "flops": _flops(model, {k: v[:1] for k, v in inputs.items()}),
    }


def _flops(model: Model, inputs: Inputs) -> int | None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The fused attention kernels of some devices and the fused encoder layer have no FLOP formula and would count as nothing.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with untouched(model.module), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(inputs)
        return int(counter.get_total_flops())
    except LimbeckError:
        raise
    except Exception:  # a forward pass that cannot run under a dispatch mode (a scripted module, say) has unknown FLOPs
        return None
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
