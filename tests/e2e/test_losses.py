"""Every loss of the table trains two steps, with a teacher in the loop and from its kept answers: one run has them all as terms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import limbeck
from limbeck.losses import LOSSES


class Net(nn.Module):
    """Maps, a vector of a width of its own, and one of a common width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maps = nn.Conv2d(1, width, 3, padding=1)
        self.vector = nn.Linear(width * 16, 2 * width)
        self.even = nn.Linear(2 * width, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.even(self.vector(self.maps(x).relu().flatten(1)).relu()).relu())


LAYER = {"attention_transfer": "maps", "nst": "maps", "vid": "maps", "ofd": "maps", "hint": "maps", "patient": "even"}


def terms() -> list[dict[str, Any]]:
    found = []
    for entry in LOSSES.values():
        layers = {"student": LAYER.get(entry.name, "vector"), "teacher": LAYER.get(entry.name, "vector")}
        paths = {k: v for k, v in layers.items() if k in entry.parameters}
        found.append({"loss": entry.name, "weight": entry.weight, **entry.example, **paths})
    return found


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_every_loss_trains(mode: str, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 1, 4, 4, generator=g), torch.randint(0, 3, (48,), generator=g)
    cache = {"mode": mode} if mode == "off" else {"mode": mode, "path": str(tmp_path / "cache")}
    limbeck.distill(
        student=Net(3), teacher=Net(5), train=(x[:32], y[:32]), valid=(x[32:], y[32:]), test=(x[32:], y[32:]), objective=terms(),
        baseline=False, export=[], epochs=1, batch_size=16, log_every=1, teacher_cache=cache, out=tmp_path / "run", progress="none",
        precision="float32",
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line["terms"] for line in lines if line.get("role") == "student" and "terms" in line]
    assert len(steps) == 2
    for parts in steps:
        assert set(parts) == set(LOSSES)
        assert all(math.isfinite(part["loss"] if isinstance(part, dict) else part) for part in parts.values())
