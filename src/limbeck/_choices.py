"""What ``precision: auto`` chooses, by measuring the real models on a real batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.engine import Engine, Work, candidates, measure
from limbeck.models import Capture, Model, Recomputed, load_state
from limbeck.objective import Objective
from limbeck.randomness import seed_for
from limbeck.recipe import Recipe, Train
from limbeck.types import Batch, Signal

__all__ = ["explicit", "resolved", "snapshot", "student_choice", "teacher_choice"]

Choice = tuple[Engine, dict[str, Any]]


def resolved(
    recipe: Recipe,
    student: Engine,
    teachers: Sequence[Engine | None],
    workers: int,
    accumulate: int,
    *,
    placement: str = "same",
    several: bool = False,
) -> Recipe:
    """The recipe with every ``auto`` replaced by what was chosen, so that running it again repeats the run.

    teachers: how each runs; None for one that is a file. several: on several ranks, each of which has a device of its own. There, and where no number
    was asked for, the device's kind is recorded and not its number, so that the recipe can be repeated by one process and by several."""
    device = student.device.type if several or recipe.train.device in ("auto", student.device.type) else str(student.device)
    chosen = {"precision": student.precision, "layout": student.layout, "workers": workers, "device": device, "accumulate": accumulate}
    train = recipe.train.model_copy(update=chosen)
    asked = []
    for spec, engine in zip(recipe.teachers, teachers, strict=True):
        if engine is not None:
            where = placement if spec.placement == "auto" else spec.placement
            spec = spec.model_copy(update={"precision": engine.precision, "layout": engine.layout, "placement": where})
        asked.append(spec)
    return recipe.with_teachers(asked).model_copy(update={"train": train})


def explicit(recipe: Recipe, device: torch.device) -> Engine:
    """How the student of a resolved recipe trains."""
    return Engine(device, recipe.train.precision, recipe.train.layout or "channels_first")


def teacher_choice(model: Model, batch: Batch, device: torch.device, precision: str, layout: str | None, student_precision: str) -> Choice:
    """How the teacher runs. An explicit precision (its own, else the student's) is taken as it is; ``auto`` is measured on its forward pass."""
    if precision == "auto" and student_precision != "auto":
        precision = student_precision
    if precision != "auto":
        return Engine(device, precision, layout or "channels_first"), {"measured": [], "reason": "given in the recipe"}

    def prepare(engine: Engine) -> Work:
        engine.place(model.module)
        model.module.eval()
        sent = engine.send(batch)
        assert sent.teacher is not None
        inputs = sent.teacher

        def logits() -> Tensor:
            with torch.no_grad(), engine.autocast():
                return model(inputs)

        return Work(logits, logits)

    return measure(candidates(device, _layouts(batch.teacher or {}, layout)), prepare)


def student_choice(
    student: Model, teacher: Signal | None, objective: Objective, batch: Batch, device: torch.device, settings: Train, seed: int
) -> Choice:
    """How the student trains; measured on forward and backward of one microbatch, compared by its gradient. The student is left as it was."""
    if settings.precision != "auto":
        return Engine(device, settings.precision, settings.layout or "channels_first"), {"measured": [], "reason": "given in the recipe"}
    module, before = student.module, snapshot(student.module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    counts = objective.counts(batch)

    def prepare(engine: Engine) -> Work:
        engine.place(module)
        engine.place(objective)
        load_state(module, before)
        sent = engine.send(batch)

        def step() -> None:
            module.zero_grad(set_to_none=True)
            with Capture(module, objective.student_needs.features) as capture, Recomputed(module, settings.gradient_checkpointing):
                engine.seed(seed_for(seed, "dropout", 0, 0, 0))
                with engine.autocast():
                    outputs = capture.outputs(student, sent.student)
                loss, _ = objective(outputs, teacher, sent, progress=0.0, counts=counts)
                loss.backward()

        def gradient() -> Tensor:
            # Without dropout: its masks differ between precisions and layouts, and would be compared instead of the numbers.
            module.train()
            for inner in module.modules():
                if isinstance(inner, torch.nn.modules.dropout._DropoutNd):
                    inner.eval()
            step()
            module.train()
            return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in parameters])

        return Work(gradient, step)

    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return measure(candidates(device, _layouts(batch.student, settings.layout)), prepare)
    finally:
        module.zero_grad(set_to_none=True)
        objective.zero_grad(set_to_none=True)
        Engine(torch.device("cpu")).place(module)
        load_state(module, before)


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of a module's state, on the CPU."""
    state = module.state_dict()
    return {name: t.detach().to("cpu", copy=True) if isinstance(t, Tensor) else copy.deepcopy(t) for name, t in state.items()}


def _layouts(inputs: Any, layout: str | None) -> list[str]:
    """Layout matters for images (four dimensions) only."""
    if layout is not None:
        return [layout]
    images = any(value.ndim == 4 for value in inputs.values())
    return ["channels_first", "channels_last"] if images else ["channels_first"]
