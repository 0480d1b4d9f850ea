"""What can go wrong for a user, as one small tree.

A :class:`LimbeckError` is a sentence for the person at the keyboard and never shows a traceback; its
``exit_code`` is the exit code of the process. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DiskFull",
    "Interrupted",
    "LimbeckError",
    "NonFinite",
    "ParityFailed",
    "Problem",
    "Stopped",
    "UsageError",
    "missing_extra",
    "nearest",
    "not_a_run",
]


class LimbeckError(Exception):
    """Base of everything that is told to the user as a sentence."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what about it, and what to do.

    ``where`` is a recipe key (``train.lr``), an option (``--temp``), or a path; ``message`` says what was given and
    what is allowed; ``hint`` is the way out ("did you mean ...?", a command to run), or empty.
    """

    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} {self.hint}" if self.hint else text


class UsageError(LimbeckError):
    """The user's mistake, found before the first step; holds all problems at once. Exit code 2."""

    exit_code = 2

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = [Problem("", problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class Stopped(LimbeckError):
    """Stopped for a stated reason: NaN, a full disk, a failed parity. Exit code 3."""

    exit_code = 3


class NonFinite(Stopped):
    """A loss or gradient became NaN or infinite."""


class DiskFull(Stopped):
    """A write failed for want of space."""


class ParityFailed(Stopped):
    """An exported file does not answer as the trained student does."""


class Interrupted(LimbeckError):
    """Stopped by a signal after a checkpoint; run again with ``--resume``. Exit code 75."""

    exit_code = 75


def nearest(word: str, allowed: Iterable[str]) -> str:
    """``Did you mean 'x'?`` for the closest allowed word, or an empty string when none is close.

    >>> nearest("temprature", ["temperature", "weight"])
    "Did you mean 'temperature'?"
    >>> nearest("zzz", ["temperature"])
    ''
    """
    found = difflib.get_close_matches(str(word), [str(a) for a in allowed], n=1, cutoff=0.6)
    return f"Did you mean '{found[0]}'?" if found else ""


def listed(names: Sequence[str], limit: int = 12) -> str:
    """``a, b, c and 7 more``."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def not_a_run(folder: Path) -> tuple[str, str]:
    """What is wrong with a folder that holds no run, and a way out where it is a model inside one."""
    inside = (
        "It is a model inside a run, for --teacher and limbeck.load; this command takes the run."
        if (folder / "model.json").is_file()
        else ""
    )
    return "is not a run: it has no recipe.yaml.", inside


def missing_extra(package: str, extra: str, purpose: str) -> UsageError:
    """The error for an optional package that is not installed."""
    return UsageError(Problem("", f"{purpose} needs the package '{package}', which is not installed.", f'pip install "limbeck[{extra}]"'))
