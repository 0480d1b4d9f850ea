"""A teacher and a student so small that a step is nearly all overhead: for P2 of docs/benchmarks.md. They take images of one channel, 8x8."""

from __future__ import annotations

from torch import nn

__all__ = ["student", "teacher"]


def _mlp(hidden: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def teacher(num_classes: int = 10) -> nn.Module:
    return _mlp(256, num_classes)


def student(num_classes: int = 10) -> nn.Module:
    return _mlp(32, num_classes)
