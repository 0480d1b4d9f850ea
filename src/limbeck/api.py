"""The Python call: anyone's own modules and tensors through the same spine as the command line."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from limbeck._begin import Job, TeacherSource, peers_of, seed_of_teacher
from limbeck._folder import already, goes_on, next_free, refuse_taken
from limbeck.data import Data, data_from_python, load_data
from limbeck.errors import Problem, UsageError
from limbeck.losses import LOSSES
from limbeck.models import Model, build_model, call_factory, load_into, load_saved, sources, state_hash, wrap_module
from limbeck.progress import Progress
from limbeck.ranks import joined, refuse_lost_folder
from limbeck.reading import RecipeError, absolute, build_recipe, default_objective
from limbeck.recipe import ModelSpec, Recipe, TeacherSpec
from limbeck.run import read_json
from limbeck.spine import execute

__all__ = ["Result", "distill", "load", "train"]

ModelLike = nn.Module | Callable[[], nn.Module] | str | Path | dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What a run left: its metrics (``metrics.json``), its folder, and the trained student in eval mode."""

    metrics: dict[str, Any]
    folder: Path
    student: nn.Module

    @property
    def verdict(self) -> str:
        return str(self.metrics["verdict"])


def distill(
    *,
    student: ModelLike,
    teacher: ModelLike | Sequence[ModelLike] | None,
    train: Any = None,
    test: Any = None,
    valid: Any = None,
    unlabelled: Any = None,
    data: str | dict[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    task: str | None = None,
    temperature: float | None = None,
    alpha: float | None = None,
    objective: list[dict[str, Any]] | None = None,
    tokenizer: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    seeds: int = 1,
    baseline: bool | None = None,
    export: Sequence[str] = ("onnx",),
    progress: str = "auto",
    **settings: Any,
) -> Result:
    """Distil ``teacher`` into ``student``.

    student, teacher: an ``nn.Module`` (called with one image or tensor batch, or with the tokenizer's names; gives logits ``(B, C)`` or an output
    with ``.logits``), a callable that returns one (for a student drawn anew for each seed), or any model name of a recipe. Modules are copied:
    they come back as they were, and ``Result.student`` is another object. teacher: or a list of several (``ensemble`` says how they are averaged).
    train, test, valid, unlabelled: ``(x, y)`` tensors or arrays (uint8 images NHWC, NCHW or NHW; float tensors as they are; lists of strings or of
    pairs of strings) or a ``torch.utils.data.Dataset`` of ``(x, y)``; or ``data``: a source name or a ``data`` section of a recipe.
    baseline: train the same student without the teacher too (beside a teacher it is done where nothing is said; without one, for losses that teach
    by themselves, where it is True). seeds: how many, from ``seed`` on.
    temperature, alpha: ``alpha * T^2 * KL + (1 - alpha) * cross entropy``, 4 and 0.7 by default; or ``objective``, as in a recipe.
    settings: keys of a recipe's ``train`` section (``epochs``, ``batch_size``, ``lr``, ...), ``data_options`` (keys of its ``data`` section, e.g.
    ``{"augment": "standard"}``), and ``ensemble``, ``teacher_cache`` or ``track`` as in a recipe.
    tokenizer: for text modules that are not Hugging Face folders.

    Raises: UsageError with every problem at once; Stopped for NaN, a full disk or a failed parity; Interrupted after a signal.

    >>> import limbeck, torch
    >>> x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    >>> big, small = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)), torch.nn.Linear(8, 3)
    >>> result = limbeck.distill(teacher=big, student=small, train=(x, y), test=(x, y), epochs=1, export=[], out=getfixture("tmp_path") / "run",
    ...                          progress="none")
    >>> sorted(result.metrics["models"])
    ['baseline', 'student', 'teacher']
    """
    several = isinstance(teacher, list | tuple)
    teachers = cast(list[ModelLike], list(cast(Sequence[ModelLike], teacher)) if several else [] if teacher is None else [teacher])
    stages = [stage for stage in settings.get("stages") or [] if isinstance(stage, Mapping)]
    given = [term for part in (objective, *(stage.get("objective") for stage in stages)) for term in part or []]
    own = [str(term.get("loss")) if isinstance(term, Mapping) else str(term) for term in given]
    problems = list(
        _ignored(
            student,
            teachers,
            {"data": data, "train": train, "test": test, "valid": valid, "unlabelled": unlabelled, "classes": classes},
            {"temperature": temperature, "alpha": alpha, "objective": objective},
            settings.get("data_options") or {},
            tokenizer,
            seeds,
            any(LOSSES[name].self_taught and "labels" not in LOSSES[name].reads for name in own if name in LOSSES),
        )
    )
    terms = objective
    taught = teacher is not None or (bool(baseline) and any(LOSSES[name].self_taught for name in own if name in LOSSES))
    if terms is None and teacher is not None and not (temperature is None and alpha is None):
        terms = default_objective(temperature, alpha)
    train_keys = {k: v for k, v in settings.items() if k not in ("data_options", "ensemble", "teacher_cache", "track")}
    given_options = settings.get("data_options")
    data_options = dict(given_options) if isinstance(given_options, Mapping) else {}
    source: dict[str, Any] = dict(data) if isinstance(data, Mapping) else {"source": "python" if data is None else data}
    plain: dict[str, Any] = {
        "seed": seed,
        "student": _spec(student),
        "data": {**data_options, **source},
        "objective": terms,
        "train": train_keys,
        "export": [export] if isinstance(export, str) else list(export),
        **{k: settings[k] for k in ("ensemble", "teacher_cache", "track") if k in settings},
    }
    if teacher is not None:
        plain["teacher"] = [_spec(one) for one in teachers]
    if taught:
        plain["baseline"] = baseline is not False
    known = task or (_task_of(train, data_options) if data is None else None)
    if known is not None:
        plain["task"] = known
    try:
        recipe = build_recipe(plain, command="distill" if taught else "train", where="limbeck.distill")
    except RecipeError as error:
        raise RecipeError([*problems, *error.problems], error.source) from None
    if tokenizer is not None and recipe.task != "text-classification":
        problems.append(Problem("tokenizer", f"is for texts, and the task is {recipe.task}.", "Leave it out."))
    if baseline and not taught:
        text = "has no effect without a teacher: a training has no baseline beside it."
        problems.append(Problem("baseline", text, "Leave it out, or use limbeck.distill(teacher=...)."))
    if problems:
        raise RecipeError(problems, "limbeck.distill")
    base = Path.cwd()
    recipe = absolute(recipe, base)
    with joined(recipe.teacher_ranks) as ranks, Progress(progress if ranks.main else "none") as shown:
        if out is None:
            refuse_lost_folder()
        folder = Path(out) if out is not None else Path(ranks.from_main(lambda: str(next_free(Path("runs"), f"python-{_name(student)}"))))
        resume = goes_on(folder, resume, ranks)
        if ranks.main:
            refuse_taken(folder, resume)
        loaded = (
            load_data(recipe.data, recipe.task, base)
            if train is None
            else data_from_python(
                task=recipe.task, train=train, test=test, valid=valid, unlabelled=unlabelled, classes=classes, spec=recipe.data
            )
        )
        built: dict[int, Model] = {}  # the last one

        def build_student(seed: int) -> Model:
            built.clear()
            built[seed] = _model(student, recipe.student, recipe, "student", loaded, seed, base, tokenizer)
            if seeds > 1 and isinstance(student, nn.Module):
                hint = "Give a callable that makes a new module to have them drawn anew."
                built[seed].notes.append(f"All {seeds} seeds begin from the initial weights of the module that was given. {hint}")
            return built[seed]

        job = Job(
            recipe=recipe,
            data=loaded,
            build_student=build_student,
            teachers=tuple(
                TeacherSource(
                    partial(_teacher, given, spec, recipe, loaded, base, tokenizer, seed_of_teacher(recipe, number)),
                    partial(sources, spec, data=loaded, base=base, max_length=recipe.data.max_length)
                    if isinstance(given, str | Path | dict)
                    else lambda: None,
                )
                for number, (given, spec) in enumerate(zip(teachers, recipe.teachers, strict=True))
            ),
            build_peers=lambda seed: peers_of(recipe, loaded, base, seed),
            out=folder,
            resume=resume,
            seeds=seeds,
            ranks=ranks,
        )
        done = ranks.from_main(lambda: already(folder, recipe, seeds))
        if done is not None:
            shown.say(f"{folder} is finished; nothing is left to do.")
        metrics = dict(done) if done is not None else execute(job, shown)
        best = metrics.get("best_seed", recipe.seed)
        return Result(metrics, folder, _holding(built.get(best) or build_student(best), folder))


def _holding(model: Model, folder: Path) -> nn.Module:
    """The student that stands in ``folder``: ``model`` itself where it was trained just now, else as it is read back.

    A rank on another machine may not see the folder; its model was trained just now.
    """
    saved = folder / "student"
    if not saved.is_dir():
        return model.module.eval()
    if state_hash(model.module) != read_json(saved / "model.json")["weights_sha256"]:
        if model.kind != "module":
            return load(folder)
        load_into(model.module, saved, "student")
    return model.module.eval()


def train(*, student: ModelLike, train: Any = None, **arguments: Any) -> Result:
    """Train ``student`` without a teacher: the same spine, the same arguments as :func:`distill` but for teacher, temperature and alpha."""
    if "teacher" in arguments:
        raise UsageError(Problem("teacher", "limbeck.train has no teacher.", "Use limbeck.distill(teacher=..., student=...)."))
    return distill(student=student, teacher=None, train=train, **arguments)


def load(run: str | Path) -> nn.Module:
    """The student of a run (or a ``student/`` folder), in eval mode; its files are checked against their sha256."""
    return load_saved(Path(run)).module.eval()


def _spec(model: ModelLike) -> dict[str, Any]:
    if isinstance(model, dict):
        return dict(model)
    if isinstance(model, str | Path):
        return {"model": str(model)}
    return {"model": f"module:{_name(model)}"}


def _name(model: ModelLike) -> str:
    if isinstance(model, nn.Module):
        return type(model).__name__
    if isinstance(model, dict):
        return str(model.get("model", "model")).split(":")[-1].split("/")[-1]
    if isinstance(model, str | Path):
        return str(model).rstrip("/").split(":")[-1].split("/")[-1]
    return getattr(model, "__name__", "model").strip("<>")


def _teacher(
    given: ModelLike, spec: TeacherSpec, recipe: Recipe, data: Data, base: Path, tokenizer: Any, seed: int, new_head: bool
) -> Model:
    return _model(given, spec, recipe, "teacher", data, seed, base, tokenizer, new_head=new_head)


def _model(
    given: ModelLike,
    spec: ModelSpec,
    recipe: Recipe,
    role: Literal["student", "teacher"],
    data: Data,
    seed: int,
    base: Path,
    tokenizer: Any,
    *,
    new_head: bool = False,
) -> Model:
    """A module is copied, so that the caller's own stays as it is; a name is built as in a recipe."""
    if isinstance(given, str | Path | dict):
        return build_model(spec, role=role, data=data, seed=seed, base=base, new_head=new_head, max_length=recipe.data.max_length)
    if new_head:
        raise UsageError(
            Problem("teacher", "a module given from Python is not trained first.", "Train it with limbeck.train(student=...).")
        )
    if isinstance(given, nn.Module):
        module = _copied(given, role)
    else:
        if not callable(given):
            text = f"got {type(given).__name__}, expected an nn.Module, a callable that returns one, or the name of a model."  # type: ignore[unreachable]
            raise UsageError(Problem(role, text))
        module, _ = call_factory(given, num_classes=len(data.classes), options={}, where=role, seed=seed, role=role)
        with contextlib.suppress(UsageError):  # it may have returned an object that others hold too
            module = _copied(module, role)
    return wrap_module(module, role=role, data=data, tokenizer=tokenizer, max_length=recipe.data.max_length)


def _copied(module: nn.Module, role: str) -> nn.Module:
    """A deep copy; tensors that a module computes anew in each forward pass (as torch's older weight_norm does) are copied as values."""
    values = [v for m in module.modules() for v in vars(m).values() if isinstance(v, torch.Tensor) and not v.is_leaf]
    try:
        return copy.deepcopy(module, {id(v): v.detach().clone() for v in values})
    except Exception as error:
        raise UsageError(
            Problem(
                role,
                f"{type(module).__name__} cannot be copied, and a run must not change your own object: {' '.join(str(error).split())[:200]}.",
                f"Give a callable that makes it: {role}=lambda: ...",
            )
        ) from error


def _ignored(
    student: ModelLike,
    teachers: Sequence[ModelLike],
    data: Mapping[str, Any],
    learning: Mapping[str, Any],
    options: Any,
    tokenizer: Any,
    seeds: int,
    labels_unread: bool,
) -> Iterator[Problem]:
    """Arguments that contradict each other, or would have no effect. data, learning: arguments by name, None where not given. labels_unread: whether
    a loss learns from samples without a label by itself."""
    if not isinstance(options, Mapping):
        yield Problem("data_options", f"a mapping is wanted, as a recipe's data section; got {type(options).__name__}.")
        options = {}
    if (data["data"] is None) == (data["train"] is None):
        yield Problem("data", "give either train (and test ...), or data (a source name), and not both.")
    elif data["data"] is not None:
        for name in ("test", "valid", "unlabelled", "classes"):
            if data[name] is not None:
                hint = "Leave it out." if name == "classes" else f'Name a source: data={{"source": ..., "{name}": ...}}.'
                yield Problem(name, "is for data given as train, and has no effect beside data.", hint)
        for name in options if isinstance(data["data"], Mapping) else [n for n in options if n == "source"]:
            if name == "source" or name in data["data"]:
                yield Problem(f"data_options.{name}", "is given in data too.", "Give it once.")
    else:
        for name in ("source", "test", "valid", "unlabelled"):
            if options.get(name) is not None:
                hint = "Leave it out." if name == "source" else f"Pass {name}=."
                yield Problem(f"data_options.{name}", "has no effect beside train, which is the data itself.", hint)
        for name in ("test", "valid"):
            if data[name] is not None and options.get(f"{name}_fraction") is not None:
                yield Problem(f"data_options.{name}_fraction", f"has no effect where {name} is given.", "Leave it out.")
    if not teachers:
        for name in ("temperature", "alpha"):
            if learning[name] is not None:
                text = "has no effect without a teacher: it weighs what a teacher says."
                yield Problem(name, text, "Leave it out, or use limbeck.distill(teacher=...).")
        if data["unlabelled"] is not None and data["data"] is None and not labels_unread:
            yield Problem(
                "unlabelled", "has no effect without a teacher: nothing is learned from samples that have no label.", "Leave it out."
            )
    elif learning["objective"] is not None and (learning["temperature"] is not None or learning["alpha"] is not None):
        yield Problem("objective", "was given together with temperature or alpha.", "Put them into the terms, or leave objective out.")
    if tokenizer is not None and all(m is None or isinstance(m, str | Path | dict) for m in (student, *teachers)):
        yield Problem(
            "tokenizer", "is for modules, and a named model has its own.", 'Name another: {"model": ..., "options": {"tokenizer": ...}}.'
        )
    if type(seeds) is not int or seeds < 1:
        yield Problem("seeds", f"got {seeds!r}, expected a whole number of at least 1.")


def _task_of(train: Any, options: Mapping[str, Any]) -> str:
    """Text where the first sample is text; images and float tensors are classified as images are, and what cannot be read is refused later."""
    module = type(train).__module__.partition(".")[0]
    try:
        if module in ("pandas", "datasets"):
            row = train.iloc[0].to_dict() if module == "pandas" else train.with_format("arrow")[:1].to_pylist()[0]
            text = any(options.get(key) is not None for key in ("text", "text_pair", "max_length")) or not any(
                isinstance(value, bytes | dict) for value in row.values()
            )
        else:
            first = next(iter(train[0])) if isinstance(train, tuple) else train[0][0]
            while isinstance(first, list | tuple) and first:  # a pair of texts
                first = first[0]
            text = isinstance(first, str)
    except (TypeError, ValueError, LookupError, StopIteration, NotImplementedError):
        text = False
    return "text-classification" if text else "image-classification"
