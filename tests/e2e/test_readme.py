"""The code of the README's section "The student alone" runs, without Limbeck, and gives the student's answers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.export import export_model
from limbeck.models import Model, build_model, save_model, wrap_module
from limbeck.types import ImagePreprocessing, TextPreprocessing
from models_support import NAMES, floats, images, spec, text_folder, texts

README = Path(__file__).parents[2] / "README.md"
SECTION = README.read_text(encoding="utf-8").partition("\n## The student alone\n")[2].partition("\n## ")[0]
BLOCKS: dict[str, str] = dict(re.findall(r"<!-- run: (\S+) -->\n```python\n(.*?)```", SECTION, re.DOTALL))

NETS = """
from torch import nn


class Small(nn.Module):
    def __init__(self, num_classes=4, width=5):
        super().__init__()
        self.body = nn.Linear(6, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.body(x).relu())
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the README's paths are relative to, with the user's own nets.py and a photo in it."""
    from PIL import Image

    (tmp_path / "nets.py").write_text(NETS)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("nets", None)
    yield tmp_path
    sys.modules.pop("nets", None)


def build(name: str, data: Any, base: Path, **options: Any) -> Model:
    return build_model(spec(name, **options), role="student", data=data, seed=0, base=base)


def timm(here: Path) -> Model:
    return build("timm:test_vit", images(size=(64, 64)), here, patch_size=8)


def torchvision(here: Path) -> Model:
    return build("torchvision:shufflenet_v2_x0_5", images(), here)


def huggingface(here: Path) -> Model:
    text_folder(here / "bert")
    return build("hf:bert", texts(), here, layers=[0, 2])


def python(here: Path) -> Model:
    return build("python:nets.py:Small", floats(), here, width=7)


def module(here: Path) -> Model:
    found: dict[str, Any] = {}
    exec(NETS, found)
    net: nn.Module = found["Small"]()
    return wrap_module(net, role="student", data=floats())


ALONE: dict[str, Callable[[Path], Model]] = {
    "timm": timm,
    "torchvision": torchvision,
    "huggingface": huggingface,
    "python": python,
    "module": module,
}


def run(name: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a block leaves behind."""
    code = BLOCKS[name]
    assert "limbeck" not in code
    names = {} if names is None else names
    exec(compile(code, f"README.md, {name}", "exec"), names)
    return names


def drawn(model: Model, rows: int) -> dict[str, torch.Tensor]:
    """Random prepared inputs, as the model takes them."""
    how, g = model.preprocessing, torch.Generator().manual_seed(1)
    if isinstance(how, ImagePreprocessing):
        return {"image": torch.randn(rows, how.channels, how.height or 32, how.width or 32, generator=g)}
    if isinstance(how, TextPreprocessing):
        ids = torch.randint(2, 20, (rows, 9), generator=g)
        return {name: ids if name == "input_ids" else torch.full_like(ids, name == "attention_mask") for name in how.inputs}
    return {"x": torch.randn(rows, *how.shape, generator=g)}


def answers(model: Model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs)


def test_every_block_is_run_here() -> None:
    assert set(BLOCKS) == {*ALONE, "images", "onnx-image", "onnx-text"}
    assert SECTION.count("```python") == len(BLOCKS)


@pytest.mark.parametrize("name", ALONE)
def test_a_student_loads_without_limbeck(name: str, here: Path) -> None:
    student = ALONE[name](here)
    save_model(student, here / "runs/mine/student", NAMES)
    alone = run(name)["model"]
    assert not alone.training
    inputs = drawn(student, 3)
    with torch.no_grad():
        found = alone(**inputs).logits if name == "huggingface" else alone(next(iter(inputs.values())))
    assert torch.equal(found, answers(student, inputs))


def test_the_text_example_prints_a_class(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(huggingface(here), here / "runs/mine/student", NAMES)
    run("huggingface")
    assert capsys.readouterr().out.strip() in NAMES


def test_images_are_prepared_as_the_record_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = torchvision(here)
    save_model(student, here / "runs/mine/student", NAMES)
    names = run("torchvision")
    names["images"] = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    run("images", names)
    mean, std = (np.reshape(v, (3, 1, 1)) for v in ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)))
    expected = answers(student, {"image": torch.from_numpy((names["images"].numpy() / 255 - mean) / std).float()})
    torch.testing.assert_close(names["logits"].detach(), expected, rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().out.strip() == str([NAMES[i] for i in expected.argmax(1)])


def test_the_onnx_file_alone_names_the_class_of_a_photo(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    student = torchvision(here)
    export_model(student, ["onnx"], here / "runs/mine/export", inputs=drawn(student, 16), classes=NAMES, task="image-classification")
    names = run("onnx-image")
    pixels = np.asarray(Image.open(here / "photo.png"), dtype=np.float64).transpose(2, 0, 1)
    mean, std = (np.reshape(v, (3, 1, 1)) for v in ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)))
    expected = answers(student, {"image": torch.from_numpy((pixels / 255 - mean) / std).float()[None]})
    torch.testing.assert_close(torch.from_numpy(names["logits"]), expected, rtol=1e-3, atol=1e-3)
    assert capsys.readouterr().out.strip() == NAMES[int(expected[0].argmax())]


def test_the_onnx_file_of_a_text_student_brings_its_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = huggingface(here)
    export_model(student, ["onnx"], here / "runs/mine/export", inputs=drawn(student, 16), classes=NAMES, task="text-classification")
    names = run("onnx-text")
    given = {k: torch.tensor([names["given"][k]]) for k in json.loads(names["facts"]["preprocessing"])["inputs"]}
    expected = answers(student, given)
    torch.testing.assert_close(torch.from_numpy(names["logits"]), expected, rtol=1e-3, atol=1e-4)
    assert capsys.readouterr().out.strip() == NAMES[int(expected[0].argmax())]
