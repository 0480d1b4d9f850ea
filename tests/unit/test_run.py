"""A run's directory: the log and what it is sent to, and what a kill leaves behind."""

from __future__ import annotations

import errno
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from limbeck import run
from limbeck._folder import refuse_taken
from limbeck.errors import DiskFull, UsageError
from limbeck.run import Log, disk_errors, join_logs, read_json, sweep


def line(role: str, step: int, **more: Any) -> dict[str, Any]:
    return {"role": role, "step": step, "loss": float(step), **more}


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(raw) for raw in (folder / "log.jsonl").read_text().splitlines()]


# ---- a full disk


class Full:
    """A log file on a disk that takes ``left`` more bytes."""

    def __init__(self, file: Any, left: int) -> None:
        self.file, self.left = file, left

    def write(self, raw: bytes) -> int:
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = int(self.file.write(bytes(raw)[: self.left]))
        self.left -= taken
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("left", [0, 1, 20])
def test_a_line_that_a_full_disk_does_not_take_is_not_there_in_part(tmp_path: Path, left: int) -> None:
    log = Log(tmp_path, tensorboard=False)
    log.write(line("student", 1))
    log._file = Full(log._file, left)
    with pytest.raises(DiskFull, match=r"writing \S+log.jsonl failed\. \d+ bytes were to be written; [\d,]+ bytes are free"):
        log.write(line("student", 2))
    log.close()  # tries nothing again
    assert [row["step"] for row in read_lines(tmp_path)] == [1]


def test_a_short_write_is_gone_on_with(tmp_path: Path) -> None:
    log = Log(tmp_path, tensorboard=False)

    class Slow(Full):
        def write(self, raw: bytes) -> int:
            return int(self.file.write(bytes(raw)[:7]))

    log._file = Slow(log._file, 0)
    log.write(line("student", 1))
    log.close()
    assert [row["step"] for row in read_lines(tmp_path)] == [1]


class SafetensorError(Exception):
    """As safetensors names its own."""


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x"), SafetensorError("Error while serializing: I/O error: x (os error 28)")],
)
def test_a_full_disk_is_known_however_it_is_told(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DiskFull, match=r"writing \S+x failed\. 1,000 bytes were to be written"), disk_errors(tmp_path / "x", 1000):
        raise error
    for other in (OSError(errno.EACCES, "x"), SafetensorError("invalid header"), ValueError("(os error 28)")):
        with pytest.raises(type(other)), disk_errors(tmp_path):
            raise other


# ---- left-overs

LEFT = [
    ".metrics.json.4711.tmp",
    ".student.4711.tmp/model.safetensors",
    ".student.4711.old.tmp/model.safetensors",
    ".copy.ab3_9xyz.tmp/export/model.onnx",
    "export/.model.onnx.17.tmp/model.onnx",
    "export/.model.onnx.json.17.tmp",
    "seed-1/export/.model.pt.17.tmp/model.pt",
    "checkpoints/student/.step-00000009.1.tmp/state.json",
]
KEPT = ["metrics.json", "student/model.json", ".mine.tmp", "export/.hidden/x.tmp", "notes.1.tmp"]


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_what_a_kill_left_is_swept_everywhere_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fill(run, [*LEFT, *KEPT])
    fill(tmp_path, ["elsewhere/kept", "elsewhere/.a.1.tmp"])
    (run / "link").symlink_to(tmp_path / "elsewhere")
    (run / ".link.5.tmp").symlink_to(tmp_path / "elsewhere")
    sweep(run)
    assert sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and not p.is_symlink()) == sorted(KEPT)
    assert (tmp_path / "elsewhere/kept").exists()
    assert (tmp_path / "elsewhere/.a.1.tmp").exists()
    assert not (run / ".link.5.tmp").is_symlink()
    sweep(tmp_path / "absent")


def test_a_folder_of_left_overs_is_empty(tmp_path: Path) -> None:
    fill(tmp_path, [name for name in LEFT if name.startswith(".")])
    refuse_taken(tmp_path, resume=False)
    refuse_taken(tmp_path, resume=True)
    fill(tmp_path, [".mine.tmp"])  # somebody's own
    with pytest.raises(UsageError, match="not empty"):
        refuse_taken(tmp_path, resume=False)


# ---- the log of several seeds


def test_the_parents_log_keeps_its_own_lines_in_front_of_the_childs(tmp_path: Path) -> None:
    parent, child = tmp_path, tmp_path / "seed-1"
    child.mkdir()
    for folder, roles in ((parent, ["teacher"]), (child, ["student", "baseline"])):
        log = Log(folder, tensorboard=False)
        for role in roles:
            for step in (1, 2):
                log.write(line(role, step))
        log.close()
    with open(parent / "log.jsonl", "ab") as f:
        f.write(b'{"role": "teacher", "st')  # a line that was not finished
    expected = [(role, step) for role in ("teacher", "student", "baseline") for step in (1, 2)]
    for _ in range(2):  # a run that is resumed after it comes here again
        join_logs(parent, child)
        assert [(found["role"], found["step"]) for found in read_lines(parent)] == expected
    (parent / "log.jsonl").unlink()
    join_logs(parent, child)
    assert (parent / "log.jsonl").read_bytes() == (child / "log.jsonl").read_bytes()


# ---- TensorBoard


def board(folder: Path, role: str) -> dict[str, list[int]]:
    """Tag -> steps, as TensorBoard shows them."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(folder / "tensorboard" / role))
    found.Reload()
    return {tag: [event.step for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_no_step_stands_twice_on_the_board_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log = Log(tmp_path)
    for step in (1, 2, 3, 4):
        log.write(line("student", step, terms={"kd": 0.5}))
    for step in (1, 2):
        log.write(line("baseline", step))
    log.write({"role": "baseline", "step": 2, "checkpoint": True})
    offset = log.offset
    for step in (3, 4):
        log.write(line("baseline", step))
    log.close()

    log = Log(tmp_path)  # resumed from a checkpoint of the baseline; the student was finished
    log.cut(offset)
    log.write({"role": "baseline", "step": 2, "resumed_from": 2})
    for step in (3, 4, 5):
        log.write(line("baseline", step))
    log.close()
    assert board(tmp_path, "student") == {"loss": [1, 2, 3, 4], "terms/kd": [1, 2, 3, 4]}
    assert board(tmp_path, "baseline") == {"loss": [1, 2, 3, 4, 5]}

    log = Log(tmp_path)  # no checkpoint held: the baseline begins anew
    log.cut_role("baseline")
    for step in (1, 2):
        log.write(line("baseline", step))
    log.close()
    assert board(tmp_path, "baseline") == {"loss": [1, 2]}
    assert board(tmp_path, "student")["loss"] == [1, 2, 3, 4]
    assert [found["step"] for found in read_lines(tmp_path)] == [1, 2, 3, 4, 1, 2]


# ---- W&B and MLflow, neither of which is installed here


class FakeWandb(ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.sessions: list[dict[str, Any]] = []

    def init(self, **given: Any) -> Any:
        session = {"given": given, "lines": [], "exit_code": None}
        self.sessions.append(session)

        class Run:
            id = given["id"]

            def define_metric(self, *names: str, **how: Any) -> None:
                pass

            def log(self, values: dict[str, float]) -> None:
                assert session["exit_code"] is None
                session["lines"].append(values)

            def finish(self, exit_code: int = 0) -> None:
                assert session["exit_code"] is None
                session["exit_code"] = exit_code

        return Run()


class FakeMlflow(ModuleType):
    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: dict[str, dict[str, Any]] = {}
        outer = self

        class Metric:
            def __init__(self, key: str, value: float, timestamp: int, step: int) -> None:
                self.key, self.value, self.step = key, value, step

        class Client:
            def get_experiment_by_name(self, name: str) -> None:
                return None

            def create_experiment(self, name: str) -> str:
                return "7"

            def create_run(self, experiment_id: str, run_name: str) -> Any:
                run: Any = ModuleType("run")
                run.info = ModuleType("info")
                run.info.run_id = f"run{len(outer.runs)}"
                outer.runs[run.info.run_id] = {"name": run_name, "steps": [], "status": ["RUNNING"]}
                return run

            def update_run(self, run_id: str, status: str) -> None:
                outer.runs[run_id]["status"].append(status)

            def log_dict(self, run_id: str, dictionary: dict[str, Any], file: str) -> None:
                outer.runs[run_id][file] = dictionary

            def log_batch(self, run_id: str, metrics: list[Metric]) -> None:
                assert outer.runs[run_id]["status"][-1] == "RUNNING"
                outer.runs[run_id]["steps"] += [(m.key, m.step) for m in metrics]

            def set_terminated(self, run_id: str, status: str) -> None:
                outer.runs[run_id]["status"].append(status)

        self.MlflowClient = Client
        self.entities = ModuleType("mlflow.entities")
        self.entities.Metric = Metric  # type: ignore[attr-defined]


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeWandb, FakeMlflow]:
    wandb, mlflow = FakeWandb(), FakeMlflow()
    for module in (wandb, mlflow, mlflow.entities):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return wandb, mlflow


def tracked(folder: Path, steps: list[int], error: Exception | None = None) -> None:
    folder.mkdir(exist_ok=True)
    log = Log(folder, tensorboard=False)
    try:
        log.track(["wandb", "mlflow"], folder, {"seed": 0})
        for step in steps:
            log.write(line("student", step))
        log.write({"role": "student", "step": steps[-1], "checkpoint": True})
        if error is not None:
            raise error
    finally:
        log.close()


def test_each_seed_has_its_own_session_that_ends_and_is_continued(tmp_path: Path, trackers: tuple[FakeWandb, FakeMlflow]) -> None:
    wandb, mlflow = trackers
    tracked(tmp_path / "seed-0", [1, 2])
    with pytest.raises(ZeroDivisionError):
        tracked(tmp_path / "seed-1", [1], ZeroDivisionError())
    tracked(tmp_path / "seed-1", [2, 3])
    first, broken, again = wandb.sessions
    assert [s["exit_code"] for s in wandb.sessions] == [0, 1, 0]
    assert first["given"]["id"] != broken["given"]["id"] == again["given"]["id"]
    assert {(s["given"]["resume"], s["given"]["reinit"]) for s in wandb.sessions} == {("allow", "create_new")}
    assert [found["limbeck_step"] for found in again["lines"]] == [2, 3]
    assert list(mlflow.runs) == ["run0", "run1"]
    assert [r["name"] for r in mlflow.runs.values()] == ["seed-0", "seed-1"]
    assert mlflow.runs["run0"]["status"] == ["RUNNING", "FINISHED"]
    assert mlflow.runs["run1"]["status"] == ["RUNNING", "FAILED", "RUNNING", "FINISHED"]
    assert mlflow.runs["run1"]["steps"] == [("student.loss", 1), ("student.loss", 2), ("student.loss", 3)]
    assert read_json(tmp_path / "seed-1/trackers.json") == {"wandb": again["given"]["id"], "mlflow": "run1"}
    # another run under the same path is another run
    (tmp_path / "seed-0/trackers.json").unlink()
    tracked(tmp_path / "seed-0", [1])
    assert wandb.sessions[3]["given"]["id"] != first["given"]["id"]


def test_a_tracker_that_fails_leaves_none_open(tmp_path: Path, trackers: tuple[FakeWandb, FakeMlflow]) -> None:
    wandb, mlflow = trackers
    mlflow.MlflowClient.create_run = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        tracked(tmp_path, [1])
    assert [s["exit_code"] for s in wandb.sessions] == [1]


@pytest.mark.parametrize(
    ("error", "told"), [(OSError(errno.ENOSPC, "No space left on device"), False), (OSError(errno.EIO, "broken"), True)]
)
def test_a_full_disk_is_told_once_and_not_by_the_boards_thread(
    error: OSError, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises what it keeps for the next who writes to the board, and a thread's exception is printed."""
    module = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    run._say_once.cache_clear()
    Log(tmp_path).close()

    class Full:
        def write(self, data: bytes) -> None:
            raise error

        flush = close = write

    waiting: queue.Queue[bytes] = queue.Queue()
    waiting.put(b"event")
    thread = module._AsyncWriterThread(waiting, Full(), 120)
    thread.start()
    thread.join(30)
    assert thread.exception is error
    assert ("Traceback" in capsys.readouterr().err) == told


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="this system has no /proc")
def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    """As getrusage would have it: a notebook that holds 1 GB and starts a small run."""
    code = "from limbeck.progress import peak_rss_bytes\nprint(peak_rss_bytes())"
    large = f"import subprocess, sys\nheld = bytearray(2**30)\nsubprocess.run([sys.executable, '-c', {code!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, check=True, timeout=120)
    assert 2**20 < int(done.stdout) < 2**30
