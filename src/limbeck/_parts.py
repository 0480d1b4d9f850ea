"""What the stages of a run are fed with: builders, plans, objectives and validation, from one recipe and one set of data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from limbeck.data import BatchBuilder, Data, Plan, Split, augmentation, evaluation_requests, token_lengths, view_keys
from limbeck.engine import Engine
from limbeck.errors import Problem, UsageError
from limbeck.evaluate import metrics, predict
from limbeck.loop import Feed
from limbeck.models import Model, called_layers, probe_shapes, which_blocks
from limbeck.objective import Objective, needs_of
from limbeck.randomness import order
from limbeck.ranks import ALONE, Ranks
from limbeck.recipe import Recipe
from limbeck.types import Batch, Inputs, Preprocessing, TextPreprocessing

__all__ = ["Parts"]

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
        teacher: Preprocessing | None,
        *,
        batch_statistics: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.data, self.student, self.teacher, self.ranks = recipe, data, student, teacher, ranks
        self.augment = augmentation(recipe.data.augment, data)
        views = recipe.teacher_cache.views
        # without augmentation every view of a sample is the same
        self.views = 1 if self.augment is None else None if views == "live" else views
        self.batch_statistics = batch_statistics  # of the model that is trained: a last batch of one sample is then left out
        self.shapes_student: dict[str, tuple[int, ...]] = {}
        self.shapes_teacher: dict[str, tuple[int, ...]] = {}

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

    def builder(self, split: Split, *, teacher: bool = False, training: bool = False, student: Preprocessing | None = None) -> BatchBuilder:
        dtype = torch.float64 if self.recipe.train.precision == "float64" else torch.float32
        return BatchBuilder(
            split,
            student=student or self.student,
            teacher=self.teacher if teacher else None,
            augment=self.augment if training else None,
            data_seed=self.recipe.data.seed,
            num_classes=len(self.data.classes),
            dtype=dtype,
        )

    def keys(self, split: Split, view: int, *, training: bool) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """``(N, 2)``: what the views of a split's rows are made of, by which a teacher's answers are kept."""
        return view_keys(split, self.augment if training else None, self.recipe.data.seed, view)

    def lengths(self, split: Split, preprocessing: Preprocessing | None = None) -> np.ndarray[Any, Any] | None:
        """Token counts of a split's rows, where batches are bucketed by them."""
        wanted = preprocessing or self.student
        return token_lengths(split, wanted) if isinstance(wanted, TextPreprocessing) else None

    def plan(
        self,
        split: Split,
        *,
        epochs: int,
        batch_size: int,
        seed: int,
        total_steps: int | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> Plan:
        return Plan(
            split,
            seed=seed,
            data_seed=self.recipe.data.seed,
            epochs=epochs,
            batch_size=batch_size,
            views=self.views,
            lengths=self.lengths(split, preprocessing),
            drop_single=self.batch_statistics,
            total_steps=total_steps,
        )

    def feed(self, recipe: Recipe, *, with_teacher: bool, ask: bool = False, workers: int = 0, pin_memory: bool = False) -> Feed:
        """What a student reads: all rows beside a teacher, the labelled ones alone. ask: prepare the teacher's inputs too."""
        split = self.data.train if with_teacher else self.labelled
        plan = self.plan(split, epochs=recipe.train.epochs, batch_size=recipe.train.batch_size, seed=recipe.seed)
        return Feed(plan, self.builder(split, teacher=ask, training=True), plan.steps_per_epoch, workers, pin_memory)

    def teacher_feed(self, beside: Feed) -> Feed:
        """What a teacher reads on ranks of its own: the rows of the students' feed, in its own preparation alone."""
        return replace(beside, builder=self.builder(self.data.train, training=True, student=self.teacher))

    def baseline_feed(self, recipe: Recipe, *, workers: int = 0, pin_memory: bool = False) -> Feed:
        """What the baseline reads: the labelled rows, for as many optimiser steps of the same size as the student beside its teacher."""
        beside = self.feed(recipe, with_teacher=True)
        if self.labelled is self.data.train:
            plan = beside.plan
        else:
            steps = beside.plan.total_steps
            size = min(recipe.train.batch_size, len(self.data.train))
            plan = self.plan(self.labelled, epochs=steps, batch_size=size, seed=recipe.seed, total_steps=steps)
        return Feed(plan, self.builder(self.labelled, training=True), beside.round, workers, pin_memory)

    def first_batch(self, recipe: Recipe, *, with_teacher: bool, ask: bool = False) -> Batch:
        """One microbatch of the first step, as it is measured with; a few rows where their number is not known yet."""
        feed = self.feed(recipe, with_teacher=with_teacher, ask=ask)
        batch = feed.builder(feed.plan.request(0))
        cut = recipe.train.accumulate
        return batch.part(0, min(FEW, len(batch)) if cut == "auto" else -(-len(batch) // cut))

    def widest_batch(self, recipe: Recipe, *, with_teacher: bool, ask: bool = False) -> Batch:
        """One rank's share of the step of an epoch that takes the most memory: with texts, the one of the most tokens, padding included."""
        feed = self.feed(recipe, with_teacher=with_teacher, ask=ask)
        requests = (
            [feed.plan.request(step) for step in range(feed.plan.steps_per_epoch)]
            if self.student.kind == "text"
            else [feed.plan.request(0)]
        )
        lengths = self.lengths(self.data.train if with_teacher else self.labelled)
        if lengths is not None:
            requests.sort(key=lambda request: len(request.rows) * int(lengths[request.rows].max()))
        size = self.ranks.size
        shares = [requests[-1].share(rank, size) for rank in range(size)]
        # the rows of a step are sorted by length: the last share has the longest ones
        return feed.builder([share for share in shares if share.counted][-1])

    def probe(self, student: Model, teacher: Model | None) -> None:
        """Find the shapes of the features that the objective asks for; once, before anything is placed or trained.

        Layers that are named, and never called, are refused.
        """
        self._probe_blocks(student)
        of_student, of_teacher = needs_of(self.recipe.objective)
        if not of_student.features and not of_teacher.features:
            return
        split = self.data.train.take(np.arange(min(PROBE, len(self.data.train))))
        [request] = evaluation_requests(split, PROBE)
        batch = self.builder(split, teacher=teacher is not None)(request)
        self.shapes_student = probe_shapes(student, _as(student, batch.student), of_student.features)
        if teacher is not None and batch.teacher is not None:
            self.shapes_teacher = probe_shapes(teacher, _as(teacher, batch.teacher), of_teacher.features)
        tokens = any(len(shape) == 3 for shape in (*self.shapes_student.values(), *self.shapes_teacher.values()))
        if tokens and isinstance(self.student, TextPreprocessing) and isinstance(self.teacher, TextPreprocessing):
            ours, theirs = ((p.tokenizer_sha256, p.max_length) for p in (self.student, self.teacher))
            if ours != theirs:
                message = "a loss on features by token needs the same tokens on both sides, and the two models have different tokenizers."
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

    def objective(self, seed: int) -> Objective:
        """The recipe's objective; projections are sized by :meth:`probe` and drawn from (seed, role)."""
        return Objective.build(
            self.recipe.objective,
            classes=self.data.classes,
            label_counts=self.label_counts,
            shapes_student=self.shapes_student,
            shapes_teacher=self.shapes_teacher,
            seed=seed,
        )

    def baseline_objective(self) -> Objective:
        return Objective.baseline(self.recipe.objective, classes=self.data.classes, label_counts=self.label_counts)

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


def _as(model: Model, inputs: Inputs) -> Inputs:
    """Floating-point inputs in the dtype and on the device of a model that is not placed yet."""
    held = next(model.module.parameters(), None)
    if held is None:
        return inputs
    return {k: v.to(held.device, held.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
