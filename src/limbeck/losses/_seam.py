"""What a loss says about itself, so that recipes, listings and tests can treat every loss alike.

A loss is a pure function, or an :class:`torch.nn.Module` where it has parameters. Its positional arguments are the tensors named by
``LossEntry.reads``, each of the same N items; its keyword-only arguments are what a recipe may set. The annotations of these carry the
allowed range (a pydantic ``Field`` whose ``description`` says it in words) and the markers below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from torch import Tensor, nn

from limbeck.errors import nearest

__all__ = [
    "AUTO",
    "Layer",
    "LossEntry",
    "Parameter",
    "Path",
    "PerClass",
    "Reads",
    "Schedulable",
    "Shape",
    "of_maps",
    "of_samples",
    "raised",
    "shaped",
]

Reads = Literal[
    "student.logits",
    "teacher.logits",
    "student.features",
    "teacher.features",
    "labels",
    "mask",
    "samples",
    "peers.logits",
    "average.logits",
]
"""A tensor that a loss takes. Logits: (N, C). Features: (N, ...), such as (N, D) or (N, Ch, H, W). Labels: (N,) int64 or (N, C) floats. Mask: (N, T),
0 at padding, beside features by token. Samples: (N, 1 + K) int64, where a sample and others that are drawn for it stand among all training rows
(:class:`limbeck.losses._population.Population`); the loss is a module with ``negatives`` (K), is built with the number of rows as its third argument,
and is told of each optimiser step by ``stepped``. Peers' logits: (N, K - 1, C), of networks that learn beside the student; the loss is a module that
is built as ``function(models, *, parameters)`` and has ``answers`` (:class:`limbeck.losses.peers.Peers`). Average's logits: (N, C), of a
copy of the student that the loss keeps (:class:`limbeck.losses.peers.MeanTeacher`): it is built as ``function(model, *, parameters)``, follows the
student's module, and is told of each step."""

Shape = tuple[int, ...]
"""Of a captured feature, batch first."""

Path = Field(min_length=1, description="the path of a layer, such as layer3 or encoder.layer.5")

AUTO = "auto"
"""In place of the paths of layers: pairs that are found when the models are known."""

_Several = Annotated[str, Path] | Annotated[list[Annotated[str, Path]], Field(min_length=1)]

_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Schedulable:
    """Marks a number for which a recipe may also give a schedule over training; the loss itself sees the number."""


@dataclass(frozen=True)
class PerClass:
    """Marks a (C,) tensor that a recipe gives as a list, as a mapping by class name, or as ``balanced``."""


@dataclass(frozen=True)
class Layer:
    """Marks the path of a layer whose output the loss reads, as in ``module.named_modules()``."""

    side: Literal["student", "teacher"]


def raised(x: Tensor) -> Tensor:
    """Half types become float32; float32 and float64 stay what they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def shaped(shape: Shape) -> str:
    """A feature's shape in words, ``(B, 64, 8, 8)``."""
    return "(" + ", ".join(["B", *(str(n) for n in shape[1:])]) + ")"


@dataclass(frozen=True)
class Parameter:
    """One keyword argument of a loss, as a recipe may set it.

    ``allowed`` says in words what is allowed; ``default`` is ``inspect.Parameter.empty`` where a recipe must give a value.
    """

    name: str
    annotation: Any
    default: Any
    allowed: str
    schedulable: bool
    per_class: bool
    layer: Layer | None

    @property
    def plain(self) -> Any:
        """The annotation without its range."""
        return self.annotation.__origin__ if get_origin(self.annotation) is Annotated else self.annotation

    @property
    def required(self) -> bool:
        """Whether a recipe must give it."""
        return self.default is inspect.Parameter.empty

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that are allowed, where the parameter is one of a few words."""
        return tuple(str(c) for c in get_args(self.annotation)) if get_origin(self.annotation) is Literal else ()

    def read(self, value: Any) -> Any:
        """``value`` as the loss takes it (a number written as text becomes a number); ValueError with a sentence where not allowed."""
        if isinstance(value, Mapping) and self.per_class:
            value = {str(k): v for k, v in value.items()}
        try:
            if isinstance(value, bool) and self.plain is not bool:
                raise ValueError
            return TypeAdapter(self.annotation).validate_python(value)
        except (ValidationError, ValueError):
            hint = nearest(value, self.choices) if isinstance(value, str) else ""
            raise ValueError(f"{value!r} is not allowed; give {self.allowed}.{' ' + hint if hint else ''}") from None


def _parameter(name: str, hint: Any, default: Any) -> Parameter:
    marks: tuple[Any, ...] = hint.__metadata__ if get_origin(hint) is Annotated else ()
    plain = hint.__origin__ if marks else hint
    per_class = any(isinstance(m, PerClass) for m in marks)
    said = next((m.description for m in marks if isinstance(m, FieldInfo) and m.description), None)
    if per_class:
        annotation: Any = list[_Weight] | dict[str, _Weight] | Literal["balanced"] | None
        said = said or "a list of one number from 0 up a class, a mapping from class names to such numbers, or balanced"
    else:
        annotation = Annotated[plain, *[m for m in marks if isinstance(m, FieldInfo)]] if marks else plain
    if get_origin(plain) is Literal:
        annotation = plain
        said = said or "one of " + ", ".join(str(c) for c in get_args(plain))
    return Parameter(
        name=name,
        annotation=annotation,
        default=default,
        allowed=said or f"a value of type {getattr(plain, '__name__', plain)}",
        schedulable=any(isinstance(m, Schedulable) for m in marks),
        per_class=per_class,
        layer=next((m for m in marks if isinstance(m, Layer)), None),
    )


@dataclass(frozen=True)
class LossEntry:
    """One row of the table of losses.

    name: what a recipe writes. function: a pure function (tensors, *, parameters) -> (N,), or a module class whose instances have that call
    and which is built as ``function(student_shape, teacher_shape, *, parameters)``, shapes being those of the captured features, batch
    first. reads: the tensors it takes, in order. per_item: one value an item that depends on that item alone, so that its gradient does not
    depend on how a step is cut; False for a relational loss, whose values have the published scalar as their mean.
    zero_at: parameters under which the loss is 0 where student and teacher agree; None where it is not. near_zero: how far above 0 a published
    constant keeps it there. below_zero: whether its values may be negative, as those of a likelihood. shift_invariant: a constant added
    to all logits of an item changes nothing. hard_labels: each label must be one class, so that labels blended by mixup are refused.
    sparse: the same loss on sparse teacher logits, an unbiased estimate of it at the temperature that they are of; None where such logits would
    bias it. fits: (student_shape, teacher_shape, parameters) of the features, batch first -> what to do where the loss cannot compare them, ""
    where it can; modules say so themselves. sequences: it takes features by token, (N, T, D), whole, and counts samples. layers: how the loss
    was published for several pairs of layers, the mean or the sum of theirs, or ``together``: it is a module that is built from, and called with, a
    list of the student's and a list of the teacher's, from the first stage to the last; None where a term compares one pair. but_last: published
    without the last pair. exits: a module that makes logits of a layer of the student, built as ``function(student_shape, classes, *, parameters)``.
    also_at_one: it reads the teacher's probabilities at temperature 1 too. own_views: models beside the student see each sample in views of their
    own. part: what of a layer it reads, where that is not its output (:data:`limbeck.types.QKV`). weight: the authors', beside cross entropy at
    1; 1 where they give none. example: a term's parameters, for listings and tests. summary: a sentence on what it compares, and one on when that
    helps. source: where it was published. cost: the work of one step beside the models' own, in N items, C classes, D features.

    Where a loss is a function of features, the paths of their layers, ``student`` and ``teacher``, are parameters of the recipe that the
    function itself never sees.
    """

    name: str
    function: Callable[..., Any]
    reads: tuple[Reads, ...]
    per_item: bool
    zero_at: Mapping[str, Any] | None
    shift_invariant: bool
    summary: str
    source: str
    cost: str = ""
    weight: float = 1.0
    example: Mapping[str, Any] = field(default_factory=dict)
    sparse: Callable[..., Any] | None = None
    near_zero: float = 0.0
    below_zero: bool = False
    hard_labels: bool = False
    fits: Callable[[Shape, Shape, Mapping[str, Any]], str] | None = None
    sequences: bool = False
    layers: Literal["mean", "sum", "together"] | None = None
    but_last: bool = False
    part: str = ""
    own_views: bool = False
    exits: bool = False
    also_at_one: bool = False

    @property
    def remembers(self) -> bool:
        """Whether it is told of each optimiser step."""
        return "samples" in self.reads or "average.logits" in self.reads

    @property
    def self_taught(self) -> bool:
        """Whether it teaches without a teacher: by peers, or by the student's own layers."""
        return "peers.logits" in self.reads or "average.logits" in self.reads or (self.exits and "teacher.logits" not in self.reads)

    @property
    def learned(self) -> bool:
        """Whether it is a module with parameters, to be built from shapes."""
        return isinstance(self.function, type) and issubclass(self.function, nn.Module)

    @property
    def compares(self) -> str:
        """The first sentence of the summary."""
        return self.summary.partition(". ")[0] + "."

    @property
    def helps(self) -> str:
        """The rest of the summary: when to use it."""
        return self.summary.partition(". ")[2]

    @property
    def needs(self) -> str:
        """What a run must have for it, in words."""
        which = "a layer of a transformer" if self.part else "a layer"
        sides = " and of the teacher" * ("teacher.features" in self.reads)
        layers = [f"{which} of the student{sides}"] * ("student.features" in self.reads)
        logits = ["the teacher's logits"] * ("teacher.logits" in self.reads)
        peers = ["students beside it"] * ("peers.logits" in self.reads)
        peers += ["an average of the student"] * ("average.logits" in self.reads)
        labels = ["one label a sample" if self.hard_labels else "labels"] * ("labels" in self.reads)
        batch = ["several samples at once"] * (not self.per_item)
        return ", ".join([*layers, *logits, *peers, *labels, *batch])

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """What a recipe may set, by name, in the order of the signature."""
        signed: Any = self.function
        hints = get_type_hints(signed.__init__ if self.learned else signed, include_extras=True)
        keywords = [p for p in inspect.signature(self.function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        own = {p.name: _parameter(p.name, hints[p.name], p.default) for p in keywords}
        paths: dict[str, Parameter] = {}
        if not self.learned and "student.features" in self.reads:
            paths = {side: _parameter(side, Annotated[str, Path, Layer(side)], inspect.Parameter.empty) for side in _SIDES}
        found = {**paths, **own}
        if self.layers is None:
            return found
        sides = [p for p in found.values() if p.layer is not None]
        each = "pair by pair; the loss" if len(sides) > 1 else "an exit on each; the loss"
        more = "from the first stage to the last" if self.layers == "together" else f"{each} is then the {self.layers}"
        several = {
            name: replace(p, annotation=_Several, allowed=f"{p.allowed}, or a list of them, {more}")
            for name, p in found.items()
            if p.layer is not None
        }
        said = "auto, in place of student and teacher: the same stages of CNNs, evenly spaced layers of transformers"
        if self.exits:
            said = "auto, in place of student: the stages of a CNN, four evenly spaced layers of a transformer"
            said += ", without the last one" * self.but_last
        auto = Parameter("layers", Literal["auto"] | None, None, said, schedulable=False, per_class=False, layer=None)
        return {**several, auto.name: auto, **{name: p for name, p in found.items() if name not in several}}

    def paths(self, values: Mapping[str, Any]) -> dict[Literal["student", "teacher"], tuple[str, ...]]:
        """What a term with these parameters reads of each model, as it is captured, pair by pair; of ``layers: auto`` the word alone."""
        found: dict[Literal["student", "teacher"], tuple[str, ...]] = {}
        for name, parameter in self.parameters.items():
            if parameter.layer is not None:
                given = AUTO if values.get("layers") == AUTO else values[name]
                each = [given] if isinstance(given, str) else given
                found[parameter.layer.side] = tuple(f"{path}:{self.part}" if self.part and path != AUTO else path for path in each)
        return found


_SIDES: tuple[Literal["student", "teacher"], ...] = ("student", "teacher")


# --- what features a loss can compare; each says what to do where it cannot ---


def of_samples(student: Shape, teacher: Shape, values: Mapping[str, Any] = MappingProxyType({})) -> str:
    """One vector or map a sample, of any two sizes."""
    fit = all(len(shape) in (2, 4) for shape in (student, teacher))
    return "" if fit else "Choose layers that give one vector (B, D) or one map (B, channels, height, width) a sample."


def of_maps(student: Shape, teacher: Shape, values: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Maps of any two sizes."""
    fit = len(student) == len(teacher) == 4
    return "" if fit else "Choose layers that give maps (B, channels, height, width) on both sides."
