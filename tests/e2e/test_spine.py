"""The spine, whole: four ways in and one result out, the published loop, what depends on what, and what a run leaves."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import limbeck as package
from limbeck.errors import ParityFailed
from running import NAMES, arrays, digest, leaves, left_over, limbeck, make_folder, read, recipe, run, start, weights
from support import Big, Small, made, tensors

PLAIN = {"epochs": 2, "batch_size": 16, "lr": 0.05, "precision": "float32"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_folder(tmp_path)


def test_the_four_ways_in_end_in_the_same_bytes(here: Path) -> None:
    """A recipe, options, kd_train.py, and the Python call with names, and with modules and arrays."""
    file = recipe(here, objective=[{"loss": "kd", "weight": 0.6, "temperature": 2.0}, {"loss": "cross_entropy", "weight": 0.4}])
    options = [
        *("--teacher", "python:nets.py:teacher", "--student", "python:nets.py:student", "--data", "npz:pictures.npz"),
        *("--temp", "2.0", "--alpha", "0.6", "--epochs", "2", "--batch-size", "16", "--lr", "0.05"),
        *("--set", "train.precision=float32", "--set", "train.log_every=1", "--set", "export=[]"),
    ]
    classic = start(*options, "--out", here / "classic", program=(str(Path(__file__).parents[2] / "kd_train.py"),))
    run("distill", file, out=here / "recipe")
    run("distill", *options, out=here / "options")
    how: dict[str, Any] = {"temperature": 2.0, "alpha": 0.6, "export": [], "progress": "none", **PLAIN}
    names = {"teacher": "python:nets.py:teacher", "student": "python:nets.py:student"}
    package.distill(**names, data="npz:pictures.npz", out=here / "names", **how)

    space: dict[str, Any] = {}
    exec((here / "nets.py").read_text(), space)
    data = arrays()
    splits = {name: (data[f"{name}_x"], data[f"{name}_y"]) for name in ("train", "test", "valid")}
    result = package.distill(teacher=space["teacher"], student=space["student"], out=here / "objects", **splits, **how)

    expected = weights(here / "recipe" / "student")
    for way in ("options", "names", "objects", "classic"):
        if way == "classic":
            _, said = classic.communicate(timeout=6000)
            assert classic.returncode == 0, said
        for role in ("student", "baseline"):
            assert weights(here / way / role) == weights(here / "recipe" / role), (way, role)
    assert {name: t.numpy().tobytes() for name, t in result.student.state_dict().items()} == expected
    assert not result.student.training
    assert weights(here / "recipe" / "student") != weights(here / "recipe" / "baseline")


class Watched(Big):
    """A teacher that remembers what it was shown (the class does, for the module given may be copied)."""

    seen: ClassVar[list[torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach().clone())
        return super().forward(x)


def test_the_articles_loop_and_the_public_call_give_the_same_weights(tmp_path: Path) -> None:
    """Temperature 6, alpha 0.7, Adam at 1e-4, KLDivLoss(batchmean) times T^2; the order is the one that the teacher saw."""
    x, y = tensors(80)
    teacher, student = made(Watched, "teacher"), made(Small, "student")
    teacher.seen.clear()
    result = package.distill(
        teacher=teacher,
        student=student,
        train=(x, y),
        test=tensors(16, 1),
        valid=tensors(8, 2),
        temperature=6.0,
        alpha=0.7,
        epochs=2,
        batch_size=8,
        optimizer="adam",
        lr=1e-4,
        weight_decay=0.0,
        schedule="constant",
        warmup=0.0,
        clip_norm=None,
        precision="float64",
        seed=3,
        baseline=False,
        export=["torchscript"],
        out=tmp_path / "run",
        progress="none",
    )
    rows = [[int(torch.nonzero((x == row).all(1))) for row in batch] for batch in teacher.seen if len(batch) == 8 and _is_in(batch, x)]
    assert len(rows) == 20
    assert sorted(i for batch in rows[:10] for i in batch) == sorted(i for batch in rows[10:] for i in batch) == list(range(80))
    assert rows[:10] != rows[10:]

    plain, guide = made(Small, "student"), made(Big, "teacher").eval()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-4)
    plain.train()
    for batch in rows:
        optimizer.zero_grad()
        with torch.no_grad():
            soft = torch.softmax(guide(x[batch]) / 6.0, dim=1)
        logits = plain(x[batch])
        kd = nn.KLDivLoss(reduction="batchmean")(torch.log_softmax(logits / 6.0, dim=1), soft) * 36.0
        (0.7 * kd + 0.3 * nn.CrossEntropyLoss()(logits, y[batch])).backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        found = result.student.state_dict()[name]
        assert found.dtype == torch.float64, "an export must not change the student that is handed back"
        torch.testing.assert_close(found, value, rtol=0, atol=1e-9)
        assert not torch.equal(value, student.state_dict()[name]), "nothing was learned"
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), made(Small, "student").parameters(), strict=True))
    assert result.metrics["cost"]["steps"] == 20
    # every row that the teacher was shown, timing included, but for the few by which the recipe is judged before the run
    assert 80 * 2 + 16 < result.metrics["cost"]["teacher_items"] <= sum(map(len, teacher.seen))
    assert sum(map(len, teacher.seen)) - result.metrics["cost"]["teacher_items"] < 20
    expected = float((guide(tensors(16, 1)[0]).argmax(1) == tensors(16, 1)[1]).double().mean())
    assert result.metrics["models"]["teacher"]["metrics"]["accuracy"] == expected


def _is_in(batch: torch.Tensor, x: torch.Tensor) -> bool:
    return all(bool((x == row).all(1).any()) for row in batch)


def test_what_the_student_starts_from_does_not_depend_on_a_teacher(here: Path) -> None:
    """A learning rate that moves nothing shows the initial weights; then the baseline is the training without a teacher, byte for byte."""
    still = {"lr": 1e-30, "weight_decay": 0.0, "clip_norm": None, "schedule": "constant", "warmup": 0.0, "epochs": 1}
    train_only: dict[str, Any] = {"teacher": None, "student": {"model": "python:nets.py:student", "options": {"dropout": 0.3}}}
    both = {"student": train_only["student"], "seed": 5, "data": {"augment": {"crop": 1, "flip": True}}}
    run("distill", recipe(here, "a.yaml", train=still, **both), out=here / "a")
    run("train", recipe(here, "b.yaml", train=still, **{**both, **train_only}), out=here / "b")
    drawn = [name for name in weights(here / "b" / "student") if name.startswith(("body", "head"))]
    for folder in ("a/student", "a/baseline"):
        assert [weights(here / folder)[n] for n in drawn] == [weights(here / "b" / "student")[n] for n in drawn], folder

    whole = run("distill", recipe(here, "c.yaml", **both), out=here / "c")
    alone = run("train", recipe(here, "d.yaml", **{**both, **train_only}), out=here / "d")
    assert weights(here / "c" / "baseline") == weights(here / "d" / "student")
    assert weights(here / "c" / "student") != weights(here / "d" / "student")
    assert whole["models"]["baseline"]["metrics"] == alone["models"]["student"]["metrics"]
    assert list(alone["models"]) == ["student"]
    assert alone["gap_closed"] is None
    assert not (here / "d" / "baseline").exists()


def test_another_seed_is_another_student_on_the_same_split(here: Path) -> None:
    first = run("distill", recipe(here), "--no-baseline", out=here / "0")
    other = run("distill", recipe(here), "--no-baseline", "--seed", "1", out=here / "1")
    assert weights(here / "0" / "student") != weights(here / "1" / "student")
    assert read(here / "0" / "environment.json")["facts"]["data"] == read(here / "1" / "environment.json")["facts"]["data"]
    assert first["seeds"] == [0]
    assert other["seeds"] == [1]
    assert set(first["models"]) == {"teacher", "student"}
    assert first["gap_closed"] is None
    assert not (here / "0" / "baseline").exists()


def test_what_auto_measured_is_recorded_and_repeated(here: Path) -> None:
    """recipe.yaml of a run is complete: running it again gives the same bytes."""
    file = recipe(here, train={"precision": "auto"}, export=["onnx"])
    run("distill", file, out=here / "first")
    environment = read(here / "first" / "environment.json")
    measured = environment["choices"]["student"]["measured"]
    assert {(row["precision"], row["layout"]) for row in measured} == {
        (p, form) for p in ("float32", "bf16") for form in ("channels_first", "channels_last")
    }
    assert all(row["ms"] is None or row["ms"] > 0 for row in measured)
    assert environment["choices"]["student"]["reason"]
    again = here / "elsewhere" / "again.yaml"
    again.parent.mkdir()
    again.write_bytes((here / "first" / "recipe.yaml").read_bytes())
    text = again.read_text()
    assert not re.search(r"(precision|layout|workers|device): (auto|null)", text), text
    run("distill", again, out=here / "second")
    repeated = read(here / "second" / "environment.json")
    for key in ("precision", "layout", "teacher_precision", "teacher_layout", "device"):
        assert repeated[key] == environment[key], key
    for role in ("student", "baseline"):
        assert weights(here / "first" / role) == weights(here / "second" / role)
    assert (here / "second" / "recipe.yaml").read_text() == text


def test_seeds_stand_beside_one_another_and_the_best_is_on_top(here: Path) -> None:
    run("train", recipe(here, "teacher.yaml", teacher=None, student={"model": "python:nets.py:teacher"}), out=here / "teacher")
    learned = {"teacher": {"model": "run:teacher"}}
    joint = run("distill", recipe(here, export=["onnx"], **learned), "--seeds", "2", "--seed", "4", out=here / "run")
    children = {seed: read(here / "run" / f"seed-{seed}" / "metrics.json") for seed in (4, 5)}
    assert joint["seeds"] == [4, 5]
    best = joint["best_seed"]
    assert children[best]["validation"]["accuracy"] == max(c["validation"]["accuracy"] for c in children.values())
    for part in ("student", "baseline"):
        assert weights(here / "run" / part) == weights(here / "run" / f"seed-{best}" / part)
    assert digest(here / "run/export/model.onnx") == digest(here / f"run/seed-{best}/export/model.onnx")
    for role in ("teacher", "baseline", "student"):
        for name in ("accuracy", "nll", "ece", "macro_f1"):
            values = [c["models"][role]["metrics"][name] for c in children.values()]
            assert joint["models"][role]["metrics"][name] == pytest.approx(np.mean(values))
            assert joint["models"][role]["metrics_std"][name] == pytest.approx(np.std(values, ddof=1))
    assert (here / "run" / "report.html").is_file()
    run("distill", recipe(here, **learned), "--seed", "5", out=here / "single")
    assert weights(here / "single" / "student") == weights(here / "run" / "seed-5" / "student")
    # the teacher is asked once for both seeds, before they begin: for 48 training and 18 test rows; each seed reads 48 rows x 2 epochs
    assert [children[seed]["cost"]["teacher_items"] for seed in (4, 5)] == [0, 0]
    assert [children[seed]["cost"]["cache_hits"] for seed in (4, 5)] == [96, 96]
    assert joint["cost"]["cache_hits"] == 2 * 96


def test_several_seeds_from_python_hand_back_the_best_student(here: Path) -> None:
    space: dict[str, Any] = {}
    exec((here / "nets.py").read_text(), space)
    data = arrays()
    splits = {name: (data[f"{name}_x"], data[f"{name}_y"]) for name in ("train", "test", "valid")}
    for first in range(6):  # until a seed other than the last is the best
        folder = here / f"run-{first}"
        result = package.distill(
            teacher=space["teacher"], student=space["student"], seed=first, seeds=2, out=folder,
            export=[], baseline=False, progress="none", **{**PLAIN, "epochs": 1}, **splits,
        )  # fmt: skip
        assert {n: t.numpy().tobytes() for n, t in result.student.state_dict().items()} == weights(folder / "student")
        if result.metrics["best_seed"] == first:
            return
    raise AssertionError("the last seed was always the best")


def test_a_run_leaves_what_the_contract_says(here: Path) -> None:
    """The files of a run, the keys of metrics.json, and class names in every place that travels."""
    import onnx

    file = recipe(here, data={"source": "npz:named.npz"}, export=["onnx", "torchscript", "pt2"])
    data = arrays()
    names = np.array(NAMES)
    np.savez(here / "named.npz", **{k: names[v] if k.endswith("_y") else v for k, v in data.items()})
    metrics = run("distill", file, out=here / "run")
    folder = here / "run"
    top = {p.name for p in folder.iterdir()}
    assert {
        "recipe.yaml",
        "environment.json",
        "log.jsonl",
        "tensorboard",
        "student",
        "baseline",
        "export",
        "metrics.json",
        "report.html",
    } <= top
    assert not list(folder.rglob("checkpoints"))
    assert left_over(folder) == []

    assert {"limbeck", "task", "primary_metric", "seeds", "models", "gap_closed", "verdict", "cost", "export"} <= set(metrics)
    assert (metrics["task"], metrics["primary_metric"], metrics["seeds"]) == ("image-classification", "accuracy", [0])
    for role in ("teacher", "baseline", "student"):
        row = metrics["models"][role]
        assert {"accuracy", "nll", "ece"} <= set(row["metrics"])
        assert {"metrics", "parameters", "bytes", "flops", "latency_ms"} <= set(row)
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p95"]
    assert metrics["models"]["student"]["parameters"] == 4 * 9 + 4 + 2 * 4 + 16 * 3 + 3
    assert 0 <= metrics["models"]["student"]["agreement"] <= 1
    cost = metrics["cost"]
    keys = {"teacher_seconds", "teacher_items", "cache_hits", "train_seconds", "baseline_seconds", "total_seconds", "peak_rss_bytes"}
    assert keys <= set(cost)
    assert cost["teacher_items"] >= 48 + 18
    assert cost["cache_hits"] == 48 * 2
    assert cost["total_seconds"] >= cost["train_seconds"] + cost["baseline_seconds"] > 0
    teacher, baseline, student = (metrics["models"][r]["metrics"]["accuracy"] for r in ("teacher", "baseline", "student"))
    gap = None if teacher <= baseline else pytest.approx((student - baseline) / (teacher - baseline))
    assert metrics["gap_closed"] == gap
    assert all(not isinstance(v, float) or math.isfinite(v) for _, v in leaves(metrics))

    assert set(metrics["export"]) == {"onnx", "torchscript", "pt2"}
    for row in metrics["export"].values():
        assert {"file", "bytes", "max_abs_diff", "agreement", "latency_ms"} <= set(row)
        assert (folder / row["file"]).stat().st_size == row["bytes"]
        assert row["agreement"] == 1.0

    assert read(folder / "student" / "model.json")["classes"] == list(NAMES)
    assert read(folder / "baseline" / "model.json")["classes"] == list(NAMES)
    facts = {p.key: p.value for p in onnx.load(folder / "export" / "model.onnx").metadata_props}
    assert any(all(name in value for name in NAMES) for value in facts.values()), facts
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert all(name in report for name in NAMES)
    assert metrics["verdict"].split(".")[0] in report
    environment = read(folder / "environment.json")
    assert environment["resumed_from"] == []
    assert {"device", "world_size", "precision", "layout", "seed", "git", "packages"} <= set(environment)


def test_a_student_of_a_run_is_a_teacher_and_answers_the_same(here: Path) -> None:
    """run:DIR: the accuracy as a teacher is the one that it had as a student; a relative name works from where it was given."""
    first = run(
        "train", recipe(here, "t.yaml", teacher=None, student={"model": "python:nets.py:teacher"}, train={"epochs": 8}), out=here / "t"
    )
    second = run("distill", recipe(here, teacher={"model": "run:t"}), out=here / "s")
    assert second["models"]["teacher"]["metrics"] == first["models"]["student"]["metrics"]
    assert second["models"]["teacher"]["metrics"]["accuracy"] > 0.6
    third = run("distill", recipe(here, teacher={"model": "run:s"}, student={"model": "run:t"}), out=here / "u")
    assert third["models"]["teacher"]["metrics"] == second["models"]["student"]["metrics"]
    assert any("larger" in n or "more than the teacher" in n for n in third["notes"])


def test_nan_stops_with_a_sentence_and_the_last_good_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {k: v.astype(np.float32) if k.endswith("_x") else v for k, v in arrays().items()}
    np.savez(here / "floats.npz", **{k: v[:, None] if k.endswith("_x") else v for k, v in data.items()})
    (here / "broken.py").write_text(
        "from nets import *\n\nclass Breaks(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.inner, self.calls = plain(), 0\n\n"
        "    def forward(self, x):\n        self.calls += self.training\n"
        "        return self.inner(x) * (float('nan') if self.calls == 5 else 1.0)\n"
    )
    file = recipe(
        here,
        data={"source": "npz:floats.npz"},
        teacher={"model": "python:nets.py:plain"},
        student={"model": "python:broken.py:Breaks"},
        train={"checkpoint_every": 2},
    )
    assert limbeck("distill", file, "--out", here / "run") == 3
    said = capsys.readouterr().err
    assert "Step 5 of the student" in said
    assert "kd" in said
    assert "Traceback" not in said
    kept = sorted(p.name for p in (here / "run/checkpoints/student").iterdir())
    assert kept == ["step-00000002", "step-00000004"]
    assert not (here / "run/metrics.json").exists()
    assert not (here / "run/student").exists()
    assert left_over(here / "run") == []


def test_a_failed_parity_keeps_what_was_measured_and_is_no_finished_run(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from limbeck import spine

    def fails(*given: Any, **more: Any) -> Any:
        raise ParityFailed("onnx: the largest difference is 7.0")

    file = recipe(here, export=["onnx"])
    with monkeypatch.context() as patch:
        patch.setattr(spine, "export_model", fails)
        for resume in ([], ["--resume"]):
            assert limbeck("distill", file, "--out", here / "run", *resume) == 3
            assert "the largest difference is 7.0" in capsys.readouterr().err
    metrics = read(here / "run/metrics.json")
    assert metrics["models"]["student"]["metrics"]["accuracy"] is not None
    assert metrics["export_failure"] == "onnx: the largest difference is 7.0"
    trained = weights(here / "run/student")
    assert limbeck("distill", file, "--out", here / "run", "--resume") == 0
    metrics = read(here / "run/metrics.json")
    assert "export_failure" not in metrics
    assert metrics["export"]["onnx"]["agreement"] == 1.0
    assert weights(here / "run/student") == trained
    assert not (here / "run/checkpoints").exists()


@pytest.mark.parametrize("place", ["step-", "model.json", "metrics.json", "log.jsonl"])
def test_a_full_disk_stops_with_the_path_and_the_bytes(
    here: Path, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without space, as the operating system tells of it; a run goes on from there when there is space again."""
    import builtins
    import errno
    import os

    real_open, real_write = builtins.open, os.write
    del real_write

    def full(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        file = real_open(path, mode, *rest, **more)
        text = str(path)
        if place in text and any(m in mode for m in "wa") and str(here / "run") in text:

            def refuse(data: Any) -> int:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), text)

            return _Full(file, refuse)
        return file

    class _Full:
        def __init__(self, file: Any, write: Any) -> None:
            self.file, self.write = file, write

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Any:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

    file = recipe(here, train={"checkpoint_every": 2})
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", full)
        patch.setattr("io.open", full)
        assert limbeck("distill", file, "--out", here / "run") == 3
    said = capsys.readouterr().err
    assert "disk is full" in said
    assert str(here / "run") in said
    assert "Traceback" not in said
    assert not (here / "run" / "metrics.json").exists()
    assert limbeck("distill", file, "--out", here / "run", "--resume") == 0
    run("distill", file, out=here / "quiet")
    assert weights(here / "run" / "student") == weights(here / "quiet" / "student")
    assert left_over(here / "run") == []
