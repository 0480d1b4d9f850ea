"""An artifact as a model repository of NVIDIA Triton: ``NAME/config.pbtxt``, ``NAME/1/model.onnx`` and ``NAME/labels.txt``."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.run import commit_folder, disk_errors

__all__ = ["config", "model_name", "write_triton"]

MAX_BATCH = 32
_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}


def model_name(text: str) -> str:
    """A name that Triton takes for a model: letters, digits, ``_``, ``-`` and ``.``.

    >>> model_name("my run (2)")
    'my_run_2'
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("_.") or "student"


def config(name: str, manifest: Mapping[str, Any]) -> str:
    """``config.pbtxt``: the batch axis is Triton's own, so it is not among ``dims``; what is free beside it is -1."""
    blocks = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        f"max_batch_size: {MAX_BATCH}",
        _tensors("input", manifest["inputs"], ""),
        _tensors("output", manifest["outputs"], 'label_filename: "labels.txt"'),
        "dynamic_batching {\n}",
    ]
    return "\n".join(blocks) + "\n"


def _tensors(kind: str, tensors: list[dict[str, Any]], more: str) -> str:
    entries = []
    for tensor in tensors:
        dims = ", ".join(str(n) if isinstance(n, int) else "-1" for n in tensor["shape"][1:])
        lines = [f"name: {json.dumps(tensor['name'])}", f"data_type: {_TYPES[tensor['dtype']]}", f"dims: [ {dims} ]", more]
        entries.append("  {\n" + "".join(f"    {line}\n" for line in lines if line) + "  }")
    return f"{kind} [\n" + ",\n".join(entries) + "\n]"


def write_triton(artifact: Path, repository: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Write the model repository of a finished artifact; an older one is replaced. Raises: DiskFull."""
    work = repository.with_name(f".{repository.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        with disk_errors(repository):
            (work / name / "1").mkdir(parents=True)
            shutil.copyfile(artifact / "model.onnx", work / name / "1" / "model.onnx")
            (work / name / "config.pbtxt").write_text(config(name, manifest), encoding="utf-8")
            labels = json.loads((artifact / "labels.json").read_text(encoding="utf-8"))
            # a label a line
            (work / name / "labels.txt").write_text("".join(" ".join(str(label).split()) + "\n" for label in labels), encoding="utf-8")
        commit_folder(work, repository)
    finally:
        shutil.rmtree(work, ignore_errors=True)
