"""Names of data sources to :class:`Data`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck._recipe_paths import home_path
from limbeck.data.arrays import digits, read_npz
from limbeck.data.folders import read_folder
from limbeck.data.hub import read_hub
from limbeck.data.splits import Data, Part, Role, assemble
from limbeck.data.tables import SUFFIXES, read_tables
from limbeck.errors import Problem, UsageError, listed, nearest

if TYPE_CHECKING:
    from limbeck.recipe import DataSpec

__all__ = ["FORMS", "load_data"]

FORMS = {
    "digits": "1,797 handwritten digits (from scikit-learn)",
    "npz": "arrays train_x, train_y, test_x, test_y in a NumPy file",
    "imagefolder": "one folder a class under train/ and test/ or val/",
    "csv": "a table with a header line",
    "jsonl": "one JSON object a line",
    "parquet": "a Parquet file, or a folder of them",
    "hf": "a data set of the Hugging Face hub",
}
"""The kinds of data sources, with a line on each."""


def load_data(spec: DataSpec, task: str, base: Path) -> Data:
    """The data that a recipe names; relative paths are against ``base``.

    Raises:
        UsageError: with everything that is wrong with the data.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    form, name = _parse(spec.source, "data.source", None, problems)
    further: dict[Role, tuple[str, str]] = {}
    given: dict[Role, str | None] = {"test": spec.test, "valid": spec.valid, "unlabelled": spec.unlabelled}
    for role, value in given.items():
        if value is not None:
            further[role] = _parse(value, f"data.{role}", form or None, problems)
    if problems:
        raise UsageError(problems)
    parts, classes = _read(form, name, base, None, spec, task, notes, problems)
    for role, (other_form, other_name) in further.items():
        if role in parts:
            message = f"the data has a {role} split already, in {parts[role].where}."
            problems.append(Problem(f"data.{role}", message, "Remove one of them."))
            continue
        more, _ = _read(other_form, other_name, base, role, spec, task, notes, problems)
        parts |= more
    return assemble(parts, spec, task, classes=classes, notes=notes, problems=problems)


def _parse(value: str, where: str, form: str | None, problems: list[Problem]) -> tuple[str, str]:
    """``(form, name)`` of ``FORM:NAME``; a further file may leave the form out."""
    head, colon, rest = value.partition(":")
    if head == "digits" and not colon:
        return "digits", ""
    if colon and head in FORMS and head != "digits":
        if not rest:
            problems.append(Problem(where, f"'{value}' names no file."))
        return head, rest
    suffix = Path(value).suffix.lower()
    guess = next((f for f, endings in {**SUFFIXES, "npz": (".npz",)}.items() if suffix in endings), None)
    if not colon or len(head) == 1:  # a drive letter is no form
        if form is not None and form != "digits":
            return guess or form, value
        if guess is not None:
            return guess, value
    close = nearest(head, FORMS) or (f"Did you mean '{guess}:{value}'?" if guess else "")
    message = f"'{value}' is not a data source; known are {listed(['digits', *(f'{f}:...' for f in FORMS if f != 'digits')])}."
    problems.append(Problem(where, message, close))
    return "", ""


def _read(
    form: str, name: str, base: Path, role: Role | None, spec: DataSpec, task: str, notes: list[str], problems: list[Problem]
) -> tuple[dict[Role, Part], tuple[str, ...] | None]:
    path = base / home_path(name)
    if form == "digits":
        parts, classes = digits()
        return (parts if role is None else {role: parts["train"]}), classes
    if form == "npz":
        if not os.path.isfile(path):
            near = nearest(path.name, [p.name for p in path.parent.iterdir()] if os.path.isdir(path.parent) else [])
            problems.append(Problem(str(path), "there is no such file.", near))
            return {}, None
        return read_npz(path, role, problems)
    if form == "imagefolder":
        return read_folder(path, role, spec.corrupt, notes, problems)
    if form == "hf":
        return read_hub(name, base, role, spec, task, notes, problems)
    return read_tables(form, path, role, spec, task, notes, problems)
