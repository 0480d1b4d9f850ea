"""Who teaches a run: a model in the loop, or what it has said already; whose answers are there, and what of them is missing."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
    default_root,
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
from limbeck.cache._manifest import Column, key_of, locked
from limbeck.data import Data
from limbeck.errors import Problem, UsageError
from limbeck.models import Model, architecture_sha256, class_map, normalised_by_data, preprocessing_identity, state_hash
from limbeck.objective import needs_of
from limbeck.recipe import Recipe, Stage
from limbeck.run import existing_parent, write_atomic
from limbeck.types import ImagePreprocessing, Needs, Preprocessing, TensorPreprocessing, TextPreprocessing

__all__ = [
    "Answers",
    "Identity",
    "Known",
    "Sources",
    "announce",
    "identify",
    "known_of",
    "recalled",
    "unfinished",
    "wants_cache",
]

Sources = tuple[dict[str, Any], tuple[str, ...] | None, list[str]]
"""What :func:`limbeck.models.sources` gives: facts, classes, notes."""


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


def wants_cache(recipe: Recipe, parts: Parts, seeds: int) -> tuple[bool | None, str]:
    """Whether the teacher's answers are kept, and why, for the record. None: it is not worth asking for them, and they are read where all of them are
    there."""
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
    passes = len(parts.asking_epochs) * seeds
    if parts.views is not None and passes <= parts.views:
        return None, f"{passes} epoch{'s' * (passes != 1)} of {parts.views} view{'s' * (parts.views != 1)} would use each answer once"
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
        _, needs = needs_of(recipe.terms)
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
        self.requests = {
            "teach": [self._asked(view, stage) for view, stage in sorted(self._stages().items())],
            "test": [Request(0, data.test.ids)],
        }
        self.folders: dict[str, Path] = {}

    def _stages(self) -> dict[int, Stage]:
        """The views under which the teacher is needed; of the stages that need each, the one with most rows, which has those of the others."""
        found: dict[int, Stage] = {}
        for epoch, stage in self.parts.asking_epochs:
            view = epoch % self.views
            if view not in found or stage.fraction > found[view].fraction:
                found[view] = stage
        return found

    def _asked(self, view: int, stage: Stage) -> Request:
        train = self.parts.data.train
        keys, rows = self.parts.keys(train, view, training=True), self.parts.subset(stage, train)
        return Request(view, keys) if rows is None else Request(view, keys[rows], rows=rows)

    def begun(self) -> bool:
        """Whether any teacher's answers of this kind are there at all: a look at manifests alone."""
        there = [manifest for _, manifest in cache_directories(self.root) if isinstance(manifest, Manifest)]
        return all(any(place.fits(manifest) for manifest in there) for place in self.places.values())

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
        with locked(folder / ".lock"):
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
        given = [(t.model_extra or {}).get("temperature", 4.0) for t in recipe.terms if t.loss == "kd"]
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
        answers.recipe.teachers[0].model,
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
    [spec] = recipe.teachers
    problems = []
    for name, asked in (("precision", spec.precision), ("layout", spec.layout)):
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
        answers.requests[purpose] = [replace(request, lengths=request.of(lengths)) for request in answers.requests[purpose]]
    _refuse_subset(answers, class_map(model, answers.parts.data), model.num_classes)
    for folder in answers.folders.values():
        refuse_orphans(folder)
    if (answers.folders["teach"] / "manifest.json").exists():
        _refuse_precision(answers.recipe, answers.folders["teach"], read_manifest(answers.folders["teach"]))
    return found


def unfinished(answers: Answers) -> str:
    """What is not there of all that this run wants, in words; empty where nothing is missing."""
    lacking, rows = (sum(map(count, answers.requests)) for count in (answers.lacking, answers.rows))
    return f"{lacking:,} of {rows:,} are not in {answers.folders['teach']}" if lacking else ""


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
