"""Looking at a job before anything of it is done or written: models, teacher, and whose answers are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck._parts import Parts
from limbeck._teaching import (
    Answers,
    Identity,
    Known,
    Sources,
    announce,
    identify,
    known_of,
    recalled,
    unfinished,
    wants_cache,
)
from limbeck.cache import TableTeacher
from limbeck.data import Data, load_data
from limbeck.engine import check_precision, choose_device
from limbeck.errors import Problem, UsageError
from limbeck.losses import AUTO, LOSSES
from limbeck.models import Model, build_model, class_map, exit_layers, pair_layers, sources, validate_paths, which_blocks
from limbeck.objective import Objective, StagedObjective, needs_of, with_pairs
from limbeck.placement import Seat, check_seat, seat_of
from limbeck.randomness import seed_for
from limbeck.ranks import ALONE, Ranks
from limbeck.recipe import Ensemble, Recipe, TeacherSpec
from limbeck.run import (
    check_trackers,
    read_json,
)

__all__ = [
    "Begun",
    "Job",
    "TeacherSource",
    "agree",
    "begin",
    "has_batch_statistics",
    "job_of",
    "jobs_of",
    "keep",
    "of_member",
    "parameters_of",
    "summary",
    "teacher_of",
]


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher comes from. build: whether it gets a new head (it is going to be trained) -> the teacher. sources: what it is made from, where
    that can be told without loading it."""

    build: Callable[[bool], Model]
    sources: Callable[[], Sources | None] = lambda: None


@dataclass(frozen=True)
class Job:
    """Everything that a run needs, however it was asked for: by recipe, by options, or from Python.

    build_student: seed -> the student with its initial weights. teachers: of the recipe, in their order.
    verify_cache: how many cached answers are compared with the teacher; None: some, where the teacher is loaded anyway; but not those of directories
    that were ``compared``, or filled, before. uses: how many students learn from its answers, this one included, where that is more than ``seeds``.
    lender: a finished run of the same student, data and training, whose baselines (by seed), and what it chose for the student by measuring, are this
    run's too.
    ranks: the processes that share the work, all of which hold the same job. plan: it is only planned, by a single process. number: which of several
    teachers this is the job of (:func:`of_member`). build_peers: seed -> what learns beside the student, with initial weights of their own.
    """

    recipe: Recipe
    data: Data
    build_student: Callable[[int], Model]
    teachers: tuple[TeacherSource, ...]
    out: Path
    resume: bool = False
    seeds: int = 1
    verify_cache: int | None = None
    compared: set[Path] = field(default_factory=set)
    uses: int = 0
    lender: Path | None = None
    ranks: Ranks = ALONE
    plan: bool = False
    number: int | None = None
    build_peers: Callable[[int], list[Model]] = lambda seed: []

    @property
    def role(self) -> str:
        """Under which name the teacher of this job is kept: ``teacher``, or ``teacher-0`` ... of several."""
        return "teacher" if self.number is None else f"teacher-{self.number}"


def of_member(job: Job, number: int) -> Job:
    """The job of one of several teachers, as if it were the only one."""
    own = {"teacher": job.recipe.teachers[number], "ensemble": Ensemble(), "seed": seed_of_teacher(job.recipe, number)}
    verify = None if job.recipe.teachers[number].model.startswith("logits:") else job.verify_cache
    alone = job.recipe.model_copy(update=own)
    return replace(job, recipe=alone, teachers=(job.teachers[number],), number=number, verify_cache=verify)


def jobs_of(job: Job) -> list[Job]:
    """The job of each teacher, as if it were the only one."""
    return [job] if len(job.teachers) == 1 else [of_member(job, number) for number in range(len(job.teachers))]


def seed_of_teacher(recipe: Recipe, number: int) -> int:
    """Of what is drawn for one of several teachers that are trained first, so that two of one kind are not one."""
    return recipe.seed if number == 0 else seed_for(recipe.seed, "teacher", number) % 2**63


def job_of(
    recipe: Recipe,
    base: Path,
    out: Path,
    *,
    resume: bool = False,
    seeds: int = 1,
    verify_cache: int | None = None,
    data: Data | None = None,
    uses: int = 0,
    lender: Path | None = None,
) -> Job:
    """The job of a recipe with absolute paths; its data is read here, unless it is given."""
    data = data or load_data(recipe.data, recipe.task, base)
    length = recipe.data.max_length

    def source(number: int, spec: TeacherSpec) -> TeacherSource:
        seed = seed_of_teacher(recipe, number)
        return TeacherSource(
            lambda head: build_model(spec, role="teacher", data=data, seed=seed, base=base, new_head=head, max_length=length),
            lambda: sources(spec, data=data, base=base, max_length=length),
        )

    return Job(
        recipe=recipe,
        data=data,
        build_student=lambda seed: build_model(recipe.student, role="student", data=data, seed=seed, base=base, max_length=length),
        teachers=tuple(source(number, spec) for number, spec in enumerate(recipe.teachers)),
        build_peers=lambda seed: peers_of(recipe, data, base, seed),
        out=out,
        resume=resume,
        seeds=seeds,
        verify_cache=verify_cache,
        uses=uses,
        lender=lender,
    )


def peers_of(recipe: Recipe, data: Data, base: Path, seed: int) -> list[Model]:
    """What learns beside the student of a recipe. Raises: UsageError for one that cannot be built."""
    found, length = [], recipe.data.max_length
    for number, spec in enumerate(recipe.student.peers):
        own = seed_for(seed, "peer", number)
        try:
            found.append(build_model(spec, role="student", data=data, seed=own, base=base, max_length=length))
        except UsageError as error:
            raise UsageError(
                [replace(p, where=p.where.replace("student", f"student.peers.{number}", 1)) for p in error.problems]
            ) from error
    return found


@dataclass
class Begun:
    """A job of which everything that can be wrong has been looked at, and nothing been written. known: the teacher; model: where it is loaded;
    table: where it is a file of logits; columns: its output for each class of the data; answers: its cache, None where it is asked in every step;
    found: whose cache that is; cached: whether answers are kept, and why; whole: they are only read where every one is there; there: its
    directories where some answers are, and are not read; seat: where the teacher is asked, None where there is none to ask; pairs: the layers
    (student's, teacher's) that ``layers: auto`` stands for; exits: the student's layers that it stands for where exits are on them. members: of
    several teachers, each as if it were the only one; the fields that are of one teacher are then empty, and ``known`` is what is known of all."""

    device: torch.device
    student: Model
    parts: Parts
    objective: Objective | StagedObjective
    notes: list[str]
    facts: dict[str, Any]
    known: Known | None = None
    model: Model | None = None
    table: TableTeacher | None = None
    columns: np.ndarray[Any, Any] | None = None
    to_train: bool = False
    answers: Answers | None = None
    found: Identity | None = None
    cached: tuple[bool, str] = (False, "there is no teacher")
    whole: bool = False
    there: dict[str, Path] = field(default_factory=dict)
    seat: Seat | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    exits: tuple[str, ...] = ()
    members: tuple[Begun, ...] = ()

    @property
    def taught(self) -> tuple[Begun, ...]:
        """One for each teacher."""
        return self.members or (() if self.known is None else (self,))

    def prepare(self) -> None:
        """Have the inputs made of those of several teachers that are asked in the loop."""
        if self.members:
            live = [one.model is not None and one.answers is None for one in self.members]
            self.parts.teacher = tuple(
                one.model.preprocessing if asked and one.model is not None else None for one, asked in zip(self.members, live, strict=True)
            )

    @property
    def teacher_device(self) -> torch.device:
        """Where this process asks the teacher."""
        return self.device if self.seat is None else self.seat.device

    def settled(self, recipe: Recipe) -> Recipe:
        """The recipe with the pairs of layers in place of ``layers: auto``."""
        return _settled(recipe, self.pairs, self.exits) if self.pairs or self.exits else recipe


def begin(job: Job, *, label: bool = False) -> Begun:
    """Build and check; everything that can be wrong is found here, before the first file is written.

    label: the teacher's answers are to be kept, whatever they are for.
    """
    if len(job.recipe.teachers) > 1:
        return _several(job, label)
    recipe, data = job.recipe, job.data
    spec = recipe.teachers[0] if recipe.teachers else None
    source = job.teachers[0] if job.teachers else None
    if job.ranks.local_size > 1 and recipe.train.device.startswith("cuda:"):
        text = f"got {recipe.train.device}, on which all {job.ranks.local_size} processes of this machine would work."
        raise UsageError(Problem("train.device", text, "Leave it out, or write cuda: each process takes a device of its own."))
    device = choose_device(recipe.train.device)
    job.ranks.refuse_shared(device)
    check_precision(recipe.train.precision, device)
    student = job.build_student(recipe.seed)
    pairs: tuple[tuple[str, str], ...] = ()
    early: tuple[Model, np.ndarray[Any, Any] | None, bool] | None = None
    exits: tuple[str, ...] = ()
    of_student, of_teacher = needs_of(recipe.terms)
    if any(LOSSES[t.loss].exits and (t.model_extra or {}).get("layers") == AUTO for t in recipe.terms):
        exits = tuple(exit_layers(student))
    if AUTO in of_teacher.features and source is not None:  # whose answers depend on the layers
        early = teacher_of(job)
        pairs = tuple(pair_layers(student, early[0]))
    if AUTO in of_student.features:
        recipe = _settled(recipe, pairs, exits)
        job = replace(job, recipe=recipe)
    parts = Parts(recipe, data, student.preprocessing, None, batch_statistics=has_batch_statistics(student), ranks=job.ranks)
    parts.build_peers = job.build_peers
    begun = Begun(device, student, parts, None, [], {}, pairs=pairs, exits=exits)  # type: ignore[arg-type]
    if pairs:
        named = ", ".join(f"{ours} with {theirs}" for ours, theirs in pairs)
        begun.notes.append(
            f"layers: auto compares layers of student and teacher: {named}. To choose others, give lists as student and teacher."
        )
    if exits:
        begun.notes.append(
            f"layers: auto has exits on layers of the student: {', '.join(exits)}. To choose others, give a list as student."
        )
    told: Sources | None = None
    if spec is not None and spec.model.startswith("logits:"):
        begun.table = _table(recipe, data, parts, device)
        begun.columns = begun.table.columns
        begun.known = Known(
            spec.model, student.preprocessing, None, None, begun.table.num_classes, begun.table.sha256, None, begun.table.notes
        )
    elif source is not None and spec is not None:
        begun.seat = seat_of(recipe, device, job.ranks, plan=job.plan)
        check_seat(recipe, begun.seat)
        wanted, reason = (True, "asked for by limbeck label") if label else wants_cache(recipe, parts, max(job.seeds, job.uses))
        before = job.ranks.from_main(lambda: _kept_before(job))
        # a run to be resumed goes on as it began
        if before is False and wanted is not False:
            wanted, reason = False, "the run was begun without"
        elif before and wanted is None:
            wanted, reason = True, "the run was begun with answers that were kept"
        if begun.seat.ranks:
            wanted, reason = _in_the_loop(wanted, reason, begun.seat)
        begun.cached, begun.whole = (wanted is True, reason), wanted is None
        answers = Answers(recipe, parts) if wanted is not False else None
        # every rank does alike, whatever lies on its own machine
        if answers is not None and (wanted or not job.ranks.any(not answers.begun())):
            begun.answers = answers
        training = spec.train
        if begun.answers is not None and (training is None or training.if_needed):
            told = source.sources()
            if told is not None and job.verify_cache is None:
                with _read_whole(begun):
                    begun.known = recalled(begun.answers, told, data)
            if job.ranks.any(begun.answers is None) and begun.answers is not None:
                _live(begun, "what lies on another machine cannot be used")
            if job.ranks.any(begun.known is None):  # a machine whose cache lacks something has its teacher asked, and the others go along
                begun.known = None
                if begun.answers is not None:
                    begun.answers.folders = {}
            elif begun.whole:
                begun.cached = _WHOLE
        if begun.known is not None:
            begun.columns = class_map(begun.known, data)
        else:
            begun.model, begun.columns, begun.to_train = early or teacher_of(job)
            begun.known = known_of(begun.model)
        parts.teacher = begun.known.preprocessing
    _check_models(recipe, student, begun.model, to_train=begun.to_train)
    parts.check_stages(student)
    parts.probe(student, begun.model)
    if begun.model is not None and begun.answers is not None and not begun.to_train:
        keep(begun, told)
    begun.objective = parts.objective(recipe.seed, student)
    if job.verify_cache and begun.answers is None and not begun.to_train:
        reason = "the teacher is a file of logits" if begun.table is not None else begun.cached[1].rstrip(".")
        text = f"has nothing to compare: no answers of the teacher are kept or read ({reason})."
        raise UsageError(Problem("--verify-cache", text, "Leave it out, or name teacher_cache.path."))
    known = begun.known
    if begun.seat is not None and begun.seat.ahead and begun.model is None:
        begun.notes.append(f"teacher.placement has no effect here ({begun.seat.placement}): the teacher is not loaded.")
    begun.notes = [
        *check_trackers(recipe.track),
        *data.notes,
        *student.notes,
        *(known.notes if known is not None else []),
        *_warnings(student, known, begun.to_train),
        *begun.notes,
    ]
    begun.facts = {
        "data": data.fingerprint,
        "teacher": None if known is None else known.weights_sha256,
        "student": student.weights_sha256,
        "seeds": job.seeds,
    }
    return begun


def _several(job: Job, label: bool) -> Begun:
    """:func:`begin` of each of several teachers, for the same student, and what they are together."""
    student = job.build_student(job.recipe.seed)
    alike = replace(job, build_student=lambda seed: student)
    members: list[Begun] = []
    problems: list[Problem] = []
    for number in range(len(job.teachers)):
        try:
            members.append(begin(of_member(alike, number), label=label))
        except UsageError as error:
            own = [replace(p, where=_within(p.where, number)) for p in error.problems]
            if job.ranks.size > 1:  # its ranks take common steps, which one that went on after a mistake of its own would miss
                raise UsageError(own) from error
            problems += [problem for problem in own if problem not in problems]
    if problems:
        raise UsageError(problems)
    first, known = members[0], [one.known for one in members if one.known is not None]
    counts = [one.parameters for one in known]
    together = Known(
        " + ".join(one.model for one in known),
        first.student.preprocessing,
        job.data.classes,
        None,
        len(job.data.classes),
        " ".join(one.weights_sha256 for one in known),
        None if any(count is None for count in counts) else sum(count for count in counts if count is not None),
    )
    parts = Parts(job.recipe, job.data, student.preprocessing, None, batch_statistics=first.parts.batch_statistics, ranks=job.ranks)
    parts.build_peers = job.build_peers
    notes = dict.fromkeys(note for one in members for note in one.notes)
    fixed = [one.facts["teacher"] for one in members if not one.to_train]
    if len(set(fixed)) < len(fixed):
        notes["Warning: two of the teachers have the same weights: together they say what one of them says, and it counts twice."] = None
    facts = {**first.facts, "teacher": [one.facts["teacher"] for one in members]}
    begun = Begun(first.device, student, parts, first.objective, list(notes), facts, known=together, members=tuple(members))
    begun.exits = first.exits
    parts.recipe, parts.shapes_student = begun.settled(job.recipe), first.parts.shapes_student
    begun.prepare()
    return begun


def _within(where: str, number: int) -> str:
    """Where a problem of one of several teachers stands in the recipe."""
    return f"teacher.{number}{where.removeprefix('teacher')}" if where == "teacher" or where.startswith("teacher.") else where


def _settled(recipe: Recipe, pairs: Sequence[tuple[str, str]], exits: Sequence[str]) -> Recipe:
    """The recipe, in whose stages too ``layers: auto`` is these pairs, and these layers for exits."""
    stages = recipe.train.stages
    if stages is not None:
        stages = [
            stage if stage.objective is None else stage.model_copy(update={"objective": with_pairs(stage.objective, pairs, exits)})
            for stage in stages
        ]
    train = recipe.train.model_copy(update={"stages": stages})
    return recipe.model_copy(update={"objective": with_pairs(recipe.objective, pairs, exits), "train": train})


def agree(job: Job, begun: Begun) -> None:
    """Machines with files of their own hold the same ones."""
    recipe = job.recipe.model_dump(
        mode="json", include={"task", "seed", "objective", "train", "baseline", "export", "data", "teacher_cache"}
    )
    for section, places in (("data", ("source", "test", "valid", "unlabelled")), ("teacher_cache", ("path",))):
        for name in places:  # what is there is compared by its content
            recipe[section].pop(name)
    taught = begun.taught
    asked = {
        "whether the teacher is loaded": [one.model is not None for one in taught],
        "whether its answers are kept": [one.answers is not None for one in taught],
    }
    # under names that no section of the recipe has
    facts = {f"the {name}": value for name, value in begun.facts.items()}
    job.ranks.agree({**facts, **recipe, **asked})


_WHOLE = (True, "every answer is there")


def _in_the_loop(wanted: bool | None, reason: str, seat: Seat) -> tuple[bool, str]:
    """A teacher with ranks of its own is asked in every step. Raises: UsageError where its answers are to be kept: all ranks would ask it for them
    before the first step, and then those that teach had nothing to do."""
    if wanted:
        text = (
            f"is {seat.placement}, and its answers are kept ({reason}): every rank would ask for a part of them, and then none would teach."
        )
        raise UsageError(Problem("teacher.placement", text, "Set teacher_cache.mode: off (or views: live), or placement: same."))
    return False, reason if wanted is False else f"{reason}, and {seat.placement} teaches in every step"


def _kept_before(job: Job) -> bool | None:
    """Whether a run to be resumed kept its teacher's answers, or asked it in every step, e.g. because the disk was too full then; None where it had
    not come so far."""
    file = job.out / "environment.json"
    if not job.resume or not file.is_file():
        return None
    record = read_json(file).get("choices", {}).get(job.role.replace("teacher", "teacher_cache"), {})
    kept = record.get("kept")
    return None if kept is None else bool(kept)


@contextmanager
def _read_whole(begun: Begun) -> Iterator[None]:
    """Where answers are only read if every one is there, what stands against it is said, and the teacher is asked in every step."""
    try:
        yield
    except UsageError as against:
        if not begun.whole:
            raise
        _live(begun, " ".join(str(against).split()))


def _live(begun: Begun, against: str) -> None:
    """Ask the teacher in every step, although some answers are there."""
    reason = f"{begun.cached[1]}, and {against}"
    begun.notes.append(f"The teacher is asked in every step: {reason.rstrip('.')}.")
    begun.answers, begun.found, begun.cached, begun.whole = None, None, (False, reason), False


def _table(recipe: Recipe, data: Data, parts: Parts, device: torch.device) -> TableTeacher:
    """A teacher that is a file of logits; they are of the samples as they are, so views of them would teach something else."""
    [spec] = recipe.teachers
    if parts.augment is not None:
        text = "makes other versions of the samples than those that the teacher's logits are of."
        raise UsageError(Problem("data.augment", text, "Set data.augment: none, or name a teacher that can be asked."))
    table = TableTeacher(Path(spec.model.removeprefix("logits:")), data, device)
    try:
        table.choose(class_map(table, data))
    except UsageError as e:
        hint = "A .parquet file may name its classes, in the order of its logits."
        raise UsageError([Problem("teacher.model", f"{table.path}: {p.message}", hint) for p in e.problems]) from None
    return table


def keep(begun: Begun, told: Sources | None) -> None:
    """:func:`_keep`, on every rank alike."""
    assert begun.model is not None
    own, cached = (begun.model.preprocessing, list(begun.model.notes)), begun.cached
    _keep(begun, told)
    if begun.parts.ranks.any(begun.answers is None) and begun.answers is not None:
        begun.cached = cached
        _live(begun, "another machine cannot keep or use its answers")
        begun.model.preprocessing, begun.model.notes = own
        begun.known = known_of(begun.model)
        begun.parts.teacher = begun.model.preprocessing


def _keep(begun: Begun, told: Sources | None) -> None:
    """Find the directories of a loaded teacher's answers, or fall back to asking it in every step: where the disk would not hold them, and where each
    would be used once and some are not there."""
    assert begun.answers is not None
    assert begun.model is not None
    answers, model = begun.answers, begun.model
    own = model.preprocessing, list(model.notes)
    with _read_whole(begun):
        begun.found = identify(answers, model, told)
        if begun.whole:
            missing = unfinished(answers)
            if not missing:
                begun.cached = _WHOLE
            elif answers.folders["teach"].exists():
                begun.there = answers.folders
                _live(begun, missing)
            else:  # another teacher's
                begun.answers, begun.found = None, None
        else:
            cache = answers.recipe.teacher_cache
            notes, kept = announce(answers, begun.found, may_fall_back=cache.path is None and cache.mode == "auto")
            begun.notes += notes
            if not kept:
                begun.answers, begun.found, begun.cached = None, None, (False, notes[0])
    if begun.answers is None:  # it is prepared for as if no cache had been looked at
        model.preprocessing, model.notes = own
    begun.known = known_of(model)
    begun.parts.teacher = model.preprocessing


def teacher_of(job: Job) -> tuple[Model, np.ndarray[Any, Any] | None, bool]:
    """The teacher of a job that has one, its output for each class of the data, and whether it has to be trained first."""
    [spec], build = job.recipe.teachers, job.teachers[0].build
    training = spec.train
    if training is None or training.if_needed:
        try:
            teacher = build(False)
            return teacher, class_map(teacher, job.data), False
        except UsageError:
            if training is None:
                raise
    return build(True), None, True


def _check_models(recipe: Recipe, student: Model, teacher: Model | None, *, to_train: bool) -> None:
    """What a recipe asks of the models is there, before anything is computed: every layer that a term names, batches that norms can take."""
    of_student, of_teacher = needs_of(recipe.terms)
    problems: list[Problem] = []
    for model, needs, side in ((student, of_student, "student"), (teacher, of_teacher, "teacher")):
        if model is None:
            continue
        try:
            validate_paths(model.module, needs.features, f"objective ({side} layer)")
        except UsageError as e:
            problems += e.problems
    again = recipe.train.gradient_checkpointing
    for model, setting in ((student, again), (teacher if to_train else None, again is True)):  # names are those of the student's layers
        try:
            if model is not None:
                which_blocks(model.module, setting)
        except UsageError as e:
            problems += e.problems
    if has_batch_statistics(student) and recipe.train.batch_size == 1:
        text = "got 1, and the student has batch statistics, which cannot be taken of one sample; expected at least 2."
        problems.append(Problem("train.batch_size", text))
    if problems:
        raise UsageError(problems)


def has_batch_statistics(model: Model) -> bool:
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.module.modules())


def summary(data: Data, begun: Begun) -> str:
    """One line on what is about to be trained on what."""
    labelled = int((data.train.labels >= 0).sum())
    rows = f"{len(data.train):,} training rows" + (f" ({labelled:,} labelled)" if labelled < len(data.train) else "")
    names = ", ".join(data.classes[:6]) + (", ..." if len(data.classes) > 6 else "")
    sizes = [f"{role} {count:,}" for role, count in parameters_of(begun).items()]
    return (
        f"{rows}, {len(data.valid):,} for validation, {len(data.test):,} for test; {len(data.classes)} classes ({names}); "
        f"parameters: {', '.join(sizes)}."
    )


def parameters_of(begun: Begun) -> dict[str, int]:
    student = {"student": sum(p.numel() for p in begun.student.module.parameters())}
    if begun.known is None or begun.known.parameters is None:
        return student
    return {"teacher": begun.known.parameters, **student}


def _warnings(student: Model, teacher: Known | None, to_train: bool) -> list[str]:
    """What a person should know before the run, and is free to do."""
    if teacher is None or teacher.parameters is None:
        return []
    notes = []
    small, large = sum(p.numel() for p in student.module.parameters()), teacher.parameters
    if small > large:
        notes.append(f"Warning: the student has {small:,} parameters, more than the teacher's {large:,}.")
    if to_train:
        notes.append(
            "The teacher's head does not fit the data's classes (or training it was asked for): it gets a new head and is trained first."
        )
    return notes
