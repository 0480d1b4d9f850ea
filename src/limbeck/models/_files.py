"""Weights in files: safetensors only, read whole or refused, written so that names stay plain."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from limbeck._recipe_paths import home_path
from limbeck.errors import Problem, UsageError, listed
from limbeck.models._heads import find_head, head_size, resize_head

__all__ = ["find_weights", "load_weights", "write_weights"]

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")


def find_weights(weights: str, base: Path, where: str) -> Path:
    """The safetensors file that ``weights`` names, relative to ``base``."""
    key = f"{where}.weights"
    path = base / home_path(weights)
    if path.suffix.lower() in PICKLED:
        target = Path(weights).with_suffix(".safetensors")
        raise UsageError(
            Problem(key, f"{weights} may run code when it is read; only .safetensors is taken.", f"limbeck convert {weights} {target}")
        )
    if path.suffix.lower() != ".safetensors":
        raise UsageError(
            Problem(key, f"'{weights}' is not a .safetensors file; 'pretrained' and 'scratch' are the words that are allowed here.")
        )
    if not os.path.isfile(path):
        raise UsageError(Problem(key, f"the file {path} does not exist."))
    return path


def load_weights(module: nn.Module, path: Path, where: str) -> bool:
    """Load a safetensors file into a module; every tensor must find its place. True where the head's tensors were in the file.

    Names that all start with ``module.`` or ``_orig_mod.`` (DistributedDataParallel, torch.compile) are read without that. A head of
    another size is resized to the file's first, so that its weights are kept.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (SafetensorError, OSError) as e:
        raise UsageError(Problem(f"{where}.weights", f"{path} cannot be read as safetensors: {e}.")) from e
    for prefix in ("module.", "_orig_mod.", "module."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    head = find_head(module)
    in_file = state.get(f"{head}.weight") if head else None
    if head and in_file is not None and in_file.ndim and in_file.shape[0] != head_size(module.get_submodule(head)):
        resize_head(module, in_file.shape[0], 0)
    problem = place(module, state)
    if problem:
        raise UsageError(Problem(f"{where}.weights", f"{path} does not fit {type(module).__name__}: {problem}."))
    return in_file is not None


def place(module: nn.Module, state: dict[str, Tensor]) -> str:
    """Copy every tensor to its name; what does not fit, in words, or an empty string (then nothing is missing either).

    Of tensors that share memory (tied weights) one name is enough.
    """
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    unexpected = [name for name in state if name not in own]
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, value in own.items():
        groups.setdefault(_memory(value, name), []).append(name)
    missing = [names[0] for names in groups.values() if not any(name in state for name in names)]
    shapes = [f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in state if n in own and state[n].shape != own[n].shape]
    parts = [
        f"{len(names)} {what} ({listed(names, 4)})"
        for names, what in ((missing, "missing"), (unexpected, "not in the model"), (shapes, "of another shape"))
        if names
    ]
    if not parts:
        load_state(module, state, strict=False)
    return "; ".join(parts)


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """``load_state_dict`` of plain named tensors, in the layout that the module has now.

    Modules that changed their layout once (torchvision's MnasNet) look for its version beside the tensors, which neither a safetensors file nor a
    dict carries.
    """
    placed = OrderedDict(state)
    placed._metadata = getattr(module.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    module.load_state_dict(placed, strict=strict)


def write_weights(module: nn.Module, path: Path) -> None:
    """``model.safetensors`` with plain ``state_dict`` names, contiguous, in the order of names; ``safetensors.torch.load_model`` reads it.

    Of tensors that share memory the first name is written, as ``safetensors.torch.save_model`` does.
    """
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {}
    seen: set[tuple[int, ...]] = set()
    whole = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    for name in sorted(whole):
        value = whole[name]
        memory = _memory(value, name)
        if memory not in seen:
            seen.add(memory)
            state[name] = value.detach().to("cpu").contiguous().clone()
    save_file(state, path, metadata={"format": "pt"})  # one key: with two, the bytes differ from save to save


def _memory(value: Tensor, name: str) -> tuple[int, ...]:
    """Equal for tensors that are the same memory seen the same way; empty tensors share nothing."""
    if value.numel() == 0 or value.is_meta:
        return (hash(name),)
    return (value.data_ptr(), *value.shape, -1, *value.stride())
