"""What the tests of the teacher cache share: a cache without a model, whole directories as bytes, and every row beside the teacher itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck import _begin
from limbeck.cache import Reader, Request, Stored, create, fill
from limbeck.engine import Engine
from limbeck.label import label_job
from limbeck.models import Model
from limbeck.progress import Progress
from limbeck.randomness import uniform
from limbeck.reading import absolute, load_recipe
from limbeck.teacher import LiveTeacher, Meter
from limbeck.types import Needs, Signal

Keys = np.ndarray[Any, np.dtype[np.uint64]]

MADE = {"precision": "float32", "layout": "channels_first", "block": 4, "threads": 1}
ABOUT = {"model": "none", "sources": None, "classes": None, "class_ids": None, "num_classes": 3, "parameters": 1}


# --- a cache whose teacher is a function of the key ---


def identity_of(name: str = "a", codec: str = "float16") -> dict[str, Any]:
    return {
        "teacher": {"weights_sha256": name, "architecture_sha256": name},
        "preprocessing": {"kind": "tensor", "shape": [2]},
        "views": {"purpose": "teach", "augment": None, "data_seed": None},
        "stored": {"logits": True, "features": [], "codec": codec},
    }


def some_keys(count: int, seed: int = 0, together: int = 1) -> Keys:
    """``(count, 2)`` random keys; ``together`` rows share a first word."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 2**64, (count, 2), dtype=np.uint64)
    keys[:, 0] = keys[np.arange(count) // together, 0]
    if together > 1:  # 72 bits are stored: the others have to differ in the 8 that are left
        keys[:, 1] = (keys[:, 1] >> np.uint64(8)) | (rng.permutation(count).astype(np.uint64) << np.uint64(56))
    return keys


def answers(keys: Keys, view: int, classes: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What this teacher says, ``(N, classes)``."""
    return (8 * uniform(keys, classes, "answer", view) - 4).astype(np.float32)


class Said:
    """Asks; remembers how many rows it was asked for."""

    def __init__(self, keys: Keys, stored: Stored) -> None:
        self.keys, self.stored, self.rows = keys, stored, 0

    def __call__(self, blocks: list[Any], view: int) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        for rows in blocks:
            self.rows += len(rows)
            assert self.stored.classes is not None
            yield self.stored.encode(answers(self.keys[rows], view, self.stored.classes), {}, self.keys[rows], view)


def make_cache(
    root: Path, keys: Keys, views: int = 1, stored: Stored | None = None, name: str = "a", made: dict[str, Any] | None = None
) -> tuple[Path, int]:
    """A filled directory under ``root``, and how many rows were asked for."""
    stored = stored or Stored(3)
    folder, _ = create(
        root, identity_of(name, stored.codec), {**MADE, **(made or {})}, {**ABOUT, "num_classes": stored.classes}, stored.columns
    )
    said = Said(keys, stored)
    fill(folder, [Request(view, keys) for view in range(views)], said)
    return folder, said.rows


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


# --- a recipe's cache, filled and read without training ---


@dataclass
class Labelled:
    """What ``limbeck label`` did. asked: rows by purpose. loaded: whether the teacher was built. folders: by purpose."""

    asked: dict[str, int]
    loaded: bool
    folders: dict[str, Path]
    columns: Any
    notes: list[str]
    begun: _begin.Begun


def label(file: Path, **job: Any) -> Labelled:
    """Fill the cache of a recipe as ``limbeck label`` does."""
    recipe, base = load_recipe(file, {}, [], "distill")
    recipe = absolute(recipe, base)
    made = _begin.job_of(recipe, base, Path(), **job)
    begun = _begin.begin(made, label=True)
    assert begun.answers is not None
    asked = {purpose: begun.answers.lacking(purpose) for purpose in begun.answers.folders}
    label_job(made, Progress("none"))
    return Labelled(asked, begun.model is not None, dict(begun.answers.folders), begun.columns, begun.notes, begun)


def rows_beside_teacher(found: Labelled, file: Path) -> Iterator[tuple[Signal, Signal]]:
    """What the cache says and what the teacher itself says of every (sample, view), eight samples at a time, in the data's classes."""
    recipe, base = load_recipe(file, {}, [], "distill")
    recipe = absolute(recipe, base)
    begun = found.begun
    answers_, parts = begun.answers, begun.parts
    assert answers_ is not None
    job = _begin.job_of(recipe, base, Path())
    model: Model = begun.model or job.teachers[0].build(False)
    if begun.model is None:
        assert begun.known is not None
        model.preprocessing = _with_tokenizer(begun.known.preprocessing, model)
    cpu = torch.device("cpu")
    live = LiveTeacher(model, Engine(cpu), begun.columns, Meter(model.module))
    told = answers_.teacher(begun.columns, cpu)
    split = parts.data.train
    parts.teacher = model.preprocessing
    builder = parts.builder(split, teacher=True, training=True)
    needs = Needs(answers_.needs.logits, answers_.needs.features)
    from limbeck.data import Request as Wanted

    for view in range(min(answers_.views, recipe.train.epochs)):
        for start in range(0, len(split), 8):
            batch = builder(Wanted(0, view, view, np.arange(start, min(start + 8, len(split)))))
            yield told(batch, needs), live(batch, needs)


def _with_tokenizer(kept: Any, model: Model) -> Any:
    if kept.kind != "text":
        return kept
    from dataclasses import replace

    return replace(kept, tokenizer=model.preprocessing.tokenizer)  # type: ignore[union-attr]


def same_rows(found: Labelled, file: Path, codec: str = "float16") -> int:
    """Assert that no row is wrong: equal within the codec and the rounding of another batch. Returns how many were compared."""
    count = 0
    relative = 2.0**-11 if codec == "float16" else 2.0**-22
    for told, live in rows_beside_teacher(found, file):
        pairs = [(told.features[name], live.features[name]) for name in told.features]
        if told.logits is not None and live.logits is not None:
            pairs.append((told.logits, live.logits))
            count += len(told.logits)
        for a, b in pairs:
            bound = relative * b.abs() + 1e-5
            assert bool(((a - b).abs() <= bound).all()), float((a - b).abs().max())
        if told.sparse is not None and live.logits is not None:
            p = torch.softmax(live.logits.double() / told.sparse.temperature, 1)
            entropy = -(p * p.clamp_min(1e-300).log()).sum(1)
            torch.testing.assert_close(told.sparse.entropy.double(), entropy, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(told.sparse.weight[:, 0].double(), p.amax(1), atol=1e-5, rtol=1e-5)
            count += len(p)
    return count


def readable(folder: Path) -> Reader:
    return Reader(folder)


# --- processes ---


def label_in_child(arguments: list[str], said: str, environment: dict[str, str], part_blocks: int, block: int) -> None:
    """``limbeck label`` in a forked process, with parts and blocks small enough for many of them to meet."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import limbeck._asking
    import limbeck.cache._fill
    from limbeck.cli import main

    limbeck.cache._fill._PART_BLOCKS = part_blocks
    limbeck._asking.block_rows = lambda preprocessing, device: block
    torch.set_num_threads(1)
    main(arguments)
