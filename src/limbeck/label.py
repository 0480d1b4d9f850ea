"""limbeck label: fill a teacher's cache ahead of the runs that will read it; by one process, or any number of them at once."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck._asking import VERIFIED, engine_of_teacher, keep_answers
from limbeck._begin import Begun, Job, agree, begin, job_of, jobs_of
from limbeck._exact import exact
from limbeck._folder import Stop
from limbeck.cache import read_manifest, tidy, write_ids
from limbeck.data import load_data
from limbeck.engine import Engine
from limbeck.errors import Problem, UsageError
from limbeck.progress import Progress
from limbeck.ranks import joined
from limbeck.reading import absolute
from limbeck.recipe import Recipe
from limbeck.teacher import Meter

__all__ = ["ids_of", "label", "label_job"]


def label(recipe: Recipe, *, base: Path, progress: str = "auto", dry_run: bool = False, verify_cache: int | None = None) -> dict[str, Any]:
    """Ask the teacher of a recipe for every answer that a run of it would want, and keep them. What is there already is not asked again.

    Returns where they are, how many, and what it took. Raises: UsageError; Interrupted after a signal, with everything finished kept.
    """
    with joined() as ranks, Progress(progress if ranks.main else "none") as shown:
        recipe = absolute(recipe, base)
        if recipe.teacher_cache.mode == "off" or recipe.teacher_cache.views == "live":
            text = "asks the teacher in every step, so there is nothing to fill."
            key = "mode" if recipe.teacher_cache.mode == "off" else "views"
            raise UsageError(Problem(f"teacher_cache.{key}", text, "Leave it out."))
        if recipe.teacher_cache.mode == "require":  # of the runs that will read what is filled here
            recipe = recipe.model_copy(update={"teacher_cache": recipe.teacher_cache.model_copy(update={"mode": "auto"})})
        job = replace(job_of(recipe, base, Path(), verify_cache=verify_cache), ranks=ranks)
        return label_job(job, shown, dry_run=dry_run)


def ids_of(recipe: Recipe, base: Path, file: Path) -> int:
    """Write ``split,row,id,label`` of every sample of a recipe's data to a CSV file; returns how many there are."""
    return write_ids(load_data(absolute(recipe, base).data, recipe.task, base), file)


def label_job(job: Job, progress: Progress, *, dry_run: bool = False) -> dict[str, Any]:
    """:func:`label` of a job; of several teachers one after the other."""
    started = time.perf_counter()
    begun = begin(job, label=True)
    job = replace(job, recipe=begun.settled(job.recipe))
    agree(job, begun)
    jobs = jobs_of(job)
    for one, alone in zip(begun.taught, jobs, strict=True):
        if one.to_train:
            text = "has to be trained on this data first, which `limbeck distill` does."
            raise UsageError(Problem(alone.role.replace("-", "."), text, "Train it with `limbeck train`, and name it as run:DIR."))
        if one.answers is None and one.table is None:  # the disk would not hold them
            raise UsageError(Problem("teacher_cache", one.cached[1], "Name another path, take fewer views, or codec: sparse."))
    if all(one.table is not None for one in begun.taught):
        raise UsageError(Problem("teacher", "is a file of answers already, so there is nothing to fill.", "Distil from it."))
    for note in begun.notes:
        progress.say(note)
    asked = [(alone, one) for one, alone in zip(begun.taught, jobs, strict=True) if one.table is None]
    filled = [_filled(alone, one, progress, dry_run) for alone, one in asked]
    sums: dict[str, Any] = {name: sum(one[name] for one in filled) for name in ("asked", "bytes", "teacher_seconds")}
    result = {**(filled[0] if len(jobs) == 1 else {"teachers": filled, **sums}), "total_seconds": time.perf_counter() - started}
    if not dry_run:
        rows = sum(sum(one["rows"].values()) for one in filled)
        root = next(one.answers.root for _, one in asked if one.answers is not None)
        progress.say(f"All {rows:,} answers are in {root} ({result['bytes']:,} bytes).")
    return result


def _filled(job: Job, begun: Begun, progress: Progress, dry_run: bool) -> dict[str, Any]:
    """What one teacher has answered, after asking it for what is missing."""
    answers = begun.answers
    assert answers is not None
    asked = sum(answers.lacking(purpose) for purpose in answers.folders) if begun.model is not None else 0
    model, seconds = begun.model, 0.0
    if model is not None and begun.found is not None and not dry_run:
        meter, stop = Meter(model.module), Stop()

        def choice() -> tuple[Engine, dict[str, Any]]:
            batch = begun.parts.first_batch(job.recipe, with_teacher=True, ask=True)
            return engine_of_teacher(job.recipe, model, batch, begun.device)

        with stop.listening(), exact([begun.teacher_device], job.recipe.train.deterministic, progress.say):
            keep_answers(
                answers,
                begun.found,
                model,
                begun.device,
                meter,
                progress,
                lambda: stop.alone("the next part of the teacher's answers"),
                verify=VERIFIED if job.verify_cache is None else job.verify_cache,
                chosen=choice,
                ranks=job.ranks,
            )
        meter.close()
        seconds = meter.seconds or 0.0
    if not dry_run:
        for folder in answers.folders.values():
            tidy(folder)
    return {
        "cache": {purpose: str(folder) for purpose, folder in answers.folders.items()},
        "rows": {purpose: answers.rows(purpose) for purpose in answers.folders},
        "asked": asked,
        "bytes": sum(read_manifest(f).size for f in answers.folders.values() if (f / "manifest.json").exists()),
        "teacher_seconds": seconds,
    }
