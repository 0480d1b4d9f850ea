"""Data given from Python: arrays, tensors, lists of texts, and map-style datasets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.data.arrays import list_part, part_from_array
from limbeck.data.hub import part_from_dataset
from limbeck.data.ids import array_id, from_digests, text_ids
from limbeck.data.labels import Labels, from_array
from limbeck.data.sources import DatasetSamples, Texts, as_array
from limbeck.data.splits import Data, Part, Role, assemble
from limbeck.data.tables import part_from_table
from limbeck.errors import Problem

if TYPE_CHECKING:
    from limbeck.recipe import DataSpec

__all__ = ["data_from_python"]

KEEP_BYTES = 1 << 30
"""A dataset whose samples take more than this is read again at every visit instead of being kept."""


def data_from_python(
    *,
    task: str,
    train: Any,
    test: Any = None,
    valid: Any = None,
    unlabelled: Any = None,
    classes: Sequence[str] | None = None,
    spec: DataSpec | None = None,
) -> Data:
    """:class:`Data` from Python objects.

    Each split is a pair ``(x, y)``, a map-style ``torch.utils.data.Dataset`` (or list) of such pairs, a ``datasets.Dataset`` or a pandas
    ``DataFrame``; ``unlabelled`` is ``x`` alone, or a dataset of samples. x: uint8 images (NHWC, NCHW or NHW), floats of shape (N, ...)
    which are taken as they are in their own precision, a list of texts or of pairs of texts, or a list of images. y: integers or names.
    Where there is no test or validation split, they are split off as ``spec`` says (defaults: 0.2 and 0.1).

    Raises:
        UsageError: with all problems of all splits.
    """
    if spec is None:
        from limbeck.recipe import DataSpec as Spec

        spec = Spec(source="python")
    problems: list[Problem] = []
    notes: list[str] = []
    parts: dict[Role, Part] = {}
    names = None if classes is None else tuple(str(c) for c in classes)
    given: dict[Role, Any] = {"train": train, "test": test, "valid": valid, "unlabelled": unlabelled}
    for role, value in given.items():
        if value is None:
            continue
        part, own = _part(value, role, spec, task, notes, problems)
        if part is not None:
            parts[role] = part
        if names is None and role == "train":
            names = own
    return assemble(parts, spec, task, classes=names, notes=notes, problems=problems)


def _part(
    value: Any, role: Role, spec: DataSpec, task: str, notes: list[str], problems: list[Problem]
) -> tuple[Part | None, tuple[str, ...] | None]:
    import torch

    module = type(value).__module__.partition(".")[0]
    if module == "datasets":
        return part_from_dataset(value, role, role, spec, task, notes, problems)
    if module == "pandas":
        import pyarrow as pa

        return part_from_table(pa.Table.from_pandas(value, preserve_index=False), role, role, spec, task, notes, problems), None
    if isinstance(value, torch.utils.data.TensorDataset) and len(value.tensors) == (1 if role == "unlabelled" else 2):
        value = tuple(value.tensors)
        if role == "unlabelled":
            value = value[0]
    if role == "unlabelled":
        if _is_samples(value):
            return _columns(value, role, None, problems), None
        return _from_dataset(value, role, problems)
    if isinstance(value, tuple) and len(value) == 2:
        labels = from_array(value[1], f"{role} labels", problems)
        return (None if labels is None else _columns(value[0], role, labels, problems)), None
    if isinstance(value, torch.Tensor | np.ndarray) or _is_texts(value):
        problems.append(Problem(role, "labels are missing: give a pair (x, y)."))
        return None, None
    return _from_dataset(value, role, problems)


def _is_samples(value: Any) -> bool:
    """x itself, and no dataset that has to be asked sample by sample."""
    import torch

    return isinstance(value, torch.Tensor | np.ndarray) or _is_texts(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(_text(v) is not None for v in value)


def _text(value: Any) -> tuple[str, str | None] | None:
    if isinstance(value, str):
        return value, None
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, str) for v in value):
        return value[0], value[1]
    return None


def _columns(x: Any, role: Role, labels: Labels | None, problems: list[Problem]) -> Part | None:
    import torch

    if isinstance(x, torch.Tensor):
        tensor = x.detach().cpu()
        return part_from_array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(), role, labels, problems)
    if isinstance(x, np.ndarray) and x.dtype.kind not in "OUS":
        return part_from_array(x, role, labels, problems)
    samples = x.tolist() if isinstance(x, np.ndarray) else list(x) if hasattr(x, "__iter__") and not isinstance(x, str) else None
    if samples is None:
        problems.append(Problem(role, f"x is {type(x).__name__}; an array, a tensor or a list of texts or images is expected."))
        return None
    if labels is not None and len(samples) != len(labels):
        problems.append(Problem(role, f"{len(samples):,} samples, and {len(labels):,} labels; they must be as many."))
        return None
    return _from_list(samples, role, labels, problems)


def _from_list(samples: list[Any], role: Role, labels: Labels | None, problems: list[Problem]) -> Part | None:
    if not samples:
        problems.append(Problem(role, f"the {role} split is empty."))
        return None
    texts = [_text(s) for s in samples]
    if any(t is not None for t in texts):
        wrong = [i for i, t in enumerate(texts) if t is None]
        if wrong:
            problems.append(Problem(role, f"sample {wrong[0]} is {type(samples[wrong[0]]).__name__}, and others are texts."))
            return None
        clean = [t for t in texts if t is not None]
        pairs = [p for _, p in clean]
        paired = any(p is not None for p in pairs)
        if paired and any(p is None for p in pairs):
            problems.append(Problem(role, f"sample {pairs.index(None)} is one text, and others are pairs."))
            return None
        firsts = [t for t, _ in clean]
        return Part(role, Texts(firsts, pairs if paired else None), text_ids(firsts, pairs if paired else None), labels)
    arrays = []
    for number, sample in enumerate(samples):
        try:
            arrays.append(as_array(sample))
        except (TypeError, ValueError) as error:
            problems.append(Problem(role, f"sample {number} is neither an image (Pillow, uint8), floats nor text: {error}."))
            return None
    if all(a.dtype == np.uint8 for a in arrays):
        depths = {a.shape[2] for a in arrays} - {1}
        if len(depths) > 1:
            problems.append(Problem(role, f"images have different numbers of channels: {sorted(depths)}."))
            return None
        return list_part(arrays, role, labels)
    if len({(a.shape, a.dtype == np.uint8) for a in arrays}) > 1:
        shapes = sorted({f"{a.dtype} {a.shape}" for a in arrays})[:4]
        problems.append(Problem(role, f"samples have different shapes or types: {', '.join(shapes)}.", "Give uint8 images instead."))
        return None
    stack = np.stack(arrays)
    return part_from_array(stack[:, None] if stack.ndim == 1 else stack, role, labels, problems)


def _from_dataset(dataset: Any, role: Role, problems: list[Problem]) -> tuple[Part | None, tuple[str, ...] | None]:
    """Every sample of a map-style dataset, kept where all fit into ``KEEP_BYTES``, else read again when they are needed."""
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        hint = "Give its dataset." if type(dataset).__name__ == "DataLoader" else ""
        message = f"{type(dataset).__name__} is neither a pair (x, y) nor a dataset with __len__ and __getitem__."
        problems.append(Problem(role, message, hint))
        return None, None
    count = len(dataset)
    if not count:
        problems.append(Problem(role, f"the {role} split is empty."))
        return None, None
    labelled = role != "unlabelled"
    samples: list[Any] = []
    labels: list[Any] = []
    digests: list[bytes] = []
    kept, largest, kinds, shapes = 0, 0, set(), set()
    for index in range(count):
        item = dataset[index]
        pair = isinstance(item, tuple | list) and len(item) == 2
        if labelled and not pair:
            given = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, tuple | list | dict) else "")
            problems.append(Problem(role, f"the dataset gives {given} at index {index}; (x, y) is expected."))
            return None, None
        content = item[0] if labelled or (pair and _text(item) is None) else item
        try:
            sample = _text(content) or as_array(content)
        except (TypeError, ValueError) as error:
            problems.append(Problem(role, f"sample {index} of the dataset is neither an image (Pillow, uint8), floats nor text: {error}."))
            return None, None
        if index in _probes(count) and not _same(dataset, index, sample, labelled or (pair and _text(item) is None)):
            message = f"the dataset gives another sample each time index {index} is read (a random transform?)."
            problems.append(Problem(role, message, "Give it without random transforms; data.augment makes views that can be repeated."))
            return None, None
        if labelled:
            labels.append(item[1].item() if hasattr(item[1], "item") and getattr(item[1], "ndim", 0) == 0 else item[1])
        if isinstance(sample, np.ndarray):
            kept += sample.nbytes
            digests.append(array_id(sample))
            kinds.add("image" if sample.dtype == np.uint8 else "tensor")
            shapes.add(sample.shape)
            largest = max(largest, sample.shape[2] if sample.dtype == np.uint8 else 0)
        if kept <= KEEP_BYTES or not isinstance(sample, np.ndarray):
            samples.append(sample if isinstance(sample, np.ndarray) else content)
        else:
            samples.clear()
    read = from_array(np.array(labels, dtype=object), f"{role} labels", problems) if labelled else None
    if labelled and read is None:
        return None, None
    classes = _classes_of(dataset)
    if len(samples) == count:
        return _from_list(samples, role, read, problems), classes
    if len(kinds) > 1 or (kinds == {"tensor"} and len(shapes) > 1):
        problems.append(Problem(role, "samples have different shapes or types.", "Give uint8 images instead."))
        return None, classes
    ids = from_digests(digests)
    shape = next(iter(shapes))
    if kinds == {"tensor"}:
        return Part(role, DatasetSamples(dataset, "tensor", ids, 0, labelled), ids, read, shape=shape), classes
    size = (shape[0], shape[1]) if len({s[:2] for s in shapes}) == 1 else None
    return Part(role, DatasetSamples(dataset, "image", ids, largest, labelled), ids, read, size=size, channels=largest), classes


def _probes(count: int) -> frozenset[int]:
    """Where a dataset is read twice: a random flip escapes one look half of the time, and eight looks hardly ever."""
    return frozenset(round(i * (count - 1) / 7) for i in range(8))


def _same(dataset: Any, index: int, sample: Any, paired: bool) -> bool:
    item = dataset[index]
    content = item[0] if paired else item
    again = _text(content) or as_array(content)
    if isinstance(sample, np.ndarray):
        return isinstance(again, np.ndarray) and array_id(again) == array_id(sample)
    return bool(again == sample)


def _classes_of(dataset: Any) -> tuple[str, ...] | None:
    """``dataset.classes``, as torchvision's data sets have it, also inside a ``Subset``."""
    seen: Any = dataset
    for _ in range(8):
        names = getattr(seen, "classes", None)
        if isinstance(names, list | tuple) and names and all(isinstance(n, str) for n in names):
            return tuple(names)
        if not hasattr(seen, "dataset"):
            return None
        seen = seen.dataset
    return None
