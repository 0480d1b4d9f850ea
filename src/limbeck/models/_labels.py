"""Which output of a teacher is which class of the data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from limbeck.errors import Problem, UsageError, listed, nearest

if TYPE_CHECKING:
    from limbeck.data import Data

__all__ = ["class_map", "fits", "known_names"]

FINE_TUNE = "Fine-tune it on this data first with teacher: {train: {epochs: 3}}, or name a teacher with these classes."

IndexArray = np.ndarray[Any, np.dtype[np.int64]]


class Answering(Protocol):
    """What must be known of a model to tell which of its outputs is which class; see :class:`Model`."""

    classes: tuple[str, ...] | None
    class_ids: tuple[str, ...] | None
    num_classes: int
    notes: list[str]


def class_map(teacher: Answering, data: Data) -> IndexArray | None:
    """``(C,)`` int64: data class ``j`` is the teacher's output ``map[j]``; None where the outputs are used as they are.

    Where both sides have names they are compared without regard to case, surrounding space, and underscores for spaces; a teacher with more
    classes than the data is used on the data's. Where one side has only numbers, equal counts are taken to mean the same order, with a
    note in ``teacher.notes``. Raises ``UsageError`` where the names or counts do not fit.
    """
    found, problem, note = _match(teacher, data)
    if problem is not None:
        raise UsageError(problem)
    if note and note not in teacher.notes:
        teacher.notes.append(note)
    return found


def fits(model: Answering, data: Data) -> bool:
    """Whether the model's head already answers in the data's classes, in the data's order."""
    found, problem, _ = _match(model, data)
    return problem is None and found is None and model.num_classes == len(data.classes)


def known_names(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names, or None where they say nothing: ``LABEL_0, LABEL_1, ...``, or ``0, 1, ...`` in order."""
    if not classes:
        return None
    if all(re.fullmatch(r"label[_ ]?\d+", name.strip(), re.IGNORECASE) for name in classes):
        return None
    if all(name.strip() == str(i) for i, name in enumerate(classes)):
        return None
    return tuple(classes)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _match(teacher: Answering, data: Data) -> tuple[IndexArray | None, Problem | None, str]:
    wanted = known_names(data.classes) if data.classes_known else None
    offered = known_names(teacher.classes)
    count = len(data.classes)
    if wanted is None or offered is None:
        if teacher.num_classes != count:
            message = f"it has {teacher.num_classes} outputs and the data has {count} classes."
            return None, Problem("teacher", message, FINE_TUNE), ""
        unnamed = "The data's classes are numbers" if wanted is None else "The teacher's classes have no names"
        known = f"; its classes are {listed(offered, 6)}" if offered else ""
        return None, None, f"{unnamed}, so output i of the teacher is taken to be class i{known}."
    data_names = [_plain(name) for name in wanted]
    best: Problem | None = None
    for names in (offered, teacher.class_ids):
        if names is None:
            continue
        teacher_names = [_plain(name) for name in names]
        if teacher_names == data_names:
            return None, None, ""
        problem = _problem(data_names, teacher_names, wanted, names)
        if problem is None:
            position = {name: i for i, name in enumerate(teacher_names)}
            found = np.array([position[name] for name in data_names], dtype=np.int64)
            more = len(teacher_names) - count
            note = f"{more} of the teacher's {len(teacher_names)} classes are not in the data and are left out." if more else ""
            return found, None, note or "The teacher's classes are in another order than the data's and are mapped by name."
        best = best or problem
    return None, best, ""


def _problem(data_names: list[str], teacher_names: list[str], shown: Sequence[str], offered: Sequence[str]) -> Problem | None:
    missing = [i for i, name in enumerate(data_names) if name not in teacher_names]
    if missing:
        first = shown[missing[0]]
        names = listed([shown[i] for i in missing], 6)
        message = f"its classes ({listed(offered, 6)}) do not include these classes of the data: {names}."
        return Problem("teacher", message, " ".join(p for p in (nearest(first, offered), FINE_TUNE) if p))
    twice = sorted({name for name in data_names if teacher_names.count(name) > 1 or data_names.count(name) > 1})
    if twice:
        return Problem("teacher", f"these class names stand for more than one class: {listed(twice, 6)}.", FINE_TUNE)
    return None
