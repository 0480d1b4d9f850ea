"""A run's directory: atomic files, the log, provenance."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from limbeck.errors import DiskFull, Problem, UsageError

__all__ = [
    "Log",
    "NoLog",
    "canonical",
    "check_trackers",
    "commit_folder",
    "copy_folder",
    "discard",
    "file_sha256",
    "is_left_over",
    "join_logs",
    "provenance",
    "read_json",
    "seal",
    "sweep",
    "unseal",
    "write_atomic",
    "write_json",
]

_TOGETHER = 1.0
"""Seconds for which what goes to the boards is kept, to be handed over at once."""

# .NAME.PID.tmp, .NAME.PID.old.tmp, and tempfile's .NAME.xxxxxxxx.tmp
_LEFT_OVER = re.compile(r"\..+\.(\d+|\d+\.old|[a-z0-9_]{8})\.tmp")


@contextmanager
def disk_errors(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn "no space left" (or a quota) into a sentence with the path and the bytes."""
    try:
        yield
    except Exception as e:
        if _no_space(e):
            free = shutil.disk_usage(existing_parent(path)).free
            wanted = "" if size is None else f" {size:,} bytes were to be written;"
            raise DiskFull(
                f"The disk is full: writing {path} failed.{wanted} {free:,} bytes are free. What was finished before is kept."
            ) from e
        raise


def _no_space(error: Exception) -> bool:
    """safetensors has an error of its own for it, which has the system's number in its text alone."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    said = str(error)
    return type(error).__name__ == "SafetensorError" and any(f"os error {number})" in said for number in (errno.ENOSPC, errno.EDQUOT))


def existing_parent(path: Path) -> Path:
    """The nearest existing ancestor (or the path itself)."""
    path = path.absolute()
    while not os.path.exists(path):
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


def copy_folder(folder: Path, final: Path) -> None:
    """Copy a folder; ``final`` appears complete or not at all."""
    with tempfile.TemporaryDirectory(prefix=".copy.", suffix=".tmp", dir=final.parent) as temporary:
        with disk_errors(final):
            shutil.copytree(folder, Path(temporary) / final.name)
        commit_folder(Path(temporary) / final.name, final)


def is_left_over(path: Path) -> bool:
    """Whether a name is one under which this package writes what has no final name yet."""
    return _LEFT_OVER.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Remove what interrupted writes left behind, here and in every folder inside; links are not followed."""
    for root, folders, files in os.walk(folder):
        for path in [Path(root, name) for name in (*folders, *files)]:
            if is_left_over(path):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        folders[:] = [name for name in folders if not is_left_over(Path(name))]


def discard(folder: Path) -> None:
    """Remove a committed folder: it loses its final name first, so that one that is half removed is a left-over. A missing one is no matter."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    try:
        os.rename(folder, old)
    except FileNotFoundError:
        return
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """JSON for people and scripts: two spaces, NaN and infinity as null."""
    write_atomic(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises: OSError, ValueError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deep") from None


def canonical(value: Any) -> str:
    """The one JSON text of a value: keys sorted, no NaN."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1)


def seal(body: Mapping[str, Any]) -> str:
    """JSON that ends in the hash of itself."""
    digest = hashlib.sha256(canonical(body).encode()).hexdigest()
    return canonical({"body": body, "sha256": digest}) + "\n"


def unseal(raw: bytes) -> Any:
    """The body of what :func:`seal` wrote; every byte counts. Raises: ValueError."""
    try:
        body = json.loads(raw)["body"]
        whole = seal(body).encode() == raw
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("it is not what was sealed") from error
    if not whole:
        raise ValueError("it does not match its own hash")
    return body


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
    """``log.jsonl``: one line an event, appended; cut back to the checkpoint on resume, so that no step stands in it twice.

    The same numbers go to TensorBoard, one of its runs a role (``tensorboard/student``), and to the trackers. What a resume cuts off is
    hidden on the board too; W&B and MLflow take nothing back and show such a step twice.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = True) -> None:
        self.path = folder / "log.jsonl"
        # Unbuffered: what a full disk did not take would be tried again when the file is closed.
        with disk_errors(self.path):
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._writer, self._board_folder = _summary_writer() if tensorboard else None, folder / "tensorboard"
        self._boards: dict[str, Any] = {}
        self._waiting: list[Callable[[], None]] = []
        self._handed = time.monotonic()
        self._trackers: list[_Wandb | _Mlflow] = []

    def track(self, names: list[str], folder: Path, config: dict[str, Any]) -> None:
        """Also send every line to W&B or MLflow: to the session that ``trackers.json`` names, or to a new one that it then names."""
        record = folder / "trackers.json"
        ids = read_json(record) if record.is_file() else {}
        for name in names:
            self._trackers.append(_TRACKERS[name](folder, config, ids.get(name)))
            ids[name] = self._trackers[-1].id
            write_json(record, ids)

    @property
    def offset(self) -> int:
        """Bytes written so far, and on the disk: what a checkpoint remembers."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def cut(self, offset: int) -> None:
        """Forget everything after ``offset`` bytes."""
        if self._file.tell() > offset:
            self._file.truncate(offset)
            self._file.seek(offset)

    def cut_role(self, role: str) -> None:
        """Forget what an attempt that left no checkpoint wrote about a role: roles follow one another, so that is everything from its first line."""
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
            self._append(raw)
        role, step = str(line.get("role", "run")), int(line.get("step", 0))
        scalars = dict(_scalars(line))
        with disk_errors(self._board_folder):
            if self._writer is not None and role not in self._boards:
                # a role's first line says whether it goes on (then with the next step) or begins; the board hides what it had from there on
                self._boards[role] = self._writer(str(self._board_folder / role), purge_step=int(line.get("resumed_from", -1)) + 1)
            if scalars and role in self._boards:
                # one record for all: add_scalar makes and queues one each, which takes ten times as long
                from tensorboard.compat.proto.summary_pb2 import Summary

                values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
                # The board's thread keeps what it gets for two minutes anyway, and waking it costs as much as a step of a small model.
                add, now = self._boards[role].file_writer.add_summary, time.time()
                self._waiting.append(partial(add, Summary(value=values), step, walltime=now))
                if time.monotonic() - self._handed > _TOGETHER:
                    self._hand_over()
        if not scalars:
            return
        for tracker in self._trackers:
            tracker.send({f"{role}/{name}": value for name, value in scalars.items()}, step)

    def _hand_over(self) -> None:
        """What was kept for the boards, to their threads."""
        waiting, self._waiting, self._handed = self._waiting, [], time.monotonic()
        for add in waiting:
            add()

    def _append(self, raw: bytes) -> None:
        """The whole line or nothing of it: a disk that runs full takes a part first."""
        before, left = self._file.tell(), memoryview(raw)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self.cut(before)
            raise

    def close(self) -> None:
        """End every session; called while an exception passes, they end as failed."""
        failed = sys.exc_info()[0] is not None
        self._file.close()
        with contextlib.suppress(OSError) if failed else disk_errors(self._board_folder):
            self._hand_over()
        for board in self._boards.values():
            # what the board could not write on a full disk is told again here, and must not take the place of what passes
            with contextlib.suppress(OSError) if failed else disk_errors(self._board_folder):
                board.close()
        for tracker in self._trackers:
            tracker.end(failed)


class NoLog(Log):
    """A log that keeps nothing: of a rank that does not write, or of steps that are only timed."""

    def __init__(self) -> None:
        self._trackers = []

    @property
    def offset(self) -> int:
        return 0

    def track(self, names: list[str], folder: Path, config: dict[str, Any]) -> None: ...

    def cut(self, offset: int) -> None: ...

    def cut_role(self, role: str) -> None: ...

    def write(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def join_logs(parent: Path, child: Path) -> None:
    """``log.jsonl`` of a folder of several seeds: its own lines (of the teacher), then those of one child. Doing it again changes nothing."""
    theirs = (child / "log.jsonl").read_bytes()
    roles = {json.loads(raw).get("role") for raw in theirs.splitlines()}
    own = (parent / "log.jsonl").read_bytes() if (parent / "log.jsonl").is_file() else b""
    kept = [raw for raw in own.splitlines(keepends=True) if raw.endswith(b"\n") and json.loads(raw).get("role") not in roles]
    write_atomic(parent / "log.jsonl", b"".join(kept) + theirs)


def _scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        if key in ("role", "step", "time", "resumed_from"):
            continue
        for name, number in value.items() if isinstance(value, Mapping) else [(None, value)]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield key if name is None else f"{key}/{name}", float(number)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    _say_once()
    return SummaryWriter


@cache
def _say_once() -> None:
    """The board's thread keeps an exception for whoever writes next, and raises it too, which would print a traceback beside the sentence on a full
    disk that is made of it there."""
    before = threading.excepthook

    def hook(args: Any) -> None:
        of_board = type(args.thread).__module__ == "tensorboard.summary.writer.event_file_writer"
        if not (of_board and args.exc_value is not None and _no_space(args.exc_value)):
            before(args)

    threading.excepthook = hook


class _Wandb:
    """One run of W&B (0.19.10 or newer), beside whatever the process has open."""

    def __init__(self, folder: Path, config: dict[str, Any], known: str | None) -> None:
        import wandb

        self.id = known or secrets.token_hex(8)
        self._session = wandb.init(
            project="limbeck", name=folder.name, dir=str(folder), config=config, id=self.id, resume="allow", reinit="create_new"
        )
        self._session.define_metric("*", step_metric="limbeck_step")  # its own step only ever grows, and every role begins at 1

    def send(self, scalars: dict[str, float], step: int) -> None:
        self._session.log({**scalars, "limbeck_step": step})

    def end(self, failed: bool) -> None:
        self._session.finish(exit_code=int(failed))


class _Mlflow:
    """One run of MLflow, through its client: the process's own active run is left alone."""

    def __init__(self, folder: Path, config: dict[str, Any], known: str | None) -> None:
        import mlflow
        from mlflow.entities import Metric

        self._client, self._metric = mlflow.MlflowClient(), Metric
        if known is None:
            found = self._client.get_experiment_by_name("limbeck")
            experiment = self._client.create_experiment("limbeck") if found is None else found.experiment_id
            known = str(self._client.create_run(experiment, run_name=folder.name).info.run_id)
        else:
            self._client.update_run(known, status="RUNNING")
        self.id = known
        self._client.log_dict(self.id, config, "recipe.json")

    def send(self, scalars: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[self._metric(k.replace("/", "."), v, now, step) for k, v in scalars.items()])

    def end(self, failed: bool) -> None:
        self._client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")


_TRACKERS: dict[str, type[_Wandb] | type[_Mlflow]] = {"wandb": _Wandb, "mlflow": _Mlflow}


def check_trackers(names: Sequence[str]) -> list[str]:
    """Refuse a tracker that is not installed; returns what a person should know about the others."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(Problem("track", f"{name} is not installed.", f"pip install {name}"))
    if importlib.util.find_spec("tensorboard") is None:
        return ['TensorBoard is not installed, so only log.jsonl is written (pip install "limbeck[track]").']
    return []


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
