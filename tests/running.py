"""Whole runs for the end-to-end tests: small data and models written to files, and the command line in this process or in its own."""

from __future__ import annotations

import atexit
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from safetensors.numpy import load_file

from limbeck.cli import main

ROOT = Path(__file__).parents[1]

NETS = '''
import os
import time

import torch
from torch import nn


class Net(nn.Module):
    """Batch statistics, and dropout where asked for; slow on request, so that a signal finds it in mid-epoch."""

    def __init__(self, width, num_classes, dropout=0.0):
        super().__init__()
        self.body = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        if self.training and not torch.jit.is_tracing():
            time.sleep(float(os.environ.get("SLOW", "0")))
        x = self.norm(self.body(x)).relu()
        return self.head(self.drop(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)))


def teacher(num_classes=3):
    return Net(12, num_classes, 0.5)


def student(num_classes=3, dropout=0.0):
    return Net(4, num_classes, dropout)


def plain(num_classes=3, size=64):
    """No batch statistics; takes float arrays."""
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 7), nn.Tanh(), nn.Linear(7, num_classes))
'''

NAMES = ("ant", "bee", "cat")


def pictures(count: int, seed: int, size: int = 8) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(N, size, size) uint8 noise with a bright row whose place is the class, and (N,) labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    x = rng.integers(0, 100, (count, size, size), dtype=np.uint8)
    for i, label in enumerate(labels):
        x[i, (label * size) // 3 + 1] += 150
    return x, labels


def make_folder(folder: Path, train: int = 48) -> Path:
    """``nets.py`` and ``pictures.npz`` (all splits given) in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nets.py").write_text(NETS, encoding="utf-8")
    np.savez(folder / "pictures.npz", **arrays(train))
    return folder


def arrays(train: int = 48) -> dict[str, np.ndarray[Any, Any]]:
    splits = {"train": (train, 0), "test": (18, 1), "valid": (12, 2)}
    return {f"{name}_{what}": value for name, how in splits.items() for what, value in zip("xy", pictures(*how), strict=True)}


def recipe(folder: Path, name: str = "recipe.yaml", **changes: Any) -> Path:
    """A recipe file (JSON is YAML) in ``folder``; a change of a section is merged into it, None takes a key away."""
    plain: dict[str, Any] = {
        "teacher": {"model": "python:nets.py:teacher"},
        "student": {"model": "python:nets.py:student"},
        "data": {"source": "npz:pictures.npz"},
        "train": {"epochs": 2, "batch_size": 16, "lr": 0.05, "precision": "float32", "log_every": 1},
        "export": [],
    }
    for key, value in changes.items():
        if value is None:
            plain.pop(key, None)
        elif isinstance(value, dict) and isinstance(plain.get(key), dict):
            plain[key] = {**plain[key], **value}
        else:
            plain[key] = value
    path = folder / name
    path.write_text(json.dumps(plain, indent=2), encoding="utf-8")
    return path


def limbeck(*arguments: Any) -> int:
    """``limbeck ARGUMENTS`` in this process; the exit code. A bug keeps its traceback."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def run(command: str, *arguments: Any, out: Path) -> dict[str, Any]:
    """A run that succeeds; its metrics.json."""
    assert limbeck(command, *arguments, "--out", out) == 0
    return read(out / "metrics.json")


class Started(Protocol):
    """What is used of ``subprocess.Popen``."""

    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def send_signal(self, sig: int, /) -> None: ...
    def communicate(self, *, timeout: float) -> tuple[str, str]: ...


def start(*arguments: Any, program: tuple[str, ...] = ("-m", "limbeck"), **environment: str) -> Started:
    """The command line in a process of its own, as a person starts it."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *program, *(str(a) for a in arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


def fork(*arguments: Any, said: Path, **environment: str) -> Started:
    """The same from a server that has imported everything, which saves seconds. said: a file for what it prints."""
    _SERVER.set_forkserver_preload(["torch", "limbeck.spine", "running"])
    # the server keeps the folder of the test that started it: what other tests' teachers said there would be read
    own = {name: os.environ[name] for name in ("LIMBECK_CACHE",) if name in os.environ}
    environment = {**own, **environment}
    return _Forked([str(a) for a in arguments], said, environment)


def ranks(size: int, *arguments: Any, said: Path, **environment: str) -> list[Started]:
    """The same as so many ranks, with the variables that torchrun sets. said: a folder for what each of them prints.

    ``{rank}`` in an argument or a variable is the number of the rank, for machines that have files of their own.
    """
    said.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}

    def one(rank: int) -> Started:
        def own(text: Any) -> str:
            return str(text).replace("{rank}", str(rank))

        variables = {name: own(value) for name, value in shared.items()}
        return fork(*map(own, arguments), said=said / f"{rank}.txt", RANK=str(rank), LOCAL_RANK=str(rank), **variables)

    return [one(rank) for rank in range(size)]


def ended(processes: list[Started]) -> tuple[list[int | None], str]:
    """The exit code of each rank, and all that they printed."""
    said = "".join(process.communicate(timeout=600)[1] for process in processes)
    return [process.returncode for process in processes], said


_SERVER = multiprocessing.get_context("forkserver")


class _Forked:
    def __init__(self, arguments: list[str], said: Path, environment: dict[str, str]) -> None:
        self.said = said
        self.process = _SERVER.Process(target=_child, args=(arguments, str(said), environment))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def send_signal(self, sig: int, /) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, sig)

    def communicate(self, *, timeout: float) -> tuple[str, str]:
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it took too long"
        return "", self.said.read_text(encoding="utf-8")


def _child(arguments: list[str], said: str, environment: dict[str, str]) -> None:
    # the loader of a run in this process may have started the server first, with the signal blocked for its workers
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        main(arguments)
    finally:
        atexit._run_exitfuncs()  # as a process of its own does; a forked one leaves without


def wait_for(process: Started, happened: Callable[[], bool], seconds: float = 600) -> None:
    """Until ``happened()``, while the process lives."""
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate(timeout=600)
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(run: Path, role: str | None = None) -> list[dict[str, Any]]:
    """Whole lines of log.jsonl."""
    path = run / "log.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in found if role is None or line.get("role") == role]


def steps(run: Path, role: str) -> list[int]:
    """The steps of a role that were logged with their loss."""
    return [line["step"] for line in lines(run, role) if "loss" in line]


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor of a saved model as bytes."""
    return {name: value.tobytes() for name, value in load_file(folder / "model.safetensors").items()}


def several(size: int, *arguments: Any, out: Path, **environment: str) -> dict[str, Any]:
    """A run of so many ranks that succeeds; its metrics.json."""
    codes, said = ended(ranks(size, *arguments, "--out", out, said=out.with_suffix(".said"), **environment))
    assert codes == [0] * size, said
    return dict(read(out / "metrics.json"))


def distance(one: Path, other: Path) -> float:
    """The largest difference between two saved models, relative to the largest weight."""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float(np.abs(a[k].astype(np.float64) - b[k]).max() / max(1.0, np.abs(a[k]).max())) for k in a if a[k].size)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_over(folder: Path) -> list[str]:
    """Files under temporary names."""
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith(".") or p.name.endswith((".tmp", ".old"))]


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a JSON document by its path."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not isinstance(tree, dict | list):
        yield path, tree
    for key, value in items:
        yield from leaves(value, f"{path}.{key}" if path else str(key))
