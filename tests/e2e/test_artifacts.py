"""Students of five kinds, trained a moment, in every format: parity, the allowed drop, and answers without PyTorch and Limbeck."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from answering import answer, photos
from models_support import text_folder
from running import arrays, left_over, limbeck, make_folder, read, recipe, run

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("timm")

NETS = """
from torch import nn


def cnn(num_classes=3):
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(288, num_classes))


def plain(num_classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, num_classes))
"""

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
STUDENTS: dict[str, dict[str, Any]] = {
    "cnn": {"student": {"model": "python:students.py:cnn"}},
    "vit": {"student": {"model": "timm:vit_tiny_patch16_224", "options": VIT}},
    "mobilenet": {"student": {"model": "timm:mobilenetv3_small_050"}, "train": {"epochs": 12, "lr": 0.01}},
    "bert": {"student": {"model": "hf:bert"}, "data": {"source": "csv:d.csv"}, "task": "text-classification"},
    "plain": {"student": {"model": "python:students.py:plain"}, "data": {"source": "npz:floats.npz"}, "train": {"precision": "float64"}},
}


def trained(name: str, folder: Path) -> Path:
    """A run of ``limbeck train`` on pictures of 32 x 32 in three channels, on texts, or on float arrays in float64."""
    make_folder(folder)
    (folder / "students.py").write_text(NETS)
    splits = arrays(240)
    np.savez(folder / "floats.npz", **{k: v / 255 if k.endswith("x") else v for k, v in splits.items()})
    large = {k: np.repeat(v.repeat(4, 1).repeat(4, 2)[..., None], 3, -1) if k.endswith("x") else v for k, v in splits.items()}
    np.savez(folder / "pictures.npz", **large)
    text_folder(folder / "bert", layers=2)
    rows = [f"w{i} w{j} w{(i * j) % 14},{'odd' if j % 2 else 'even'}" for i in range(14) for j in range(14)]
    (folder / "d.csv").write_text("\n".join(["text,label", *rows]))
    changes = {"teacher": None, **STUDENTS[name], "train": {"epochs": 6, "lr": 0.01, **STUDENTS[name].get("train", {})}}
    run("train", recipe(folder, **changes), out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module", params=list(STUDENTS))
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, trained(request.param, tmp_path_factory.mktemp(request.param) / "base")


def test_every_format_passes_and_is_measured(student: tuple[str, Path]) -> None:
    name, path = student
    assert limbeck("export", path, "--format", "onnx,torchscript,pt2") == 0
    assert limbeck("export", path, "--quantize", "int8", "--max-drop", "1", "--layout", "triton") == 0
    assert limbeck("export", path, "--quantize", "fp16") == 0
    metrics = read(path / "metrics.json")
    exported, trained_accuracy = metrics["export"], metrics["models"]["student"]["metrics"]["accuracy"]
    for key in ("onnx", "torchscript", "pt2"):
        assert exported[key]["agreement"] == 1.0
        assert exported[key]["test"]["metrics"]["accuracy"] == pytest.approx(trained_accuracy)
    for key, allowed in (("onnx-int8", 1), ("onnx-fp16", 0.5)):
        how = exported[key]["quantization"]
        assert how["drop"] <= allowed
        assert exported[key]["bytes"] < exported["onnx"]["bytes"]
        assert how["float32"]["sha256"] == exported["onnx"]["sha256"]
    wanted = {"vit": "dynamic", "bert": "dynamic"}.get(name, "static")
    assert exported["onnx-int8"]["quantization"]["method"] == wanted
    assert "What to deploy" in (path / "report.html").read_text(encoding="utf-8")
    assert not left_over(path)


def questions(name: str, folder: Path) -> list[list[str]]:
    if name == "bert":
        return [["w1 w2"], ["w3 w4 w5", "w1"]]
    if name == "plain":
        np.save(folder / "x.npy", np.random.default_rng(0).random((8, 8)))
        return [[str(folder / "x.npy")]]
    return [[str(photo)] for photo in photos(folder)]


def test_every_artifact_answers_without_pytorch_and_limbeck(
    student: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, path = student
    for options, key in ((["--layout", "folder"], "onnx-float32"), (["--quantize", "int8", "--max-drop", "1"], "onnx-int8")):
        assert limbeck("export", path, *options) == 0
        artifact = path / "export" / key
        for asked in questions(name, tmp_path):
            found = answer(artifact, *asked)
            assert list(found.values()) == sorted(found.values(), reverse=True)
            assert sum(found.values()) == pytest.approx(1, abs=1e-5)
            if len(asked) > 1:  # a pair, which `limbeck predict` takes from a table
                (tmp_path / "pair.csv").write_text(f"text,text_pair\n{','.join(asked)}\n")
            capsys.readouterr()
            given = tmp_path / "pair.csv" if len(asked) > 1 else asked[0]
            if name == "bert" and len(asked) == 1:
                given = tmp_path / "text.txt"
                given.write_text(asked[0])
            if name == "plain":
                given = tmp_path / "x1.npy"
                np.save(given, np.load(asked[0])[None])
            assert limbeck("predict", artifact, given) == 0
            line = json.loads(capsys.readouterr().out)
            # a value on the edge of two of the 256 steps may fall to either side
            assert line["probabilities"] == pytest.approx(found, abs=2e-5 if key == "onnx-float32" else 0.05)


WITHOUT_LIMBECK = """
import sys, numpy, torch
class Never:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in ("limbeck", "timm", "transformers"), name
sys.meta_path.insert(0, Never())
path = sys.argv[1]
module = torch.jit.load(path) if path.endswith(".pt") else torch.export.load(path).module()
case = numpy.load(sys.argv[2])
with torch.no_grad():
    numpy.save(sys.argv[3], module(*(torch.from_numpy(case[name]) for name in case)).numpy())
"""


def test_files_for_pytorch_answer_without_limbeck(student: tuple[str, Path], tmp_path: Path) -> None:
    _, path = student
    assert limbeck("export", path, "--format", "onnx", "--format", "torchscript,pt2") == 0
    session = onnxruntime.InferenceSession(str(path / "export/model.onnx"), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    case: dict[str, Any] = {}
    for value in session.get_inputs():
        shape = [n if isinstance(n, int) else 5 + i for i, n in enumerate(value.shape)]
        case[value.name] = rng.random(shape, dtype=np.float32) if value.type == "tensor(float)" else np.ones(shape, dtype=np.int64)
    (wanted,) = session.run(["logits"], case)
    np.savez(tmp_path / "case.npz", **case)
    for file in ("model.torchscript.pt", "model.pt2"):
        command = [
            sys.executable,
            "-c",
            WITHOUT_LIMBECK,
            str(path / "export" / file),
            str(tmp_path / "case.npz"),
            str(tmp_path / "found.npy"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert np.abs(np.load(tmp_path / "found.npy") - wanted).max() <= 1e-4 * max(1, np.abs(wanted).max())


def test_a_new_environment_with_what_the_readme_names_is_enough(tmp_path: Path) -> None:
    """``python -m venv``, and no package but those."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin" / "python"
    packages = ["onnxruntime", "numpy", "pillow", "tokenizers"]
    installed = subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"no package index: {installed.stderr.strip().splitlines()[-1]}")
    there = subprocess.run([str(python), "-c", "import torch"], capture_output=True)
    assert there.returncode == 1
    for name in ("cnn", "bert"):
        path = trained(name, tmp_path / name)
        assert limbeck("export", path, "--quantize", "int8", "--max-drop", "1") == 0
        artifact = path / "export/onnx-int8"
        for asked in questions(name, tmp_path):
            assert answer(artifact, *asked, python=python) == pytest.approx(answer(artifact, *asked), abs=0.05)
