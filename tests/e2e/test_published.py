"""Every method of a paper runs by its recipe's name, on data of the right shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.published import PAIRS, names
from models_support import tokenizer_in
from running import limbeck, run

IMAGES = "cifar100-resnet56-resnet20"
SHORT = ("--set", "train.epochs=1", "--set", "train.log_every=1", "--set", "export=[]", "--no-baseline")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 classes of three images, and a teacher of the pair's family."""
    folder = tmp_path_factory.mktemp("published")
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name, count in (("train", 300), ("test", 100)):
        arrays |= {f"{name}_x": random.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8), f"{name}_y": np.arange(count) % 100}
    np.savez(folder / "cifar100.npz", **arrays)
    run(
        "train",
        "--student",
        "cifar:resnet14",
        "--data",
        f"npz:{folder}/cifar100.npz",
        "--set",
        "data.valid_fraction=0.34",
        *SHORT[:-1],
        out=folder / "teacher",
    )
    return folder


@pytest.mark.parametrize("method", PAIRS[IMAGES].methods)
def test_two_steps_of_every_method_on_images(there: Path, tmp_path: Path, method: str) -> None:
    changes = ("--set", "data.valid_fraction=0.34", "--set", "teacher.train=null", "--batch-size", "100", *SHORT)
    if method == "crd":
        changes += ("--set", "objective.0.negatives=50")
    found = run(
        *("distill", f"{IMAGES}/{method}", "--data", f"npz:{there}/cifar100.npz"),
        *("--teacher", f"run:{there}/teacher", "--student", "cifar:resnet8", *changes),
        out=tmp_path / "run",
    )
    assert found["models"]["student"]["parameters"] < found["models"]["teacher"]["parameters"]
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert sum('"loss"' in line for line in lines) == 2


def test_one_command_trains_the_teacher_too(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a file of that name goes before the recipe."""
    monkeypatch.chdir(there)
    models = ("--set", "teacher.model=cifar:resnet14", "--student", "cifar:resnet8")
    few = ("--set", "teacher.train.epochs=1", "--set", "data.valid_fraction=0.34", "--batch-size", "100", *models, *SHORT[:-1])
    found = run("distill", f"{IMAGES}/kd", *few, out=tmp_path / "run")
    assert {"teacher", "student", "baseline"} <= found["models"].keys()
    kept = (tmp_path / "run/recipe.yaml").read_text()
    assert "cifar:resnet14" in kept
    assert limbeck("distill", "--out", tmp_path / "run", "--resume") == 0
    (there / IMAGES).mkdir()
    (there / IMAGES / "kd").write_text("teacher: nobody\n")
    assert limbeck("distill", f"{IMAGES}/kd", *few, "--out", tmp_path / "other") == 2


def test_a_name_that_is_near_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert limbeck("distill", f"{IMAGES}/kdd") == 2
    assert f"{IMAGES}/kd" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["imagenet-resnet34-resnet18/attention_transfer", "imagenet-resnet50-mobilenet_v1/dkd"])
def test_two_steps_on_photos(tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "imagenet" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(0, 255, (64, 73, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    # no weights from a hub here: the teacher is fitted first
    changes = ("--set", "teacher.weights=scratch", "--set", "teacher.train={epochs: 1}", "--set", "teacher.options={resolution: 64}")
    less = ("--set", "student.options.resolution=64", "--set", "data.valid_fraction=0.2", "--batch-size", "10", "--lr", "0.01")
    found = run("distill", name, "--data", f"imagefolder:{tmp_path}/imagenet", *changes, *less, *SHORT, out=tmp_path / "run")
    assert found["models"]["student"]["parameters"] > 1e6


@pytest.mark.parametrize("which", ["distilbert", "minilm", "tinybert"])
def test_two_steps_on_texts(tmp_path: Path, which: str) -> None:
    """Twelve layers into six, 12 heads, 48 relations: as in the papers, and 16 times narrower."""
    import transformers as t

    words = ["good", "bad", "very", "film"]
    folder = tmp_path / "glue" / "qnli"
    folder.mkdir(parents=True)
    for part, count in (("train", 40), ("dev", 12)):
        lines = [{"question": f"{words[i % 2]} film {i}", "sentence": f"very {words[i % 3]}", "label": i % 2} for i in range(count)]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    own: dict[str, Any] = {"vocab_size": 20, "pad_token_id": 0, "max_position_embeddings": 16}

    def bert(layers: int) -> Any:
        return t.BertConfig(hidden_size=48, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=64, **own)

    small = t.DistilBertConfig(dim=48, n_layers=6, n_heads=12, hidden_dim=64, **own) if which == "distilbert" else bert(6)
    for name, config in (("teacher", bert(12)), ("student", small)):
        torch.manual_seed(0)
        t.AutoModel.from_config(config).save_pretrained(tmp_path / name)
        tokenizer_in(tmp_path / name)
    pair = f"glue-qnli-bert-{which}"
    models = ("--set", f"teacher.model=hf:{tmp_path}/teacher", "--student", f"hf:{tmp_path}/student", "--set", "teacher.train.epochs=1")
    data = ("--data", f"jsonl:{folder}/train.jsonl", "--set", f"data.test={folder}/dev.jsonl", "--set", "data.valid_fraction=0.2")
    for name in (n for n in names() if n.startswith(f"{pair}/")):
        short = [*SHORT, "--set", "data.max_length=16"]
        if name.endswith("/tinybert"):  # it has stages in place of epochs
            del short[:2]
        found = run("distill", name, *data, *models, *short, out=tmp_path / name.replace("/", "-"))
        assert found["models"]["student"]["parameters"] < found["models"]["teacher"]["parameters"]
        log = [json.loads(line) for line in (tmp_path / name.replace("/", "-") / "log.jsonl").read_text().splitlines()]
        assert any("terms" in line and line.get("role") == "student" for line in log)
