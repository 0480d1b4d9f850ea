"""What the combinations of a sweep have in common: who lends what to whom, and everything that is wrong with any of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from limbeck._begin import Begun, Job, begin, job_of, teacher_of
from limbeck._folder import finished, matches, same_run
from limbeck._parts import reads_unlabelled
from limbeck._vary import Combination
from limbeck.data import Data, load_data
from limbeck.errors import Problem, UsageError, listed
from limbeck.losses import AUTO
from limbeck.models import validate_paths
from limbeck.objective import needs_of
from limbeck.ranks import ALONE, Ranks
from limbeck.recipe import Recipe, TeacherSpec, Term
from limbeck.run import read_json

__all__ = ["Lending", "baseline_key", "data_key", "judge", "teacher_keys", "without_numbers"]

_T = TypeVar("_T")

# Of `train`: what a model is trained with, and not built or checked by.
_HOW_LONG_AND_FAST = {
    *("epochs", "batch_size", "accumulate", "optimizer", "lr", "momentum", "nesterov", "betas", "weight_decay"),
    *("schedule", "warmup", "clip_norm", "ema", "select", "checkpoint_every", "log_every", "workers"),
}
# Of `train`: what changes no weight.
_NO_WEIGHT = {"workers", "checkpoint_every", "log_every"}


def data_key(recipe: Recipe) -> str:
    """What the data that is read depends on; views of it are made later."""
    return _text([recipe.data.model_dump(mode="json", exclude={"augment"}), recipe.task])


def baseline_key(recipe: Recipe) -> str:
    """What a baseline, and what is chosen for a student by measuring, depends on: everything but the teacher and the terms that read it."""
    plain = recipe.model_dump(mode="json", exclude={"teacher", "ensemble", "objective", "export", "track", "baseline", "teacher_cache"})
    plain["student"].pop("peers")
    for name in _NO_WEIGHT:
        plain["train"].pop(name)
    for stage in plain["train"]["stages"] or []:
        stage.pop("objective")
    whole = recipe.teacher is not None or reads_unlabelled(recipe)  # its steps are those of the student
    return _text([plain, [_cross_entropy(terms) for terms in recipe.objectives], recipe.views, whole])


def teacher_keys(recipe: Recipe) -> list[str | None]:
    """:func:`teacher_key` of each teacher."""
    return [teacher_key(recipe, spec, number) for number, spec in enumerate(recipe.teachers)]


def teacher_key(recipe: Recipe, teacher: TeacherSpec, number: int = 0) -> str | None:
    """What a teacher's own training depends on (its settings over those of the student); None where it is not trained.

    How it is asked afterwards is not in it, nor are settings of the student that its own take the place of.
    """
    if teacher.train is None:
        return None
    own = teacher.train.model_dump(mode="json")
    train = recipe.train.model_dump(mode="json", exclude={*_NO_WEIGHT, "ema", "select", "stages"}) | {
        k: v for k, v in own.items() if v is not None
    }
    model = teacher.model_dump(mode="json", include={"model", "weights", "options"})
    data = recipe.data.model_dump(mode="json")
    return _text([model, train, data, recipe.task, recipe.seed, number, _cross_entropy(recipe.objective)])


def without_numbers(recipe: Recipe, train: Iterable[str]) -> dict[str, Any]:
    """A recipe without the numbers of its objective, and without these keys of ``train``; layers, names and lists stay."""
    plain = recipe.model_dump(mode="json", exclude={"export": True, "train": set(train)})
    if recipe.teacher_cache.codec != "sparse":  # sparse answers are for the objective's temperature
        plain["objective"] = [{k: _unless_number(v) for k, v in term.items()} for term in plain["objective"]]
    return plain


def _unless_number(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if number or isinstance(value, dict) else value  # a mapping is a schedule


def _building_key(recipe: Recipe) -> str:
    """What :func:`begin` depends on. Of combinations that differ in epochs alone, the one with the most asks for the most."""
    plain = without_numbers(recipe, _HOW_LONG_AND_FAST)
    several = isinstance(recipe.teacher, list)
    for number, spec in enumerate(recipe.teachers):
        if spec.train is not None:
            holder = plain["teacher"][number] if several else plain["teacher"]
            holder["train"] = {"if_needed": spec.train.if_needed}
    return _text([plain, recipe.train.batch_size == 1])  # batch statistics cannot be taken of one sample


def _cross_entropy(terms: list[Term]) -> dict[str, Any]:
    """What a baseline, or a teacher's own training, learns from."""
    term = next((t for t in terms if t.loss == "cross_entropy"), None)
    return {} if term is None else term.model_dump(mode="json", exclude={"weight"})


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@dataclass
class Lending:
    """What combinations lend to later ones: a baseline, the choices made by measuring, a teacher that had to be trained, and the data.

    uses: students that learn in all. ranks: the processes of every run; all of them see the folder of the sweep. plan: nothing is
    run.
    """

    base: Path
    out: Path
    seeds: int
    uses: int
    ranks: Ranks = ALONE
    runs: dict[str, Path] = field(default_factory=dict)
    taught: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, Data] = field(default_factory=dict)
    plan: bool = False
    compared: set[Path] = field(default_factory=set)

    def folder(self, point: Combination) -> Path:
        return self.out / "runs" / point.name

    def recipe(self, point: Combination) -> Recipe:
        """What is run; the best student alone is exported, at the end."""
        recipe = point.recipe.model_copy(update={"export": []})
        trained = [self.taught.get(key or "", {}) for key in teacher_keys(recipe)]
        return recipe.with_teachers([spec.model_copy(update=own) for spec, own in zip(recipe.teachers, trained, strict=True)])

    def read(self, point: Combination) -> Data:
        """Its data, read where no other combination has it."""
        key = data_key(point.recipe)
        if key not in self.data:
            self.data[key] = load_data(point.recipe.data, point.recipe.task, self.base)
        return self.data[key]

    def job(self, point: Combination) -> Job:
        recipe = self.recipe(point)
        job = job_of(
            recipe,
            self.base,
            self.folder(point),
            resume=True,
            seeds=self.seeds,
            data=self.read(point),
            uses=self.uses,
            lender=self.runs.get(baseline_key(recipe)),
        )
        return replace(job, ranks=self.ranks, plan=self.plan, compared=self.compared)

    def keep_data(self, points: Iterable[Combination]) -> None:
        """Let go of the data that none of these reads."""
        wanted = {data_key(point.recipe) for point in points}
        self.data = {key: data for key, data in self.data.items() if key in wanted}

    def took(self, point: Combination) -> None:
        """A combination is finished, and lends what it has."""
        folder, recipe = self.folder(point), self.recipe(point)
        for number, key in enumerate(teacher_keys(recipe)):
            made = folder / (f"teacher-{number}" if isinstance(recipe.teacher, list) else "teacher")
            if key is not None and (made / "model.json").is_file():
                self.taught.setdefault(key, {"model": f"run:{made.resolve()}", "weights": None, "options": {}, "train": None})
        self.runs.setdefault(baseline_key(recipe), folder)


class _Found:
    """Problems, each with the names of the combinations that have it."""

    def __init__(self) -> None:
        self.having: dict[Problem, set[str]] = {}

    def look(self, points: Iterable[Combination], look: Callable[[], _T]) -> _T | None:
        """What ``look`` gives; where it finds something wrong, that is wrong with all of these points."""
        try:
            return look()
        except UsageError as error:
            for problem in error.problems:
                self.having.setdefault(problem, set()).update(p.name for p in points)
        return None


def judge(points: list[Combination], lending: Lending, vary: dict[str, list[str]]) -> Begun | None:
    """Find everything that is wrong with any combination that is not finished yet: data, models, layers, cache, and what is to be resumed.

    Models are built one after another and let go, once for all combinations that differ in numbers alone. What was built for the first
    combination to run is given back, if it was built for that one; None where nothing is left to run. Raises UsageError with all problems, each with
    the values or the combinations that have it.
    """
    found = _Found()
    left: list[Combination] = []
    for point in points:
        if finished(lending.folder(point)):
            found.look([point], partial(same_run, lending.folder(point), lending.recipe(point), lending.seeds))
            lending.took(point)
        else:
            left.append(point)
    for key in {data_key(p.recipe): None for p in left}:
        readers = [p for p in points if data_key(p.recipe) == key]
        data = found.look([p for p in readers if p in left], partial(lending.read, readers[0]))
        for point in readers:
            if data is not None and point not in left:
                found.look([point], partial(_same_data, lending.folder(point), data))
    groups: dict[str, list[Combination]] = {}
    for point in left:
        if data_key(point.recipe) in lending.data:
            groups.setdefault(_building_key(lending.recipe(point)), []).append(point)
    kept: Begun | None = None
    for group in reversed(groups.values()):  # the first to run is built last, and kept
        most = max(group, key=lambda point: point.recipe.train.epochs)
        begun = _begun(most, group, lending, found)
        kept = begun if most is left[0] else None
        del begun
    if found.having:
        raise UsageError([_attributed(problem, names, points, vary) for problem, names in found.having.items()])
    return kept


def _begun(most: Combination, group: list[Combination], lending: Lending, found: _Found) -> Begun | None:
    """Build and check what a group of combinations has in common, then what each has of its own; None where something is wrong."""
    job = lending.job(most)
    if lending.ranks.size > 1:  # its ranks take common steps, which one that goes on after a mistake of its own would miss
        begun: Begun | None = begin(job)
    else:
        begun = found.look(group, partial(begin, job))
    if begun is not None:
        for point in group:
            found.look([point], partial(_own, point, lending, begun))
        return begun
    # begin stops at the first part that is wrong: what is wrong with the others is told too
    found.look(group, partial(_student, job))
    found.look(group, partial(_teacher, job))
    return None


def _student(job: Job) -> None:
    """Its layers, of those that the objective reads."""
    named = [path for path in needs_of(job.recipe.terms)[0].features if path != AUTO]
    validate_paths(job.build_student(job.recipe.seed).module, named, "objective (student layer)")


def _teacher(job: Job) -> None:
    """The same of a teacher that can be built."""
    if len(job.recipe.teachers) == 1 and not job.recipe.teachers[0].model.startswith("logits:"):  # of several no layers are read
        model, _, _ = teacher_of(job)
        named = [path for path in needs_of(job.recipe.terms)[1].features if path != AUTO]
        validate_paths(model.module, named, "objective (teacher layer)")


def _own(point: Combination, lending: Lending, begun: Begun) -> None:
    """What a combination has of its own, where the models are those of ``begun``: the numbers of its objective, and a run that was begun."""
    recipe, parts = begun.settled(lending.recipe(point)), begun.parts
    before, parts.recipe = parts.recipe, recipe
    try:
        parts.objective(recipe.seed, begun.student)
        matches(lending.folder(point), recipe, begun.facts)
    finally:
        parts.recipe = before


def _same_data(folder: Path, data: Data) -> None:
    before = read_json(folder / "environment.json")["facts"]["data"]
    if before != data.fingerprint:
        text = f"the data changed since {folder.name} was run ({before} then, {data.fingerprint} now)."
        raise UsageError(Problem("--resume", text, "Name another --out."))


def _attributed(problem: Problem, names: set[str], points: list[Combination], vary: dict[str, list[str]]) -> Problem:
    """A problem with the values that have it, else with the combinations; as it is where all have it."""
    if len(names) == len(points):
        return problem
    message = f"{problem.where}: {problem.message}" if problem.where else problem.message
    for key, values in vary.items():
        with_value = {value: {p.name for p in points if p.values[key] == value} for value in values}
        guilty = [value for value in values if with_value[value] <= names]
        if guilty and set().union(*(with_value[value] for value in guilty)) == names:
            return Problem(f"--vary {key}={','.join(guilty)}", problem.message if problem.where == key else message, problem.hint)
    return Problem(f"combination {listed(sorted(names))}", message, problem.hint)
