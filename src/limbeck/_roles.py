"""Training one role of a run (student, baseline, or a teacher first), and what roles and seeds have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck import checkpoint
from limbeck._begin import Job, has_batch_statistics
from limbeck._choices import snapshot
from limbeck._folder import Stop, make
from limbeck._microbatch import how_to_train, with_accumulate
from limbeck._parts import Parts
from limbeck.cache import CachedTeacher, TableTeacher
from limbeck.data import choose_workers
from limbeck.engine import Engine
from limbeck.ensemble import Mixing
from limbeck.errors import Problem, UsageError
from limbeck.loop import Feed, Recorder, Trained, asking, fit
from limbeck.models import Model, load_state, save_model, state_hash
from limbeck.objective import Objective, StagedObjective
from limbeck.placement import attend, lives_of
from limbeck.progress import Progress
from limbeck.ranks import ALONE, Ranks
from limbeck.recipe import Recipe
from limbeck.run import (
    Log,
    NoLog,
    read_json,
    write_json,
)
from limbeck.teacher import Meter, Teacher

__all__ = ["NOTHING", "Cost", "Shared", "State", "engine_from_main", "train_role", "train_teacher"]

State = dict[str, torch.Tensor]


NOTHING: dict[str, Any] = {"teacher_items": 0, "teacher_seconds": 0.0, "cache_hits": 0, "total_seconds": 0.0}


class Cost:
    """What the run has cost so far, over all its processes: kept beside the checkpoints, so that a resume goes on counting."""

    def __init__(self, path: Path, meter: Meter | None, began: float, ranks: Ranks) -> None:
        self.path, self.meter, self.began, self.ranks = path, meter, began, ranks
        self.cached: list[CachedTeacher | TableTeacher] = []
        self.before = {**NOTHING, **(read_json(path) if path.is_file() else {})}
        self.others = [0, 0]  # items and hits of the other ranks, when they were last asked
        self.told: float | None = 0.0  # seconds of a teacher on a rank of its own, likewise

    def keep_all(self) -> None:
        """Called by all ranks at once."""
        self.ask_ranks()
        self.keep()

    def ask_ranks(self) -> None:
        """Called by all ranks at once."""
        own = self._own()
        self.others = [both - mine for both, mine in zip(self.ranks.sum(own), own, strict=True)]
        if self.ranks.teachers:
            self.told = self.ranks.told(self._seconds, self.ranks.size - self.ranks.teachers)

    def _seconds(self) -> float | None:
        return 0.0 if self.meter is None else self.meter.seconds

    def _own(self) -> list[int]:
        return [0 if self.meter is None else self.meter.items, sum(teacher.hits for teacher in self.cached)]

    def so_far(self) -> dict[str, Any]:
        items, hits = (mine + theirs for mine, theirs in zip(self._own(), self.others, strict=True))
        seconds = self.told if self.ranks.teachers else self._seconds()
        earlier = self.before["teacher_seconds"]
        return {
            "teacher_items": self.before["teacher_items"] + items,
            "teacher_seconds": None if seconds is None or earlier is None else earlier + seconds,
            "cache_hits": self.before["cache_hits"] + hits,
            "total_seconds": self.before["total_seconds"] + time.perf_counter() - self.began,
        }

    def since(self, start: dict[str, Any]) -> dict[str, Any]:
        return {k: None if v is None or start[k] is None else v - start[k] for k, v in self.so_far().items()}

    def keep(self) -> None:
        if not self.ranks.main:
            return
        make(self.path.parent)
        write_json(self.path, self.so_far())


Told = tuple[np.ndarray[Any, Any], dict[str, Any]]
"""Of a teacher on the test split: ``(N, C)`` float64 logits in the data's classes, and its figures."""


@dataclass
class Shared:
    """What the seeds of a run have in common; each teacher is measured once for all of them. told: None for one that is not measured, or cannot be.
    mixing: of several teachers."""

    parts: Parts
    engine: Engine
    teacher: Teacher | None
    notes: list[str]
    environment: dict[str, Any]
    progress: Progress
    stop: Stop
    cost: Cost
    resumed: dict[str, list[int]]
    ranks: Ranks = ALONE
    told: list[Told | None] = field(default_factory=list)
    mixing: Mixing | None = None

    @property
    def exact(self) -> Engine:
        """What is evaluated is what is saved: full precision, contiguous."""
        return Engine(self.engine.device, "float64" if self.engine.precision == "float64" else "float32")


def engine_from_main(
    ranks: Ranks, choose: Callable[[], tuple[Engine, dict[str, Any]]], device: torch.device, source: int = 0
) -> tuple[Engine, dict[str, Any]]:
    """What the main rank (or the rank ``source``) chose by measuring; the others run the same on their own devices."""

    def told() -> list[Any]:
        engine, why = choose()
        return [engine.precision, engine.layout, why]

    precision, layout, why = ranks.told(told, source)
    return Engine(device, precision, layout), why


def train_role(
    role: str,
    folder: Path,
    recipe: Recipe,
    student: Model,
    objective: Objective | StagedObjective,
    teacher: Teacher | None,
    shared: Shared,
    log: Log,
) -> tuple[Trained, State]:
    """Train one role from the weights in the module, or take what an earlier attempt finished. The result is committed as ``folder/role``.

    A rank that only teaches goes along, and has no result.
    """
    parts, choices = shared.parts, shared.environment["choices"]
    how = {"workers": choices["workers"]["value"], "pin_memory": choices["pin_memory"]["value"]}
    if role == "baseline":
        feed = parts.baseline_feed(recipe, **how)
    else:
        ask = bool(lives_of(teacher)) and not shared.ranks.teaching
        feed = parts.feed(recipe, with_teacher=teacher is not None, ask=ask, others=True, **how)
    validate = parts.validation(student, shared.engine)
    recorder = Recorder(role, folder / "checkpoints" / role, log, shared.progress, shared.stop, validate, shared.cost.keep_all)
    if shared.ranks.teaching:
        live, asked = next(iter(lives_of(teacher)), None), asking(objective, int(recipe.train.accumulate))
        with shared.stop.steps():
            if not shared.ranks.heard():  # whether the role is trained already
                feed = feed if live is None else parts.teacher_feed(feed)
                attend(live, feed, asked, recipe.train, shared.engine.dtype, recorder, shared.ranks)
        return Trained(0, 0.0, 0), {}
    with shared.stop.steps():
        return _fit_once(folder / role, student, teacher, objective, feed, shared.engine, recipe, recorder, parts.data.classes, parts.ranks)


def _fit_once(
    final: Path,
    student: Model,
    teacher: Teacher | None,
    objective: Objective | StagedObjective,
    feed: Feed,
    engine: Engine,
    recipe: Recipe,
    recorder: Recorder,
    classes: tuple[str, ...],
    ranks: Ranks,
) -> tuple[Trained, State]:
    """Fit, unless ``final`` stands and its last state is on record; commit the model as ``final``, and its peers beside it."""
    done = recorder.checkpoints.with_name(f"{recorder.checkpoints.name}-done")
    found = checkpoint.from_main(ranks, lambda: checkpoint.load_newest(done, recorder.progress.say))
    ranks.tell(found is not None)
    peers: list[Model] = objective.peers()
    if found is not None:
        states = [found[1]["student"], *found[1].get("peers", [])]
        if len(states) <= len(peers):
            text = f"the training of {final.parent} ended under a version of Limbeck that did not keep the student's peers."
            raise UsageError(Problem("--resume", text, "Run it again into another --out."))
        for model, state in zip([student, *peers], states, strict=True):
            engine.place(model.module)
            load_state(model.module, state)
        trained, state = Trained(**found[1]["done"]), found[1]["student"]
    else:
        trained = fit(student, teacher, objective, feed, engine, recipe.train, recipe.seed, recorder, ranks)
        for buffer in (b for model in [student, *peers] for b in model.module.buffers()):
            ranks.broadcast(buffer)  # batch statistics are each rank's own; those of the main rank are what is saved
        state = snapshot(student.module)
        if ranks.main:
            kept = {"student": state, "peers": [snapshot(peer.module) for peer in peers], "done": vars(trained)}
            checkpoint.save(done, trained.steps, kept)
    if ranks.main:
        for model, folder in [(student, final), *((peer, final.with_name(f"peer-{n}")) for n, peer in enumerate(peers))]:
            if not folder.is_dir():
                save_model(model, folder, classes)
    return trained, state


def train_teacher(job: Job, teacher: Model, device: torch.device, progress: Progress, stop: Stop, cost: Cost) -> tuple[Model, list[int]]:
    """Fine-tune the teacher on the labelled rows with cross entropy (``teacher.train``); committed as ``out/teacher`` (of several:
    ``out/teacher-0`` ...), once for all seeds.

    Returns it, and the steps from which its training was resumed.
    """
    [spec], role = job.recipe.teachers, job.role
    assert spec.train is not None
    given = spec.train.model_dump(exclude_none=True, exclude={"if_needed"})
    # names of blocks are those of the student
    given |= {"ema": None, "select": "last", "stages": None, "gradient_checkpointing": job.recipe.train.gradient_checkpointing is True}
    cache = job.recipe.teacher_cache.model_copy(update={"views": "live"})  # nobody is asked for answers
    recipe = job.recipe.model_copy(update={"train": job.recipe.train.model_copy(update=given), "teacher_cache": cache})
    which = "The teacher" if job.number is None else f"Teacher {job.number}"
    progress.say(f"{which} is trained first, on the labelled data: {recipe.train.epochs} epochs.")
    ranks = job.ranks
    own = Parts(recipe, job.data, teacher.preprocessing, None, batch_statistics=has_batch_statistics(teacher), ranks=ranks)
    objective = own.baseline_objective().at(0)
    choice_file = job.out / "checkpoints" / f"{role}.json"

    def choice() -> tuple[Engine, dict[str, Any]]:
        if choice_file.is_file():
            found = read_json(choice_file)
            return Engine(device, found["precision"], found["layout"]), {"accumulate": found.get("accumulate", recipe.train.accumulate)}
        engine, accumulate, _, _ = how_to_train(recipe, teacher, None, objective, own, device, progress, copies=0)
        make(choice_file.parent)
        found = {"precision": engine.precision, "layout": engine.layout, "accumulate": accumulate}
        write_json(choice_file, found)
        return engine, found

    engine, found = engine_from_main(ranks, choice, device)
    recipe = with_accumulate(recipe, found["accumulate"])
    workers, _ = ranks.from_main(lambda: choose_workers(recipe.train.workers, job.data.train, own.augment, ranks.local_size))
    log = Log(job.out) if ranks.main else NoLog()
    try:
        validate = own.validation(teacher, engine)
        recorder = Recorder(role, job.out / "checkpoints" / role, log, progress, stop, validate, cost.keep_all)
        feed = own.feed(recipe, with_teacher=False, workers=workers, pin_memory=device.type == "cuda")
        with stop.steps():
            trained, _ = _fit_once(job.out / role, teacher, None, objective, feed, engine, recipe, recorder, job.data.classes, ranks)
        stop.between("the training of the student")
    finally:
        log.close()
    teacher.weights_sha256 = state_hash(teacher.module)
    teacher.classes = job.data.classes
    return teacher, trained.resumed_from
