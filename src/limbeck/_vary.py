"""What a sweep varies: the values that a person named, and every combination of them read as a recipe."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck._recipe_merge import expand_names
from limbeck.errors import Problem, UsageError, listed
from limbeck.reading import RecipeError, absolute, load_recipe, read_yaml
from limbeck.recipe import Recipe

__all__ = ["Combination", "combinations", "read_vary"]

_CLASSIC = ("temp", "alpha")
_NOT_VARIED = {
    "seed": "Take several seeds with --seeds N.",
    "export": "The best student alone is exported.",
    "track": "",
    "baseline": "One baseline is trained for each student and seed.",
    "task": "",
}


@dataclass(frozen=True)
class Combination:
    """One point of a sweep: ``values`` by key as they were written, and the recipe that they make."""

    name: str
    values: dict[str, str]
    recipe: Recipe


def read_vary(texts: Sequence[str]) -> tuple[dict[str, list[str]], list[Problem]]:
    """``KEY=V,V`` or ``KEY=[V, V]`` to the values of each key, as they were written; and what is wrong with them."""
    found: dict[str, list[str]] = {}
    problems: list[Problem] = []
    for text in texts:
        key, equals, written = text.partition("=")
        key, written = key.strip(), written.strip()
        if not equals or not key or not written:
            problems.append(Problem("--vary", f"got '{text}', expected KEY=VALUE,VALUE, e.g. objective.0.temperature=2,4,8."))
            continue
        if key in found:
            problems.append(Problem(f"--vary {key}", "is given twice.", "Give all of its values at once."))
            continue
        if key.split(".")[0] in _NOT_VARIED:
            problems.append(Problem(f"--vary {key}", "cannot be varied.", _NOT_VARIED[key.split(".")[0]]))
            continue
        whole = written[1:-1] if written.startswith("[") and written.endswith("]") else written
        values = [v.strip() for v in _split(whole)]
        twice = sorted({v for v in values if values.count(v) > 1})
        if "" in values or twice:
            what = f"has {listed(twice)} more than once." if twice else "has an empty value."
            problems.append(Problem(f"--vary {key}", what))
            continue
        found[key] = values
    if not texts:
        problems.append(Problem("--vary", "is missing: name at least one key, e.g. --vary objective.0.temperature=2,4,8."))
    return found, problems


def _split(text: str) -> list[str]:
    """At commas that stand in no bracket or quote."""
    pieces, depth, quote, start = [], 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    return [*pieces, text[start:]]


def combinations(
    path: Path | None, options: dict[str, Any], sets: Sequence[str], vary: dict[str, list[str]]
) -> tuple[list[Combination], Path]:
    """Every combination of the values, read as a recipe; and the folder of its relative paths.

    Raises :class:`RecipeError` with all problems of all of them.
    """
    found: list[Combination] = []
    problems: dict[tuple[str, str], Problem] = {}
    base, source = Path.cwd(), "command line"
    classic = _classic_terms(path) if path is not None and set(vary) & set(_CLASSIC) else None
    for number, values in enumerate(itertools.product(*vary.values()), start=1):
        chosen = dict(zip(vary, values, strict=True))
        own = {**options, **{k: v for k, v in chosen.items() if k in _CLASSIC and classic is None}}
        more = [f"{k}={v}" for k, v in chosen.items() if k not in _CLASSIC]
        if classic is not None:
            more += _written_out(classic, chosen)
        try:
            recipe, base = load_recipe(path, own, [*sets, *more], "distill")
            found.append(Combination(_name(number, chosen), chosen, absolute(recipe, base)))
        except RecipeError as error:
            source = error.source
            for p in error.problems:
                key = p.where.removeprefix("--set ").removeprefix("--")
                where = f"--vary {key}" if key in vary else p.where
                problems.setdefault((where, p.message), Problem(where, p.message, p.hint))
    if problems:
        raise RecipeError(list(problems.values()), source)
    return found, base


def _classic_terms(path: Path) -> tuple[int, int] | None:
    """Where a recipe's objective has its one kd and its one cross entropy, which temp and alpha are about; None where it has no such objective
    (what is wrong with it, or with varying them, is then told when the recipe is read)."""
    try:
        objective = expand_names(read_yaml(path)).get("objective")
    except UsageError:
        return None
    if not isinstance(objective, list):
        return None
    losses = [term.get("loss") if isinstance(term, dict) else None for term in objective]
    if sorted(map(str, losses)) != ["cross_entropy", "kd"]:
        return None
    return losses.index("kd"), losses.index("cross_entropy")


def _written_out(terms: tuple[int, int], chosen: dict[str, str]) -> list[str]:
    """What ``temp`` and ``alpha`` say, as keys of the objective."""
    kd, cross_entropy = terms
    sets = [f"objective.{kd}.temperature={chosen['temp']}"] if "temp" in chosen else []
    if "alpha" in chosen:
        sets.append(f"objective.{kd}.weight={chosen['alpha']}")
        with contextlib.suppress(ValueError):  # no number: told of the weight above
            sets.append(f"objective.{cross_entropy}.weight={round(1 - float(chosen['alpha']), 12)!r}")
    return sets


def _name(number: int, values: dict[str, str]) -> str:
    """``03-temperature-4-weight-0.5``, of characters that every file system takes."""
    last = [k.split(".")[-1] for k in values]
    words = [f"{key.split('.')[-1] if last.count(key.split('.')[-1]) == 1 else key}-{_word(value)}" for key, value in values.items()]
    return "-".join([f"{number:02d}", *words])[:100].rstrip("-.")


def _word(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", value.rstrip("/").split("/")[-1].split(":")[-1]).strip("-") or "x"
