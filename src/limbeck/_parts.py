"""What the parts of a run are fed with: builders, plans, objectives and validation, from one recipe and one set of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from limbeck.data import (
    BatchBuilder,
    Data,
    Plan,
    Request,
    Several,
    Split,
    StagedBuilder,
    StagedPlan,
    augmentation,
    evaluation_requests,
    nested,
    same_inputs,
    token_lengths,
    view_keys,
)
from limbeck.engine import Engine
from limbeck.errors import Problem, UsageError
from limbeck.evaluate import metrics, predict
from limbeck.loop import Feed
from limbeck.losses import LOSSES, Population
from limbeck.models import Model, adapt_published, called_layers, probe_shapes, try_model, which_blocks
from limbeck.objective import Objective, StagedObjective, needs_of
from limbeck.randomness import order
from limbeck.ranks import ALONE, Ranks
from limbeck.recipe import Recipe, Stage, Term
from limbeck.types import Batch, ImagePreprocessing, Inputs, Preprocessing, TextPreprocessing

__all__ = ["Parts", "reads_unlabelled"]

EVALUATION_BATCH = 256
THROUGHPUT_BATCH = 64
PARITY_SAMPLES = 32
PROBE = 2
FEW = 16


class Parts:
    """One recipe on one set of data, for models that prepare their inputs as ``student`` and ``teacher`` say."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        student: Preprocessing,
        teacher: Preprocessing | Several | None,
        *,
        batch_statistics: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.data, self.student, self.teacher, self.ranks = recipe, data, student, teacher, ranks
        self.augment = augmentation(recipe.data.augment, data)
        # without augmentation every view of a sample is the same
        self.views = 1 if self.augment is None else recipe.views
        self.batch_statistics = batch_statistics  # of the model that is trained: a last batch of one sample is then left out
        self.build_peers: Callable[[int], list[Model]] = lambda seed: []
        self.shapes_student: list[dict[str, tuple[int, ...]]] = []  # of each stage
        self.shapes_teacher: dict[str, tuple[int, ...]] = {}

    @property
    def staged(self) -> list[Preprocessing]:
        """How the student wants its inputs in each stage."""
        return [self._at(stage) for stage in self.recipe.stages]

    def _at(self, stage: Stage) -> Preprocessing:
        wanted, size = self.student, stage.resolution
        if isinstance(wanted, ImagePreprocessing) and size is not None:
            return adapt_published(wanted, self.data, (size, size) if isinstance(size, int) else size)
        if isinstance(wanted, TextPreprocessing) and stage.max_length is not None:
            return replace(wanted, max_length=stage.max_length)
        return wanted

    def subset(self, stage: Stage, split: Split) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """The rows of a split that a stage visits; None: all."""
        return None if stage.fraction == 1 else nested(split.ids, stage.fraction, self.recipe.data.seed)

    @property
    def measured(self) -> int:
        """The stage in which memory and time are measured: of those with the largest inputs the one that visits most samples."""
        stages = list(zip(self.recipe.stages, self.staged, strict=True))
        keys = [(_size(wanted), stage.epochs * stage.fraction) for stage, wanted in stages]
        return keys.index(max(keys))

    @property
    def asking_epochs(self) -> list[tuple[int, Stage]]:
        """Every epoch of the run in which the teacher is needed, and its stage."""
        found: list[tuple[int, Stage]] = []
        first = 0
        for stage, terms in zip(self.recipe.stages, self.recipe.objectives, strict=True):
            _, needs = needs_of(terms)
            if needs.logits or needs.features:
                found += [(epoch, stage) for epoch in range(first, first + stage.epochs)]
            first += stage.epochs
        return found

    @property
    def unlabelled_too(self) -> bool:
        """Whether a loss learns from samples without a label, although no teacher is there."""
        return reads_unlabelled(self.recipe)

    @cached_property
    def label_counts(self) -> np.ndarray[Any, Any]:
        """``(C,)`` labelled training rows of each class."""
        labels = self.data.train.labels
        return np.bincount(labels[labels >= 0], minlength=len(self.data.classes))

    @cached_property
    def labelled(self) -> Split:
        """The training rows that have a label: what a baseline, or a teacher's own training, learns from."""
        rows = np.flatnonzero(self.data.train.labels >= 0)
        return self.data.train if len(rows) == len(self.data.train) else self.data.train.take(rows)

    def builder(
        self, split: Split, *, teacher: bool = False, training: bool = False, student: Preprocessing | None = None, others: int = 0
    ) -> BatchBuilder:
        dtype = torch.float64 if self.recipe.train.precision == "float64" else torch.float32
        return BatchBuilder(
            split,
            student=student or self.student,
            teacher=self.teacher if teacher else None,
            augment=self.augment if training else None,
            data_seed=self.recipe.data.seed,
            num_classes=len(self.data.classes),
            others=others,
            dtype=dtype,
        )

    def keys(self, split: Split, view: int, *, training: bool) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """``(N, 2)``: what the views of a split's rows are made of, by which a teacher's answers are kept."""
        return view_keys(split, self.augment if training else None, self.recipe.data.seed, view)

    def lengths(self, split: Split, preprocessing: Preprocessing | None = None) -> np.ndarray[Any, Any] | None:
        """Token counts of a split's rows, where batches are bucketed by them."""
        wanted = preprocessing or self.student
        return token_lengths(split, wanted) if isinstance(wanted, TextPreprocessing) else None

    def _plan(
        self,
        split: Split,
        number: int,
        rows: np.ndarray[Any, np.dtype[np.int64]] | None,
        *,
        first_epoch: int,
        batch_size: int,
        seed: int,
        total_steps: int | None = None,
    ) -> Plan:
        """The plan of one stage. total_steps: instead of its epochs."""
        return Plan(
            split,
            seed=seed,
            data_seed=self.recipe.data.seed,
            epochs=self.recipe.stages[number].epochs if total_steps is None else total_steps,
            batch_size=batch_size,
            views=self.views,
            lengths=self.lengths(split, self.staged[number]),
            drop_single=self.batch_statistics,
            total_steps=total_steps,
            rows=rows,
            first_epoch=first_epoch,
            stage=number,
        )

    def _builder(self, split: Split, *, teacher: bool, others: bool = False) -> Callable[[Request], Batch]:
        """Of every stage: one where all want the same inputs."""
        beside = [_others(self.recipe, terms) if others else 0 for terms in self.recipe.objectives]
        wanted = list(zip(self.staged, beside, strict=True))
        if all(one == wanted[0] for one in wanted):
            wanted = wanted[:1]
        each = [self.builder(split, teacher=teacher, training=True, student=inputs, others=count) for inputs, count in wanted]
        return each[0] if len(each) == 1 else StagedBuilder(each)

    def feed(
        self,
        recipe: Recipe,
        *,
        with_teacher: bool,
        ask: bool = False,
        others: bool = False,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> Feed:
        """What a student reads: all rows beside a teacher (or a loss that needs no labels), the labelled ones alone. ask: prepare the teacher's
        inputs too. others: and those of models that learn beside the student."""
        split = self.data.train if with_teacher or self.unlabelled_too else self.labelled
        plans: list[Plan] = []
        first = 0
        for number, stage in enumerate(recipe.stages):
            rows = self.subset(stage, split)
            plans.append(self._plan(split, number, rows, first_epoch=first, batch_size=recipe.train.batch_size, seed=recipe.seed))
            first += stage.epochs
        plan = StagedPlan(plans)
        return Feed(plan, self._builder(split, teacher=ask, others=others), plan.rounds, workers, pin_memory)

    def teacher_feed(self, beside: Feed) -> Feed:
        """What a teacher reads on ranks of its own: the rows of the students' feed, in its own preparation alone."""
        assert not isinstance(self.teacher, tuple)
        return replace(beside, builder=self.builder(self.data.train, training=True, student=self.teacher))

    def baseline_feed(self, recipe: Recipe, *, workers: int = 0, pin_memory: bool = False) -> Feed:
        """What the baseline reads: the labelled rows, in each stage for as many optimiser steps of the same size as the student reads beside its
        teacher."""
        taught = recipe.teacher is not None or self.unlabelled_too
        beside = self.feed(recipe, with_teacher=taught)
        plan = beside.plan
        if taught and self.labelled is not self.data.train:
            plans: list[Plan] = []
            first = 0
            for number, (own, stage) in enumerate(zip(beside.plan.plans, recipe.stages, strict=True)):
                steps, size = own.total_steps, min(recipe.train.batch_size, own.count)
                rows = self._labelled_of(stage)
                plans.append(
                    self._plan(self.labelled, number, rows, first_epoch=first, batch_size=size, seed=recipe.seed, total_steps=steps)
                )
                first += -(-steps * size // plans[-1].count)
            plan = StagedPlan(plans)
        return Feed(plan, self._builder(self.labelled, teacher=False), beside.rounds, workers, pin_memory)

    def _labelled_of(self, stage: Stage) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """Of the rows that a stage visits, those with a label, as rows of ``labelled``; None: all of these."""
        rows = self.subset(stage, self.data.train)
        if rows is None:
            return None
        there = np.zeros(len(self.data.train), dtype=bool)
        there[rows] = True
        return np.flatnonzero(there[self.data.train.labels >= 0]).astype(np.int64)

    def first_batch(self, recipe: Recipe, *, with_teacher: bool, ask: bool = False) -> Batch:
        """One microbatch of the first step of the stage that is measured; a few rows where their number is not known yet."""
        feed = self.feed(recipe, with_teacher=with_teacher, ask=ask, others=True)
        batch = feed.builder(feed.plan.request(feed.plan.starts[self.measured]))
        cut = recipe.train.accumulate
        return batch.part(0, min(FEW, len(batch)) if cut == "auto" else -(-len(batch) // cut))

    def widest_batch(self, recipe: Recipe, *, with_teacher: bool, ask: bool = False) -> Batch:
        """One rank's share of the step of an epoch that takes the most memory: with texts, the one of the most tokens, padding included."""
        feed = self.feed(recipe, with_teacher=with_teacher, ask=ask, others=True)
        plan = feed.plan.plans[self.measured]
        requests = [plan.request(step) for step in range(plan.steps_per_epoch)] if self.student.kind == "text" else [plan.request(0)]
        lengths = self.lengths(self.data.train if with_teacher or self.unlabelled_too else self.labelled, self.staged[self.measured])
        if lengths is not None:
            requests.sort(key=lambda request: len(request.rows) * int(lengths[request.rows].max()))
        size = self.ranks.size
        shares = [requests[-1].share(rank, size) for rank in range(size)]
        # the rows of a step are sorted by length: the last share has the longest ones
        return feed.builder([share for share in shares if share.counted][-1])

    def check_stages(self, student: Model) -> None:
        """Every stage has rows, for the baseline too, and inputs that the student can read.

        Raises: UsageError with all problems.
        """
        problems: list[Problem] = []
        own = self.student
        for number, stage in enumerate(self.recipe.train.stages or []):
            where = f"train.stages.{number}"
            kind = {"image": "images", "text": "texts"}.get(own.kind, "float arrays")
            for name, value, asked in (("resolution", stage.resolution, "image"), ("max_length", stage.max_length, "text")):
                if value is not None and own.kind != asked:
                    problems.append(Problem(f"{where}.{name}", f"has no effect on {kind}.", "Leave it out."))
            if isinstance(own, TextPreprocessing) and stage.max_length is not None and stage.max_length > own.max_length:
                text = f"is {stage.max_length}, and the student's texts are cut at {own.max_length} tokens where it is evaluated."
                problems.append(Problem(f"{where}.max_length", text, "Give data.max_length the length of the longest stage."))
            if isinstance(own, ImagePreprocessing) and stage.resolution is not None:
                try:
                    try_model(replace(student, preprocessing=self._at(stage)), f"{where}.resolution")
                except UsageError as e:
                    problems += [replace(p, hint="Choose another resolution.") for p in e.problems]
            if stage.fraction < 1:
                problems += self._few(stage, f"{where}.fraction")
        if problems:
            raise UsageError(problems)

    def _few(self, stage: Stage, where: str) -> list[Problem]:
        taught = self.recipe.teacher is not None or self.unlabelled_too
        split = self.data.train if taught else self.labelled
        rows = self.subset(stage, split)
        assert rows is not None
        whole = f"{stage.fraction:g} of {len(split):,} training rows"
        if self.batch_statistics and len(rows) < 2:
            return [Problem(where, f"{whole} is one, and the student has batch statistics, which cannot be taken of one sample.")]
        labelled = self._labelled_of(stage)
        if taught and self.recipe.baseline and labelled is not None and not len(labelled):
            text = f"{whole} has none with a label, and the baseline learns from labels."
            return [Problem(where, text, "Give a larger fraction, or baseline: false.")]
        return []

    def probe(self, student: Model, teacher: Model | None) -> None:
        """Find the shapes of the features that the objectives ask for; once, before anything is placed or trained.

        Layers that are named, and never called, are refused.
        """
        self._probe_blocks(student)
        staged = self.staged
        self.shapes_student = [{} for _ in staged]
        of_student, of_teacher = needs_of(self.recipe.terms)
        if not of_student.features and not of_teacher.features:
            return
        split = self.data.train.take(np.arange(min(PROBE, len(self.data.train))))
        [request] = evaluation_requests(split, PROBE)
        for number, (wanted, terms) in enumerate(zip(staged, self.recipe.objectives, strict=True)):
            needs = needs_of(terms)[0].features
            if needs:
                batch = self.builder(split, student=wanted)(request)
                self.shapes_student[number] = probe_shapes(student, _as(student, batch.student), needs)
        if teacher is not None:
            batch = self.builder(split, teacher=True)(request)
            if batch.teacher is not None:
                self.shapes_teacher = probe_shapes(teacher, _as(teacher, batch.teacher), of_teacher.features)
        for shapes, wanted, terms in zip(self.shapes_student, staged, self.recipe.objectives, strict=True):
            told = [self.shapes_teacher[path] for path in needs_of(terms)[1].features if path in self.shapes_teacher]
            if told:  # an exit compares no layers
                self._check_tokens([*shapes.values(), *told], wanted)
        tokens = next((s[1] for shapes in self.shapes_student for s in shapes.values() if len(s) == 3), None)
        if tokens is not None and isinstance(
            self.teacher, TextPreprocessing
        ):  # kept answers say how many there can be, not how many there were
            self.shapes_teacher = {p: (s[0], tokens, *s[2:]) if len(s) == 3 else s for p, s in self.shapes_teacher.items()}

    def _check_tokens(self, shapes: Sequence[tuple[int, ...]], wanted: Preprocessing) -> None:
        tokens = any(len(shape) == 3 for shape in shapes)
        if tokens and isinstance(wanted, TextPreprocessing) and isinstance(self.teacher, TextPreprocessing):
            ours, theirs = ((p.tokenizer_sha256, p.max_length) for p in (wanted, self.teacher))
            if ours != theirs:
                message = "a loss on features by token needs the same tokens on both sides, and the two models have different tokenizers"
                message += "." if ours[0] != theirs[0] else f" or lengths ({ours[1]} and {theirs[1]} tokens)."
                raise UsageError(
                    Problem("objective", message, "Choose layers that give one row a sample, (B, D), or models that share a tokenizer.")
                )

    def _probe_blocks(self, student: Model) -> None:
        """Blocks that are named to be computed again are computed at all."""
        if isinstance(self.recipe.train.gradient_checkpointing, bool):
            return
        split = self.data.train.take(np.arange(min(PROBE, len(self.data.train))))
        [request] = evaluation_requests(split, PROBE)
        called = called_layers(student, _as(student, self.builder(split)(request).student))
        silent = [name for name in which_blocks(student.module, self.recipe.train.gradient_checkpointing).names if name not in called]
        if silent:
            text = "is not called in the student's forward pass."
            raise UsageError([Problem("train.gradient_checkpointing", f"'{name}' {text}", "Leave it out.") for name in silent])

    def objective(self, seed: int, student: Model) -> Objective | StagedObjective:
        """The recipe's objective; projections are sized by :meth:`probe` and drawn from (seed, role), and so are peers.

        student: with its initial weights, for losses that keep an average of it."""
        read = any("peers.logits" in LOSSES[t.loss].reads for t in self.recipe.terms)
        peers = self._peers(seed) if read else []
        return self._staged(
            lambda number, terms: Objective.build(
                terms,
                classes=self.data.classes,
                label_counts=self.label_counts,
                shapes_student=self._shapes(number),
                shapes_teacher=self.shapes_teacher,
                population=self.population if any("samples" in LOSSES[t.loss].reads for t in terms) else None,
                peers=peers,
                student=student,
                seed=seed,
            )
        )

    def _peers(self, seed: int) -> list[Model]:
        """What learns beside the student. Raises: UsageError for one that does not read what the student reads."""
        peers = self.build_peers(seed)
        problems = [
            Problem(
                f"student.peers.{number}",
                "prepares its inputs in another way than the student (resolution, normalisation or tokenizer), and a peer reads the student's.",
                "Choose models of one kind, e.g. without pretrained weights.",
            )
            for number, peer in enumerate(peers)
            if not same_inputs(self.student, peer.preprocessing)
        ]
        if problems:
            raise UsageError(problems)
        return peers

    @cached_property
    def population(self) -> Population:
        """The training rows, for losses that tell samples apart."""
        return Population(self.data.train.ids, self.data.train.labels)

    def baseline_objective(self) -> Objective | StagedObjective:
        """Cross entropy, in each stage with the parameters of its own term."""
        return self._staged(lambda _, terms: Objective.baseline(terms, classes=self.data.classes, label_counts=self.label_counts))

    def _staged(self, build: Callable[[int, list[Term]], Objective]) -> Objective | StagedObjective:
        """What is built for each stage, once for those with the same terms and shapes."""
        lists = self.recipe.objectives
        built: dict[int, Objective] = {}
        problems: list[Problem] = []
        for number, terms in enumerate(lists):
            same = [i for i in range(number) if lists[i] == terms and self._shapes(i) == self._shapes(number)]
            try:
                if not same:
                    built[number] = build(number, terms)
                elif same[0] in built:
                    built[number] = built[same[0]]
            except UsageError as e:
                prefix = "" if self.recipe.stages[number].objective is None else f"train.stages.{number}."
                problems += [replace(p, where=f"{prefix}{p.where}") for p in e.problems]
        if problems:
            raise UsageError(problems)
        return built[0] if self.recipe.train.stages is None else StagedObjective(list(built.values()))

    def _shapes(self, number: int) -> dict[str, tuple[int, ...]]:
        return self.shapes_student[number] if self.shapes_student else {}

    def logits(self, model: Model, split: Split, engine: Engine) -> np.ndarray[Any, Any]:
        """``(N, C)`` float64 logits of a model on a split, through its own preparation; the model is left in eval mode."""
        model.module.eval()
        for buffer in model.module.buffers():  # batch statistics are each rank's own; those of the main rank are what is saved
            self.ranks.broadcast(buffer)
        builder = self.builder(split, student=model.preprocessing)
        lengths = self.lengths(split, model.preprocessing)
        return predict(
            lambda batch: model(batch.student),
            split,
            builder,
            engine,
            batch_size=EVALUATION_BATCH,
            lengths=lengths,
            ranks=self.ranks,
        )

    def validation(self, model: Model, engine: Engine) -> Callable[[], dict[str, float]] | None:
        """Accuracy and nll on the validation split, in the precision that the model trains in; None where there is no such split."""
        split = self.data.valid
        if not len(split):
            return None

        def validate() -> dict[str, float]:
            found = metrics(self.logits(model, split, engine), split.labels)
            return {"accuracy": found["accuracy"], "nll": found["nll"]}

        return validate

    def parity_inputs(self) -> Inputs:
        """Real test samples as the student takes them, float32: what exported files are compared on."""
        return {k: v.float() if v.is_floating_point() else v for k, v in self.sample_inputs(PARITY_SAMPLES).items()}

    def samples(self, preprocessing: Preprocessing | None = None) -> tuple[Inputs, Inputs]:
        """What speed is measured with: one test sample alone (a text of median length, unpadded), and a larger batch."""
        lengths = self.lengths(self.data.test)
        row = 0 if lengths is None else np.argsort(lengths, kind="stable")[len(lengths) // 2]
        split = self.data.test.take(np.array([row]))
        [request] = evaluation_requests(split, 1)
        return self.builder(split, student=preprocessing)(request).student, self.sample_inputs(THROUGHPUT_BATCH, preprocessing)

    def sample_inputs(self, count: int, preprocessing: Preprocessing | None = None) -> Inputs:
        """``count`` test samples (chosen by hash order) as a model takes them, float32 or float64, on the CPU."""
        rows = order(len(self.data.test), self.recipe.data.seed, "samples")[:count]
        split = self.data.test.take(np.sort(rows))
        [request] = evaluation_requests(split, count)
        return self.builder(split, student=preprocessing)(request).student


def reads_unlabelled(recipe: Recipe) -> bool:
    """Whether a loss of a recipe learns from samples without a label, although no teacher is there."""
    return any(LOSSES[t.loss].self_taught and "labels" not in LOSSES[t.loss].reads for t in recipe.terms)


def _others(recipe: Recipe, terms: Sequence[Term]) -> int:
    """How many models beside the student see samples in views of their own."""
    entries = [LOSSES[term.loss] for term in terms if LOSSES[term.loss].own_views]
    return sum(len(recipe.student.peers) if "peers.logits" in entry.reads else 1 for entry in entries)


def _size(wanted: Preprocessing) -> int:
    """Of one sample's inputs: pixels or tokens, as far as they differ between stages."""
    if isinstance(wanted, ImagePreprocessing):
        return (wanted.height or 224) * (wanted.width or 224)
    return wanted.max_length if isinstance(wanted, TextPreprocessing) else 1


def _as(model: Model, inputs: Inputs) -> Inputs:
    """Floating-point inputs in the dtype and on the device of a model that is not placed yet."""
    held = next(model.module.parameters(), None)
    if held is None:
        return inputs
    return {k: v.to(held.device, held.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
