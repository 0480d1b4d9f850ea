"""What is changed inside a child before it runs: it notes what it does, and ends where it is told to."""

from __future__ import annotations

import builtins
import functools
import hashlib
import importlib
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What counts as being inside a stage: (module or class, function)
STAGES: dict[str, list[tuple[str, str]]] = {
    "checkpoint": [("limbeck.checkpoint", "save")],
    "cache filling": [("limbeck.spine", "keep_answers")],
    "training": [("limbeck._roles", "fit")],
    "evaluation": [("limbeck.spine", "figures"), ("limbeck._parts:Parts", "logits")],
    "export": [("limbeck.spine", "export_model")],
    "report": [("limbeck.spine", "write_report")],
}


def _owner(name: str) -> Any:
    module, _, inner = name.partition(":")
    found = importlib.import_module(module)
    return getattr(found, inner) if inner else found


def _wrap(owner: str, name: str, around: Callable[..., Any]) -> None:
    """``owner.name`` becomes ``around(real, *args, **kwargs)``."""
    real = getattr(_owner(owner), name)
    setattr(_owner(owner), name, functools.wraps(real)(functools.partial(around, real)) if ":" not in owner else _method(real, around))


def _method(real: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    def method(*arguments: Any, **more: Any) -> Any:
        return around(real, *arguments, **more)

    return method


def _append(path: str, line: dict[str, Any]) -> None:
    """One write, so that a line stands there whole or not at all."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, (json.dumps(line) + "\n").encode())
    os.close(file)


def note_states(path: str) -> None:
    """A digest of every state that is committed: all tensors (weights, buffers, moments, averages), and all else but times."""

    def save(real: Callable[..., Any], folder: Path, step: int, state: dict[str, Any]) -> Any:
        found = real(folder, step, state)
        _append(path, {"role": folder.name, "step": step, "digest": state_digest(state)})
        return found

    _wrap("limbeck.checkpoint", "save", save)


def state_digest(state: dict[str, Any]) -> str:
    """Of every tensor and every other value of a checkpoint, but seconds, the length of the log, and where it was resumed."""
    from limbeck.checkpoint import pack

    kept = {**state, "done": {k: v for k, v in state["done"].items() if k not in ("seconds", "resumed_from")}}
    kept.pop("log_offset", None)
    skeleton, tensors = pack(kept)
    digest = hashlib.sha256(json.dumps(skeleton, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def note_stage(path: str, stage: str) -> None:
    """A line when the stage is entered and one when it is left, with the time."""
    import time

    def around(real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        _append(path, {"stage": stage, "at": time.monotonic(), "cpu": time.process_time(), "in": True})
        try:
            return real(*arguments, **more)
        finally:
            _append(path, {"stage": stage, "at": time.monotonic(), "cpu": time.process_time(), "in": False})

    for owner, name in STAGES[stage]:
        _wrap(owner, name, around)


def note_ids(path: str) -> None:
    """The ids of every batch that the loop takes."""

    def stream(real: Callable[..., Any], builder: Any, requests: Any, **how: Any) -> Iterator[Any]:
        for request, batch in real(builder, requests, **how):
            _append(path, {"step": request.step, "ids": batch.ids[:, 0].tolist()})
            yield request, batch

    _wrap("limbeck.loop", "stream", stream)


def save_checkpoints(folder: str, path: str) -> None:
    """In place of a run: four checkpoints, one after the other; ``path`` says which have been committed."""
    import torch

    from limbeck import checkpoint

    for step in (1, 2, 3, 4):
        checkpoint.save(Path(folder), step, {"a": torch.full((300,), float(step)), "nested": [{"b": torch.arange(step)}, step]})
        _append(path, {"step": step})
    os._exit(0)


def kill_at_batch(count: int) -> None:
    """SIGKILL when the loop asks for its ``count``-th batch."""
    left = [count]

    def stream(real: Callable[..., Any], builder: Any, requests: Any, **how: Any) -> Iterator[Any]:
        for item in real(builder, requests, **how):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    _wrap("limbeck.loop", "stream", stream)


def quick_export() -> None:
    """The tracing exporter alone: the other one takes several seconds for any model."""
    from limbeck.export import onnx

    onnx.writers = lambda: (("trace", onnx._traced),)  # type: ignore[assignment]


def brief_figures() -> None:
    """Few repetitions where time or chance is measured: what a stop could spoil does not depend on how many there are."""
    from limbeck import evaluate

    _wrap("limbeck.evaluate", "_times", lambda real, model, inputs, seconds, runs: real(model, inputs, seconds, min(runs, 5)))
    evaluate.bootstrap_interval.__defaults__ = (0.95, 50)


def small_parts() -> None:
    """A cache of many small parts, so that a stop finds some of them done."""
    import limbeck._teaching
    import limbeck.cache._fill

    limbeck.cache._fill._PART_BLOCKS = 1
    limbeck._teaching.block_rows = lambda preprocessing, device: 16


# --- the disk: every write, fsync, rename and unlink is counted, and one of them is the last ---


class Events:
    """Counts what is done to files under ``root``, and ends the process at one of them.

    how: ``after`` the event; ``torn``: in the middle of a write, with half of its bytes. Nothing is flushed or cleaned up.
    """

    def __init__(self, root: str, path: str | None, nth: int | None, how: str) -> None:
        self.root, self.path, self.nth, self.how, self.count = os.path.realpath(root), path, nth, how, 0

    def mine(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(self.root)

    def happened(self, kind: str, path: str, tear: Callable[[], None] | None = None) -> None:
        """Called after the event. tear: makes it half done."""
        self.count += 1
        if self.path is not None:
            _append(self.path, {"n": self.count, "kind": kind, "path": os.path.relpath(path, self.root)})
        if self.count == self.nth:
            if self.how == "torn" and tear is not None:
                tear()
            os._exit(99)


def count_events(root: str, path: str | None = None, nth: int | None = None, how: str = "after") -> None:
    """From here on every event under ``root`` counts; the ``nth`` is the last (exit code 99). path: a file for what they were."""
    events = Events(root, path, nth, how)
    real_open, real_fsync = io.open, os.fsync

    def cut(path: str, start: int) -> Callable[[], None]:
        def tear() -> None:
            size = os.path.getsize(path)
            os.truncate(path, start + (size - start) // 2)

        return tear

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            start = os.fstat(self.fileno()).st_size
            count = super().write(data)
            events.happened("write", str(self.name), cut(str(self.name), start))
            return count

    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None, **more: Any
    ) -> Any:
        if not events.mine(file) or not set(mode) & set("wax+"):
            return real_open(file, mode, buffering, encoding, errors, newline, **more)
        raw = Raw(os.path.abspath(os.fspath(file)), mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    builtins.open = io.open = opened  # type: ignore[assignment]

    def counted(module: str, name: str, kind: str, which: int) -> None:
        def around(real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
            found = real(*arguments, **more)
            folder = more.get("dir_fd")
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), arguments[which]) if folder is not None else arguments[which]
            if events.mine(path):
                events.happened(kind, os.fspath(path))
            return found

        _wrap(module, name, around)

    for name in ("rename", "replace"):
        counted("os", name, "rename", 1)
    for name in ("unlink", "remove", "rmdir"):
        counted("os", name, "unlink", 0)
    counted("os", "mkdir", "mkdir", 0)

    def fsync(file: int) -> None:
        real_fsync(file)
        path = os.readlink(f"/proc/self/fd/{file}")
        if events.mine(path):
            events.happened("fsync", path)

    os.fsync = fsync  # type: ignore[assignment]

    def written(which: int) -> Callable[..., Any]:
        def around(real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
            found = real(*arguments, **more)
            path = os.fspath(arguments[which])
            if events.mine(path):
                events.happened("write", path, cut(path, 0))
            return found

        return around

    # libraries that write files beside Python
    _wrap("limbeck.checkpoint", "save_file", written(1))
