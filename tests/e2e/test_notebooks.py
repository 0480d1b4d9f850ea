"""The notebooks run from a clean kernel, each in an empty folder, and show pictures; and the pictures show what they say."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from limbeck import plots
from limbeck.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
PICTURES = {"01_distil_in_ten_lines": 2, "02_look_inside_a_run": 4, "03_attention_and_features": 2, "04_your_own_model": 1}


def test_every_notebook_is_known() -> None:
    assert {p.stem for p in (ROOT / "notebooks").glob("*.py")} == set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_a_notebook_runs_and_shows_its_pictures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    notebook = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    client = nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [o["data"]["image/png"] for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(shown) == PICTURES[name]
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in shown)


class Attending(nn.Module):
    """A timm-like block: qkv in one layer, two heads of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(4, 12)
        self.attn.num_heads = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv: torch.Tensor = self.attn.qkv(x)  # type: ignore[operator]
        return qkv.mean((1, 2))


def test_attention_is_that_of_queries_and_keys() -> None:
    torch.manual_seed(0)
    module, x = Attending().train(), torch.randn(1, 5, 4)
    (found,) = plots.attention_of(module, x)
    both = module.attn.qkv(x)[0].detach().double().numpy()  # type: ignore[operator, union-attr]
    for head in range(2):
        queries, keys = both[:, 2 * head : 2 * head + 2], both[:, 4 + 2 * head : 4 + 2 * head + 2]
        scores = np.exp(queries @ keys.T / np.sqrt(2))
        np.testing.assert_allclose(found[head].numpy(), scores / scores.sum(1, keepdims=True), rtol=1e-5)
    assert module.training
    assert not module.attn.qkv._forward_hooks  # type: ignore[union-attr]


def test_attention_of_transformers_is_its_own_and_leaves_the_model_as_it_was() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    module = BertModel(config)
    before, inputs = module.config._attn_implementation, {"input_ids": torch.tensor([[2, 5, 7, 3]])}
    found = plots.attention_of(module, inputs)
    assert [tuple(layer.shape) for layer in found] == 2 * [(2, 4, 4)]
    torch.testing.assert_close(found[1].sum(-1), torch.ones(2, 4))
    assert module.config._attn_implementation == before


def test_the_soft_labels_are_drawn_as_they_are() -> None:
    """Bars of softmax(z / T), the likeliest classes in their order, the true one marked."""
    logits = {"teacher": np.array([[0.0, 1.0, 3.0]]), "student": np.array([[2.0, 0.0, 0.0]])}
    figure = plots.soft_labels(logits, ["ant", "bee", "cat"], items=[0], temperature=2.0, labels=[2], most=2)
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["ant", "cat *"]
    e = np.exp(logits["teacher"][0] / 2)
    assert [bar.get_height() for bar in axis.patches[:2]] == pytest.approx((e / e.sum())[[0, 2]])


def test_a_sweep_is_drawn_where_its_numbers_stand(tmp_path: Path) -> None:
    values = {("1", "0.5"): 0.6, ("2", "0.5"): 0.7, ("1", "0.9"): 0.8, ("2", "0.9"): 0.65}
    rows: list[dict[str, Any]] = [
        {"name": f"{t}-{a}", "values": {"temp": t, "alpha": a}, "validation": {"accuracy": v}, "student": v - 0.1, "gap_closed": None}
        for (t, a), v in values.items()
    ]
    table = {"rows": rows, "vary": {"temp": ["1", "2"], "alpha": ["0.5", "0.9"]}, "best": "1-0.9", "primary_metric": "accuracy"}
    (tmp_path / "sweep.json").write_text(json.dumps(table))
    axis = plots.sweep(tmp_path).axes[0]
    assert axis.images[0].get_array().tolist() == [[60.0, 70.0], [80.0, 65.0]]
    assert axis.patches[0].get_xy() == (-0.5, 0.5)  # the frame: temp 1, alpha 0.9
    assert plots.sweep(tmp_path, "student").axes[0].images[0].get_array()[1][0] == pytest.approx(70.0)


def test_wrong_questions_get_sentences(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no finished sweep"):
        plots.sweep(tmp_path)
    with pytest.raises(UsageError, match=r"student has the shape \(1, 2\), and there are 3 classes"):
        plots.soft_labels({"student": np.zeros((1, 2))}, ["a", "b", "c"], items=[0])
    with pytest.raises(UsageError, match="has no attention that can be read"):
        plots.attention_of(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(UsageError, match="there is no such run directory"):
        plots.losses(tmp_path / "gone")
