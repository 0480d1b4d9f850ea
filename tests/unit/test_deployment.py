"""The picture of what could be deployed: everything that was measured, the front by its own rule, and areas that are bytes."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_runs
from limbeck.report import _charts, render
from limbeck.report._charts import Bubble, bubbles
from limbeck.report._deployment import deployment
from limbeck.report._read import read_runs

ROLES = {"teacher", "baseline", "student"}


def made(folder: Path, exports: dict[str, Any]) -> Any:
    return read_runs([fake_runs.fake_run(folder / "run", items=200, changes={"export": exports})])[0]


def test_every_measured_file_stands_beside_the_models(tmp_path: Path) -> None:
    exports = fake_runs.deployed(0.8)
    del exports["pt2"]["test"]  # as a run writes it, without an accuracy of its own
    chart = deployment(made(tmp_path, exports))
    assert chart is not None
    rows = {str(row[0]).removesuffix(" ●"): row for row in chart.table.rows}
    assert set(rows) == ROLES | {"onnx", "onnx-int8", "onnx-fp16", "torchscript"}
    assert rows["onnx-int8"][1:4] == ["ONNX Runtime", "79.70\u202f%", "0.220\u202fms"]
    assert [row[1] for row in rows.values()].count("PyTorch") == 3
    assert rows["teacher"][-1] == "–"  # its memory was not measured
    assert all(f">{name}</text>" in chart.svg for name in rows)
    assert "What to deploy" in render([tmp_path / "run"])


def test_the_front_is_what_nothing_beats(tmp_path: Path) -> None:
    exports = fake_runs.deployed(0.8)
    run = made(tmp_path, exports)
    chart = deployment(run)
    assert chart is not None
    known = {n: (r["latency_ms"]["p50"], r["test"]["metrics"]["accuracy"]) for n, r in exports.items()}
    known |= {role: (run.model(role)["latency_ms"]["p50"], run.model(role)["metrics"]["accuracy"]) for role in ROLES}
    best = {a for a, (t, y) in known.items() if all(not (u <= t and z >= y and (u < t or z > y)) for u, z in known.values())}
    assert {str(row[0]).removesuffix(" ●") for row in chart.table.rows if "●" in str(row[0])} == best
    assert "onnx-int8" in best
    assert "pt2" not in best


@pytest.mark.parametrize(("seeds", "said"), [([0], False), ([0, 1, 2], True)])
def test_models_of_several_seeds_are_means_and_files_are_not(seeds: list[int], said: bool, tmp_path: Path) -> None:
    changes = {"export": fake_runs.deployed(0.8), "seeds": seeds}
    chart = deployment(read_runs([fake_runs.fake_run(tmp_path / "run", items=200, changes=changes)])[0])
    assert chart is not None
    assert ("means over the seeds" in chart.reading) is said


def test_areas_are_bytes() -> None:
    dots = [Bubble(name, "s2", x, y, size, name) for name, x, y, size in (("a", 1.0, 0.9, 4e6), ("b", 2.0, 0.8, 1e6), ("c", 3.0, 0.7, 1.0))]
    svg = bubbles(dots, title="t", x_label="x", y_label="y", x_format=str, y_format=str)
    radii = {name: float(r) for r, name in re.findall(r'<circle [^>]*?r="([\d.]+)" class="bubble s2" data-tip="(\w)"', svg)}
    assert radii["a"] ** 2 / radii["b"] ** 2 == pytest.approx(4, rel=0.01)
    assert radii["c"] >= 3  # however small, it is seen


def test_no_picture_without_a_measured_file(tmp_path: Path) -> None:
    run = made(tmp_path, {"onnx": {"file": "export/model.onnx", "bytes": 9, "latency_ms": {"p50": 1.0}}})
    assert deployment(run) is None
    assert "What to deploy" not in render([tmp_path / "run"])


def test_a_quantised_file_alone_brings_its_float32_file(tmp_path: Path) -> None:
    exports = fake_runs.deployed(0.8)
    float32 = {k: exports["onnx"][k] for k in ("sha256", "bytes", "test", "latency_ms", "throughput", "peak_rss_bytes")}
    small = {**exports["onnx-int8"], "quantization": {"float32": float32}}
    chart = deployment(made(tmp_path, {"onnx-int8": small, "onnx-fp16": {**exports["onnx-fp16"], "quantization": {"float32": float32}}}))
    assert chart is not None
    names = [str(row[0]).removesuffix(" ●") for row in chart.table.rows]
    assert sorted(names) == sorted([*ROLES, "onnx", "onnx-fp16", "onnx-int8"])
    both = deployment(made(tmp_path / "both", {"onnx": exports["onnx"], "onnx-int8": small}))
    assert both is not None
    assert [str(row[0]).removesuffix(" ●") for row in both.table.rows].count("onnx") == 1


def test_damaged_records_are_passed_over(tmp_path: Path) -> None:
    exports: dict[str, Any] = {"onnx": "x", "a": {"test": 3}, "b": {"test": {"metrics": {"accuracy": None}}}, **fake_runs.deployed(0.8)}
    exports["pt2"]["latency_ms"] = None
    exports["onnx-fp16"]["bytes"] = "many"
    chart = deployment(made(tmp_path, json.loads(json.dumps(exports))))
    assert chart is not None
    assert len(chart.table.rows) == 6


@pytest.mark.parametrize("seed", range(5))
def test_names_find_a_place_of_their_own(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dots = [Bubble(f"onnx-int{i}", "s2", *rng.random(2), float(rng.random() + 0.01), "tip") for i in range(9)]
    svg = bubbles(dots, title="t", x_label="x", y_label="y", x_format=str, y_format=str)
    places = [(float(x), float(y)) for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="name', svg)]
    assert len(places) == 9
    wide = 7.2 * len("onnx-int0")
    assert all(abs(a[0] - b[0]) >= wide - 1 or abs(a[1] - b[1]) >= 13 for a, b in itertools.combinations(places, 2))
    assert min(x for x, _ in places) - wide / 2 >= _charts.LEFT  # what is written beside the axis stands to the left
