"""The two networks of ``limbeck demo``: 8 x 8 digits in, 10 classes out."""

from __future__ import annotations

from torch import nn


def teacher(num_classes: int = 10) -> nn.Module:
    """A convolutional network of about 400,000 parameters."""
    return nn.Sequential(
        *_block(1, 64),
        *_block(64, 128),
        nn.MaxPool2d(2),
        *_block(128, 256),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, num_classes),
    )


def student(num_classes: int = 10) -> nn.Module:
    """A convolutional network of about 2,000 parameters."""
    return nn.Sequential(*_block(1, 8), nn.MaxPool2d(2), *_block(8, 16), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, num_classes))


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
