"""Exports of a finished run: files and folders, decided on validation samples and measured on test samples, in the runtime that will run them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limbeck import __version__
from limbeck._parts import EVALUATION_BATCH, Parts
from limbeck._teaching import machine
from limbeck.data import Data, Split, carve, evaluation_requests
from limbeck.errors import Problem, Stopped, UsageError
from limbeck.evaluate import metrics
from limbeck.export import FORMATS, export_model, onnx, peak_rss_bytes, quantize, write_artifact, write_triton
from limbeck.export._job import quiet
from limbeck.export.parity import Runner, latency, throughput
from limbeck.export.triton import model_name
from limbeck.models import Model
from limbeck.randomness import order
from limbeck.run import file_sha256, finite, provenance, write_json

__all__ = ["Exporter"]

CALIBRATION, CALIBRATION_BATCH = 128, 16
DECIDING_FRACTION = 0.2
KEPT_BYTES = 512 << 20
"""Prepared samples up to this size are kept between tries."""

_RUNTIMES = {"onnx": "ONNX Runtime", "torchscript": "TorchScript", "pt2": "torch.export"}

Case = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Deciding:
    """What decides on a file in fewer bits, what it is calibrated on, and how the first is called."""

    decide: Split
    calibrate: Split
    name: str
    note: str = ""


class Exporter:
    """Exports of one student, each measured.

    parts, data, recipe: of the run. model: the student, on the CPU and in eval mode. run: its folder.
    """

    def __init__(self, run: Path, model: Model, parts: Parts, data: Data, weights_sha256: str | None) -> None:
        self.run, self.model, self.parts, self.data = run, model, parts, data
        self.weights_sha256 = weights_sha256
        self.classes = model.classes or data.classes

    def files(self, formats: list[str], progress: Callable[[str], None]) -> dict[str, Any]:
        """Plain files under ``export/``, each with its record beside it."""
        found = self._written(formats, self.run / "export", progress)
        for name, record in found.items():
            path = self.run / record["file"]
            progress(f"measuring {path.name}")
            record |= self._measured(name, path, record)
            write_json(path.with_name(f"{path.name}.json"), record)
        return found

    def folder(self, scheme: str | None, max_drop: float, triton: bool, progress: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
        """An artifact ``export/onnx-SCHEME`` (``float32`` without a scheme), on request as a Triton repository too; its name and record.

        Raises: Refused, and nothing is left, where fewer bits cost too much or save nothing; Stopped where the student is too large.
        """
        key = f"onnx-{scheme or 'float32'}"
        size = sum(t.numel() * 4 for t in self.model.module.state_dict().values())
        if size > onnx.SINGLE_FILE_LIMIT:
            raise Stopped(f"{key}: the student has {size:,} bytes of weights, and an artifact is one ONNX file, which ends at 2 GiB.")
        folder = self.run / "export"
        there = folder.is_dir()
        work = folder / f".{key}.{os.getpid()}.tmp"
        shutil.rmtree(work, ignore_errors=True)
        try:
            (work / "artifact").mkdir(parents=True)
            record = self._written(["onnx"], work / "float32", progress)["onnx"]
            path = work / "float32" / "model.onnx"
            how: dict[str, Any] = {"quantization": None, "about": "Float32, as it was trained."}
            if scheme is not None:
                record, how = self._quantised(scheme, max_drop, path, work, record, progress)
            else:
                shutil.move(path, work / "artifact" / "model.onnx")
            progress(f"measuring {key}")
            model = work / "artifact" / "model.onnx"
            body = {**record, **how, **self._measured("onnx", model, record), "bytes": model.stat().st_size}
            body = write_artifact(work / "artifact", folder / key, {k: v for k, v in body.items() if k not in ("file", "files")})
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if not there and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        found = {"file": f"export/{key}/model.onnx", **body}
        if triton:
            repository = folder / f"triton-{scheme or 'float32'}"
            write_triton(folder / key, repository, model_name(self.run.resolve().name), body)
            found["triton"] = f"export/{repository.name}"
        return key, found

    def _written(self, formats: list[str], folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
        inputs = self.parts.parity_inputs()
        return export_model(
            self.model, formats, folder, inputs=inputs, classes=self.classes, task=self.parts.recipe.task, progress=progress
        )

    def _quantised(
        self, scheme: str, max_drop: float, path: Path, work: Path, exact: dict[str, Any], progress: Callable[[str], None]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the record says of a file in fewer bits: parity with the float32 file, and how it came about."""
        deciding = _deciding(self.data, self.parts.recipe.data.seed)
        if deciding.note:
            progress(deciding.note)
        names = [tensor["name"] for tensor in exact["inputs"]]
        samples = _Samples(self.parts, deciding.decide, names)
        rows = np.sort(order(len(deciding.calibrate), self.parts.recipe.data.seed, "calibration")[:CALIBRATION])
        chosen = _Samples(self.parts, deciding.calibrate.take(rows), names, CALIBRATION_BATCH)
        (work / "quantize").mkdir()
        target = work / "artifact" / "model.onnx"
        made = quantize(
            path,
            target,
            scheme,
            calibration=[dict(zip(names, (v.numpy() for v in case), strict=True)) for _, case in chosen],
            asked=lambda file: samples.logits(onnx.load(file)),
            labels=deciding.decide.labels,
            max_drop=max_drop,
            work=work / "quantize",
            split=deciding.name,
            progress=progress,
        )
        record = {
            "sha256": file_sha256(target),
            "max_abs_diff": made.max_abs_diff,
            "agreement": made.agreement,
            "items": len(deciding.decide),
            "inputs": exact["inputs"],
            "outputs": exact["outputs"],
            "exporter": exact["exporter"],
            "torch": exact["torch"],
            "opset": onnx.facts(target)["opset"],
        }
        before = self._measured("onnx", path, exact)
        changed = made.candidates - len(made.left)
        facts = {
            "scheme": scheme,
            "method": made.method,
            "why": made.why,
            "nodes": made.candidates,
            "left_in_float": list(made.left),
            "tries": list(made.tries),
            "max_drop": max_drop,
            "drop": made.drop,
            "decided_on": deciding.name,
            "decided_on_items": len(deciding.decide),
            "calibration_items": 0 if made.method == "dynamic" else len(rows),
            "float32": {
                "sha256": exact["sha256"],
                "bytes": exact["bytes"],
                "parity": {k: exact[k] for k in ("max_abs_diff", "tolerance", "agreement", "items")},
                **{k: before[k] for k in ("test", "latency_ms", "throughput", "peak_rss_bytes")},
            },
        }
        about = (
            f"{'float16' if made.method == 'fp16' else f'int8, {made.method}'}: {changed} of {made.candidates} nodes; "
            f"{_compared(made.drop)} on {len(deciding.decide):,} samples of {deciding.name}, "
            f"with the same answer on {100 * made.agreement:.1f} % of them."
        )
        return record, {"quantization": facts, "about": about}

    def _measured(self, form: str, path: Path, record: dict[str, Any]) -> dict[str, Any]:
        """The test split's accuracy in the file's own runtime, its speed, memory and origin."""
        names = [tensor["name"] for tensor in record["inputs"]]
        one, many = (_case(inputs, names) for inputs in self.parts.samples())
        threads, test = torch.get_num_threads(), self.data.test
        with quiet():
            run = FORMATS[form].load(path)
        found = metrics(_Samples(self.parts, test, names).logits(run), test.labels)
        try:
            torch.set_num_threads(1)
            speed = {"latency_ms": latency(run, one), "threads": 1, "throughput": throughput(run, many)}
        finally:
            torch.set_num_threads(threads)
        packages = provenance()["packages"]
        return {
            "format": form,
            "runtime": _RUNTIMES[form],
            "test": finite({"metrics": found, "items": len(test)}),
            **speed,
            "peak_rss_bytes": peak_rss_bytes(form, path, one),
            "measured_on": machine(torch.device("cpu"))["name"],
            "source": {
                "run": self.run.resolve().name,
                "weights_sha256": self.weights_sha256,
                "data_fingerprint": self.data.fingerprint,
                "task": self.parts.recipe.task,
            },
            "versions": {"limbeck": __version__, **{name: packages[name] for name in ("onnx", "onnxruntime", "torch")}},
        }


def _compared(drop: float) -> str:
    return (
        f"{abs(drop):.2f} points of accuracy {'below' if drop > 0 else 'above'} the float32 file"
        if drop
        else "as accurate as the float32 file"
    )


def _deciding(data: Data, seed: int) -> _Deciding:
    """The validation split, and calibration on training samples. Without one a stratified part of the labelled training samples decides, and the
    others calibrate."""
    if len(data.valid):
        return _Deciding(data.valid, data.train, "validation")
    labelled = data.train.take(data.train.labels >= 0)
    if not len(labelled):
        raise UsageError(
            Problem("--quantize", "the run has neither validation samples nor labelled training samples, so no accuracy can decide.")
        )
    side = carve(labelled.ids, labelled.labels, (DECIDING_FRACTION,), seed)
    if not side.any():  # one sample a class
        side[:] = 1
    note = "The run has no validation split: a stratified part of its training samples decides, which the student has seen."
    rest = labelled.take(side == 0) if (side == 0).any() else labelled
    return _Deciding(labelled.take(side == 1), rest, "a part of the training split", note)


class _Samples:
    """Prepared samples of a split, as often as they are asked for: rows, and tensors in the order of a file's inputs, float32."""

    def __init__(self, parts: Parts, split: Split, names: list[str], batch_size: int = EVALUATION_BATCH) -> None:
        self.parts, self.split, self.names = parts, split, names
        self.requests = evaluation_requests(split, batch_size, parts.lengths(split))
        self._kept: list[tuple[npt.NDArray[np.int64], Case]] | None = None

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.int64], Case]]:
        if self._kept is not None:
            yield from self._kept
            return
        builder, kept, size = self.parts.builder(self.split), [], 0
        for request in self.requests:
            one = request.rows, _case(builder(request).student, self.names)
            size += sum(v.numel() * v.element_size() for v in one[1])
            if size <= KEPT_BYTES:
                kept.append(one)
            yield one
        self._kept = kept if size <= KEPT_BYTES else None

    def logits(self, run: Runner) -> npt.NDArray[np.float64]:
        """``(N, C)`` in the split's order."""
        found: npt.NDArray[np.float64] | None = None
        for rows, case in self:
            answers = run(case)
            found = np.zeros((len(self.split), answers.shape[1])) if found is None else found
            found[rows] = answers
        assert found is not None, "an empty split is refused before"
        return found


def _case(inputs: Any, names: list[str]) -> Case:
    return tuple(inputs[n].float() if inputs[n].is_floating_point() else inputs[n] for n in names)
