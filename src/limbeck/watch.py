"""limbeck watch: follow a run from another terminal, or another machine that sees its folder. Files are only read, and only by looking again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.errors import Problem, UsageError
from limbeck.monitor import shown
from limbeck.progress import duration
from limbeck.run import read_json

__all__ = ["Seen", "look", "watch"]

_QUIET = 120.0  # seconds without a line, after which a person is told how to go on


@dataclass
class _Tail:
    """A log, and how far it was read. A log that became shorter was cut back to a checkpoint, and is read anew."""

    path: Path
    offset: int = 0
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    valid: dict[str, dict[str, Any]] = field(default_factory=dict)

    def read(self) -> None:
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                if size < self.offset:
                    self.offset, self.steps, self.valid = 0, {}, {}
                file.seek(self.offset)
                raw = file.read()
        except OSError:  # not there yet, or a shared volume that is away for a moment
            return
        whole = raw.rfind(b"\n") + 1  # a line that is being written is read the next time
        self.offset += whole
        for line in raw[:whole].splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if not isinstance(row, dict) or "role" not in row:
                continue
            if "loss" in row:
                self.steps.pop(row["role"], None)  # the one that goes on stands last
                self.steps[row["role"]] = row
            elif row.get("valid") is not None:
                self.valid[row["role"]] = row


@dataclass(frozen=True)
class Seen:
    """What a look found. part: which child of the folder is at work, empty for the folder itself; role, and its last logged step; valid: its last
    validation; age: seconds since that line; result: the verdict of a finished run, None before."""

    part: str = ""
    role: str = ""
    step: dict[str, Any] | None = None
    valid: dict[str, Any] | None = None
    age: float | None = None
    result: str | None = None

    def line(self) -> str:
        """One line for a person."""
        if self.step is None:
            return "No step has been logged yet: data and models are being read, or the teacher is asked."
        row = self.step
        of = f"/{row['steps']}" if "steps" in row else ""
        terms = "  ".join(f"{name} {_number(value)}" for name, value in {"loss": row["loss"], **row.get("terms", {})}.items())
        rate = row.get("items_per_second")
        parts = [f"{self.part + ': ' if self.part else ''}{self.role}  epoch {row['epoch'] + 1}  step {row['step']}{of}  {terms}"]
        if rate:
            parts.append(f"{rate:,.0f} items/s")
        if self.valid is not None:
            parts.append("validation " + " ".join(f"{k} {_number(v)}" for k, v in self.valid["valid"].items()))
        busy = shown(row.get("machine") or {})
        return "  ".join(parts) + (f"  ({busy})" if busy else "")


def watch(
    run: Path,
    say: Callable[[str], None],
    *,
    every: float = 1.0,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Seen:
    """Follow a run, a run of several seeds or a sweep until it is finished; every new step is said. Returns the last look.

    It may not have begun; it may be stopped and resumed meanwhile. Raises: UsageError where there is no such folder.
    """
    said, warned = "", False
    for seen in _looks(run, now):
        line = seen.line()
        if line != said and (seen.result is None or seen.step is not None):
            say(line)
            said, warned = line, False
        if seen.result is not None:
            say(seen.result)
            return seen
        if seen.age is not None and seen.age > _QUIET and not warned:
            say(f"Nothing new for {duration(seen.age)}. If it was stopped, the command that began it goes on with --out {run} --resume.")
            warned = True
        sleep(every)
    raise AssertionError


def look(run: Path, now: Callable[[], float] = time.time) -> Seen:
    """One look at a run; see :func:`watch`."""
    return next(_looks(run, now))


def _looks(run: Path, now: Callable[[], float]) -> Iterator[Seen]:
    if not run.is_dir():
        raise UsageError(Problem("limbeck watch", f"there is no folder '{run}'.", "Name the --out of the run."))
    tails: dict[Path, _Tail] = {}
    while True:
        result = _result(run)
        for path in _logs(run):
            tails.setdefault(path, _Tail(path)).read()
        at_work = max((t for t in tails.values() if t.steps), key=lambda t: next(reversed(t.steps.values())).get("time", 0.0), default=None)
        if at_work is None:
            yield Seen(result=result)
            continue
        role, row = next(reversed(at_work.steps.items()))
        part = at_work.path.parent.relative_to(run)
        yield Seen(
            "" if part == Path() else part.as_posix(),
            role,
            row,
            at_work.valid.get(role),
            max(0.0, now() - row["time"]) if "time" in row else None,
            result,
        )


def _logs(run: Path) -> list[Path]:
    """Of the run, its seeds, or the combinations of a sweep and their seeds; those that are there."""
    return [
        path
        for pattern in ("log.jsonl", "seed-*/log.jsonl", "runs/*/log.jsonl", "runs/*/seed-*/log.jsonl")
        for path in sorted(run.glob(pattern))
    ]


def _result(run: Path) -> str | None:
    """What a finished run says of itself."""
    try:
        if (run / "plan.json").is_file():  # a sweep
            if not (run / "report.html").is_file():
                return None
            table = read_json(run / "sweep.json")
            best = next(row["values"] for row in table["rows"] if row["name"] == table["best"])
            chosen = ", ".join(f"{key} = {value}" for key, value in best.items())
            return f"Finished. Best on {table['chosen_on']}: {chosen}. Report: {run / 'report.html'}"
        if (run / "report.html").is_file():
            return f"Finished. {read_json(run / 'metrics.json')['verdict']} Report: {run / 'report.html'}"
    except (OSError, KeyError, ValueError, UsageError):  # between two files
        return None
    return None


def _number(value: Any) -> str:
    return "unknown" if value is None else f"{value:.4f}"
