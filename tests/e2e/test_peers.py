"""Students that learn together: peers train in the steps of the student, are drawn anew for each seed, and stay behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import limbeck as lib
from limbeck import _roles
from limbeck._begin import peers_of
from limbeck.cli import main
from limbeck.data import load_data
from limbeck.reading import absolute, load_recipe
from running import distance, limbeck, lines, make_folder, read, recipe, run, several, start, steps, wait_for, weights

OBJECTIVE = [{"loss": "cross_entropy"}, {"loss": "mutual"}]
TOGETHER: dict[str, Any] = {
    "teacher": None,
    "student": {"model": "python:nets.py:student", "peers": ["python:nets.py:teacher", "python:nets.py:student"]},
    "objective": OBJECTIVE,
    "train": {"epochs": 3, "checkpoint_every": 2},
}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("peers"))
    run("distill", recipe(folder, **TOGETHER), out=folder / "run")
    return folder


def test_the_student_leaves_alone_and_is_compared_with_itself_alone(there: Path, tmp_path: Path) -> None:
    metrics = read(there / "run/metrics.json")
    assert set(metrics["models"]) == {"student", "baseline"}
    assert metrics["gap_closed"] is None
    assert "against the same student trained on labels alone" in metrics["verdict"]
    assert metrics["cost"]["teacher_items"] == 0
    alone = run("distill", recipe(there, "alone.yaml", **{**TOGETHER, "student": {"model": "python:nets.py:student"}, "objective": None,
                                                          "teacher": {"model": "python:nets.py:teacher"}}), out=tmp_path / "alone")  # fmt: skip
    assert alone["models"]["baseline"]["metrics"] == metrics["models"]["baseline"]["metrics"]
    assert weights(there / "run/baseline") == weights(tmp_path / "alone/baseline")
    assert load_file(there / "run/student/model.safetensors").keys() == load_file(there / "run/baseline/model.safetensors").keys()
    assert {name for line in lines(there / "run", "student") for name in line.get("terms", {})} == {"cross_entropy", "mutual"}
    html = (there / "run/report.html").read_text(encoding="utf-8")
    assert "trained on labels alone" in html


def test_the_peers_are_kept_and_measured(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each by itself, as any model of a run; by another program's arithmetic it is as good as the figures say."""
    told = read(there / "run/metrics.json")["models"]["student"]["peers"]
    assert [peer["model"].rpartition(":")[2] for peer in told] == ["teacher", "student"]
    data = np.load(there / "pictures.npz")
    for number, (peer, width) in enumerate(zip(told, (12, 4), strict=True)):
        folder = there / f"run/peer-{number}"
        module, wanted = lib.load(folder), read(folder / "model.json")["preprocessing"]
        assert peer["parameters"] == sum(p.numel() for p in module.parameters())
        assert load_file(folder / "model.safetensors")["body.weight"].shape[0] == width
        x = (data["test_x"][:, None] / 255 - wanted["mean"][0]) / wanted["std"][0]
        right = module(torch.tensor(x, dtype=torch.float32)).argmax(1).numpy() == data["test_y"]
        assert right.mean() == pytest.approx(peer["metrics"]["accuracy"])
    assert weights(there / "run/peer-1") != weights(there / "run/student")
    html = (there / "run/report.html").read_text(encoding="utf-8")
    assert "The student and its peers" in html
    capsys.readouterr()
    assert limbeck("evaluate", there / "run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"]["peer-1"]["metrics"] == told[1]["metrics"]
    assert found["recorded"]["peer-0"] == told[0]["metrics"]["accuracy"]
    assert limbeck("export", there / "run/peer-0") == 2
    assert "It is a model inside a run, for --teacher and limbeck.load" in " ".join(capsys.readouterr().err.split())
    metrics = run("distill", recipe(there, "taught.yaml"), "--teacher", there / "run/peer-0", out=tmp_path / "taught")
    assert metrics["models"]["teacher"]["metrics"] == told[0]["metrics"]


def test_its_own_recipe_repeats_it(there: Path, tmp_path: Path) -> None:
    again = yaml.safe_load((there / "run/recipe.yaml").read_text())
    assert [peer["model"].rpartition(":")[2] for peer in again["student"]["peers"]] == ["teacher", "student"]
    run("distill", there / "run/recipe.yaml", out=tmp_path / "again")
    for role in ("student", "peer-0", "peer-1"):
        assert weights(there / "run" / role) == weights(tmp_path / "again" / role)


def test_peers_have_initial_weights_of_their_own(there: Path) -> None:
    found, base = load_recipe(there / "recipe.yaml", {}, [], "distill")
    found = absolute(found, base)
    data = load_data(found.data, found.task, base)
    one, other = peers_of(found, data, base, 0), peers_of(found, data, base, 1)
    states = [model.module.state_dict()["body.weight"].numpy().tobytes() for model in (one[1], other[1])]
    from limbeck.models import build_model

    student = build_model(found.student, role="student", data=data, seed=0, base=base)
    states.append(student.module.state_dict()["body.weight"].numpy().tobytes())
    assert len(set(states)) == 3
    assert [sum(p.numel() for p in model.module.parameters()) for model in one] == [24 * width + 3 for width in (12, 4)]


def test_stopped_and_resumed_it_ends_in_the_same_bytes(there: Path, tmp_path: Path) -> None:
    stopped = start("distill", there / "recipe.yaml", "--out", tmp_path / "run", SLOW="0.1")
    wait_for(stopped, lambda: len(steps(tmp_path / "run", "student")) > 3)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=300)
    assert stopped.returncode == 75
    assert limbeck("distill", there / "recipe.yaml", "--out", tmp_path / "run", "--resume") == 0
    for role in ("student", "peer-0", "peer-1", "baseline"):
        assert weights(tmp_path / "run" / role) == weights(there / "run" / role)


def test_stopped_and_resumed_with_views_of_their_own(there: Path, tmp_path: Path) -> None:
    data = {"source": "npz:pictures.npz", "augment": {"crop": 1, "flip": True}}
    path = recipe(there, "views.yaml", **{**TOGETHER, "objective": [{"loss": "cross_entropy"}, {"loss": "kdcl"}], "data": data})
    run("distill", path, "--no-baseline", out=tmp_path / "whole")
    stopped = start("distill", path, "--no-baseline", "--out", tmp_path / "run", SLOW="0.1")
    wait_for(stopped, lambda: len(steps(tmp_path / "run", "student")) > 3)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=300)
    assert stopped.returncode == 75
    assert limbeck("distill", path, "--no-baseline", "--out", tmp_path / "run", "--resume") == 0
    for role in ("student", "peer-0", "peer-1"):
        assert weights(tmp_path / "run" / role) == weights(tmp_path / "whole" / role)


def test_killed_between_the_student_and_its_peers(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _roles.save_model

    def save(model: Any, folder: Path, classes: tuple[str, ...]) -> None:
        if folder.name == "peer-1":
            raise KeyError("killed")
        real(model, folder, classes)

    monkeypatch.setattr(_roles, "save_model", save)
    with pytest.raises(KeyError, match="killed"):
        main(["distill", str(there / "recipe.yaml"), "--out", str(tmp_path / "run")])
    assert (tmp_path / "run/peer-0").is_dir()
    assert not (tmp_path / "run/peer-1").exists()
    monkeypatch.undo()
    assert limbeck("distill", there / "recipe.yaml", "--out", tmp_path / "run", "--resume") == 0
    for role in ("student", "peer-0", "peer-1", "baseline"):
        assert weights(tmp_path / "run" / role) == weights(there / "run" / role)
    peers = [read(run / "metrics.json")["models"]["student"]["peers"] for run in (tmp_path / "run", there / "run")]
    assert [peer["metrics"] for peer in peers[0]] == [peer["metrics"] for peer in peers[1]]


def test_beside_a_teacher_and_in_stages(there: Path, tmp_path: Path) -> None:
    kd = [{"loss": "cross_entropy"}, {"loss": "kd"}]
    stages = [{"epochs": 1, "objective": [*kd, {"loss": "kdcl"}]}, {"epochs": 1, "objective": kd}]
    train = {"epochs": 2, "stages": stages}
    plain = {**TOGETHER, "objective": None, "teacher": {"model": "python:nets.py:teacher"}, "train": train}
    metrics = run("distill", recipe(there, "stages.yaml", **plain), "--seeds", 2, out=tmp_path / "run")
    assert set(metrics["models"]) == {"teacher", "student", "baseline"}
    terms = [set(line["terms"]) for line in lines(tmp_path / "run/seed-0", "student") if "terms" in line]
    assert terms == [{"cross_entropy", "kd", "kdcl"}] * 3 + [{"cross_entropy", "kd"}] * 3
    best = tmp_path / f"run/seed-{metrics['best_seed']}"
    each = [read(tmp_path / f"run/seed-{seed}/metrics.json")["models"]["student"]["peers"] for seed in (0, 1)]
    for number, peer in enumerate(metrics["models"]["student"]["peers"]):
        assert weights(tmp_path / f"run/peer-{number}") == weights(best / f"peer-{number}")
        values = [seed[number]["metrics"]["nll"] for seed in each]
        assert peer["metrics"]["nll"] == pytest.approx(np.mean(values))
        assert peer["metrics_std"]["nll"] == pytest.approx(np.std(values, ddof=1))
        assert values[0] != values[1]


def test_student_and_baseline_have_the_same_budget(there: Path, tmp_path: Path) -> None:
    """A loss at weight 0 teaches nothing: the student is its baseline, on the same labelled rows in the same steps."""
    nothing = [{"loss": "cross_entropy"}, {"loss": "byot", "weight": 0.0, "student": "body"}]
    data = {"source": "npz:pictures.npz", "labelled_limit": 27}
    plain = {**TOGETHER, "student": {"model": "python:nets.py:student"}, "objective": nothing, "data": data}
    run("distill", recipe(there, "nothing.yaml", **plain), out=tmp_path / "run")
    assert weights(tmp_path / "run/student") == weights(tmp_path / "run/baseline")
    assert steps(tmp_path / "run", "student") == steps(tmp_path / "run", "baseline")
    assert read(tmp_path / "run/metrics.json")["data"]["labelled"] == 27


OWN_AVERAGE: dict[str, Any] = {
    "teacher": None,
    "student": {"model": "python:nets.py:student"},
    "objective": [{"loss": "cross_entropy"}, {"loss": "mean_teacher", "weight": {"start": 0, "end": 20, "until": 0.5}, "decay": 0.9}],
    "data": {"source": "npz:pictures.npz", "labelled_limit": 27},
    "train": {"epochs": 3, "checkpoint_every": 2},
}


def test_its_own_average_teaches_unlabelled_samples(there: Path, tmp_path: Path) -> None:
    path = recipe(there, "average.yaml", **OWN_AVERAGE)
    metrics = run("distill", path, out=tmp_path / "run")
    assert set(metrics["models"]) == {"student", "baseline"}
    assert metrics["cost"]["steps"] == 3 * 3  # all 48 rows, and not the 27 with a label
    assert steps(tmp_path / "run", "student") == steps(tmp_path / "run", "baseline")
    told = [line["terms"] for line in lines(tmp_path / "run", "student") if "terms" in line]
    assert told[0]["mean_teacher"] > 0  # dropout and batch statistics alone tell the two apart at first
    assert load_file(tmp_path / "run/student/model.safetensors").keys() == load_file(tmp_path / "run/baseline/model.safetensors").keys()
    stopped = start("distill", path, "--out", tmp_path / "stopped", SLOW="0.2")
    wait_for(stopped, lambda: len(steps(tmp_path / "stopped", "student")) > 3)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=300)
    assert stopped.returncode == 75
    assert limbeck("distill", path, "--out", tmp_path / "stopped", "--resume") == 0
    for role in ("student", "baseline"):
        assert weights(tmp_path / "stopped" / role) == weights(tmp_path / "run" / role)
    assert weights(tmp_path / "run/student") != weights(tmp_path / "run/baseline")


def test_an_average_sees_a_view_of_its_own(there: Path, tmp_path: Path) -> None:
    """In the first step it is the student itself, so whatever tells them apart is the view."""
    model = {"model": "python:nets.py:plain"}
    for name, augment in (("still", "none"), ("moved", {"crop": 1, "flip": True})):
        changes = {"student": model, "data": {**OWN_AVERAGE["data"], "augment": augment}, "train": {"epochs": 1, "precision": "float32"}}
        run("distill", recipe(there, f"{name}.yaml", **{**OWN_AVERAGE, **changes}), "--no-baseline", out=tmp_path / name)
    first = [
        next(line["terms"]["mean_teacher"] for line in lines(tmp_path / name, "student") if "terms" in line) for name in ("still", "moved")
    ]
    assert first[0] == 0 < first[1]


def test_two_stages_move_one_average_once(there: Path, tmp_path: Path) -> None:
    """A stage in the middle changes nothing where both have the same terms."""
    stages = [{"epochs": 1}, {"epochs": 2}]
    whole = recipe(there, "whole.yaml", **OWN_AVERAGE)
    cut = recipe(there, "cut.yaml", **{**OWN_AVERAGE, "train": {**OWN_AVERAGE["train"], "stages": stages}})
    run("distill", whole, "--no-baseline", out=tmp_path / "whole")
    run("distill", cut, "--no-baseline", out=tmp_path / "cut")
    assert weights(tmp_path / "whole/student") == weights(tmp_path / "cut/student")


def test_a_sweep_lends_a_baseline_of_the_same_budget_alone(there: Path, tmp_path: Path) -> None:
    """One loss reads the labelled rows, the other one all of them: their baselines have other steps."""
    plain = {**OWN_AVERAGE, "objective": [{"loss": "cross_entropy"}, {"loss": "byot", "student": "body"}]}
    path = recipe(there, "sweep.yaml", **plain)
    assert (
        limbeck("sweep", path, "--vary", "objective.1={loss: byot, student: body},{loss: mean_teacher}", "--out", tmp_path / "sweep") == 0
    )
    for child in (tmp_path / "sweep/runs").iterdir():
        assert "from" not in read(child / "metrics.json")["models"]["baseline"]
        assert steps(child, "student") == steps(child, "baseline")


def test_a_loss_that_needs_a_teacher_is_refused_beside_one_that_does_not(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = [{"loss": "cross_entropy"}, {"loss": "mean_teacher"}, {"loss": "kd"}, {"loss": "patient", "layers": "auto"}]
    path = recipe(there, "needs.yaml", **{**OWN_AVERAGE, "objective": objective})
    assert limbeck("distill", path, "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "objective.2.loss: kd needs a teacher" in said
    assert "objective.3.loss: patient needs a teacher" in said
    assert not (tmp_path / "run").exists()


def test_unlabelled_tensors_from_python(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32), np.arange(60) % 3
    found = lib.distill(
        student=torch.nn.Linear(4, 3), teacher=None, objective=["cross_entropy", "mean_teacher"], baseline=True, train=(x[:20], y[:20]),
        test=(x[20:30], y[20:30]), unlabelled=x[30:], epochs=1, batch_size=10, export=[], out=tmp_path / "run", progress="none",
    )  # fmt: skip
    assert set(found.metrics["models"]) == {"student", "baseline"}
    assert found.metrics["data"]["train"] > 40


def test_a_plan_without_a_teacher(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(there, "plan.yaml", **OWN_AVERAGE)
    assert limbeck("distill", path, "--out", tmp_path / "run", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["time"]["baseline_seconds"] > 0
    assert plan["steps"] == 9


def test_a_peer_that_reads_other_inputs_is_refused(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers = [{"model": "python:nets.py:student", "options": {"resolution": 12}}]
    path = recipe(there, "other.yaml", **{**TOGETHER, "student": {"model": "python:nets.py:student", "peers": peers}})
    assert limbeck("distill", path, "--out", tmp_path / "run") == 2
    assert "student.peers.0: prepares its inputs in another way" in capsys.readouterr().err
    path = recipe(there, "gone.yaml", **{**TOGETHER, "student": {"model": "python:nets.py:student", "peers": ["python:nets.py:studnet"]}})
    assert limbeck("distill", path, "--out", tmp_path / "run") == 2
    assert "student.peers.0.model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_from_python(there: Path, tmp_path: Path) -> None:
    nets = f"python:{there / 'nets.py'}:student"
    found = lib.distill(
        student={"model": nets, "peers": [nets]}, teacher=None, data=f"npz:{there / 'pictures.npz'}", objective=OBJECTIVE, baseline=True,
        epochs=1, export=[], out=tmp_path / "run", progress="none",
    )  # fmt: skip
    assert set(found.metrics["models"]) == {"student", "baseline"}


@pytest.mark.long
def test_two_ranks_end_in_the_weights_of_one_process(there: Path, tmp_path: Path) -> None:
    plain = "python:nets.py:plain"
    exact = {"optimizer": "sgd", "precision": "float64", "accumulate": 2, "epochs": 2, "batch_size": 16}
    path = recipe(there, "ranks.yaml", **{**TOGETHER, "student": {"model": plain, "peers": [plain]}, "train": exact})
    run("distill", path, out=tmp_path / "alone")
    several(2, "distill", path, out=tmp_path / "two")
    for role in ("student", "peer-0", "baseline"):
        assert distance(tmp_path / "alone" / role, tmp_path / "two" / role) < 1e-9, role
    alone, two = (read(tmp_path / name / "metrics.json")["models"]["student"]["peers"][0]["metrics"] for name in ("alone", "two"))
    assert alone == pytest.approx(two)
    assert json.loads((tmp_path / "two/metrics.json").read_text())["models"].keys() == {"student", "baseline"}
