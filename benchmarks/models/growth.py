"""Models of any size for P11 of docs/benchmarks.md: they take vectors of 64 numbers."""

from __future__ import annotations

from torch import nn

__all__ = ["student", "teacher"]


def student(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, num_classes))


def teacher(num_classes: int = 10, times: int = 1) -> nn.Module:
    """``times`` hidden layers more, each as large as the first two together."""
    layers: list[nn.Module] = [nn.Linear(64, 256), nn.ReLU()]
    for _ in range(times):
        layers += [nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, num_classes))
