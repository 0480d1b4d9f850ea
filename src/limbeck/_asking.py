"""Asking a teacher for its answers: what is missing is asked once and kept, after some of what is there was compared with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck._choices import teacher_choice
from limbeck._machine import processors
from limbeck._teaching import Answers, Identity
from limbeck.cache import Reader, Stored, compare, create, fill, read_manifest
from limbeck.data import BatchBuilder
from limbeck.data import Request as BatchRequest
from limbeck.engine import Engine
from limbeck.errors import Problem, UsageError
from limbeck.models import Model
from limbeck.progress import Progress
from limbeck.ranks import ALONE, Ranks
from limbeck.recipe import Recipe
from limbeck.teacher import LiveTeacher, Meter
from limbeck.types import Batch, ImagePreprocessing, Needs, Preprocessing, TextPreprocessing

__all__ = ["VERIFIED", "block_rows", "engine_of_teacher", "keep_answers"]

VERIFIED = 32
"""Answers that are compared with a teacher that is loaded anyway."""


def block_rows(preprocessing: Preprocessing, device: torch.device) -> int:
    """How many samples a teacher sees at once: as many as keep it busy, and not so many that their activations fill the memory."""
    cuda = device.type == "cuda"
    if isinstance(preprocessing, TextPreprocessing):
        return 256 if cuda else 64
    if isinstance(preprocessing, ImagePreprocessing):
        each = 4 * preprocessing.channels * (preprocessing.height or 224) * (preprocessing.width or 224)
    else:
        each = 4 * int(np.prod(preprocessing.shape))
    fit = (256 << 20 if cuda else 32 << 20) // max(1, each)
    return int(max(16, min(1024 if cuda else 256, 1 << max(0, fit.bit_length() - 1))))


def keep_answers(
    answers: Answers,
    found: Identity,
    model: Model,
    device: torch.device,
    meter: Meter,
    progress: Progress,
    between: Callable[[], None],
    *,
    verify: int = VERIFIED,
    chosen: Callable[[], tuple[Engine, dict[str, Any]]],
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Ask the teacher for everything that is missing, after comparing some of what is there with it. Returns the record for the run.

    chosen: how the teacher runs, where no cache says it (measured then). Several ranks share the parts that are missing.
    """
    recipe, parts, data = answers.recipe, answers.parts, answers.parts.data
    record: dict[str, Any] = {}
    exact = Engine(device, "float64" if recipe.train.precision == "float64" else "float32")
    for purpose, split in (("teach", data.train), ("test", data.test)):
        folder = answers.folders[purpose]
        made, why = ranks.from_main(partial(_made, answers, purpose, model, device, exact, chosen))
        _, manifest = create(answers.root, found.identities[purpose], made, found.about, found.columns[purpose])
        for name in ("precision", "layout"):  # a cache of this machine's own may have been begun otherwise
            if manifest.made[name] != made[name]:
                text = f"holds answers in {manifest.made[name]}, and those of the main rank's machine are in {made[name]}."
                raise UsageError(
                    Problem(f"teacher_cache: {folder}", text, "Copy the cache of one machine to the others, or remove this one.")
                )
        engine = Engine(device, manifest.made["precision"], manifest.made["layout"])
        if purpose == "teach":
            record = {"precision": engine.precision, "layout": engine.layout, **why}
        stored = answers.stored(manifest, purpose)
        live = LiveTeacher(model, engine, None, meter)
        builder = parts.builder(split, training=purpose == "teach", student=model.preprocessing)
        threads = 1 if split.source.in_memory else processors()
        if verify and manifest.parts and ranks.main:
            compared = _verify(answers, purpose, folder, stored, live, builder, verify)
            if compared:
                progress.say(f"{compared:,} {purpose} answers in {folder} were compared with the teacher: they are its own.")
        lacking = answers.lacking(purpose)
        if lacking:
            with _shown(progress, purpose, lacking, ranks) as tick:
                fill(
                    folder,
                    answers.requests[purpose],
                    _asker(live, stored, builder, threads),
                    tick=tick,
                    between=partial(_leave, between, ranks),
                )
        live.check_untouched()
        ranks.barrier()
    return record


def _leave(between: Callable[[], None], ranks: Ranks) -> None:
    between()
    ranks.look()  # also where this process waits for a part that another one had begun


def _made(
    answers: Answers,
    purpose: str,
    model: Model,
    device: torch.device,
    exact: Engine,
    chosen: Callable[[], tuple[Engine, dict[str, Any]]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How a directory of answers is filled, and why: as it was begun, else as is chosen now."""
    folder = answers.folders[purpose]
    if (folder / "manifest.json").exists():
        return read_manifest(folder).made, {"measured": [], "reason": "as the cache was begun"}
    engine, why = chosen() if purpose == "teach" else (exact, {"measured": [], "reason": "full precision for figures"})
    made = {
        "precision": engine.precision,
        "layout": engine.layout,
        "block": block_rows(model.preprocessing, device),
        "threads": torch.get_num_threads(),
    }
    return made, why


def _asker(live: LiveTeacher, stored: Stored, builder: BatchBuilder, threads: int) -> Callable[[list[Any], int], Iterator[dict[str, Any]]]:
    needs = Needs(logits=stored.classes is not None, features=tuple(stored.features))

    def ask(blocks: list[Any], view: int) -> Iterator[dict[str, Any]]:
        with ThreadPoolExecutor(threads) as pool:  # decoding and NumPy leave the interpreter to others
            coming = [pool.submit(builder, BatchRequest(0, 0, view, rows)) for rows in blocks[: 2 * threads]]
            for number in range(len(blocks)):
                batch = coming[number].result()
                coming[number] = None  # type: ignore[call-overload]
                if number + 2 * threads < len(blocks):
                    coming.append(pool.submit(builder, BatchRequest(0, 0, view, blocks[number + 2 * threads])))
                yield _answer(live, stored, batch, needs, view)

    return ask


def _answer(live: LiveTeacher, stored: Stored, batch: Batch, needs: Needs, view: int) -> dict[str, Any]:
    signal = live(live.engine.send(replace(batch, teacher=batch.student)), needs)
    keys = batch.ids if batch.keys is None else batch.keys
    logits = None if signal.logits is None else _array(signal.logits)
    features = {path: _padded(_array(signal.features[path]), shape) for path, shape in stored.features.items()}
    return stored.encode(logits, features, keys, view)


def _array(x: torch.Tensor) -> np.ndarray[Any, Any]:
    x = x.detach()
    return np.ascontiguousarray((x if x.dtype == torch.float64 else x.float()).cpu().contiguous().numpy())


def _padded(values: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Features by token, up to the longest text that there can be."""
    if values.shape[1:] == shape:
        return values
    out = np.zeros((len(values), *shape), dtype=values.dtype)
    out[:, : values.shape[1]] = values
    return out


def _verify(answers: Answers, purpose: str, folder: Path, stored: Stored, live: LiveTeacher, builder: BatchBuilder, count: int) -> int:
    """Compare some rows that are there with the teacher itself; returns how many."""
    reader = Reader(folder)
    for request in answers.requests[purpose]:
        there = np.flatnonzero(reader.has(request.keys, request.view))
        there = np.unique(there[np.linspace(0, max(0, len(there) - 1), min(count, len(there))).astype(np.int64)])  # from all over
        if not len(there):
            continue
        keys = request.keys[there]
        parts, rows = reader.locate(keys, request.view)
        told = stored.read(reader, parts, rows, None)
        batch = builder(BatchRequest(0, 0, request.view, request.places(there)))
        asked = live(
            live.engine.send(replace(batch, teacher=batch.student)),
            Needs(logits=stored.classes is not None, features=tuple(stored.features)),
        )
        features = {p: torch.from_numpy(_padded(_array(asked.features[p]), s)) for p, s in stored.features.items()}
        half = live.engine.precision in ("bf16", "fp16")
        mask = batch.student.get("attention_mask")
        if mask is not None and features:  # what stands where there is no token says nothing
            real = torch.zeros(len(mask), max(f.shape[1] for f in features.values()), 1)
            real[:, : mask.shape[1], 0] = mask.float()
            features = {p: f * real if f.ndim == 3 else f for p, f in features.items()}
            told = replace(told, features={p: f * real if f.ndim == 3 else f for p, f in told.features.items()})
        own = replace(asked, features=features)
        compare(told, own, half=half, folder=folder, ids=keys, sparse=stored.sparse, view=request.view)
        return len(keys)
    return 0


@contextmanager
def _shown(progress: Progress, purpose: str, rows: int, ranks: Ranks) -> Iterator[Callable[[int], None]]:
    began, done = time.perf_counter(), 0

    def tick(count: int) -> None:
        nonlocal done
        ranks.look()
        done += count
        rate = done / max(1e-9, time.perf_counter() - began)
        progress.asked("the teacher" if purpose == "teach" else "the teacher on the test split", done, rows, rate)

    yield tick
    seconds = time.perf_counter() - began
    if purpose == "teach":
        progress.say(f"The teacher was asked {done:,} times in {seconds:,.1f} s ({done / max(1e-9, seconds):,.0f} a second).")


def engine_of_teacher(recipe: Recipe, model: Model, batch: Batch, device: torch.device) -> tuple[Engine, dict[str, Any]]:
    """How the teacher runs, and why: as its own settings say, else as the student's do where they are explicit, else measured."""
    [asked], train = recipe.teachers, recipe.train
    follows = asked.precision == "auto" and train.precision != "auto"
    layout = asked.layout or (train.layout if follows else None)
    return teacher_choice(model, batch, device, asked.precision, layout, train.precision)
