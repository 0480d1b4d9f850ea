"""Stages of one run, from the command line: stopped in any of them, on several ranks, with a cache, and in the plan."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.data import nested
from limbeck.reading import recipe_from_yaml
from running import distance, ended, fork, limbeck, lines, make_folder, ranks, read, recipe, run, several, steps, wait_for, weights

STAGES: list[dict[str, Any]] = [
    {"fraction": 0.4, "epochs": 2, "objective": ["cross_entropy"], "resolution": 6},
    {"fraction": 0.7, "epochs": 1, "lr": 0.02},
    {"epochs": 1, "objective": [{"loss": "kd", "temperature": 2.0}]},
]
# 48 rows: 19 in 2 steps, 34 in 3, 48 in 3
DENSE = """

def wide(num_classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 11), nn.Tanh(), nn.Linear(11, num_classes))
"""
RICH: dict[str, Any] = {
    "student": {"model": "python:nets.py:student", "options": {"dropout": 0.3}},
    "data": {"source": "npz:pictures.npz", "augment": {"crop": 1, "flip": True}},
    "train": {"epochs": None, "stages": STAGES, "accumulate": 2, "ema": 0.9, "checkpoint_every": 3},
}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, models and a run that nobody disturbed."""
    folder = make_folder(tmp_path_factory.mktemp("stages"))
    run("distill", recipe(folder, **RICH), out=folder / "quiet")
    return folder


def test_student_and_baseline_go_through_the_same_stages(there: Path) -> None:
    found = {}
    for role in ("student", "baseline"):
        logged = [line for line in lines(there / "quiet", role) if "loss" in line]
        found[role] = [(line["step"], line["stage"], line["epoch"], line["lr"]) for line in logged]
        assert [line["stage"] for line in logged] == [0] * 4 + [1] * 3 + [2] * 3
        assert [line["stage"] for line in lines(there / "quiet", role) if "valid" in line] == [0, 0, 1, 2]
    assert found["student"] == found["baseline"]
    terms = [set(line["terms"]) for line in lines(there / "quiet", "student") if "loss" in line]
    assert terms == [{"cross_entropy"}] * 4 + [{"kd", "cross_entropy"}] * 3 + [{"kd"}] * 3
    assert all(set(line["terms"]) == {"cross_entropy"} for line in lines(there / "quiet", "baseline") if "loss" in line)
    assert recipe_from_yaml(there / "quiet/recipe.yaml").train.epochs == 4


@pytest.mark.parametrize(
    ("role", "after", "how"), [("student", 5, signal.SIGTERM), ("student", 8, signal.SIGKILL), ("baseline", 3, signal.SIGTERM)]
)
def test_stopped_in_any_stage_it_ends_in_the_same_bytes(there: Path, tmp_path: Path, role: str, after: int, how: signal.Signals) -> None:
    out = tmp_path / "run"
    process = fork("distill", there / "recipe.yaml", "--out", out, said=tmp_path / "said", SLOW="0.05")
    wait_for(process, lambda: len(steps(out, role)) >= after)
    process.send_signal(how)
    _, said = process.communicate(timeout=600)
    assert process.returncode == (75 if how == signal.SIGTERM else -how), said
    assert limbeck("distill", there / "recipe.yaml", "--resume", "--out", out) == 0
    assert len(read(out / "environment.json")["resumed"][role]) == 1
    for part in ("student", "baseline"):
        assert weights(out / part) == weights(there / "quiet" / part), part
        assert steps(out, part) == steps(there / "quiet", part) == list(range(1, 11))
    assert (out / "recipe.yaml").read_text() == (there / "quiet/recipe.yaml").read_text()


def test_another_stage_is_another_recipe(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = [{**STAGES[0], "fraction": 0.5}, *STAGES[1:]]
    other = recipe(there, "other.yaml", **{**RICH, "train": {**RICH["train"], "stages": changed}})
    assert limbeck("distill", other, "--resume", "--out", there / "quiet") == 2
    assert "train.stages.0.fraction: 0.4 -> 0.5" in capsys.readouterr().err


def test_two_ranks_end_in_the_weights_of_one_process(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, train=50)
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + DENSE)
    hint = {"loss": "hint", "student": "1", "teacher": "1", "projector": "linear"}
    stages = [{"fraction": 0.5, "epochs": 1, "objective": ["cross_entropy"]}, {"epochs": 1, "lr": 0.1}, {"epochs": 1, "objective": [hint]}]
    path = recipe(
        folder,
        teacher={"model": "python:nets.py:wide"},
        student={"model": "python:nets.py:plain"},
        train={
            "epochs": None,
            "stages": stages,
            "optimizer": "sgd",
            "precision": "float64",
            "accumulate": 2,
            "checkpoint_every": 2,
        },
        data={"source": "npz:pictures.npz", "augment": {"crop": 1, "flip": True}, "labelled_limit": 29},
    )
    run("distill", path, out=tmp_path / "alone")
    several(2, "distill", path, out=tmp_path / "two")
    for role in ("student", "baseline"):
        assert distance(tmp_path / "alone" / role, tmp_path / "two" / role) < 1e-9, role
    out = tmp_path / "stopped"
    processes = ranks(2, "distill", path, "--out", out, said=tmp_path / "said", SLOW="0.05")
    wait_for(processes[0], lambda: len(steps(out, "student")) >= 4)
    processes[1].send_signal(signal.SIGTERM)
    assert ended(processes)[0] == [75, 75]
    several(2, "distill", path, "--resume", out=out)
    for role in ("student", "baseline"):
        assert weights(out / role) == weights(tmp_path / "two" / role)


def test_the_cache_is_asked_for_what_the_stages_need(there: Path, tmp_path: Path) -> None:
    """And answers as the teacher in the loop does, which sees images of its own size in every stage."""
    run("train", recipe(there, "train.yaml", teacher=None, student={"model": "python:nets.py:teacher"}), out=there / "teacher")
    changes = {**RICH, "teacher": {"model": "run:teacher"}, "baseline": False}
    stages = [{**stage, "resolution": 6, "fraction": share} for stage, share in zip(STAGES, (0.4, 0.7, 0.5), strict=True)]
    # SGD: Adam divides the last bits, in which a teacher's answers differ with the batch they are in, by themselves.
    changes["train"] = {**RICH["train"], "stages": stages, "optimizer": "sgd", "lr": 0.1}
    cache = {"path": str(tmp_path / "cache"), "views": 3, "codec": "float32"}
    kept = run("distill", recipe(there, "kept.yaml", **changes, teacher_cache=cache), out=tmp_path / "kept")
    # epoch 2 reads 34 rows under view 2, epoch 3 reads 24 under view 0; and 18 test rows
    assert kept["cost"]["teacher_items"] - 18 >= 34 + 24
    assert kept["cost"]["cache_hits"] == 34 + 24
    live = run("distill", recipe(there, "live.yaml", **changes, teacher_cache={"mode": "off", "views": 3}), out=tmp_path / "live")
    assert live["cost"]["teacher_items"] >= 34 + 24
    assert distance(tmp_path / "kept/student", tmp_path / "live/student") < 1e-5
    again = run("distill", recipe(there, "kept.yaml", **changes, teacher_cache={**cache, "mode": "require"}), out=tmp_path / "again")
    assert again["cost"]["teacher_items"] == 0
    assert weights(tmp_path / "again/student") == weights(tmp_path / "kept/student")
    from limbeck.cache import Reader

    [folder] = [p.parent for p in (tmp_path / "cache").glob("*/manifest.json") if '"teach"' in p.read_text()]
    from limbeck.data import load_data

    found = recipe_from_yaml(tmp_path / "kept/recipe.yaml")
    ids = load_data(found.data, found.task, there).train.ids
    reader = Reader(folder)
    for view, share in ((0, 0.5), (1, 0.0), (2, 0.7)):
        wanted = np.zeros(len(ids), dtype=bool)
        wanted[nested(ids, share, 0) if share else []] = True
        assert reader.has(ids, view).tolist() == wanted.tolist()


def test_the_plan_tells_the_stages(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert limbeck("distill", there / "recipe.yaml", "--dry-run", "--json", "--out", there / "nothing") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["epochs"], found["steps"]) == (4, 10)
    rows = [(s["epochs"], s["rows"], s["steps"], s["lr"], s["resolution"]) for s in found["stages"]]
    assert rows == [(2, 19, 4, 0.05, 6), (1, 34, 3, 0.02, None), (1, 48, 3, 0.05, None)]
    assert [[t["loss"] for t in s["objective"]] for s in found["stages"]] == [["cross_entropy"], ["kd", "cross_entropy"], ["kd"]]
    assert limbeck("distill", there / "recipe.yaml", "--dry-run", "--out", there / "nothing") == 0
    said = capsys.readouterr().err
    assert "Plan: 4 epochs, 10 steps of 16 samples" in said
    assert "2 epochs of         19 rows" in said
    assert "resolution 6; cross_entropy" in said
    assert not (there / "nothing").exists()


def test_a_size_that_the_student_cannot_read_is_refused(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {**RICH, "student": {"model": "python:nets.py:plain"}}
    assert limbeck("distill", recipe(there, "plain.yaml", **changes), "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "train.stages.0.resolution: the model cannot read inputs of this data (image (2, 1, 6, 6))" in said
    assert not (tmp_path / "run").exists()


def test_a_sweep_trains_one_baseline_for_objectives_of_stages(there: Path, tmp_path: Path) -> None:
    vary = ("--vary", "train.stages.2.objective.0.temperature=1,3")
    run("sweep", there / "recipe.yaml", *vary, out=tmp_path / "sweep")
    rows = read(tmp_path / "sweep/sweep.json")["rows"]
    lent = [read(tmp_path / "sweep" / row["folder"] / "metrics.json")["models"]["baseline"].get("from") for row in rows]
    assert sum(value is not None for value in lent) == 1
