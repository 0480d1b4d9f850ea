"""Relational losses for tests, and a fit of one or several ranks on them.

Similarities (Tung and Mori 2019, arXiv:1907.09682) of logits, of layers through a learned projection, and distances between samples of one class,
which counts labelled items only.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.losses import LOSSES, Layer, LossEntry, Population
from limbeck.objective import Objective
from limbeck.ranks import Ranks, joined
from limbeck.recipe import Term
from support import run_fit, settings, toy_data


def similarities(student: Tensor, teacher: Tensor) -> Tensor:
    """(N,) values whose mean is |G_t - G_s|^2 / N^2, with G the row-normalised similarities of the N items."""
    ours, theirs = (F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (student, teacher.detach()))
    return (ours - theirs).square().sum(1) / len(student)


def of_one_class(student: Tensor, labels: Tensor) -> Tensor:
    """(N,) mean squared distances of each item to those of its class."""
    same = (labels[:, None] == labels[None, :]).to(student.dtype)
    return (same * (student[:, None] - student[None, :]).square().sum(2)).sum(1) / same.sum(1)


class Projected(nn.Module):
    """Similarities of layers, the student's through a projection that is learned."""

    def __init__(
        self,
        student_shape: tuple[int, ...],
        teacher_shape: tuple[int, ...],
        *,
        student: Annotated[str, Field(min_length=1), Layer("student")],
        teacher: Annotated[str, Field(min_length=1), Layer("teacher")],
    ) -> None:
        super().__init__()
        self.projection = nn.Linear(student_shape[-1], teacher_shape[-1], dtype=torch.float64)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return similarities(self.projection(student), teacher)


def entry(name: str, function: Any, reads: Any) -> LossEntry:
    return LossEntry(name, function, reads, per_item=False, zero_at=None, shift_invariant=False, summary="", source="")


TESTED = {
    "similarities": entry("similarities", similarities, ("student.logits", "teacher.logits")),
    "of_one_class": entry("of_one_class", of_one_class, ("student.logits", "labels")),
    "projected": entry("projected", Projected, ("student.features", "teacher.features")),
}
TERMS = [
    Term(loss="similarities", weight=3.0),
    Term(loss="cross_entropy", weight=0.5),
    Term(loss="of_one_class", weight=0.2),
    Term(loss="projected", weight={"start": 5.0, "end": 0.0, "until": 0.7}, student="body", teacher="norm"),
]


def fit_once(folder: Path, ranks: Ranks, terms: list[Term], accumulate: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """34 rows, 13 of them without a label, in steps of 16: shares with uneven counts of items, and a last step that only one rank has rows of."""
    data = toy_data(21, unlabelled=13)
    shapes: dict[str, Any] = {"shapes_student": {"body": (2, 5)}, "shapes_teacher": {"norm": (2, 16)}}
    population = Population(data.train.ids, data.train.labels)
    objective = Objective.build(terms, classes=data.classes, label_counts=[1] * 4, population=population, **shapes)
    assert objective.relational
    assert not objective.per_item
    train = settings(batch_size=16, optimizer="sgd", lr=0.1, epochs=3, clip_norm=0.3, accumulate=accumulate)
    student, _ = run_fit(folder, data=data, objective=objective, train=train, ranks=ranks)
    return {name: value.numpy() for module in (student.module, objective) for name, value in module.state_dict().items()}


def one_rank(folder: Path, rank: int, size: int, port: int, terms: list[dict[str, Any]], accumulate: int) -> None:
    torch.set_num_threads(1)
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LIMBECK_RANK_TIMEOUT": "60"})
    LOSSES.update(TESTED)
    with joined() as ranks:
        found = fit_once(folder / str(rank), ranks, [Term(**t) for t in terms], accumulate)
    np.savez(folder / f"{rank}.npz", **found)


def fit_together(folder: Path, size: int, terms: list[Term], accumulate: int = 1) -> list[dict[str, np.ndarray[Any, Any]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "limbeck.spine", "running"])
    plain = [t.model_dump() for t in terms]
    processes = [context.Process(target=one_rank, args=(folder, rank, size, port, plain, accumulate)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * size
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(size)]
