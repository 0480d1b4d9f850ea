"""The configuration of a run, all of it, and nothing else. How it is read and judged is in :mod:`limbeck.reading`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from limbeck import _recipe_check as check
from limbeck import _recipe_paths as paths
from limbeck._recipe_yaml import dump

__all__ = [
    "Augment",
    "Command",
    "DataSpec",
    "Ensemble",
    "ModelSpec",
    "Recipe",
    "Schedule",
    "Section",
    "Stage",
    "StudentSpec",
    "TeacherCache",
    "TeacherSpec",
    "TeacherTraining",
    "Term",
    "Train",
    "defaulted",
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
# Above that it is a slip of the hand, and the list of epochs alone would fill the memory.
Epochs = Annotated[int, Field(ge=1, le=1_000_000), _number]
Weight = Annotated[float, Field(json_schema_extra={"expected": "a number or 'paper'"}), _number]
BatchSize = Annotated[int, Field(ge=1, json_schema_extra={"expected": "a whole number of at least 1 or 'auto'"}), _number]
Workers = Annotated[int, Field(ge=0), _number]
Tokens = Annotated[int, Field(ge=2), _number]
Pixels = Annotated[int, Field(ge=1, le=8192), _number]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1), _number]
Positive = Annotated[float, Field(gt=0), _number]
NotNegative = Annotated[float, Field(ge=0), _number]
Fraction = Annotated[float, Field(gt=0, lt=1), _number]
Share = Annotated[float, Field(gt=0, le=1), _number]
BelowOne = Annotated[float, Field(ge=0, lt=1), _number]
Probability = Annotated[float, Field(ge=0, le=1), _number]
Magnitude = Annotated[float, Field(ge=0, le=30), _number]
Text = Annotated[str, Field(min_length=1)]
ScheduleName = Literal["cosine", "linear", "one_cycle", "step", "constant"]


def _text(expected: str, **limits: Any) -> Any:
    return Field(json_schema_extra={"expected": expected}, **({"min_length": 1} | limits))


ModelName = Annotated[str, _text("the name of a model, e.g. timm:resnet50 (see `limbeck models`)")]
SourceName = Annotated[str, _text(f"the name of data: {paths.SOURCES_SENTENCE}")]
LossName = Annotated[str, _text("the name of a loss (see `limbeck losses`)")]
_SEATS = "same, auto, device:NAME (device:cuda:1, device:cpu), or ranks:K"
Placement = Annotated[str, _text(_SEATS, pattern=r"^(same|auto|device:(cpu|mps|cuda(:\d+)?)|ranks:[1-9]\d*)$")]
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

    epochs: Epochs = 3
    batch_size: Count | None = None
    optimizer: Literal["adamw", "adam", "sgd"] | None = None
    lr: Positive | None = None
    weight_decay: NotNegative | None = None
    schedule: ScheduleName | None = None
    warmup: BelowOne | None = None
    if_needed: bool = False
    """Train only where the teacher's head does not fit the classes of the data."""


class ModelSpec(Section):
    """A model by name, its weights (FILE.safetensors, or "pretrained": the library's own published weights) and what its builder takes."""

    model: ModelName
    weights: Text | None = None
    options: dict[str, Any] = {}
    """Passed to the builder; `layers`, `layers_of`, `resolution` and `max_length` are Limbeck's own."""


class StudentSpec(ModelSpec):
    """The model to train."""

    peers: list[ModelSpec] = []
    """Models that learn beside it in the same steps, for the losses mutual and kdcl; they read its inputs, and are kept beside it."""


class TeacherSpec(ModelSpec):
    """The model to learn from."""

    train: TeacherTraining | None = None
    placement: Placement = "same"
    """Where it is asked. same: beside the student. device:NAME: on another device, a batch ahead of the student. ranks:K: under torchrun the first
    K ranks do nothing else, and serve the others. auto: the last CUDA device that is not the student's, for one process that has several."""
    precision: Precision = "auto"
    """auto: as the student (with its layout) where that is explicit, else measured."""
    layout: Layout | None = None


class Ensemble(Section):
    """What several teachers say together. One that is more sure of a sample may count more in it."""

    average: Literal["probabilities", "logits"] = "probabilities"
    """probabilities: the weighted mean of their probabilities; logits: of their logits (which is the geometric mean of their probabilities)."""
    weights: Literal["confidence", "entropy"] | Annotated[list[NotNegative], Field(min_length=1)] | None = None
    """null: alike; a list: one for each teacher, in their order; confidence: for each sample in proportion to a teacher's largest probability;
    entropy: in proportion to exp(-H), H its entropy in nats."""
    temperature: Positive | None = None
    """probabilities only: at which they are averaged; null: that of the objective."""


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
    weight: Weight | Literal["auto"] | Schedule = 1.0
    """In a file also ``paper``: the weight at which the loss was published (`limbeck losses NAME`); 1 where none was. auto: such that the gradient of
    this term is as long as that of all terms with numbers together, on the parameters of the student that both reach."""


class Stage(Section):
    """A stretch of training; what is null is as in the whole recipe."""

    epochs: Epochs
    fraction: Share = 1.0
    """Of the training rows: the first of them in the order of a hash of (data seed, sample id), so that a smaller fraction is a part of a larger
    one. Not stratified."""
    objective: Annotated[list[Term], Field(min_length=1)] | None = None
    lr: Positive | None = None
    """In place of train.lr; schedule and warm-up are those of the whole run."""
    resolution: Pixels | tuple[Pixels, Pixels] | None = None
    """Of the student's images while it trains; the teacher, and every evaluation, keep their own."""
    max_length: Tokens | None = None
    """In tokens, of the student's texts while it trains; the teacher, and every evaluation, keep their own."""


class Train(Section):
    """How the student (and the baseline) is trained."""

    epochs: Epochs = 10
    """With stages, the sum of theirs."""
    stages: Annotated[list[Stage], Field(min_length=1)] | None = None
    """Stretches of training, one after the other, in one run."""
    batch_size: BatchSize = 128
    """The samples of one optimiser step, over all microbatches and ranks; for text 32 where it is not given. auto: that number, and
    accumulate: auto."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Positive = 1e-3
    """Where it is not given: 1e-3, for text 5e-5, with sgd 0.05."""
    momentum: BelowOne = 0.9
    """sgd only."""
    nesterov: bool = True
    """sgd only."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """adam and adamw only."""
    weight_decay: NotNegative = 0.05
    """Where it is not given: 0.05, with sgd 5e-4, with adam 0."""
    schedule: ScheduleName = "cosine"
    warmup: BelowOne = 0.05
    """Fraction of all steps."""
    milestones: Annotated[list[Fraction], Field(min_length=1)] | None = None
    """step only: the parts of all steps after which lr is multiplied by decay: [0.5, 0.75]."""
    decay: Fraction = 0.1
    """step only."""
    clip_norm: Positive | None = 1.0
    accumulate: Count | Literal["auto"] = 1
    """Microbatches a step. auto: as few as fit into memory, found by measuring; a step that would become another one by being cut is not cut."""
    precision: Precision = "auto"
    layout: Layout | None = None
    gradient_checkpointing: bool | Annotated[list[Text], Field(min_length=1)] = False
    """Compute blocks again in the backward pass instead of keeping their inner values. true: Transformers' own switch, else the blocks that the
    model repeats; a list: these layers of the student, `*` within a part of a name (`[blocks.*]`)."""
    ema: Fraction | None = None
    """Decay; the averaged student is what is evaluated and exported."""
    select: Literal["last", "best"] = "last"
    """best: the epoch that is best on validation."""
    checkpoint_every: Count = 500
    """Steps."""
    workers: Workers | Literal["auto"] = "auto"
    balance_every: Count = 50
    """Steps from one measurement of the terms with weight: auto to the next. The first one of a stage measures."""
    log_every: Count = 10
    """Steps."""
    device: Device = "auto"
    deterministic: bool | Literal["auto"] = "auto"
    """On CUDA. auto: kernels that give the same bits each time, wherever PyTorch has them; true: an operation that has none is refused; false: the
    fastest kernels."""


class TeacherCache(Section):
    """How a teacher's answers are kept, so that it is asked once for every sample and view."""

    mode: Literal["auto", "off", "require"] = "auto"
    """auto: keep answers where one is used more than once (always where a path is named), and ask for what is missing; require: only read;
    off: ask in every step."""
    path: Text | None = None
    """A folder for the caches of any number of teachers; null: LIMBECK_CACHE, or limbeck/teachers in the user's cache folder."""
    views: Count | Literal["live"] = 16
    """How many augmented versions of a sample there are: view = epoch mod views. live: a new one every epoch, and the teacher in every step.
    Without a teacher there is a new one every epoch."""
    store: Literal["logits", "features", "both"] | None = None
    """null: what the objective reads."""
    codec: Literal["float16", "float32", "sparse"] = "float16"
    """sparse: for many classes and the loss kd at one temperature; the most probable ones exactly and an unbiased sample of the rest."""
    temperature: Positive | None = None
    """sparse only; null: that of the objective's kd."""
    top: Count = 62
    """sparse only: classes kept exactly."""
    samples: Annotated[int, Field(ge=0), _number] = 64
    """sparse only: classes drawn from the rest."""


class Recipe(Section):
    """The complete, validated configuration of a run."""

    task: Literal["image-classification", "text-classification"]
    seed: Seed = 0
    teacher: TeacherSpec | Annotated[list[TeacherSpec], Field(min_length=2)] | None = None
    """One, or a list of several (see ensemble)."""
    ensemble: Ensemble = Ensemble()
    student: StudentSpec
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
        return "train" if self.teacher is None and not self.baseline else "distill"

    @property
    def teachers(self) -> list[TeacherSpec]:
        """The models to learn from, in the order of the recipe; none, one, or several."""
        return [] if self.teacher is None else self.teacher if isinstance(self.teacher, list) else [self.teacher]

    @property
    def views(self) -> int | None:
        """How many augmented versions of a sample there are; None: a new one every epoch, where that is asked for or there is no teacher to pay."""
        views = self.teacher_cache.views
        return None if views == "live" or not self.teachers else views

    def with_teachers(self, teachers: list[TeacherSpec]) -> Recipe:
        """The same recipe with these in place of its :attr:`teachers`, as many."""
        return self.model_copy(update={"teacher": teachers if isinstance(self.teacher, list) else teachers[0] if teachers else None})

    @property
    def teacher_ranks(self) -> int:
        """How many ranks only teach (``teacher.placement: ranks:K``)."""
        kind, _, count = ("same" if len(self.teachers) != 1 else self.teachers[0].placement).partition(":")
        return int(count) if kind == "ranks" else 0

    @property
    def stages(self) -> list[Stage]:
        """The stages of training; one, on all rows, where the recipe has none."""
        return list(self.train.stages) if self.train.stages is not None else [Stage(epochs=self.train.epochs)]

    @property
    def objectives(self) -> list[list[Term]]:
        """The terms of each stage."""
        return [stage.objective or self.objective for stage in self.stages]

    @property
    def terms(self) -> list[Term]:
        """The terms of all stages, each list of them once."""
        lists = self.objectives
        return [term for i, terms in enumerate(lists) if terms not in lists[:i] for term in terms]

    def to_yaml(self) -> str:
        """Every key, in the order of the documentation; keys without effect in this recipe are null. Reading it gives an equal recipe."""
        data = self.model_dump(mode="json")
        for path in check.not_applying(_without_defaults(self), defaulted(data), self.command):
            holder, _, name = path.rpartition(".")
            found = check.look(data, holder) if holder else data
            if found is not None and found is not check.MISSING:
                found[name] = None
        return dump(data)


def defaulted(plain: Mapping[str, Any]) -> Any:
    """``value(path)``: what was given, or the default."""
    defaults = {
        "train": Train().model_dump(mode="json"),
        "teacher_cache": TeacherCache().model_dump(mode="json"),
        "ensemble": Ensemble().model_dump(mode="json"),
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
