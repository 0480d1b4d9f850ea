"""Every loss of the table trains two steps, with a teacher in the loop and from its kept answers: one run has them all as terms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import limbeck
from limbeck.errors import UsageError
from limbeck.losses import LOSSES


class Look(nn.Module):
    """Attention of one head over the places of a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, 2 * width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


class Net(nn.Module):
    """Maps, attention over them, a vector of a width of its own, and one of a common width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maps = nn.Conv2d(1, width, 3, padding=1)
        self.look = Look(width)
        self.vector = nn.Linear(width * 32, 2 * width)
        self.even = nn.Linear(2 * width, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.even(self.vector(self.look(self.maps(x).relu()).flatten(1)).relu()).relu())


LAYER = {"attention_transfer": "maps", "nst": "maps", "vid": "maps", "ofd": "maps", "hint": "maps", "patient": "even"}
LAYER |= {entry.name: "look" for entry in LOSSES.values() if entry.part}
FEW = {"heads": 2}


def terms() -> list[dict[str, Any]]:
    found = []
    for entry in (e for e in LOSSES.values() if "peers.logits" not in e.reads):  # these are in test_peers.py
        layers = {"student": LAYER.get(entry.name, "vector"), "teacher": LAYER.get(entry.name, "vector")}
        paths = {k: v for k, v in layers.items() if k in entry.parameters}
        few = {k: v for k, v in FEW.items() if k in entry.parameters}
        found.append({"loss": entry.name, "weight": entry.weight, **entry.example, **few, **paths})
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
        assert set(parts) == {term["loss"] for term in terms()}
        assert all(math.isfinite(part["loss"] if isinstance(part, dict) else part) for part in parts.values())


def test_exits_learn_and_stay_behind(tmp_path: Path) -> None:
    """A transformer teaches a convolutional student through exits; what leaves is the student alone, and a resumed run ends the same."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 1, 4, 4, generator=g), torch.randint(0, 3, (48,), generator=g)
    objective = [
        {"loss": "cross_entropy"},
        {"loss": "ofa"},
        {"loss": "ofa_exits", "student": ["maps", "vector"]},
        {"loss": "byot", "student": "look"},
    ]

    def run(out: str, **more: Any) -> Any:
        torch.manual_seed(1)
        return limbeck.distill(
            student=Net(3), teacher=nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, batch_first=True), nn.Flatten(), nn.Linear(16, 3)),
            train=(x[:32], y[:32]), test=(x[32:], y[32:]), objective=objective, baseline=False, export=["onnx"], epochs=2, batch_size=8,
            out=tmp_path / out, progress="none", precision="float32", data_options={"valid_fraction": 0.25}, **more,
        )  # fmt: skip

    found = run("run")
    assert {name.partition(".")[0] for name in found.student.state_dict()} == {"maps", "look", "vector", "even", "head"}
    assert load_file(tmp_path / "run/student/model.safetensors").keys() == found.student.state_dict().keys()
    plain = limbeck.train(
        student=Net(3), train=(x[:32], y[:32]), test=(x[32:], y[32:]), objective=[objective[0], objective[3]], export=[], epochs=1,
        batch_size=8, out=tmp_path / "plain", progress="none", precision="float32",
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "plain" / "log.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line.get("terms", {})} == {"cross_entropy", "byot"}
    assert "look.query.weight" in plain.student.state_dict()


def test_layers_for_exits_are_recorded_and_a_resume_takes_them(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 1, 4, 4, generator=g), torch.randint(0, 3, (24,), generator=g)
    auto = [{"loss": "cross_entropy"}, {"loss": "ofa_exits", "layers": "auto"}, {"loss": "byot", "layers": "auto"}]

    def run(out: str, objective: list[dict[str, Any]], teacher: Any, **more: Any) -> None:
        torch.manual_seed(1)
        limbeck.distill(
            student=Stages(2), teacher=teacher, train=(x[:12], y[:12]), test=(x[18:], y[18:]), objective=objective, baseline=False, export=[],
            epochs=2, batch_size=6, out=tmp_path / out, progress="none", precision="float32", **more,
        )  # fmt: skip

    flat = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    run("auto", auto, flat)
    terms = yaml.safe_load((tmp_path / "auto/recipe.yaml").read_text())["objective"]
    assert [term.get("student") for term in terms] == [None, ["first", "second"], "first"]
    named = [auto[0], {"loss": "ofa_exits", "student": ["first", "second"]}, {"loss": "byot", "student": "first"}]
    run("named", named, flat)
    assert (tmp_path / "auto/student/model.safetensors").read_bytes() == (tmp_path / "named/student/model.safetensors").read_bytes()
    run("auto", auto, flat, resume=True)
    run("several", auto, [flat, flat])
    assert yaml.safe_load((tmp_path / "several/recipe.yaml").read_text())["objective"] == terms


class Stages(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, width, 3, stride=2, padding=1), nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu().flatten(1))


def test_paired_layers_are_recorded_and_a_resume_takes_them(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 1, 4, 4, generator=g), torch.randint(0, 3, (24,), generator=g)
    pairs = ["first", "second"]
    auto = [{"loss": "cross_entropy"}, {"loss": "attention_transfer", "weight": 10.0, "layers": "auto", "p": 1}]
    named = [auto[0], {"loss": "attention_transfer", "weight": 10.0, "p": 1, "student": pairs, "teacher": pairs}]

    def run(out: str, objective: list[dict[str, Any]], **more: Any) -> Any:
        torch.manual_seed(1)
        return limbeck.distill(
            student=Stages(2), teacher=Stages(3), train=(x[:12], y[:12]), valid=(x[12:18], y[12:18]), test=(x[18:], y[18:]),
            objective=objective, baseline=False, export=[], epochs=2, batch_size=6, teacher_cache={"mode": "off"}, out=tmp_path / out,
            progress="none", precision="float32", **more,
        )  # fmt: skip

    run("auto", auto)
    term = yaml.safe_load((tmp_path / "auto/recipe.yaml").read_text())["objective"][1]
    assert (term["student"], term["teacher"], term["p"]) == (pairs, pairs, 1)
    assert "layers" not in term
    run("named", named)
    assert (tmp_path / "auto/student/model.safetensors").read_bytes() == (tmp_path / "named/student/model.safetensors").read_bytes()
    for objective in (auto, named):  # the run that is there, and not another one
        run("auto", objective, resume=True)
    with pytest.raises(UsageError, match=r"objective.1.p"):
        run("auto", [auto[0], {**auto[1], "p": 2}], resume=True)
