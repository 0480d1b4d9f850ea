"""Terms -> one scalar: the weighted sum of losses, and the only division in the project.

A loss gives one value an item; the objective selects the items, sums their values, and divides by the number of that term's items in the
whole optimiser step. The sum over the microbatches (and ranks) of a step is then the loss of the step, however it was cut.

A relational loss (``LossEntry.per_item`` False) compares the items of a batch with each other, and the mean of its values is the published scalar.
It sees the items of one microbatch, and on several ranks those of all of them (``gather``). Each rank takes the values of its own items into its
share, so the shares add up as ever, and N ranks give what one process gives for the same step. Accumulation still cuts what is compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from limbeck.errors import Problem, UsageError, listed, nearest
from limbeck.losses import AUTO, LOSSES, LossEntry, MeanTeacher, Parameter, Peers, Population, raised, shaped
from limbeck.randomness import forked
from limbeck.recipe import Schedule, Term
from limbeck.types import Batch, Needs, Outputs, Signal

__all__ = ["Objective", "Rows", "Selection", "StagedObjective", "check_terms", "needs_of", "temperatures_of", "value_at", "with_pairs"]

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of captured features by module path, batch first."""

Weight = float | Schedule | Literal["auto"]

KEPT = 0.7
"""Of the logarithm of a weight that is balanced, at each measurement after the first."""

Chosen = np.ndarray[Any, np.dtype[np.bool_]]

Gather = Callable[[Sequence[Tensor]], tuple[list[Tensor], slice]]
"""Tensors of this rank's items -> of the items of all ranks, and where its own stand in them (:meth:`limbeck.ranks.Ranks.gather`)."""

Rows = Mapping[str, tuple[Tensor, ...] | None]
"""By term, where its items stand in a microbatch: the indices in each dimension, or None where everything counts."""


@dataclass(frozen=True)
class Selection:
    """Which items of a step each term counts.

    It is found on the CPU, before the step is cut and sent: on the device, the number of chosen rows would have to be read back.
    chosen: bool, (B,) by sample or (B, T) by token. counts: how many of them.
    """

    chosen: Mapping[str, Chosen]
    counts: Mapping[str, int]

    def rows(self, start: int, stop: int, device: torch.device) -> Rows:
        """Of the microbatch ``start .. stop - 1``, on its device."""
        return {
            name: None if self.counts[name] == chosen.size else _rows(chosen[start:stop], device) for name, chosen in self.chosen.items()
        }


def _rows(chosen: Chosen, device: torch.device) -> tuple[Tensor, ...] | None:
    if chosen.all():
        return None
    return tuple(torch.from_numpy(at).to(device, non_blocking=True) for at in chosen.nonzero())


def value_at(value: Weight, progress: float) -> float:
    """The value at ``progress`` (0 at the first optimiser step of a fit, 1 at its end) of a number or of a schedule.

    >>> value_at(Schedule(start=1.0, end=0.0, until=0.5), 0.25), value_at(Schedule(start=1.0, end=0.0, until=0.5), 0.9)
    (0.5, 0.0)
    """
    if isinstance(value, str):
        raise ValueError("a weight that is found by measuring is no function of the progress")
    if isinstance(value, float | int):  # asked first: pydantic's models answer isinstance in Python
        return float(value)
    done = min(max(progress / value.until, 0.0), 1.0)
    if value.shape == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return value.start * (1 - done) + value.end * done


def check_terms(terms: Sequence[Term]) -> list[Problem]:
    """Everything that is wrong with an objective and can be told without data or models; an empty list where nothing is.

    ``where`` is ``objective.i.key``.
    """
    if not terms:
        return [
            Problem(
                "objective", "has no term; give at least one.", "Example: [{loss: kd, weight: 0.7}, {loss: cross_entropy, weight: 0.3}]."
            )
        ]
    problems: list[Problem] = []
    if all(term.weight == AUTO or _peak(term.weight) == 0 for term in terms) and any(term.weight == AUTO for term in terms):
        first = next(i for i, term in enumerate(terms) if term.weight == AUTO)
        text = "is auto, and there is no term with a number above 0 as its weight for it to be balanced against."
        problems.append(Problem(f"objective.{first}.weight", text, "Give cross_entropy or kd a number."))
    for i, term in enumerate(terms):
        problems += [replace(p, where=f"objective.{i}.{p.where}") for p in _check_weight(term.weight) + _read_parameters(term)[1]]
    if all(_peak(term.weight) == 0 for term in terms):
        problems.append(Problem("objective", "every weight is 0, so nothing would be learned; give one term a weight above 0."))
    return problems


def needs_of(terms: Sequence[Term]) -> tuple[Needs, Needs]:
    """What the terms ask of the student and of the teacher (``Needs(logits=False)`` of a teacher that nobody asks).

    The student's logits are always asked for. Paths come in the order of the terms, without repeats; ``auto`` stands for those of a term whose
    pairs are not found yet (:func:`with_pairs`). Terms must pass :func:`check_terms`.
    """
    paths: dict[str, dict[str, None]] = {"student": {}, "teacher": {}}
    logits = False
    for term in terms:
        entry = LOSSES[term.loss]
        logits = logits or "teacher.logits" in entry.reads
        for side, each in entry.paths(term.model_extra or {}).items():
            paths[side] |= dict.fromkeys(each)
    return Needs(features=tuple(paths["student"])), Needs(logits=logits, features=tuple(paths["teacher"]))


def temperatures_of(terms: Sequence[Term]) -> list[float | str]:
    """The temperatures at which terms read a teacher's logits, each once: 1 where a loss has none, "a schedule" where it changes.

    >>> temperatures_of([Term(loss="kd", temperature=2.0), Term(loss="mse_logits"), Term(loss="cross_entropy")])
    [2.0, 1.0]
    """
    found: dict[float | str, None] = {}
    for term in terms:
        entry = LOSSES[term.loss]
        if "teacher.logits" in entry.reads and term.weight != 0:
            own = entry.parameters.get("temperature")
            given = (term.model_extra or {}).get("temperature", 1.0 if own is None else own.default)
            found["a schedule" if isinstance(given, Mapping | Schedule) else float(given)] = None
            if entry.also_at_one:
                found[1.0] = None
    return list(found) or [1.0]


def with_pairs(terms: Sequence[Term], pairs: Sequence[tuple[str, str]], exits: Sequence[str] = ()) -> list[Term]:
    """The terms, with these pairs of layers (student's, teacher's) in place of ``layers: auto``; exits: the student's layers that get one.

    >>> with_pairs([Term(loss="patient", layers="auto")], [("a", "c"), ("b", "d")])
    [Term(loss='patient', weight=1.0, student='a', teacher='c')]
    """
    found = []
    for term in terms:
        values = dict(term.model_extra or {})
        if values.get("layers") == AUTO:
            del values["layers"]
            known: Sequence[tuple[str, ...]] = [(path,) for path in exits] if LOSSES[term.loss].exits else pairs
            chosen = known[:-1] if LOSSES[term.loss].but_last and len(known) > 1 else known
            for side, each in zip(("student", "teacher"), zip(*chosen, strict=True), strict=False):
                values[side] = each[0] if len(each) == 1 else list(each)
            term = Term.model_validate({"loss": term.loss, "weight": term.weight, **values})
        found.append(term)
    return found


class Objective(nn.Module):
    """The weighted sum of the terms of a recipe; holds the parameters of its losses (projections), which the export never sees.

    Build it with :meth:`build` or :meth:`baseline`, and move it to the device and dtype of the student.
    ``names`` are the losses' names (``kd``, and ``kd.2`` for a second one); ``needs_teacher``, ``student_needs`` and ``teacher_needs`` say
    what it asks of the models; ``per_item`` is False where the gradient depends on how a step is cut into microbatches: a relational loss,
    or a projection with batch statistics. ``relational``: whether it is by a relational loss. ``balanced`` are the names of the terms with
    ``weight: auto``, and ``balance`` their weights now (1 before the first measurement).
    """

    balance: Tensor

    def __init__(self, terms: Sequence[_Term]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)
        self._each = tuple(terms)
        views = 0
        for term in terms:
            term.first_view = views
            views += term.beside if term.entry.own_views else 0
        self.names = tuple(t.name for t in terms)
        self.student_needs, self.teacher_needs = needs_of([t.term for t in terms])
        self.needs_teacher = self.teacher_needs.logits or bool(self.teacher_needs.features)
        self.per_item = all(t.per_item for t in terms)
        self.relational = any(t.relational for t in terms)
        self.balanced = tuple(t.name for t in terms if t.term.weight == AUTO)
        if self.balanced:  # a checkpoint holds them
            self.register_buffer("balance", torch.ones(len(self.balanced)))

    @classmethod
    def build(
        cls,
        terms: Sequence[Term],
        *,
        classes: Sequence[str],
        label_counts: Sequence[int] | np.ndarray[Any, Any],
        shapes_student: Shapes | None = None,
        shapes_teacher: Shapes | None = None,
        population: Population | None = None,
        peers: Sequence[Any] = (),
        student: Any = None,
        seed: int = 0,
    ) -> Objective:
        """The objective of a recipe's terms.

        classes: names in the order of the logits. label_counts: (C,), labelled training items of each class, for ``class_weights:
        balanced``. shapes_*: what :func:`needs_of` asked to capture, batch first. population: the training rows, for losses that read
        samples. peers: models that learn beside the student, for losses that read those.
        student: the model itself, with its initial weights, for losses that keep an average of it.
        seed: of the initial projections, and of what is drawn. Raises UsageError with all problems.
        """
        problems = check_terms(terms)
        if problems:
            raise UsageError(problems)
        built: list[_Term] = []
        for i, term in enumerate(terms):
            earlier = sum(t.loss == term.loss for t in terms[:i])
            name = term.loss if not earlier else f"{term.loss}.{earlier + 1}"
            values, _ = _read_parameters(term)
            try:
                for parameter in LOSSES[term.loss].parameters.values():
                    if parameter.per_class and values.get(parameter.name) is not None:
                        values[parameter.name] = _per_class(parameter.name, values[parameter.name], classes, label_counts)
                with forked(seed, "objective", name):
                    built.append(
                        _Term(
                            name, term, values, shapes_student or {}, shapes_teacher or {}, population, seed, len(classes), peers, student
                        )
                    )
            except UsageError as error:
                problems += [replace(p, where=f"objective.{i}.{p.where}") for p in error.problems]
        if problems:
            raise UsageError(problems)
        return cls(built)

    @classmethod
    def baseline(cls, terms: Sequence[Term], *, classes: Sequence[str], label_counts: Sequence[int] | np.ndarray[Any, Any]) -> Objective:
        """What the baseline of a recipe learns from: the parameters of its (first) cross entropy term, at weight 1, and no teacher."""
        found = next((t for t in terms if t.loss == "cross_entropy"), Term(loss="cross_entropy"))
        return cls.build([found.model_copy(update={"weight": 1.0})], classes=classes, label_counts=label_counts)

    def at(self, stage: int) -> Objective:
        """The objective of a stage: the same one in all of them (see :class:`StagedObjective`)."""
        return self

    def weights(self, progress: float) -> dict[str, float]:
        """Each term's weight at ``progress``, for the log."""
        balance = dict(zip(self.balanced, self.balance.tolist(), strict=True)) if self.balanced else {}
        return {t.name: balance[t.name] if t.name in balance else value_at(t.term.weight, progress) for t in self._each}

    def stepped(self, keep: bool = True) -> None:
        """Tell the losses with a memory that an optimiser step is over; keep: False that what they have seen since the last one was no step."""
        for loss in self.remembering():
            loss.stepped(keep)

    def follow(self, student: nn.Module) -> None:
        """Tell the losses that keep an average of the student whom to follow."""
        for loss in self.remembering():
            if isinstance(loss, MeanTeacher):
                loss.follow(student)

    def peers(self) -> list[Any]:
        """The models that learn beside the student."""
        return [model for term in self._each if isinstance(term.loss, Peers) for model in term.loss.models]

    def remembering(self) -> list[Any]:
        """The losses that are told of each step."""
        found = [term.loss for term in self._each if term.entry.remembers]
        return [one for loss in found for one in (loss if isinstance(loss, nn.ModuleList) else [loss])]

    def rebalance(self, number: int, ratio: Tensor, *, first: bool) -> None:
        """A measurement of the weight that balances ``balanced[number]``: taken as it is at first, later into a geometric mean with those before.

        ratio: 0-dim, where the buffer is. One that is not above 0 and finite (a term without gradient, an overflow in half precision) leaves
        the weight as it was.
        """
        before, ratio = self.balance[number], ratio.to(self.balance.dtype)
        # 1 stands for what was not measured yet: where a gradient was still zero at first, the first one that is not decides
        wanted = ratio if first else torch.where(before == 1, ratio, before**KEPT * ratio ** (1 - KEPT))
        self.balance[number] = torch.where(ratio.isfinite() & (ratio > 0), wanted, before)

    def select(self, batch: Batch) -> Selection:
        """The items of each term in a batch: valid samples, labelled samples, or valid tokens of valid samples.

        Called on the whole step, before it is cut or moved to a device; with several ranks, the counts are summed over them.
        """
        kinds: dict[tuple[bool, bool], tuple[Chosen, int]] = {}  # most terms count the same items
        for t in self._each:
            if t.counted not in kinds:
                found = t.selection(batch)
                kinds[t.counted] = found, int(np.count_nonzero(found))
        return Selection({t.name: kinds[t.counted][0] for t in self._each}, {t.name: kinds[t.counted][1] for t in self._each})

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many items each term has in a batch."""
        return dict(self.select(batch).counts)

    def forward(
        self,
        student: Outputs,
        teacher: Signal | None,
        batch: Batch,
        *,
        progress: float,
        counts: Mapping[str, int],
        rows: Rows | None = None,
        gather: Gather | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The part that one microbatch has in the loss of its step, and each term's unweighted, detached part for the log.

        Returns ``sum over terms of weight(progress) * sum of values / counts[term]``; a term without items is a differentiable 0. The sums
        over a step's microbatches are the step's loss and each term's mean over its items. counts: of the whole step. rows: of this
        microbatch, where :meth:`select` has found them; else they are found here, from the batch. gather: on several ranks, for relational losses.
        Runs outside autocast, so that every loss is computed in at least float32.
        """
        fixed, apart, parts = self.apart(student, teacher, batch, progress=progress, counts=counts, rows=rows, gather=gather)
        return self.joined(fixed, apart), parts

    def joined(self, fixed: Tensor, apart: Mapping[str, Tensor]) -> Tensor:
        """The sum of the terms with a weight of their own, and of those with ``weight: auto`` (:meth:`apart`) at their weights now."""
        for weight, value in zip(self.balance if self.balanced else (), apart.values(), strict=True):
            fixed = fixed + (value * weight).to(fixed.dtype)
        return fixed

    def apart(
        self,
        student: Outputs,
        teacher: Signal | None,
        batch: Batch,
        *,
        progress: float,
        counts: Mapping[str, int],
        rows: Rows | None = None,
        gather: Gather | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """As :meth:`forward`, with the terms at ``weight: auto`` apart: the sum of the others, each of those by name, without a weight, and the parts
        for the log."""
        parts: dict[str, Tensor] = {}
        apart: dict[str, Tensor] = {}
        if rows is None:
            rows = self.select(batch).rows(0, len(batch), student.logits.device)
        total: Tensor | None = None
        read = False
        within = torch.is_autocast_enabled(student.logits.device.type)
        with torch.autocast(student.logits.device.type, enabled=False) if within else nullcontext():
            for term in self._each:
                count = max(counts[term.name], 1)
                summed = term.of(student, teacher, batch, progress, rows[term.name], gather).sum()
                parts[term.name] = summed.detach() / count
                if term.term.weight == AUTO:
                    apart[term.name] = summed / count
                    read = read or term.of_logits
                    continue
                weight = value_at(term.term.weight, progress)
                if weight:  # at weight 0 an infinite value must not become NaN
                    total = summed * (weight / count) if total is None else total.add(summed, alpha=weight / count)
                    read = read or term.of_logits
        if not read:  # the head has a gradient of zero all the same, and not none: weight decay goes on
            nothing = raised(student.logits[:0]).sum()
            total = nothing if total is None else total + nothing
        assert total is not None
        return total, apart, parts


class StagedObjective(nn.Module):
    """The objectives of the stages of a fit, all of them there from the start: what is asked of the models, and the parameters, are those of all.

    Stages with the same terms have the same objective. A projection goes on from stage to stage where a term of the same name and parameters (its
    weight aside) has one of the same shapes; its initial values are a function of (seed, name) as ever, so the order of the stages does not matter.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self._stages = tuple(objectives)
        self.stages = nn.ModuleList(dict.fromkeys(objectives))
        terms = [t for objective in dict.fromkeys(objectives) for t in objective._each]
        kept: dict[Any, Any] = {}
        for term in terms:
            if term.entry.learned:
                own = json.dumps(term.term.model_dump(mode="json", exclude={"weight"}), sort_keys=True)
                shapes = tuple((name, tuple(value.shape)) for name, value in term.loss.state_dict().items())
                term.loss = kept.setdefault((term.name, own, shapes), term.loss)
        self.student_needs, self.teacher_needs = needs_of([t.term for t in terms])
        self.per_item = all(t.per_item for t in terms)
        self.relational = any(t.relational for t in terms)

    def at(self, stage: int) -> Objective:
        """The objective of a stage."""
        return self._stages[stage]

    def stepped(self, keep: bool = True) -> None:
        """As :meth:`Objective.stepped`, each loss once."""
        for loss in dict.fromkeys(self.remembering()):
            loss.stepped(keep)

    def follow(self, student: nn.Module) -> None:
        """As :meth:`Objective.follow`, in all stages."""
        for stage in self._stages:
            stage.follow(student)

    def peers(self) -> list[Any]:
        """As :meth:`Objective.peers`: those of one stage are those of any that has some."""
        return next((found for stage in self._stages if (found := stage.peers())), [])

    def remembering(self) -> list[Any]:
        """As :meth:`Objective.remembering`, of all stages."""
        return [loss for stage in self._stages for loss in stage.remembering()]


class _Term(nn.Module):
    """One term: its loss, its parameters, and the selection of its items."""

    def __init__(
        self,
        name: str,
        term: Term,
        values: dict[str, Any],
        shapes_student: Shapes,
        shapes_teacher: Shapes,
        population: Population | None,
        seed: int,
        classes: int,
        peers: Sequence[Any],
        student: Any,
    ) -> None:
        super().__init__()
        self.name, self.term = name, term
        self.first_view = 0  # of the batch's others
        self.entry = LOSSES[term.loss]
        self.layers = self.entry.paths(term.model_extra or {})
        self.of_labels = "labels" in self.entry.reads
        self.of_logits = "student.logits" in self.entry.reads
        self._compares = self.of_logits and "teacher.logits" in self.entry.reads
        shapes: Mapping[str, Shapes] = {"student": shapes_student, "teacher": shapes_teacher}
        missing = [
            Problem(side, f"no shape is known for layer '{p}'.", nearest(p, shapes[side]))
            for side, each in self.layers.items()
            for p in each
            if p not in shapes[side]
        ]
        if missing:
            raise UsageError(missing)
        pairs: list[dict[Literal["student", "teacher"], str]] = [
            dict(zip(self.layers, each, strict=True)) for each in zip(*self.layers.values(), strict=True)
        ]
        features = [[shapes[side][p] for side, p in pair.items()] for pair in pairs]
        by_token = {not self.entry.sequences and any(len(s) == 3 for s in feature) for feature in features}
        if len(by_token) > 1:
            gives = "; ".join(_gives(pair, shapes) for pair in pairs)
            text = f"some of these are by token, and all pairs of a term must count the same items: {gives}."
            raise UsageError(Problem("student", text, "Give two terms."))
        self.tokens = any(by_token)
        named = {p.name: p.layer.side for p in self.entry.parameters.values() if p.layer is not None}
        plain = {key: value for key, value in values.items() if key not in named and key != "layers"}
        self.values: dict[str, Any] = {}
        self._population, self._seed = population, seed
        rows: list[int] = [classes] if self.entry.exits else []
        if "samples" in self.entry.reads:
            if population is None:
                raise ValueError(f"{name} reads samples, and the training rows were not given")
            rows = [len(population)]
        self.together = self.entry.layers == "together"
        if self.together:
            by_side = {side: list(each) for side, each in self.layers.items()}
            joint: Any = [[shapes[side][path] for path in each] for side, each in by_side.items()]
            self.loss: Any = self.entry.function(*joint, **{name: by_side[side] for name, side in named.items()}, **plain)
            pairs = pairs[:1]
        elif "peers.logits" in self.entry.reads:
            self.loss = self.entry.function(peers, **plain)
        elif "average.logits" in self.entry.reads:
            self.loss = self.entry.function(student, **plain)
        elif self.entry.learned:
            each = [
                self.entry.function(*feature, *rows, **{name: pair[side] for name, side in named.items()}, **plain)
                for pair, feature in zip(pairs or [{}], features or [[]], strict=True)
            ]
            self.loss = each[0] if len(each) == 1 else nn.ModuleList(each)
        else:
            known = {p.name: p.default for p in self.entry.parameters.values()} | plain
            for pair, feature in zip(pairs, features, strict=True):
                advice = "" if self.entry.fits is None else self.entry.fits(feature[0], feature[1], known)
                if advice:
                    raise UsageError(Problem("student", f"{term.loss} cannot compare these: {_gives(pair, shapes)}.", advice))
            self.loss, self.values = self.entry.function, plain
        self.pairs = max(len(pairs), 1)
        self._schedules = {key: value for key, value in self.values.items() if isinstance(value, Schedule)}

    @property
    def per_item(self) -> bool:
        return self.entry.per_item and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules())

    @property
    def relational(self) -> bool:
        return not self.entry.per_item

    @property
    def beside(self) -> int:
        """How many models beside the student answer for it."""
        return len(self.loss.models) if isinstance(self.loss, Peers) else int(isinstance(self.loss, MeanTeacher))

    @property
    def counted(self) -> tuple[bool, bool]:
        """What decides about its items: whether only the labelled ones count, and whether they are tokens."""
        return self.of_labels, self.tokens

    def selection(self, batch: Batch) -> Chosen:
        """(B,) bool: the samples that count; (B, T) where the items are tokens."""
        samples: Chosen = batch.labelled if self.of_labels else batch.mask.numpy(force=True)
        if self.tokens and "attention_mask" in batch.student:
            tokens: Chosen = samples[:, None] & (batch.student["attention_mask"].numpy(force=True) != 0)
            return tokens
        return samples

    def of(
        self,
        student: Outputs,
        teacher: Signal | None,
        batch: Batch,
        progress: float,
        rows: tuple[Tensor, ...] | None,
        gather: Gather | None = None,
    ) -> Tensor:
        """(N,) values of the selected items: of several pairs of layers their mean or their sum, as was published."""
        now = {key: value_at(schedule, progress) for key, schedule in self._schedules.items()}
        each = [self._of_pair(n, {**self.values, **now}, student, teacher, batch, progress, rows, gather) for n in range(self.pairs)]
        if len(each) == 1:
            return each[0]
        summed = torch.stack(each).sum(0)
        return summed / len(each) if self.entry.layers == "mean" else summed

    def _of_pair(
        self,
        number: int,
        values: dict[str, Any],
        student: Outputs,
        teacher: Signal | None,
        batch: Batch,
        progress: float,
        rows: tuple[Tensor, ...] | None,
        gather: Gather | None,
    ) -> Tensor:
        by_token = self.tokens and "attention_mask" in batch.student
        items = batch.student["attention_mask"].shape if by_token else batch.mask.shape
        levels = range(len(self.layers["student"])) if self.together else [number]
        asked = [(what, n) for what in self.entry.reads for n in levels]
        tensors = [self._tensor(what, n, student, teacher, batch, progress) for what, n in asked]
        for (what, n), x in zip(asked, tensors, strict=True):
            if x.shape[: len(items)] != items:
                raise UsageError(_misfit(self.name, what, {side: each[n] for side, each in self.layers.items()}, x, items))
        if self._compares and tensors[0].shape != tensors[1].shape:
            raise UsageError(Problem(self.name, f"the student has {tensors[0].shape[-1]} classes and the teacher {tensors[1].shape[-1]}."))
        if rows is not None:
            tensors = [x[rows] for x in tensors]
        elif by_token:
            tensors = [x.flatten(0, 1) for x in tensors]
        own = slice(None)
        if self.relational and gather is not None:
            tensors, own = gather(tensors)
        if not len(tensors[0]):
            return raised(tensors[0]).flatten(1).sum(1)
        loss: Any = self.loss[number] if isinstance(self.loss, nn.ModuleList) else self.loss
        if not isinstance(tensors[-1], Tensor):
            loss = self.entry.sparse
        given = [tensors[i : i + len(levels)] for i in range(0, len(tensors), len(levels))] if self.together else tensors
        found: Tensor = loss(*given, **values)
        return found[own]

    def _tensor(self, what: str, number: int, student: Outputs, teacher: Signal | None, batch: Batch, progress: float) -> Any:
        """A tensor, or :class:`SparseLogits`, which is indexed like one; that the loss can use it was judged when the recipe was read."""
        if what == "labels":
            return batch.labels
        if what in ("peers.logits", "average.logits"):
            own = batch.others[self.first_view :] if self.entry.own_views else ()
            return self.loss.answers(own[: self.beside] or (batch.student,) * self.beside)
        if what == "samples":
            assert self._population is not None
            one: Any = self.loss[number] if isinstance(self.loss, nn.ModuleList) else self.loss
            # no two steps of a fit have the same progress
            drawn = self._population.drawn(batch.ids, one.negatives, self._seed, self.name, number, float(progress).hex())
            return torch.from_numpy(drawn).to(batch.labels.device, non_blocking=True)
        if what == "mask":
            tokens = student.features[self.layers["student"][number]]
            return batch.student.get("attention_mask", tokens.new_ones(tokens.shape[:2]))
        kind = what.partition(".")[2]
        side: Literal["student", "teacher"] = "student" if what.startswith("student") else "teacher"
        given = student if side == "student" else teacher
        if teacher is not None and teacher.sparse is not None and what == "teacher.logits":
            return teacher.sparse
        found = None if given is None else given.logits if kind == "logits" else given.features[self.layers[side][number]]
        if found is None:
            raise ValueError(f"{self.name} reads {what}, which was not given")
        return found


def _gives(pair: Mapping[Literal["student", "teacher"], str], shapes: Mapping[str, Shapes]) -> str:
    return ", ".join(f"layer '{p}' of the {side} gives {shaped(shapes[side][p])}" for side, p in pair.items())


def _misfit(name: str, what: str, layers: Mapping[str, str], x: Tensor, wanted: tuple[int, ...]) -> Problem:
    side = what.split(".")[0]
    where = f"layer '{layers[side]}' of the {side}" if side in layers and what.endswith("features") else what
    items = "tokens of the student's own tokenizer" if len(wanted) == 2 else "samples"
    message = f"{where} gives {tuple(x.shape)} where one row for each of {tuple(wanted)} {items} is needed."
    return Problem(
        name, message, "Choose a layer that gives (B, T, D) on the same tokens, or one that gives (B, D)." if len(wanted) == 2 else ""
    )


def _peak(value: Weight) -> float:
    if isinstance(value, str):
        return math.inf
    return max(abs(value.start), abs(value.end)) if isinstance(value, Schedule) else abs(float(value))


def _check_weight(weight: Weight) -> list[Problem]:
    if isinstance(weight, str):
        return []
    given = {"weight.start": weight.start, "weight.end": weight.end} if isinstance(weight, Schedule) else {"weight": weight}
    return [
        Problem(where, f"{value!r} is not allowed; give a number from 0 up.")
        for where, value in given.items()
        if not (value >= 0 and math.isfinite(value))
    ]


def _read_parameters(term: Term) -> tuple[dict[str, Any], list[Problem]]:
    """The parameters that a term gives, as its loss takes them, and what is wrong with them."""
    entry = LOSSES.get(term.loss)
    if entry is None:
        return {}, [Problem("loss", f"there is no loss '{term.loss}'; there are {listed(list(LOSSES))}.", nearest(term.loss, LOSSES))]
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in (term.model_extra or {}).items():
        parameter = entry.parameters.get(key)
        if parameter is None:
            allowed = [*entry.parameters, "weight"]
            problems.append(Problem(key, f"'{term.loss}' has no parameter '{key}'; it has {listed(allowed)}.", nearest(key, allowed)))
        elif parameter.schedulable and isinstance(value, Mapping | Schedule):
            values[key], found = _read_schedule(parameter, value)
            problems += found
        else:
            try:
                values[key] = parameter.read(value)
            except ValueError as error:
                problems.append(Problem(key, str(error)))
    auto = (term.model_extra or {}).get("layers") == AUTO and "layers" in entry.parameters
    for name, parameter in entry.parameters.items():
        given = name in (term.model_extra or {})
        if auto and given and parameter.layer is not None:
            problems.append(Problem(name, "is chosen by layers: auto, and given too.", "Leave one of the two out."))
        elif parameter.required and not given and not (auto and parameter.layer is not None):
            problems.append(Problem(name, f"'{term.loss}' needs it: {parameter.allowed}."))
    return values, problems or _unpaired(entry, values)


def _unpaired(entry: LossEntry, values: Mapping[str, Any]) -> list[Problem]:
    """Lists of layers of student and teacher that are not of one length."""
    counts = {
        p.name: 1 if isinstance(values[p.name], str) else len(values[p.name])
        for p in entry.parameters.values()
        if p.layer is not None and p.name in values
    }
    if len(set(counts.values())) < 2:
        return []
    (first, ours), (second, theirs) = counts.items()
    text = f"has {theirs} layer{'s' * (theirs != 1)}, and {first} has {ours}; they are compared pair by pair, in order."
    return [Problem(second, text, "Give as many of both, or layers: auto.")]


def _read_schedule(parameter: Parameter, value: Mapping[str, Any] | Schedule) -> tuple[Schedule | None, list[Problem]]:
    try:
        schedule = value if isinstance(value, Schedule) else Schedule.model_validate(dict(value))
    except ValidationError as error:
        return None, [
            Problem(
                ".".join([parameter.name, *(str(at) for at in e["loc"])]),
                f"{e['msg'][0].lower()}{e['msg'][1:]}.",
                "A schedule is {start: 4.0, end: 1.0, shape: linear or cosine, until: 0.5}.",
            )
            for e in error.errors()
        ]
    problems = []
    for end in ("start", "end"):
        try:
            parameter.read(getattr(schedule, end))
        except ValueError as error:
            problems.append(Problem(f"{parameter.name}.{end}", str(error)))
    return schedule, problems


def _per_class(where: str, value: Any, classes: Sequence[str], label_counts: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
    """(C,) float64 weights from a list, a mapping by class name (others get 1), or ``balanced``.

    Balanced is N / (C * n_c) for class c with n_c of the N labelled training items, where C counts the classes that occur; others get 0.
    """
    if isinstance(value, str):
        counts = torch.as_tensor(np.asarray(label_counts, dtype=np.float64))
        occurring = int((counts > 0).sum())
        if not occurring:
            raise UsageError(Problem(where, "balanced needs labelled training samples, and there are none."))
        return torch.where(counts > 0, counts.sum() / (occurring * counts.clamp(min=1)), 0.0)
    if isinstance(value, Mapping):
        names = [str(c) for c in classes]
        unknown = [
            Problem(where, f"there is no class '{k}'; there are {listed(names)}.", nearest(k, names)) for k in value if k not in names
        ]
        if unknown:
            raise UsageError(unknown)
        return torch.tensor([value.get(c, 1.0) for c in names], dtype=torch.float64)
    if len(value) != len(classes):
        raise UsageError(Problem(where, f"has {len(value)} numbers for {len(classes)} classes."))
    return torch.tensor(value, dtype=torch.float64)
