"""What every command judges before anything heavy is imported: numbers, folders, and the recipe."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from limbeck.errors import Problem, UsageError, nearest, not_a_run

if TYPE_CHECKING:
    from limbeck.recipe import Recipe


def load(
    command: Literal["distill", "train"], recipe: str | None, options: dict[str, Any], sets: Sequence[str], problems: list[Problem]
) -> tuple[Recipe, Path]:
    """The recipe and the folder of its relative paths; raises everything that is wrong with it, and ``problems``."""
    from limbeck.reading import RecipeError, load_recipe

    try:
        loaded = load_recipe(None if recipe is None else Path(recipe), options, sets, command)
    except RecipeError as error:
        raise RecipeError([*error.problems, *problems], error.source) from None
    except UsageError as error:
        raise UsageError([*error.problems, *problems]) from None
    refuse(problems)
    return loaded


def whole(option: str, text: str | None, least: int, most: int) -> tuple[list[Problem], int | None]:
    """An option that is a whole number, or None."""
    if text is None:
        return [], None
    if text.isascii() and text.isdigit() and least <= int(text) <= most:
        return [], int(text)
    return [Problem(option, f"got '{text}', expected a whole number of at least {least} and at most {most}.")], None


def out_problems(out: str | None, resume: bool) -> list[Problem]:
    if out is None:
        return [Problem("--resume", "needs --out DIR, the run to go on with.")] if resume else []
    if not out.strip():
        return [Problem("--out", "got an empty name, expected a folder.")]
    if out.startswith("--"):
        return [Problem("--out", f"got '{out}', an option, where the name of a folder is missing.", f"A folder of that name is ./{out}.")]
    path = Path(out)
    first = next((p for p in [path, *path.parents] if os.path.exists(p)), None)
    if first is not None and not os.path.isdir(first):
        return [Problem("--out", f"'{first}' is a file, expected a folder.")]
    return []


def folder_of(out: str | None) -> Path | None:
    return None if out is None else Path(out)


def run_folder(run: str, problems: Iterable[Problem] = ()) -> Path:
    found = list(problems)
    folder = check_run(run, found)
    refuse(found)
    return folder


def check_run(run: str, problems: list[Problem]) -> Path:
    folder = Path(run)
    if not os.path.isdir(folder):
        problems.append(no_such(folder, "folder"))
    elif not (folder / "recipe.yaml").is_file():
        problems.append(Problem(f"'{run}'", *not_a_run(folder)))
    elif not (folder / "metrics.json").is_file():
        problems.append(Problem("", f"the run '{run}' is not finished: it has no metrics.json.", f"Go on with it: --resume --out {run}"))
    return folder


def served_folder(run: str, problems: Iterable[Problem] = ()) -> Path:
    """The folder of a finished run, or of an artifact, which may be anywhere."""
    if (Path(run) / "manifest.json").is_file():
        refuse(list(problems))
        return Path(run)
    return run_folder(run, problems)


def no_such(path: Path, kind: str) -> Problem:
    if os.path.exists(path):
        return Problem("", f"'{path}' is not a {kind}.")
    beside = [p.name for p in path.parent.iterdir()][:2000] if os.path.isdir(path.parent) else []
    return Problem("", f"no such {kind}: '{path}'.", nearest(path.name, beside))


def refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise UsageError(problems)
