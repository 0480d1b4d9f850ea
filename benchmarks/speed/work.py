"""The same work for all sides: one folder with the data, the rows of every step, and the initial weights, written by Limbeck's own parts.

    train.npz             train_x (uint8, NHWC), train_y; a small validation and test split
    rows.npy              (steps, batch) which training rows each optimiser step reads: Limbeck's own order
    student.safetensors   initial weights;  teacher.safetensors  the teacher's
    work.json             models, normalisation, batch size, augmentation, loss and optimiser

Every side gets the same values, normalised by the same mean and standard deviation, in the same order. Which view of a sample a side makes (where
it crops, whether it turns) is its own draw of the same distribution.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from limbeck._parts import Parts
from limbeck.data import load_data
from limbeck.models import build_model
from limbeck.randomness import order
from limbeck.reading import build_recipe
from speed.measuring import ROOT, WORK, limbeck, matmul_rate, read_json

KD = [{"loss": "kd", "weight": 0.7, "temperature": 6.0}, {"loss": "cross_entropy", "weight": 0.3}]
MODELS = ROOT / "benchmarks/models"


def cifar(
    name: str, *, rows: int, test: int = 512, epochs: int = 1, batch: int = 128, trained: bool = False, **train: Any
) -> dict[str, Any]:
    """The CIFAR-10 pair of the spine on the first ``rows`` training images. Returns a recipe, its folder in ``out``.

    trained: whether the teacher is a trained one, which only matters where accuracy does."""
    with np.load(data("cifar10.npz", "cifar10")) as file:
        x, y, test_x, test_y = (file[k] for k in ("train_x", "train_y", "test_x", "test_y"))
    folder = fresh(name)
    arrays = {"train_x": x[:rows], "train_y": y[:rows], "test_x": test_x[:test], "test_y": test_y[:test]}
    np.savez(folder / "train.npz", **arrays, valid_x=x[-256:], valid_y=y[-256:])
    recipe = {
        "task": "image-classification",
        "teacher": {"model": f"run:{cifar_teacher()}" if trained else f"python:{MODELS / 'cifar.py'}:teacher"},
        "student": {"model": f"python:{MODELS / 'cifar.py'}:student"},
        "data": {"source": f"npz:{folder / 'train.npz'}", "augment": {"crop": 2, "flip": True}},
    }
    return finish(folder, recipe, "cifar", epochs, batch, train)


def digits(name: str, *, epochs: int, batch: int = 32, **train: Any) -> dict[str, Any]:
    """The tiny MLPs on the embedded digits, as bytes: no augmentation."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) * 15.9).astype(np.uint8)
    folder = fresh(name)
    cut = 1536  # whole batches
    arrays = {"train_x": images[:cut], "train_y": labels[:cut], "test_x": images[cut:], "test_y": labels[cut:]}
    np.savez(folder / "train.npz", **arrays, valid_x=images[cut:], valid_y=labels[cut:])
    recipe = {
        "task": "image-classification",
        "teacher": {"model": f"python:{MODELS / 'mlp.py'}:teacher"},
        "student": {"model": f"python:{MODELS / 'mlp.py'}:student"},
        "data": {"source": f"npz:{folder / 'train.npz'}"},
    }
    return finish(folder, recipe, "mlp", epochs, batch, train)


def finish(folder: Path, recipe: dict[str, Any], module: str, epochs: int, batch: int, train: dict[str, Any]) -> dict[str, Any]:
    """Complete the recipe, and write what the other sides need."""
    plain = {"epochs": epochs, "batch_size": batch, "precision": "float32", "workers": 0, "device": "cpu", **train}
    recipe |= {
        "seed": 0,
        "objective": KD,
        "train": plain,
        "baseline": False,
        "export": [],
        "teacher_cache": {"mode": "off", "views": "live"},
    }
    checked = build_recipe(recipe, command="distill")
    loaded = load_data(checked.data, checked.task, ROOT)
    student = build_model(checked.student, role="student", data=loaded, seed=0, base=ROOT)
    teacher = build_model(checked.teacher, role="teacher", data=loaded, seed=0, base=ROOT)  # type: ignore[arg-type]
    for role, model in (("student", student), ("teacher", teacher)):
        save_file({k: v.contiguous() for k, v in model.module.state_dict().items()}, folder / f"{role}.safetensors")
    count = len(loaded.train)
    if count % batch:
        raise ValueError(f"{count} rows are not whole batches of {batch}")
    np.save(folder / "rows.npy", np.concatenate([order(count, 0, "order", epoch).reshape(-1, batch) for epoch in range(epochs)]))
    settings = checked.train
    augment = recipe["data"].get("augment", {})
    about = {
        "module": str(MODELS / f"{module}.py"),
        "classes": len(loaded.classes),
        "mean": student.preprocessing.mean,  # type: ignore[union-attr]
        "std": student.preprocessing.std,  # type: ignore[union-attr]
        "crop": augment.get("crop", 0),
        "flip": augment.get("flip", False),
        "temperature": KD[0]["temperature"],
        "alpha": KD[0]["weight"],
        "optimizer": settings.optimizer,
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "schedule": settings.schedule,
        "clip_norm": settings.clip_norm,
        "layout": settings.layout or "channels_first",
    }
    (folder / "work.json").write_text(json.dumps(about, indent=1))
    prepared = {"recipe": recipe, "work": str(folder)}
    save_recipe(prepared, recipe)
    return prepared


def save_recipe(prepared: dict[str, Any], recipe: dict[str, Any], name: str = "recipe") -> Path:
    """The recipe as a file (JSON is YAML), for commands."""
    path = Path(prepared["work"]) / f"{name}.json"
    path.write_text(json.dumps(recipe, indent=1))
    return path


def train_rows(prepared: dict[str, Any]) -> np.ndarray[Any, Any]:
    with np.load(Path(prepared["work"]) / "train.npz") as file:
        return np.asarray(file["train_y"])


def default_views() -> int:
    """The number of views that a recipe has where it says nothing."""
    from limbeck.recipe import TeacherCache

    return int(TeacherCache().views)


def fresh(name: str) -> Path:
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def data(file: str, fetched_as: str) -> Path:
    """A file of ``data/``, fetched first where it is not there."""
    path = ROOT / "data" / file
    if not path.exists():
        import subprocess

        subprocess.run([sys.executable, ROOT / "benchmarks/fetch.py", fetched_as], check=True)
    return path


def cifar_teacher() -> Path:
    """The teacher of examples/cifar10-teacher.yaml, or where that was not trained yet, two epochs of it on a part of the images."""
    for name in ("cifar10-teacher", "bench-cifar10-teacher"):
        if (ROOT / "runs" / name / "metrics.json").is_file():
            return ROOT / "runs" / name
    data("cifar10.npz", "cifar10")
    out = ROOT / "runs/bench-cifar10-teacher"
    quick_in_bf16 = matmul_rate(torch.bfloat16) > matmul_rate(torch.float32)  # not every processor has instructions for it
    limbeck(
        "train",
        "examples/cifar10-teacher.yaml",
        "--set",
        "train.epochs=2",
        "--set",
        "data.train_limit=12800",
        "--set",
        f"train.precision={'bf16' if quick_in_bf16 else 'float32'}",
        "--set",
        "export=[]",
        "--out",
        str(out),
        "--resume",
        out=WORK / "teacher",
    )
    return out


def text_teacher() -> Path:
    """The teacher of examples/r8-teacher.yaml, trained where it is not there (about 4 minutes)."""
    out = ROOT / "runs/r8-teacher"
    if not (out / "metrics.json").is_file():
        data("r8.csv", "r8")
        data("minilm-l6", "minilm")
        limbeck("train", "examples/r8-teacher.yaml", "--out", str(out), "--resume", out=WORK / "text-teacher")
    return out


def accuracy(work: str, weights: Path) -> float:
    """Test accuracy on all 10,000 images of a student that a side left, by one and the same code for all sides."""
    recipe = build_recipe(read_json(Path(work) / "recipe.json"), command="distill")
    loaded = load_data(recipe.data.model_copy(update={"source": f"npz:{data('cifar10.npz', 'cifar10')}"}), recipe.task, ROOT)
    model = build_model(recipe.student, role="student", data=load_data(recipe.data, recipe.task, ROOT), seed=0, base=ROOT)
    model.module.load_state_dict(load_file(weights))
    parts = Parts(recipe, loaded, model.preprocessing, None)
    from limbeck.engine import Engine

    logits = parts.logits(model, loaded.test, Engine(torch.device("cpu")))
    return float((logits.argmax(1) == loaded.test.labels).mean())
