"""Splits: which rows are for training, validation and test, and everything that follows from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from limbeck.data.ids import Ids, groups
from limbeck.data.labels import ClassSet, Labels, choose_classes, encode
from limbeck.data.sources import DatasetSamples, EncodedImages, FileImages, Joined, Kind, Raw, Source
from limbeck.errors import Problem, UsageError, listed
from limbeck.randomness import uniform
from limbeck.types import UNLABELLED

if TYPE_CHECKING:
    from limbeck.recipe import DataSpec

__all__ = ["Data", "Part", "Split", "assemble", "carve", "stratified_order"]

SKIPPED = "skipped.csv"
"""The file in a run's folder that lists the bad samples that were left out."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of a source with their ids and labels.

    rows: ``(N,)`` int64 rows of ``source``. ids: ``(N, 2)`` uint64. labels: ``(N,)`` int64 class indices, -1 where unlabelled.
    """

    name: str
    source: Source
    rows: Int64
    ids: Ids
    labels: Int64

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: npt.ArrayLike) -> Split:
        """The split of these indices into this one (integers or a boolean mask), in that order."""
        chosen = np.asarray(indices)
        if chosen.dtype != np.bool_:
            chosen = chosen.astype(np.int64)
        return replace(self, rows=self.rows[chosen], ids=self.ids[chosen], labels=self.labels[chosen])

    def read(self, indices: npt.ArrayLike) -> Raw:
        """The raw samples of these indices."""
        return self.source.read(self.rows[np.asarray(indices, dtype=np.int64)])


@dataclass(frozen=True, eq=False)
class Data:
    """The data of a run.

    image_size: ``(height, width)`` in pixels, None where it varies or where samples are no images. channels: of images, else 0. shape: of
    one sample of float arrays, else ``()``. mean, std: one a channel, of the training images in [0, 1] (files: estimated on at most 2,000
    of them). fingerprint: a hash over ids, labels, splits and classes. notes: sentences that a person should be told. skipped: every bad
    sample that was left out (``data.corrupt: skip``), and why.
    """

    task: str
    kind: Kind
    classes: tuple[str, ...]
    classes_known: bool
    train: Split
    valid: Split
    test: Split
    image_size: tuple[int, int] | None
    channels: int
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    notes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()


Role = Literal["train", "valid", "test", "unlabelled"]


@dataclass(frozen=True, eq=False)
class Part:
    """One split as it was given: ``labels`` is None for unlabelled samples. ``size``, ``channels``, ``shape`` as in :class:`Data`. skipped:
    the bad samples that were left out of it, and why."""

    where: str
    source: Source
    ids: Ids
    labels: Labels | None
    size: tuple[int, int] | None = None
    channels: int = 0
    shape: tuple[int, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


def _keys(ids: Ids, seed: int, purpose: str) -> npt.NDArray[np.float64]:
    return uniform(ids, 1, seed, purpose)[:, 0]


def carve(ids: Ids, labels: Int64, fractions: tuple[float, ...], seed: int) -> Int64:
    """``(N,)``: k for the rows of the k-th fraction (from 1), 0 for the rest; stratified, a function of ids, labels and seed alone.

    Rows with the same id stay together, and count once. Every class keeps at least one sample in the rest, and has at least one in each
    part where it has enough.
    """
    first, group = groups(ids)
    label = np.full(len(first), np.iinfo(np.int64).max)
    np.minimum.at(label, group, labels)  # of contradicting duplicates the smallest label decides, whatever the order of rows
    keys = _keys(ids[first], seed, "split")
    side = np.zeros(len(first), np.int64)
    for value in np.unique(label):
        members = np.flatnonzero(label == value)
        members = members[np.argsort(keys[members], kind="stable")]
        start = 0
        for number, fraction in enumerate(fractions, start=1):
            later = sum(1 for f in fractions[number:] if f > 0)
            room = len(members) - 1 - later - start
            count = min(max(1 if fraction > 0 else 0, int(fraction * len(members) + 0.5)), max(0, room))
            side[members[start : start + count]] = number
            start += count
    return side[group]


def stratified_order(ids: Ids, labels: Int64, seed: int, purpose: str) -> Int64:
    """Indices in an order of which every beginning is stratified: one of each label first, then in proportion, by hash of the ids."""
    keys = _keys(ids, seed, purpose)
    priority = np.empty(len(ids))
    for value in np.unique(labels):
        members = np.flatnonzero(labels == value)
        ranked = members[np.argsort(keys[members], kind="stable")]
        priority[ranked] = (np.arange(len(ranked)) + 0.5) / len(ranked)
        priority[ranked[0]] = -1.0
    return np.lexsort((keys, priority)).astype(np.int64)


def assemble(
    parts: Mapping[Role, Part], spec: DataSpec, task: str, *, classes: tuple[str, ...] | None, notes: list[str], problems: list[Problem]
) -> Data:
    """Parts to :class:`Data`: classes, labels, splits where there are none, limits, statistics, notes.

    Raises:
        UsageError: ``problems`` and all further ones.
    """
    if "train" not in parts:
        raise UsageError(problems or [Problem("data.source", "there is no training data.")])
    parts = _same_channels(parts)
    train, unlabelled = parts["train"], parts.get("unlabelled")
    _check_kinds(parts, task, problems)
    for role, part in parts.items():
        if not len(part.source):
            problems.append(Problem(part.where, f"the {role} split is empty."))
    if train.labels is None or problems:
        raise UsageError(problems or [Problem(train.where, "the training data has no labels.")])
    class_set = choose_classes(train.labels, classes, problems)
    if class_set is None:
        raise UsageError(problems)
    encoded: dict[Role, Int64] = {
        role: np.full(len(part.source), UNLABELLED, np.int64) if part.labels is None else encode(part.labels, class_set, problems)
        for role, part in parts.items()
    }
    if not problems:
        _check_classes(train.where, encoded["train"], class_set, problems)
    if class_set.values is not None:
        notes.append(f"The labels {listed(class_set.names, 8)} are the classes 0 .. {len(class_set.names) - 1}, in that order.")
    if problems:
        raise UsageError(problems)
    splits = _split(parts, encoded, spec, notes, problems)
    if problems:
        raise UsageError(problems)
    _note_duplicates(splits, notes)
    train_split = splits["train"]
    if unlabelled is not None:
        extra = _whole("unlabelled", unlabelled, np.full_like(encoded["unlabelled"], UNLABELLED))
        train_split = _joined(train_split, _only_new(extra, splits, notes))
    limited = _limit(train_split, spec, len(class_set.names), notes, problems)
    if problems:
        raise UsageError(problems)
    return _finish(task, limited, splits["valid"], splits["test"], class_set, list(parts.values()), notes)


def _same_channels(parts: Mapping[Role, Part]) -> dict[Role, Part]:
    """Splits that are decoded when they are read, all with as many channels as the one that has most."""
    most = max((p.channels for p in parts.values()), default=0)
    even: dict[Role, Part] = {}
    for role, part in parts.items():
        source = part.source
        if part.channels < most and isinstance(source, FileImages | EncodedImages | DatasetSamples):
            part = replace(part, source=replace(source, channels=most), channels=most)
        even[role] = part
    return even


def _check_kinds(parts: Mapping[Role, Part], task: str, problems: list[Problem]) -> None:
    kinds = sorted({p.source.kind for p in parts.values()})
    if len(kinds) > 1:
        given = ", ".join(f"{p.where}: {p.source.kind}" for p in parts.values())
        problems.append(Problem("data", f"all splits hold the same kind of samples; here {given}."))
        return
    allowed = {"image-classification": ("image", "tensor"), "text-classification": ("text",)}.get(task)
    if allowed is not None and kinds[0] not in allowed:
        other = "text-classification" if kinds[0] == "text" else "image-classification"
        problems.append(Problem("task", f"'{task}' does not go with data of kind {kinds[0]}.", f"Did you mean '{other}'?"))
    shapes = sorted({p.shape for p in parts.values()})
    if len(shapes) > 1:
        problems.append(Problem("data", f"samples have different shapes in different splits: {', '.join(map(str, shapes))}."))
    channels = sorted({p.channels for p in parts.values()})
    if len(channels) > 1:
        given = ", ".join(f"{p.where}: {p.channels}" for p in parts.values())
        problems.append(Problem("data", f"images have different numbers of channels in different splits ({given})."))


def _check_classes(where: str, labels: Int64, classes: ClassSet, problems: list[Problem]) -> None:
    counts = np.bincount(labels, minlength=len(classes.names))
    empty = [classes.names[i] for i in np.flatnonzero(counts == 0)]
    if empty:
        problems.append(Problem(where, f"no training sample is of class {listed(empty, 8)}.", "Add samples, or remove the class."))
    elif len(classes.names) < 2:
        problems.append(Problem(where, f"all training samples have one label ({listed(classes.names)}); at least two classes are needed."))


def _whole(name: str, part: Part, labels: Int64) -> Split:
    return Split(name, part.source, np.arange(len(part.source), dtype=np.int64), part.ids, labels)


def _split(
    parts: Mapping[Role, Part], encoded: Mapping[Role, Int64], spec: DataSpec, notes: list[str], problems: list[Problem]
) -> dict[str, Split]:
    train = _whole("train", parts["train"], encoded["train"])
    first, group = groups(train.ids)
    if len(first) < len(train):
        lowest, highest = np.full(len(first), np.iinfo(np.int64).max), np.full(len(first), -1)
        np.minimum.at(lowest, group, train.labels)
        np.maximum.at(highest, group, train.labels)
        conflicting = int((lowest != highest).sum())
        if conflicting:
            notes.append(f"{conflicting:,} samples occur several times in the training data with different labels.")
    given = {role: _whole(role, parts[role], encoded[role]) for role in ("valid", "test") if role in parts}
    if "test" in given and spec.test_fraction is not None:
        problems.append(Problem("data.test_fraction", "it has no effect: the data has a test split.", "Remove one of them."))
    test_fraction = 0.0 if "test" in given else 0.2 if spec.test_fraction is None else spec.test_fraction
    valid_fraction = 0.0 if "valid" in given else spec.valid_fraction
    for key, value in (("test_fraction", test_fraction), ("valid_fraction", valid_fraction)):
        if not 0 <= value < 1:
            problems.append(Problem(f"data.{key}", f"{value} is out of range: it must be above 0 and below 1."))
    if test_fraction + valid_fraction >= 1:
        problems.append(Problem("data", f"test_fraction {test_fraction} and valid_fraction {valid_fraction} leave nothing to train on."))
    if problems:
        return {}
    side = carve(train.ids, train.labels, (test_fraction, valid_fraction), spec.seed)
    splits = {
        "train": train.take(side == 0),
        "test": given.get("test") or replace(train.take(side == 1), name="test"),
        "valid": given.get("valid") or replace(train.take(side == 2), name="valid"),
    }
    made = [f"{len(splits[r]):,} rows for {r}" for r in ("test", "valid") if r not in given and len(splits[r])]
    if made:
        notes.append(f"Split off by content hash, stratified by class: {' and '.join(made)}; {len(splits['train']):,} remain for training.")
    if not len(splits["test"]):
        message = f"the test split is empty: {len(train):,} samples are too few to split."
        problems.append(Problem("data.test", message, "Give more samples, or a test split."))
    if valid_fraction > 0 and not len(splits["valid"]):
        notes.append(f"There is no validation split: {len(train):,} samples are too few to split one off.")
    return splits


def _only_new(unlabelled: Split, splits: Mapping[str, Split], notes: list[str]) -> Split:
    """Unlabelled rows that stand in no other split: what is tested on is never trained on, and a row with a label keeps it."""
    new = np.ones(len(unlabelled), dtype=np.bool_)
    for role, what in (("test", "row of the test split"), ("valid", "row of the valid split"), ("train", "labelled training row")):
        _, group = groups(np.concatenate([splits[role].ids, unlabelled.ids]))
        known = len(splits[role])
        found = new & np.isin(group[known:], group[:known])
        if found.any():
            message = f"{int(found.sum()):,} of {len(unlabelled):,} unlabelled rows have the same content as a {what} and are left out."
            notes.append(message)
        new &= ~found
    return unlabelled.take(new)


def _joined(first: Split, second: Split) -> Split:
    if not len(second):
        return first
    return Split(
        first.name,
        Joined((first.source, second.source)),
        np.concatenate([first.rows, second.rows + len(first.source)]),
        np.concatenate([first.ids, second.ids]),
        np.concatenate([first.labels, second.labels]),
    )


def _note_duplicates(splits: Mapping[str, Split], notes: list[str]) -> None:
    train = splits["train"]
    for role in ("test", "valid"):
        other = splits[role]
        _, group = groups(np.concatenate([other.ids, train.ids]))
        shared = int(np.isin(group[len(other) :], group[: len(other)]).sum())
        if shared:
            notes.append(f"{shared:,} of {len(train):,} training rows have the same content as a row of the {role} split.")


def _limit(split: Split, spec: DataSpec, classes: int, notes: list[str], problems: list[Problem]) -> Split:
    for key, limit in (("train_limit", spec.train_limit), ("labelled_limit", spec.labelled_limit)):
        if limit is not None and limit < classes:
            problems.append(Problem(f"data.{key}", f"{limit} is less than one sample for each of the {classes} classes."))
    if problems:
        return split
    if spec.train_limit is not None:
        if spec.train_limit < len(split):
            chosen = stratified_order(split.ids, split.labels, spec.seed, "train_limit")[: spec.train_limit]
            notes.append(f"data.train_limit keeps {spec.train_limit:,} of {len(split):,} training rows.")
            split = split.take(np.sort(chosen))
        elif spec.train_limit > len(split):
            notes.append(f"data.train_limit is {spec.train_limit:,}, and there are only {len(split):,} training rows.")
    if spec.labelled_limit is not None:
        labelled = np.flatnonzero(split.labels >= 0)
        if spec.labelled_limit < len(labelled):
            ranked = stratified_order(split.ids[labelled], split.labels[labelled], spec.seed, "labelled_limit")
            labels = split.labels.copy()
            labels[labelled[ranked[spec.labelled_limit :]]] = UNLABELLED
            notes.append(f"data.labelled_limit keeps the labels of {spec.labelled_limit:,} of {len(labelled):,} training rows.")
            split = replace(split, labels=labels)
        elif spec.labelled_limit > len(labelled):
            notes.append(f"data.labelled_limit is {spec.labelled_limit:,}, and only {len(labelled):,} training rows have a label.")
    return split


def _finish(task: str, train: Split, valid: Split, test: Split, classes: ClassSet, parts: list[Part], notes: list[str]) -> Data:
    kind = parts[0].source.kind
    sizes = {p.size for p in parts}
    mean, std = statistics(train, parts[0].channels) if kind == "image" else ((), ())
    digest = hashlib.sha256()
    for split in (train, valid, test):
        for array in (split.ids, split.labels):
            digest.update(f"{split.name}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    digest.update("\x1f".join((task, kind, *classes.names)).encode("utf-8", "surrogatepass"))
    return Data(
        task=task,
        kind=kind,
        classes=classes.names,
        classes_known=classes.known,
        train=train,
        valid=valid,
        test=test,
        image_size=sizes.pop() if len(sizes) == 1 else None,
        channels=parts[0].channels,
        shape=parts[0].shape,
        mean=mean,
        std=std,
        fingerprint=digest.hexdigest(),
        notes=tuple(notes),
        skipped=tuple(row for part in parts for row in part.skipped),
    )


def statistics(split: Split, channels: int, limit: int = 2000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """``(mean, std)`` of a split's pixels in [0, 1], one entry a channel, each image with equal weight.

    All images where they lie in memory; else ``limit`` of them in hash order, decoded at reduced size. A constant channel gets std 1.
    """
    histogram = np.zeros((channels, 256))
    if split.source.in_memory:
        for start in range(0, len(split), 4096):
            raw: Any = split.read(np.arange(start, min(start + 4096, len(split))))
            _count(raw if isinstance(raw, list) else [raw], histogram)
    else:
        chosen = split.rows[np.argsort(_keys(split.ids, 0, "statistics"), kind="stable")[:limit]]
        for row in chosen:
            _count([preview(split.source, int(row), 128)], histogram)
    means, stds = [], []
    for counted in histogram.tolist():
        # Exactly rounded sums: NumPy's depend on the processor in the last bit, and whose answers a cache holds is told by these numbers too.
        total = max(math.fsum(counted), 1e-300)
        mean = math.fsum(n * (v / 255.0) for v, n in enumerate(counted)) / total
        away = [v / 255.0 - mean for v in range(256)]
        std = math.sqrt(math.fsum(n * (d * d) for d, n in zip(away, counted, strict=True)) / total)
        means.append(mean)
        stds.append(std if std > 1e-6 else 1.0)
    return tuple(means), tuple(stds)


def _count(images: list[Any], histogram: npt.NDArray[np.float64]) -> None:
    for pixels in images:
        share = 1.0 / (pixels.shape[-3] * pixels.shape[-2])
        for channel in range(len(histogram)):
            histogram[channel] += np.bincount(pixels[..., channel].reshape(-1), minlength=256) * share


def preview(source: Source, row: int, size: int) -> npt.NDArray[np.uint8]:
    while isinstance(source, Joined):
        source, row = source.locate(row)
    if isinstance(source, FileImages | EncodedImages):
        return source.preview(row, size)
    raw: Any = source.read(np.array([row]))
    return raw[0]  # type: ignore[no-any-return]
