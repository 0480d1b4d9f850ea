"""R8: a disk that runs full while something is being written: exit code 3, a message with the path and the bytes, and nothing lost.

Every level is a real filesystem of a few MB in memory (tmpfs, which needs root and Linux). At the n-th file that the run begins to write, or the
n-th line of its log, the filesystem is filled up but for a few pages; n goes through all stages of a run. Then the newest checkpoints must load, the
space is freed, and ``--resume`` must end in the bytes of a run that was never disturbed.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [p for p in (str(TESTS), str(TESTS.parent / "src")) if p not in sys.path]

PROMISE = "a small filesystem filled to 50 levels at checkpoint, cache, export, log, metrics, report: exit 3, path, bytes; resume ends in the same"
SEED, COUNT = 8, 50
SIZE = 24 << 20  # bytes of the filesystem
STAGES = ("recipe", "cache", "log", "board", "checkpoint", "model", "export", "analysis", "metrics", "report")
SERVER = multiprocessing.get_context("forkserver")


# --- in the process of the run ---


class Filler:
    """Counts what is begun to be written under ``disk``, and fills it at number ``at`` but for ``spare`` bytes."""

    def __init__(self, disk: Path, at: int | None, spare: int) -> None:
        self.disk, self.at, self.spare, self.seen, self.busy = str(disk), at, spare, [], False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir") or self.busy:
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.fsdecode(path)
        if not name.startswith(self.disk):
            return
        if event == "open" and not (int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        self.note(name)

    def note(self, name: str) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            if len(self.seen) == self.at:
                fill(Path(self.disk), self.spare)
            self.seen.append(os.path.relpath(name, self.disk))
        finally:
            self.busy = False


def fill(disk: Path, spare: int) -> None:
    """Leave ``spare`` bytes."""
    free = os.statvfs(disk)
    wanted = free.f_bavail * free.f_frsize - spare
    if wanted > 0:
        with open(disk / "filler", "wb") as f:
            os.posix_fallocate(f.fileno(), 0, wanted)


def _child(arguments: list[str], said: str, disk: str, at: int | None, spare: int, seen: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from limbeck import run
    from limbeck.cli import main

    filler = Filler(Path(disk), at, spare)
    sys.addaudithook(filler)
    write = run.Log.write

    def noted(self: run.Log, line: Any) -> None:
        filler.note(str(self.path))
        write(self, line)

    run.Log.write = noted  # type: ignore[method-assign]
    try:
        main(arguments)
    finally:
        Path(seen).write_text(json.dumps(filler.seen))


# --- outside ---


def why_not() -> str:
    """Why a filesystem cannot be mounted here, or an empty string."""
    with tempfile.TemporaryDirectory() as place:
        try:
            with mounted(Path(place) / "disk"):
                return ""
        except (OSError, subprocess.SubprocessError) as error:
            said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
            return f"no tmpfs can be mounted here ({said}); it takes root on Linux"


@contextlib.contextmanager
def mounted(disk: Path) -> Iterator[Path]:
    """An empty filesystem of ``SIZE`` bytes."""
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)], check=True, capture_output=True, text=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
        disk.rmdir()


def stage_of(name: str) -> str:
    """Which part of a run writes a file of this name (relative to the disk)."""
    parts = Path(name).parts
    if parts[0] == "teachers":
        return "cache"
    inner = "/".join(parts[1:])
    for mark, stage in (
        ("tensorboard", "board"), ("checkpoints", "checkpoint"), ("export", "export"), ("log.jsonl", "log"), ("analysis", "analysis"),
        ("metrics", "metrics"),
        ("report", "report"), ("student", "model"), ("baseline", "model"),
    ):  # fmt: skip
        if mark in inner:
            return stage
    return "recipe"


def distil(work: Path, disk: Path, *more: str, at: int | None = None, spare: int = 0) -> tuple[int | None, str, list[str]]:
    """One run onto the disk: its exit code, what it said, and what it wrote, in order."""
    SERVER.set_forkserver_preload(["torch", "limbeck.spine", "limbeck.cli", "onnx", "onnxruntime", "onnxscript", "torch.utils.tensorboard"])
    said, seen = work / "said.txt", work / "seen.json"
    seen.unlink(missing_ok=True)
    arguments = ["distill", str(work / "recipe.yaml"), "--out", str(disk / "run"), *more]
    environment = {"LIMBECK_CACHE": str(work / "unused"), "LIMBECK_HOME": str(work / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = SERVER.Process(target=_child, args=(arguments, str(said), str(disk), at, spare, str(seen), environment))
    process.start()
    process.join(400)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None, "it did not end", []
    return process.exitcode, said.read_text(encoding="utf-8"), json.loads(seen.read_text()) if seen.is_file() else []


def prepare(work: Path, disk: Path, export: list[str]) -> None:
    from running import make_folder, recipe

    make_folder(work)
    recipe(
        work,
        teacher_cache={"path": str(disk / "teachers"), "mode": "auto", "views": 2},
        train={"epochs": 3, "checkpoint_every": 2, "workers": 0},
        data={"augment": {"crop": 1}},
        export=export,
    )


def outcome(disk: Path) -> dict[str, str]:
    """Hashes of what a run has made, times left out."""
    from running import digest

    run = disk / "run"
    files = [
        *sorted(run.glob("student/*.safetensors")),
        *sorted(run.glob("baseline/*.safetensors")),
        *sorted(p for p in run.glob("export/model.*") if p.suffix != ".json"),
    ]
    files += sorted((disk / "teachers").rglob("*.arrow"))
    found = {str(p.relative_to(disk)): digest(p) for p in files}
    metrics = json.loads((run / "metrics.json").read_text())
    found["figures"] = json.dumps({k: v["metrics"] for k, v in metrics["models"].items() if v}, sort_keys=True)
    from running import lines

    rows = [
        {k: v for k, v in line.items() if k in ("role", "step", "loss", "terms", "valid")}
        for line in lines(run)
        if "loss" in line or "valid" in line
    ]
    found["log"] = json.dumps(rows)
    return found


def standing(disk: Path) -> tuple[dict[str, int], list[str]]:
    """The step of the newest checkpoint of each role that loads, and what is wrong with anything that has a final name."""
    from limbeck import checkpoint

    steps, wrong = {}, []
    run = disk / "run"
    for folder in sorted(p for p in (run / "checkpoints").glob("*") if p.is_dir() and not p.name.startswith(".")):
        committed = sorted(p for p in folder.glob("step-*"))
        said: list[str] = []
        loaded = checkpoint.load_newest(folder, said.append)
        wrong += said
        if committed and (loaded is None or f"step-{loaded[0]:08d}" != committed[-1].name):
            wrong.append(f"{committed[-1]} does not load")
        if loaded is not None:
            steps[folder.name] = loaded[0]
    for path in run.rglob("*.json"):
        if not any(part.startswith(".") for part in path.relative_to(run).parts):
            try:
                json.loads(path.read_text())
            except ValueError:
                wrong.append(f"{path} is half-written")
    return steps, wrong


def level(work: Path, disk: Path, expected: dict[str, str], at: int, spare: int) -> dict[str, Any]:
    """One level: run full, look, free, resume, compare. ``wrong`` says what did not hold."""
    wrong: list[str] = []
    with mounted(disk):
        code, said, seen = distil(work, disk, at=at, spare=spare)
        full = (disk / "filler").exists()
        flat = " ".join(said.split())
        told = re.search(
            rf"The disk is full: writing ({re.escape(str(disk))}\S*) failed\.(?: ([\d,]+) bytes were to be written;)? ([\d,]+) bytes are free",
            flat,
        )
        if "Traceback" in said:
            wrong.append("a traceback: " + said[-1500:])
        if code != 3 and not (code == 0 and full):
            wrong.append(f"exit code {code}: {flat[-300:]}")
        if code == 3 and told is None:
            wrong.append(f"no path and bytes in: {flat[-400:]}")
        steps, broken = ({}, []) if not (disk / "run").is_dir() else standing(disk)
        wrong += broken
        (disk / "filler").unlink(missing_ok=True)
        if code != 0:
            code_after, said_after, _ = distil(work, disk, "--resume")
            if code_after != 0:
                wrong.append(f"--resume left with {code_after}: {' '.join(said_after.split())[-600:]}")
        if not wrong and outcome(disk) != expected:
            after = outcome(disk)
            wrong.append(f"other bytes: {sorted(k for k in {*expected, *after} if expected.get(k) != after.get(k))}")
    stopped = told[1] if told else None
    at_name = seen[at] if len(seen) > at else "?"
    return {
        "at": at, "stage": stage_of(at_name) if at_name != "?" else "?", "spare": spare, "code": code,
        "full": stopped and os.path.relpath(stopped, disk),
        "steps": steps, "wrong": wrong,
    }  # fmt: skip


def chosen(rng: random.Random, names: list[str], count: int) -> list[tuple[int, int]]:
    """``(event, spare bytes)``: all stages in turn."""
    by_stage: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        by_stage.setdefault(stage_of(name), []).append(number)
    for numbers in by_stage.values():
        rng.shuffle(numbers)
    picked: list[tuple[int, int]] = []
    while len(picked) < count and any(by_stage.values()):
        for stage in STAGES:
            if by_stage.get(stage) and len(picked) < count:
                picked.append((by_stage[stage].pop(), rng.choice((0, 0, 4096, 8192, 16384))))
    return picked


def run(
    count: int | None = None, seed: int = SEED, export: tuple[str, ...] = ("onnx", "torchscript"), only: int | None = None
) -> dict[str, Any]:
    """``count`` levels over all stages of a run, each on a filesystem of its own."""
    count, rng = COUNT if count is None else count, random.Random(seed)
    about = {"id": "R8", "promise": PROMISE, "seed": seed}
    reason = why_not()
    if reason:
        return {**about, "tried": 0, "held": 0, "details": {"skipped": reason}}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="r8-") as name:
        work, disk = Path(name) / "work", Path(name) / "disk"
        prepare(work, disk, list(export))
        with mounted(disk):
            code, said, names = distil(work, disk)
            assert code == 0, said
            expected = outcome(disk)
        for number, (at, spare) in enumerate(chosen(rng, names, count)):
            if only is not None and number != only:
                continue
            rows.append(level(work, disk, expected, at, spare))
            print(f"R8: {number + 1} of {count}: {names[at]}: {rows[-1]}", file=sys.stderr, flush=True)
    held = [r for r in rows if not r["wrong"]]
    details = {
        "filled at": dict(Counter(r["stage"] for r in rows)),
        "stopped while writing": dict(Counter(stage_of(r["full"]) for r in rows if r["full"])),
        "went through": sum(r["code"] == 0 for r in rows),
        "with a checkpoint to go on from": sum(bool(r["steps"]) for r in rows),
        "writes of a run": len(names),
        "failed": [r for r in rows if r["wrong"]],
    }
    return {**about, "tried": len(rows), "held": len(held), "details": details}


if __name__ == "__main__":
    chosen_only = int(sys.argv[2]) if len(sys.argv) > 2 else None
    with contextlib.redirect_stdout(io.StringIO()):
        found = run(int(sys.argv[1]) if len(sys.argv) > 1 else None, only=chosen_only)
    print(json.dumps(found, indent=2))
