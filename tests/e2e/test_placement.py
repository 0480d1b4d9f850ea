"""Wherever the teacher sits, a run ends in the bytes of one whose teacher sits beside the student; the next batch is under way while the student
trains; and ranks that only teach end as all others do."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from running import ended, limbeck, make_folder, ranks, read, recipe, run, start, steps, wait_for, weights

NETS = """

def count(name):
    with open(os.environ[name], "ab", buffering=0) as file:
        file.write(b".")


class Counting(Net):
    # a byte for every forward pass
    def forward(self, x):
        if os.environ.get("ASKED"):
            count("ASKED")
        return super().forward(x)


class Waiting(Net):
    # while it trains on a step, it waits until the teacher has begun with the next one
    def forward(self, x):
        if self.training and os.environ.get("ASKED"):
            count("TRAINED")
            wanted = min(os.path.getsize(os.environ["TRAINED"]) + 1, int(os.environ["STEPS"]))
            end = time.monotonic() + 60
            while os.path.getsize(os.environ["ASKED"]) < wanted:
                assert time.monotonic() < end, "the next batch is not under way"
                time.sleep(0.005)
        return super().forward(x)


class Drawing(Net):
    def forward(self, x):
        return super().forward(x) + torch.rand(1)


class Poisoned(Net):
    def forward(self, x):
        count("ASKED")
        out = super().forward(x)
        return out * torch.nan if os.path.getsize(os.environ["ASKED"]) > 5 else out


class Breaking(Net):
    def forward(self, x):
        count("ASKED")
        assert os.path.getsize(os.environ["ASKED"]) < 6, "the teacher has fallen over"
        return super().forward(x)


class Stages(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, width, 3, stride=2, padding=1), nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def staged_teacher(num_classes=3):
    return Stages(7, num_classes)


def staged_student(num_classes=3):
    return Stages(4, num_classes)


def counting(num_classes=3):
    return Counting(12, num_classes)


def waiting(num_classes=3):
    return Waiting(4, num_classes)


def drawing(num_classes=3):
    return Drawing(12, num_classes)


def poisoned(num_classes=3):
    return Poisoned(12, num_classes)


def breaking(num_classes=3):
    return Breaking(12, num_classes)
"""

LAYERS = [
    {"loss": "kd", "weight": 0.5, "temperature": 2.0},
    {"loss": "hint", "weight": 1.0, "student": "norm", "teacher": "norm", "projector": "conv"},
    {"loss": "cross_entropy", "weight": 0.3},
]
# 50 rows in steps of 16: an epoch's last step has 2. Batch statistics, dropout, microbatches, views, a layer: what depends on how a step is cut.
COMMON: dict[str, Any] = {
    "student": {"model": "python:nets.py:student", "options": {"dropout": 0.3}},
    "data": {"augment": {"crop": 1}},
    "train": {"accumulate": 2, "epochs": 3, "checkpoint_every": 2},
    "teacher_cache": {"mode": "off"},
    "objective": LAYERS,
}


# The first stage asks the teacher nothing, the next one for other things than the last, which compares the items of a step. Steps of 15 rows: two
# that train have 8 and 7, which would be cut into 4 and 3.
STAGED: dict[str, Any] = {
    "train": {
        "epochs": None,
        "accumulate": 4,
        "batch_size": 15,
        "checkpoint_every": 2,
        "stages": [
            {"fraction": 0.6, "epochs": 1, "objective": ["cross_entropy"]},
            {"epochs": 1, "objective": LAYERS, "resolution": 6, "lr": 0.02},
            {
                "fraction": 0.8,
                "epochs": 1,
                "objective": [
                    {"loss": "similarity_preserving", "weight": 3.0, "student": "norm", "teacher": "norm"},
                    {"loss": "dist", "weight": 0.5},
                ],
            },
        ],
    },
    "objective": None,
}


def placed(folder: Path, placement: str, name: str = "", **changes: Any) -> Path:
    teacher = {"model": f"python:nets.py:{name or 'teacher'}", "placement": placement}
    return recipe(folder, f"{name}{placement.replace(':', '-')}.yaml", **{**COMMON, "teacher": teacher, **changes})


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and models; runs whose teacher sits beside the student, by one process and by two."""
    folder = make_folder(tmp_path_factory.mktemp("placement"), train=50)
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + NETS)
    path = placed(folder, "same")
    run("distill", path, out=folder / "same-1")
    codes, said = ended(ranks(2, "distill", path, "--out", folder / "same-2", said=folder / "said"))
    assert codes == [0, 0], said
    return folder


def equal(one: Path, other: Path) -> None:
    for role in ("student", "baseline"):
        assert weights(one / role) == weights(other / role), role
    a, b = (read(folder / "metrics.json") for folder in (one, other))
    assert a["models"]["teacher"]["metrics"] == b["models"]["teacher"]["metrics"]
    assert a["models"]["student"]["agreement"] == b["models"]["student"]["agreement"]
    assert [steps(one, role) for role in ("student", "baseline")] == [steps(other, role) for role in ("student", "baseline")]


class TestStages:
    """2 steps without the teacher, 4, 3: what is asked, and how it is cut, is that of the step."""

    @pytest.fixture(scope="class")
    def quiet(self, there: Path) -> Path:
        path = placed(there, "same", **STAGED)
        run("distill", path, out=there / "stages-1")
        codes, said = ended(ranks(2, "distill", path, "--out", there / "stages-2", said=there / "said-stages"))
        assert codes == [0, 0], said
        return there

    def test_on_a_device(self, quiet: Path, tmp_path: Path) -> None:
        assert run("distill", placed(quiet, "device:cpu", **STAGED), out=tmp_path / "run")["cost"]["teacher_items"] >= 50 + 40
        equal(quiet / "stages-1", tmp_path / "run")

    @pytest.mark.parametrize(("teachers", "size"), [(1, 2), (1, 3), (2, 4)])
    def test_on_ranks(self, quiet: Path, tmp_path: Path, teachers: int, size: int) -> None:
        out = tmp_path / "run"
        codes, said = ended(ranks(size, "distill", placed(quiet, f"ranks:{teachers}", **STAGED), "--out", out, said=tmp_path / "said"))
        assert codes == [0] * size, said
        equal(quiet / f"stages-{size - teachers}", out)

    @pytest.mark.parametrize("after", [1, 4, 7])
    def test_stopped_in_any_of_them(self, quiet: Path, tmp_path: Path, after: int) -> None:
        path, out = placed(quiet, "ranks:1", **STAGED), tmp_path / "run"
        processes = ranks(3, "distill", path, "--out", out, said=tmp_path / "said", SLOW="0.05")
        wait_for(processes[0], lambda: len(steps(out, "student")) >= after)
        processes[after % 3].send_signal(signal.SIGTERM)
        codes, said = ended(processes)
        assert codes == [75] * 3, said
        codes, said = ended(ranks(3, "distill", path, "--out", out, "--resume", said=tmp_path / "last"))
        assert codes == [0] * 3, said
        equal(quiet / "stages-2", out)


def test_layers_are_paired_wherever_the_teacher_sits(there: Path, tmp_path: Path) -> None:
    """For that its layers are looked at, by those that never ask it too."""
    terms = [{"loss": "cross_entropy"}, {"loss": "attention_transfer", "weight": 10.0, "layers": "auto"}]
    changes: dict[str, Any] = {"student": {"model": "python:nets.py:staged_student"}, "objective": terms, "baseline": False}
    run("distill", placed(there, "same", "staged_teacher", **changes), out=tmp_path / "same")
    run("distill", placed(there, "device:cpu", "staged_teacher", **changes), out=tmp_path / "device")
    path = placed(there, "ranks:1", "staged_teacher", **changes)
    codes, said = ended(ranks(2, "distill", path, "--out", tmp_path / "ranks", said=tmp_path / "said"))
    assert codes == [0, 0], said
    for other in ("device", "ranks"):
        assert weights(tmp_path / "same/student") == weights(tmp_path / other / "student"), other
        assert "- first\n" in (tmp_path / other / "recipe.yaml").read_text()


class TestDevice:
    def test_the_bytes_are_those_of_a_teacher_beside_the_student(self, there: Path, tmp_path: Path) -> None:
        run("distill", placed(there, "device:cpu"), out=tmp_path / "run")
        equal(there / "same-1", tmp_path / "run")
        assert read(tmp_path / "run/environment.json")["choices"]["teacher_placement"]["value"] == "device:cpu"

    def test_stopped_and_resumed(self, there: Path, tmp_path: Path) -> None:
        path, out = placed(there, "device:cpu"), tmp_path / "run"
        process = start("distill", path, "--out", out, SLOW="0.05")
        wait_for(process, lambda: len(steps(out, "student")) >= 3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=600)
        assert process.returncode == 75
        run("distill", path, "--resume", out=out)
        equal(there / "same-1", out)

    def test_a_teacher_that_draws_is_refused(self, there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Its numbers would come from the generator that the student's dropout is drawn from, at any time."""
        assert limbeck("distill", placed(there, "device:cpu", "drawing", objective=LAYERS[::2]), "--out", tmp_path / "run") == 2
        assert "draws random numbers while it answers" in " ".join(capsys.readouterr().err.split())
        path, out = placed(there, "same", "drawing", objective=LAYERS[::2]), tmp_path / "stopped"
        run("distill", path, out=tmp_path / "same")
        # beside the student what it draws is that of the step, wherever the run goes on
        process = start("distill", path, "--out", out, SLOW="0.05")
        wait_for(process, lambda: len(steps(out, "student")) >= 3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=600)
        run("distill", path, "--resume", out=out)
        equal(tmp_path / "same", out)

    def test_what_is_cached_is_filled_from_there_and_then_it_has_no_effect(
        self, there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cache = {"path": str(tmp_path / "cache"), "views": 1}
        run("train", recipe(there, "train.yaml", teacher=None, student={"model": "python:nets.py:teacher"}), out=tmp_path / "teacher")
        path = recipe(
            there, "cached.yaml", **{**COMMON, "teacher": {"model": f"run:{tmp_path / 'teacher'}", "placement": "device:cpu"}, "teacher_cache": cache}
        )  # fmt: skip
        assert run("distill", path, out=tmp_path / "first")["cost"]["teacher_items"] >= 68
        capsys.readouterr()
        assert run("distill", path, out=tmp_path / "second")["cost"]["teacher_items"] == 0
        assert "teacher.placement has no effect here (device:cpu): the teacher is not loaded" in " ".join(capsys.readouterr().err.split())

    def test_auto_on_a_machine_without_several_devices(self, there: Path, tmp_path: Path) -> None:
        path, out = placed(there, "auto", train={"epochs": 1}, baseline=False), tmp_path / "run"
        run("distill", path, out=out)
        chosen = read(out / "environment.json")["choices"]["teacher_placement"]
        assert chosen == {"value": "same", "reason": "0 CUDA devices for one process that trains on cpu"}
        assert "placement: same" in (out / "recipe.yaml").read_text()
        run("distill", path, "--resume", out=out)


class TestRanks:
    def test_one_process_plans_it_and_cannot_run_it(self, there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = placed(there, "ranks:1")
        assert limbeck("distill", path, "--dry-run", "--json", "--out", tmp_path / "run") == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["choices"]["teacher_placement"]["value"] == "ranks:1"
        assert plan["memory"]["teacher_apart"]
        student, times = plan["memory"]["student"], plan["time"]
        alone = sum(student[f"{name}_bytes"] for name in ("weights", "projections", "gradients", "optimizer", "activations", "copies"))
        assert plan["memory"]["total_bytes"] == alone
        both = (times["student_step_ms"] + times["teacher_step_ms"] + times["loader_batch_with_teacher_ms"]) * 3 * 50 / 16 / 1000
        assert times["live_seconds"] - times["baseline_seconds"] < both
        assert limbeck("distill", path, "--out", tmp_path / "run") == 2
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(("teachers", "size"), [(1, 2), (1, 3), (2, 3), (2, 4)])
    def test_the_bytes_are_those_of_a_teacher_beside_each_student(self, there: Path, tmp_path: Path, teachers: int, size: int) -> None:
        out = tmp_path / "run"
        codes, said = ended(ranks(size, "distill", placed(there, f"ranks:{teachers}"), "--out", out, said=tmp_path / "said"))
        assert codes == [0] * size, said
        equal(there / f"same-{size - teachers}", out)
        assert read(out / "metrics.json")["cost"]["teacher_seconds"] > 0
        environment = read(out / "environment.json")
        assert environment["world_size"] == size
        assert environment["choices"]["teacher_placement"]["value"] == f"ranks:{teachers}"

    def test_the_next_batch_is_under_way_while_the_student_trains(self, there: Path, tmp_path: Path) -> None:
        for name in ("ASKED", "TRAINED"):
            (tmp_path / name).touch()
        path = placed(there, "ranks:1", "counting", student={"model": "python:nets.py:waiting"}, baseline=False, objective=LAYERS[::2],
                      train={**COMMON["train"], "accumulate": 1, "epochs": 3})  # fmt: skip
        files = {name: str(tmp_path / name) for name in ("ASKED", "TRAINED")}
        codes, said = ended(ranks(2, "distill", path, "--out", tmp_path / "run", said=tmp_path / "said", STEPS="12", **files))
        assert codes == [0, 0], said
        assert (tmp_path / "TRAINED").stat().st_size == 12

    @pytest.mark.parametrize(("signalled", "role"), [(0, "student"), (2, "student"), (0, "baseline")])
    def test_a_signal_to_any_rank_stops_all_after_a_checkpoint(self, there: Path, tmp_path: Path, signalled: int, role: str) -> None:
        """The first rank teaches; while the baseline trains, it has nothing else to do."""
        path, out = placed(there, "ranks:1"), tmp_path / "run"
        processes = ranks(3, "distill", path, "--out", out, said=tmp_path / "said", SLOW="0.05")
        wait_for(processes[0], lambda: len(steps(out, role)) >= 3)
        processes[signalled].send_signal(signal.SIGTERM)
        codes, said = ended(processes)
        assert codes == [75] * 3, said
        assert said.count("after a checkpoint") == 1
        assert "Traceback" not in said
        at = steps(out, role)[-1]
        assert at < 12
        # it was asked a step ahead; the last step of an epoch has 2 rows, which one student takes, and the other goes along with 2
        asked = [16, 16, 16, 4] * 3
        assert read(out / "checkpoints/cost.json")["teacher_items"] == sum(asked if role == "baseline" else asked[: at + 1])
        codes, said = ended(ranks(3, "distill", path, "--out", out, "--resume", said=tmp_path / "last"))
        assert codes == [0] * 3, said
        equal(there / "same-2", out)

    @pytest.mark.parametrize("lost", [0, 2])
    def test_a_lost_rank_ends_the_others(self, there: Path, tmp_path: Path, lost: int) -> None:
        path, out = placed(there, "ranks:1"), tmp_path / "run"
        processes = ranks(3, "distill", path, "--out", out, said=tmp_path / "said", SLOW="0.05")
        wait_for(processes[1], lambda: len(steps(out, "student")) >= 3)
        processes[lost].kill()
        codes, said = ended(processes)
        assert [code for rank, code in enumerate(codes) if rank != lost] == [3, 3], said
        assert "was lost, or did not answer" in said
        assert "Traceback" not in said
        codes, said = ended(ranks(3, "distill", path, "--out", out, "--resume", said=tmp_path / "again"))
        assert codes == [0] * 3, said
        equal(there / "same-2", out)

    def test_a_teacher_that_hangs_ends_the_run_by_the_timeout(self, there: Path, tmp_path: Path) -> None:
        """The second of two; the first keeps the store here, which torchrun does by itself."""
        path, out = placed(there, "ranks:2"), tmp_path / "run"
        processes = ranks(3, "distill", path, "--out", out, said=tmp_path / "said", SLOW="0.05", LIMBECK_RANK_TIMEOUT="20")
        wait_for(processes[2], lambda: len(steps(out, "student")) >= 2)
        processes[1].send_signal(signal.SIGSTOP)
        for rank in (0, 2):
            processes[rank].communicate(timeout=300)
        processes[1].kill()
        codes, said = ended(processes)
        assert [codes[0], codes[2]] == [3, 3], said
        assert "did not answer for 20 s" in said

    def test_what_only_the_teacher_sees_ends_all_with_one_message(self, there: Path, tmp_path: Path) -> None:
        """A bug of the teacher's keeps its traceback, on its rank alone; a NaN that it gives is named where it arrives."""
        for name, code, once in (
            ("poisoned", 3, "the teacher's logits has NaN or infinity for samples"),
            ("breaking", 1, "AssertionError: the teacher has fallen over"),
            ("drawing", 2, "teacher: draws random numbers while it answers"),
        ):
            asked = tmp_path / f"asked-{name}"
            asked.touch()
            path = placed(there, "ranks:1", name, objective=LAYERS[::2])
            processes = ranks(3, "distill", path, "--out", tmp_path / name, said=tmp_path / f"said-{name}", ASKED=str(asked))
            codes, said = ended(processes)
            assert codes == [code] * 3, said
            assert said.count(once) == 1
            assert said.count("Traceback") <= (code == 1) * 2  # of one error, which has another one as its cause

    def test_what_cannot_be_is_told_once_and_nothing_is_written(self, there: Path, tmp_path: Path) -> None:
        plain = {"mode": "auto"}
        for size, path, text in (
            (2, placed(there, "ranks:2"), "got 'ranks:2', and there are 2 ranks"),
            (2, placed(there, "ranks:1", teacher_cache=plain, data={"augment": "none"}), "its answers are kept"),
        ):
            said = tmp_path / f"said-{len(list(tmp_path.iterdir()))}"
            codes, told = ended(ranks(size, "distill", path, "--out", tmp_path / "run", said=said))
            assert codes == [2] * size, told
            assert " ".join(told.split()).count(text) == 1
            assert "Traceback" not in told
            assert not (tmp_path / "run").exists()

    def test_peers_learn_beside_it(self, there: Path, tmp_path: Path) -> None:
        """They are trained and measured by ranks that train; the one that teaches goes along to the end."""
        student = {"model": "python:nets.py:student", "peers": ["python:nets.py:student"]}
        objective = [{"loss": "kd"}, {"loss": "kdcl"}, {"loss": "cross_entropy"}]
        changes: dict[str, Any] = {"student": student, "objective": objective, "export": []}
        run("distill", placed(there, "same", **changes), out=tmp_path / "same")
        path = placed(there, "ranks:1", **changes)
        codes, said = ended(ranks(2, "distill", path, "--out", tmp_path / "run", said=tmp_path / "said"))
        assert codes == [0, 0], said
        for role in ("student", "peer-0", "baseline"):
            assert weights(tmp_path / "run" / role) == weights(tmp_path / "same" / role)
        [peer], [other] = (read(tmp_path / name / "metrics.json")["models"]["student"]["peers"] for name in ("run", "same"))
        assert peer["metrics"] == pytest.approx(other["metrics"])
        assert peer["agreement"] == other["agreement"]

    def test_several_seeds_and_a_teacher_that_is_trained_first(self, there: Path, tmp_path: Path) -> None:
        teacher = {"model": "python:nets.py:teacher", "train": {"epochs": 1}, "placement": "ranks:1"}
        path = recipe(there, "seeds.yaml", **{**COMMON, "teacher": teacher})
        codes, said = ended(ranks(2, "distill", path, "--seeds", "2", "--out", tmp_path / "run", said=tmp_path / "said"))
        assert codes == [0, 0], said
        metrics = read(tmp_path / "run/metrics.json")
        assert metrics["seeds"] == [0, 1]
        # 3 epochs of 50 rows for each seed, and the test rows; its own training beside
        assert metrics["cost"]["teacher_items"] >= 2 * 150 + 18

    def test_torchrun_itself(self, there: Path, tmp_path: Path) -> None:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "limbeck")
        process = start("distill", placed(there, "ranks:1"), "--out", tmp_path / "run", "--json", program=launcher)
        shown, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
        assert json.loads(shown) == read(tmp_path / "run/metrics.json")
        equal(there / "same-1", tmp_path / "run")
