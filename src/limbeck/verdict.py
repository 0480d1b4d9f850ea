"""What the teacher bought, in a sentence."""

from __future__ import annotations

from typing import Any

__all__ = ["gap_closed", "verdict"]


def gap_closed(teacher: float | None, baseline: float | None, student: float) -> float | None:
    """(student - baseline) / (teacher - baseline); None where the teacher is not better than the baseline, or one of them is unknown.

    >>> gap_closed(0.9, 0.8, 0.85)
    0.5
    >>> gap_closed(0.8, 0.9, 0.85) is None
    True
    """
    if teacher is None or baseline is None or teacher <= baseline:
        return None
    return round((student - baseline) / (teacher - baseline), 12)


def verdict(models: dict[str, Any], interval: list[float] | None, seeds: int, source: str, *, alone: bool = False) -> str:
    """One sentence (two where something must be said loudly) from the metrics of teacher, baseline and student.

    alone: there was no teacher; the student learned from itself or its peers. interval: of student - baseline accuracy, in [0, 1]; source: where
    it comes from ("over 3 seeds", "over the test items").
    """

    def accuracy(role: str) -> float | None:
        return models[role]["metrics"]["accuracy"] if role in models else None

    student, baseline, teacher = accuracy("student"), accuracy("baseline"), accuracy("teacher")
    assert student is not None
    what = "accuracy" if seeds == 1 else f"mean accuracy over {seeds} seeds"
    if teacher is None and baseline is not None:
        spread = "" if interval is None else f" (95 % interval {100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}, {source})"
        bought = (
            f"{100 * (student - baseline):+.1f} points against the same student trained {'on labels alone' if alone else 'without the teacher'} "
            f"({_percent(baseline)}){spread}"
        )
        if alone:
            return f"The student reaches {_percent(student)} test {what}, {bought}."
        return f"The student reaches {_percent(student)} test {what}, {bought}; the teacher's own accuracy is unknown."
    if teacher is None:
        return f"The model reaches {_percent(student)} test {what}; it was trained without a teacher."
    reached = f"The student reaches {_percent(student)} test {what}"
    size = _smaller(models)
    if baseline is None:
        return f"{reached}, the teacher {_percent(teacher)}{size}; no baseline was trained, so what the teacher bought is unknown."
    gain = student - baseline
    spread = "" if interval is None else f" (95 % interval {100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}, {source})"
    figures = f"{100 * gain:+.1f} points against the same student trained without the teacher ({_percent(baseline)}){spread}"
    if teacher <= baseline:
        return (
            f"THE TEACHER IS NO BETTER THAN THE BASELINE: it has {_percent(teacher)}, the student trained without it {_percent(baseline)}. "
            f"{reached}, {figures}."
        )
    closed = gap_closed(teacher, baseline, student)
    share = f", {100 * closed:.0f} % of the gap to the teacher ({_percent(teacher)})" if closed is not None else ""
    if gain <= 0:
        return f"The teacher did not help: {_lower(reached)}, {figures}; the teacher has {_percent(teacher)}."
    if interval is not None and interval[0] <= 0:
        return f"The teacher helped by less than the noise: {_lower(reached)}, {figures}{share}{size}."
    return f"The teacher helped: {_lower(reached)}, {figures}{share}{size}."


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _smaller(models: dict[str, Any]) -> str:
    """How much smaller and faster the student is than its teacher, where both were measured."""
    teacher, student = models["teacher"], models["student"]
    parts = []
    if teacher.get("parameters") and student.get("parameters"):
        parts.append(f"{_times(teacher['parameters'] / student['parameters'])} fewer parameters")
    before, after = (teacher.get("latency_ms") or {}).get("p50"), (student.get("latency_ms") or {}).get("p50")
    if before and after:
        parts.append(f"{_times(before / after)} lower latency")
    return f", with {' and '.join(parts)}" if parts else ""


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"
