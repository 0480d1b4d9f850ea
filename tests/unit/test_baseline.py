"""The baseline is fair, and every number is of the model and the split that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import limbeck
from limbeck._folder import matches
from limbeck._results import joint_metrics
from limbeck.errors import UsageError
from limbeck.reading import build_recipe
from support import Big, Small, made, tensors

TRAIN, VALID, TEST = tensors(43), tensors(30, 2), tensors(50, 1)
SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": 0.02, "precision": "float64", "log_every": 1}


def run(out: Path, **changes: Any) -> Any:
    given = {"teacher": made(Big, "teacher"), "train": TRAIN, "valid": VALID, "test": TEST, **SETTINGS, **changes}
    call = limbeck.distill if given["teacher"] is not None else limbeck.train
    if given["teacher"] is None:
        del given["teacher"]
    return call(student=made(Small, "student", dropout=0.2), export=[], progress="none", out=out, **given)


def answers(module: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return module.eval()(x).numpy()


def read_back(folder: Path) -> torch.nn.Module:
    module = made(Small, "student")
    module.load_state_dict(load_file(folder / "model.safetensors"))
    return module


def logged_steps(folder: Path, role: str) -> list[int]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["role"] == role and "loss" in line]


def test_the_baseline_is_what_training_without_a_teacher_gives(tmp_path: Path) -> None:
    run(tmp_path / "distilled")
    run(tmp_path / "trained", teacher=None)
    alone, baseline, student = (
        load_file(tmp_path / p / "model.safetensors") for p in ("trained/student", "distilled/baseline", "distilled/student")
    )
    assert all(torch.equal(alone[name], value) for name, value in baseline.items())
    assert not any(torch.equal(student[name], value) for name, value in baseline.items())


def test_the_baseline_takes_as_many_steps_where_it_has_fewer_rows(tmp_path: Path) -> None:
    run(tmp_path / "run", unlabelled=tensors(70, 5)[0])
    expected = list(range(1, 3 * 15 + 1))  # 113 rows in batches of 8; a last one of a single row is left out only for batch statistics
    assert logged_steps(tmp_path / "run", "student") == expected
    assert logged_steps(tmp_path / "run", "baseline") == expected


def test_every_number_is_of_the_model_and_split_that_it_names(tmp_path: Path) -> None:
    teacher = made(Big, "teacher")
    result = run(tmp_path / "run", teacher=teacher, select="best")
    modules = {"teacher": teacher, "student": read_back(tmp_path / "run/student"), "baseline": read_back(tmp_path / "run/baseline")}
    said = {role: answers(module, TEST[0]).argmax(1) for role, module in modules.items()}
    models = result.metrics["models"]
    for role, module in modules.items():
        logits = torch.from_numpy(answers(module, TEST[0]))
        assert models[role]["metrics"]["accuracy"] == pytest.approx((said[role] == TEST[1].numpy()).mean(), abs=1e-12)
        assert models[role]["metrics"]["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, TEST[1])), rel=1e-6)
    assert models["student"]["metrics"] != models["baseline"]["metrics"]
    for role in ("student", "baseline"):
        assert models[role]["agreement"] == pytest.approx((said[role] == said["teacher"]).mean(), abs=1e-12)
    assert "agreement" not in models["teacher"]
    valid = torch.from_numpy(answers(modules["student"], VALID[0]))
    assert result.metrics["validation"]["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(valid, VALID[1])), rel=1e-9)
    assert result.metrics["validation"]["accuracy"] == pytest.approx(float((valid.argmax(1) == VALID[1]).double().mean()))


def seed_result(seed: int, valid: float, test: float) -> dict[str, Any]:
    models = {
        "teacher": {"metrics": {"accuracy": 0.9}},
        "baseline": {"metrics": {"accuracy": 0.5 + seed / 100}},
        "student": {"metrics": {"accuracy": test}, "agreement": test},
    }
    return {"seeds": [seed], "validation": {"accuracy": valid}, "models": models, "cost": {"peak_rss_bytes": seed, "steps": 10}}


def test_seeds_are_averaged_and_the_best_is_chosen_on_validation() -> None:
    joint, best = joint_metrics([seed_result(0, 0.6, 0.7), seed_result(1, 0.8, 0.6), seed_result(2, 0.7, 0.8)])
    assert best == 1  # though it is the worst on the test split
    assert joint["best_seed"] == 1
    assert joint["seeds"] == [0, 1, 2]
    assert joint["models"]["student"]["metrics"]["accuracy"] == pytest.approx(0.7)
    assert joint["models"]["student"]["metrics_std"]["accuracy"] == pytest.approx(0.1)
    assert joint["models"]["student"]["agreement"] == pytest.approx(0.7)
    assert joint["gap_closed"] == pytest.approx((0.7 - 0.51) / (0.9 - 0.51))
    differences = np.array([0.2, 0.09, 0.28])
    half = 4.303 * differences.std(ddof=1) / np.sqrt(3)
    assert joint["interval"]["student_minus_baseline"] == pytest.approx([differences.mean() - half, differences.mean() + half])
    assert joint["cost"] == {"peak_rss_bytes": 2, "steps": 30}


@pytest.mark.parametrize("changed", ["data", "teacher", "seeds"])
def test_a_run_is_not_resumed_on_something_else(tmp_path: Path, changed: str) -> None:
    plain = {"student": {"model": "python:a.py:B"}, "teacher": {"model": "python:a.py:C"}, "data": {"source": "npz:x.npz"}}
    recipe = build_recipe(plain, command="distill", where="test")
    facts = {"data": "d", "teacher": "t", "seeds": 1}
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "environment.json").write_text(json.dumps({"facts": facts}))
    from limbeck.reading import absolute

    recipe = absolute(recipe, tmp_path)
    found = matches(tmp_path, recipe, facts)
    assert found is not None
    assert found[1]["facts"] == facts
    with pytest.raises(UsageError, match="changed since this run was begun"):
        matches(tmp_path, recipe, {**facts, changed: "other"})
