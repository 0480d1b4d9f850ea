"""Several teachers in one run: each is asked once and kept for itself, and the student learns from their mean."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import limbeck as lib
from limbeck.cache import Reader
from limbeck.models import load_saved
from models_support import text_folder
from running import distance, leaves, limbeck, make_folder, read, recipe, run, several, start, steps, wait_for, weights

ONE, TWO = "run:one", "run:two"
TOGETHER: dict[str, Any] = {
    "teacher": None,  # replaced, not merged
    "student": {"model": "python:nets.py:student"},
    "data": {"source": "npz:pictures.npz", "augment": {"crop": 1, "flip": True}},
    "train": {"epochs": 3, "checkpoint_every": 2},
}


def softmax(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    p = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(p / p.sum(-1, keepdims=True))


def together(folder: Path, name: str = "together.yaml", teachers: Any = (ONE, TWO), **changes: Any) -> Path:
    path = recipe(folder, name, **{**TOGETHER, **changes})
    plain = {**json.loads(path.read_text()), "teacher": list(teachers)}
    path.write_text(json.dumps(plain))
    return path


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained teachers, of two sizes of input, and a run with both of them."""
    folder = make_folder(tmp_path_factory.mktemp("ensemble"))
    teacher = {"model": "python:nets.py:teacher"}
    run("train", recipe(folder, "one.yaml", teacher=None, student=teacher), out=folder / "one")
    wide = {**teacher, "options": {"resolution": 12}}
    run("train", recipe(folder, "two.yaml", teacher=None, student=wide, seed=5), out=folder / "two")
    run("distill", together(folder, teacher_cache={"path": "cache"}), out=folder / "both")
    return folder


def test_the_teacher_of_the_report_is_what_they_say_together(there: Path) -> None:
    metrics = read(there / "both/metrics.json")
    teacher = metrics["models"]["teacher"]
    members = teacher["members"]
    assert [m["model"].rpartition("/")[2] for m in members] == ["one", "two"]
    x, labels = (np.load(there / "pictures.npz")[f"test_{name}"] for name in "xy")
    told = []
    for name, member in zip(("one", "two"), members, strict=True):
        model = load_saved(there / name)
        how = model.preprocessing
        pixels = torch.from_numpy(x[:, None] / 255.0)
        if name == "two":
            assert (how.height, how.width) == (12, 12)  # type: ignore[union-attr]
            resized = [np.asarray(Image.fromarray(image).resize((12, 12), Image.Resampling.BILINEAR)) for image in x]
            pixels = torch.from_numpy(np.stack(resized)[:, None] / 255.0)
        inputs = (pixels - how.mean[0]) / how.std[0]  # type: ignore[union-attr]
        with torch.no_grad():
            told.append(model.module.eval()(inputs.float()).double().numpy())
        assert member["metrics"]["accuracy"] == pytest.approx((told[-1].argmax(1) == labels).mean())
        assert member["latency_ms"]["p50"] > 0
    mean = (softmax(told[0]) + softmax(told[1])) / 2
    assert teacher["metrics"]["accuracy"] == pytest.approx((mean.argmax(1) == labels).mean())
    assert teacher["metrics"]["nll"] == pytest.approx(-np.log(mean[np.arange(len(labels)), labels]).mean(), rel=1e-4)
    assert teacher["parameters"] == sum(m["parameters"] for m in members)
    assert teacher["latency_ms"] is None  # it was not measured
    html = (there / "both/report.html").read_text(encoding="utf-8")
    assert "teacher 1 of 2" in html
    assert "teacher 2 of 2" in html


def test_each_is_paid_for_once(there: Path, tmp_path: Path) -> None:
    again = run(
        "distill", together(there, "again.yaml", teacher_cache={"path": "cache"}, ensemble={"weights": "entropy"}), out=tmp_path / "again"
    )
    assert again["cost"]["teacher_items"] == 0
    assert again["cost"]["cache_hits"] == 2 * 3 * 48
    alone = run(
        "distill",
        recipe(there, "alone.yaml", **{**TOGETHER, "teacher": {"model": ONE}, "teacher_cache": {"path": "cache"}}),
        out=tmp_path / "a",
    )
    assert alone["cost"]["teacher_items"] == 0  # as a single teacher too
    third = "python:nets.py:teacher"
    more = run("distill", together(there, "third.yaml", [ONE, TWO, third], teacher_cache={"path": "cache"}), out=tmp_path / "third")
    fresh = {"path": str(tmp_path / "fresh")}
    own = run(
        "distill", recipe(there, "own.yaml", **{**TOGETHER, "teacher": {"model": third}, "teacher_cache": fresh}), out=tmp_path / "own"
    )
    assert more["cost"]["teacher_items"] == own["cost"]["teacher_items"] > 3 * 48  # what it costs alone, and nothing for the others
    assert weights(there / "both/student") != weights(tmp_path / "again/student")


def test_kept_and_asked_in_every_step_are_the_same(there: Path, tmp_path: Path) -> None:
    kept = {"path": str(tmp_path / "cache"), "codec": "float32", "views": 3}
    run("distill", together(there, "kept.yaml", teacher_cache=kept, baseline=False), out=tmp_path / "kept")
    live = run("distill", together(there, "live.yaml", teacher_cache={"mode": "off", "views": 3}, baseline=False), out=tmp_path / "live")
    assert distance(tmp_path / "kept/student", tmp_path / "live/student") < 1e-4
    assert live["cost"]["cache_hits"] == 0
    told = read(tmp_path / "kept/metrics.json")["models"]["teacher"]
    for (path, one), (_, other) in zip(leaves(told["metrics"]), leaves(live["models"]["teacher"]["metrics"]), strict=True):
        assert one == pytest.approx(other, rel=1e-4), path
    assert distance(tmp_path / "kept/student", there / "both/student") > 0  # float16 there


def test_the_mean_is_taken_at_the_temperature_of_the_objective(there: Path, tmp_path: Path) -> None:
    """The logged kd of the first step, from the caches by hand: exact for the mean of the probabilities at T."""
    at = {"objective": [{"loss": "kd", "temperature": 3.0}], "baseline": False, "data": {"source": "npz:pictures.npz", "augment": "none"}}
    cache = {"path": str(tmp_path / "cache"), "codec": "float32"}
    train = {"epochs": 1, "batch_size": 48, "lr": 1e-12, "warmup": 0.0, "clip_norm": None}
    run("distill", together(there, "at.yaml", **at, teacher_cache=cache, ensemble={"weights": [3, 1]}, train=train), out=tmp_path / "run")
    [line] = [row for row in map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines()) if "terms" in row]
    student = load_saved(tmp_path / "run").module.train()
    for part in student.modules():
        part.momentum = 0.0 if hasattr(part, "momentum") else None  # type: ignore[assignment]
    x = np.load(there / "pictures.npz")["train_x"]
    told = [model_logits(there / name, x) for name in ("one", "two")]
    p = 0.75 * softmax(told[0] / 3) + 0.25 * softmax(told[1] / 3)
    how = load_saved(tmp_path / "run").preprocessing
    with torch.no_grad():
        own = student(torch.from_numpy((x[:, None] / 255.0 - how.mean[0]) / how.std[0]).float()).double().numpy()  # type: ignore[union-attr]
    expected = 9 * (p * (np.log(p) - np.log(softmax(own / 3)))).sum(1).mean()
    assert line["terms"]["kd"] == pytest.approx(expected, rel=1e-4)


def model_logits(folder: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    model = load_saved(folder)
    how: Any = model.preprocessing
    if how.height is not None:
        x = np.stack([np.asarray(Image.fromarray(image).resize((how.width, how.height), Image.Resampling.BILINEAR)) for image in x])
    with torch.no_grad():
        return np.asarray(model.module.eval()(torch.from_numpy((x[:, None] / 255.0 - how.mean[0]) / how.std[0]).float()).double().numpy())


def test_teachers_that_are_trained_first(there: Path, tmp_path: Path) -> None:
    teachers = [{"model": "python:nets.py:teacher", "train": {"epochs": 1}}, {"model": "python:nets.py:plain", "train": {"epochs": 2}}]
    path = together(there, "trained.yaml", teachers, teacher_cache={"path": str(tmp_path / "cache")})
    metrics = run("distill", path, "--seeds", 2, out=tmp_path / "run")
    for number, epochs in ((0, 1), (1, 2)):
        assert (tmp_path / f"run/teacher-{number}/model.json").is_file()
        assert max(steps(tmp_path / "run", f"teacher-{number}")) == 3 * epochs
    assert metrics["seeds"] == [0, 1]
    assert len(metrics["models"]["teacher"]["members"]) == 2


def test_stopped_while_it_trains_it_ends_in_the_same_bytes(there: Path, tmp_path: Path) -> None:
    path = together(there, "stopped.yaml", teacher_cache={"path": str(tmp_path / "cache")})
    stopped = start("distill", path, "--out", tmp_path / "run", SLOW="0.2")
    wait_for(stopped, lambda: len(steps(tmp_path / "run", "student")) > 3)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=300)
    assert stopped.returncode == 75
    assert limbeck("distill", path, "--out", tmp_path / "run", "--resume") == 0
    for role in ("student", "baseline"):
        assert weights(tmp_path / "run" / role) == weights(there / "both" / role)
    assert read(tmp_path / "run/environment.json")["resumed_from"]


def test_a_member_goes_on_as_it_began(there: Path, tmp_path: Path) -> None:
    """Answers that fill up while a run that asks in every step is stopped do not turn it into one that reads them."""
    path = together(there, "live.yaml", teacher_cache={"views": 3})
    where = {"LIMBECK_CACHE": str(tmp_path / "cache")}
    stopped = start("distill", path, "--out", tmp_path / "run", SLOW="0.2", **where)
    wait_for(stopped, lambda: len(steps(tmp_path / "run", "student")) > 3)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=300)
    assert stopped.returncode == 75
    choices = read(tmp_path / "run/environment.json")["choices"]
    assert [choices[f"teacher_cache-{i}"]["kept"] for i in (0, 1)] == [False, False]
    filling = together(there, "fill.yaml", teacher_cache={"views": 3, "path": str(tmp_path / "cache")})
    assert limbeck("label", filling) == 0
    resumed = start("distill", path, "--out", tmp_path / "run", "--resume", **where)
    resumed.communicate(timeout=300)
    assert resumed.returncode == 0
    assert read(tmp_path / "run/metrics.json")["cost"]["cache_hits"] == 0


def test_what_is_resumed_has_the_same_teachers(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        limbeck("distill", together(there, "other.yaml", [TWO, ONE], teacher_cache={"path": "cache"}), "--out", there / "both", "--resume")
        == 2
    )
    assert "teacher.0.model" in capsys.readouterr().err


def test_label_fills_the_cache_of_each(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = together(there, "label.yaml", teacher_cache={"path": str(tmp_path / "cache")})
    assert limbeck("label", path, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["rows"]["teach"] for one in told["teachers"]] == [3 * 48] * 2
    assert told["asked"] == 2 * (3 * 48 + 18)
    folders = {one["cache"]["teach"] for one in told["teachers"]}
    assert len(folders) == 2
    assert all(Reader(Path(folder)).manifest.size for folder in folders)
    metrics = run("distill", path, "--no-baseline", out=tmp_path / "run")
    assert metrics["models"]["student"]["metrics"] == read(there / "both/metrics.json")["models"]["student"]["metrics"]


def test_a_class_set_of_its_own_is_mapped_by_name(tmp_path: Path) -> None:
    """One teacher knows more classes than the data has: the columns are found by name."""
    rng = np.random.default_rng(0)
    for name, kinds in (("many", ("ant", "bee", "cat", "dog")), ("few", ("bee", "dog"))):
        for split, count in (("train", 12), ("test", 6)):
            for kind in kinds:
                place = tmp_path / name / split / kind
                place.mkdir(parents=True)
                for i in range(count):
                    image = rng.integers(0, 90, (8, 8), dtype=np.uint8)
                    image[2 * ("ant", "bee", "cat", "dog").index(kind)] += 150
                    Image.fromarray(image).save(place / f"{i}.png")
    make_folder(tmp_path)
    quick = {"epochs": 4, "batch_size": 8}
    plain = {"model": "python:nets.py:plain", "options": {"size": 64}}
    for name, source in (("one", "many"), ("two", "few")):
        run(
            "train",
            recipe(tmp_path, f"{name}.yaml", teacher=None, student=plain, data={"source": f"imagefolder:{source}"}, train=quick),
            out=tmp_path / name,
        )
    path = together(tmp_path, student=plain, data={"source": "imagefolder:few", "augment": "none"}, train=quick)
    teacher = run("distill", path, out=tmp_path / "run")["models"]["teacher"]
    own = read(tmp_path / "two/metrics.json")["models"]["student"]["metrics"]
    assert teacher["members"][1]["metrics"]["accuracy"] == pytest.approx(own["accuracy"])
    assert teacher["members"][0]["metrics"]["accuracy"] > 0.8
    assert teacher["metrics"]["accuracy"] > 0.8


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_texts_of_two_lengths_and_exits(mode: str, tmp_path: Path) -> None:
    """Each teacher reads the text through its own tokenizer and length; exits compare logits, so they need no common tokens."""
    pytest.importorskip("transformers")
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        text_folder(tmp_path / name, layers=2)
    rows = [f"w{i} w{j} w{(i * j) % 14},{'odd' if j % 2 else 'even'}" for i in range(10) for j in range(10)]
    (tmp_path / "d.csv").write_text("\n".join(["text,label", *rows]))
    teachers = [{"model": "hf:one", "train": {"epochs": 1}}, {"model": "hf:two", "options": {"max_length": 3}, "train": {"epochs": 1}}]
    objective = [{"loss": "cross_entropy"}, {"loss": "kd", "temperature": 1.0}, {"loss": "ofa_exits", "layers": "auto"}]
    student = {"model": "hf:one", "options": {"layers": [0, 1]}}
    cache = {"mode": mode, "path": None if mode == "off" else str(tmp_path / "cache")}
    data = {"source": "csv:d.csv", "max_length": 8}
    path = together(tmp_path, "text.yaml", teachers, student=student, data=data, objective=objective, teacher_cache=cache)
    metrics = run("distill", path, "--no-baseline", out=tmp_path / "run")
    lengths = [read(tmp_path / f"run/teacher-{i}/model.json")["preprocessing"]["max_length"] for i in (0, 1)]
    assert lengths == [8, 3]
    assert len(metrics["models"]["teacher"]["members"]) == 2


def test_teachers_named_on_the_command_line(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ("--student", f"python:{there / 'nets.py'}:student", "--data", f"npz:{there / 'pictures.npz'}", "--epochs", 1, "--no-baseline")
    one, two = (f"run:{there / name}" for name in ("one", "two"))
    metrics = run("distill", "--teacher", one, "--teacher", two, *plain, "--set", "export=[]", out=tmp_path / "run")
    assert [m["model"] for m in metrics["models"]["teacher"]["members"]] == [one, two]
    assert limbeck("distill", "--teacher", one, "--teacher", f"run:{there / 'tow'}", *plain, "--out", tmp_path / "no") == 2
    assert "--teacher: no such folder" in capsys.readouterr().err


def test_two_of_one_kind_are_two(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = {"model": "python:nets.py:teacher", "train": {"epochs": 1}}
    run("distill", together(there, "twins.yaml", [twin, twin], teacher_cache={"mode": "off"}), "--no-baseline", out=tmp_path / "run")
    assert weights(tmp_path / "run/teacher-0") != weights(tmp_path / "run/teacher-1")
    same = run("distill", together(there, "same.yaml", [ONE, ONE], teacher_cache={"path": "cache"}), "--no-baseline", out=tmp_path / "same")
    assert any("have the same weights" in note for note in same["notes"])


def test_a_file_of_answers_beside_a_model(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file says nothing of the test split: what they say together is unknown there, and the run goes on."""
    x = np.load(there / "pictures.npz")["train_x"]
    np.save(there / "logits.npy", model_logits(there / "one", x).astype(np.float32))
    plain = {"data": {"source": "npz:pictures.npz", "augment": "none"}, "teacher_cache": {"path": str(tmp_path / "cache")}}
    path = together(there, "table.yaml", ["logits:logits.npy", TWO], **plain)
    for out, more in (("kept", ()), ("live", ("--set", "teacher_cache.mode=off", "--set", "teacher_cache.path=null"))):
        metrics = run("distill", path, "--no-baseline", *more, out=tmp_path / out)
        assert set(metrics["models"]) == {"student"}
    assert limbeck("label", path, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["teachers"]) == 1


def test_modules_from_python(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 8), torch.randint(0, 3, (60,))
    big = [torch.nn.Sequential(torch.nn.Linear(8, n), torch.nn.ReLU(), torch.nn.Linear(n, 3)) for n in (16, 32)]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in big]
    found = lib.distill(
        teacher=big,
        student=torch.nn.Linear(8, 3),
        train=(x, y),
        test=(x[:20], y[:20]),
        epochs=2,
        ensemble={"weights": [1, 3]},
        export=[],
        out=tmp_path / "run",
        progress="none",
    )
    with torch.no_grad():
        p = sum(w * m(x[:20]).softmax(1) for w, m in zip((0.25, 0.75), big, strict=True))
    assert found.metrics["models"]["teacher"]["metrics"]["accuracy"] == pytest.approx(float((p.argmax(1) == y[:20]).double().mean()))  # type: ignore[union-attr]
    for module, was in zip(big, before, strict=True):
        assert all(torch.equal(was[k], v) for k, v in module.state_dict().items())


@pytest.mark.long
def test_two_ranks_end_in_the_weights_of_one_process(there: Path, tmp_path: Path) -> None:
    exact = {"optimizer": "sgd", "precision": "float64", "accumulate": 2, "epochs": 2}
    plain = {"model": "python:nets.py:plain"}
    teachers = [{"model": "python:nets.py:plain", "train": {"epochs": 1}}, {"model": "python:nets.py:plain"}]
    path = together(there, "ranks.yaml", teachers, student=plain, train=exact)
    run("distill", path, out=tmp_path / "alone")
    several(2, "distill", path, out=tmp_path / "two")
    for role in ("student", "baseline", "teacher-0"):
        assert distance(tmp_path / "alone" / role, tmp_path / "two" / role) < 1e-9, role


@pytest.mark.long
def test_a_sweep_over_what_they_say_together(there: Path, tmp_path: Path) -> None:
    teachers = [{"model": "python:nets.py:plain", "train": {"epochs": 1}}, TWO]
    path = together(there, "sweep.yaml", teachers, teacher_cache={"path": str(tmp_path / "cache")})
    assert limbeck("sweep", path, "--vary", "ensemble.average=probabilities,logits", "--out", tmp_path / "sweep") == 0
    found = read(tmp_path / "sweep/sweep.json")
    assert len(found["rows"]) == 2
    runs = sorted((tmp_path / "sweep/runs").iterdir())
    assert [(r / "teacher-0").is_dir() for r in runs] == [True, False]  # trained once
    assert read(runs[1] / "metrics.json")["cost"]["teacher_items"] == 0
