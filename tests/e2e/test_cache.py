"""The teacher cache, whole: what it reads is what was said, a change does what the design says, and nothing is read silently wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import caching
from limbeck.cache import Reader, read_manifest, seal, verify
from limbeck.cache._manifest import write_manifest
from limbeck.cache._store import write_part
from limbeck.data import load_data
from limbeck.models import build_model, save_model
from limbeck.reading import load_recipe
from limbeck.recipe import ModelSpec
from models_support import text_folder
from running import NAMES, ROOT, arrays, fork, limbeck, lines, make_folder, pictures, read, recipe, run, steps, wait_for, weights

TRAIN, TEST, VIEWS = 24, 18, 2

# --- what a change does -------------------------------------------------------------------------------------------------------------------

NEW = "a new directory"
REFILL = "some rows of the same directory"
READS = "reads what is there; the teacher is not loaded"
KEPT = "reads what is there; the teacher is loaded, and not asked"
REFUSED = "refused, naming what differs"

OWN = """
import torch
from torch import nn

GAIN = 1.0


def bent(x):
    return x * GAIN


class Own(nn.Module):
    def __init__(self, slope=0.1, word=0, act=None):
        super().__init__()
        self.body = nn.Linear(64, 3)
        self._slope = slope
        self.act = act or nn.functional.relu
        with torch.no_grad():
            self.body.weight.view(torch.int32)[0, 0] ^= word

    def forward(self, x):
        y = bent(self.body(x.flatten(1)))
        return self.act(y) - self._slope * self.act(-y)


def teacher(slope=0.1, word=0, soft=False):
    return Own(slope, word, nn.functional.softplus if soft else None)
"""


def pictures_file(path: Path, names: tuple[str, ...] = NAMES, **changes: Any) -> None:
    """The pictures under class names."""
    data: dict[str, Any] = arrays(TRAIN)
    data = {k: np.array(names)[v] if k.endswith("_y") else v for k, v in data.items()}
    np.savez(path, **{**data, **changes})


def image_base(folder: Path, **changes: Any) -> None:
    """A trained teacher with named classes, and a recipe with two views."""
    make_folder(folder)
    pictures_file(folder / "pictures.npz")
    run("train", recipe(folder, "teacher.yaml", teacher=None, student={"model": "python:nets.py:teacher"}), out=folder / "teacher")
    base(folder, **{"teacher": {"model": "run:teacher"}, **changes})


def base(folder: Path, **changes: Any) -> None:
    plain: dict[str, Any] = {
        "data": {"augment": {"crop": 1, "flip": True}},
        "train": {"epochs": 4},
        "teacher_cache": {"path": "cache", "views": VIEWS},
        "baseline": False,
    }
    recipe(folder, "recipe.yaml", **{**plain, **changes})


def own_base(folder: Path) -> None:
    """A python: teacher without augmentation, normalised by the data."""
    make_folder(folder)
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    pictures_file(folder / "pictures.npz")
    base(folder, teacher={"model": "python:own.py:teacher"}, data={})


def hint_base(folder: Path) -> None:
    image_base(folder, objective=HINT)


def mixup_base(folder: Path) -> None:
    image_base(folder, data={"augment": {"mixup": 0.4}})


def text_base(folder: Path) -> None:
    make_folder(folder)
    text_folder(folder / "big", "bert", layers=2, classes=NAMES)
    text_folder(folder / "small", "bert", layers=1, body_only=True)
    for name, count, seed in (("train", TRAIN, 0), ("test", TEST, 1)):
        sentences(folder / f"{name}.csv", count, seed)
    base(
        folder,
        teacher={"model": "hf:big"},
        student={"model": "hf:small"},
        data={"source": "csv:train.csv", "test": "test.csv", "valid": "test.csv", "max_length": 12},
    )


def sentences(path: Path, count: int, seed: int, change: dict[int, str] | None = None) -> None:
    rng = np.random.default_rng(seed)
    rows = [f"{' '.join(f'w{n}' for n in rng.integers(0, 12, rng.integers(3, 12)))},{NAMES[i % 3]}" for i in range(count)]
    for at, text in (change or {}).items():
        rows[at] = text
    path.write_text("\n".join(["text,label", *rows, ""]), encoding="utf-8")


HINT = [
    {"loss": "kd", "weight": 0.7, "temperature": 4.0},
    {"loss": "cross_entropy", "weight": 0.3},
    {"loss": "hint", "weight": 0.1, "student": "body", "teacher": "norm"},
]
SPARSE = {"path": "cache", "views": VIEWS, "codec": "sparse", "top": 1, "samples": 1}


def sparse_base(folder: Path) -> None:
    image_base(folder, objective=HINT[:2], teacher_cache=SPARSE)


BASES: dict[str, Callable[[Path], None]] = {
    "run": image_base,
    "own": own_base,
    "hint": hint_base,
    "mixup": mixup_base,
    "text": text_base,
    "sparse": sparse_base,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a recipe whose cache is filled, made at its first use."""
    there: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in there:
            there[name] = tmp_path_factory.mktemp(name)
            BASES[name](there[name])
            found = caching.label(there[name] / "recipe.yaml")
            views = 1 if name in ("own", "text") else VIEWS
            assert found.asked == {"teach": TRAIN * views, "test": TEST}
        return there[name]

    return get


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def set_recipe(folder: Path, **sections: Any) -> None:
    """Change keys of the recipe; a section is merged, deeper ones replaced."""
    plain = read(folder / "recipe.yaml")
    for key, value in sections.items():
        plain[key] = {**plain.get(key, {}), **value} if isinstance(value, dict) else value
    (folder / "recipe.yaml").write_text(json.dumps(plain), encoding="utf-8")


def setting(**sections: Any) -> Callable[[Path], None]:
    return lambda folder: set_recipe(folder, **sections)


def flip_bit(path: Path, at: int = -5) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def npz(**changes: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change arrays of the data file."""

    def change(folder: Path) -> None:
        data = dict(np.load(folder / "pictures.npz"))
        data.update({key: make(data) for key, make in changes.items()})
        np.savez(folder / "pictures.npz", **data)

    return change


def one_changed(data: dict[str, Any]) -> Any:
    x = data["train_x"].copy()
    x[5, 0, 0] ^= 1
    return x


def reshuffled(folder: Path) -> None:
    order = np.random.default_rng(3).permutation(TRAIN)
    npz(train_x=lambda d: d["train_x"][order], train_y=lambda d: d["train_y"][order])(folder)


def renamed(*names: str) -> Callable[[Path], None]:
    return lambda folder: pictures_file(folder / "pictures.npz", names)


def more_unlabelled(folder: Path) -> None:
    pictures_file(folder / "pictures.npz", unlabelled_x=pictures(6, 9)[0])


def teacher_json(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        about = read(folder / "teacher/student/model.json")
        change(about)
        (folder / "teacher/student/model.json").write_text(json.dumps(about), encoding="utf-8")

    return apply


def moved(old: str, new: str, **sections: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / old, folder / new)
        set_recipe(folder, **sections)

    return apply


def teach_folder(folder: Path) -> Path:
    return next(
        f.parent for f in (folder / "cache").glob("*/manifest.json") if read_manifest(f.parent).identity["views"]["purpose"] == "teach"
    )


def part_gone(folder: Path) -> None:
    next(teach_folder(folder).glob("v00001-*.arrow")).unlink()


def part_repaired(folder: Path) -> None:
    part_gone(folder)
    [found] = [v for v in verify(folder / "cache", repair=True) if v.problems]
    assert "is missing" in found.problems[0]


def other_tokenizer(folder: Path) -> None:
    path = folder / "big/tokenizer.json"
    tokenizer = read(path)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def other_label_order(folder: Path) -> None:
    config = read(folder / "big/config.json")
    names = ("cat", "ant", "bee")
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (folder / "big/config.json").write_text(json.dumps(config), encoding="utf-8")


def several(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


@dataclass(frozen=True)
class Change:
    """base: what is there; effect: what follows. asked: rows that the teacher is asked (teach, test); mapped: whether the answers are put into
    another order of classes; says: in the refusal, or in a note."""

    base: str
    effect: str
    make: Callable[[Path], None]
    asked: tuple[int, int] = (0, 0)
    mapped: bool = False
    says: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def to_reversed(about: dict[str, Any]) -> None:
    about["classes"] = about["classes"][::-1]


def other_mean(about: dict[str, Any]) -> None:
    about["preprocessing"]["mean"] = [0.5]


ALL = (TRAIN * VIEWS, 0)
OWN_ALL = (TRAIN, 0)
CHANGES: dict[str, Change] = {
    # the teacher
    "nothing": Change("run", READS, lambda folder: None),
    "a bit of a run's weights": Change(
        "run", REFUSED, lambda f: flip_bit(f / "teacher/student/model.safetensors"), says="model.safetensors is not the file that was saved"
    ),
    "a bit of a run's record of its source": Change(
        "run", REFUSED, lambda f: flip_bit(f / "teacher/student/nets.py"), says="nets.py is not the file"
    ),
    "a run's weights gone": Change("run", READS, lambda f: (f / "teacher/student/model.safetensors").unlink(), says="are gone"),
    "a run's folder moved": Change("run", READS, moved("teacher", "deep/there", teacher={"model": "run:deep/there"})),
    "a run's folder moved and a sample more": Change(
        "run",
        REFILL,
        several(
            moved("teacher", "deep/there", teacher={"model": "run:deep/there"}),
            npz(train_x=lambda d: np.concatenate([d["train_x"], 255 - d["train_x"][:1]]), train_y=lambda d: np.append(d["train_y"], "ant")),
        ),
        asked=(VIEWS, 0),
    ),
    "the teacher's classes reordered": Change("run", READS, teacher_json(to_reversed), mapped=True),
    "a published normalisation": Change("run", NEW, teacher_json(other_mean), asked=(TRAIN * VIEWS, TEST)),
    "the teacher's resolution": Change(
        "run", NEW, setting(teacher={"model": "run:teacher", "options": {"resolution": 12}}), asked=(TRAIN * VIEWS, TEST)
    ),
    "another precision of the teacher": Change("run", REFUSED, setting(teacher={"precision": "bf16"}), says="teacher.precision: got bf16"),
    "the same precision, said": Change("run", READS, setting(teacher={"precision": "float32"})),
    "another layout of the teacher": Change(
        "run", REFUSED, setting(teacher={"layout": "channels_last"}), says="teacher.layout: got channels_last"
    ),
    "a bit of a python teacher's weights": Change(
        "own", NEW, setting(teacher={"model": "python:own.py:teacher", "options": {"word": 1}}), asked=(TRAIN, TEST)
    ),
    "a line of a python teacher": Change(
        "own", NEW, lambda f: edit(f / "own.py", "y = bent(self", "y = 1.01 * bent(self"), asked=(TRAIN, TEST)
    ),
    "a line of a helper": Change(
        "own", NEW, lambda f: edit(f / "own.py", "return x * GAIN", "return x * 1.01 * GAIN"), asked=(TRAIN, TEST)
    ),
    "a constant of a helper": Change("own", NEW, lambda f: edit(f / "own.py", "GAIN = 1.0", "GAIN = 1.01"), asked=(TRAIN, TEST)),
    "a private setting": Change("own", NEW, setting(teacher={"options": {"slope": 0.2}}), asked=(TRAIN, TEST)),
    "another function in a setting": Change("own", NEW, setting(teacher={"options": {"soft": True}}), asked=(TRAIN, TEST)),
    "a python teacher's comment elsewhere": Change("own", KEPT, lambda f: edit(f / "own.py", "GAIN = 1.0", "GAIN = 1.0  # of nothing")),
    "a bit of a published model's weights": Change("text", NEW, lambda f: flip_bit(f / "big/model.safetensors"), asked=(TRAIN, TEST)),
    "the tokenizer's file": Change("text", NEW, other_tokenizer, asked=(TRAIN, TEST)),
    "a published model's labels": Change("text", KEPT, other_label_order, mapped=True),
    # the data
    "a sample changed": Change("run", REFILL, npz(train_x=one_changed), asked=(VIEWS, 0)),
    "a test sample changed": Change(
        "run",
        REFILL,
        npz(test_x=lambda d: np.bitwise_xor(d["test_x"], (np.arange(TEST) == 3)[:, None, None].astype(np.uint8))),
        asked=(0, 1),
    ),
    "a sample more": Change(
        "run",
        REFILL,
        npz(train_x=lambda d: np.concatenate([d["train_x"], 255 - d["train_x"][:1]]), train_y=lambda d: np.append(d["train_y"], "ant")),
        asked=(VIEWS, 0),
    ),
    "a label changed": Change("run", READS, npz(train_y=lambda d: np.where(np.arange(TRAIN) == 4, "cat", d["train_y"]))),
    "a class renamed": Change("run", REFUSED, renamed("ant", "bee", "dog"), says="dog"),
    "classes in another order": Change("run", READS, renamed("ant", "BEE", "Cat"), mapped=True),
    "data reshuffled": Change("run", READS, reshuffled),
    "data moved": Change("run", READS, moved("pictures.npz", "else/where.npz", data={"source": "npz:else/where.npz"})),
    "fewer rows": Change("run", READS, setting(data={"train_limit": 12})),
    "fewer labels": Change("run", READS, setting(data={"labelled_limit": 9})),
    "unlabelled rows": Change("run", REFILL, more_unlabelled, asked=(6 * VIEWS, 0)),
    "another data seed beside augmentation": Change("run", NEW, setting(data={"seed": 1}), asked=ALL),
    "another data seed without": Change("own", KEPT, setting(data={"seed": 1})),
    "the data's own normalisation moved a little": Change(
        "own",
        REFILL,
        npz(train_x=one_changed),
        asked=(1, 0),
        says="are normalised as in its cache",
    ),
    "the data's own normalisation moved far": Change("own", NEW, npz(train_x=lambda d: d["train_x"] // 2), asked=(TRAIN, TEST)),
    "a text changed": Change("text", REFILL, lambda f: sentences(f / "train.csv", TRAIN, 0, {3: "w1 w2 w3,ant"}), asked=(1, 0)),
    "max_length": Change("text", NEW, setting(data={"max_length": 6}), asked=(TRAIN, TEST)),
    # views and what is stored
    "the crop": Change("run", NEW, setting(data={"augment": {"crop": 2, "flip": True}}), asked=ALL),
    "the flip": Change("run", NEW, setting(data={"augment": {"crop": 1, "flip": False}}), asked=ALL),
    "mixup's alpha": Change("mixup", NEW, setting(data={"augment": {"mixup": 0.5}}), asked=ALL),
    "four views": Change("run", REFILL, setting(teacher_cache={"views": 4}), asked=(TRAIN * 2, 0)),
    "one view": Change("run", READS, setting(teacher_cache={"views": 1})),
    "the codec": Change("run", NEW, setting(teacher_cache={"codec": "float32"}), asked=ALL),
    "a term that reads a layer": Change("run", NEW, setting(objective=HINT), asked=ALL),
    "another layer": Change("hint", NEW, setting(objective=[*HINT[:2], {**HINT[2], "teacher": "body"}]), asked=ALL),
    "store, said": Change("hint", READS, setting(teacher_cache={"store": "both"})),
    "only logits": Change("hint", NEW, setting(objective=HINT[:2]), asked=ALL),
    # what has nothing to do with the teacher
    "temperature and weight": Change(
        "run", READS, setting(objective=[{"loss": "kd", "weight": 0.2, "temperature": 9.0}, {"loss": "cross_entropy", "weight": 0.8}])
    ),
    "another student": Change("run", READS, setting(student={"model": "python:nets.py:plain"})),
    "the run's seed": Change("run", READS, setting(seed=7)),
    "batch size": Change("run", READS, setting(train={"batch_size": 5})),
    "workers": Change("run", READS, setting(train={"workers": 2})),
    "accumulation": Change("run", READS, setting(train={"accumulate": 3})),
    "the student's precision": Change("run", READS, setting(train={"precision": "bf16"})),
    "more epochs": Change("run", READS, setting(train={"epochs": 6})),
    # the cache
    "the cache moved": Change("run", READS, moved("cache", "deep/kept", teacher_cache={"path": "deep/kept"})),
    "a part gone": Change("run", REFUSED, part_gone, says="is missing"),
    "a part gone and repaired": Change("run", REFILL, part_repaired, asked=(TRAIN, 0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_does_what_is_promised_and_no_row_is_ever_wrong(
    name: str, bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new directory, a refill of the rows concerned, a mapping on reading, or a refusal that says what differs; else what is there is read."""
    change, folder = CHANGES[name], tmp_path / "copy"
    shutil.copytree(bases(change.base), folder)
    before = {p.name for p in (folder / "cache").iterdir()}
    change.make(folder)
    file = folder / "recipe.yaml"
    if change.effect == REFUSED:
        assert limbeck("label", file) == 2
        assert change.says in capsys.readouterr().err
        assert limbeck("distill", file, "--out", folder / "out") == 2
        assert change.says in capsys.readouterr().err
        assert not (folder / "out").exists()
        return
    found = caching.label(file)
    assert (found.asked["teach"], found.asked["test"]) == change.asked
    assert (found.folders["teach"].name not in before) == (change.effect == NEW)
    assert found.loaded == (change.effect != READS)
    assert (found.columns is not None) == change.mapped
    assert change.says in " ".join(found.notes)
    if name == "a run's weights gone":  # the teacher is asked after all, to compare
        shutil.copy(bases("run") / "teacher/student/model.safetensors", folder / "teacher/student/model.safetensors")
    wanted = found.begun.answers
    assert wanted is not None
    codec = read_manifest(found.folders["teach"]).identity["stored"]["codec"]
    assert caching.same_rows(found, file, codec) == wanted.rows("teach")
    again = caching.label(file)
    assert again.asked == {"teach": 0, "test": 0}
    if change.effect == READS:
        cost = run("distill", file, "--set", "train.epochs=2", "--set", "train.log_every=50", out=folder / "out")["cost"]
        assert cost["teacher_items"] == 0
        assert cost["cache_hits"] > 0


# --- the same bytes, whoever asked --------------------------------------------------------------------------------------------------------

RICH_TEXT = [
    {"loss": "kd", "weight": 0.7, "temperature": 2.0},
    {"loss": "cross_entropy", "weight": 0.3},
    {"loss": "hint", "weight": 0.1, "student": "bert.encoder.layer.0", "teacher": "bert.encoder.layer.1"},
]
SEVERAL = [
    *RICH_TEXT[:2],
    {"loss": "hint", "student": ["bert.embeddings", "bert.encoder.layer.0"], "teacher": ["bert.embeddings", "bert.encoder.layer.1"]},
    {"loss": "minilm_v2", "student": "bert.encoder.layer.0", "teacher": "bert.encoder.layer.1", "heads": 4},
    {"loss": "tinybert_attention", "layers": "auto", "heads": 2},
]
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "images": ("run", {}),
    "images, accumulated": ("run", {"train": {"accumulate": 3}}),
    "images, in float32": ("run", {"teacher_cache": {"codec": "float32"}}),
    "mixup": ("mixup", {}),
    "a layer": ("hint", {"train": {"accumulate": 2}}),
    "texts in buckets": ("text", {"train": {"batch_size": 5}}),
    "texts in buckets, accumulated": ("text", {"train": {"batch_size": 6, "accumulate": 2}}),
    "layers by token": ("text", {"train": {"batch_size": 5}, "objective": RICH_TEXT}),
    "several layers and attention": ("text", {"train": {"batch_size": 6, "accumulate": 2}, "objective": SEVERAL}),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_run_that_reads_ends_in_the_bytes_of_the_run_that_filled(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Shuffled, bucketed and accumulated; with 0 and with 2 loader workers. What is read is the live teacher's within codec and rounding."""
    kind, changes = TRAININGS[name]
    folder = tmp_path / "copy"
    shutil.copytree(bases(kind), folder)
    shutil.rmtree(folder / "cache")
    set_recipe(folder, **changes)
    file = folder / "recipe.yaml"
    costs = {}
    for out, workers in (("filled", 0), ("read", 0), ("workers", 2)):
        costs[out] = run("distill", file, "--set", f"train.workers={workers}", out=folder / out)["cost"]
        assert weights(folder / out / "student") == weights(folder / "filled/student"), out
        assert [line["loss"] for line in lines(folder / out, "student") if "loss" in line] == [
            line["loss"] for line in lines(folder / "filled", "student") if "loss" in line
        ]
    assert costs["filled"]["teacher_items"] >= TRAIN
    assert [costs[out]["teacher_items"] for out in ("read", "workers")] == [0, 0]
    assert {cost["cache_hits"] for cost in costs.values()} == {4 * TRAIN}
    found = caching.label(file)
    assert found.asked == {"teach": 0, "test": 0}
    assert caching.same_rows(found, file, read(file)["teacher_cache"].get("codec", "float16")) > 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_reading_run_that_is_stopped_goes_on_in_the_same_bytes(how: signal.Signals, bases: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bases("run"), folder)
    set_recipe(folder, train={"checkpoint_every": 3, "batch_size": 6, "accumulate": 2})
    file, out = folder / "recipe.yaml", folder / "out"
    run("distill", file, out=folder / "quiet")
    process = fork("distill", file, "--out", out, said=folder / "said", SLOW="0.05")
    wait_for(process, lambda: len(steps(out, "student")) >= 6)
    process.send_signal(how)
    process.communicate(timeout=600)
    assert process.returncode == {signal.SIGTERM: 75, signal.SIGKILL: -signal.SIGKILL}[how]
    assert limbeck("distill", file, "--resume", "--out", out) == 0
    assert weights(out / "student") == weights(folder / "quiet/student")
    assert steps(out, "student") == steps(folder / "quiet", "student")
    assert read(out / "metrics.json")["cost"]["teacher_items"] == 0
    assert read(out / "environment.json")["resumed_from"] != []


SLOW_TEACHER = """
import os
import time

from torch import nn


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 3)

    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return self.body(x.flatten(1))
"""


def slow_base(folder: Path, train: int = 48, **changes: Any) -> Path:
    make_folder(folder, train)
    (folder / "slow.py").write_text(SLOW_TEACHER, encoding="utf-8")
    base(folder, **{"teacher": {"model": "python:slow.py:Slow"}, **changes})
    return folder / "recipe.yaml"


def committed(cache: Path) -> list[Path]:
    """Parts that a manifest names; a file under its final name that is in none will be written again."""
    return [f.parent / p.name for f in cache.glob("*/manifest.json") for p in read_manifest(f.parent).parts]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_while_it_fills_goes_on_in_the_same_bytes(how: signal.Signals, tmp_path: Path) -> None:
    """A part that is finished is kept; what the resumed run asks is the rest."""
    file = slow_base(tmp_path / "a", teacher_cache={"path": "cache", "views": 4})
    run("distill", file, out=tmp_path / "a/quiet")
    file = slow_base(tmp_path / "b", teacher_cache={"path": "cache", "views": 4})
    out = tmp_path / "b/out"
    process = fork("distill", file, "--out", out, said=tmp_path / "said", SLOW="0.4")
    wait_for(process, lambda: len(committed(tmp_path / "b/cache")) >= 1)
    process.send_signal(how)
    process.communicate(timeout=600)
    assert process.returncode == {signal.SIGTERM: 75, signal.SIGKILL: -signal.SIGKILL}[how]
    kept = {p: p.stat().st_mtime_ns for p in committed(tmp_path / "b/cache")}
    assert 1 <= len(kept) < 5
    assert limbeck("distill", file, "--resume", "--out", out) == 0
    assert weights(out / "student") == weights(tmp_path / "a/quiet/student")
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    parts = [{k: v for k, v in caching.contents(tmp_path / x / "cache").items() if "figures" not in k} for x in ("a", "b")]
    assert parts[0] == parts[1]


def test_eight_processes_killed_at_random_write_the_bytes_of_one(tmp_path: Path) -> None:
    """Killed with SIGKILL again and again, and started again; meanwhile a reader opens the directory over and over, and never sees a wrong row."""
    rows = 64
    cache = tmp_path / "one/cache"
    environment = {"SLOW": "0.01"}

    def start(where: str, number: int) -> Any:
        arguments = ["label", str(tmp_path / where / "recipe.yaml")]
        process = server.Process(target=caching.label_in_child, args=(arguments, str(tmp_path / f"said-{number}"), environment, 1, 4))
        process.start()
        return process

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "limbeck.spine", "running"])
    for name in ("one", "many"):
        slow_base(tmp_path / name, rows)
    alone = start("one", 0)
    alone.join(120)
    assert alone.exitcode == 0, (tmp_path / "said-0").read_text()
    expected = {f.name: (Reader(f), read_manifest(f)) for f in cache.iterdir()}
    assert sum(m.rows for _, m in expected.values()) == rows * VIEWS + TEST
    assert sum(len(m.parts) for _, m in expected.values()) > 30
    keys = {name: stored_keys(reader) for name, (reader, _) in expected.items()}

    rng, end = np.random.default_rng(0), time.monotonic() + 240
    seen, kills, finished = 0, 0, 0
    running = {n: start("many", n) for n in range(1, 9)}
    next_kill = time.monotonic() + 0.5
    while running:
        assert time.monotonic() < end, "it took too long"
        for number, process in list(running.items()):
            if process.exitcode is None:
                continue
            assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / f"said-{number}").read_text()
            del running[number]
            if process.exitcode:
                running[number] = start("many", number)
            else:
                finished += 1
        if kills < 16 and running and time.monotonic() > next_kill:
            victim = list(running)[rng.integers(len(running))]
            kills += running[victim].exitcode is None
            running[victim].kill()
            next_kill = time.monotonic() + float(rng.uniform(0.02, 0.25))
        for name, (whole, manifest) in expected.items():
            folder = tmp_path / "many/cache" / name
            if (folder / "manifest.json").exists():
                seen += rows_of_reader(Reader(folder), whole, keys[name], manifest.identity["stored"]["codec"])
        time.sleep(0.02)
    assert finished == 8
    assert kills >= 8, "the teacher has to be slower for so many to be killed"
    assert seen > rows
    assert caching.contents(tmp_path / "many/cache") == caching.contents(cache)


def stored_keys(reader: Reader) -> dict[int, Any]:
    """Keys of every row by view, as a reader can be asked for them."""
    found: dict[int, list[Any]] = {}
    for part in reader.manifest.parts:
        with pa.OSFile(str(reader.folder / part.name)) as file:
            batch = pa.ipc.open_file(file).get_batch(0)
            more = batch["id_more"].to_numpy().astype(np.uint64) << np.uint64(56)
            found.setdefault(part.view, []).append(np.stack([batch["id"].to_numpy(), more], 1))
    return {view: np.concatenate(keys) for view, keys in found.items()}


def rows_of_reader(reader: Reader, whole: Reader, keys: dict[int, Any], codec: str) -> int:
    """How many rows there are; each is the one of the whole cache, bit for bit."""
    count = 0
    for view, wanted in keys.items():
        parts, rows = reader.locate(wanted, view)
        there = parts >= 0
        if there.any():
            a = reader.gather("logits", parts[there], rows[there])
            b = whole.gather("logits", *(x[there] for x in whole.locate(wanted, view)))
            assert a.tobytes() == b.tobytes()
            count += int(there.sum())
    return count


# --- a teacher that is not there ----------------------------------------------------------------------------------------------------------

HEAVY = '''
import torch
from torch import nn


class Heavy(nn.Module):
    """160 MB of weights that are quickly used."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.body = nn.Linear(64, num_classes)
        self.ballast = nn.Parameter(torch.full((40_000_000,), 0.5))

    def forward(self, x):
        return self.body(x.flatten(1)) * self.ballast[:3]
'''


def test_a_complete_cache_needs_no_teacher(bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are gone, and nobody builds it; its own figures come from the cache, and say so."""
    folder = tmp_path / "copy"
    shutil.copytree(bases("run"), folder)
    file = folder / "recipe.yaml"
    first = run("distill", file, "--verify-cache", "4", out=folder / "with")
    assert first["cost"]["teacher_items"] > 0
    (folder / "teacher/student/model.safetensors").unlink()
    from limbeck import _begin

    built = _begin.build_model

    def no_teacher(*arguments: Any, role: str, **more: Any) -> Any:
        assert role != "teacher", "the teacher was built"
        return built(*arguments, role=role, **more)

    monkeypatch.setattr(_begin, "build_model", no_teacher)
    found = run("distill", file, out=folder / "without")
    assert found["cost"]["teacher_items"] == 0
    assert found["cost"]["teacher_seconds"] == 0
    assert weights(folder / "without/student") == weights(folder / "with/student")
    one, other = (m["models"]["teacher"] for m in (first, found))
    assert one["metrics"] == other["metrics"]
    assert other["from"].startswith("cache ")
    assert other["latency_ms"] == one["latency_ms"], "as it was measured when the teacher was there"
    with pytest.raises(AssertionError, match="the teacher was built"):
        run("distill", file, "--verify-cache", "4", out=folder / "asked")


def test_a_complete_cache_takes_the_memory_of_the_student_alone(tmp_path: Path) -> None:
    """Peak resident memory of fresh processes, beside a teacher of 160 MB."""
    folder = make_folder(tmp_path, 48)
    (folder / "heavy.py").write_text(HEAVY, encoding="utf-8")
    plain = {"train": {"epochs": 2}, "teacher_cache": {"path": "cache"}, "teacher": {"model": "run:teacher"}}
    alone = recipe(folder, "alone.yaml", train={"epochs": 2}, teacher=None)
    file = recipe(folder, **plain)
    loaded, where = load_recipe(alone, {}, [], "train")
    data = load_data(loaded.data, loaded.task, where)
    heavy = build_model(ModelSpec(model="python:heavy.py:Heavy"), role="student", data=data, seed=0, base=where)
    save_model(heavy, folder / "teacher", data.classes)
    del heavy

    def peak(command: str, file: Path, out: str) -> int:
        # a shell between: a process begins with the peak of the one that started it
        arguments = [sys.executable, "-m", "limbeck", command, file, "--no-baseline", "--out", folder / out]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *map(str, arguments)], env=environment, check=True, capture_output=True)
        used = read(folder / out / "metrics.json")["cost"]["peak_rss_bytes"]
        assert isinstance(used, int)
        return used

    filling = peak("distill", file, "fill")
    (folder / "teacher/model.safetensors").unlink()
    reading, student = peak("distill", file, "read"), peak("train", alone, "alone")
    assert read(folder / "read/metrics.json")["cost"]["teacher_items"] == 0
    assert filling > 1.15 * student, "the teacher has to be heavy enough to be seen"
    assert reading < 1.05 * student


TOWER = """
from torch import nn
from blocks import Block


class Tower(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), Block(64, num_classes))

    def forward(self, x):
        return self.body(x)
"""
BLOCKS = """
from torch import nn


class Block(nn.Linear):
    def forward(self, x):
        return 1.0 * super().forward(x)
"""


def forget(*names: str) -> None:
    """As in a new process, a person's modules are read again."""
    for name in [n for n in sys.modules if n in names or any(n.startswith(f"limbeck_user_{x}_") for x in names)]:
        del sys.modules[name]


def test_a_teacher_whose_file_imports_its_neighbour_is_loaded(tmp_path: Path) -> None:
    """The run has a copy of the file, and none of its neighbour, which may change: what it is now is seen only when it is built."""
    folder = make_folder(tmp_path, TRAIN)
    (folder / "tower.py").write_text(TOWER, encoding="utf-8")
    (folder / "blocks.py").write_text(BLOCKS, encoding="utf-8")
    forget("tower", "blocks")
    run("train", recipe(folder, "teacher.yaml", teacher=None, student={"model": "python:tower.py:Tower"}), out=folder / "teacher")
    base(folder, teacher={"model": "run:teacher"})
    first = caching.label(folder / "recipe.yaml")
    again = caching.label(folder / "recipe.yaml")
    assert (again.loaded, again.asked) == (True, {"teach": 0, "test": 0})
    edit(folder / "blocks.py", "1.0 *", "7.0 *")
    forget("tower", "blocks")
    changed = caching.label(folder / "recipe.yaml")
    assert changed.folders["teach"] != first.folders["teach"]
    assert changed.asked == first.asked
    assert caching.same_rows(changed, folder / "recipe.yaml") == TRAIN * VIEWS
    forget("tower", "blocks")


@pytest.mark.parametrize("saved", [False, True], ids=["by name", "its run"])
def test_a_teacher_of_a_module_is_always_loaded(saved: bool, tmp_path: Path) -> None:
    """Its source lies wherever Python finds it; there is no file beside its weights that could be believed."""
    folder = make_folder(tmp_path, TRAIN)
    shutil.copy(folder / "nets.py", folder / "teacher_of_a_module.py")
    named = "python:teacher_of_a_module:plain"
    if saved:
        run("train", recipe(folder, "teacher.yaml", teacher=None, student={"model": named}), out=folder / "teacher")
    base(folder, teacher={"model": "run:teacher" if saved else named})
    assert caching.label(folder / "recipe.yaml").loaded
    found = caching.label(folder / "recipe.yaml")
    assert (found.loaded, found.asked) == (True, {"teach": 0, "test": 0})
    edit(folder / "teacher_of_a_module.py", "return nn.Sequential(nn.Flatten()", "return nn.Sequential(nn.Flatten(), nn.Identity()")
    edit(folder / "teacher_of_a_module.py", "nn.Linear(size, 7), nn.Tanh(), nn.Linear(7", "nn.Linear(size, 7), nn.ReLU(), nn.Linear(7")
    forget("teacher_of_a_module")
    if saved:  # its weights have other names now
        assert limbeck("label", folder / "recipe.yaml") == 2
    else:
        assert caching.label(folder / "recipe.yaml").asked == {"teach": TRAIN * VIEWS, "test": TEST}
    forget("teacher_of_a_module")


def test_names_of_classes_are_those_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled by an object, whose classes stand in one order; then a folder of the same weights, and its own order, adopts what is there; and what it
    is known by from now on must not bring back the object's order."""
    folder = tmp_path / "text"
    text_base(folder)
    with monkeypatch.context() as unnamed:
        from limbeck import _begin

        unnamed.setattr(_begin, "sources", lambda *a, **k: None)
        first = caching.label(folder / "recipe.yaml")
    assert first.columns is None
    other_label_order(folder)
    adopting = caching.label(folder / "recipe.yaml")
    recalled = caching.label(folder / "recipe.yaml")
    assert adopting.folders == recalled.folders == first.folders
    assert (adopting.loaded, recalled.loaded) == (True, False)
    assert adopting.columns.tolist() == [1, 2, 0]
    assert recalled.columns.tolist() == [1, 2, 0]
    assert caching.same_rows(recalled, folder / "recipe.yaml") == TRAIN


# --- mistakes and the command line --------------------------------------------------------------------------------------------------------


def test_ls_verify_and_rm(bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bases("run"), folder)
    cache = folder / "cache"
    names = {("test" if read_manifest(f).identity["views"]["purpose"] == "test" else "teach"): f.name for f in cache.iterdir()}

    assert limbeck("cache", "ls", cache, "--json") == 0
    rows = {row["for"]: row for row in json.loads(capsys.readouterr().out)["caches"]}
    assert {purpose: row["name"] for purpose, row in rows.items()} == names
    assert rows["teach"]["rows"] == TRAIN * VIEWS
    assert rows["teach"]["views"] == VIEWS
    assert rows["test"]["rows"] == TEST
    assert rows["teach"]["codec"] == "float16"
    assert rows["teach"]["bytes"] == sum(p.stat().st_size for p in (cache / names["teach"]).rglob("*") if p.is_file())
    assert limbeck("cache", "ls", cache) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in (*names.values(), "teacher", f"{TRAIN * VIEWS:,} (2 views)"))

    assert limbeck("cache", "verify", cache) == 0
    assert f"{names['teach']}: {TRAIN * VIEWS:,} rows are as they were written." in capsys.readouterr().out
    part = next((cache / names["teach"]).glob("*.arrow"))
    flip_bit(part, 700)
    assert limbeck("cache", "verify", cache) == 2
    assert str(part) in capsys.readouterr().err
    assert limbeck("cache", "ls", cache) == 0
    assert limbeck("cache", "verify", cache / names["test"]) == 0
    capsys.readouterr()
    assert limbeck("cache", "verify", cache, "--repair", "--json") == 0
    [mended] = [one for one in json.loads(capsys.readouterr().out)["caches"] if one["mended"]]
    assert "was taken out" in mended["mended"][0]
    assert limbeck("cache", "verify", cache) == 0

    for wrong, says in (("zzz", "fits none"), ("", "fits 2 directories")):
        assert limbeck("cache", "rm", wrong, names["test"], "--path", cache) == 2
        assert says in capsys.readouterr().err
        assert len(list(cache.iterdir())) == 2, "nothing is removed where one name is wrong"
    assert limbeck("cache", "rm", names["teach"][:8], "--path", cache) == 0
    assert [f.name for f in cache.iterdir()] == [names["test"]]
    for command in (("verify", folder / "nowhere"), ("verify", folder / "teacher")):
        assert limbeck("cache", *command) == 2
        assert "there is no teacher cache in" in capsys.readouterr().err


def test_a_cache_of_another_format_harms_nobody(bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A newer version may have written beside: it is listed and left alone."""
    folder = tmp_path / "copy"
    shutil.copytree(bases("run"), folder)
    other = folder / "cache/0000"
    other.mkdir()
    (other / "manifest.json").write_text(seal({"format": 99, "identity": {}}), encoding="utf-8")
    assert limbeck("cache", "ls", folder / "cache") == 0
    assert "0000" in capsys.readouterr().out
    assert limbeck("cache", "verify", folder / "cache", "--repair") == 0
    assert "has format 99" in capsys.readouterr().out
    assert (other / "manifest.json").exists()
    assert run("distill", folder / "recipe.yaml", out=folder / "out")["cost"]["teacher_items"] == 0


@pytest.mark.parametrize(("cache", "says"), [({"mode": "off"}, "teacher_cache.mode"), ({"views": "live"}, "teacher_cache.views")])
def test_label_of_a_recipe_that_keeps_nothing(cache: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path)
    assert limbeck("label", recipe(tmp_path, teacher_cache=cache)) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "nothing to fill" in said


def test_require_only_reads(bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says how many rows are missing and what differs in what is there; `limbeck label` of the same recipe fills it."""
    folder = tmp_path / "copy"
    shutil.copytree(bases("run"), folder)
    before = caching.contents(folder / "cache")
    set_recipe(folder, teacher_cache={"mode": "require"})
    file = folder / "recipe.yaml"
    assert run("distill", file, out=folder / "first")["cost"]["teacher_items"] == 0
    set_recipe(folder, teacher_cache={"views": 3})
    assert limbeck("distill", file, "--out", folder / "more") == 2
    said = capsys.readouterr().err
    assert f"{TRAIN} of {3 * TRAIN} teach rows are not in" in said
    assert "limbeck label" in said
    set_recipe(folder, data={"augment": {"crop": 2, "flip": True}})
    assert limbeck("distill", file, "--out", folder / "more") == 2
    said = capsys.readouterr().err
    assert f"{3 * TRAIN} of {3 * TRAIN} teach rows are not in" in said
    assert "views.augment.crop: 1 there, 2 here" in said
    assert not (folder / "more").exists()
    assert caching.contents(folder / "cache") == before
    assert limbeck("label", file) == 0
    assert run("distill", file, out=folder / "more")["cost"]["teacher_items"] == 0


def test_a_disk_that_would_not_hold_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is written where a path is named; else the teacher is asked in the loop, and a note says why."""
    folder = make_folder(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500))
    named = recipe(folder, "named.yaml", teacher_cache={"path": "cache"}, baseline=False)
    for command in (["distill", named, "--out", folder / "out"], ["label", named]):
        assert limbeck(*command) == 2
        said = capsys.readouterr().err
        assert "has 500 bytes free" in said
        assert "teacher_cache.path" in said
    assert not (folder / "out").exists()
    assert not (folder / "cache").exists()
    plain = recipe(folder, baseline=False)
    metrics = run("distill", plain, out=folder / "live")
    assert any("The teacher is asked in every step: the teacher's answers need" in note for note in metrics["notes"])
    assert metrics["cost"]["cache_hits"] == 0
    assert read(folder / "live/environment.json")["choices"]["teacher_cache"]["kept"] is False
    assert limbeck("label", plain) == 2
    assert "has 500 bytes free" in capsys.readouterr().err


def rewrite_wrongly(folder: Path) -> None:
    """Every value of a directory one too large, with checksums that say that all is well."""
    manifest = read_manifest(folder)
    reader = Reader(folder)
    for part in manifest.parts:
        columns = {c.name: reader._map(list(manifest.parts).index(part)).columns[c.name] + 1 for c in manifest.columns}
        own = reader._map(list(manifest.parts).index(part)).columns
        keys = np.stack([own["id"], own["id_more"].astype(np.uint64) << np.uint64(56)], 1)
        with_part = manifest.with_part(write_part(folder, part.name, part.view, keys, columns, manifest.columns))
        manifest = with_part
    write_manifest(folder, manifest)


@pytest.mark.parametrize("kind", ["run", "own", "sparse"])
def test_answers_that_are_not_the_teachers_are_refused(
    kind: str, bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole by their checksums, and wrong: seen when they are compared with the teacher, which happens wherever it is loaded."""
    folder = tmp_path / "copy"
    shutil.copytree(bases(kind), folder)
    asked = ("--verify-cache", "8") if kind != "own" else ()
    assert limbeck("label", folder / "recipe.yaml", *asked) == 0
    said = capsys.readouterr().err
    assert f"teach answers in {teach_folder(folder)} were compared with the teacher" in said
    rewrite_wrongly(teach_folder(folder))
    assert limbeck("cache", "verify", folder / "cache") == 0
    for command in (["distill", folder / "recipe.yaml", "--out", folder / "out"], ["label", folder / "recipe.yaml"]):
        assert limbeck(*command, *asked) == 2
        said = capsys.readouterr().err
        assert "does not answer as the teacher does" in said
        assert teach_folder(folder).name in said
    assert limbeck("label", folder / "recipe.yaml", "--verify-cache", "0") == 0


def test_sparse_answers_of_a_teacher_with_more_classes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are shares of all its classes, and cannot be told for some of them; dense ones can."""
    folder = tmp_path / "run"
    image_base(folder)
    pictures_file(folder / "pictures.npz", ("ant", "cat", "cat"))
    base(
        folder,
        teacher={"model": "run:teacher"},
        objective=HINT[:2],
        teacher_cache={"path": "cache", "codec": "sparse", "top": 1, "samples": 1},
    )
    for command in (["label", folder / "recipe.yaml"], ["distill", folder / "recipe.yaml", "--out", folder / "out"]):
        assert limbeck(*command) == 2
        assert "teacher_cache.codec: is sparse" in capsys.readouterr().err
    assert not (folder / "cache").exists()
    assert not (folder / "out").exists()
    base(folder, teacher={"model": "run:teacher"}, objective=HINT[:2])
    found = caching.label(folder / "recipe.yaml")
    assert found.columns is not None
    assert found.columns.tolist() == [0, 2]
    assert caching.same_rows(found, folder / "recipe.yaml") > 0


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a manifest's byte": ("manifest.json", lambda p: flip_bit(p, 300)),
    "a manifest cut short": ("manifest.json", lambda p: p.write_bytes(p.read_bytes()[:-1])),
    "no manifest": ("manifest.json", lambda p: p.unlink()),
    "a part's byte": (".arrow", lambda p: flip_bit(p, 600)),
    "a part cut short": (".arrow", lambda p: p.write_bytes(p.read_bytes()[:-1])),
    "no part": (".arrow", lambda p: p.unlink()),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name_and_mended(
    name: str, bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line: exit code 2, the file named, nothing written; --repair and a label bring back the same bytes."""
    suffix, damage = DAMAGES[name]
    folder = tmp_path / "copy"
    shutil.copytree(bases("run"), folder)
    before = caching.contents(folder / "cache")
    victim = sorted(p for p in teach_folder(folder).iterdir() if p.name.endswith(suffix))[0]
    damage(victim)
    file = folder / "recipe.yaml"
    for command in (["distill", file, "--out", folder / "out"], ["label", file], ["cache", "verify", folder / "cache"]):
        assert limbeck(*command) == 2
        said = capsys.readouterr().err
        assert str(victim) in said
        assert "Traceback" not in said
    assert not (folder / "out").exists()
    assert limbeck("cache", "verify", folder / "cache", "--repair") == 0
    assert limbeck("label", file) == 0
    assert caching.contents(folder / "cache") == before


def test_a_run_that_began_without_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that was too full when a run began, and is not when it is resumed, changes nothing: the answers would have other last bits."""
    monkeypatch.chdir(tmp_path)
    here = make_folder(tmp_path)
    file = recipe(here, train={"epochs": 3, "checkpoint_every": 2})
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500))
        whole = run("distill", file, out=here / "whole")
        run("distill", file, out=here / "cut")
    assert whole["cost"]["cache_hits"] == 0
    (here / "cut/report.html").unlink()  # as if it had been killed before its last file
    metrics = run("distill", file, "--resume", out=here / "cut")
    assert metrics["cost"]["cache_hits"] == 0
    assert list(Path(os.environ["LIMBECK_CACHE"]).rglob("*.arrow")) == []
    assert read(here / "cut/environment.json")["choices"]["teacher_cache"]["kept"] is False
    assert weights(here / "cut/student") == weights(here / "whole/student")


# --- answers that are used once each ------------------------------------------------------------------------------------------------------

ONCE: dict[str, Any] = {"data": {"augment": {"crop": 1, "flip": True}}, "teacher_cache": {"views": 4}, "baseline": False}


def once_base(folder: Path, model: str, **changes: Any) -> Path:
    """A recipe of two epochs and four views, without a path, whose teacher is a run or is a person's own file."""
    make_folder(folder)
    if model == "run:teacher":
        run("train", recipe(folder, "teacher.yaml", teacher=None, student={"model": "python:nets.py:teacher"}), out=folder / "teacher")
    return recipe(folder, **{**ONCE, "teacher": {"model": model}, **changes})


@pytest.mark.parametrize("model", ["run:teacher", "python:nets.py:teacher"])
def test_what_is_there_is_read_although_each_answer_is_used_once(model: str, tmp_path: Path) -> None:
    """`limbeck label` and then a short run, both in the default folder: the teacher is not asked again; without the label it is, in every step."""
    file = once_base(tmp_path, model)
    live = run("distill", file, out=tmp_path / "live")
    assert live["cost"]["cache_hits"] == 0
    assert read(tmp_path / "live/environment.json")["choices"]["teacher_cache"] == {
        "kept": False,
        "reason": "2 epochs of 4 views would use each answer once",
    }
    assert limbeck("label", file) == 0
    found = run("distill", file, out=tmp_path / "read")
    assert found["cost"]["cache_hits"] == 2 * 48
    # one that can only be known when it is loaded is compared with what is there, and measured
    assert (found["cost"]["teacher_items"] == 0) == (model == "run:teacher")
    assert read(tmp_path / "read/environment.json")["choices"]["teacher_cache"] == {"kept": True, "reason": "every answer is there"}
    named = recipe(tmp_path, "named.yaml", **{**ONCE, "teacher": {"model": model}, "teacher_cache": {"views": 4, "path": "named"}})
    run("distill", named, out=tmp_path / "named-run")
    assert weights(tmp_path / "read/student") == weights(tmp_path / "named-run/student")


@pytest.mark.parametrize("model", ["run:teacher", "python:nets.py:teacher"])
def test_what_is_there_in_part_is_said_and_not_read(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher is asked in every step, as without any cache, and the plan says the same."""
    file = once_base(tmp_path, model)
    run("distill", file, out=tmp_path / "live")
    assert limbeck("label", file, "--set", "train.epochs=1") == 0
    found = run("distill", file, out=tmp_path / "part")
    assert found["cost"]["cache_hits"] == 0
    choice = read(tmp_path / "part/environment.json")["choices"]["teacher_cache"]
    assert choice["kept"] is False
    assert "48 of 114 are not in" in choice["reason"]
    assert any("asked in every step: 2 epochs of 4 views would use each answer once, and 48 of 114" in note for note in found["notes"])
    assert weights(tmp_path / "part/student") == weights(tmp_path / "live/student")
    capsys.readouterr()
    assert limbeck("distill", file, "--out", tmp_path / "plan", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["choices"]["teacher_cache"] == choice
    assert plan["cache"]["rows_there"] == {"teach": 48, "test": 18}
    assert limbeck("label", file) == 0
    capsys.readouterr()
    assert limbeck("distill", file, "--out", tmp_path / "plan", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["choices"]["teacher_cache"] == {"kept": True, "reason": "every answer is there"}
    assert plan["cache"]["rows_to_ask"] == {"teach": 0, "test": 0}


def test_what_stands_against_reading_is_said(tmp_path: Path) -> None:
    """A run that need not read goes on: damage, or a precision that was asked for, is named."""
    file = once_base(tmp_path, "run:teacher")
    assert limbeck("label", file) == 0
    asked = recipe(tmp_path, "half.yaml", **{**ONCE, "teacher": {"model": "run:teacher", "precision": "bf16"}})
    found = run("distill", asked, out=tmp_path / "half")
    assert found["cost"]["cache_hits"] == 0
    assert any("teacher.precision: got bf16" in note for note in found["notes"])
    flip_bit(next(Path(os.environ["LIMBECK_CACHE"]).glob("*/v*.arrow")), 600)
    found = run("distill", file, out=tmp_path / "damaged")
    assert found["cost"]["cache_hits"] == 0
    assert any("do not match their checksum" in note and "limbeck cache verify" in note for note in found["notes"])


def test_a_resumed_run_goes_on_with_or_without_answers_as_it_began(tmp_path: Path) -> None:
    """Whatever has come or gone in the default folder meanwhile."""
    file = once_base(tmp_path, "run:teacher", train={"checkpoint_every": 2})
    for name in ("live", "live-cut"):
        run("distill", file, out=tmp_path / name)
    assert limbeck("label", file) == 0
    for name in ("read", "read-cut"):
        assert run("distill", file, out=tmp_path / name)["cost"]["cache_hits"] > 0
    assert weights(tmp_path / "live/student") != weights(tmp_path / "read/student"), "the codec has to be seen"
    for name in ("live-cut", "read-cut"):  # as if they had been killed before they were finished
        for path in (*(tmp_path / name).glob("*.html"), *(tmp_path / name).glob("metrics.json")):
            path.unlink()
        shutil.rmtree(tmp_path / name / "student")
    assert run("distill", file, "--resume", out=tmp_path / "live-cut")["cost"]["cache_hits"] == 0
    for folder in Path(os.environ["LIMBECK_CACHE"]).iterdir():
        shutil.rmtree(folder)
    found = run("distill", file, "--resume", out=tmp_path / "read-cut")
    assert found["cost"]["teacher_items"] > 0
    assert found["cost"]["cache_hits"] == 2 * 48
    for name in ("live", "read"):
        assert weights(tmp_path / f"{name}-cut/student") == weights(tmp_path / name / "student")
