
import os
import time

import torch
from torch import nn


class Net(nn.Module):
    """Batch statistics, and dropout where asked for; slow on request, so that a signal finds it in mid-epoch."""

    def __init__(self, width, num_classes, dropout=0.0):
        super().__init__()
        self.body = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        if self.training and not torch.jit.is_tracing():
            time.sleep(float(os.environ.get("SLOW", "0")))
        x = self.norm(self.body(x)).relu()
        return self.head(self.drop(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)))


def teacher(num_classes=3):
    return Net(12, num_classes, 0.5)


def student(num_classes=3, dropout=0.0):
    return Net(4, num_classes, dropout)


def plain(num_classes=3, size=64):
    """No batch statistics; takes float arrays."""
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 7), nn.Tanh(), nn.Linear(7, num_classes))
