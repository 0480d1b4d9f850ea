"""Commit and recover: the whole state of a training step as safetensors plus JSON.

A checkpoint is a folder ``step-00000500`` with ``state.safetensors``, ``state.json`` and ``manifest.json`` (the sha256 of the other two). It is
written under a temporary name and renamed, so that a folder with a final name is complete; on the way back every hash is checked, and a folder
that does not match is passed over, by name, for the one before it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.errors import Problem, UsageError
from limbeck.ranks import Ranks
from limbeck.run import commit_folder, discard, disk_errors, file_sha256, read_json, sweep

__all__ = ["from_main", "load_newest", "pack", "refuse_newer", "save", "unpack"]

FORMAT = 1
KEEP = 2


def pack(tree: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts, lists and tuples into a JSON skeleton and named tensors.

    >>> skeleton, tensors = pack({"a": [1, torch.zeros(2)]})
    >>> skeleton, sorted(tensors)
    ({'dict': [['a', {'list': [1, {'tensor': '/a/1'}]}]]}, ['/a/1'])
    """
    if isinstance(tree, Tensor):
        return {"tensor": prefix}, {prefix: tree}
    if isinstance(tree, dict):
        pairs, tensors = [], {}
        for key, value in tree.items():
            skeleton, inner = pack(value, f"{prefix}/{key}")
            pairs.append([key, skeleton])
            tensors.update(inner)
        return {"dict": pairs}, tensors
    if isinstance(tree, list | tuple):
        items, tensors = [], {}
        for i, value in enumerate(tree):
            skeleton, inner = pack(value, f"{prefix}/{i}")
            items.append(skeleton)
            tensors.update(inner)
        return {"list" if isinstance(tree, list) else "tuple": items}, tensors
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree, {}
    raise TypeError(f"cannot write {type(tree).__name__} at {prefix} into a checkpoint")


def unpack(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`pack`."""
    if not isinstance(skeleton, dict):
        return skeleton
    [(kind, value)] = skeleton.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: unpack(inner, tensors) for key, inner in value}
    items = [unpack(inner, tensors) for inner in value]
    return items if kind == "list" else tuple(items)


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Commit the state of ``step`` under ``folder``; keep it and the one before. One of a later step was passed over when this run was resumed, for
    it is damaged, and goes: else it would count as the newest, and what is committed from here on would be dropped."""
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    skeleton, tensors = pack(state)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    try:
        with disk_errors(final, size):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            # Shared storages are written out one by one: a checkpoint restores values, the modules keep their own ties.
            save_file({k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}, temporary / "state.safetensors")
            (temporary / "state.json").write_text(json.dumps(skeleton), encoding="utf-8")
            files = {name: file_sha256(temporary / name) for name in ("state.json", "state.safetensors")}
            manifest = {"format": FORMAT, "step": step, "files": files}
            (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        commit_folder(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    kept = [path for path in _committed(folder) if path.name <= final.name][-KEEP:]
    for old in _committed(folder):
        if old not in kept:
            discard(old)
    return final


def load_newest(folder: Path, say: Callable[[str], None] = lambda text: None) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint whose hashes match, or None. What is passed over is said."""
    sweep(folder)
    for candidate in reversed(_committed(folder)):
        try:
            text = (candidate / "manifest.json").read_text(encoding="utf-8")
            manifest = json.loads(text)
            if json.dumps(manifest) != text:
                raise ValueError("manifest.json is not what was written")
            if manifest["format"] != FORMAT:
                raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
            for name in ("state.json", "state.safetensors"):
                if file_sha256(candidate / name) != manifest["files"][name]:
                    raise ValueError(f"{name} does not match its sha256")
            step = int(manifest["step"])
            if candidate.name != f"step-{step:08d}":
                raise ValueError(f"its manifest is of step {step}")
            return step, unpack(read_json(candidate / "state.json"), load_file(candidate / "state.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as e:
            say(f"Checkpoint {candidate} is passed over: {e}.")
    return None


def from_main(ranks: Ranks, make: Callable[[], tuple[int, dict[str, Any]] | None]) -> tuple[int, dict[str, Any]] | None:
    """What :func:`load_newest` finds on the main rank, on every rank, which need not see its files."""
    if ranks.size == 1:
        return make()
    found = make() if ranks.main else None
    own, tensors = pack(None if found is None else found[1])
    told = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
    step, skeleton, shapes = ranks.from_main(lambda: [None if found is None else found[0], own, told])
    if step is None:
        return None
    if not ranks.main:
        tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in shapes.items()}
    for tensor in tensors.values():
        if tensor.numel():
            ranks.broadcast(tensor)
    return step, unpack(skeleton, tensors)


def refuse_newer(folder: Path) -> None:
    """Raises: UsageError where a checkpoint in any role's folder under ``folder`` is whole and of a later format: it would be lost otherwise."""
    for path in sorted(folder.glob("*/step-*/manifest.json")):
        try:
            found = read_json(path)["format"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(found, int) and found > FORMAT:
            raise UsageError(
                Problem(
                    "--resume",
                    f"{path.parent} has format {found}, and this version of Limbeck reads {FORMAT}.",
                    "Go on with the version that wrote it (pip install -U limbeck), or name another --out.",
                )
            )


def _committed(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load optimiser state and give each moment the strides of its parameter.

    A channels-last parameter has channels-last moments; the file holds them contiguous, and elementwise kernels may round differently on
    another layout, so exact resume needs the strides back.
    """
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
