"""The plan of a run: nothing is written, and every number that does not depend on the machine is the one that a person works out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from limbeck import _begin, spine
from limbeck._planner import Balance, _batches, _saved, balance, ceiling, overlapped
from limbeck.data import Request
from limbeck.models import state_hash
from limbeck.progress import Progress
from limbeck.reading import build_recipe
from running import digest, limbeck, make_folder, recipe

WEIGHTS = 4 * 9 + 4 + 2 * 4 + 4 * 4 * 3 + 3
"""Of the student in running.NETS: a convolution, a norm and a head."""

TENSORS = 6
BUFFERS = 4 * (4 + 4) + 8
"""Bytes: mean and variance of 4 channels, and a count."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "given")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where answers would be kept; it does not exist."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "answers"))
    return tmp_path / "answers"


@pytest.fixture
def planned(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """``planned(options, **changes of the recipe)``: the plan; the data's folder and everything beside it stays as it is.

    On the CPU, where bytes are counted: CUDA's allocator hands out blocks of 512."""

    def plan(*options: Any, command: str = "distill", before: set[Path] | None = None, **changes: Any) -> dict[str, Any]:
        path = recipe(folder, **{**changes, "train": {"device": "cpu", **changes.get("train", {})}})
        there = {p: p.stat().st_mtime_ns for p in folder.parent.rglob("*") if "__pycache__" not in p.parts}
        capsys.readouterr()
        code = limbeck(command, path, "--dry-run", "--json", "--out", folder.parent / "out", *options)
        said = capsys.readouterr()
        assert code == 0, said.err
        assert {p: p.stat().st_mtime_ns for p in folder.parent.rglob("*") if "__pycache__" not in p.parts} == there
        found: dict[str, Any] = json.loads(said.out)
        return {**found, "said": said.err}

    yield plan
    assert not (folder.parent / "out").exists()


FLIPPED = {"source": "npz:pictures.npz", "augment": {"flip": True}}


class TestFormulas:
    def test_a_teacher_that_answers_meanwhile_leaves_less_to_gain(self) -> None:
        """8 epochs of the longer of 1 and 3 seconds, against 8 of 1 and 2 of 3."""
        assert ceiling(1.0, 3.0, passes=8, views=2, apart=True) == pytest.approx(24 / 14)

    @pytest.mark.parametrize(
        ("student", "teacher", "passes", "views", "expected"),
        [
            (1.0, 3.0, 10, 1, 40 / 13),
            (1.0, 3.0, 10, 4, 40 / 22),
            (1.0, 3.0, 4, 4, 1.0),
            (1.0, 3.0, 2, 4, 1.0),  # views that no epoch reaches are not asked for
            (1.0, 3.0, 3 * 10, 4, 120 / 42),  # three seeds
            (2.0, 0.0, 10, 1, 1.0),
            (0.0, 2.0, 10, 2, 5.0),
            (0.0, 0.0, 10, 1, None),
        ],
    )
    def test_ceiling(self, student: float, teacher: float, passes: int, views: int, expected: float | None) -> None:
        assert ceiling(student, teacher, passes=passes, views=views) == (expected if expected is None else pytest.approx(expected))

    @pytest.mark.parametrize(
        ("live", "cached", "fill", "passes", "expected"),
        [
            (4.0, 1.0, 3.0, 10, Balance(40.0, 13.0, 1)),  # one view
            (4.0, 1.0, 12.0, 10, Balance(40.0, 22.0, 4)),
            (4.0, 1.0, 12.0, 4, Balance(16.0, 16.0, 4)),  # as many views as epochs
            (4.0, 1.0, 12.0, 3, Balance(12.0, 15.0, None)),  # more
            (4.0, 1.0, 4.5, 10, Balance(40.0, 14.5, 2)),  # half of the rows of three views are there
            (4.0, 1.0, 0.0, 10, Balance(40.0, 10.0, 0)),  # all are
            (1.0, 1.0, 0.0, 10, Balance(10.0, 10.0, None)),  # a teacher that takes no time
            (1.0, 1.0, 2.0, 10, Balance(10.0, 12.0, None)),
            (4.0, 1.0, 12.0, 2 * 3, Balance(24.0, 18.0, 4)),  # two seeds of three epochs
            (0.4, 0.1, 0.9, 5, Balance(2.0, 1.4, 3)),  # 0.9 / (0.4 - 0.1) is a hair above 3
        ],
    )
    def test_balance(self, live: float, cached: float, fill: float, passes: int, expected: Balance) -> None:
        found = balance(live, cached, fill=fill, passes=passes)
        assert (found.live_seconds, found.cached_seconds) == pytest.approx((expected.live_seconds, expected.cached_seconds))
        assert found.break_even_epoch == expected.break_even_epoch

    @pytest.mark.parametrize(
        ("compute", "loader", "how", "expected"),
        [
            (1.0, 0.2, {"workers": 0, "threads": 2, "cores": 2}, 1.1),  # they share the processors
            (1.0, 0.2, {"workers": 0, "threads": 1, "cores": 2}, 1.0),  # one is free
            (1.0, 0.2, {"workers": 0, "threads": 0, "cores": 2}, 1.0),  # on a GPU
            (1.0, 6.0, {"workers": 0, "threads": 0, "cores": 8}, 6.0),  # the loader is what one waits for
            (1.0, 6.0, {"workers": 3, "threads": 0, "cores": 8}, 2.0),
            (1.0, 6.0, {"workers": 3, "threads": 0, "cores": 2}, 3.0),  # on fewer processors than it has workers
        ],
    )
    def test_overlapped(self, compute: float, loader: float, how: dict[str, int], expected: float) -> None:
        assert overlapped(compute, loader, **how) == pytest.approx(expected)


class TestMemory:
    @pytest.mark.parametrize(
        ("train", "expected"),
        [
            ({"optimizer": "adamw"}, 2 * 4 * WEIGHTS + 4 * TENSORS),  # two moments, and a count for each tensor
            ({"optimizer": "adam"}, 2 * 4 * WEIGHTS + 4 * TENSORS),
            ({"optimizer": "sgd", "momentum": 0.9}, 4 * WEIGHTS),
            ({"optimizer": "sgd", "momentum": 0.0, "nesterov": None}, 0),
            ({"optimizer": "adamw", "precision": "bf16"}, 2 * 4 * WEIGHTS + 4 * TENSORS),
        ],
    )
    def test_parameters_gradients_and_the_optimisers_state(self, planned: Any, train: dict[str, Any], expected: int) -> None:
        given = {k: v for k, v in train.items() if v is not None}
        found = planned(train=given)["memory"]["student"]
        assert found["weights_bytes"] == 4 * WEIGHTS + BUFFERS
        assert found["gradients_bytes"] == 4 * WEIGHTS
        assert found["optimizer_bytes"] == expected
        assert found["activations_bytes"] > 16 * 4 * 8 * 8 * 4  # at least what the convolution gives, in float32

    def test_float64_takes_twice_as_much(self, planned: Any) -> None:
        found = planned(train={"precision": "float64"})["memory"]["student"]
        assert found["gradients_bytes"] == 8 * WEIGHTS

    def test_microbatches_take_less(self, planned: Any) -> None:
        whole, cut = (planned(train={"accumulate": a})["memory"]["student"]["activations_bytes"] for a in (1, 4))
        assert whole / 5 < cut < whole / 3

    def test_copies_of_the_weights(self, planned: Any) -> None:
        one = 4 * WEIGHTS + BUFFERS
        assert planned()["memory"]["student"]["copies_bytes"] == one
        assert planned("--no-baseline")["memory"]["student"]["copies_bytes"] == 0
        found = planned(train={"ema": 0.9, "select": "best"})["memory"]["student"]
        assert found["copies_bytes"] == 3 * one
        assert len(found["copies"]) == 3

    def test_saved_tensors_are_counted_once_and_let_go(self) -> None:
        layer = torch.nn.Linear(5, 3)
        with _saved(torch.device("cpu"), [layer], {}) as found:
            for rows in (7, 4, 7):
                x = torch.ones(rows, 5)
                # x for the weight's gradient, tanh's result for its own; the weight itself is the layer's
                torch.tanh(layer(x)).sum().backward()
        assert found == [4 * 7 * (5 + 3)]


class TestCache:
    @pytest.mark.parametrize(
        ("cache", "epochs", "views", "each"),
        [
            ({}, 20, 16, 9 + 2 * 3),
            ({"views": 2}, 6, 2, 9 + 2 * 3),
            ({"mode": "off"}, 6, 6, 9 + 2 * 3),
            ({"views": 9}, 6, 6, 9 + 2 * 3),
            ({"views": 3, "codec": "float32"}, 6, 3, 9 + 4 * 3),
        ],
    )
    def test_rows_and_bytes(self, planned: Any, root: Path, cache: dict[str, Any], epochs: int, views: int, each: int) -> None:
        plan = planned(data=FLIPPED, train={"epochs": epochs}, teacher_cache=cache)
        found = plan["cache"]
        assert found["kept"] == (cache.get("mode") != "off" and views < epochs)
        assert found["path"] == str(root)
        assert found["rows"] == found["rows_to_ask"] == {"teach": 48 * views, "test": 18}
        assert found["rows_there"] == {"teach": 0, "test": 0}
        assert found["row_bytes"] == {"teach": each, "test": 9 + 4 * 3}
        assert found["bytes"] == found["bytes_to_write"] == 48 * views * each + 18 * (9 + 4 * 3)
        assert found["disk_free_bytes"] > 0
        assert plan["time"]["total_seconds"] == plan["time"]["cached_seconds" if found["kept"] else "live_seconds"]
        assert not root.exists()

    def test_a_named_path_is_always_used(self, planned: Any, folder: Path) -> None:
        named = folder.parent / "named"
        epochs = {"epochs": 1}
        assert not planned(data=FLIPPED, train=epochs)["cache"]["kept"]
        found = planned(data=FLIPPED, train=epochs, teacher_cache={"path": str(named)})["cache"]
        assert found["kept"]
        assert found["path"] == str(named)
        assert "named" in found["reason"]
        assert found["rows"]["teach"] == 48
        assert not named.exists()

    def test_views_without_end_are_not_kept(self, planned: Any) -> None:
        plan = planned(data=FLIPPED, teacher_cache={"views": "live"})
        assert plan["cache"]["rows"] is plan["cache"]["bytes"] is plan["time"]["ceiling"] is plan["time"]["cached_seconds"] is None
        assert plan["time"]["live_seconds"] == plan["time"]["total_seconds"] > 0

    def test_what_is_there_is_not_counted(self, planned: Any, folder: Path, root: Path) -> None:
        cache = {"views": 2, "path": str(root)}
        assert limbeck("label", recipe(folder, "filled.yaml", data=FLIPPED, train={"epochs": 1}, teacher_cache=cache)) == 0
        half = planned(data=FLIPPED, train={"epochs": 6}, teacher_cache=cache)
        assert half["cache"]["rows_there"] == {"teach": 48, "test": 18}
        assert half["cache"]["rows_to_ask"] == {"teach": 48, "test": 0}
        assert half["cache"]["bytes_to_write"] == 48 * 15
        assert half["time"]["fill_seconds"] == pytest.approx(48 * half["time"]["teacher_fill_row_ms"] / 1000)
        assert half["choices"]["teacher"]["reason"] == "as the cache was begun"

    def test_a_teacher_whose_answers_are_all_there_is_not_loaded(
        self, planned: Any, folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taught = folder.parent / "taught"  # what a python: teacher is made from cannot be told without loading it
        assert limbeck("train", recipe(folder, "taught.yaml", teacher=None, train={"epochs": 1}), "--out", taught) == 0
        changes: dict[str, Any] = {
            "teacher": {"model": f"run:{taught}"},
            "data": FLIPPED,
            "train": {"epochs": 6},
            "teacher_cache": {"views": 2, "path": str(root)},
        }
        assert limbeck("label", recipe(folder, "filled.yaml", **changes)) == 0
        before = {p: digest(p) for p in root.rglob("*.arrow")}
        build = _begin.build_model

        def student_only(*given: Any, role: str, **how: Any) -> Any:
            assert role == "student", "the teacher was built"
            return build(*given, role=role, **how)

        monkeypatch.setattr(_begin, "build_model", student_only)
        plan = planned(**changes)
        assert before == {p: digest(p) for p in root.rglob("*.arrow")} != {}
        assert plan["memory"]["teacher"] == {"loaded": False, "weights_bytes": None, "activations_bytes": None, "training_bytes": None}
        assert plan["cache"]["rows_to_ask"] == {"teach": 0, "test": 0}
        times = plan["time"]
        assert times["teacher_step_ms"] is times["ceiling"] is times["live_seconds"] is times["break_even_epoch"] is None
        assert times["fill_seconds"] == 0
        assert times["total_seconds"] == times["cached_seconds"] > 0
        assert times["cache_read_step_ms"] > 0
        assert "unknown     and not needed" in plan["said"]

    def test_require_refuses_what_is_missing(self, folder: Path, root: Path) -> None:
        path = recipe(folder, data=FLIPPED, teacher_cache={"mode": "require"})
        assert limbeck("distill", path, "--dry-run", "--out", folder.parent / "out") == 2
        assert not root.exists()


class TestTime:
    def test_several_seeds_ask_once(self, planned: Any) -> None:
        one, three = (planned("--seeds", n, data=FLIPPED, train={"epochs": 6}, teacher_cache={"views": 2}) for n in (1, 3))
        assert one["cache"]["rows"] == three["cache"]["rows"]
        for plan, passes in ((one, 6), (three, 18)):
            times = plan["time"]
            s, t = times["student_step_ms"], times["teacher_step_ms"]
            for role, ms in (("student", s), ("teacher", t)):
                least, most = times[f"{role}_step_range_ms"]
                assert 0 < least <= ms <= most
            assert times["ceiling"] == pytest.approx(passes * (s + t) / (passes * s + 2 * t))
            assert plan["seeds"] == passes // 6
            # 48 rows in batches of 16; the baseline is as long as the student alone
            assert times["baseline_seconds"] >= passes * 3 * s / 1000 * 0.999
            alone = times["cached_seconds"] - times["fill_seconds"] - times["baseline_seconds"]
            assert alone == pytest.approx(times["baseline_seconds"])
            found = balance(
                (times["live_seconds"] - times["baseline_seconds"]) / passes, alone / passes, fill=times["fill_seconds"], passes=passes
            )
            assert found.break_even_epoch == times["break_even_epoch"]

    def test_what_is_left_out_is_said(self, planned: Any) -> None:
        plan = planned()
        assert "evaluation" in plan["time"]["left_out"]
        assert "without validation, evaluation" in plan["said"]

    def test_without_a_teacher(self, planned: Any) -> None:
        plan = planned(command="train", teacher=None)
        assert plan["cache"] is plan["time"]["teacher_step_ms"] is plan["time"]["baseline_seconds"] is None
        assert plan["parameters"] == {"student": WEIGHTS}
        assert plan["memory"]["teacher"]["loaded"] is None
        assert plan["memory"]["student"]["copies_bytes"] == 0
        assert "teacher" not in plan["choices"]
        assert plan["time"]["total_seconds"] > 0

    def test_a_teacher_that_is_a_file(self, planned: Any, folder: Path) -> None:
        np.save(folder / "logits.npy", np.random.default_rng(0).normal(size=(48, 3)).astype(np.float32))
        plan = planned(teacher={"model": "logits:logits.npy"})
        assert plan["memory"]["teacher"]["loaded"] is False
        assert "logits.npy" in plan["cache"]["reason"]
        assert plan["time"]["teacher_step_ms"] is plan["cache"]["rows"] is None
        assert plan["time"]["total_seconds"] > plan["time"]["baseline_seconds"] > 0

    @pytest.mark.parametrize(("batches", "widths"), [(3, [0, 1, 2]), (18, [1, 3, 5, 7, 9, 11, 13, 15, 17])])
    def test_texts_are_measured_in_batches_of_all_widths(self, batches: int, widths: list[int]) -> None:
        lengths = np.repeat(np.arange(batches)[::-1], 4)  # the last batch of an epoch is smaller, and counts for nothing
        rows = [np.arange(4 * i, 4 * i + 4) for i in range(batches)] + [np.arange(2)]
        plan: Any = SimpleNamespace(steps_per_epoch=len(rows), request=lambda i: Request(i, 0, 0, rows[i]))
        builder: Any = lambda request: int(lengths[request.rows].max())  # noqa: E731
        found = _batches(plan, builder, lengths)
        assert (found.batches, found.widest, found.rows) == (widths, batches - 1, 4)

    def test_a_teacher_that_is_trained_first(self, planned: Any) -> None:
        plan = planned(
            teacher={"model": "python:nets.py:teacher", "train": {"epochs": 2}},
            data=FLIPPED,
            train={"epochs": 8},
            teacher_cache={"views": 4},
        )
        assert plan["time"]["teacher_training_seconds"] > 0
        assert plan["memory"]["teacher"]["training_bytes"] > 4 * 4 * plan["parameters"]["teacher"]
        assert plan["cache"]["rows_to_ask"]["teach"] == 48 * 4
        assert plan["time"]["total_seconds"] > plan["time"]["teacher_training_seconds"] + plan["time"]["baseline_seconds"]


class TestChoices:
    def test_what_auto_will_choose(self, planned: Any) -> None:
        found = planned(train={"precision": "auto"})["choices"]
        for role in ("teacher", "student"):
            rows = found[role]["measured"]
            assert {(r["precision"], r["layout"]) for r in rows} >= {("float32", "channels_first"), ("float32", "channels_last")}
            assert (found[role]["precision"], found[role]["layout"]) in {(r["precision"], r["layout"]) for r in rows}
            assert found[role]["reason"]
        assert found["workers"] == {"value": 0, "reason": "the data is in memory: a background thread prepares batches"}
        assert found["teacher_cache"]["kept"] is True

    def test_what_is_given_is_not_measured(self, planned: Any) -> None:
        found = planned()["choices"]
        assert found["student"] == {
            "precision": "float32",
            "layout": "channels_first",
            "measured": [],
            "reason": "given in the recipe",
        }


@pytest.mark.parametrize("options", [["--json"], []])
@pytest.mark.parametrize(
    ("setting", "culprit"),
    [("train.epochs=0", "train.epochs"), ("data.source=npz:nowhere.npz", "nowhere.npz"), ("objective=[{loss: kdd}]", "kdd")],
)
def test_a_mistake_is_one(
    folder: Path, root: Path, capsys: pytest.CaptureFixture[str], setting: str, culprit: str, options: list[str]
) -> None:
    out = folder.parent / "out"
    assert limbeck("distill", recipe(folder), "--dry-run", "--set", setting, "--out", out, *options) == 2
    said = capsys.readouterr()
    assert culprit in said.err
    assert "Traceback" not in said.err
    assert not out.exists()
    assert not root.exists()
    if options:
        assert json.loads(said.out)["error"]["exit_code"] == 2


def test_the_student_and_the_generators_are_left_alone(folder: Path, root: Path) -> None:
    text = json.loads(recipe(folder, data=FLIPPED, train={"precision": "auto", "epochs": 6}).read_text(encoding="utf-8"))
    read = spine.absolute(build_recipe(text, command="distill"), folder)
    job = _begin.job_of(read, folder, folder.parent / "out")
    kept: list[Any] = []
    build = job.build_student

    def remembered(seed: int) -> Any:
        kept.append(build(seed))
        return kept[-1]

    object.__setattr__(job, "build_student", remembered)
    before_torch, before_numpy = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore[union-attr]
    spine.execute(job, Progress("none"), dry_run=True)
    assert len(kept) == 1
    assert state_hash(kept[0].module) == kept[0].weights_sha256
    assert all(p.grad is None for p in kept[0].module.parameters())
    assert torch.equal(torch.get_rng_state(), before_torch)
    assert np.random.get_state()[1].tobytes() == before_numpy  # type: ignore[union-attr]
