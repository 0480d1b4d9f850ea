"""What the answers of the models say beyond a mean: calibration, classes, confusions, disagreements.

Shapes: N test items, C classes. Everything returned is ready for JSON: plain numbers and strings, None where something is unknown.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BINS", "analyse"]

BINS = 15
"""Confidence bins of equal width, as in Guo et al., "On Calibration of Modern Neural Networks" (2017)."""

FORMAT = 1
_PIECE = 1 << 22  # logits that are looked at at once
CONFUSIONS = 20

Sample = Callable[[int], Mapping[str, str | bytes]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class _Answers:
    """One model's answers: ``predicted`` (N,), -1 where its logits hold a NaN; ``confidence`` (N,), NaN there; ``right`` (N,)."""

    predicted: Ints
    confidence: Floats
    right: Bools


def analyse(
    *,
    labels: Any,
    logits: Mapping[str, Any],
    classes: Sequence[str],
    sample: Sample,
    limit: int = 24,
) -> dict[str, Any]:
    """The contents of a run's ``analysis.json``.

    labels: ``(N,)`` integers, -1 for items without a label, which are left out. logits: for each role (``teacher``, ``baseline``,
    ``student``) an ``(N, C)`` array of the same items. sample: gives ``{"text": ...}`` or ``{"png": ...}`` of the item at an index
    of ``labels``; it is called for at most ``limit`` items.

    Keys of the result: ``format``, ``items``, ``classes``, ``support`` (items of each class), ``models`` and ``samples``.
    ``models[role]`` has ``accuracy``, ``ece``, ``non_finite`` (items whose logits hold a NaN: they count as wrong), ``bins`` (``low``,
    ``high``, ``count``, ``correct`` and mean ``confidence`` of each of the 15 confidence bins: the reliability diagram and the
    histogram), ``class_accuracy`` (C,) and ``confusions`` (the most frequent ``label``, ``predicted``, ``count``).
    ``samples`` has ``disagree`` (items on which teacher and student differ, None without a teacher) and ``groups``: with a teacher
    ``student_wrong``, ``teacher_wrong`` and ``both_wrong`` (wrong in different ways); without one ``mistakes``, the student's own.
    Each has its ``count`` and its most confident ``items``: ``index``, ``label``, ``answers[role]`` with ``class`` and ``confidence``,
    and the ``text`` or the ``png`` in base64.
    """
    given = np.asarray(labels).reshape(-1).astype(np.int64)
    kept = np.flatnonzero(given >= 0)
    truth = given[kept]
    answers = {role: _answers(np.asarray(values), kept, truth) for role, values in logits.items()}
    support = np.bincount(truth, minlength=len(classes))
    return {
        "format": FORMAT,
        "items": len(truth),
        "classes": [str(name) for name in classes],
        "support": support.tolist(),
        "models": {role: _model(found, truth, support) for role, found in answers.items()},
        "samples": _samples(answers, truth, kept, sample, limit),
    }


def _answers(logits: Any, kept: Ints, truth: Ints) -> _Answers:
    """Of the rows ``kept``, a few at a time: with many classes a second copy of all logits would be large."""
    if len(kept) == 0:
        return _Answers(truth, np.zeros(0), np.zeros(0, bool))
    rows = max(1, _PIECE // logits.shape[1])
    pieces = [_piece(logits[kept[start : start + rows]]) for start in range(0, len(kept), rows)]
    predicted, confidence = (np.concatenate(column) for column in zip(*pieces, strict=True))
    return _Answers(predicted, confidence, predicted == truth)


def _piece(logits: Any) -> tuple[Ints, Floats]:
    raw = np.asarray(logits, np.float64)
    known: Bools = np.asarray(~np.isnan(raw).any(axis=-1))
    shift = np.where(known[:, None], raw, 0.0)
    top = shift.max(-1, keepdims=True)
    # Where the largest logit is infinite the softmax is shared by the infinite ones.
    with np.errstate(over="ignore"):
        weight = np.where(np.isinf(top), shift == top, np.exp(shift - np.where(np.isinf(top), 0.0, top)))
    confidence = np.where(known, weight.max(-1) / weight.sum(-1), np.nan)
    return np.where(known, shift.argmax(-1), -1).astype(np.int64), confidence


def _model(found: _Answers, truth: Ints, support: Ints) -> dict[str, Any]:
    known = found.predicted >= 0
    confidence, right = found.confidence[known], found.right[known]
    # Bins are closed on the right, as in the published code: confidence 1.0 belongs to the last one.
    where = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    count = np.bincount(where, minlength=BINS)
    correct = np.bincount(where, weights=right, minlength=BINS)
    total = np.bincount(where, weights=confidence, minlength=BINS)
    hits = np.bincount(truth[found.right], minlength=len(support))
    wrong = known & ~found.right
    pairs, counts = np.unique(np.stack([truth[wrong], found.predicted[wrong]], 1), axis=0, return_counts=True)
    frequent = np.argsort(-counts, kind="stable")[:CONFUSIONS]
    return {
        "accuracy": _number(found.right.mean()) if len(truth) else None,
        "ece": _number(np.abs(correct - total).sum() / known.sum()) if known.any() else None,
        "non_finite": int((~known).sum()),
        "bins": [
            {
                "low": _number(b / BINS),
                "high": _number((b + 1) / BINS),
                "count": int(count[b]),
                "correct": int(correct[b]),
                "confidence": _number(total[b] / count[b]) if count[b] else None,
            }
            for b in range(BINS)
        ],
        "class_accuracy": [_number(hits[c] / n) if n else None for c, n in enumerate(support)],
        "confusions": [{"label": int(pairs[i, 0]), "predicted": int(pairs[i, 1]), "count": int(counts[i])} for i in frequent],
    }


def _samples(answers: Mapping[str, _Answers], truth: Ints, kept: Ints, sample: Sample, limit: int) -> dict[str, Any]:
    student, teacher = answers.get("student"), answers.get("teacher")
    if student is None:
        return {"disagree": None, "groups": {}}
    found: dict[str, tuple[Bools, Floats]]
    if teacher is None:
        found = {"mistakes": (~student.right, student.confidence)}
    else:
        differ = student.predicted != teacher.predicted
        found = {
            "student_wrong": (differ & teacher.right, student.confidence),
            "teacher_wrong": (differ & student.right, teacher.confidence),
            "both_wrong": (differ & ~student.right & ~teacher.right, student.confidence + teacher.confidence),
        }
    ranked = {name: _most_confident(members, confidence) for name, (members, confidence) in found.items()}
    room = _share(limit, [len(rows) for rows in ranked.values()])

    def item(row: int) -> dict[str, Any]:
        index = int(kept[row])
        content = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else str(v) for k, v in sample(index).items()}
        said = {
            role: {"class": int(a.predicted[row]) if a.predicted[row] >= 0 else None, "confidence": _number(a.confidence[row])}
            for role, a in answers.items()
        }
        return {"index": index, "label": int(truth[row]), "answers": said, **content}

    return {
        "disagree": None if teacher is None else int((student.predicted != teacher.predicted).sum()),
        "groups": {
            name: {"count": len(rows), "items": [item(int(row)) for row in rows[:n]]}
            for (name, rows), n in zip(ranked.items(), room, strict=True)
        },
    }


def _most_confident(members: Bools, confidence: Floats) -> Ints:
    rows = np.flatnonzero(members)
    return rows[np.argsort(-np.nan_to_num(confidence[rows], nan=-1.0), kind="stable")]


def _share(limit: int, sizes: Sequence[int]) -> list[int]:
    """``limit`` places over groups, as evenly as their sizes allow.

    >>> _share(9, [1, 10, 10])
    [1, 4, 4]
    """
    room = [0] * len(sizes)
    for i, group in enumerate(sorted(range(len(sizes)), key=lambda g: sizes[g])):
        room[group] = min(sizes[group], (limit - sum(room)) // (len(sizes) - i))
    return room


def _number(x: Any) -> float | None:
    return round(float(x), 6) if math.isfinite(x) else None
