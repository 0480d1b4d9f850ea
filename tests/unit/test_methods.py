"""The benchmark of methods: every term that it trains with can be read, and the page is what the results say."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from limbeck.objective import check_terms
from limbeck.recipe import Term

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tracks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/methods"))
    return importlib.import_module("tracks")


def test_every_term_can_be_read(tracks: Any) -> None:
    for name, track in tracks.TRACKS.items():
        methods = tracks.methods_of(track)
        assert len(methods) >= 12, name
        for label, method in methods.items():
            assert check_terms([Term.model_validate(term) for term in method.objective]) == [], (name, label)
            assert len(set(method.weights)) == 3


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tracks: Any) -> Any:
    """benchmarks/methods/__main__.py"""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    spec = importlib.util.spec_from_file_location("methods_script", ROOT / "benchmarks/methods/__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_weights_go_outwards_while_the_best_stands_at_an_end(script: Any) -> None:
    def accuracies(**found: float) -> dict[float, dict[str, float]]:
        return {float(weight[1:]): {"accuracy": accuracy, "nll": 1.0} for weight, accuracy in found.items()}

    assert script.beyond(accuracies(w1=0.5, w4=0.7, w16=0.6)) is None
    assert script.beyond(accuracies(w1=0.5, w4=0.6, w16=0.7)) == 64
    assert script.beyond(accuracies(w100=0.7, w1000=0.6, w10=0.8)) == 1
    level = accuracies(w1=0.7, w4=0.7)
    level[4.0]["nll"] = 0.9
    assert script.best_of(level) == 4, "of two that are level the one with the lower nll, as in `limbeck sweep`"


def test_a_method_is_run_at_the_seeds_that_are_missing_with_its_best_weight(
    script: Any, tracks: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """With a stand-in for the command: accuracy rises with the weight to 8, and falls behind it."""
    asked = []

    def limbeck(command: str, recipe: Path, *arguments: Any) -> None:
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir()
        asked.append((command, out.name))
        if command == "sweep":
            weights = [float(w) for w in arguments[1].partition("=")[2].split(",")]
            rows = [{"name": f"w={w:g}", "validation": {"accuracy": -abs(w - 8), "nll": 1.0}, "student": w} for w in weights]
            (out / "sweep.json").write_text(json.dumps({"rows": rows, "best": "w=?"}))
        else:
            term = yaml.safe_load(recipe.read_text())["objective"][0]
            for seed in (1, 2):
                (out / f"seed-{seed}").mkdir()
                metrics = {"models": {"student": {"metrics": {"accuracy": term["weight"] + seed}}}}
                (out / f"seed-{seed}/metrics.json").write_text(json.dumps(metrics))

    monkeypatch.setattr(script, "limbeck", limbeck)
    method = tracks.Method({"loss": "kd", "temperature": 4.0}, (1.0, 2.0, 4.0), (tracks.CE,))
    found = script.outcome(tmp_path, "kd", method, {"task": "image-classification"}, False)
    assert asked == [("sweep", "kd"), ("sweep", "kd-at-8"), ("sweep", "kd-at-16"), ("distill", "kd-seeds")]
    assert (found["weight"], found["accuracy"]) == (8, [8, 9, 10])
    assert [row["weight"] for row in found["tried"]] == [1, 2, 4, 8, 16]
    assert found["objective"][0] == {"loss": "kd", "temperature": 4.0, "weight": 8.0}


def test_a_method_that_no_track_has_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/methods"), "r52", "--only", "kdd"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "--only: 'kdd'" in done.stderr
    assert "minilm_v2" in done.stderr


def test_the_page_is_what_the_results_say() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/methods"), "--page", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_table_of_what_8_bits_are_worth_is_what_the_results_say() -> None:
    """And no file there lost more than half a point on validation, which is what `--max-drop` allows by itself."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/shrink.py"), "--table", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "benchmarks/results").glob("shrink-*.json")]
    assert {one["name"] for one in found} == {"cifar10", "r8"}
    assert all(one["drop"] <= 0.5 for one in found)
