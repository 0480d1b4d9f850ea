"""The student as files that leave alone, each compared with the trained student before it gets its name.

``export_model`` writes ONNX (``model.onnx``), TorchScript (``model.torchscript.pt``) and ``torch.export`` (``model.pt2``), and beside each
its record (``model.onnx.json`` ...). A file takes one numeric tensor for images and float arrays, already prepared (normalised, float32,
channels first), or the tokenizer's inputs for text, with a free batch size (and length), and gives logits ``(B, C)``. Task, class names and
preprocessing travel in its metadata.

``quantize`` makes an ONNX file smaller (int8, fp16) as far as its accuracy allows; ``write_artifact`` makes a folder of one that can be copied
away, and ``write_triton`` a model repository of that.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from limbeck.errors import LimbeckError, ParityFailed, Problem, Stopped, UsageError, listed, nearest
from limbeck.export import onnx, pt2, torchscript
from limbeck.export._fresh import peak_rss_bytes
from limbeck.export._job import ExportFailed, Job, brief, prepare, quiet
from limbeck.export._quantize import SCHEMES, Quantised, Refused, quantize
from limbeck.export.artifact import MANIFEST, write_artifact
from limbeck.export.parity import Logits, Parity, compare, latency, student_logits
from limbeck.export.triton import write_triton
from limbeck.randomness import forked
from limbeck.run import disk_errors, file_sha256, sync_folder, write_json
from limbeck.types import Inputs

if TYPE_CHECKING:
    from limbeck.models import Model

__all__ = [
    "FORMATS",
    "MANIFEST",
    "SCHEMES",
    "ExportFailed",
    "Quantised",
    "Refused",
    "export_model",
    "peak_rss_bytes",
    "quantize",
    "write_artifact",
    "write_triton",
]

FORMATS: dict[str, ModuleType] = {"onnx": onnx, "torchscript": torchscript, "pt2": pt2}
"""What can be written, by the name that recipes use."""


def export_model(
    model: Model,
    formats: Sequence[str],
    folder: Path,
    *,
    inputs: Inputs,
    classes: tuple[str, ...],
    task: str,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Write ``model`` in each of ``formats`` into ``folder`` and give the records, by format.

    model: left exactly as it is. formats: names of :data:`FORMATS`. inputs: prepared samples of the test split on the CPU, 16 or more.
    classes: names in the order of the logits. progress: called with a short line when a format is begun.

    A record has ``file`` (relative to the folder's parent), ``bytes``, ``sha256``, ``files`` (the sha256 of each by
    name: a large ONNX file has its weights beside it), ``max_abs_diff``, ``tolerance``, ``largest_logit``,
    ``agreement``, ``items``, ``batch_sizes``, ``latency_ms`` (``p50`` and ``p95`` of one sample on one CPU thread), ``threads``,
    ``inputs`` and ``outputs`` (``name``, ``dtype``, ``shape`` with names for free axes),
    ``exporter``, ``torch``, ``tried`` (exporters that were given up, and why), and ``opset`` for ONNX.

    Raises :class:`UsageError` for an unknown format or a missing package, :class:`ParityFailed` where a file does not answer as the student
    does, and :class:`ExportFailed` where none could be written. A format that failed leaves no file; the others are finished first.
    """
    names = list(dict.fromkeys(formats))
    unknown = [n for n in names if n not in FORMATS]
    if unknown:
        raise UsageError(
            Problem("export", f"'{n}' is not a format; there are {listed(list(FORMATS))}.", nearest(n, FORMATS)) for n in unknown
        )
    for name in names:
        FORMATS[name].require()
    if not names:
        return {}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    records: dict[str, dict[str, Any]] = {}
    failures: list[LimbeckError] = []
    with forked(0, "export"):
        job = prepare(model, inputs, classes=classes, task=task)
        with quiet():
            expected = student_logits(model, job)
        if expected[0].shape[-1] != len(classes):
            raise ValueError(f"the student gives {expected[0].shape[-1]} logits and there are {len(classes)} classes")
        for name in names:
            if progress is not None:
                progress(f"export {name}")
            try:
                records[name] = _write_checked(name, job, expected, folder)
            except Stopped as failure:
                failures.append(failure)
    if failures:
        raise type(failures[0])("\n".join(str(f) for f in failures))
    return records


def _write_checked(name: str, job: Job, expected: Sequence[Logits], folder: Path) -> dict[str, Any]:
    """Try the format's exporters in turn; the first whose file passes gets the final name."""
    form = FORMATS[name]
    final = folder / str(form.FILE)
    record_path = final.with_name(f"{final.name}.json")
    for stale in (record_path, final, final.with_name(f"{final.name}.data")):
        stale.unlink(missing_ok=True)  # an older file is of another student, for all that is known here
    tried: list[dict[str, str]] = []
    parity_failure: tuple[int, str] | None = None
    for exporter, write in form.writers():
        work = folder / f".{final.name}.{os.getpid()}.tmp"
        shutil.rmtree(work, ignore_errors=True)
        try:
            with disk_errors(final, job.weight_bytes), quiet(job):
                work.mkdir()
                outcome = _attempt(form, write, job, expected, work / final.name)
            if isinstance(outcome, tuple):
                parity, measured = outcome
                record = {
                    "file": f"{folder.name}/{final.name}",
                    "bytes": sum(p.stat().st_size for p in work.iterdir()),
                    "sha256": file_sha256(work / final.name),
                    "files": {p.name: file_sha256(p) for p in sorted(work.iterdir())},
                    "max_abs_diff": parity.max_abs_diff,
                    "tolerance": parity.tolerance,
                    "largest_logit": parity.largest_logit,
                    "agreement": parity.agreement,
                    "items": parity.items,
                    "batch_sizes": list(parity.batch_sizes),
                    "inputs": json.loads(job.metadata["inputs"]),
                    "outputs": json.loads(job.metadata["outputs"]),
                    "exporter": exporter,
                    "torch": str(torch.__version__),
                    "tried": tried,
                    **measured,
                }
                _settle(work, folder, final.name)
                write_json(record_path, record)
                return record
        finally:
            shutil.rmtree(work, ignore_errors=True)
        tried.append({"exporter": exporter, "error": outcome if isinstance(outcome, str) else str(outcome)})
        if isinstance(outcome, Parity):
            hint = f" While it was traced, PyTorch warned: {job.warned[-1]}" if job.warned else ""
            parity_failure = len(tried) - 1, f"{final.name} does not answer as the trained student does: {outcome}. No file was kept.{hint}"
    told, message = parity_failure or (len(tried) - 1, f"The student could not be written as {name}: {tried[-1]['error']}")
    others = "".join(f" (Exporter '{t['exporter']}': {t['error']})" for i, t in enumerate(tried) if i != told)
    raise (ParityFailed if parity_failure else ExportFailed)(message + others)


def _attempt(
    form: ModuleType, write: Callable[[Job, Path], None], job: Job, expected: Sequence[Logits], path: Path
) -> tuple[Parity, dict[str, Any]] | Parity | str:
    """A passed parity with what was measured, a failed one, or why the exporter failed."""
    threads, fused = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # nn.Transformer's fused inference kernel means nothing outside PyTorch
        with torch.no_grad():
            write(job, path)
        run = form.load(path)
        torch.set_num_threads(1)
        parity = compare(run, job, expected)
        if not parity.passed:
            return parity
        return parity, {**form.facts(path), "latency_ms": latency(run, job.single), "threads": 1}
    except LimbeckError:  # a second signal, not a failure of the exporter
        raise
    except Exception as error:  # an exporter may fail in any way on a module that it does not know
        if "PytorchStreamWriter failed" in str(error):  # how torch says that a write failed
            raise OSError(errno.ENOSPC, brief(error)) from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return brief(error)
    finally:
        torch.set_num_threads(threads)
        torch.backends.mha.set_fastpath_enabled(fused)


def _settle(work: Path, folder: Path, last: str) -> None:
    """Move the finished files into ``folder``, ``last`` (the one that refers to the others) at the end."""
    with disk_errors(folder / last):
        for path in sorted(work.iterdir(), key=lambda p: (p.name == last, p.name)):
            with open(path, "rb") as f:
                os.fsync(f.fileno())
            os.replace(path, folder / path.name)
        sync_folder(folder)
