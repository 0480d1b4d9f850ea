"""A run's directory: atomic files, the log, provenance."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.errors import DiskFull, Problem, UsageError

__all__ = ["Log", "check_trackers", "commit_folder", "file_sha256", "provenance", "read_json", "write_atomic", "write_json"]


@contextmanager
def disk_errors(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn "no space left" (or a quota) into a sentence with the path and the bytes."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(existing_parent(path)).free
            wanted = "" if size is None else f" {size:,} bytes were to be written;"
            raise DiskFull(
                f"The disk is full: writing {path} failed.{wanted} {free:,} bytes are free. What was finished before is kept."
            ) from e
        raise


def existing_parent(path: Path) -> Path:
    """The nearest existing ancestor (or the path itself)."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that it is either absent (or the old one) or complete, whatever happens in between."""
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path, len(raw)):
        try:
            with open(temporary, "wb") as f:
                f.write(raw)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def commit_folder(temporary: Path, final: Path) -> None:
    """Give a finished folder its final name: fsync every file, rename, fsync the parent. An old ``final`` is replaced."""
    with disk_errors(final):
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                with open(path, "rb") as f:
                    os.fsync(f.fileno())
            else:
                sync_folder(path)
        sync_folder(temporary)
        if final.exists():
            old = final.with_name(f".{final.name}.{os.getpid()}.old.tmp")
            os.rename(final, old)
            os.rename(temporary, final)
            sync_folder(final.parent)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, final)
            sync_folder(final.parent)


def write_json(path: Path, value: Any) -> None:
    """JSON for people and scripts: two spaces, NaN and infinity as null."""
    write_atomic(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def finite(value: Any) -> Any:
    """The same tree with non-finite floats as None: JSON has no NaN, and what is unknown is null."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Log:
    """``log.jsonl``: one line an event, appended; cut back to the checkpoint on resume, so that no step stands in it twice."""

    def __init__(self, folder: Path, *, tensorboard: bool = True) -> None:
        self.path = folder / "log.jsonl"
        self._file = open(self.path, "ab")  # noqa: SIM115 (closed by close)
        self._board = _tensorboard(folder / "tensorboard") if tensorboard else None
        self._trackers: list[Any] = []

    def track(self, names: list[str], folder: Path, config: dict[str, Any]) -> None:
        """Also send every line to W&B or MLflow."""
        self._trackers = [_TRACKERS[name](folder, config) for name in names]

    @property
    def offset(self) -> int:
        """Bytes written so far (flushed): what a checkpoint remembers."""
        self._file.flush()
        return self._file.tell()

    def cut(self, offset: int) -> None:
        """Forget everything after ``offset`` bytes."""
        self._file.flush()
        if self._file.tell() > offset:
            self._file.truncate(offset)
            self._file.seek(offset)

    def cut_role(self, role: str) -> None:
        """Forget what an attempt that left no checkpoint wrote about a role: roles follow one another, so that is everything from its first line."""
        self._file.flush()
        offset = 0
        with open(self.path, "rb") as f:
            for raw in f:
                if not raw.endswith(b"\n") or json.loads(raw).get("role") == role:
                    return self.cut(offset)
                offset += len(raw)
        return None

    def write(self, line: Mapping[str, Any]) -> None:
        raw = (json.dumps(finite(line), ensure_ascii=False, allow_nan=False) + "\n").encode()
        with disk_errors(self.path, len(raw)):
            self._file.write(raw)
            self._file.flush()
        scalars = dict(_scalars(line))
        step = int(line.get("step", 0))
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker(scalars, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    role = line.get("role", "run")
    for key, value in line.items():
        if key in ("role", "step", "time"):
            continue
        if isinstance(value, Mapping):
            yield from ((f"{role}/{key}/{k}", float(v)) for k, v in value.items() if isinstance(v, int | float))
        elif isinstance(value, int | float):
            yield f"{role}/{key}", float(value)


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def _wandb(folder: Path, config: dict[str, Any]) -> Any:
    import wandb

    session = wandb.init(project="limbeck", name=folder.name, dir=str(folder), config=config, resume="allow", id=_tracker_id(folder))
    return lambda scalars, step: session.log({**scalars, "limbeck_step": step})


def _mlflow(folder: Path, config: dict[str, Any]) -> Any:
    import mlflow

    mlflow.set_experiment("limbeck")
    mlflow.start_run(run_name=folder.name)
    mlflow.log_dict(config, "recipe.json")
    return lambda scalars, step: mlflow.log_metrics({k.replace("/", "."): v for k, v in scalars.items()}, step=step)


_TRACKERS = {"wandb": _wandb, "mlflow": _mlflow}


def check_trackers(names: Sequence[str]) -> list[str]:
    """Refuse a tracker that is not installed; returns what a person should know about the others."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(Problem("track", f"{name} is not installed.", f"pip install {name}"))
    if importlib.util.find_spec("tensorboard") is None:
        return ['TensorBoard is not installed, so only log.jsonl is written (pip install "limbeck[track]").']
    return []


def _tracker_id(folder: Path) -> str:
    return hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]


_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "tokenizers",
    "numpy",
    "safetensors",
    "pyarrow",
    "onnx",
    "onnxruntime",
    "torchmetrics",
)


def provenance() -> dict[str, Any]:
    """Versions, machine and git state: what a person needs to tell two runs apart."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": versions,
        "git": _git_state(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else [],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git_state() -> dict[str, Any] | None:
    """Commit and cleanness of the repository that the user works in, or None."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(status.strip())}
