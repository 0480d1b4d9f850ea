"""The Python call: anyone's own modules and tensors through the same spine as the command line."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_model
from torch import nn

from limbeck._folder import finished, next_free, refuse_taken, same_run
from limbeck.data import Data, data_from_python, load_data
from limbeck.errors import Problem, UsageError
from limbeck.models import Model, build_model, load_saved, state_hash, wrap_module
from limbeck.progress import Progress
from limbeck.randomness import forked
from limbeck.reading import absolute, build_recipe, default_objective
from limbeck.recipe import Recipe
from limbeck.run import read_json
from limbeck.spine import Job, execute

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
    teacher: ModelLike | None,
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
    baseline: bool = True,
    export: Sequence[str] = ("onnx",),
    progress: str = "auto",
    **settings: Any,
) -> Result:
    """Distil ``teacher`` into ``student``.

    student, teacher: an ``nn.Module`` (called with one image or tensor batch, or with the tokenizer's names; gives logits ``(B, C)`` or an output
    with ``.logits``), a callable that returns one (for a student drawn anew for each seed), or any model name of a recipe.
    train, test, valid, unlabelled: ``(x, y)`` tensors or arrays (uint8 images NHWC, NCHW or NHW; float tensors as they are; lists of strings or of
    pairs of strings) or a ``torch.utils.data.Dataset`` of ``(x, y)``; or ``data``: a source name or a ``data`` section of a recipe.
    temperature, alpha: ``alpha * T^2 * KL + (1 - alpha) * cross entropy``, 4 and 0.7 by default; or ``objective``, as in a recipe.
    settings: keys of a recipe's ``train`` section (``epochs``, ``batch_size``, ``lr``, ...), ``data_options`` (keys of its ``data`` section, e.g.
    ``{"augment": "standard"}``), and ``teacher_cache`` or ``track`` as in a recipe. tokenizer: for text modules that are not Hugging Face folders.

    Raises: UsageError with every problem at once; Stopped for NaN, a full disk or a failed parity; Interrupted after a signal.

    >>> import limbeck, torch
    >>> x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    >>> big, small = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)), torch.nn.Linear(8, 3)
    >>> result = limbeck.distill(teacher=big, student=small, train=(x, y), test=(x, y), epochs=1, export=[], out=getfixture("tmp_path") / "run",
    ...                          progress="none")
    >>> sorted(result.metrics["models"])
    ['baseline', 'student', 'teacher']
    """
    if objective is not None and (temperature is not None or alpha is not None):
        raise UsageError(
            Problem("objective", "was given together with temperature or alpha.", "Put them into the terms, or leave objective out.")
        )
    terms = objective or (default_objective(temperature, alpha) if teacher is not None else [{"loss": "cross_entropy", "weight": 1.0}])
    train_keys = {k: v for k, v in settings.items() if k not in ("data_options", "teacher_cache", "track")}
    data_options = dict(settings.get("data_options") or {})
    if (data is None) == (train is None):
        raise UsageError(Problem("data", "give either train (and test ...), or data (a source name), and not both."))
    source: dict[str, Any] = dict(data) if isinstance(data, dict) else {"source": data or "python"}
    plain: dict[str, Any] = {
        "seed": seed,
        "student": _spec(student),
        "data": {**source, **data_options},
        "objective": terms,
        "train": train_keys,
        "export": list(export),
        **{k: settings[k] for k in ("teacher_cache", "track") if k in settings},
    }
    if teacher is not None:
        plain |= {"teacher": _spec(teacher), "baseline": baseline}
    known = task or (_task_of(train) if train is not None else None)
    if known is not None:
        plain["task"] = known
    recipe = build_recipe(plain, command="distill" if teacher is not None else "train", where="limbeck.distill")
    base = Path.cwd()
    recipe = absolute(recipe, base)
    folder = Path(out) if out is not None else next_free(Path("runs"), f"python-{_name(student)}")
    refuse_taken(folder, resume)
    with Progress(progress) as shown:
        loaded = (
            load_data(recipe.data, recipe.task, base)
            if train is None
            else data_from_python(
                task=recipe.task, train=train, test=test, valid=valid, unlabelled=unlabelled, classes=classes, spec=recipe.data
            )
        )
        built: dict[int, Model] = {}

        def build_student(seed: int) -> Model:
            built[seed] = _model(student, recipe, "student", loaded, seed, base, tokenizer)
            return built[seed]

        job = Job(
            recipe=recipe,
            data=loaded,
            build_student=build_student,
            build_teacher=None
            if teacher is None
            else lambda new_head: _model(teacher, recipe, "teacher", loaded, recipe.seed, base, tokenizer, new_head=new_head),
            out=folder,
            resume=resume,
            seeds=seeds,
        )
        if finished(folder):
            same_run(folder, recipe, seeds)
            shown.say(f"{folder} is finished; nothing is left to do.")
            metrics = dict(read_json(folder / "metrics.json"))
        else:
            metrics = execute(job, shown)
        best = metrics.get("best_seed", recipe.seed)
        return Result(metrics, folder, _holding(built.get(best) or build_student(best), folder))


def _holding(model: Model, folder: Path) -> nn.Module:
    """The student that stands in ``folder``: ``model`` itself where it was trained just now, else as it is read back."""
    about = read_json(folder / "student" / "model.json")
    if state_hash(model.module) == about["weights_sha256"]:
        return model.module.eval()
    if model.kind != "module":
        return load(folder)
    model.module.to(getattr(torch, about["dtype"]))
    load_model(model.module, folder / "student" / "model.safetensors")
    return model.module.eval()


def train(*, student: ModelLike, train: Any = None, **arguments: Any) -> Result:
    """Train ``student`` without a teacher: the same spine, the same arguments as :func:`distill` but for teacher, temperature and alpha."""
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


def _model(
    given: ModelLike,
    recipe: Recipe,
    role: Literal["student", "teacher"],
    data: Data,
    seed: int,
    base: Path,
    tokenizer: Any,
    *,
    new_head: bool = False,
) -> Model:
    """A module is taken as it is (a student is copied, so that the caller's own keeps its initial weights); a name is built as in a recipe."""
    if isinstance(given, str | Path | dict):
        spec = recipe.student if role == "student" else recipe.teacher
        assert spec is not None
        return build_model(spec, role=role, data=data, seed=seed, base=base, new_head=new_head, max_length=recipe.data.max_length)
    if new_head:
        raise UsageError(
            Problem("teacher", "a module given from Python is not trained first.", "Train it with limbeck.train(student=...).")
        )
    if isinstance(given, nn.Module):
        module = copy.deepcopy(given) if role == "student" else given
    else:
        with forked(seed, role):
            module = given()
        if not isinstance(module, nn.Module):
            raise UsageError(Problem(role, f"the callable returned {type(module).__name__}, not an nn.Module."))
    return wrap_module(module, role=role, data=data, tokenizer=tokenizer, max_length=recipe.data.max_length)


def _task_of(train: Any) -> str:
    """Text where the first sample is text; images and float tensors are classified as images are."""
    x = train[0] if isinstance(train, tuple) else train[0][0]
    first = x[0] if isinstance(x, list | tuple) and len(x) else x
    return (
        "text-classification"
        if isinstance(first, str) or (isinstance(first, list | tuple) and first and isinstance(first[0], str))
        else "image-classification"
    )
