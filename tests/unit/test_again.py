"""A finished run looked at again: on the data that it was made with, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.again import evaluate_run, export_run
from limbeck.errors import UsageError
from running import arrays, limbeck, make_folder, pictures, read, recipe, run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``one`` (a run) and ``two`` (a run of two seeds), with their data."""
    folder = make_folder(tmp_path_factory.mktemp("again"))
    given = recipe(folder, train={"epochs": 1, "lr": 0.01})
    run("distill", given, out=folder / "one")
    assert limbeck("distill", given, "--seeds", "3", "--out", folder / "two") == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """A copy in which the recipes name the copied data."""
    copied = tmp_path / "copy"
    shutil.copytree(made, copied)
    for path in copied.rglob("recipe.yaml"):
        path.write_text(path.read_text().replace(str(made), str(copied)))
    return copied


def change(folder: Path, **changes: Any) -> None:
    np.savez(folder / "pictures.npz", **{**arrays(), **changes})


def test_a_run_is_measured_and_exported_on_its_data(here: Path) -> None:
    found = evaluate_run(here / "one")
    metrics = read(here / "one" / "metrics.json")["models"]
    assert set(found["models"]) == {"student", "baseline"}
    for role, figures in found["models"].items():
        assert figures["metrics"] == pytest.approx(metrics[role]["metrics"], rel=1e-5)
        assert found["recorded"][role] == metrics[role]["metrics"]["accuracy"]
    assert export_run(here / "one", ["torchscript"])["torchscript"]["agreement"] == 1.0
    assert "torchscript" in read(here / "one" / "metrics.json")["export"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(zip(("test_x", "test_y"), pictures(21, 1), strict=True)), "18 test samples then, 21 now"),
        ({"test_x": pictures(18, 7)[0]}, "their content or their labels"),
        ({"test_y": (pictures(18, 1)[1] + 1) % 3}, "their content or their labels"),
    ],
)
@pytest.mark.parametrize("job", ["evaluate", "export"])
def test_other_data_are_refused(here: Path, job: str, changes: dict[str, Any], said: str) -> None:
    change(here, **changes)
    before = sorted(p.relative_to(here) for p in here.rglob("*"))
    with pytest.raises(UsageError) as caught:
        evaluate_run(here / "one") if job == "evaluate" else export_run(here / "one", ["torchscript"])
    assert "the data changed" in str(caught.value)
    assert said in str(caught.value)
    assert sorted(p.relative_to(here) for p in here.rglob("*")) == before


def test_data_that_cannot_be_compared_are_refused(here: Path) -> None:
    (here / "one" / "environment.json").unlink()
    with pytest.raises(UsageError, match="records no data"):
        evaluate_run(here / "one")
    (here / "two" / "environment.json").write_text("{}")
    with pytest.raises(UsageError, match="records no data"):
        evaluate_run(here / "two")


def test_what_was_recorded_is_of_the_seed_whose_student_is_there(here: Path) -> None:
    path = here / "two" / "metrics.json"
    metrics = read(path)
    best = metrics["best_seed"]
    for number, row in enumerate(metrics["runs"]):
        for role in ("student", "baseline"):
            row[role]["accuracy"] = 0.1 * number + (0.05 if role == "student" else 0.0)
    path.write_text(json.dumps(metrics))
    assert evaluate_run(here / "two")["recorded"] == pytest.approx({"student": 0.1 * best + 0.05, "baseline": 0.1 * best})
    child = evaluate_run(here / "two" / f"seed-{best}")
    assert child["models"]["student"]["metrics"] == evaluate_run(here / "two")["models"]["student"]["metrics"]


def test_the_classes_of_a_file_are_the_students_own(here: Path) -> None:
    about = here / "one" / "student" / "model.json"
    record = json.loads(about.read_text())
    record["classes"] = ["ant", "bee", "cat"]
    about.write_text(json.dumps(record))
    exported = export_run(here / "one", ["onnx"])
    import onnx

    file = onnx.load(here / "one" / exported["onnx"]["file"])
    assert json.loads({p.key: p.value for p in file.metadata_props}["classes"]) == ["ant", "bee", "cat"]
