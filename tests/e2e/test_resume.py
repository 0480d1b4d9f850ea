"""A run that is killed at any instant, or asked to leave, goes on and ends in the same bytes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import limbeck as package
from running import NETS, Started, arrays, fork, left_over, limbeck, lines, make_folder, read, recipe, run, start, steps, wait_for, weights

RICH: dict[str, Any] = {
    "teacher": {"model": "python:nets.py:teacher", "train": {"epochs": 2}},
    "student": {"model": "python:nets.py:student", "options": {"dropout": 0.3}},
    "data": {"source": "npz:pictures.npz", "augment": {"crop": 1, "flip": True, "mixup": 0.2}},
    "train": {"epochs": 3, "accumulate": 2, "ema": 0.9, "select": "best", "checkpoint_every": 4},
}
STEPS = 9  # an epoch of 48 rows is 3 steps
TEACHER_STEPS = 6


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, models and a run that nobody disturbed."""
    folder = make_folder(tmp_path_factory.mktemp("resume"))
    run("distill", recipe(folder, **RICH), out=folder / "quiet")
    return folder


def begin(there: Path, out: Path) -> Started:
    return fork("distill", there / "recipe.yaml", "--out", out, said=out.with_suffix(".said"), SLOW="0.05")


def same_as_quiet(there: Path, out: Path) -> None:
    for role in ("teacher", "student", "baseline"):
        assert weights(out / role) == weights(there / "quiet" / role), role
        expected = steps(there / "quiet", role)
        assert steps(out, role) == expected, f"{role}: every step stands in the log once"
    for role in ("teacher", "student", "baseline"):
        assert read(out / "metrics.json")["models"][role]["metrics"] == read(there / "quiet/metrics.json")["models"][role]["metrics"]
    assert (out / "recipe.yaml").read_text() == (there / "quiet/recipe.yaml").read_text()
    assert left_over(out) == []
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("role", ["teacher", "student", "baseline"])
def test_sigterm_in_mid_epoch(there: Path, tmp_path: Path, role: str) -> None:
    out = tmp_path / "run"
    # a process of its own, as a person starts it, for one of them
    process = start("distill", there / "recipe.yaml", "--out", out, SLOW="0.05") if role == "student" else begin(there, out)
    wait_for(process, lambda: len(steps(out, role)) >= 4)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=6000)
    assert process.returncode == 75, said
    assert "after a checkpoint" in said
    assert "Traceback" not in said
    assert not (out / "metrics.json").exists()
    done = steps(out, role)[-1]
    assert 4 <= done < STEPS
    assert done % 3, "the signal was to come in mid-epoch: make SLOW larger"
    if role == "student":
        again = start("distill", "--resume", "--out", out, "--json")
        shown, said = again.communicate(timeout=6000)
        assert again.returncode == 0, said
        assert json.loads(shown) == read(out / "metrics.json")
    else:
        assert limbeck("distill", there / "recipe.yaml", "--resume", "--out", out) == 0
    same_as_quiet(there, out)
    environment = read(out / "environment.json")
    assert environment["resumed_from"] == [done]
    assert environment["resumed"][role] == [done]


@pytest.mark.parametrize("role", ["student", "baseline"])
def test_kill(there: Path, tmp_path: Path, role: str) -> None:
    """SIGKILL leaves no chance to write; what counts is the last checkpoint, and a write that was cut off is no harm."""
    out = tmp_path / "run"
    process = begin(there, out)
    wait_for(process, lambda: len(steps(out, role)) >= 5)
    process.kill()
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL
    with open(out / "log.jsonl", "ab") as f:
        f.write(b'{"role": "' + role.encode() + b'", "step": 99, "lo')  # a line that was not finished
    torn = out / "checkpoints" / role / ".step-00000009.1.tmp"
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"half")
    (out / ".metrics.json.1.tmp").write_text("{")
    assert limbeck("distill", there / "recipe.yaml", "--resume", "--out", out) == 0
    same_as_quiet(there, out)
    expected = {"student": {"student": [4], "baseline": []}, "baseline": {"student": [], "baseline": [4]}}[role]
    assert read(out / "environment.json")["resumed"] == {"teacher": [], **expected}


def test_a_spoiled_checkpoint_is_passed_over(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    process = begin(there, out)
    wait_for(process, lambda: (out / "checkpoints/student/step-00000008").is_dir())
    process.kill()
    process.communicate(timeout=600)
    state = out / "checkpoints/student/step-00000008/state.safetensors"
    raw = bytearray(state.read_bytes())
    raw[-3] ^= 1
    state.write_bytes(raw)
    assert limbeck("distill", there / "recipe.yaml", "--resume", "--out", out) == 0
    assert "step-00000008 is passed over: state.safetensors does not match its sha256" in capsys.readouterr().err
    same_as_quiet(there, out)
    assert read(out / "environment.json")["resumed_from"] == [4]


def test_killed_before_a_checkpoint_it_starts_from_the_beginning(there: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = begin(there, out)
    wait_for(process, lambda: (out / "recipe.yaml").is_file())
    process.kill()
    process.communicate(timeout=600)
    assert limbeck("distill", there / "recipe.yaml", "--resume", "--out", out) == 0
    same_as_quiet(there, out)
    assert read(out / "environment.json")["resumed_from"] == []


def test_resume_of_what_was_never_begun(there: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".recipe.yaml.1.tmp").write_text("task: im")  # killed as early as can be
    for name in ("empty", "absent"):
        assert limbeck("distill", there / "recipe.yaml", "--resume", "--out", tmp_path / name) == 0
        same_as_quiet(there, tmp_path / name)


def test_a_finished_run_says_so(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in (there / "quiet").rglob("*") if p.is_file()}
    assert limbeck("distill", there / "recipe.yaml", "--resume", "--out", there / "quiet") == 0
    assert "is finished; nothing is left to do" in "".join(capsys.readouterr())
    assert limbeck("distill", "--resume", "--out", there / "quiet") == 0
    assert {p: p.stat().st_mtime_ns for p in (there / "quiet").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_recipe_is_refused_with_the_difference(
    there: Path, tmp_path: Path, finished: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = there / "quiet"
    if not finished:
        out = tmp_path / "run"
        process = begin(there, out)
        wait_for(process, lambda: len(steps(out, "student")) >= 4)
        process.kill()
        process.communicate(timeout=600)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    change = ["--set", "train.lr=0.02", "--set", "train.ema=0.5", "--seeds", "3"]
    assert limbeck("distill", there / "recipe.yaml", "--resume", "--out", out, *change) == 2
    said = capsys.readouterr().err
    assert "train.lr: 0.05 -> 0.02" in said
    assert "train.ema: 0.9 -> 0.5" in said
    assert "seeds" in said
    assert "Traceback" not in said
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert limbeck("distill", there / "recipe.yaml", "--out", out) == 2
    assert "--resume" in capsys.readouterr().err


def test_changed_data_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    folder = make_folder(tmp_path)
    process = fork("distill", recipe(folder, train={"checkpoint_every": 1}), "--out", folder / "run", said=folder / "said", SLOW="0.05")
    wait_for(process, lambda: len(steps(folder / "run", "student")) >= 2)
    process.kill()
    process.communicate(timeout=600)
    data = arrays()
    data["train_x"][7, 0, 0] += 1
    np.savez(folder / "pictures.npz", **data)
    assert limbeck("distill", folder / "recipe.yaml", "--resume", "--out", folder / "run") == 2
    assert "the data changed since this run was begun" in capsys.readouterr().err


def test_several_seeds_go_on_where_they_were(there: Path, tmp_path: Path) -> None:
    """Killed in the second seed: the first is not trained again, and --resume alone knows that there are two."""
    file = recipe(there, "two.yaml", train={"checkpoint_every": 1})
    out = tmp_path / "run"
    process = fork("distill", file, "--seeds", "2", "--out", out, said=tmp_path / "said", SLOW="0.05")
    wait_for(process, lambda: len(steps(out / "seed-1", "student")) >= 2)
    process.kill()
    process.communicate(timeout=600)
    first = (out / "seed-0/student/model.safetensors").stat().st_mtime_ns
    assert limbeck("distill", "--resume", "--out", out) == 0
    assert (out / "seed-0/student/model.safetensors").stat().st_mtime_ns == first
    run("distill", file, "--seeds", "2", out=tmp_path / "quiet")
    for part in ("seed-0/student", "seed-0/baseline", "seed-1/student", "seed-1/baseline", "student", "baseline"):
        assert weights(out / part) == weights(tmp_path / "quiet" / part), part
    assert read(out / "metrics.json")["seeds"] == [0, 1]
    assert read(out / "environment.json")["resumed_from"] == read(out / "seed-1/environment.json")["resumed_from"] != []
    assert left_over(out) == []


def test_a_run_from_python_resumes_with_objects(there: Path, tmp_path: Path) -> None:
    """A signal after some steps; the same call with resume=True; then once more on the finished run, and with another learning rate."""
    space: dict[str, Any] = {}
    exec((there / "nets.py").read_text(), space)
    data = arrays()
    splits: dict[str, Any] = {name: (data[f"{name}_x"], data[f"{name}_y"]) for name in ("train", "test", "valid")}

    def call(out: Path, student: Callable[[], Any], **more: Any) -> package.Result:
        how = {"epochs": 2, "batch_size": 16, "precision": "float32", "export": [], "progress": "none", **more}
        return package.distill(teacher=space["teacher"], student=student, out=out, **splits, **how)

    class Leaves(space["Net"]):  # type: ignore[misc]
        """Asks its own process to leave at the fourth step, as a scheduler would."""

        def __init__(self) -> None:
            super().__init__(4, 3)
            self.left = 4

        def forward(self, x: Any) -> Any:
            self.left -= self.training
            if self.left == 0:
                signal.raise_signal(signal.SIGTERM)
            return super().forward(x)

    expected = call(tmp_path / "quiet", space["student"])
    from limbeck.errors import Interrupted, UsageError

    with pytest.raises(Interrupted):
        call(tmp_path / "run", Leaves)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the signal's own handler comes back"

    class Stays(space["Net"]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(4, 3)

    Stays.__name__ = "Leaves"
    for _ in ("resumed", "finished"):
        found = call(tmp_path / "run", Stays, resume=True)
        for name, value in expected.student.state_dict().items():
            assert found.student.state_dict()[name].equal(value), name
        assert not found.student.training
    with pytest.raises(UsageError, match=r"train\.lr"):
        call(tmp_path / "run", Stays, resume=True, lr=0.5)
    assert lines(tmp_path / "run", "student")


VERSIONED = '''

class Versioned(Net):
    """Changed its layout once, and wants to be told which one it is given, as torchvision's MnasNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if local_metadata.get("version") != 2:
            raise ValueError("version should be set to 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


def versioned(num_classes=3):
    return Versioned(4, num_classes)
'''


def test_a_module_that_wants_to_know_its_version(tmp_path: Path) -> None:
    """Wherever its weights are put back: measuring, a checkpoint, an average, the best epoch, evaluation, peers."""
    make_folder(tmp_path)
    (tmp_path / "nets.py").write_text(NETS + VERSIONED)
    model = "python:nets.py:versioned"
    train = {"precision": "auto", "ema": 0.9, "select": "best", "checkpoint_every": 1, "epochs": 3}
    objective = ["cross_entropy", {"loss": "kd"}, {"loss": "mutual"}]
    path = recipe(tmp_path, teacher={"model": model}, student={"model": model, "peers": [model]}, objective=objective, train=train)
    stopped = start("distill", path, "--out", tmp_path / "run", SLOW="0.1")
    wait_for(stopped, lambda: len(steps(tmp_path / "run", "student")) > 2)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate(timeout=300)
    assert stopped.returncode == 75, said
    assert limbeck("distill", path, "--out", tmp_path / "run", "--resume") == 0
    assert limbeck("evaluate", tmp_path / "run") == 0
