"""Curves over training, from log.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ._charts import Line
from ._read import Run, number

__all__ = ["Curve", "curve", "line", "losses", "terms", "validation", "weights"]

POINTS = 160
"""The most points that a drawn curve has; longer logs are averaged over neighbours."""

Pairs = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One quantity over steps: one list of (step, value) a seed."""

    name: str
    style: str
    seeds: list[Pairs]


def curve(name: str, style: str, runs: Sequence[Run], role: str, value: Callable[[Mapping[str, Any]], Any]) -> Curve | None:
    """None where no run logged it."""
    seeds = []
    for run in runs:
        found: dict[float, float] = {}
        for entry in run.log:
            step, y = number(entry.get("step")), number(value(entry))
            if entry.get("role", "student") == role and step is not None and y is not None:
                found[step] = y  # after a resume the later line counts
        if found:
            seeds.append(sorted(found.items()))
    return Curve(name, style, seeds) if seeds else None


def losses(runs: Sequence[Run], role: str) -> Curve | None:
    return curve(role, role, runs, role, lambda entry: entry.get("loss"))


def validation(runs: Sequence[Run], role: str, key: str) -> Curve | None:
    return curve(role, role, runs, role, lambda entry: _part(entry, "valid").get(key))


def terms(runs: Sequence[Run]) -> list[Curve]:
    """The student's loss terms, in the order of the recipe."""
    return _each(runs, "terms")


def weights(runs: Sequence[Run]) -> list[Curve]:
    """The weights of the student's terms, where any of them was not the same throughout."""
    found = _each(runs, "weights")
    return found if any(len({value for _, value in seed}) > 1 for curve in found for seed in curve.seeds) else []


def _each(runs: Sequence[Run], key: str) -> list[Curve]:
    names = list(
        dict.fromkeys(name for run in runs for entry in run.log if entry.get("role", "student") == "student" for name in _part(entry, key))
    )

    def one(name: str, i: int) -> Curve | None:
        return curve(name, f"s{i % 8}", runs, "student", lambda entry: _part(entry, key).get(name))

    return [found for i, name in enumerate(names) if (found := one(name, i))]


def _part(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = entry.get(key)
    return value if isinstance(value, Mapping) else {}


def line(found: Curve) -> Line:
    """What is drawn: the mean over seeds, each seed faint behind it; of one long noisy log, a running mean over the values."""
    seeds = [_thin(pairs) for pairs in found.seeds]
    if len(seeds) > 1:
        return Line(found.name, found.style, _unzip(_mean(found.seeds)), [_unzip(pairs) for pairs in seeds])
    pairs = seeds[0]
    if len(pairs) < 40:
        return Line(found.name, found.style, _unzip(pairs))
    return Line(found.name, found.style, _unzip(_smooth(pairs)), [_unzip(pairs)])


def _mean(seeds: Sequence[Pairs]) -> Pairs:
    """Over the steps that every seed logged."""
    by_step = [dict(pairs) for pairs in seeds]
    common = sorted(set.intersection(*(set(values) for values in by_step)))
    return _thin([(step, sum(values[step] for values in by_step) / len(by_step)) for step in common])


def _thin(pairs: Pairs) -> Pairs:
    if len(pairs) <= POINTS:
        return pairs
    edges = [round(i * len(pairs) / POINTS) for i in range(POINTS + 1)]
    groups = [pairs[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _smooth(pairs: Pairs, reach: int = 4) -> Pairs:
    """A centred running mean; nearer the ends the window shrinks, so that they are not dragged."""
    found = []
    for i, (step, _) in enumerate(pairs):
        r = min(reach, i, len(pairs) - 1 - i)
        window = [y for _, y in pairs[i - r : i + r + 1]]
        found.append((step, sum(window) / len(window)))
    return found


def _unzip(pairs: Pairs) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]
