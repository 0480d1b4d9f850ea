"""``torch.export``: the graph as PyTorch itself keeps it, for PyTorch servers and ahead-of-time compilation."""

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

FILE = "model.pt2"


def require() -> None:
    """PyTorch is enough."""


def writers() -> tuple[tuple[str, Callable[[Job, Path], None]], ...]:
    """Tracing the module as it runs, which Hugging Face models need; then reading its bytecode, which keeps more sizes free."""
    return (
        ("export", lambda job, path: _write(job, path, strict=False)),
        ("export-strict", lambda job, path: _write(job, path, strict=True)),
    )


def _write(job: Job, path: Path, *, strict: bool) -> None:
    hint = torch.export.Dim.DYNAMIC  # type: ignore[attr-defined, unused-ignore]
    shapes = (tuple(dict.fromkeys(axis, hint) for axis in job.axes),)
    program = torch.export.export(job.module, job.example, dynamic_shapes=shapes, strict=strict)
    # The example would be saved with the program, and it is somebody's test data. (The public setter of torch 2.6 refuses None.)
    program._example_inputs = None  # type: ignore[assignment, unused-ignore]
    for graph in (m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)):
        for node in graph.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
    written = io.BytesIO()  # torch's own file writer ends the process where the disk is full
    torch.export.save(program, written, extra_files={f"{k}.json": v for k, v in job.metadata.items()})
    path.write_bytes(written.getbuffer())


def load(path: Path) -> Runner:
    """The file's program on the CPU. Its extra files are ``classes.json``, ``preprocessing.json`` and the like."""
    module = torch.export.load(str(path)).module()

    def run(case: tuple[Tensor, ...]) -> Logits:
        with torch.no_grad():
            return np.asarray(module(*case).double().numpy())

    return run


def facts(path: Path) -> dict[str, Any]:
    """Nothing beyond the parity."""
    return {}
