"""Weights out of a foreign pickle: the one place in the project that reads a ``.pt``, ``.pth`` or ``.bin`` file."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import Problem, UsageError, listed, nearest
from limbeck.run import disk_errors, file_sha256, sync_folder

__all__ = ["convert"]

WRAPPERS = ("module.", "_orig_mod.")
"""What ``DataParallel`` and ``torch.compile`` put before every name."""

FIRST_SAFE_TORCH = (2, 10)


def convert(source: Path, target: Path, *, key: str | None = None) -> dict[str, Any]:
    """Read the tensors of a PyTorch checkpoint and write them as safetensors; prints what was found.

    source: ``.pt``, ``.pth``, ``.bin`` or ``.ckpt``, or the ``.bin.index.json`` of a checkpoint in several files. target: a new
    ``.safetensors`` file, written atomically. key: where the weights are in a checkpoint that holds several sets, ``"model_ema"`` or,
    deeper, ``"ema/model"``.

    The file is read with ``torch.load(weights_only=True)``. A wrapper (``{"state_dict": ...}``, ``{"model": ..., "optimizer": ...}``) is
    opened where exactly one set of weights is inside, and a prefix ``module.`` or ``_orig_mod.`` that every name has is taken off (for a
    Lightning checkpoint also the name of its one submodule). Gives ``source``, ``target``, ``key``, ``prefix``, ``tensors``, ``parameters``
    (numbers in them), ``dtypes``, ``bytes``, ``sha256`` and ``notes``. Raises :class:`UsageError` for anything else than tensors.
    """
    source, target = Path(source), Path(target)
    _check_paths(source, target)
    notes: list[str] = []
    if _torch_version() < FIRST_SAFE_TORCH:
        notes.append(
            f"PyTorch {torch.__version__} has a known hole in reading pickles, also with weights_only (CVE-2026-24747, closed in 2.10): "
            "convert only a file whose origin you trust, or upgrade PyTorch first."
        )
        print(f"warning: {notes[0]}", file=sys.stderr)
    loaded = _read_shards(source) if source.name.endswith(".json") else _read(source)
    path, state = _find(loaded, source, key)
    state, prefix = _without_prefix(state, lightning=isinstance(loaded, Mapping) and "pytorch-lightning_version" in loaded)
    tensors = _plain_tensors(state, source)
    if not_finite := [n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t.float()).all())]:
        notes.append(f"{len(not_finite)} of the tensors hold NaN or infinite values: {listed(not_finite, 6)}.")
    _write(tensors, target)
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + 1
    found = {
        "source": str(source),
        "target": str(target),
        "key": path,
        "prefix": prefix,
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "dtypes": dtypes,
        "bytes": target.stat().st_size,
        "sha256": file_sha256(target),
        "notes": notes,
    }
    _tell(found)
    return found


def _check_paths(source: Path, target: Path) -> None:
    problems = []
    if source.is_dir():
        inside = sorted(
            p.name for p in source.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt") or p.name.endswith(".bin.index.json")
        )
        hint = f"It holds {listed(inside)}." if inside else ""
        problems.append(Problem(str(source), "is a folder; name the checkpoint file in it.", hint))
    elif not source.exists():
        siblings = [p.name for p in source.parent.iterdir() if p.is_file()] if source.parent.is_dir() else []
        problems.append(Problem(str(source), "does not exist.", nearest(source.name, siblings)))
    elif source.suffix == ".safetensors":
        problems.append(Problem(str(source), "is a safetensors file already; nothing is to be converted."))
    if target.suffix != ".safetensors":
        problems.append(Problem(str(target), "must end in .safetensors.", f"For example {target.stem or 'model'}.safetensors"))
    elif target.exists():
        problems.append(Problem(str(target), "exists already and is not overwritten; remove it or give another name."))
    elif not target.parent.is_dir():
        problems.append(Problem(str(target), f"cannot be written: the folder {target.parent} does not exist."))
    if problems:
        raise UsageError(problems)


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def _read(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"(?:class|type|function) ([\w.]+)", str(error))
        what = f" ({found.group(1)})" if found else ""
        raise UsageError(
            Problem(
                str(path),
                f"holds Python objects{what} and not only tensors, or is no PyTorch file; reading such objects would run its code.",
                "Where the file comes from, save the weights alone: torch.save(model.state_dict(), PATH)",
            )
        ) from error
    except Exception as error:
        if "TorchScript" in str(error):
            raise UsageError(
                Problem(
                    str(path),
                    "is a TorchScript program and not a file of weights.",
                    "Save the weights alone: torch.save(model.state_dict(), PATH)",
                )
            ) from error
        if isinstance(error, MemoryError):
            raise
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(Problem(str(path), f"cannot be read as a PyTorch file; it is damaged or something else ({text}).")) from error


def _read_shards(index: Path) -> dict[str, Any]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(Problem(str(index), "is not the index of a checkpoint in several files (it has no 'weight_map').")) from error
    missing = [f for f in files if not (index.parent / f).is_file()]
    if missing:
        raise UsageError(Problem(str(index), f"names files that are not there: {listed(missing)}."))
    merged: dict[str, Any] = {}
    for name in files:
        part = _read(index.parent / name)
        if not _is_state(part):
            raise UsageError(Problem(str(index.parent / name), "is a part of a checkpoint and should hold named tensors only."))
        merged |= part
    return merged


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _states(value: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Every set of named tensors in a checkpoint, with its path; what an optimiser keeps by number is none."""
    if _is_state(value):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str):
                yield from _states(inner, f"{path}/{key}" if path else key)


def _find(loaded: Any, source: Path, key: str | None) -> tuple[str, Mapping[str, Tensor]]:
    where = str(source)
    if key is not None:
        return key, _at(loaded, source, key)
    if not isinstance(loaded, Mapping):
        raise UsageError(
            Problem(where, f"holds {_kind(loaded)} and not named tensors.", "Save the weights as torch.save(model.state_dict(), PATH)")
        )
    found = list(_states(loaded))
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        sets = [f"'{path}' ({len(state)} tensors)" for path, state in found]
        raise UsageError(Problem(where, f"holds several sets of weights: {listed(sets)}.", f"Choose one: --key {found[0][0]}"))
    others = [f"'{k}' ({_kind(v)})" for k, v in loaded.items() if not isinstance(v, Tensor)]
    tensors = sum(isinstance(v, Tensor) for v in loaded.values())
    if not loaded:
        raise UsageError(Problem(where, "is empty."))
    raise UsageError(
        Problem(
            where, f"has {tensors} tensors at its top level and beside them what is no tensor: {listed(others)}.", "Save the weights alone."
        )
    )


def _at(loaded: Any, source: Path, key: str) -> Mapping[str, Tensor]:
    value = loaded
    for part in [key] if isinstance(loaded, Mapping) and key in loaded else key.split("/"):
        if not isinstance(value, Mapping) or part not in value:
            keys = [str(k) for k in value] if isinstance(value, Mapping) else []
            there = f"there are {listed(keys)}." if keys else "there are no keys."
            raise UsageError(Problem("--key", f"'{part}' is not in {source}; {there}", nearest(part, keys)))
        value = value[part]
    if _is_state(value):
        return dict(value)
    inside = [path for path, _ in _states(value, key)]
    hint = f"Sets of weights below it: {listed(inside)}." if inside else ""
    raise UsageError(Problem("--key", f"'{key}' of {source} holds {_kind(value)} and not named tensors only.", hint))


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def _without_prefix(state: Mapping[str, Tensor], *, lightning: bool) -> tuple[dict[str, Tensor], str]:
    names, taken = list(state), ""
    while True:
        common = next((p for p in WRAPPERS if all(n.startswith(p) and n != p for n in names)), None)
        if common is None and lightning:
            heads = {n.split(".", 1)[0] for n in names if "." in n}
            common = f"{heads.pop()}." if len(heads) == 1 and all("." in n for n in names) else None
            lightning = False
        if common is None:
            return dict(zip(names, state.values(), strict=True)), taken
        names, taken = [n[len(common) :] for n in names], taken + common


def _plain_tensors(state: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    odd = [
        f"'{n}' ({'quantised' if t.is_quantized else str(t.layout)})"
        for n, t in state.items()
        if t.is_quantized or t.layout != torch.strided
    ]
    odd += [f"'{n}' ({t.dtype})" for n, t in state.items() if t.is_complex()]
    odd += [f"'{n}' (without data)" for n, t in state.items() if t.device.type == "meta"]
    if odd:
        raise UsageError(Problem(str(source), f"holds tensors that safetensors has no form for: {listed(odd)}."))
    return {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in state.items()}  # tied weights become memory of their own


def _write(tensors: dict[str, Tensor], target: Path) -> None:
    from safetensors.torch import save_file

    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with disk_errors(target, sum(t.numel() * t.element_size() for t in tensors.values())):
        try:
            save_file(tensors, str(temporary), metadata={"format": "pt"})
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
            os.replace(temporary, target)
            sync_folder(target.parent)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if "No space left" in str(error) and not isinstance(error, OSError):  # how safetensors says that the disk is full
                raise OSError(errno.ENOSPC, str(error)) from error
            raise


def _tell(found: Mapping[str, Any]) -> None:
    dtypes = ", ".join(f"{count} {name}" for name, count in sorted(found["dtypes"].items()))
    opened = f" under '{found['key']}'" if found["key"] else ""
    print(f"{found['source']}: {found['tensors']} tensors{opened} ({dtypes}), {found['parameters']:,} numbers")
    if found["prefix"]:
        print(f"the prefix '{found['prefix']}' was taken off every name")
    for note in found["notes"]:
        if not note.startswith("PyTorch "):
            print(f"note: {note}")
    print(f"wrote {found['target']}: {found['bytes']:,} bytes, sha256 {found['sha256']}")
