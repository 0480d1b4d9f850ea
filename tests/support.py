"""What several tests share: small different models, data without files, and a fit on a few rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from limbeck.data import BatchBuilder, Data, Plan, StagedPlan, data_from_python
from limbeck.engine import Engine
from limbeck.loop import Feed, Recorder, Trained, fit
from limbeck.models import Model, wrap_module
from limbeck.objective import Objective, StagedObjective
from limbeck.placement import Ahead, live_of
from limbeck.progress import Progress
from limbeck.randomness import forked
from limbeck.ranks import ALONE, Ranks
from limbeck.recipe import Term, Train
from limbeck.run import Log, NoLog
from limbeck.teacher import LiveTeacher

FEATURES, CLASSES = 6, 4
KD_MIX = [Term(loss="kd", weight=0.7, temperature=6.0), Term(loss="cross_entropy", weight=0.3)]


class Big(nn.Module):
    """A teacher with named layers, batch statistics and dropout: everything that must not move while it teaches."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, CLASSES)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(self.body(x)).relu()))


class Small(nn.Module):
    """A student without batch statistics; dropout is off unless asked for."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 5)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(5, CLASSES)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.tanh(self.body(x))))


def made(build: Any, *key: Any, **arguments: Any) -> nn.Module:
    """A module with initial weights that are a function of ``key``."""
    with forked(*key):
        module: nn.Module = build(**arguments)
    return module


def tensors(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """A learnable classification problem of float tensors."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    w = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return x.to(dtype), (x @ w).argmax(1)


def toy_data(count: int = 30, *, unlabelled: int = 0, dtype: torch.dtype = torch.float64) -> Data:
    x, y = tensors(count, dtype=dtype)
    extra = {"unlabelled": tensors(unlabelled, 5, dtype)[0]} if unlabelled else {}
    return data_from_python(
        task="image-classification", train=(x, y), test=tensors(16, 1, dtype), valid=tensors(8, 2, dtype), classes=list("abcd"), **extra
    )


def settings(**changes: Any) -> Train:
    plain = {
        "epochs": 3,
        "batch_size": 8,
        "precision": "float64",
        "workers": 0,
        "checkpoint_every": 4,
        "log_every": 1,
        "lr": 1e-2,
        **changes,
    }
    return Train(**plain)


def run_fit(
    folder: Path,
    *,
    data: Data | None = None,
    student: Model | None = None,
    teacher: LiveTeacher | Ahead | None = None,
    objective: Objective | StagedObjective | None = None,
    train: Train | None = None,
    workers: int = 0,
    stop: Any = lambda: False,
    seed: int = 3,
    validate: Any = None,
    plan: StagedPlan | None = None,
    builder: Any = None,
    ranks: Ranks = ALONE,
) -> tuple[Model, Trained]:
    """One fit on toy data; the defaults make a teacher and a student that differ."""
    data = data or toy_data()
    train = train or settings()
    student = student or wrap_module(made(Small, "student"), role="student", data=data)
    engine = Engine(torch.device("cpu"), train.precision)
    teacher = teacher or LiveTeacher(wrap_module(made(Big, "teacher"), role="teacher", data=data), engine)
    live = live_of(teacher)
    assert live is not None
    objective = objective or Objective.build(KD_MIX, classes=data.classes, label_counts=np.bincount(data.train.labels.clip(0)))
    plan = plan or StagedPlan([Plan(data.train, seed=seed, data_seed=0, epochs=train.epochs, batch_size=train.batch_size)])
    builder = builder or BatchBuilder(
        data.train,
        student=student.preprocessing,
        teacher=live.model.preprocessing,
        augment=None,
        data_seed=0,
        num_classes=len(data.classes),
        dtype=engine.dtype,
    )
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder, tensorboard=False) if ranks.main else NoLog()
    recorder = Recorder("student", folder / "checkpoints", log, Progress("none"), stop, validate)
    try:
        trained = fit(student, teacher, objective, Feed(plan, builder, plan.rounds, workers), engine, train, seed, recorder, ranks)
    finally:
        log.close()
    return student, trained


def state_bytes(module: nn.Module) -> dict[str, bytes]:
    return {name: t.detach().contiguous().numpy().tobytes() for name, t in module.state_dict().items()}
