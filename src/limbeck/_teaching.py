"""Who teaches a run: a model in the loop, or what it has said already. A teacher whose answers are all there is never loaded."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck._choices import teacher_choice
from limbeck._parts import Parts
from limbeck.cache import (
    FIGURES,
    CachedTeacher,
    Manifest,
    Place,
    Reader,
    Request,
    Sparse,
    Stored,
    compare,
    create,
    default_root,
    fill,
    missing,
    nearest_other,
    read_figures,
    read_manifest,
    recall,
    refuse_orphans,
    row_bytes,
    seal,
)
from limbeck.cache import directories as cache_directories
from limbeck.cache._manifest import Column, key_of
from limbeck.data import BatchBuilder, Data
from limbeck.data import Request as BatchRequest
from limbeck.engine import Engine
from limbeck.errors import Problem, UsageError
from limbeck.models import Model, architecture_sha256, class_map, normalised_by_data, preprocessing_identity, state_hash
from limbeck.objective import needs_of
from limbeck.progress import Progress
from limbeck.ranks import ALONE, Ranks
from limbeck.recipe import Recipe
from limbeck.run import existing_parent, write_atomic
from limbeck.teacher import LiveTeacher, Meter
from limbeck.types import Batch, ImagePreprocessing, Needs, Preprocessing, TensorPreprocessing, TextPreprocessing

__all__ = [
    "VERIFIED",
    "Answers",
    "Identity",
    "Known",
    "Sources",
    "announce",
    "block_rows",
    "engine_of_teacher",
    "identify",
    "keep_answers",
    "known_of",
    "recalled",
    "wants_cache",
]

Sources = tuple[dict[str, Any], tuple[str, ...] | None, list[str]]
"""What :func:`limbeck.models.sources` gives: facts, classes, notes."""

VERIFIED = 32


@dataclass
class Known:
    """What a run has to know of its teacher, whether it is loaded or not."""

    model: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    class_ids: tuple[str, ...] | None
    num_classes: int
    weights_sha256: str
    parameters: int | None
    notes: list[str] = field(default_factory=list)


def known_of(model: Model) -> Known:
    return Known(
        str(model.spec.get("model")),
        model.preprocessing,
        model.classes,
        model.class_ids,
        model.num_classes,
        model.weights_sha256,
        sum(p.numel() for p in model.module.parameters()),
        model.notes,
    )


def wants_cache(recipe: Recipe, parts: Parts, seeds: int) -> tuple[bool, str]:
    """Whether the teacher's answers are kept, and why, for the record."""
    cache = recipe.teacher_cache
    if cache.mode == "off":
        return False, "teacher_cache.mode is off"
    if cache.views == "live":
        return False, "teacher_cache.views is live"
    if cache.mode == "require":
        return True, "teacher_cache.mode is require"
    if cache.path is not None:
        return True, "teacher_cache.path is named"
    if recipe.train.precision == "float64":
        return False, "train.precision is float64, and answers are kept in at most 32 bits"
    passes = recipe.train.epochs * seeds
    if parts.views is not None and passes <= parts.views:
        return False, f"{passes} epoch{'s' * (passes != 1)} of {parts.views} views would use each answer once"
    return True, f"{passes} epochs use each of {parts.views} view{'s' * (parts.views != 1)} more than once"


class Answers:
    """The cache of one run: which rows it wants in which directories, and what of them is there.

    ``teach`` holds the training rows under every view, ``test`` the test rows as they are evaluated: in full precision and 32 bits, so that the
    teacher's own figures are the teacher's.
    """

    def __init__(self, recipe: Recipe, parts: Parts) -> None:
        cache, data = recipe.teacher_cache, parts.data
        assert parts.views is not None
        self.recipe, self.parts = recipe, parts
        self.root = Path(cache.path) if cache.path is not None else default_root()
        self.views = parts.views
        _, needs = needs_of(recipe.objective)
        self.needs = Needs(
            logits=needs.logits if cache.store is None else cache.store in ("logits", "both"),
            features=needs.features if cache.store in (None, "features", "both") else (),
        )
        self.sparse = _sparse(recipe) if cache.codec == "sparse" and self.needs.logits else None
        augment = parts.augment
        self.places = {
            "teach": Place(
                {
                    "purpose": "teach",
                    "augment": None if augment is None else augment.model_dump(mode="json"),
                    "data_seed": None if augment is None else recipe.data.seed,
                },
                {
                    "logits": self.needs.logits,
                    "features": list(self.needs.features),
                    "codec": cache.codec,
                    **({} if self.sparse is None else {"sparse": vars(self.sparse)}),
                },
            ),
            "test": Place({"purpose": "test"}, {"logits": True, "features": [], "codec": "float32"}),
        }
        asked = range(min(self.views, recipe.train.epochs))
        self.requests = {
            "teach": [Request(view, parts.keys(data.train, view, training=True)) for view in asked],
            "test": [Request(0, data.test.ids)],
        }
        self.folders: dict[str, Path] = {}

    def lacking(self, purpose: str) -> int:
        """Rows that are not there yet."""
        folder = self.folders.get(purpose)
        reader = Reader(folder) if folder is not None and (folder / "manifest.json").exists() else None
        return sum(len(missing(reader, request)) for request in self.requests[purpose])

    def rows(self, purpose: str) -> int:
        return sum(len(request.keys) for request in self.requests[purpose])

    def stored(self, manifest: Manifest, purpose: str) -> Stored:
        classes = manifest.about["num_classes"] if manifest.identity["stored"]["logits"] else None
        sparse = self.sparse if purpose == "teach" else None
        return Stored.of(manifest.columns, classes, sparse, manifest.identity["stored"]["codec"])

    def teacher(self, columns: np.ndarray[Any, np.dtype[np.int64]] | None, device: torch.device) -> CachedTeacher:
        """The teacher of the loop."""
        reader = Reader(self.folders["teach"])
        return CachedTeacher(reader, self.stored(reader.manifest, "teach"), columns, device, self.views)

    def test_logits(self, columns: np.ndarray[Any, np.dtype[np.int64]] | None) -> np.ndarray[Any, Any]:
        """``(N, C)`` float64 logits of the test split, in the data's classes."""
        reader = Reader(self.folders["test"])
        parts, rows = reader.locate(self.parts.data.test.ids, 0)
        logits = reader.gather("logits", parts, rows).astype(np.float64)
        return logits if columns is None else logits[:, columns]

    def figures(self, device: torch.device) -> dict[str, Any]:
        """Size, work and speed of the teacher, as the run that filled the cache measured them; what was not measured is null."""
        folder = self.folders["test"]
        about = read_manifest(folder).about
        unknown = {"latency_ms": None, "throughput": None, "flops": None, "bytes": None, "parameters": about["parameters"]}
        found = read_figures(folder) if (folder / FIGURES).exists() else {}
        if found.pop("measured_on", None) != machine(device):  # the student's speed here cannot be compared with the teacher's elsewhere
            found |= {"latency_ms": None, "throughput": None}
        return {**unknown, **found, "from": f"cache {folder.name}"}

    def keep_figures(self, found: Mapping[str, Any], device: torch.device) -> None:
        folder = self.folders["test"]
        write_atomic(folder / FIGURES, seal({"of": folder.name, "figures": {**found, "measured_on": machine(device)}}))


def machine(device: torch.device) -> dict[str, Any]:
    """Where a speed was measured: the processor or GPU, and the threads."""
    if device.type == "cuda":
        return {"name": torch.cuda.get_device_name(device)}
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {"name": name, "threads": torch.get_num_threads()}


def _sparse(recipe: Recipe) -> Sparse:
    cache = recipe.teacher_cache
    temperature = cache.temperature
    if temperature is None:
        given = [(t.model_extra or {}).get("temperature", 4.0) for t in recipe.objective if t.loss == "kd"]
        temperature = float(given[0]) if given else 4.0
    return Sparse(temperature, cache.top, cache.samples)


def recalled(answers: Answers, sources: Sources, data: Data) -> Known | None:
    """The teacher as its cache knows it, if every answer that this run wants is there; it need not be loaded then."""
    facts, classes, notes = sources
    found: dict[str, tuple[Path, Manifest]] = {}
    for purpose, place in answers.places.items():
        match = recall(answers.root, place, facts)
        if match is None:
            return None
        found[purpose] = match
    if found["teach"][1].identity["preprocessing"] != found["test"][1].identity["preprocessing"]:
        return None
    answers.folders = {purpose: folder for purpose, (folder, _) in found.items()}
    if any(answers.lacking(purpose) for purpose in found):
        answers.folders = {}
        return None
    _, manifest = found["teach"]
    _refuse_precision(answers.recipe, answers.folders["teach"], manifest)
    about = manifest.about
    known = Known(
        str(answers.recipe.teacher.model if answers.recipe.teacher else ""),
        _preprocessing(manifest.identity["preprocessing"]),
        classes if classes is not None else tuple(about["classes"]) if about["classes"] else None,
        tuple(about["class_ids"]) if about["class_ids"] else None,
        about["num_classes"],
        manifest.identity["teacher"]["weights_sha256"],
        about["parameters"],
        [*notes, f"Every answer of the teacher that this run wants is in {answers.folders['teach']}: it is not loaded."],
    )
    answers.parts.shapes_teacher = {
        c.name.removeprefix("features/"): (1, *c.shape) for c in manifest.columns if c.name.startswith("features/")
    }
    _refuse_subset(answers, class_map(known, data), known.num_classes)
    return known


def _preprocessing(kept: Mapping[str, Any]) -> Preprocessing:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
    if values["kind"] == "text":
        return TextPreprocessing(tokenizer="", **values)
    return ImagePreprocessing(**values) if values["kind"] == "image" else TensorPreprocessing(**values)


def _refuse_precision(recipe: Recipe, folder: Path, manifest: Manifest) -> None:
    """How a cache was filled is adopted; only a precision (or layout) that the recipe gives for its teacher, and another one, is refused."""
    assert recipe.teacher is not None
    problems = []
    for name, asked in (("precision", recipe.teacher.precision), ("layout", recipe.teacher.layout)):
        made = manifest.made[name]
        if asked not in (None, "auto", made):
            text = f"got {asked}, and the answers in {folder} were given in {made}."
            problems.append(Problem(f"teacher.{name}", text, "Leave it out to use them, or name another teacher_cache.path."))
    if problems:
        raise UsageError(problems)


def _refuse_subset(answers: Answers, columns: np.ndarray[Any, Any] | None, classes: int) -> None:
    """Sparse answers are shares of all the teacher's classes: they cannot be told for some of them."""
    if answers.sparse is not None and columns is not None and len(columns) < classes:
        text = f"is sparse, which is for a teacher of the data's own classes, and this one has {classes:,} for the data's {len(columns):,}."
        raise UsageError(Problem("teacher_cache.codec", text, "Use float16."))


@dataclass(frozen=True)
class Identity:
    identities: dict[str, dict[str, Any]]
    about: dict[str, Any]
    columns: dict[str, tuple[Column, ...]]


def directories_of(answers: Answers, model: Model, sources: Sources | None) -> Identity:
    """Who a loaded teacher is, and which directories are its."""
    weights = state_hash(model.module)
    teacher = {"weights_sha256": weights, "architecture_sha256": architecture_sha256(model.module)}
    preprocessing = preprocessing_identity(model.preprocessing)
    shapes = {path: shape[1:] for path, shape in answers.parts.shapes_teacher.items() if path in answers.needs.features}
    if isinstance(model.preprocessing, TextPreprocessing):  # by token: as many as there can be
        shapes = {p: (model.preprocessing.max_length, *s[1:]) if len(s) == 2 else s for p, s in shapes.items()}
    codec = answers.recipe.teacher_cache.codec
    stored = {
        "teach": Stored(model.num_classes if answers.needs.logits else None, shapes, codec, answers.sparse),
        "test": Stored(model.num_classes, {}, "float32"),
    }
    about = {
        "model": Path(str(model.spec.get("model"))).name,
        "sources": None if sources is None else sources[0],
        "classes": list(model.classes) if model.classes else None,
        "class_ids": list(model.class_ids) if model.class_ids else None,
        "num_classes": model.num_classes,
        "parameters": sum(p.numel() for p in model.module.parameters()),
    }
    return Identity(
        {purpose: place.identity(teacher, preprocessing) for purpose, place in answers.places.items()},
        about,
        {purpose: s.columns for purpose, s in stored.items()},
    )


def adopt_normalisation(answers: Answers, model: Model, data: Data) -> None:
    """Where nothing is published for a teacher, its images are normalised by the training data, which a new sample moves by a trifle. Its cache then
    says how it was normalised, and that is kept: the teacher is the one that was asked. Beyond 2 % of a deviation it is another teacher."""
    preprocessing = model.preprocessing
    if not isinstance(preprocessing, ImagePreprocessing) or not normalised_by_data(preprocessing, data):
        return
    teacher = {"weights_sha256": model.weights_sha256, "architecture_sha256": architecture_sha256(model.module)}
    own = preprocessing_identity(preprocessing)
    best: tuple[float, dict[str, Any]] | None = None
    for _, manifest in cache_directories(answers.root):
        if not isinstance(manifest, Manifest) or not answers.places["teach"].fits(manifest) or manifest.identity["teacher"] != teacher:
            continue
        there = manifest.identity["preprocessing"]
        if {k: v for k, v in there.items() if k not in ("mean", "std")} != {k: v for k, v in own.items() if k not in ("mean", "std")}:
            continue
        moved = max(abs(a - b) / s for name in ("mean", "std") for a, b, s in zip(there[name], own[name], own["std"], strict=True))
        if best is None or moved < best[0]:
            best = moved, there
    if best is None or best[0] == 0 or best[0] > 0.02:
        return
    model.preprocessing = replace(preprocessing, mean=tuple(best[1]["mean"]), std=tuple(best[1]["std"]))
    model.notes.append(
        f"The teacher's images are normalised as in its cache (mean {_numbers(best[1]['mean'])}, deviation {_numbers(best[1]['std'])}): "
        f"the training data has moved by {100 * best[0]:.2g} % of a deviation since."
    )


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{v:.4f}" for v in values)


def identify(answers: Answers, model: Model, sources: Sources | None) -> Identity:
    """Who a loaded teacher is, and so which directories are its; refuses another precision than theirs. Nothing is written."""
    adopt_normalisation(answers, model, answers.parts.data)
    found = directories_of(answers, model, sources)
    answers.folders = {purpose: answers.root / key_of(identity) for purpose, identity in found.identities.items()}
    for purpose, split in (("teach", answers.parts.data.train), ("test", answers.parts.data.test)):
        lengths = answers.parts.lengths(split, model.preprocessing)
        answers.requests[purpose] = [replace(request, lengths=lengths) for request in answers.requests[purpose]]
    _refuse_subset(answers, class_map(model, answers.parts.data), model.num_classes)
    for folder in answers.folders.values():
        refuse_orphans(folder)
    if (answers.folders["teach"] / "manifest.json").exists():
        _refuse_precision(answers.recipe, answers.folders["teach"], read_manifest(answers.folders["teach"]))
    return found


def announce(answers: Answers, found: Identity, *, may_fall_back: bool) -> tuple[list[str], bool]:
    """Sentences on what is there and what will be asked and stored; and whether it can be kept at all.

    Raises: UsageError in mode ``require`` where something is missing, and where the disk would not hold it.
    """
    notes, need = [], 0
    for purpose, what in (
        ("teach", f"{answers.rows('teach'):,} answers ({_views(len(answers.requests['teach']))})"),
        ("test", "test rows"),
    ):
        folder, lacking = answers.folders[purpose], answers.lacking(purpose)
        size = row_bytes(found.columns[purpose])
        need += lacking * size
        if not lacking:
            continue
        other = None if folder.exists() else nearest_other(answers.root, found.identities[purpose], found.about["model"])
        why = f" What is in {other[0]} is not of use: {'; '.join(other[1][:6])}." if other is not None and purpose == "teach" else ""
        if answers.recipe.teacher_cache.mode == "require":
            text = f"is require, and {lacking:,} of {answers.rows(purpose):,} {purpose} rows are not in {folder}.{why}"
            raise UsageError(Problem("teacher_cache.mode", text, "Fill it with `limbeck label`, or use mode: auto."))
        if purpose == "teach":
            notes.append(
                f"Teacher cache: {what} of {size:,} bytes, {_size(answers.rows(purpose) * size)} in all, in {folder}; "
                f"{lacking:,} are to be asked.{why}"
            )
    free = _free(answers.root)
    if need > free:
        text = f"the teacher's answers need {_size(need)}, and {answers.root} has {_size(free)} free."
        if may_fall_back:
            return [f"The teacher is asked in every step: {text}"], False
        hint = "Name another path, take fewer views, or codec: sparse; or mode: off asks the teacher in every step."
        raise UsageError(Problem("teacher_cache.path", text, hint))
    return notes, True


def _views(count: int) -> str:
    return f"{count} view{'s' * (count != 1)}"


def _free(root: Path) -> int:
    import shutil

    return shutil.disk_usage(existing_parent(root)).free


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


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
        threads = 1 if split.source.in_memory else _cpus()
        if verify and manifest.parts and ranks.main:
            _verify(answers, purpose, folder, stored, live, builder, verify)
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


def _cpus() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def _verify(answers: Answers, purpose: str, folder: Path, stored: Stored, live: LiveTeacher, builder: BatchBuilder, count: int) -> None:
    """Compare some rows that are there with the teacher itself."""
    reader = Reader(folder)
    for request in answers.requests[purpose]:
        there = np.flatnonzero(reader.has(request.keys, request.view))
        there = np.unique(there[np.linspace(0, max(0, len(there) - 1), min(count, len(there))).astype(np.int64)])  # from all over
        if not len(there) or stored.sparse is not None:
            continue
        keys = request.keys[there]
        parts, rows = reader.locate(keys, request.view)
        told = stored.read(reader, parts, rows, None)
        batch = builder(BatchRequest(0, 0, request.view, there))
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
        compare(told, replace(asked, features=features), half=half, folder=folder, ids=keys)
        return


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
    assert recipe.teacher is not None
    asked, train = recipe.teacher, recipe.train
    follows = asked.precision == "auto" and train.precision != "auto"
    layout = asked.layout or (train.layout if follows else None)
    return teacher_choice(model, batch, device, asked.precision, layout, train.precision)
