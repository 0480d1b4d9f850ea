"""Runs that are stopped: forked from a process that has imported everything and run nothing, compared byte by byte with one left alone."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import ROOT, left_over, lines, make_folder, read, steps

Patch = tuple[str, str, list[Any]]


def patch(name: str, *arguments: Any) -> Patch:
    """A function of ``faults.inside`` to be called in the child before it starts."""
    return "faults.inside", name, list(arguments)


class Server:
    """The process that forks; see ``server.py``."""

    def __init__(self) -> None:
        environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environ,
        )
        self.about = self._answer()
        atexit.register(self.close)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the fork server ended with {self.process.poll()}"
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
            self.process.wait(timeout=60)


_SERVERS: list[Server] = []


def server() -> Server:
    """The one fork server of this process."""
    if not _SERVERS:
        _SERVERS.append(Server())
        # a fork copies one thread; a lock that another one holds is never given back
        assert _SERVERS[0].about["threads"] == 1, "something was run in the process that forks"
    return _SERVERS[0]


class Child:
    """One ``limbeck ARGUMENTS``. said: a file to which what it prints is appended."""

    code: int | None = None

    def __init__(self, arguments: Sequence[Any], said: Path, patches: Sequence[Patch], environment: dict[str, str]) -> None:
        self.said = said
        order = {"arguments": [str(a) for a in arguments], "said": str(said), "environment": environment, "patches": list(patches)}
        self.began = time.monotonic()
        self.pid = int(server().ask(order)["pid"])

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)  # not reaped yet: the id is its own

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        if self.code is None:
            answer = server().ask({"wait": self.pid})
            self.code, self.cpu = int(answer["code"]), float(answer["cpu"])
        return self.code

    def cpu_so_far(self) -> float:
        """Seconds of computing until now, of the process itself."""
        if self.code is not None:
            return self.cpu
        values = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")

    def hears(self) -> bool:
        """Whether it has a handler for SIGTERM by now: before, the program has not begun, and any process ends by the signal."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    def running(self) -> bool:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class Case:
    """workers 0 or 2; accumulate 1 or 4; cache: ``off``, ``filling`` (empty when the run begins) or ``ready``. slow: seconds of a training
    forward pass, so that there is time to be stopped in."""

    workers: int = 0
    accumulate: int = 1
    cache: str = "off"
    export: bool = True
    epochs: int = 3
    slow: float = 0.02

    def recipe(self, folder: Path, cache: Path) -> dict[str, Any]:
        kept = {"mode": "off"} if self.cache == "off" else {"mode": "auto", "path": str(cache), "views": 2}
        return {
            "teacher": {"model": f"python:{folder / 'nets.py'}:teacher"},
            "student": {"model": f"python:{folder / 'nets.py'}:student", "options": {"dropout": 0.3}},
            "data": {"source": f"npz:{folder / 'pictures.npz'}", "augment": {"crop": 1, "flip": True, "mixup": 0.2}},
            "objective": [
                {"loss": "kd", "weight": 0.6, "temperature": 4.0},
                {"loss": "cross_entropy", "weight": 0.3},
                {"loss": "hint", "weight": 0.1, "student": "body", "teacher": "body"},  # it has weights of its own
            ],
            "teacher_cache": kept,
            "train": {
                "epochs": self.epochs,
                "batch_size": 16,
                "lr": 0.05,
                "precision": "float32",
                "log_every": 1,
                "accumulate": self.accumulate,
                "ema": 0.9,
                "select": "best",
                "checkpoint_every": 2,
                "workers": self.workers,
            },
            "export": ["onnx"] if self.export else [],
        }


class Lab:
    """A folder with data, models, a filled cache, and for each case a run that was left alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder)
        self.quiet: dict[Case, Quiet] = {}
        self.count = 0

    def begin(self, case: Case) -> Trial:
        """A fresh place for a run of a case."""
        self.count += 1
        trial = Trial(self, case, self.folder / f"trial-{self.count}")
        trial.folder.mkdir()
        if case.cache == "ready":
            shutil.copytree(self._filled(case), trial.cache)
        trial.file.write_text(json.dumps(case.recipe(self.folder, trial.cache)), encoding="utf-8")
        return trial

    def _filled(self, case: Case) -> Path:
        folder = self.folder / "filled"
        if not folder.exists():
            like = Case(cache="filling", export=False)
            trial = Trial(self, like, self.folder / "filling")
            trial.folder.mkdir()
            trial.file.write_text(json.dumps(like.recipe(self.folder, folder)), encoding="utf-8")
            assert trial.go("label").wait() == 0, trial.said()
        return folder

    def left_alone(self, case: Case) -> Quiet:
        """What a run of this case leaves that nobody disturbed (once for each case)."""
        if case not in self.quiet:
            trial = self.begin(case)
            patches = [patch("note_stage", str(trial.folder / "stages"), stage) for stage in STAGES]
            child = trial.go(patches=patches)
            assert child.wait() == 0, trial.said()
            seconds = time.monotonic() - child.began
            noted = _jsonl(trial.folder / "stages")
            # a second one, that commits every step: what the state is after each of them
            every = Trial(self, case, trial.folder / "every")
            every.folder.mkdir()
            shutil.copytree(trial.cache, every.cache) if trial.cache.exists() else None
            how = case.recipe(self.folder, every.cache)
            how["train"]["checkpoint_every"] = 1
            every.file.write_text(json.dumps({**how, "export": []}), encoding="utf-8")
            assert every.go().wait() == 0, every.said()
            states = every.states()
            assert all(states[key] == digest for key, digest in trial.states().items())
            self.quiet[case] = Quiet(trial.found(), states, seconds, _times(noted, child.began))
        return self.quiet[case]


@dataclass(frozen=True)
class Quiet:
    """found: what is compared. states: digests of committed states by (role, step). times: when each stage was entered and left, in seconds
    from the start."""

    found: dict[str, str]
    states: dict[tuple[str, int], str]
    seconds: float
    times: dict[str, list[tuple[float, float]]]


class Trial:
    """One run in its own folder, started as often as it takes."""

    def __init__(self, lab: Lab, case: Case, folder: Path) -> None:
        self.lab, self.case, self.folder = lab, case, folder
        self.out, self.cache, self.file = folder / "run", folder / "cache", folder / "recipe.json"
        self.expected: list[list[Any]] = []
        self.starts = 0

    def go(self, command: str = "distill", *more: Any, patches: Sequence[Patch] = (), resume: bool = False) -> Child:
        """Start it, or start it again with ``--resume``."""
        self.starts += 1
        own = [patch("quick_export"), patch("brief_figures"), patch("small_parts"), patch("note_states", str(self.folder / "states"))]
        out = ["--out", self.out] if command == "distill" else []
        arguments = [command, self.file, *out, *(["--resume"] if resume else []), *more]
        environment = {"SLOW": str(self.case.slow), "LIMBECK_CACHE": str(self.folder / "other")}
        return Child(arguments, self.folder / "said", [*own, *patches], environment)

    def said(self) -> str:
        return (self.folder / "said").read_text(encoding="utf-8")

    def states(self) -> dict[tuple[str, int], str]:
        return {(row["role"], row["step"]): row["digest"] for row in _jsonl(self.folder / "states") if "done" not in row["role"]}

    def stopped(self) -> list[list[Any]]:
        """To be called after every stop: [role, step] that a resume has to go on from, by what is committed. Remembered for ``judge``."""
        for role in ("student", "baseline"):
            folder = self.out / "checkpoints" / role
            if any(self.out.glob(f"checkpoints/{role}-done/step-*")):
                continue
            newest = max((int(p.name[5:]) for p in folder.glob("step-*")), default=None)
            if newest is not None:
                self.expected.append([role, newest])
        return self.expected

    def found(self) -> dict[str, str]:
        """Hashes of everything that has to be equal."""
        from safetensors.numpy import load_file

        found = {}
        for role in ("student", "baseline"):
            for name, value in load_file(self.out / role / "model.safetensors").items():
                found[f"{role} {name}"] = hashlib.sha256(f"{value.dtype}{value.shape}".encode() + value.tobytes()).hexdigest()
        if self.case.export:
            found["export"] = hashlib.sha256((self.out / "export" / "model.onnx").read_bytes()).hexdigest()
        if self.case.cache != "off":
            for path in sorted(self.cache.rglob("*")):
                if path.is_file() and path.name not in (".lock", "figures.json"):
                    found[f"cache {path.relative_to(self.cache)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        metrics = read(self.out / "metrics.json")["models"]
        found["metrics"] = json.dumps({role: metrics[role]["metrics"] for role in metrics}, sort_keys=True)
        found["recipe"] = (self.out / "recipe.yaml").read_text().replace(str(self.cache), "CACHE")
        for role in ("student", "baseline"):
            found[f"steps of the {role}"] = str(steps(self.out, role))
        return found

    def judge(self) -> list[str]:
        """What is not as in the run that was left alone; empty for a run that was stopped and is the same."""
        quiet = self.lab.left_alone(self.case)
        found = self.found()
        wrong = [name for name in {**quiet.found, **found} if quiet.found.get(name) != found.get(name)]
        states = self.states()
        # the run that was left alone commits every step but the last, whose weights are compared above
        last = self.case.epochs * 3
        wrong += [f"state of {key}" for key, digest in states.items() if key[1] != last and quiet.states.get(key) != digest]
        if left_over(self.out):
            wrong.append(f"left over: {left_over(self.out)}")
        if (self.out / "checkpoints").exists():
            wrong.append("checkpoints are still there")
        shown = [[line["role"], line["resumed_from"]] for line in lines(self.out) if "resumed_from" in line]
        if shown != _lasting(self.expected):
            wrong.append(f"the log shows {shown} as where it was resumed, and it was {self.expected}")
        return wrong

    def clear(self) -> None:
        shutil.rmtree(self.folder)


def _lasting(expected: list[list[Any]]) -> list[list[Any]]:
    """The resumes that a log still shows: a later one from the same checkpoint, or an earlier one, takes what came after it out of the log."""
    shown: list[list[Any]] = []
    for role, step in expected:
        shown = [[r, s] for r, s in shown if r != role or s < step]
        shown.append([role, step])
    return shown


STAGES = ("cache filling", "training", "checkpoint", "evaluation", "export", "report")


def _jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _times(noted: list[dict[str, Any]], began: float) -> dict[str, list[tuple[float, float]]]:
    times: dict[str, list[tuple[float, float]]] = {}
    entered: dict[str, float] = {}
    for row in noted:
        if row["in"]:
            entered[row["stage"]] = row["at"] - began
        else:
            times.setdefault(row["stage"], []).append((entered[row["stage"]], row["at"] - began))
    return times


class Aim:
    """A random instant inside a stage: at a random one of the times that it is entered, after a random part of what it took."""

    def __init__(self, lab: Lab, case: Case, stage: str, chance: random.Random) -> None:
        times = lab.left_alone(case).times[stage]
        self.stage, self.entry = stage, chance.randrange(len(times))
        began, ended = times[self.entry]
        self.after = chance.random() * (ended - began)

    def patches(self, trial: Trial) -> list[Patch]:
        self.path = trial.folder / f"aim-{trial.starts}"
        return [patch("note_stage", str(self.path), self.stage)]

    def wait(self, child: Child) -> bool:
        """Until then; False where the process ended before."""
        while True:
            entered = [row for row in _jsonl(self.path) if row["in"]]
            if len(entered) > self.entry:
                time.sleep(max(0.0, entered[self.entry]["at"] + self.after - time.monotonic()))
                return child.running()
            if not child.running():
                return False
            time.sleep(0.002)

    def entered(self) -> bool:
        """Whether the process came as far as that."""
        return len([row for row in _jsonl(self.path) if row["in"]]) > self.entry

    def inside(self) -> bool:
        """Whether the stage was not left when the process ended."""
        rows = _jsonl(self.path)
        return bool(rows) and len([r for r in rows if r["in"]]) == self.entry + 1 and sum(1 if r["in"] else -1 for r in rows) > 0


@contextmanager
def lab(folder: Path | None = None) -> Iterator[Lab]:
    """A lab in a folder of its own, which goes afterwards."""
    made = folder or Path(tempfile.mkdtemp(prefix="limbeck-faults-"))
    try:
        yield Lab(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def kill(child: Child) -> int:
    child.send(signal.SIGKILL)
    return child.wait()
