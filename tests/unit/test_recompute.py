"""Gradient checkpointing: the same weights to the bit, less memory, features as they are, and nothing left behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.errors import UsageError
from limbeck.memory import largest
from limbeck.models import Capture, Recomputed, save_model, which_blocks, wrap_module
from limbeck.objective import Objective
from limbeck.recipe import Term
from running import limbeck, make_folder, read, recipe, run, weights
from support import CLASSES, FEATURES, made, run_fit, settings, state_bytes, toy_data

CPU = torch.device("cpu")

STACKED = """

class Part(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(self.norm(self.conv(x)).relu())


class Stacked(nn.Module):
    def __init__(self, count, num_classes):
        super().__init__()
        self.first, self.body = nn.Conv2d(1, 4, 3, padding=1), nn.Sequential(*[Part(4) for _ in range(count)])
        self.head, self.idle = nn.Linear(16, num_classes), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(nn.functional.adaptive_avg_pool2d(self.body(self.first(x)), 2).flatten(1))


def stacked(num_classes=3, count=2):
    return Stacked(count, num_classes)
"""


class Block(nn.Module):
    """Dropout, batch statistics that a second forward pass would change again, and a layer that writes over what it was given."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.wide, self.norm = nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width) if norm else nn.Identity()
        self.act, self.drop, self.back = nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return x + scale * self.back(self.drop(self.act(self.norm(self.wide(x)))))


class Deep(nn.Module):
    def __init__(self, norm: bool = False, dtype: torch.dtype = torch.float64, spectral: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 8)
        if spectral:
            nn.utils.parametrizations.spectral_norm(self.first)
        self.blocks = nn.ModuleList([Block(8, norm) for _ in range(3)])
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, CLASSES))
        self.unused = nn.Linear(3, 3)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x)


def trained(folder: Path, setting: Any, *, terms: Any = None, dtype: torch.dtype = torch.float64, **arguments: Any) -> dict[str, bytes]:
    data = toy_data(43, dtype=dtype)
    student = wrap_module(made(Deep, "student", dtype=dtype, **arguments), role="student", data=data)
    train = settings(
        accumulate=2, batch_size=16, gradient_checkpointing=setting, precision="float64" if dtype == torch.float64 else "float32"
    )
    objective = None
    if terms is not None:
        shapes: Any = {"shapes_student": {"blocks.1.wide": (2, 16)}, "shapes_teacher": {"norm": (2, 16)}}
        counts = np.bincount(data.train.labels)
        objective = Objective.build(terms, classes=data.classes, label_counts=counts, **shapes)
    run_fit(folder, data=data, student=student, train=train, objective=objective)
    return state_bytes(student.module)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("setting", [True, ["blocks.*"], ["first", "blocks.1", "head"]])
def test_the_weights_are_the_same_to_the_bit(tmp_path: Path, setting: Any, norm: bool, dtype: torch.dtype) -> None:
    """With dropout and, where there are batch statistics, those."""
    plain = trained(tmp_path / "plain", False, norm=norm, dtype=dtype)
    again = trained(tmp_path / "again", setting, norm=norm, dtype=dtype)
    assert again == plain
    assert plain["blocks.0.wide.weight"] != state_bytes(made(Deep, "student", norm=norm, dtype=dtype))["blocks.0.wide.weight"]


def test_what_spectral_norm_keeps_moves_once(tmp_path: Path) -> None:
    assert trained(tmp_path / "again", ["first"], spectral=True) == trained(tmp_path / "plain", False, spectral=True)


def test_a_feature_inside_a_block_is_that_of_the_forward_pass(tmp_path: Path) -> None:
    terms = [Term(loss="hint", weight=1.0, student="blocks.1.wide", teacher="norm", projector="linear"), Term(loss="cross_entropy")]
    assert trained(tmp_path / "again", True, terms=terms) == trained(tmp_path / "plain", False, terms=terms)


def test_a_feature_is_not_kept_when_its_block_is_computed_again() -> None:
    data = toy_data()
    model = wrap_module(made(Deep, "student"), role="student", data=data)
    model.module.train()
    inputs = {"x": torch.randn(8, FEATURES, dtype=torch.float64)}
    with Capture(model.module, ["blocks.1.wide"]) as capture, Recomputed(model.module, True):
        calls: list[int] = []
        model.module.blocks[1].wide.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr,index]
        outputs = capture.outputs(model, inputs)
        feature = outputs.features["blocks.1.wide"]
        before = feature.clone()
        (outputs.logits.sum() + feature.square().sum()).backward()
        assert len(calls) == 2, "the block was not computed again"
        assert outputs.features["blocks.1.wide"] is feature
        assert torch.equal(feature, before)
        assert capture.features == {}


def test_less_is_held() -> None:
    net = nn.Sequential(*[nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 16)) for _ in range(8)])
    x = torch.randn(512, 16)

    def peak(setting: bool) -> int:
        with Recomputed(net, setting), largest(CPU) as held:
            net(x).sum().backward()
            net.zero_grad()
            return held()

    assert peak(True) < 0.5 * peak(False)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    net = made(Deep, "student", norm=True)
    before = {name: dict(vars(m)) for name, m in net.named_modules()}
    names = list(net.state_dict())
    recomputed = Recomputed(net, ["blocks.*", "first"])
    with recomputed:
        assert list(net.state_dict()) == names
        assert "forward" in vars(net.first)
    with pytest.raises(RuntimeError, match="shapes"), recomputed:
        net(torch.zeros(3, 99, dtype=torch.float64))
    assert {name: vars(m).keys() for name, m in net.named_modules()} == {name: v.keys() for name, v in before.items()}
    assert "forward" not in vars(net.first)
    copy.deepcopy(net)
    model = wrap_module(net, role="student", data=toy_data())
    save_model(model, tmp_path / "student", ("a", "b", "c", "d"))


def test_what_true_means() -> None:
    assert which_blocks(Deep(), True).names == ("blocks.0", "blocks.1", "blocks.2")
    assert which_blocks(Deep(), False).names == ()
    torchvision = pytest.importorskip("torchvision")
    stages = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert list(which_blocks(torchvision.models.resnet18(), True).names) == stages
    vit = torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16)
    assert [n.rpartition(".")[2] for n in which_blocks(vit, True).names] == ["encoder_layer_0", "encoder_layer_1"]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False)
    assert which_blocks(encoder, True).names == ("layers.0", "layers.1", "layers.2")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (True, "neither has Transformers' switch nor repeats a block. Name its blocks, e.g. [body, drop, head]."),
        (["bodi"], "'bodi' is no layer of Small. Did you mean 'body'?"),
        (["blocks.*"], "'blocks.*' is no layer of Small. Its blocks may be: body, drop, head."),
    ],
)
def test_what_is_not_there_is_refused(setting: Any, said: str) -> None:
    from support import Small

    with pytest.raises(UsageError) as error:
        which_blocks(Small(), setting)
    assert said in str(error.value)


def test_a_list_of_layers_is_never_called() -> None:
    with pytest.raises(UsageError, match=r"'blocks' is a ModuleList, which is never called itself. Name what is in it: blocks\.\*"):
        which_blocks(Deep(), ["blocks"])


def test_transformers_own_switch(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16
    )

    def gradients(setting: Any) -> tuple[list[bytes], int, int]:
        torch.manual_seed(3)
        net = transformers.BertForSequenceClassification(config)
        before = {name: (vars(m).keys(), len(m._forward_hooks)) for name, m in net.named_modules()}
        net.train()
        calls: list[int] = []
        net.bert.encoder.layer[1].attention.register_forward_hook(lambda *_: calls.append(1))
        with Recomputed(net, setting), largest(CPU) as peak:
            torch.manual_seed(5)
            net(input_ids=torch.arange(30).reshape(2, 15) % 50).logits.square().sum().backward()
        net.bert.encoder.layer[1].attention._forward_hooks.clear()
        assert {name: (vars(m).keys(), len(m._forward_hooks)) for name, m in net.named_modules()} == before
        assert not any(getattr(m, "gradient_checkpointing", False) for m in net.modules())
        return [p.grad.numpy().tobytes() for p in net.parameters() if p.grad is not None], len(calls), peak()

    plain, switched, named = gradients(False), gradients(True), gradients(["bert.encoder.layer.*"])
    assert plain[0] == switched[0] == named[0]
    assert (plain[1], switched[1], named[1]) == (1, 2, 2)
    assert switched[2] < 0.75 * plain[2]
    net = transformers.BertForSequenceClassification(config)
    assert which_blocks(net, True).switch
    assert "bert.encoder.layer.2" in which_blocks(net, True).names


def test_a_run_is_the_same_and_its_files_do_not_know(tmp_path: Path) -> None:
    """Student, baseline and a teacher that is trained first: the same bytes; what is exported is what was trained."""
    folder = make_folder(tmp_path)
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + STACKED)
    changes: dict[str, Any] = {
        "student": {"model": "python:nets.py:stacked", "options": {"count": 2}},
        "teacher": {"model": "python:nets.py:stacked", "options": {"count": 3}, "train": {"epochs": 1}},
        "data": {"source": "npz:pictures.npz", "augment": {"flip": True}},
    }
    names = {"plain": False, "again": True, "named": ["body.*.drop", "head"]}
    for name, setting in names.items():
        export = ["onnx"] if name == "again" else []
        path = recipe(folder, f"{name}.yaml", **changes, train={"gradient_checkpointing": setting, "epochs": 1}, export=export)
        metrics = run("distill", path, out=tmp_path / name)
        if export:
            assert metrics["export"]["onnx"]["agreement"] == 1.0
    found = read(tmp_path / "again/environment.json")["choices"]["gradient_checkpointing"]
    assert found == {"value": ["body.0", "body.1"], "reason": "the blocks that the model repeats"}
    assert "gradient_checkpointing" not in read(tmp_path / "plain/environment.json")["choices"]
    for role in ("teacher", "student", "baseline"):
        plain = weights(tmp_path / "plain" / role)
        for name in ("again", "named"):
            assert weights(tmp_path / name / role) == plain, (role, name)
            assert read(tmp_path / name / role / "model.json") == read(tmp_path / "plain" / role / "model.json")


def test_a_named_layer_that_is_never_called_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path)
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + STACKED)
    path = recipe(folder, student={"model": "python:nets.py:stacked"}, train={"gradient_checkpointing": ["body.*", "idle"]})
    assert limbeck("distill", path, "--out", tmp_path / "run") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "train.gradient_checkpointing: 'idle' is not called in the student's forward pass." in said
    assert not (tmp_path / "run").exists()
