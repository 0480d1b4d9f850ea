"""ONNX: written by PyTorch's exporters, checked by onnx, run by ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.errors import missing_extra
from limbeck.export._job import Job
from limbeck.export.parity import Logits, Runner

__all__ = ["FILE", "facts", "load", "require", "writers"]

FILE = "model.onnx"
SINGLE_FILE_LIMIT = (2 << 30) - (64 << 20)
"""Bytes of weights that still fit into one file: a protobuf message ends at 2 GiB."""

TRACED_OPSET = 17
DYNAMO_OPSET = 18

Writer = Callable[[Job, Path], None]


def require() -> None:
    """Raise the sentence for a missing package before anything is written."""
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "export", "Writing an ONNX file")


def writers() -> tuple[tuple[str, Writer], ...]:
    """The exporters to try, best first.

    From torch 2.9 the ``torch.export``-based one is the default and the tracer is deprecated. Before that it fails on BatchNorm and has
    wrong shapes for some models, so the tracer goes first there.
    """
    dynamo: tuple[tuple[str, Writer], ...] = (("dynamo", _dynamo),) if importlib.util.find_spec("onnxscript") else ()
    traced: tuple[tuple[str, Writer], ...] = (("trace", _traced),)
    return dynamo + traced if _mature() else traced + dynamo


def _mature() -> bool:
    """Whether this PyTorch's ``dynamo=True`` is the one to trust first."""
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 9)


def _traced(job: Job, path: Path) -> None:
    torch.onnx.export(
        job.module,
        job.example,
        str(path),
        input_names=list(job.names),
        output_names=["logits"],
        dynamic_axes={**{n: dict(a) for n, a in zip(job.names, job.axes, strict=True)}, "logits": {0: "batch"}},
        opset_version=TRACED_OPSET,
        dynamo=False,
        verbose=False,
    )
    _finish(job, path)


def _dynamo(job: Job, path: Path) -> None:
    hint = torch.export.Dim.DYNAMIC  # type: ignore[attr-defined, unused-ignore]
    shapes = (tuple(dict.fromkeys(axis, hint) for axis in job.axes),)
    source: torch.nn.Module | torch.export.ExportedProgram = job.module
    if not _mature():  # its translation of batch normalisation is broken, so it gets the arithmetic instead
        try:
            program = torch.export.export(job.module, job.example, dynamic_shapes=shapes, strict=False)
        except Exception:  # reading the bytecode keeps sizes free that tracing made constant
            program = torch.export.export(job.module, job.example, dynamic_shapes=shapes, strict=True)
        source = program.run_decompositions({torch.ops.aten._native_batch_norm_legit_no_training.default: _batch_norm})
    torch.onnx.export(
        source,
        job.example,
        str(path),
        input_names=list(job.names),
        output_names=["logits"],
        dynamic_shapes=shapes,
        opset_version=DYNAMO_OPSET,
        external_data=job.weight_bytes > SINGLE_FILE_LIMIT,
        dynamo=True,
        verbose=False,
    )
    _finish(job, path)


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation at evaluation from elementwise operations, with the two empty statistics that the operator also gives."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return x * scale.view(shape) + shift.view(shape), x.new_empty(0), x.new_empty(0)


def _finish(job: Job, path: Path) -> None:
    """Name the dynamic axes, add the metadata, drop source paths of this machine, and save as one file where it fits."""
    import onnx

    model = onnx.load(str(path))  # with its weights, wherever the exporter put them
    for leftover in path.parent.iterdir():
        leftover.unlink()
    _name_axes(model, job)
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(job.metadata))
    if job.weight_bytes > SINGLE_FILE_LIMIT:
        onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    else:
        onnx.save_model(model, str(path))
    onnx.checker.check_model(str(path))


def _name_axes(model: Any, job: Job) -> None:
    """``s0`` and its like become ``batch`` and ``length``, everywhere."""
    known: dict[str, str] = {}
    axes = dict(zip(job.names, job.axes, strict=True))
    for value in model.graph.input:
        for i, name in axes.get(value.name, {}).items():
            dim = value.type.tensor_type.shape.dim[i]
            if dim.dim_param:
                known[dim.dim_param] = name
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in known:
                dim.dim_param = known[dim.dim_param]


def load(path: Path) -> Runner:
    """A session on one CPU thread with deterministic kernels."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(case: tuple[Tensor, ...]) -> Logits:
        if len(names) != len(case):
            raise ValueError(f"the file has the inputs {', '.join(names)}, and {len(case)} are wanted")
        (logits,) = session.run(["logits"], dict(zip(names, (np.ascontiguousarray(v.numpy()) for v in case), strict=True)))
        return np.asarray(logits, dtype=np.float64)

    return run


def facts(path: Path) -> dict[str, Any]:
    """What the record says about the file beyond its parity."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return {"opset": next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))}
