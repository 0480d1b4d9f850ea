"""The output folder: refused, begun or resumed; and the signals that ask a run to leave."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck import checkpoint
from limbeck.errors import Interrupted, Problem, UsageError
from limbeck.losses import AUTO
from limbeck.ranks import ALONE, Ranks, launch, restarted
from limbeck.reading import absolute, differences, recipe_from_yaml
from limbeck.recipe import Recipe, Term
from limbeck.run import copy_folder, discard, disk_errors, is_left_over, read_json, sweep

__all__ = [
    "Stop",
    "already",
    "begun_seeds",
    "bring_up",
    "finished",
    "finished_metrics",
    "goes_on",
    "launched_by",
    "matches",
    "next_free",
    "own_folder",
    "put_away",
    "refuse_taken",
    "same_run",
]


def finished(folder: Path) -> bool:
    """A run is finished when its last file stands (the report comes after the metrics) and nothing that it was to make has failed."""
    if not os.path.isfile(folder / "metrics.json") or not os.path.isfile(folder / "report.html"):
        return False
    return read_json(folder / "metrics.json").get("export_failure") is None


def finished_metrics(folder: Path) -> dict[str, Any] | None:
    """The metrics of a finished run, None of another."""
    if not finished(folder):
        return None
    put_away(folder)
    return dict(read_json(folder / "metrics.json"))


def put_away(folder: Path) -> None:
    """Remove what a run that was killed while it tidied up at its end has left; a finished run needs no checkpoints."""
    sweep(folder)
    for checkpoints in [folder / "checkpoints", *folder.glob("seed-*/checkpoints")]:
        discard(checkpoints)


def next_free(root: Path, name: str) -> Path:
    """``root/name``, or ``root/name-2`` ... where that is taken."""
    candidate, number = root / name, 2
    while candidate.exists():
        candidate, number = root / f"{name}-{number}", number + 1
    return candidate


_WAIT = 5.0  # seconds: a process that was killed may be a moment from its end


def goes_on(out: Path, resume: bool, ranks: Ranks) -> bool:
    """Whether what ``out`` holds is gone on with: where that was asked for, and where torchrun has started the processes again after this very launch
    of it had begun the run (or the sweep)."""
    if resume or not restarted(ranks):
        return resume
    files = (out / "environment.json", out / "plan.json")
    return bool(ranks.from_main(lambda: launch() in [read_json(f).get("launch", "") for f in files if os.path.isfile(f)]))


def launched_by() -> dict[str, str]:
    """What a run, or a sweep, records of the launcher that began it."""
    name = launch()
    return {} if name is None else {"launch": name}


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Nobody else writes into ``out`` meanwhile; the lock ends with the process, whatever ends that. File systems without locks have none.

    Raises: UsageError where another process holds it.
    """
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        end = time.monotonic() + _WAIT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    text = f"another process is writing into {out}."
                    raise UsageError(Problem("--out", text, "Wait for it, end it, or name another folder.")) from None
                time.sleep(0.05)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)


@contextmanager
def own_folder(out: Path, begun: bool) -> Iterator[None]:
    """The folder, there and this process's own; what was left in it by one that was killed is gone. begun: whether what it holds is gone on with.

    Raises: UsageError where another process holds it, or has begun a run in it since it was judged.
    """
    make(out)
    with held(out):
        sweep(out)
        if not begun and os.path.isfile(out / "recipe.yaml"):
            text = f"another process has begun a run in {out} meanwhile."
            raise UsageError(Problem("--out", text, "Name another folder, or add --resume to continue that run."))
        yield


def refuse_taken(out: Path, resume: bool) -> None:
    """An output folder with something in it is only written into on ``--resume``, and only where a run was begun."""
    if not os.path.exists(out):
        return
    if not out.is_dir():
        raise UsageError(Problem("--out", f"{out} is a file.", "Name a folder that does not exist yet."))
    # a run that was killed before its recipe had its name has begun nothing
    inside = [p.name for p in out.iterdir() if not is_left_over(p)]
    if not inside or (inside == ["environment.json"] and set(read_json(out / "environment.json")) <= {"facts", "launch"}):
        return
    if not resume:
        raise UsageError(
            Problem("--out", f"{out} exists and is not empty.", "Name another folder, or add --resume to continue the run in it.")
        )
    if not (out / "recipe.yaml").is_file():
        raise UsageError(
            Problem("--out", f"{out} holds no run (it has no recipe.yaml), so there is nothing to resume.", "Name another folder.")
        )


_FACTS = {"data": "the data", "teacher": "the teacher", "student": "the student's initial weights", "seeds": "the number of seeds"}


def matches(out: Path, recipe: Recipe, facts: dict[str, Any]) -> tuple[Recipe, dict[str, Any]] | None:
    """What a run to be resumed has recorded: its recipe, with the choices that were made by measuring, and its environment.

    None where nothing was begun. Raises UsageError where the recipe, the data or the teacher is another one.
    """
    if not os.path.isfile(out / "recipe.yaml"):
        return None
    recorded = read_recipe(out)
    # how strictly kernels are ordered may change: a run that `true` has ended is told to go on otherwise
    ordered = {"deterministic": recipe.train.deterministic}
    recorded = recorded.model_copy(update={"train": recorded.train.model_copy(update=ordered)})
    problems = [Problem("--resume", text) for text in differences(recorded, _measured_from(recipe, recorded))]
    environment = read_json(out / "environment.json") if os.path.isfile(out / "environment.json") else {}
    for key, what in _FACTS.items():
        before, now = environment.get("facts", {}).get(key), facts.get(key)
        if before is not None and before != now:
            problems.append(
                Problem("--resume", f"{what} changed since this run was begun ({before} then, {now} now).", "Name another --out.")
            )
    if problems:
        raise UsageError(problems)
    for folder in [out / "checkpoints", *out.glob("seed-*/checkpoints")]:
        checkpoint.refuse_newer(folder)
    return recorded, environment


def read_recipe(folder: Path) -> Recipe:
    """The recipe that a run has recorded."""
    return absolute(recipe_from_yaml(folder / "recipe.yaml"), folder)


def begun_seeds(out: Path) -> int:
    """How many seeds a run was begun with; 1 where none was begun."""
    environment = read_json(out / "environment.json") if os.path.isfile(out / "environment.json") else {}
    return int(environment.get("facts", {}).get("seeds", 1))


def same_run(out: Path, recipe: Recipe, seeds: int) -> None:
    """Refuse a recipe, or a number of seeds, that differs from the finished run's."""
    recorded = read_recipe(out)
    problems = [Problem("--resume", text) for text in differences(recorded, _measured_from(recipe, recorded))]
    before = len(read_json(out / "metrics.json")["seeds"])
    if before != seeds:
        problems.append(Problem("--resume", f"this run has {before} seeds, and {seeds} were asked for.", "Name another --out."))
    if problems:
        raise UsageError(problems)


def already(out: Path, recipe: Recipe, seeds: int) -> dict[str, Any] | None:
    """The metrics of a run that is finished; None where it is not. Raises UsageError where it was another run."""
    if not finished(out):
        return None
    same_run(out, recipe, seeds)
    return finished_metrics(out)


def _measured_from(recipe: Recipe, recorded: Recipe) -> Recipe:
    """The given recipe with every ``auto`` replaced by what the run recorded in its place."""
    train = recipe.train.model_copy(
        update={
            **({"precision": recorded.train.precision} if recipe.train.precision == "auto" else {}),
            **({"layout": recorded.train.layout} if recipe.train.layout is None else {}),
            **({"workers": recorded.train.workers} if recipe.train.workers == "auto" else {}),
            **({"device": recorded.train.device} if recipe.train.device == "auto" else {}),
            **({"accumulate": recorded.train.accumulate} if recipe.train.accumulate == "auto" else {}),
        }
    )
    teachers = recipe.teachers
    if len(teachers) == len(recorded.teachers):
        teachers = [
            teacher.model_copy(
                update={
                    **({"precision": before.precision} if teacher.precision == "auto" else {}),
                    **({"layout": before.layout} if teacher.layout is None else {}),
                    **({"placement": before.placement} if teacher.placement == "auto" else {}),
                }
            )
            for teacher, before in zip(teachers, recorded.teachers, strict=True)
        ]
    if train.stages is not None and recorded.train.stages is not None and len(train.stages) == len(recorded.train.stages):
        stages = [
            ours.model_copy(update={"objective": _pairs_from(ours.objective, theirs.objective)})
            for ours, theirs in zip(train.stages, recorded.train.stages, strict=True)
        ]
        train = train.model_copy(update={"stages": stages})
    objective = _pairs_from(recipe.objective, recorded.objective)
    return recipe.with_teachers(teachers).model_copy(update={"train": train, "objective": objective})


def _pairs_from(terms: list[Term] | None, recorded: list[Term] | None) -> list[Term] | None:
    """The terms, with the recorded layers in place of ``layers: auto``."""
    if terms is None or recorded is None or len(terms) != len(recorded):
        return terms
    found = []
    for term, before in zip(terms, recorded, strict=True):
        values, kept = dict(term.model_extra or {}), before.model_extra or {}
        if values.get("layers") == AUTO and term.loss == before.loss and "layers" not in kept:
            del values["layers"]
            layers = {side: kept[side] for side in ("student", "teacher") if side in kept}
            term = Term.model_validate({"loss": term.loss, "weight": term.weight, **values, **layers})
        found.append(term)
    return found


_TAPS = 2.0  # seconds within which signals are one request: a person taps twice, a launcher and its process group both pass it on


class Stop:
    """SIGTERM and SIGINT ask the run to leave: from within ``steps`` after the step and a checkpoint; from elsewhere at once, for there
    everything that is finished is committed. Asked again it does not lose the step, except where a person insists: Ctrl-C, after two seconds."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.requested, self._since, self._stepping, self._ranks = False, 0.0, False, ranks

    def __call__(self) -> bool:
        return self.requested

    def between(self, phase: str) -> None:
        """Leave here, where everything finished so far is committed, if a signal came to any rank; all ranks are here at once."""
        if self._ranks.any(self.requested):
            raise self._ranks.told_by_main(self._leaving(phase))

    def alone(self, phase: str) -> None:
        """The same where every rank works for itself."""
        if self.requested:
            raise self._leaving(phase)

    @staticmethod
    def _leaving(phase: str) -> Interrupted:
        return Interrupted(f"Stopped by a signal before {phase}; everything finished so far is kept.")

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Inside, whoever counts the steps looks whether a signal came, and leaves."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def _asked(self, number: int, frame: object) -> None:
        first, now = not self.requested, time.monotonic()
        if first:
            self.requested, self._since = True, now
            if not self._stepping:
                raise Interrupted("Stopped by a signal; everything finished so far is kept.")
        elif number == signal.SIGINT and now - self._since > _TAPS:
            raise Interrupted("Stopped at once by a second Ctrl-C; the last checkpoint is kept.")

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {number: signal.signal(number, self._asked) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def make(out: Path) -> None:
    try:
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:  # a name with a null byte is a ValueError
        why = getattr(e, "strerror", None) or str(e)
        raise UsageError(Problem("--out", f"{str(out)!r} cannot be made: {why}.", "Name a folder that can be written.")) from e


def bring_up(folder: Path, out: Path) -> None:
    """Copy the models and exports of a run into ``out``, each complete or not at all."""
    peers = sorted(path.name for path in folder.glob("peer-*"))
    for name in ("student", *peers, "baseline", "export"):
        if (folder / name).is_dir():
            copy_folder(folder / name, out / name)
