"""The teacher cache, whole: what it reads is what was said, a change does what the design says, and nothing is read silently wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import caching
from limbeck.cache import read_manifest, verify
from models_support import text_folder
from running import NAMES, arrays, limbeck, make_folder, pictures, read, recipe, run

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
BASES: dict[str, Callable[[Path], None]] = {"run": image_base, "own": own_base, "hint": hint_base, "mixup": mixup_base, "text": text_base}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a recipe whose cache is filled, made at its first use."""
    there: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in there:
            there[name] = tmp_path_factory.mktemp(name)
            BASES[name](there[name])
            found = caching.label(there[name] / "recipe.yaml")
            views = VIEWS if name in ("run", "hint", "mixup") else 1
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
