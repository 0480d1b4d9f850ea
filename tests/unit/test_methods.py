"""The benchmark of methods: every term that it trains with can be read, and the page is what the results say."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
