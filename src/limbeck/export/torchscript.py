"""TorchScript: traced in eval mode. Deprecated by PyTorch since 2.11, still what some phones and C++ servers load."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.export._job import Job
from limbeck.export.parity import Logits, Runner

__all__ = ["FILE", "facts", "load", "require", "writers"]

FILE = "model.torchscript.pt"


def require() -> None:
    """PyTorch is enough."""


def writers() -> tuple[tuple[str, Callable[[Job, Path], None]], ...]:
    """The one way to write it."""
    return (("trace", _write),)


def _write(job: Job, path: Path) -> None:
    traced = torch.jit.trace(job.module, job.example, check_trace=False, strict=False)  # type: ignore[no-untyped-call]
    written = io.BytesIO()  # torch's own file writer ends the process where the disk is full
    torch.jit.save(traced, written, _extra_files={f"{k}.json": v for k, v in job.metadata.items()})
    path.write_bytes(written.getbuffer())


def load(path: Path) -> Runner:
    """The file on the CPU. Its extra files are ``classes.json``, ``preprocessing.json`` and the like."""
    module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]

    def run(case: tuple[Tensor, ...]) -> Logits:
        with torch.no_grad():
            return np.asarray(module(*case).double().numpy())

    return run


def facts(path: Path) -> dict[str, Any]:
    """Nothing beyond the parity."""
    return {}
