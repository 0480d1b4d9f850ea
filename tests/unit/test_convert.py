"""Tensors come out of a foreign checkpoint unchanged, and nothing else comes out of it."""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import limbeck.convert
from limbeck.convert import convert
from limbeck.errors import UsageError


def weights() -> dict[str, torch.Tensor]:
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    return {**made, "half": torch.arange(4).bfloat16(), "flags": torch.tensor([True, False]), "scalar": torch.tensor(3.0)}


def saved(tmp_path: Path, value: Any, name: str = "model.pth") -> Path:
    torch.save(value, tmp_path / name)
    return tmp_path / name


def same(target: Path, wanted: dict[str, torch.Tensor]) -> bool:
    got = load_file(str(target))
    return got.keys() == wanted.keys() and all(got[n].dtype == t.dtype and torch.equal(got[n], t) for n, t in wanted.items())


def refusal(tmp_path: Path, source: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as failure:
        convert(source, tmp_path / "out.safetensors", **options)
    assert not (tmp_path / "out.safetensors").exists()
    assert not list(tmp_path.glob(".*"))
    return str(failure.value)


STATE = weights()
TRAINING = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}, "epoch": 3, "best": torch.tensor(0.5)}


@pytest.mark.parametrize(
    ("value", "key", "prefix"),
    [
        (STATE, "", ""),
        (collections.OrderedDict(STATE), "", ""),
        ({"state_dict": STATE, **TRAINING}, "state_dict", ""),
        ({"model": STATE, **TRAINING}, "model", ""),
        ({"checkpoint": {"net": STATE}}, "checkpoint/net", ""),
        ({f"module.{k}": v for k, v in STATE.items()}, "", "module."),
        ({"model": {f"module._orig_mod.{k}": v for k, v in STATE.items()}}, "model", "module._orig_mod."),
        ({"state_dict": {f"model.{k}": v for k, v in STATE.items()}, "pytorch-lightning_version": "2.5"}, "state_dict", "model."),
    ],
)
def test_the_tensors_are_found_and_unchanged(value: Any, key: str, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.safetensors"
    found = convert(saved(tmp_path, value), target)
    assert same(target, STATE)
    assert (found["key"], found["prefix"], found["tensors"]) == (key, prefix, len(STATE))
    assert found["parameters"] == sum(t.numel() for t in STATE.values())
    out = capsys.readouterr().out
    assert f"{len(STATE)} tensors" in out
    assert found["sha256"] in out
    with safe_open(str(target), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pth", "out.safetensors"]


def test_a_prefix_that_only_some_names_have_is_a_name(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(2), "b": torch.ones(2)}
    assert convert(saved(tmp_path, state), tmp_path / "out.safetensors")["prefix"] == ""
    assert same(tmp_path / "out.safetensors", state)


def test_a_models_own_name_model_is_kept(tmp_path: Path) -> None:
    state = {"model.embed.weight": torch.ones(2), "model.layers.0.weight": torch.ones(2)}
    convert(saved(tmp_path, {"state_dict": state}), tmp_path / "out.safetensors")
    assert same(tmp_path / "out.safetensors", state)


def test_several_sets_need_a_choice(tmp_path: Path) -> None:
    average = {k: v + 1 for k, v in STATE.items() if v.is_floating_point()}
    source = saved(tmp_path, {"model": STATE, "model_ema": average, **TRAINING})
    said = refusal(tmp_path, source)
    assert "'model'" in said
    assert "'model_ema'" in said
    assert "--key" in said
    assert "Did you mean 'model_ema'?" in refusal(tmp_path, source, key="model_em")
    convert(source, tmp_path / "out.safetensors", key="model_ema")
    assert same(tmp_path / "out.safetensors", average)


def test_tied_and_strided_weights(tmp_path: Path) -> None:
    table = torch.randn(4, 3)
    source = saved(tmp_path, {"embed": table, "head": table, "turned": table.t(), "row": table[1]})
    convert(source, tmp_path / "out.safetensors")
    assert same(tmp_path / "out.safetensors", {"embed": table, "head": table, "turned": table.t(), "row": table[1]})


class Bomb:
    """What a hostile file does when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    source = saved(tmp_path, {"state_dict": STATE, "extra": Bomb(tmp_path / "ran")})
    said = refusal(tmp_path, source)
    assert "Python objects" in said
    assert "mkdir" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (nn.Linear(2, 2), "Python objects"),
        (torch.ones(3), "a tensor of shape (3,)"),
        ([torch.ones(3)], "a list of 1"),
        ({}, "is empty"),
        ({**STATE, "epoch": 3}, "'epoch' (int)"),
        ({"epoch": 3}, "'epoch' (int)"),
        ({"a": torch.eye(3).to_sparse()}, "'a' (torch.sparse_coo)"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "'a' (torch.complex64)"),
    ],
)
def test_anything_else_than_tensors_gets_a_sentence(value: Any, says: str, tmp_path: Path) -> None:
    assert says in refusal(tmp_path, saved(tmp_path, value))


def test_other_files_get_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights here")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "program.pt"))
    cut = saved(tmp_path, STATE, "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    saved(tmp_path / "folder", STATE, "pytorch_model.bin")
    assert "no PyTorch file" in refusal(tmp_path, tmp_path / "text.pth")
    assert "TorchScript" in refusal(tmp_path, tmp_path / "program.pt")
    assert "damaged" in refusal(tmp_path, tmp_path / "cut.pth")
    assert "damaged" in refusal(tmp_path, tmp_path / "empty.pth")
    assert "pytorch_model.bin" in refusal(tmp_path, tmp_path / "folder")
    assert "Did you mean 'whole.pth'?" in refusal(tmp_path, tmp_path / "whol.pth")


def test_all_wrong_paths_at_once_and_nothing_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as failure:
        convert(tmp_path / "absent.pth", tmp_path / "out.pt")
    assert len(failure.value.problems) == 2
    target = tmp_path / "out.safetensors"
    target.write_text("precious")
    with pytest.raises(UsageError, match="not overwritten"):
        convert(saved(tmp_path, STATE), target)
    assert target.read_text() == "precious"


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    names = list(STATE)
    parts = {"a.bin": names[:3], "b.bin": names[3:]}
    for file, inside in parts.items():
        saved(tmp_path, {n: STATE[n] for n in inside}, file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {n: f for f, inside in parts.items() for n in inside}}))
    convert(index, tmp_path / "out.safetensors")
    assert same(tmp_path / "out.safetensors", STATE)


@pytest.mark.parametrize(("version", "warned"), [("2.6.0+cu124", True), ("2.9.1", True), ("2.10.0", False), ("2.14.1+cpu", False)])
def test_old_pytorch_is_warned_of(
    version: str, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limbeck.convert.torch, "__version__", version)
    found = convert(saved(tmp_path, STATE), tmp_path / "out.safetensors")
    err = capsys.readouterr().err
    assert ("CVE-2026-24747" in err) == warned == any("CVE" in n for n in found["notes"])


def test_a_nan_is_mentioned(tmp_path: Path) -> None:
    found = convert(saved(tmp_path, {"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(1)}), tmp_path / "out.safetensors")
    assert "1 of the tensors" in found["notes"][-1]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    source = saved(tmp_path, STATE)
    monkeypatch.setattr(limbeck.convert.os, "fsync", full)
    with pytest.raises(limbeck.errors.DiskFull):
        convert(source, tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pth"]
