"""limbeck compare: what counts as a regression, to the last point; a CI job relies on the exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.compare import Allowed, compare
from limbeck.errors import UsageError
from running import limbeck, make_folder, read, recipe, run

Change = Callable[[dict[str, Any], dict[str, Any]], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("compare"))
    run("distill", recipe(folder, train={"epochs": 1, "lr": 0.01}, baseline=False, export=["onnx"]), out=folder / "old")
    return folder / "old"


@pytest.fixture
def changed(made: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """A copy of the run in which something was measured otherwise."""

    def copy(change: Change) -> Path:
        new = tmp_path / "new"
        shutil.copytree(made, new)
        metrics, environment = read(new / "metrics.json"), read(new / "environment.json")
        change(metrics, environment)
        (new / "metrics.json").write_text(json.dumps(metrics))
        (new / "environment.json").write_text(json.dumps(environment))
        return new

    return copy


def student(metrics: dict[str, Any]) -> dict[str, Any]:
    return dict(metrics["models"])["student"]  # type: ignore[no-any-return]


def test_a_run_is_no_worse_than_itself(made: Path) -> None:
    found = compare(made, made)
    assert found["regressions"] == []
    assert [row["what"] for row in found["rows"]] == [
        *("accuracy", "latency p50, ms", "bytes of the weights", "onnx: bytes", "onnx: latency p50, ms"),
    ]
    assert all(row["change"] == 0 for row in found["rows"])


@pytest.mark.parametrize(("drop", "worse"), [(0.004, False), (0.005, False), (0.0051, True), (-0.1, False)])
def test_accuracy_may_fall_by_half_a_point(made: Path, changed: Callable[[Change], Path], drop: float, worse: bool) -> None:
    def fall(metrics: dict[str, Any], _: dict[str, Any]) -> None:
        student(metrics)["metrics"]["accuracy"] -= drop

    found = compare(made, changed(fall))
    assert found["regressions"] == (["accuracy"] if worse else [])
    assert found["rows"][0]["change"] == pytest.approx(-100 * drop)


def test_latency_and_size_have_limits_of_their_own(made: Path, changed: Callable[[Change], Path]) -> None:
    def grow(metrics: dict[str, Any], _: dict[str, Any]) -> None:
        student(metrics)["latency_ms"]["p50"] *= 1.3
        student(metrics)["bytes"] *= 2
        metrics["export"]["onnx"]["bytes"] *= 2

    new = changed(grow)
    assert compare(made, new)["regressions"] == ["latency p50, ms", "bytes of the weights", "onnx: bytes"]
    assert compare(made, new, Allowed(slowdown=31, growth=100))["regressions"] == []
    assert compare(new, made)["regressions"] == []


def test_latencies_of_other_machines_are_not_compared(made: Path, changed: Callable[[Change], Path]) -> None:
    def move(metrics: dict[str, Any], environment: dict[str, Any]) -> None:
        environment["threads"] += 1
        student(metrics)["latency_ms"]["p50"] *= 10

    found = compare(made, changed(move))
    assert found["regressions"] == []
    assert [row["why"] for row in found["rows"] if "latency" in row["what"]] == 2 * ["measured on different machines"]


def test_an_export_that_is_gone_is_a_regression(made: Path, changed: Callable[[Change], Path]) -> None:
    def lose(metrics: dict[str, Any], _: dict[str, Any]) -> None:
        del metrics["export"]["onnx"]

    assert compare(made, changed(lose))["regressions"] == ["onnx"]


def test_other_data_is_said_and_another_task_is_refused(made: Path, changed: Callable[[Change], Path]) -> None:
    def other(metrics: dict[str, Any], environment: dict[str, Any]) -> None:
        environment["facts"]["data"] = "0" * 16

    new = changed(other)
    assert "different data" in compare(made, new)["notes"][0]
    metrics = read(new / "metrics.json")
    (new / "metrics.json").write_text(json.dumps({**metrics, "task": "text-classification"}))
    with pytest.raises(UsageError, match="has the task image-classification, and"):
        compare(made, new)


def test_the_command(made: Path, changed: Callable[[Change], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """0 without a regression, 3 with one, 2 where the question makes no sense; a table, or JSON."""

    def fall(metrics: dict[str, Any], _: dict[str, Any]) -> None:
        student(metrics)["metrics"]["accuracy"] -= 0.02

    new = changed(fall)
    assert limbeck("compare", made, made) == 0
    assert "No regression." in capsys.readouterr().out
    assert code("compare", made, new) == 3
    said = capsys.readouterr().out
    assert "-2.00 points (-0.5)" in said
    assert "Regression: accuracy." in said
    assert code("compare", made, new, "--max-drop", "3") == 0
    capsys.readouterr()
    assert code("compare", made, new, "--json") == 3
    assert json.loads(capsys.readouterr().out)["regressions"] == ["accuracy"]
    assert code("compare", made, new.parent / "nowhere", "--max-drop", "-1") == 2
    said = capsys.readouterr().err
    assert "--max-drop: got '-1'" in said
    assert "no such folder" in said


def code(*arguments: object) -> int:
    try:
        return limbeck(*arguments)
    except SystemExit as left:
        return int(left.code or 0)
