"""The spine: recipe -> data -> teacher -> student -> objective -> fit -> evaluate -> export -> report."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck._asking import VERIFIED, engine_of_teacher, keep_answers
from limbeck._begin import Begun, Job, agree, begin, job_of, jobs_of, keep, summary
from limbeck._choices import explicit, resolved, snapshot
from limbeck._exact import exact
from limbeck._folder import (
    Stop,
    already,
    begun_seeds,
    bring_up,
    finished_metrics,
    goes_on,
    launched_by,
    make,
    matches,
    next_free,
    own_folder,
    read_recipe,
    refuse_taken,
)
from limbeck._microbatch import copies_of, how_to_train
from limbeck._parts import Parts
from limbeck._planner import make_plan
from limbeck._results import figures, joint_metrics, measures, seed_metrics
from limbeck._roles import NOTHING, Cost, Shared, State, Told, engine_from_main, train_role, train_teacher
from limbeck.analysis import analyse
from limbeck.cache import CachedTeacher, TableTeacher, tidy
from limbeck.data import SKIPPED, Data, choose_workers, skipped_csv, text_of, thumbnail
from limbeck.engine import Engine
from limbeck.ensemble import Ensemble, Mixing
from limbeck.errors import Interrupted, Problem, Stopped, UsageError
from limbeck.evaluate import agreement, metrics
from limbeck.export import export_model
from limbeck.loop import Trained
from limbeck.models import Model, load_into, load_state, which_blocks
from limbeck.placement import Ahead, Here, asked_in_the_loop, beside, live_of, lives_of, served
from limbeck.progress import Progress
from limbeck.ranks import Ranks, joined, refuse_lost_folder
from limbeck.reading import absolute
from limbeck.recipe import Recipe
from limbeck.report import write_report
from limbeck.run import (
    Log,
    NoLog,
    copy_folder,
    discard,
    finite,
    join_logs,
    provenance,
    read_json,
    write_atomic,
    write_json,
)
from limbeck.teacher import LiveTeacher, Meter, Teacher

__all__ = ["execute", "run_into", "run_recipe"]


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
    metrics_port: str | None = None,
) -> dict[str, Any]:
    """Run a recipe; returns its metrics (``metrics.json``). base: the folder that relative paths of the recipe start from.

    seeds: None is one, or on resume as many as the run was begun with. metrics_port: PORT or HOST:PORT, where training is told as Prometheus text.
    """
    with joined(recipe.teacher_ranks) as ranks:
        if out is None:
            refuse_lost_folder()
        out = out or Path(ranks.from_main(lambda: str(next_free(Path("runs"), _run_name(recipe, command)))))
        resume = goes_on(out, resume, ranks)
        if ranks.main:
            refuse_taken(out, resume)
        how: dict[str, Any] = {"progress": progress, "dry_run": dry_run, "verify_cache": verify_cache, "metrics_port": metrics_port}
        return run_into(recipe, base=base, out=out, resume=resume, seeds=seeds, **how)


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
    metrics_port: str | None = None,
) -> dict[str, Any]:
    """:func:`run_recipe` into a folder that the caller has judged."""
    recipe = absolute(recipe, base)
    with joined(recipe.teacher_ranks) as ranks, Progress(progress if ranks.main else "none", metrics_port if ranks.main else None) as shown:
        count = int(ranks.from_main(lambda: seeds or begun_seeds(out)))
        done = ranks.from_main(lambda: already(out, recipe, count))
        if done is not None:
            shown.say(f"{out} is finished; nothing is left to do.")
            return dict(done)
        job = job_of(recipe, base, out, resume=resume, seeds=count, verify_cache=verify_cache)
        return execute(replace(job, ranks=ranks), shown, dry_run=dry_run)


def execute(job: Job, progress: Progress, *, dry_run: bool = False, begun: Begun | None = None) -> dict[str, Any]:
    """The spine. Everything that can be wrong is found before the first file is written. begun: what :func:`begin` made of this job already."""
    recipe, data, ranks, started = job.recipe, job.data, job.ranks, time.perf_counter()
    if dry_run and ranks.size > 1:
        text = f"measures what one process takes, and {ranks.size} were started."
        raise UsageError(Problem("--dry-run", text, "Start it without a launcher."))
    if dry_run and len(recipe.teachers) > 1:
        text = f"plans a run of one teacher, and the recipe has {len(recipe.teachers)}."
        raise UsageError(
            Problem("--dry-run", text, "Plan it with each of them alone: their answers are asked and kept one after the other.")
        )
    begun = begun or begin(replace(job, plan=dry_run))
    recipe = begun.settled(recipe)
    job = replace(job, recipe=recipe)
    agree(job, begun)
    recorded = _recorded(job, begun.facts)
    if ranks.size - ranks.teachers > 1 and not begun.objective.per_item:
        gathered = "The objective compares the items of a batch: for each microbatch those of all ranks are gathered."
        own = "A projection has batch statistics: on several ranks each takes them of its own share of a step."
        begun.notes.append(gathered if begun.objective.relational else own)
    for note in [*begun.notes, summary(data, begun)]:
        progress.say(note)
    devices = {begun.device, *(one.teacher_device for one in begun.taught)}
    if dry_run:
        with exact(devices, recipe.train.deterministic, progress.say):
            return make_plan(job, begun, recorded[0] if recorded is not None and "choices" in recorded[1] else recipe, progress)

    stop = Stop(ranks)
    resumed: dict[str, list[int]] = {}
    loaded = [one.model.module for one in begun.taught if one.model is not None]
    meter = Meter(*loaded) if loaded else None
    folder = own_folder(job.out, job.resume and recorded is not None) if ranks.main else nullcontext()
    with stop.listening(), folder, exact(devices, recipe.train.deterministic, progress.say):
        cost = Cost(job.out / "checkpoints" / "cost.json", meter, started, ranks)
        if recorded is None and ranks.main:
            # The recipe last: it marks a run as begun, and what a resume compares (and how many seeds there are) has to be known then.
            write_json(job.out / "environment.json", {"facts": begun.facts, **launched_by()})
            if data.skipped:
                write_atomic(job.out / SKIPPED, skipped_csv(data))
            write_atomic(job.out / "recipe.yaml", recipe.to_yaml())
        for one, alone in zip(begun.taught, jobs_of(job), strict=True):
            if one.model is None or not one.to_train:
                continue
            # several ranks train it together, each on a device of its own
            where = one.teacher_device if ranks.size == 1 else one.device
            one.model, resumed[alone.role] = train_teacher(alone, one.model, where, progress, stop, cost)
            one.columns = None
            if one.answers is not None:
                before = len(one.notes)
                keep(one, None)
                for note in one.notes[before:]:
                    progress.say(note)
                    if begun.members:
                        begun.notes.append(note)
        begun.prepare()
        environment = recorded[1] if recorded is not None else {}
        known = "choices" in environment

        def between() -> None:
            cost.keep()
            stop.alone("the next part of the teacher's answers")

        asked = recorded[0] if recorded is not None and known else recipe
        begun.parts.ranks = ranks.own  # what is evaluated from here on is evaluated by those who hold it
        each: list[Teacher] = []
        chosen: list[tuple[Engine, dict[str, Any]] | None] = []
        try:
            for one, alone in zip(begun.taught, jobs_of(replace(job, recipe=asked)), strict=True):
                one.parts.ranks = ranks.own
                at_work, how = _teacher_at_work(alone, one, meter, progress, between)
                each.append(at_work)
                chosen.append(how)
        except Interrupted:
            cost.keep()  # of the part that was not finished too
            raise
        mixing = Mixing.of(recipe) if len(each) > 1 else None
        teacher = each[0] if len(each) == 1 else None if mixing is None else Ensemble(each, mixing, begun.device)
        cost.cached = [one for one in each if isinstance(one, CachedTeacher | TableTeacher)]
        shared = Shared(begun.parts, Engine(begun.device), teacher, begun.notes, environment, progress, stop, cost, resumed, ranks)
        shared.mixing = mixing
        shared.told = [_teacher_on_record(one, shared) for one in begun.taught]
        if meter is not None and not asked_in_the_loop(teacher):
            meter.close()
        if recorded is None or not known:
            engine, why = engine_from_main(ranks, partial(_student_choice, job, begun, teacher, progress), begun.device)
            engines = [None if how is None else how[0] for how in chosen]
            workers, reason = ranks.from_main(
                lambda: choose_workers(job.recipe.train.workers, data.train, begun.parts.augment, ranks.local_size)
            )
            seat = begun.seat
            place = "same" if seat is None else seat.placement
            recipe = resolved(recipe, engine, engines, workers, why["accumulate"]["value"], placement=place, several=ranks.size > 1)
            device = begun.device.type
            record = {
                **_teacher_choices(begun.taught, chosen),
                **({} if seat is None else {"teacher_placement": {"value": seat.placement, "reason": seat.reason}}),
                **why,
                "workers": {"value": workers, "reason": reason},
                "pin_memory": {"value": device == "cuda", "reason": f"the device is {device}"},
                **({"deterministic": {"value": recipe.train.deterministic, "reason": "the device is cuda"}} if device == "cuda" else {}),
                **_blocks(begun.student, recipe),
            }
            environment = {
                **provenance(),
                **_where(engine, engines, begun.device, ranks),
                "choices": record,
                "facts": begun.facts,
                **launched_by(),
            }
            if ranks.main:
                # The recipe first: choices that stand in the environment are taken from the recipe on resume.
                write_atomic(job.out / "recipe.yaml", recipe.to_yaml())
                write_json(job.out / "environment.json", environment)
        else:
            recipe = recorded[0]
            if ranks.main and recipe.train.deterministic != read_recipe(job.out).train.deterministic:
                write_atomic(job.out / "recipe.yaml", recipe.to_yaml())
            engine = explicit(recipe, begun.device)
            environment = {**environment, "world_size": ranks.size, "threads": torch.get_num_threads()}
        begun.parts.recipe = recipe
        if isinstance(teacher, Ahead) and teacher.live is None:
            begun.model = None  # it was looked at; it teaches elsewhere
        shared.engine, shared.environment = engine, environment
        result = _many_seeds(job, recipe, shared) if job.seeds > 1 else _one_seed(job, job.out, recipe, begun.student, shared)
    if meter is not None:
        meter.close()
    progress.say(result["verdict"])
    progress.say(f"Report: {job.out / 'report.html'}")
    return result


def _teacher_choices(taught: Sequence[Begun], chosen: Sequence[tuple[Engine, dict[str, Any]] | None]) -> dict[str, Any]:
    """How each teacher was found to run, and whether its answers are kept, for the record."""
    record: dict[str, Any] = {}
    for number, (one, how) in enumerate(zip(taught, chosen, strict=True)):
        if how is not None:
            suffix = f"-{number}" if len(taught) > 1 else ""
            record |= {f"teacher{suffix}": how[1], f"teacher_cache{suffix}": dict(zip(("kept", "reason"), one.cached, strict=True))}
    return record


def _teacher_at_work(
    job: Job, begun: Begun, meter: Meter | None, progress: Progress, between: Callable[[], None]
) -> tuple[Teacher, tuple[Engine, dict[str, Any]] | None]:
    """A teacher of the loop, and how it runs (or ran, when it was asked) and why. Fills what its cache lacks. job, begun: as if it were the only
    one."""
    recipe = job.recipe
    device, model, answers, ranks = begun.teacher_device, begun.model, begun.answers, job.ranks
    if begun.table is not None:
        return begun.table, None

    def choice() -> tuple[Engine, dict[str, Any]]:
        assert model is not None
        batch = begun.parts.first_batch(recipe, with_teacher=True, ask=True)
        return engine_of_teacher(recipe, model, batch, device)

    if answers is None:
        assert model is not None
        engine, why = engine_from_main(ranks, choice, device, ranks.size - ranks.teachers if ranks.teachers else 0)
        if ranks.teachers and not ranks.teaching:
            return served(ranks, begun.device, {"weights_sha256": model.weights_sha256}), (engine, why)
        live = LiveTeacher(model, engine, begun.columns, meter)
        ahead = begun.seat is not None and begun.seat.ahead
        return beside(live, Engine(begun.device, recipe.train.precision)) if ahead else live, (engine, why)
    if model is not None and begun.found is not None and meter is not None:
        again = job.compared.issuperset(answers.folders.values())
        verify = job.verify_cache if job.verify_cache is not None else 0 if again else VERIFIED
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
            ranks=ranks,
        )
        job.compared.update(answers.folders.values())
    else:
        why = {"measured": [], "reason": "as its answers were given"}
    for folder in answers.folders.values() if ranks.main else ():
        with suppress(OSError, UsageError):  # of a folder that this process may only read, all that it needs is there
            tidy(folder)
    teacher = answers.teacher(begun.columns, begun.device)
    made = teacher.reader.manifest.made
    return teacher, (Engine(device, made["precision"], made["layout"]), why)


def _student_choice(job: Job, begun: Begun, teacher: Teacher | None, progress: Progress) -> tuple[Engine, dict[str, Any]]:
    """How the student trains, and why: as in the run that lends the baseline, so that both train alike; else as given or measured.

    The records of environment.json under ``student`` and, where it was looked for, ``accumulate``.
    """
    recipe, lender = job.recipe, job.lender
    given, train = "given in the recipe", recipe.train
    if lender is not None and "auto" in (train.precision, train.accumulate):
        lent, told = read_recipe(lender), f"as measured in {lender.name}"
        cut = {"value": lent.train.accumulate, "reason": told if train.accumulate == "auto" else given}
        why = {"measured": [], "reason": told if train.precision == "auto" else given}
        return explicit(lent, begun.device), {"student": why, "accumulate": cut}
    engine, accumulate, why_so, cut_so = how_to_train(
        recipe,
        begun.student,
        _to_measure_with(begun, teacher),
        begun.objective.at(begun.parts.measured),
        begun.parts,
        begun.device,
        progress,
        copies=copies_of(recipe, begun.device),
        ask=asked_in_the_loop(teacher),
    )
    return engine, {"student": why_so, "accumulate": {"value": accumulate, "reason": given, **(cut_so or {})}}


def _to_measure_with(begun: Begun, teacher: Teacher | None) -> Teacher | None:
    """A teacher that answers at once: its copy in this process, that was looked at, where it sits on other ranks."""
    if not asked_in_the_loop(teacher):
        return teacher
    if isinstance(teacher, Ensemble):  # beside the student
        return teacher
    live = live_of(teacher)
    if live is None:
        assert begun.model is not None
        live = LiveTeacher(begun.model, Engine(torch.device("cpu")), begun.columns)
    return Here(live, begun.device, begun.seat)


def _blocks(student: Model, recipe: Recipe) -> dict[str, Any]:
    """The record of the blocks that are computed again, where some are."""
    found = which_blocks(student.module, recipe.train.gradient_checkpointing)
    return {"gradient_checkpointing": {"value": list(found.names), "reason": found.reason}} if found.names else {}


def _teacher_on_record(begun: Begun, shared: Shared) -> Told | None:
    """A teacher's logits and figures on the test split, from its cache or file; None where there are none, or it is asked in the loop. One that is
    loaded to fill its cache is measured, and then let go."""
    labels, parts = begun.parts.data.test.labels, begun.parts
    if begun.table is not None:
        if begun.table.test is None:
            return None
        logits = begun.table.test if begun.columns is None else begun.table.test[:, begun.columns]
        return logits, {"metrics": metrics(logits, labels), **_UNMEASURED, "from": str(begun.table.path)}
    if begun.answers is None:
        return None
    logits, model = begun.answers.test_logits(begun.columns), begun.model
    found = metrics(logits, labels)
    kept = begun.answers.figures(begun.device)
    if model is None or parts.ranks.from_main(lambda: kept["latency_ms"] is not None):
        begun.model = None
        return logits, {"metrics": found, **kept}
    shared.stop.between("the teacher is measured")
    measured: dict[str, Any] = {}
    if parts.ranks.main:
        exact = replace(shared.exact, device=begun.teacher_device)
        exact.place(model.module)
        measured = measures(model, parts.samples(model.preprocessing), exact)
        begun.answers.keep_figures(measured, exact.device)
        if exact.device.type != begun.device.type:
            measured |= _ELSEWHERE
    begun.model = None
    return logits, {"metrics": found, **measured}


_ELSEWHERE: dict[str, Any] = {"latency_ms": None, "throughput": None}
"""A speed on a device of another kind cannot be compared with the student's."""
_UNMEASURED: dict[str, Any] = {"parameters": None, "bytes": None, "flops": None, "latency_ms": None, "throughput": None}


def _one_seed(job: Job, folder: Path, recipe: Recipe, student: Model, shared: Shared) -> dict[str, Any]:
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
        begun = shared.cost.so_far() if folder != job.out else NOTHING
        trained: dict[str, tuple[Trained, State]] = {}
        # The baseline is a module of its own from the same initial weights: what a state_dict does not hold cannot leak into it.
        baseline = replace(student, module=copy.deepcopy(student.module)) if recipe.baseline else None
        stop.between("the training of the student")
        objective = parts.objective(recipe.seed, student)
        trained["student"] = train_role("student", folder, recipe, student, objective, teacher, shared, log)
        peers = objective.peers()
        del objective
        for live in lives_of(teacher):
            live.check_untouched()
        if baseline is not None:
            stop.between("the training of the baseline")
            if lender is None:
                trained["baseline"] = train_role("baseline", folder, recipe, baseline, parts.baseline_objective(), None, shared, log)
            else:
                trained["baseline"] = (
                    (Trained(0, 0.0, 0), {}) if ranks.teaching else _lent(lender, folder, baseline, ranks.own, shared.exact)
                )
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
        if shared.teacher is not None and (asked_in_the_loop(teacher) or None not in shared.told):
            stop.between("the evaluation of the teacher")
            told = _evaluate_teacher(shared)
            if told is not None:
                logits["teacher"], measured["teacher"] = told
        for role in ("baseline", "student"):  # the student last: its weights stay in the module
            if role in trained:
                stop.between(f"the evaluation of the {role}")
                if ranks.teaching:
                    continue
                load_state(student.module, trained[role][1])
                shared.exact.place(student.module)
                logits[role] = parts.logits(student, data.test, shared.exact)
                if ranks.main:
                    speed = None if lender is None else _speed_of(lender, shared.environment)
                    measured[role] = figures(student, logits[role], data.test.labels, parts.samples(), shared.exact, speed)
        for peer, spec in zip(peers, recipe.student.peers if peers else (), strict=True):
            stop.between("the evaluation of the peers")
            if not ranks.teaching:
                found = _evaluate_peer(peer, spec.model, logits.get("teacher"), shared)
                if ranks.main:
                    measured["student"].setdefault("peers", []).append(found)
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
            load_state(student.module, trained["student"][1])
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
        copy_folder(lender / "baseline", folder / "baseline")
    return Trained(0, 0.0, 0), snapshot(baseline.module)


def _evaluate_peer(peer: Model, name: str, teacher: np.ndarray[Any, Any] | None, shared: Shared) -> dict[str, Any]:
    """What learned beside the student, on the test split; the figures on the main rank alone. teacher: its logits, where there is one."""
    parts = shared.parts
    shared.exact.place(peer.module)
    logits = parts.logits(peer, parts.data.test, shared.exact)
    if not shared.ranks.main:
        return {}
    found = {"model": name, **figures(peer, logits, parts.data.test.labels, parts.samples(), shared.exact)}
    return found if teacher is None else {**found, "agreement": agreement(logits, teacher)}


def _evaluate_teacher(shared: Shared) -> Told | None:
    """The teacher on the test split, in full precision, once for all seeds, by those who hold it; then it goes back to how it teaches. Several are
    evaluated one by one, and as what they say together; None where one of them has no answers for the test split."""
    parts, ranks = shared.parts, shared.ranks
    each = shared.teacher.members if isinstance(shared.teacher, Ensemble) else [shared.teacher]
    for number, (teacher, known) in enumerate(zip(each, shared.told, strict=True)):
        if known is not None:
            continue
        live = live_of(teacher)
        shared.told[number] = told = None if live is None else _evaluate_live(live, parts, shared.exact)
        if ranks.teachers:
            shared.told[number] = _told_by_teachers(ranks, *(told or (None, {})))
    told_by = [told for told in shared.told if told is not None]
    if len(told_by) < len(each):
        return None
    if shared.mixing is None:
        return told_by[0]
    logits = shared.mixing.at_one()([torch.from_numpy(own) for own, _ in told_by]).numpy()
    figures = [own for _, own in told_by]
    together = {name: _sum([own.get(name) for own in figures]) for name in ("parameters", "bytes", "flops")}
    members = [{"model": spec.model, **own} for spec, own in zip(parts.recipe.teachers, figures, strict=True)]
    return logits, {**_UNMEASURED, "metrics": metrics(logits, parts.data.test.labels), **together, "members": members}


def _sum(values: Sequence[float | None]) -> float | None:
    """Unknown where one of them is."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _evaluate_live(teacher: LiveTeacher, parts: Parts, engine: Engine) -> Told:
    """A teacher that this process holds, on its own device."""
    exact = replace(engine, device=teacher.engine.device)
    found: dict[str, Any] = {}
    with teacher.placed(exact):
        start = time.perf_counter()
        raw = parts.logits(teacher.model, parts.data.test, exact)
        teacher.meter.add(time.perf_counter() - start, exact.device)
        logits = teacher.in_data_order(raw)
        if parts.ranks.main:
            found = figures(teacher.model, logits, parts.data.test.labels, parts.samples(teacher.model.preprocessing), exact)
            if exact.device.type != engine.device.type:
                found |= _ELSEWHERE
    teacher.check_untouched()
    return logits, found


def _told_by_teachers(ranks: Ranks, logits: np.ndarray[Any, Any] | None, found: dict[str, Any]) -> Told:
    """What the first rank that teaches has measured, on every rank."""
    source = ranks.size - ranks.teachers
    shape, told = ranks.told(lambda: [list(logits.shape) if logits is not None else None, found], source)
    raw = ranks.broadcast_bytes(b"" if logits is None else np.ascontiguousarray(logits).tobytes(), source)
    return np.frombuffer(raw, dtype=np.float64).reshape(shape), dict(told)


def _many_seeds(job: Job, recipe: Recipe, shared: Shared) -> dict[str, Any]:
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
    bring_up(children[best], job.out)
    write_atomic(job.out / "analysis.json", (children[best] / "analysis.json").read_bytes())
    join_logs(job.out, children[best])
    resumed = [step for child in children for step in read_json(child / "environment.json")["resumed_from"]]
    about = {"seed": recipe.seed, "best_seed": recipe.seed + best, "resumed_from": resumed}
    write_json(job.out / "environment.json", {**shared.environment, **about})
    write_json(job.out / "metrics.json", result)
    write_report([job.out], job.out / "report.html")
    discard(job.out / "checkpoints")
    return dict(job.ranks.from_main(lambda: finite(result)))


def _where(student: Engine, teachers: Sequence[Engine | None], device: torch.device, ranks: Ranks) -> dict[str, Any]:
    asked = [engine for engine in teachers if engine is not None]
    ways = {"precision": [engine.precision for engine in asked], "layout": [engine.layout for engine in asked]}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "world_size": ranks.size,
        "precision": student.precision,
        "layout": student.layout,
        **{f"teacher_{what}": None if not each else each[0] if len(teachers) == 1 else each for what, each in ways.items()},
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
