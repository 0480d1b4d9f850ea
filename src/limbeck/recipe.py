"""The configuration of a run, all of it, and nothing else.

Four ways lead to one :class:`Recipe`: a YAML file, options on the command line, ``kd_train.py`` and a Python call. :func:`load_recipe`
merges a file with options, :func:`build_recipe` judges plain values; both tell everything that is wrong at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from limbeck import _recipe_check as check
from limbeck import _recipe_merge as merging
from limbeck import _recipe_paths as paths
from limbeck._recipe_yaml import dump, read_yaml
from limbeck.errors import Problem, UsageError

__all__ = [
    "Augment",
    "Command",
    "DataSpec",
    "ModelSpec",
    "Recipe",
    "RecipeError",
    "Schedule",
    "Section",
    "TeacherCache",
    "TeacherSpec",
    "TeacherTraining",
    "Term",
    "Train",
    "absolute",
    "build_recipe",
    "default_objective",
    "differences",
    "json_schema",
    "load_recipe",
    "read_yaml",
    "recipe_from_yaml",
]

Command = Literal["distill", "train"]
Precision = Literal["auto", "float32", "float64", "bf16", "fp16"]
Layout = Literal["channels_first", "channels_last"]


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "a number, not true or false")
    return value


# Python takes true for 1; a person who writes `epochs: true` means something else. The range stands inside, where the JSON schema sees it.
_number = BeforeValidator(_no_switch)
Real = Annotated[float, _number]
Count = Annotated[int, Field(ge=1), _number]
Workers = Annotated[int, Field(ge=0), _number]
Tokens = Annotated[int, Field(ge=2), _number]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1), _number]
Positive = Annotated[float, Field(gt=0), _number]
NotNegative = Annotated[float, Field(ge=0), _number]
Fraction = Annotated[float, Field(gt=0, lt=1), _number]
Share = Annotated[float, Field(gt=0, le=1), _number]
BelowOne = Annotated[float, Field(ge=0, lt=1), _number]
Probability = Annotated[float, Field(ge=0, le=1), _number]
Magnitude = Annotated[float, Field(ge=0, le=30), _number]
Text = Annotated[str, Field(min_length=1)]


def _text(expected: str, **limits: Any) -> Any:
    return Field(json_schema_extra={"expected": expected}, **({"min_length": 1} | limits))


ModelName = Annotated[str, _text("the name of a model, e.g. timm:resnet50 (see `limbeck models`)")]
SourceName = Annotated[str, _text(f"the name of data: {paths.SOURCES_SENTENCE}")]
LossName = Annotated[str, _text("the name of a loss (see `limbeck losses`)")]
Device = Annotated[str, _text("auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]


class Section(BaseModel):
    """A mapping of the recipe: unknown keys, infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True)


class Schedule(Section):
    """A value that changes over training: ``{start: 1.0, end: 0.0, shape: cosine, until: 0.5}`` goes from ``start`` to ``end``
    over the first ``until`` of all optimiser steps and stays there."""

    start: Real
    end: Real
    shape: Literal["linear", "cosine"] = "linear"
    until: Share = 1.0


class TeacherTraining(Section):
    """Fine-tune the teacher on the labelled data first, with cross entropy; what is null is as for the student."""

    epochs: Count = 3
    batch_size: Count | None = None
    optimizer: Literal["adamw", "adam", "sgd"] | None = None
    lr: Positive | None = None
    weight_decay: NotNegative | None = None
    schedule: Literal["cosine", "linear", "one_cycle", "constant"] | None = None
    warmup: BelowOne | None = None
    if_needed: bool = False
    """Train only where the teacher's head does not fit the classes of the data."""


class ModelSpec(Section):
    """A model by name, its weights (FILE.safetensors, or "pretrained": the library's own published weights) and what its builder takes."""

    model: ModelName
    weights: Text | None = None
    options: dict[str, Any] = {}
    """Passed to the builder; `layers`, `layers_of`, `resolution` and `max_length` are Limbeck's own."""


class TeacherSpec(ModelSpec):
    """The model to learn from."""

    train: TeacherTraining | None = None
    placement: Literal["same"] = "same"
    precision: Precision = "auto"
    """auto: as the student where that is explicit, else measured."""
    layout: Layout | None = None


class Augment(Section):
    """Views of images."""

    crop: Count | None = None
    """Zero-pad by this many pixels, crop back to the same size at random."""
    resized_crop: tuple[Share, Share] | None = None
    """Smallest and largest area of a random resized crop, as fractions."""
    flip: bool = False
    """Horizontal, p = 0.5."""
    randaugment: tuple[Count, Magnitude] | None = None
    """Operations a view, and their magnitude (0 to 30)."""
    erase: Probability = 0.0
    """Probability of random erasing."""
    mixup: NotNegative = 0.0
    """Alpha of the Beta distribution that lambda is drawn from; 0 is off."""


class DataSpec(Section):
    """Where samples come from, how they are split, and how they are read."""

    source: SourceName
    test: Text | None = None
    valid: Text | None = None
    unlabelled: Text | None = None
    seed: Seed = 0
    """Of splits and views; the run's own seed changes neither."""
    valid_fraction: Fraction = 0.1
    test_fraction: Fraction | None = None
    """0.2 where the source has no test split."""
    text: Text = "text"
    text_pair: Text | None = None
    """The column of second sentences; null: "text_pair" where there is such a column."""
    label: Text = "label"
    max_length: Tokens = 128
    augment: Literal["none", "standard"] | Augment = "none"
    corrupt: Literal["fail", "skip"] = "fail"
    train_limit: Count | None = None
    """Only the first N training rows in hash order, stratified."""
    labelled_limit: Count | None = None
    """Keep the labels of N training rows, stratified; the others become unlabelled."""


class Term(Section):
    """One weighted loss; further keys are the loss's own parameters (`limbeck losses NAME`)."""

    model_config = ConfigDict(extra="allow")

    loss: LossName
    weight: Real | Schedule = 1.0


class Train(Section):
    """How the student (and the baseline) is trained."""

    epochs: Count = 10
    batch_size: Count = 128
    """The samples of one optimiser step, over all microbatches and ranks."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Positive = 1e-3
    momentum: BelowOne = 0.9
    """sgd only."""
    nesterov: bool = True
    """sgd only."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """adam and adamw only."""
    weight_decay: NotNegative = 0.05
    schedule: Literal["cosine", "linear", "one_cycle", "constant"] = "cosine"
    warmup: BelowOne = 0.05
    """Fraction of all steps."""
    clip_norm: Positive | None = 1.0
    accumulate: Count = 1
    """Microbatches a step."""
    precision: Precision = "auto"
    layout: Layout | None = None
    gradient_checkpointing: Literal[False] = False
    ema: Fraction | None = None
    """Decay; the averaged student is what is evaluated and exported."""
    select: Literal["last", "best"] = "last"
    """best: the epoch that is best on validation."""
    checkpoint_every: Count = 500
    """Steps."""
    workers: Workers | Literal["auto"] = "auto"
    log_every: Count = 10
    """Steps."""
    device: Device = "auto"


class TeacherCache(Section):
    """How a teacher's outputs are kept."""

    mode: Literal["auto", "off"] = "auto"
    views: Count | Literal["live"] = "live"
    """view = epoch mod views."""


class Recipe(Section):
    """The complete, validated configuration of a run."""

    task: Literal["image-classification", "text-classification"]
    seed: Seed = 0
    teacher: TeacherSpec | None = None
    student: ModelSpec
    data: DataSpec
    objective: Annotated[list[Term], Field(min_length=1)]
    train: Train = Train()
    teacher_cache: TeacherCache = TeacherCache()
    baseline: bool = True
    export: list[Literal["onnx", "torchscript", "pt2"]] = ["onnx"]
    track: list[Literal["wandb", "mlflow"]] = []

    @property
    def command(self) -> Command:
        """The command that this recipe is for."""
        return "train" if self.teacher is None else "distill"

    def to_yaml(self) -> str:
        """Every key, in the order of the documentation; keys without effect in this recipe are null. Reading it gives an equal recipe."""
        data = self.model_dump(mode="json")
        for path in check.not_applying(_without_defaults(self), _reader(data), self.command):
            section, _, name = path.partition(".")
            if not name:
                data[section] = None
            elif data[section] is not None:
                data[section][name] = None
        return dump(data)


class RecipeError(UsageError):
    """All problems of one recipe; ``source`` is the file or the command line that they are in."""

    def __init__(self, problems: Sequence[Problem], source: str) -> None:
        super().__init__(problems)
        self.source = source

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.source}: {self.problems[0]}"
        return "\n".join([f"{self.source}: {len(self.problems)} problems", *(f"  {p}" for p in self.problems)])


def default_objective(temp: float | None = None, alpha: float | None = None) -> list[dict[str, Any]]:
    """``alpha * kd(temp) + (1 - alpha) * cross_entropy``, by default 0.7 at T = 4; a term at weight 0 is left out.

    >>> default_objective(alpha=1.0)
    [{'loss': 'kd', 'weight': 1.0, 'temperature': 4.0}]
    """
    return merging.default_objective(temp, alpha)


def build_recipe(data: Mapping[str, Any], *, command: Command, where: str = "recipe", spelt: Mapping[str, str] | None = None) -> Recipe:
    """A recipe from plain values (as YAML or JSON give them), everything judged that can be judged without loading data or models.

    ``where`` names the recipe in messages; ``spelt`` maps keys to how the person wrote them (``train.lr`` -> ``--lr``). Left out: the task
    where the data tell it, and the objective (for ``train`` cross entropy). Raises :class:`RecipeError` with all problems.
    """
    plain = _expand(data, command)
    value = _reader(plain)
    dropped = merging.without_nulls(plain, check.not_applying(plain, value, command))
    problems: list[Problem] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(dropped)
    except ValidationError as error:
        problems += check.schema_problems(error.errors(), dropped, Recipe.model_json_schema())
    further = [*check.recipe_problems(plain, value, command), *_objective_problems(plain, command)]
    told = {p.where for p in further}  # these know more about a key than its type
    if "data.source" in told:
        told.add("task")  # right data tell it
    problems = [*(p for p in problems if p.where not in told), *further]
    if problems or recipe is None:
        raise RecipeError([_respelt(p, spelt or {}) for p in problems], where)
    if recipe.train.optimizer == "sgd" and recipe.train.momentum == 0:
        recipe.train.nesterov = False
    return recipe


def load_recipe(path: Path | None, options: Mapping[str, Any], sets: Sequence[str], command: Command) -> tuple[Recipe, Path]:
    """The recipe in the file ``path`` (None: options alone) with options and ``--set key.path=value`` over it, and the folder that its
    relative paths are relative to: the file's, or the working directory without one.

    ``options`` has strings (or None) under the names of the command line: teacher, student, data, task, temp, alpha, epochs,
    batch_size, lr, seed, baseline (bool), fit_teacher (bool). Raises :class:`RecipeError` with all
    problems, files that are not there included.
    """
    here = Path.cwd()
    base = here if path is None else path.resolve().parent
    where = "command line" if path is None else str(path)
    try:
        data = {} if path is None else merging.expand_names(read_yaml(path))
    except UsageError as error:
        raise UsageError([*error.problems, *_option_problems(options, sets, command)]) from None
    merged, spelt, problems = merging.merge(data, options, sets, command)
    if path is not None:
        merged = paths.absolute_paths(merged, here, only={key for key in spelt if key in paths.PATH_KEYS})
    source = check.look(merged, "data.source")
    if isinstance(source, str):
        merged["data"] = {**merged["data"], "source": paths.complete_source(source, base)}
    missing = [_respelt(p, spelt) for p in [*paths.from_python(merged), *paths.missing_files(merged, base)]]
    recipe: Recipe | None = None
    try:
        recipe = build_recipe(merged, command=command, where=where, spelt=spelt)
    except RecipeError as error:
        known = {p.where for p in problems}
        problems += [p for p in error.problems if p.where not in known]
    known = {p.where for p in problems}
    problems += [p for p in missing if p.where not in known]
    if problems or recipe is None:
        raise RecipeError(problems, where)
    return recipe, base


def _option_problems(options: Mapping[str, Any], sets: Sequence[str], command: Command) -> list[Problem]:
    """What is wrong with the options themselves, whatever the recipe says."""
    merged, spelt, problems = merging.merge({}, options, sets, command)
    try:
        build_recipe(merged, command=command, spelt=spelt)
    except RecipeError as error:
        problems += [p for p in error.problems if p.where.startswith("--") and p.where not in {q.where for q in problems}]
    return problems


def recipe_from_yaml(path: Path) -> Recipe:
    """The recipe in a complete file such as a run's recipe.yaml, for the command that it was written by."""
    data = read_yaml(path)
    return build_recipe(data, command="train" if data.get("teacher") is None else "distill", where=str(path))


def absolute(recipe: Recipe, base: Path) -> Recipe:
    """The same recipe with its local paths absolute, so that it means the same wherever its file lies."""
    return Recipe.model_validate(paths.absolute_paths(recipe.model_dump(), base))


def differences(a: Recipe, b: Recipe) -> list[str]:
    """``train.lr: 0.001 -> 0.01`` for every key in which two recipes differ, in the order of the recipe."""
    return check.differences(a.model_dump(mode="json"), b.model_dump(mode="json"), "")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, for editors (completion and checks while typing)."""
    from limbeck.losses import LOSSES

    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    definitions["Term"]["properties"]["loss"] = {"type": "string", "enum": list(LOSSES), "description": "see `limbeck losses`"}
    for name in ("teacher", "student", "data"):  # a bare name is short for the mapping that has only the name
        schema["properties"][name] = {"anyOf": [{"type": "string"}, schema["properties"][name]]}
    for name in ("export", "track"):
        schema["properties"][name] = {"anyOf": [schema["properties"][name]["items"], schema["properties"][name]]}
    never = set(check.not_applying({}, lambda _: None, "train"))
    for path in never | _NULLABLE:
        _allow_null(schema, path)
    schema["required"] = ["student", "data"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Limbeck recipe"}


_NULLABLE = {
    "train.momentum",
    "train.nesterov",
    "train.betas",
    "data.text",
    "data.label",
    "data.max_length",
    "data.valid_fraction",
    "teacher_cache",
}


def _allow_null(schema: dict[str, Any], path: str) -> None:
    holder = schema
    for key in path.split(".")[:-1]:
        found = dict(check.branches(holder["properties"][key], schema)[-1])
        holder = next(d for d in schema["$defs"].values() if d.get("title") == found.get("title"))
    key = path.split(".")[-1]
    held = holder["properties"][key]
    if {"type": "null"} not in held.get("anyOf", []):
        holder["properties"][key] = {"anyOf": [held, {"type": "null"}]}


def _expand(data: Mapping[str, Any], command: Command) -> dict[str, Any]:
    plain = merging.expand_names(data)
    if plain.get("objective") is None:
        plain["objective"] = merging.default_objective(None, None) if command == "distill" else [{"loss": "cross_entropy", "weight": 1.0}]
    source = check.look(plain, "data.source")
    if isinstance(source, str):
        plain["data"]["source"] = paths.complete_source(source, None)
    if plain.get("task") is None:
        plain.pop("task", None)
        task = paths.task_of(check.look(plain, "data.source"))
        if task is not None:
            plain["task"] = task
    if command == "train" and plain.get("baseline") in (None, False):
        plain["baseline"] = False
    return plain


def _reader(plain: Mapping[str, Any]) -> Any:
    """``value(path)``: what was given, or the default."""
    defaults = {
        "train": Train().model_dump(mode="json"),
        "data": {k: f.default for k, f in DataSpec.model_fields.items() if not f.is_required()},
        "export": [],
        "track": [],
    }

    def value(path: str) -> Any:
        found = check.look(plain, path)
        return check.look(defaults, path) if found is check.MISSING or found is None else found

    return value


def _without_defaults(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_defaults=True)


def _objective_problems(plain: Mapping[str, Any], command: Command) -> list[Problem]:
    """What is wrong with the terms, and with the pair of terms and teacher."""
    raw = plain.get("objective")
    if not isinstance(raw, list) or not raw:
        return []
    from limbeck.objective import check_terms, needs_of

    terms: list[Term] = []
    whole = True
    for item in raw:
        try:
            terms.append(Term.model_validate(item))
        except ValidationError:  # told already; a stand-in keeps the numbers of the others
            loss = check.look(item, "loss")
            rest = {**item, "weight": 1.0} if isinstance(item, dict) and isinstance(loss, str) and loss else {"loss": "cross_entropy"}
            terms.append(Term.model_validate(rest))
            whole = False
    problems = [Problem(re.sub(r"\[(\d+)\]", r".\1", p.where), p.message, p.hint) for p in check_terms(terms)]
    if problems or not whole:
        return problems
    if command == "train":
        for i, term in enumerate(terms):
            _, teacher = needs_of([term])
            if teacher.logits or teacher.features:
                text = f"{term.loss} needs a teacher, and `limbeck train` has none."
                problems.append(Problem(f"objective.{i}.loss", text, "Use `limbeck distill --teacher ...`, or leave it out."))
    elif plain.get("teacher") is not None:
        _, teacher = needs_of(terms)
        if not (teacher.logits or teacher.features):
            used = ", ".join(t.loss for t in terms)
            text = f"no term of the objective uses the teacher (the terms: {used})."
            problems.append(Problem("objective", text, "Add kd (--alpha above 0), or use `limbeck train`."))
    return problems


def _respelt(problem: Problem, spelt: Mapping[str, str]) -> Problem:
    key = problem.where
    while key and key not in spelt:
        key = key.rpartition(".")[0]
    if not key:
        return problem
    rest = problem.where.removeprefix(key)
    return Problem(f"{spelt[key]}{rest}", problem.message, problem.hint)
