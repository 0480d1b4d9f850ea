"""A run's files, read with trust in nothing but metrics.json: whatever else is missing or cut off is simply not shown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from limbeck.errors import Problem, UsageError, nearest

__all__ = ["Run", "read_runs", "short_names"]


@dataclass(frozen=True)
class Run:
    """One finished run. ``children`` are its seeds (``seed-0``, ...), where it has several."""

    path: Path
    metrics: dict[str, Any]
    analysis: dict[str, Any]
    environment: dict[str, Any]
    recipe_text: str
    recipe: dict[str, Any]
    student: dict[str, Any]
    log: tuple[dict[str, Any], ...]
    children: tuple[Run, ...] = field(default=())

    def model(self, role: str) -> dict[str, Any]:
        """What metrics.json says about one model; empty where the run has none."""
        return section(self.metrics, "models", role)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for role in ("teacher", "baseline", "student") if role in section(self.metrics, "models"))

    @property
    def seeds(self) -> tuple[Run, ...]:
        """The runs whose logs show the training of the student: the children, or the run itself."""
        return self.children or (self,)


def section(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The mapping at ``keys``, empty where there is none."""
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs at ``paths``. UsageError, for all of them at once, where one is not a finished run."""
    problems = [problem for path in paths for problem in _problems(path)]
    if not paths:
        problems = [Problem("report", "no run was given.", "Name at least one run's directory.")]
    if problems:
        raise UsageError(problems)
    return [_read(path) for path in paths]


def _problems(path: Path) -> Iterator[Problem]:
    if not path.is_dir():
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        yield Problem(str(path), "there is no such run directory.", nearest(path.name, beside))
    elif not (path / "metrics.json").is_file():
        yield Problem(str(path), "has no metrics.json: it is not a run, or the run is not finished.", "Finish it with --resume.")
    else:
        try:
            broken = not isinstance(json.loads((path / "metrics.json").read_text("utf-8")), dict)
        except (OSError, ValueError):
            broken = True
        if broken:
            yield Problem(
                str(path / "metrics.json"), "is not a JSON object: the file is damaged.", f"limbeck evaluate {path} writes it anew."
            )


def _read(path: Path, nested: bool = True) -> Run:
    recipe_text = _text(path / "recipe.yaml")
    try:
        recipe = yaml.safe_load(recipe_text)
    except yaml.YAMLError:
        recipe = None
    folders = [p for p in path.glob("seed-*") if (p / "metrics.json").is_file()] if nested else []
    children = [_read(p, nested=False) for p in sorted(folders, key=lambda p: (len(p.name), p.name))]
    metrics = _object(path / "metrics.json")
    chosen = _chosen(metrics, children)
    return Run(
        path=path,
        metrics=metrics,
        analysis=_object(path / "analysis.json") or (chosen.analysis if chosen else {}),
        environment=_object(path / "environment.json") or (chosen.environment if chosen else {}),
        recipe_text=recipe_text or (chosen.recipe_text if chosen else ""),
        recipe=recipe if isinstance(recipe, dict) else (chosen.recipe if chosen else {}),
        student=_object(path / "student" / "model.json") or (chosen.student if chosen else {}),
        log=tuple(_lines(path / "log.jsonl")),
        children=tuple(children),
    )


def _chosen(metrics: Mapping[str, Any], children: Sequence[Run]) -> Run | None:
    """The seed whose student the parent holds; its details stand for those that the parent has none of."""
    named = [child for child in children if child.path.name == f"seed-{metrics.get('best_seed')}"]
    return next(iter(named or [child for child in children if child.analysis] or children), None)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in _text(path).splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # a line cut off by a kill
        if isinstance(found, dict):
            yield found


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart.

    >>> short_names([Path("a/x"), Path("b/x")])
    ['a/x', 'b/x']
    """
    full = [path.absolute().parts for path in paths]
    for n in range(1, max(map(len, full), default=1) + 1):
        names = ["/".join(parts[-n:]) for parts in full]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({i + 1})" for i, path in enumerate(paths)]
