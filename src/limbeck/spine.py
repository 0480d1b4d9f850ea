"""The spine: recipe -> data -> teacher -> student -> objective -> fit -> evaluate -> export -> report."""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck import checkpoint
from limbeck._asking import VERIFIED, engine_of_teacher, keep_answers
from limbeck._choices import explicit, resolved, snapshot, student_choice
from limbeck._folder import Stop, already, begun_seeds, finished_metrics, make, matches, next_free, read_recipe, refuse_taken
from limbeck._parts import Parts
from limbeck._planner import make_plan
from limbeck._results import figures, joint_metrics, measures, seed_metrics
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
from limbeck.analysis import analyse
from limbeck.cache import CachedTeacher, TableTeacher
from limbeck.data import SKIPPED, Data, choose_workers, load_data, skipped_csv, text_of, thumbnail
from limbeck.engine import Engine, check_precision, choose_device
from limbeck.errors import Interrupted, Problem, Stopped, UsageError
from limbeck.evaluate import metrics
from limbeck.export import export_model
from limbeck.loop import Feed, Recorder, Trained, fit
from limbeck.models import Model, build_model, class_map, load_into, save_model, sources, state_hash, validate_paths
from limbeck.objective import Objective, needs_of
from limbeck.progress import Progress
from limbeck.ranks import ALONE, Ranks, joined, refuse_lost_folder, restarted
from limbeck.reading import absolute
from limbeck.recipe import Recipe
from limbeck.report import write_report
from limbeck.run import (
    Log,
    NoLog,
    check_trackers,
    commit_folder,
    discard,
    finite,
    join_logs,
    provenance,
    read_json,
    sweep,
    write_atomic,
    write_json,
)
from limbeck.teacher import LiveTeacher, Meter, Teacher

__all__ = ["Begun", "Job", "begin", "execute", "job_of", "run_into", "run_recipe", "teacher_of"]

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """Everything that a run needs, however it was asked for: by recipe, by options, or from Python.

    build_student: seed -> the student with its initial weights. build_teacher: whether it gets a new head (it is going to be trained) -> teacher.
    sources: what the teacher is made from, where that can be told without loading it. verify_cache: how many cached answers are compared with the
    teacher; None: some, where the teacher is loaded anyway. uses: how many students learn from its answers, this one included, where
    that is more than ``seeds``. lender: a finished run of the same student, data and training, whose baselines (by seed), and what it chose for the
    student by measuring, are this run's too.
    ranks: the processes that share the work, all of which hold the same job.
    """

    recipe: Recipe
    data: Data
    build_student: Callable[[int], Model]
    build_teacher: Callable[[bool], Model] | None
    out: Path
    resume: bool = False
    seeds: int = 1
    sources: Callable[[], Sources | None] = lambda: None
    verify_cache: int | None = None
    uses: int = 0
    lender: Path | None = None
    ranks: Ranks = ALONE


def run_recipe(
    recipe: Recipe,
    *,
    base: Path,
    out: Path | None = None,
    resume: bool = False,
    seeds: int | None = None,
    progress: str = "auto",
    dry_run: bool = False,
    command: str = "distill",
    verify_cache: int | None = None,
) -> dict[str, Any]:
    """Run a recipe; returns its metrics (``metrics.json``). base: the folder that relative paths of the recipe start from.

    seeds: None is one, or on resume as many as the run was begun with.
    """
    with joined() as ranks:
        if out is None:
            refuse_lost_folder()
        out = out or Path(ranks.from_main(lambda: str(next_free(Path("runs"), _run_name(recipe, command)))))
        resume = resume or restarted(ranks)
        if ranks.main:
            refuse_taken(out, resume)
        return run_into(
            recipe, base=base, out=out, resume=resume, seeds=seeds, progress=progress, dry_run=dry_run, verify_cache=verify_cache
        )


def run_into(
    recipe: Recipe,
    *,
    base: Path,
    out: Path,
    resume: bool = False,
    seeds: int | None = None,
    progress: str = "auto",
    dry_run: bool = False,
    verify_cache: int | None = None,
) -> dict[str, Any]:
    """:func:`run_recipe` into a folder that the caller has judged."""
    recipe = absolute(recipe, base)
    with joined() as ranks, Progress(progress if ranks.main else "none") as shown:
        count = int(ranks.from_main(lambda: seeds or begun_seeds(out)))
        done = ranks.from_main(lambda: already(out, recipe, count))
        if done is not None:
            shown.say(f"{out} is finished; nothing is left to do.")
            return dict(done)
        job = job_of(recipe, base, out, resume=resume, seeds=count, verify_cache=verify_cache)
        return execute(replace(job, ranks=ranks), shown, dry_run=dry_run)


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
    spec = recipe.teacher
    length = recipe.data.max_length
    return Job(
        recipe=recipe,
        data=data,
        build_student=lambda seed: build_model(recipe.student, role="student", data=data, seed=seed, base=base, max_length=length),
        build_teacher=None
        if spec is None
        else lambda new_head: build_model(
            spec, role="teacher", data=data, seed=recipe.seed, base=base, new_head=new_head, max_length=length
        ),
        out=out,
        resume=resume,
        seeds=seeds,
        sources=lambda: None if spec is None else sources(spec, data=data, base=base, max_length=length),
        verify_cache=verify_cache,
        uses=uses,
        lender=lender,
    )


@dataclass
class Begun:
    """A job of which everything that can be wrong has been looked at, and nothing been written. known: the teacher; model: where it is loaded;
    table: where it is a file of logits; columns: its output for each class of the data; answers: its cache, None where it is asked in every step;
    found: whose cache that is; cached: whether answers are kept, and why; whole: they are only read where every one is there; there: its
    directories where some answers are, and are not read."""

    device: torch.device
    student: Model
    parts: Parts
    objective: Objective
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


def begin(job: Job, *, label: bool = False) -> Begun:
    """Build and check; everything that can be wrong is found here, before the first file is written.

    label: the teacher's answers are to be kept, whatever they are for.
    """
    recipe, data = job.recipe, job.data
    device = choose_device(recipe.train.device)
    check_precision(recipe.train.precision, device)
    student = job.build_student(recipe.seed)
    parts = Parts(recipe, data, student.preprocessing, None, batch_statistics=_has_batch_statistics(student), ranks=job.ranks)
    begun = Begun(device, student, parts, None, [], {})  # type: ignore[arg-type]
    told: Sources | None = None
    if recipe.teacher is not None and recipe.teacher.model.startswith("logits:"):
        begun.table = _table(recipe, data, parts, device)
        begun.columns = begun.table.columns
        begun.known = Known(
            recipe.teacher.model, student.preprocessing, None, None, begun.table.num_classes, begun.table.sha256, None, begun.table.notes
        )
    elif job.build_teacher is not None and recipe.teacher is not None:
        wanted, reason = (True, "asked for by limbeck label") if label else wants_cache(recipe, parts, max(job.seeds, job.uses))
        before = job.ranks.from_main(lambda: _kept_before(job))
        # a run to be resumed goes on as it began
        if before is False and wanted is not False:
            wanted, reason = False, "the run was begun without"
        elif before and wanted is None:
            wanted, reason = True, "the run was begun with answers that were kept"
        begun.cached, begun.whole = (wanted is True, reason), wanted is None
        answers = Answers(recipe, parts) if wanted is not False else None
        # every rank does alike, whatever lies on its own machine
        if answers is not None and (wanted or not job.ranks.any(not answers.begun())):
            begun.answers = answers
        training = recipe.teacher.train
        if begun.answers is not None and (training is None or training.if_needed):
            told = job.sources()
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
            begun.model, begun.columns, begun.to_train = teacher_of(job, job.build_teacher)
            begun.known = known_of(begun.model)
        parts.teacher = begun.known.preprocessing
    _check_models(recipe, student, begun.model)
    parts.probe(student, begun.model)
    if begun.model is not None and begun.answers is not None and not begun.to_train:
        keep(begun, told)
    begun.objective = parts.objective(recipe.seed)
    known = begun.known
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


def agree(job: Job, begun: Begun) -> None:
    """Machines with files of their own hold the same ones."""
    recipe = job.recipe.model_dump(
        mode="json", include={"task", "seed", "objective", "train", "baseline", "export", "data", "teacher_cache"}
    )
    for section, places in (("data", ("source", "test", "valid", "unlabelled")), ("teacher_cache", ("path",))):
        for name in places:  # what is there is compared by its content
            recipe[section].pop(name)
    asked = {"whether the teacher is loaded": begun.model is not None, "whether its answers are kept": begun.answers is not None}
    # under names that no section of the recipe has
    facts = {f"the {name}": value for name, value in begun.facts.items()}
    job.ranks.agree({**facts, **recipe, **asked})


_WHOLE = (True, "every answer is there")


def _kept_before(job: Job) -> bool | None:
    """Whether a run to be resumed kept its teacher's answers, or asked it in every step, e.g. because the disk was too full then; None where it had
    not come so far."""
    file = job.out / "environment.json"
    if not job.resume or not file.is_file():
        return None
    kept = read_json(file).get("choices", {}).get("teacher_cache", {}).get("kept")
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
    assert recipe.teacher is not None
    if parts.augment is not None:
        text = "makes other versions of the samples than those that the teacher's logits are of."
        raise UsageError(Problem("data.augment", text, "Set data.augment: none, or name a teacher that can be asked."))
    table = TableTeacher(Path(recipe.teacher.model.removeprefix("logits:")), data, device)
    try:
        table.columns = class_map(table, data)
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


def execute(job: Job, progress: Progress, *, dry_run: bool = False, begun: Begun | None = None) -> dict[str, Any]:
    """The spine. Everything that can be wrong is found before the first file is written. begun: what :func:`begin` made of this job already."""
    recipe, data, ranks, started = job.recipe, job.data, job.ranks, time.perf_counter()
    begun = begun or begin(job)
    agree(job, begun)
    recorded = _recorded(job, begun.facts)
    if ranks.size > 1 and not begun.objective.per_item:
        begun.notes.append("The objective is taken over a batch: on several ranks each takes it over its own share of a step.")
    for note in [*begun.notes, _summary(data, begun)]:
        progress.say(note)
    if dry_run:
        return make_plan(job, begun, recorded[0] if recorded is not None and "choices" in recorded[1] else recipe, progress)

    stop = Stop(ranks)
    resumed: dict[str, list[int]] = {}
    meter = None if begun.model is None else Meter(begun.model.module)
    if ranks.main:
        make(job.out)
        sweep(job.out)
    cost = _Cost(job.out / "checkpoints" / "cost.json", meter, started, ranks)
    with stop.listening():
        if recorded is None and ranks.main:
            # The recipe last: it marks a run as begun, and what a resume compares (and how many seeds there are) has to be known then.
            write_json(job.out / "environment.json", {"facts": begun.facts})
            if data.skipped:
                write_atomic(job.out / SKIPPED, skipped_csv(data))
            write_atomic(job.out / "recipe.yaml", recipe.to_yaml())
        if begun.model is not None and begun.to_train:
            begun.model, resumed["teacher"] = _train_teacher(job, begun.model, begun.device, progress, stop, cost)
            begun.columns = None
            if begun.answers is not None:
                before = len(begun.notes)
                keep(begun, None)
                for note in begun.notes[before:]:
                    progress.say(note)
        environment = recorded[1] if recorded is not None else {}
        known = "choices" in environment

        def between() -> None:
            cost.keep()
            stop.alone("the next part of the teacher's answers")

        asked = recorded[0] if recorded is not None and known else recipe
        try:
            teacher, choices = _teacher_at_work(job, begun, meter, progress, between, asked)
        except Interrupted:
            cost.keep()  # of the part that was not finished too
            raise
        cost.cached = teacher if isinstance(teacher, CachedTeacher | TableTeacher) else None
        shared = _Shared(begun.parts, Engine(begun.device), teacher, begun.notes, environment, progress, stop, cost, resumed)
        if begun.table is not None and begun.table.test is not None:
            shared.teacher_logits = begun.table.test if begun.columns is None else begun.table.test[:, begun.columns]
            shared.teacher_figures = {
                "metrics": metrics(shared.teacher_logits, data.test.labels),
                **_UNMEASURED,
                "from": str(begun.table.path),
            }
        if begun.answers is not None:
            shared.teacher_logits, shared.teacher_figures = _teacher_on_record(begun, shared, meter)
        if recorded is None or not known:
            engines = {"teacher": choices[0]} if choices is not None else {}
            engines["student"], why = _from_main(ranks, partial(_student_choice, job, begun, teacher), begun.device)
            workers, reason = ranks.from_main(
                lambda: choose_workers(job.recipe.train.workers, data.train, begun.parts.augment, ranks.local_size)
            )
            recipe = resolved(recipe, engines, workers, several=ranks.size > 1)
            device = begun.device.type
            record = {
                **(
                    {}
                    if choices is None
                    else {"teacher": choices[1], "teacher_cache": dict(zip(("kept", "reason"), begun.cached, strict=True))}
                ),
                "student": why,
                "workers": {"value": workers, "reason": reason},
                "pin_memory": {"value": device == "cuda", "reason": f"the device is {device}"},
            }
            environment = {**provenance(), **_where(engines, begun.device, ranks), "choices": record, "facts": begun.facts}
            if ranks.main:
                # The recipe first: choices that stand in the environment are taken from the recipe on resume.
                write_atomic(job.out / "recipe.yaml", recipe.to_yaml())
                write_json(job.out / "environment.json", environment)
        else:
            recipe = recorded[0]
            engines = explicit(recipe, begun.device)
            environment = {**environment, "world_size": ranks.size, "threads": torch.get_num_threads()}
        begun.parts.recipe = recipe
        shared.engine, shared.environment = engines["student"], environment
        result = _many_seeds(job, recipe, shared) if job.seeds > 1 else _one_seed(job, job.out, recipe, begun.student, shared)
    if meter is not None:
        meter.close()
    progress.say(result["verdict"])
    progress.say(f"Report: {job.out / 'report.html'}")
    return result


def _teacher_at_work(
    job: Job, begun: Begun, meter: Meter | None, progress: Progress, between: Callable[[], None], recipe: Recipe
) -> tuple[Teacher | None, tuple[Engine, dict[str, Any]] | None]:
    """The teacher of the loop, and how it runs (or ran, when it was asked) and why. Fills what its cache lacks."""
    if begun.known is None:
        return None, None
    device, model, answers = begun.device, begun.model, begun.answers
    if begun.table is not None:
        return begun.table, None

    def choice() -> tuple[Engine, dict[str, Any]]:
        assert model is not None
        batch = begun.parts.first_batch(recipe, with_teacher=True, ask=True)
        return engine_of_teacher(recipe, model, batch, device)

    if answers is None:
        assert model is not None
        engine, why = _from_main(job.ranks, choice, device)
        return LiveTeacher(model, engine, begun.columns, meter), (engine, why)
    if model is not None and begun.found is not None and meter is not None:
        verify = VERIFIED if job.verify_cache is None else job.verify_cache
        why = keep_answers(
            answers,
            begun.found,
            model,
            device,
            meter,
            progress,
            between,
            verify=verify,
            chosen=choice,
            ranks=job.ranks,
        )
    else:
        why = {"measured": [], "reason": "as its answers were given"}
    teacher = answers.teacher(begun.columns, device)
    made = teacher.reader.manifest.made
    return teacher, (Engine(device, made["precision"], made["layout"]), why)


def _student_choice(job: Job, begun: Begun, teacher: Teacher | None) -> tuple[Engine, dict[str, Any]]:
    """How the student trains, and why: as in the run that lends the baseline, so that both train alike; else as given or measured."""
    recipe = job.recipe
    if job.lender is not None and recipe.train.precision == "auto":
        engine = explicit(read_recipe(job.lender), begun.device)["student"]
        return engine, {"measured": [], "reason": f"as measured in {job.lender.name}"}
    batch = begun.parts.first_batch(recipe, with_teacher=teacher is not None, ask=isinstance(teacher, LiveTeacher))
    signal = None
    if teacher is not None and recipe.train.precision == "auto":
        signal = teacher(Engine(begun.device).send(batch), begun.objective.teacher_needs)
    return student_choice(begun.student, signal, begun.objective, batch, begun.device, recipe.train, recipe.seed)


def _teacher_on_record(begun: Begun, shared: _Shared, meter: Meter | None) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """The teacher's logits and figures on the test split, from its cache; a teacher that is loaded is measured, and then let go."""
    assert begun.answers is not None
    logits, model = begun.answers.test_logits(begun.columns), begun.model
    found = metrics(logits, begun.parts.data.test.labels)
    kept = begun.answers.figures(begun.device)
    if model is None or begun.parts.ranks.from_main(lambda: kept["latency_ms"] is not None):
        begun.model = None
        return logits, {"metrics": found, **kept}
    shared.stop.between("the teacher is measured")
    measured: dict[str, Any] = {}
    if begun.parts.ranks.main:
        shared.exact.place(model.module)
        measured = measures(model, begun.parts.samples(model.preprocessing), shared.exact)
        begun.answers.keep_figures(measured, begun.device)
    if meter is not None:
        meter.close()
    begun.model = None
    return logits, {"metrics": found, **measured}


_UNMEASURED: dict[str, Any] = {"parameters": None, "bytes": None, "flops": None, "latency_ms": None, "throughput": None}
_NOTHING: dict[str, Any] = {"teacher_items": 0, "teacher_seconds": 0.0, "cache_hits": 0, "total_seconds": 0.0}


class _Cost:
    """What the run has cost so far, over all its processes: kept beside the checkpoints, so that a resume goes on counting."""

    def __init__(self, path: Path, meter: Meter | None, began: float, ranks: Ranks) -> None:
        self.path, self.meter, self.began, self.ranks = path, meter, began, ranks
        self.cached: CachedTeacher | TableTeacher | None = None
        self.before = {**_NOTHING, **(read_json(path) if path.is_file() else {})}
        self.others = [0, 0]  # items and hits of the other ranks, when they were last asked

    def keep_all(self) -> None:
        """Called by all ranks at once."""
        self.ask_ranks()
        self.keep()

    def ask_ranks(self) -> None:
        """Called by all ranks at once."""
        own = self._own()
        self.others = [both - mine for both, mine in zip(self.ranks.sum(own), own, strict=True)]

    def _own(self) -> list[int]:
        return [0 if self.meter is None else self.meter.items, 0 if self.cached is None else self.cached.hits]

    def so_far(self) -> dict[str, Any]:
        items, hits = (mine + theirs for mine, theirs in zip(self._own(), self.others, strict=True))
        seconds = 0.0 if self.meter is None else self.meter.seconds
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


@dataclass
class _Shared:
    """What the seeds of a run have in common; the teacher is measured once for all of them."""

    parts: Parts
    engine: Engine
    teacher: Teacher | None
    notes: list[str]
    environment: dict[str, Any]
    progress: Progress
    stop: Stop
    cost: _Cost
    resumed: dict[str, list[int]]
    teacher_figures: dict[str, Any] = field(default_factory=dict)
    teacher_logits: np.ndarray[Any, Any] | None = None

    @property
    def exact(self) -> Engine:
        """What is evaluated is what is saved: full precision, contiguous."""
        return Engine(self.engine.device, "float64" if self.engine.precision == "float64" else "float32")


def _one_seed(job: Job, folder: Path, recipe: Recipe, student: Model, shared: _Shared) -> dict[str, Any]:
    """Train student and baseline from the same initial weights, evaluate, export, report."""
    data, parts, teacher, stop, ranks = job.data, shared.parts, shared.teacher, shared.stop, job.ranks
    lender = job.lender if job.lender is None or job.seeds == 1 else job.lender / f"seed-{recipe.seed}"
    if ranks.main:
        make(folder)
        if folder != job.out:
            write_atomic(folder / "recipe.yaml", recipe.to_yaml())
    log = Log(folder) if ranks.main else NoLog()
    try:
        log.track(list(recipe.track), folder, recipe.model_dump(mode="json"))
        begun = shared.cost.so_far() if folder != job.out else _NOTHING
        trained: dict[str, tuple[Trained, State]] = {}
        # The baseline is a module of its own from the same initial weights: what a state_dict does not hold cannot leak into it.
        baseline = replace(student, module=copy.deepcopy(student.module)) if teacher is not None and recipe.baseline else None
        stop.between("the training of the student")
        trained["student"] = _train_role("student", folder, recipe, student, parts.objective(recipe.seed), teacher, shared, log)
        if isinstance(teacher, LiveTeacher):
            teacher.check_untouched()
        if baseline is not None:
            stop.between("the training of the baseline")
            if lender is None:
                trained["baseline"] = _train_role("baseline", folder, recipe, baseline, parts.baseline_objective(), None, shared, log)
            else:
                trained["baseline"] = _lent(lender, folder, baseline, ranks, shared.exact)
            del baseline
        runs = {role: run for role, (run, _) in trained.items()}
        resumed = {**shared.resumed, **{role: run.resumed_from for role, run in runs.items()}}
        steps = [step for found in resumed.values() for step in found]
        stop.between("the evaluation")
        environment = {**shared.environment, "seed": recipe.seed, "resumed_from": steps, "resumed": resumed}
        if ranks.main:
            write_json(folder / "environment.json", environment)

        logits: dict[str, np.ndarray[Any, Any]] = {}
        measured: dict[str, Any] = {}
        if isinstance(teacher, LiveTeacher) or shared.teacher_logits is not None:
            stop.between("the evaluation of the teacher")
            logits["teacher"], measured["teacher"] = _evaluate_teacher(shared)
        for role in ("baseline", "student"):  # the student last: its weights stay in the module
            if role in trained:
                stop.between(f"the evaluation of the {role}")
                student.module.load_state_dict(trained[role][1])
                shared.exact.place(student.module)
                logits[role] = parts.logits(student, data.test, shared.exact)
                if ranks.main:
                    speed = None if lender is None else _speed_of(lender, shared.environment)
                    measured[role] = figures(student, logits[role], data.test.labels, parts.samples(), shared.exact, speed)
        stop.between("the export")
        shared.cost.ask_ranks()
        if not ranks.main:  # the rest is written, which one rank does
            return dict(ranks.from_main(dict))
        exported: dict[str, Any] = {}
        failure: Stopped | None = None
        if recipe.export:
            Engine(torch.device("cpu")).place(student.module)
            shared.progress.say(f"exporting {', '.join(recipe.export)}")
            try:
                exported = export_model(
                    student, list(recipe.export), folder / "export", inputs=parts.parity_inputs(), classes=data.classes, task=recipe.task
                )
            except Stopped as e:  # what was trained and measured is kept and reported; the exit code still says that the export failed
                failure = e
            stop.alone("the report")  # an exporter may have taken the signal for a failure of its own
            shared.exact.place(student.module)
            student.module.load_state_dict(trained["student"][1])
        result = seed_metrics(
            recipe,
            data,
            measured,
            logits,
            runs,
            exported,
            cost=shared.cost.since(begun),
            notes=[*shared.notes, *([f"The export failed: {failure}"] if failure else [])],
        )
        if "baseline" in trained and job.lender is not None:
            result["models"]["baseline"]["from"] = str(job.lender)
        if failure is not None:
            result["export_failure"] = str(failure)  # the run is not finished: a resume tries the export again
        write_json(folder / "analysis.json", analyse(labels=data.test.labels, logits=logits, classes=data.classes, sample=_sampler(data)))
        write_json(folder / "metrics.json", result)
    finally:
        log.close()
    write_report([folder], folder / "report.html")
    if failure is not None:
        raise failure
    discard(folder / "checkpoints")
    return dict(ranks.from_main(lambda: finite(result)))


def _from_main(ranks: Ranks, choose: Callable[[], tuple[Engine, dict[str, Any]]], device: torch.device) -> tuple[Engine, dict[str, Any]]:
    """What the main rank chose by measuring; the others run the same on their own devices."""

    def told() -> list[Any]:
        engine, why = choose()
        return [engine.precision, engine.layout, why]

    precision, layout, why = ranks.from_main(told)
    return Engine(device, precision, layout), why


def _recorded(job: Job, facts: dict[str, Any]) -> tuple[Recipe, dict[str, Any]] | None:
    """What a run to be resumed has recorded, as the main rank finds it."""
    if job.ranks.size == 1:
        return matches(job.out, job.recipe, facts)

    def told() -> list[Any] | None:
        found = matches(job.out, job.recipe, facts)
        return None if found is None else [found[0].model_dump(mode="json"), found[1]]

    found = job.ranks.from_main(told)
    return None if found is None else (Recipe.model_validate(found[0]), found[1])


def _speed_of(lender: Path, here: dict[str, Any]) -> dict[str, Any] | None:
    """Latency and throughput of the same architecture on the same machine, which do not depend on the weights; None on another machine."""
    there = read_json(lender / "environment.json")
    if any(there.get(key) != here.get(key) for key in ("device_name", "threads", "platform", "cpu_count")):
        return None
    student = read_json(lender / "metrics.json")["models"]["student"]
    return {name: {**student[name], "from": str(lender)} for name in ("latency_ms", "throughput")}


def _lent(lender: Path, folder: Path, baseline: Model, ranks: Ranks, engine: Engine) -> tuple[Trained, State]:
    """The baseline that another run trained, as ``folder/baseline``."""
    if ranks.main:
        load_into(baseline.module, lender / "baseline", "baseline")
    engine.place(baseline.module)
    for tensor in baseline.module.state_dict().values():
        ranks.broadcast(tensor)
    if ranks.main and not (folder / "baseline").is_dir():
        with tempfile.TemporaryDirectory(prefix=".copy.", suffix=".tmp", dir=folder) as temporary:
            shutil.copytree(lender / "baseline", Path(temporary) / "baseline")
            commit_folder(Path(temporary) / "baseline", folder / "baseline")
    return Trained(0, 0.0, 0), snapshot(baseline.module)


def _train_role(
    role: str, folder: Path, recipe: Recipe, student: Model, objective: Objective, teacher: Teacher | None, shared: _Shared, log: Log
) -> tuple[Trained, State]:
    """Train one role from the weights in the module, or take what an earlier attempt finished. The result is committed as ``folder/role``."""
    parts, choices = shared.parts, shared.environment["choices"]
    how = {"workers": choices["workers"]["value"], "pin_memory": choices["pin_memory"]["value"]}
    if role == "baseline":
        feed = parts.baseline_feed(recipe, **how)
    else:
        feed = parts.feed(recipe, with_teacher=teacher is not None, ask=isinstance(teacher, LiveTeacher), **how)
    validate = parts.validation(student, shared.engine)
    recorder = Recorder(role, folder / "checkpoints" / role, log, shared.progress, shared.stop, validate, shared.cost.keep_all)
    with shared.stop.steps():
        return _fit_once(folder / role, student, teacher, objective, feed, shared.engine, recipe, recorder, parts.data.classes, parts.ranks)


def _fit_once(
    final: Path,
    student: Model,
    teacher: Teacher | None,
    objective: Objective,
    feed: Feed,
    engine: Engine,
    recipe: Recipe,
    recorder: Recorder,
    classes: tuple[str, ...],
    ranks: Ranks,
) -> tuple[Trained, State]:
    """Fit, unless ``final`` stands and its last state is on record; commit the model as ``final``."""
    done = recorder.checkpoints.with_name(f"{recorder.checkpoints.name}-done")
    found = checkpoint.from_main(ranks, lambda: checkpoint.load_newest(done, recorder.progress.say))
    if found is not None:
        engine.place(student.module)
        student.module.load_state_dict(found[1]["student"])
        trained, state = Trained(**found[1]["done"]), found[1]["student"]
    else:
        trained = fit(student, teacher, objective, feed, engine, recipe.train, recipe.seed, recorder, ranks)
        for buffer in student.module.buffers():  # batch statistics are each rank's own; those of the main rank are what is saved
            ranks.broadcast(buffer)
        state = snapshot(student.module)
        if ranks.main:
            checkpoint.save(done, trained.steps, {"student": state, "done": vars(trained)})
    if ranks.main and not final.is_dir():
        save_model(student, final, classes)
    return trained, state


def teacher_of(job: Job, build: Callable[[bool], Model]) -> tuple[Model, np.ndarray[Any, Any] | None, bool]:
    """The teacher, its output for each class of the data, and whether it has to be trained first."""
    spec = job.recipe.teacher
    training = spec.train if spec is not None else None
    if training is None or training.if_needed:
        try:
            teacher = build(False)
            return teacher, class_map(teacher, job.data), False
        except UsageError:
            if training is None:
                raise
    return build(True), None, True


def _train_teacher(job: Job, teacher: Model, device: torch.device, progress: Progress, stop: Stop, cost: _Cost) -> tuple[Model, list[int]]:
    """Fine-tune the teacher on the labelled rows with cross entropy (``teacher.train``); committed as ``out/teacher``, once for all seeds.

    Returns it, and the steps from which its training was resumed.
    """
    assert job.recipe.teacher is not None
    assert job.recipe.teacher.train is not None
    given = job.recipe.teacher.train.model_dump(exclude_none=True, exclude={"if_needed"})
    recipe = job.recipe.model_copy(update={"train": job.recipe.train.model_copy(update={**given, "ema": None, "select": "last"})})
    progress.say(f"The teacher is trained first, on the labelled data: {recipe.train.epochs} epochs.")
    ranks = job.ranks
    own = Parts(recipe, job.data, teacher.preprocessing, None, batch_statistics=_has_batch_statistics(teacher), ranks=ranks)
    objective = own.baseline_objective()
    choice_file = job.out / "checkpoints" / "teacher.json"

    def choice() -> tuple[Engine, dict[str, Any]]:
        if choice_file.is_file():
            return Engine(device, **read_json(choice_file)), {}
        batch = own.first_batch(recipe, with_teacher=False)
        engine, _ = student_choice(teacher, None, objective, batch, device, recipe.train, recipe.seed)
        make(choice_file.parent)
        write_json(choice_file, {"precision": engine.precision, "layout": engine.layout})
        return engine, {}

    engine, _ = _from_main(ranks, choice, device)
    workers, _ = ranks.from_main(lambda: choose_workers(recipe.train.workers, job.data.train, own.augment, ranks.local_size))
    log = Log(job.out) if ranks.main else NoLog()
    try:
        validate = own.validation(teacher, engine)
        recorder = Recorder("teacher", job.out / "checkpoints" / "teacher", log, progress, stop, validate, cost.keep_all)
        feed = own.feed(recipe, with_teacher=False, workers=workers, pin_memory=device.type == "cuda")
        with stop.steps():
            trained, _ = _fit_once(job.out / "teacher", teacher, None, objective, feed, engine, recipe, recorder, job.data.classes, ranks)
        stop.between("the training of the student")
    finally:
        log.close()
    teacher.weights_sha256 = state_hash(teacher.module)
    teacher.classes = job.data.classes
    return teacher, trained.resumed_from


def _evaluate_teacher(shared: _Shared) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """The teacher on the test split, in full precision, once for all seeds; then it goes back to how it teaches."""
    teacher, parts = shared.teacher, shared.parts
    if shared.teacher_logits is None:
        assert isinstance(teacher, LiveTeacher)
        with teacher.placed(shared.exact):
            start = time.perf_counter()
            logits = parts.logits(teacher.model, parts.data.test, shared.exact)
            teacher.meter.add(time.perf_counter() - start, shared.exact.device)
            shared.teacher_logits = teacher.in_data_order(logits)
            if parts.ranks.main:
                samples = parts.samples(teacher.model.preprocessing)
                shared.teacher_figures = figures(teacher.model, shared.teacher_logits, parts.data.test.labels, samples, shared.exact)
        teacher.check_untouched()
    return shared.teacher_logits, shared.teacher_figures


def _many_seeds(job: Job, recipe: Recipe, shared: _Shared) -> dict[str, Any]:
    """Children ``seed-0`` ...; the parent holds the joint metrics and report, and the student that is best on validation."""
    results, children = [], []
    for seed in range(recipe.seed, recipe.seed + job.seeds):
        shared.stop.between(f"seed {seed}")
        child = job.out / f"seed-{seed}"
        children.append(child)
        done = job.ranks.from_main(partial(finished_metrics, child))
        if done is not None:
            results.append(done)
            continue
        shared.progress.say(f"seed {seed}")
        own = recipe.model_copy(update={"seed": seed})
        results.append(_one_seed(job, child, own, job.build_student(seed), shared))
    if not job.ranks.main:
        return dict(job.ranks.from_main(dict))
    result, best = joint_metrics(results)
    result["cost"] |= shared.cost.so_far()
    for name in ("student", "baseline", "export"):
        if (children[best] / name).is_dir():
            with tempfile.TemporaryDirectory(prefix=".copy.", suffix=".tmp", dir=job.out) as temporary:
                shutil.copytree(children[best] / name, Path(temporary) / name)
                commit_folder(Path(temporary) / name, job.out / name)
    write_atomic(job.out / "analysis.json", (children[best] / "analysis.json").read_bytes())
    join_logs(job.out, children[best])
    resumed = [step for child in children for step in read_json(child / "environment.json")["resumed_from"]]
    about = {"seed": recipe.seed, "best_seed": recipe.seed + best, "resumed_from": resumed}
    write_json(job.out / "environment.json", {**shared.environment, **about})
    write_json(job.out / "metrics.json", result)
    write_report([job.out], job.out / "report.html")
    discard(job.out / "checkpoints")
    return dict(job.ranks.from_main(lambda: finite(result)))


def _check_models(recipe: Recipe, student: Model, teacher: Model | None) -> None:
    """What a recipe asks of the models is there, before anything is computed: every layer that a term names, batches that norms can take."""
    of_student, of_teacher = needs_of(recipe.objective)
    problems: list[Problem] = []
    for model, needs, side in ((student, of_student, "student"), (teacher, of_teacher, "teacher")):
        if model is None:
            continue
        try:
            validate_paths(model.module, needs.features, f"objective ({side} layer)")
        except UsageError as e:
            problems += e.problems
    if _has_batch_statistics(student) and recipe.train.batch_size == 1:
        text = "got 1, and the student has batch statistics, which cannot be taken of one sample; expected at least 2."
        problems.append(Problem("train.batch_size", text))
    if problems:
        raise UsageError(problems)


def _has_batch_statistics(model: Model) -> bool:
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.module.modules())


def _summary(data: Data, begun: Begun) -> str:
    """One line on what is about to be trained on what."""
    labelled = int((data.train.labels >= 0).sum())
    rows = f"{len(data.train):,} training rows" + (f" ({labelled:,} labelled)" if labelled < len(data.train) else "")
    names = ", ".join(data.classes[:6]) + (", ..." if len(data.classes) > 6 else "")
    sizes = [f"{role} {count:,}" for role, count in _parameters(begun).items()]
    return (
        f"{rows}, {len(data.valid):,} for validation, {len(data.test):,} for test; {len(data.classes)} classes ({names}); "
        f"parameters: {', '.join(sizes)}."
    )


def _parameters(begun: Begun) -> dict[str, int]:
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


def _where(engines: dict[str, Engine], device: torch.device, ranks: Ranks) -> dict[str, Any]:
    student = engines["student"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "world_size": ranks.size,
        "precision": student.precision,
        "layout": student.layout,
        "teacher_precision": engines["teacher"].precision if "teacher" in engines else None,
        "teacher_layout": engines["teacher"].layout if "teacher" in engines else None,
    }


def _sampler(data: Data) -> Callable[[int], dict[str, Any]]:
    """What the report shows of one test sample."""
    if data.kind == "image":
        return lambda index: {"png": thumbnail(data.test, index)}
    if data.kind == "text":
        return lambda index: {"text": text_of(data.test, index)}
    return lambda index: {"text": f"test sample {index}"}


def _run_name(recipe: Recipe, command: str) -> str:
    """``student-data``, of characters that every file system takes."""
    student = recipe.student.model.rstrip("/").split("/")[-1].split(":")[-1]
    source = recipe.data.source.rstrip("/").split("/")[-1].split(":")[-1].split(".")[0]
    name = f"{command}-{student}-{source}"
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
