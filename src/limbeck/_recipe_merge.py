"""Options and ``--set`` over the values of a recipe file."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from limbeck import _recipe_paths as paths
from limbeck._recipe_yaml import kind_of, parse
from limbeck.errors import Problem

OPTIONS = {
    "teacher": "teacher.model",
    "student": "student.model",
    "data": "data.source",
    "task": "task",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
    "seed": "seed",
    "baseline": "baseline",
}
"""Names of options and the recipe keys that they stand for; temp and alpha stand for an objective."""
_NAMES = ("teacher", "student", "data", "task")  # taken as they are; the others are read as YAML
_SPELT = {"baseline": "--no-baseline"}


def default_objective(temp: Any, alpha: Any) -> list[dict[str, Any]]:
    """The terms for --temp and --alpha (None: 4.0 and 0.7); a term at weight 0 is left out."""
    temp, alpha = 4.0 if temp is None else temp, 0.7 if alpha is None else alpha
    kd = {"loss": "kd", "weight": alpha, "temperature": temp}
    if not _number(alpha):
        return [kd]
    # 1 - 0.7 is 0.30000000000000004: what a person would write is meant
    rest = round(1 - alpha, 12)
    return [term for term in (kd, {"loss": "cross_entropy", "weight": rest}) if term["weight"]]


def merge(
    data: Mapping[str, Any], options: Mapping[str, Any], sets: Sequence[str], command: str
) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    """``data`` with options and sets over it; how each key was spelt on the command line; and what is wrong with the command line itself.

    ``sets`` are ``key.path=YAML value``; numbers in a path index lists (``objective.0.temperature=2``).
    """
    merged: dict[str, Any] = copy.deepcopy(dict(data))
    spelt: dict[str, str] = {}
    problems: list[Problem] = []
    for name, path in OPTIONS.items():
        text = options.get(name)
        if text is None:
            continue
        spelling = _SPELT.get(name, f"--{name.replace('_', '-')}")
        if name == "teacher" and not isinstance(text, str):
            if len(text) > 1:
                merged["teacher"] = [{"model": model} for model in text]
                spelt |= {f"teacher.{i}.model": spelling for i in range(len(text))}
                continue
            text = next(iter(text), None)
            if text is None:
                continue
        value = text if name in _NAMES or not isinstance(text, str) else scalar(text)
        problem = _put(merged, path, value)
        problems += [Problem(spelling, problem)] if problem else []
        spelt[path] = spelling
    problems += _objective(merged, options)
    for where, teacher in paths.teachers_of(merged):
        if where != "teacher" and isinstance(teacher, dict) and str(teacher.get("model")).startswith("logits:"):
            continue  # of several, what is a file is not trained
        if options.get("fit_teacher") and isinstance(teacher, dict) and teacher.get("train") is None:
            teacher["train"] = {"if_needed": True}
            spelt[f"{where}.train"] = "--fit-teacher"
    if any(s.startswith("objective.") for s in sets) and merged.get("objective") is None:
        merged["objective"] = default_objective(None, None) if command == "distill" else [{"loss": "cross_entropy", "weight": 1.0}]
    for text in sets:
        path, equals, written = text.partition("=")
        path = path.strip()
        spelling = f"--set {path}"
        if not equals or not path or not all(path.split(".")):
            problems.append(Problem("--set", f"got '{text}', expected key.path=value, e.g. train.lr=1e-3."))
            continue
        if path in spelt:
            problems.append(Problem(spelling, f"is given twice ({spelt[path]} sets {path} too)."))
            continue
        try:
            value = parse(written)
        except (yaml.YAMLError, ValueError):
            problems.append(Problem(spelling, f"got '{written}', which is not a YAML value.", "Put such text in quotes."))
            continue
        problem = _put(merged, path, value)
        problems += [Problem(spelling, problem)] if problem else []
        spelt[path] = spelling
    return merged, spelt, problems


def scalar(text: str) -> Any:
    """The number or switch that ``text`` writes, or else the text itself."""
    try:
        value = parse(text)
    except (yaml.YAMLError, ValueError):
        return text
    return value if isinstance(value, int | float) else text


def _objective(
    merged: dict[str, Any],
    options: Mapping[str, Any],
) -> list[Problem]:
    """Writes the objective that --temp and --alpha stand for; returns what is wrong with them."""
    values: dict[str, Any] = {}
    for name in ("temp", "alpha"):
        if options.get(name) is not None:
            text = options[name]
            values[name] = scalar(text) if isinstance(text, str) else text
    if not values:
        return []
    names = " and ".join(f"--{n}" for n in values)
    problems = []
    if merged.get("objective") is not None:
        hint = "Change a term with --set, e.g. --set objective.0.temperature=2."
        problems.append(Problem(names, "cannot be used with a recipe that has an objective of its own.", hint))
    temp: Any = values.get("temp")
    alpha: Any = values.get("alpha")
    if "temp" in values and not (_number(temp) and 0 < temp < float("inf")):
        problems.append(Problem("--temp", f"got '{options['temp']}', expected a number greater than 0."))
        temp = None
    if "alpha" in values and not (_number(alpha) and 0 <= alpha <= 1):
        problems.append(Problem("--alpha", f"got '{options['alpha']}', expected a number of at least 0 and at most 1."))
        alpha = None
    elif alpha == 0:
        text = "got 0, which leaves the teacher without a term that uses it; expected a number greater than 0."
        problems.append(Problem("--alpha", text, "To train without a teacher, use `limbeck train`."))
        alpha = None
    if merged.get("objective") is None:
        merged["objective"] = default_objective(temp, alpha)
    return problems


def _put(data: dict[str, Any], path: str, value: Any) -> str:
    """Sets ``value`` at ``path`` in place, making mappings on the way; returns what is in the way, or an empty string."""
    keys = path.split(".")
    holder: Any = data
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        so_far = ".".join(keys[:i])
        if isinstance(holder, list):
            if not key.isdigit():
                return f"'{so_far}' is a list, expected a number after it, e.g. {so_far}.0."
            index = int(key)
            if index > len(holder):
                return f"'{so_far}' has {len(holder)} entries; expected a number of at most {len(holder)} (one more adds an entry)."
            if index == len(holder):
                holder.append({})
            if last:
                holder[index] = value
            else:
                holder = holder[index]
        elif isinstance(holder, dict):
            if last:
                holder[key] = value
            else:
                if holder.get(key) is None:
                    holder[key] = {}
                holder = holder[key]
        else:
            return f"'{so_far}' is {kind_of(holder)} and has no keys in it."
    return ""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def expand_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy with the short forms written out: ``teacher: NAME``, ``data: SOURCE``, ``export: onnx``, ``objective: [kd]``."""
    plain = copy.deepcopy(dict(data))
    for section, key in (("teacher", "model"), ("student", "model"), ("data", "source")):
        if isinstance(plain.get(section), str):
            plain[section] = {key: plain[section]}
    if isinstance(plain.get("teacher"), list):
        several = [{"model": spec} if isinstance(spec, str) else spec for spec in plain["teacher"]]
        plain["teacher"] = several[0] if len(several) == 1 and isinstance(several[0], dict) else several
    student = plain.get("student")
    if isinstance(student, dict) and isinstance(student.get("peers"), list):
        student["peers"] = [{"model": spec} if isinstance(spec, str) else spec for spec in student["peers"]]
    for name in ("export", "track"):
        if isinstance(plain.get(name), str):
            plain[name] = [plain[name]]
    if isinstance(plain.get("objective"), list):
        plain["objective"] = _terms(plain["objective"])
    train = plain.get("train")
    stages = train.get("stages") if isinstance(train, dict) else None
    for stage in stages if isinstance(stages, list) else []:
        if isinstance(stage, dict) and isinstance(stage.get("objective"), list):
            stage["objective"] = _terms(stage["objective"])
    return plain


def _terms(objective: list[Any]) -> list[Any]:
    return [{"loss": term} if isinstance(term, str) else term for term in objective]


def without_nulls(plain: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Without the keys that are null because they do not apply."""
    result = dict(plain)
    for path in keys:
        result = _without_null(result, path.split("."))
    return result


def _without_null(value: Any, keys: Sequence[str]) -> Any:
    """A copy of ``value`` without what is at these keys, where that is null."""
    first, *rest = keys
    if isinstance(value, dict) and first in value:
        if rest:
            return {**value, first: _without_null(value[first], rest)}
        return {k: v for k, v in value.items() if k != first} if value[first] is None else value
    if isinstance(value, list) and first.isdigit() and int(first) < len(value) and rest:
        return [_without_null(item, rest) if i == int(first) else item for i, item in enumerate(value)]
    return value
