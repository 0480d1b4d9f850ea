"""From a folder to the bytes of its model, believed only where their hash is the recorded one.

``found`` is the one place that knows what kinds of folders there are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.errors import Problem, UsageError
from limbeck.run import file_sha256, read_json, unseal

__all__ = ["MANIFEST", "Found", "found"]

MANIFEST = "manifest.json"
"""What makes a folder an artifact."""


@dataclass(frozen=True)
class Found:
    """A model's file and what its record says. content: its bytes, hashed; None where the weights lie beside it and it is opened by path."""

    path: Path
    content: bytes | None
    sha256: str
    bytes: int
    task: str


def found(folder: Path) -> Found:
    """The ONNX file of a run's folder, or of an artifact's (``limbeck export --quantize``, ``--layout folder``).

    Raises: UsageError, where there is none, or where a file is not the one that was recorded.
    """
    if not folder.is_dir():
        raise UsageError(Problem(str(folder), "is not a folder of a run."))
    if (folder / "metrics.json").is_file():
        return _of_run(folder)
    if (folder / MANIFEST).is_file():
        return _of_artifact(folder)
    raise UsageError(Problem(str(folder), f"is neither a finished run (it has no metrics.json) nor an artifact (it has no {MANIFEST})."))


def _of_artifact(folder: Path) -> Found:
    """All files of the manifest must be there as they were written, though the ONNX file alone is loaded: labels that somebody changed are not passed
    over in silence."""
    hint = "It is not loaded. Copy it again, or export again."
    try:
        manifest = unseal((folder / MANIFEST).read_bytes())
        files, task = dict(manifest["files"]), str(manifest["source"]["task"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            Problem(str(folder / MANIFEST), "is damaged, or is no artifact's: it does not match its own hash.", hint)
        ) from None
    if "model.onnx" not in files or any(name != Path(name).name for name in files):
        raise UsageError(Problem(str(folder / MANIFEST), "names no model.onnx, or files in other folders.", hint))
    contents: dict[str, bytes] = {}
    for name, wanted in files.items():
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError:
            raise UsageError(Problem(str(folder / name), f"is in the artifact's {MANIFEST} and is not there.", hint)) from None
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != wanted:
            text = f"is not the file of the artifact's {MANIFEST}: its sha256 is {found[:12]}..., and {str(wanted)[:12]}... was written."
            raise UsageError(Problem(str(folder / name), text, hint))
    content = contents["model.onnx"]
    return Found(folder / "model.onnx", content, files["model.onnx"], len(content), task)


def _of_run(folder: Path) -> Found:
    path = folder / "export" / "model.onnx"
    metrics = _read(folder / "metrics.json")
    exports = metrics.get("export")
    record = exports.get("onnx") if isinstance(exports, dict) else None
    if not isinstance(record, dict):
        raise UsageError(Problem(str(folder), "has no ONNX file in its metrics.json.", f"limbeck export {folder} --format onnx"))
    recorded = _hashes(record, folder / "metrics.json")
    beside = path.with_name("model.onnx.json")
    if beside.is_file() and _hashes(_read(beside), beside) != recorded:
        raise UsageError(Problem(str(beside), "records another file than the run's metrics.json.", "Export again."))
    parts = (
        {p.name for p in path.parent.iterdir() if p.name.startswith("model.onnx") and p.name != beside.name}
        if path.parent.is_dir()
        else set()
    )
    for name in sorted(recorded.keys() - parts):
        raise UsageError(Problem(str(path.with_name(name)), "is recorded in the run's metrics.json and is not there.", "Export again."))
    for name in sorted(parts - recorded.keys()):
        raise UsageError(Problem(str(path.with_name(name)), "is not recorded in the run's metrics.json, so it is not loaded."))
    # What is hashed is what is loaded: the bytes themselves, where the model is one file.
    content = path.read_bytes() if len(recorded) == 1 else None
    for name, wanted in recorded.items():
        given = hashlib.sha256(content).hexdigest() if content is not None else file_sha256(path.with_name(name))
        if given != wanted:
            text = f"is not the file that the run recorded: its sha256 is {given[:12]}..., and {wanted[:12]}... was written."
            raise UsageError(Problem(str(path.with_name(name)), text, "It is not loaded. Export again."))
    size = sum(path.with_name(name).stat().st_size for name in recorded)
    return Found(path, content, recorded[path.name], size, str(metrics.get("task", "")))


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(Problem(str(path), f"cannot be read: {error}.")) from None
    if not isinstance(value, dict):
        raise UsageError(Problem(str(path), "is not a JSON object."))
    return value


def _hashes(record: dict[str, Any], where: Path) -> dict[str, str]:
    """``{file name: sha256}`` of a record; one that is older than the list of files has the hash of the one file."""
    files = record.get("files", {"model.onnx": record.get("sha256")})
    good = isinstance(files, dict) and "model.onnx" in files and all(isinstance(v, str) and len(v) == 64 for v in files.values())
    if not good or any(name != Path(name).name for name in files):
        raise UsageError(Problem(str(where), "records no sha256 of model.onnx, so the file is not believed.", "Export again."))
    return dict(files)
