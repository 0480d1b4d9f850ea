"""Labels as people write them (integers, names, columns of a file) to class indices."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.errors import Problem, listed, nearest

__all__ = ["ClassSet", "Labels", "choose_classes", "encode", "from_array", "from_column"]


@dataclass(frozen=True)
class Labels:
    """The labels of one split as read: int64 indices or values, or an object array of str names. ``where`` is for messages.

    ``as_values``: integers are values that may be renumbered (a column of star ratings), not indices into a model's outputs.
    """

    where: str
    values: npt.NDArray[Any]
    as_values: bool = False

    @property
    def named(self) -> bool:
        return self.values.dtype == object

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class ClassSet:
    """The classes of the data: their names in order, whether those names mean something, and for renumbered integers their values."""

    names: tuple[str, ...]
    known: bool
    values: npt.NDArray[np.int64] | None = None


def _rows(bad: npt.NDArray[np.bool_], first: int = 0) -> str:
    rows = np.flatnonzero(bad)
    shown = listed([str(int(r) + first) for r in rows[:5]]) + (" ..." if len(rows) > 5 else "")
    return f"{len(rows)} row{'s' if len(rows) != 1 else ''} ({'row' if len(rows) == 1 else 'rows'} {shown})"


def from_array(values: Any, where: str, problems: list[Problem]) -> Labels | None:
    """Labels given as an array, list or tensor: integers, booleans or strings. Problems are added, and None returned."""
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        hint = "One-hot rows become integers with argmax(1)." if array.ndim == 2 else ""
        problems.append(Problem(where, f"labels have shape {array.shape}; one label a sample, shape (N,), is expected.", hint))
        return None
    if array.dtype.kind in "USO":
        return _from_objects(array.tolist(), where, problems)
    if array.dtype.kind == "f":
        bad = ~np.isfinite(array)
        if bad.any():
            message = f"{_rows(bad)} of the labels are NaN or infinite."
            problems.append(Problem(where, message, "Unlabelled samples go in the unlabelled split."))
        else:
            whole = bool((array == np.floor(array)).all())
            hint = "All are whole numbers: convert them with .astype('int64')." if whole else ""
            problems.append(Problem(where, f"labels have type {array.dtype}; integers or names are expected.", hint))
        return None
    if array.dtype.kind not in "iub":
        problems.append(Problem(where, f"labels have type {array.dtype}; integers or names are expected."))
        return None
    return Labels(where, array.astype(np.int64))


def _from_objects(values: list[Any], where: str, problems: list[Problem]) -> Labels | None:
    missing = np.array([v is None or (isinstance(v, float) and math.isnan(v)) for v in values], dtype=bool)
    if missing.any():
        problems.append(Problem(where, f"{_rows(missing)} have no label.", "Unlabelled samples go in the unlabelled split."))
        return None
    if all(isinstance(v, (int, np.integer)) for v in values):
        return Labels(where, np.array(values, dtype=np.int64))
    if not all(isinstance(v, str | bytes) for v in values):
        kinds = sorted({type(v).__name__ for v in values})
        problems.append(Problem(where, f"labels are of type {listed(kinds)}; integers or names are expected."))
        return None
    names = np.empty(len(values), dtype=object)
    names[:] = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values]
    return Labels(where, names)


_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*)\Z")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\Z")


def from_column(values: Sequence[Any], where: str, problems: list[Problem], *, first_row: int = 1) -> Labels | None:
    """Labels of a file's column. Strings that are all integers count as integers; empty cells are a problem."""
    cells = [v.strip() if isinstance(v, str) else v for v in values]
    missing = np.array([v is None or v == "" or (isinstance(v, float) and math.isnan(v)) for v in cells], dtype=bool)
    if missing.any():
        problems.append(
            Problem(where, f"{_rows(missing, first_row)} have no label.", "Rows without labels go in a file of their own: data.unlabelled.")
        )
        return None
    if cells and all(isinstance(v, str) and _INTEGER.match(v) for v in cells):
        cells = [int(v) for v in cells]
    elif cells and all(isinstance(v, str) and _NUMBER.match(v) for v in cells) and any(_fractional(v) for v in cells):
        cells = [float(v) for v in cells]
    if cells and all(isinstance(v, bool) for v in cells):
        cells = ["true" if v else "false" for v in cells]
    if cells and all(isinstance(v, int) for v in cells):
        try:
            return Labels(where, np.array(cells, dtype=np.int64), as_values=True)
        except OverflowError:
            problems.append(Problem(where, "some labels do not fit in 64 bits."))
            return None
    if cells and all(isinstance(v, float | int) for v in cells):
        message = f"labels are numbers with a fractional part or point (such as {next(v for v in cells if isinstance(v, float))!r}); "
        problems.append(Problem(where, message + "integers or names are expected."))
        return None
    kinds = sorted({type(v).__name__ for v in cells if not isinstance(v, str)})
    if kinds:
        problems.append(Problem(where, f"labels mix types ({listed([*kinds, 'str'])}); integers or names are expected."))
        return None
    names = np.empty(len(cells), dtype=object)
    names[:] = cells
    return Labels(where, names)


def _fractional(text: str) -> bool:
    return any(c in text for c in ".eE")


def choose_classes(train: Labels, given: tuple[str, ...] | None, problems: list[Problem]) -> ClassSet | None:
    """The classes, from the training labels and from names where the data gives them."""
    if given is not None and len(set(given)) != len(given):
        doubled = sorted({n for n in given if given.count(n) > 1})
        problems.append(Problem(train.where, f"class names are given twice: {listed(doubled)}."))
        return None
    if train.named:
        return ClassSet(given if given is not None else tuple(sorted(set(train.values.tolist()))), known=True)
    if given is not None:
        return ClassSet(tuple(given), known=True)
    if not len(train):
        return ClassSet((), known=False)
    present = np.unique(train.values)
    if train.as_values and present[0] != 0:
        return ClassSet(tuple(str(v) for v in present), known=True, values=present)
    if present[0] < 0:
        message = f"{_rows(train.values < 0)} have a negative label; labels are 0 .. classes - 1."
        problems.append(Problem(train.where, message, "Unlabelled samples go in the unlabelled split."))
        return None
    count = int(present[-1]) + 1
    if len(present) < count:
        absent = np.setdiff1d(np.arange(min(count, 100_000)), present)
        hint = "Labels seem to start at 1: subtract 1." if present[0] == 1 and len(present) == count - 1 else ""
        message = f"labels go up to {present[-1]}, and no training sample has label {listed([str(a) for a in absent], 8)}."
        problems.append(Problem(train.where, message, hint or "Number the classes 0 .. classes - 1 without gaps."))
        return None
    return ClassSet(tuple(str(v) for v in range(count)), known=False)


def encode(labels: Labels, classes: ClassSet, problems: list[Problem]) -> npt.NDArray[np.int64]:
    """Class indices of ``labels``; -1, with a problem, where one is not among ``classes``."""
    count = len(classes.names)
    if labels.named or (classes.known and classes.values is None and labels.as_values and _spelled(labels, classes)):
        position = {name: i for i, name in enumerate(classes.names)}
        names = [str(v) for v in labels.values.tolist()]
        encoded = np.array([position.get(n, -1) for n in names], dtype=np.int64).reshape(len(names))
        unknown = sorted({n for n, i in zip(names, encoded, strict=True) if i < 0})
        if unknown:
            if not classes.known:
                message = f"labels are names ({listed(unknown, 5)}), and the training labels are integers."
                problems.append(Problem(labels.where, message))
            else:
                message = f"{_rows(encoded < 0)} have a label that is not among the classes: {listed(unknown, 5)}."
                problems.append(Problem(labels.where, message, nearest(unknown[0], classes.names)))
        return encoded
    if classes.values is not None:
        at = np.searchsorted(classes.values, labels.values).clip(0, count - 1)
        encoded = np.where(classes.values[at] == labels.values, at, -1).astype(np.int64)
    else:
        encoded = np.where((labels.values >= 0) & (labels.values < count), labels.values, -1)
    bad = encoded < 0
    if bad.any():
        unknown = [str(v) for v in np.unique(labels.values[bad])]
        allowed = listed(classes.names, 8) if classes.values is not None else f"0 .. {count - 1}"
        message = f"{_rows(bad)} have a label that is out of range or not in the training data: {listed(unknown, 5)}; "
        message += f"allowed are {allowed}."
        problems.append(Problem(labels.where, message))
    return encoded


def _spelled(labels: Labels, classes: ClassSet) -> bool:
    """Integers of a column whose spelling are the class names themselves."""
    names = set(classes.names)
    return len(labels) > 0 and all(str(v) in names for v in np.unique(labels.values))
