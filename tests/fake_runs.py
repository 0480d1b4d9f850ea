"""Run directories as `limbeck distill` and `limbeck train` leave them, without training anything."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from limbeck.analysis import analyse
from limbeck.verdict import verdict

SKILL = {"teacher": 3.4, "baseline": 2.1, "student": 2.5}
SIZE = {
    "teacher": (21_282_122, 85_200_000, 1_160_000_000, 18.4),
    "baseline": (275_572, 1_120_000, 41_300_000, 1.62),
    "student": (275_572, 1_120_000, 41_300_000, 1.59),
}
RECIPE = """\
task: {task}
seed: {seed}
teacher:
  model: run:runs/teacher
  weights: null
student:
  model: {student}
  weights: null
  options: {{}}
data:
  source: npz:cifar10.npz
  valid_fraction: 0.1
  augment: standard  # <not a tag> & not an entity
objective:
- loss: kd
  weight: 0.7
  temperature: {temperature}
- loss: cross_entropy
  weight: 0.3
train:
  epochs: {epochs}
  batch_size: 128
  optimizer: adamw
  lr: 0.001
  schedule: cosine
  precision: bf16
baseline: true
export: [onnx]
"""
REVIEW = "The film begins well enough, with a ferry crossing at dawn and nobody speaking, but the second hour forgets what it was about"


def class_names(n: int) -> list[str]:
    known = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    return known if n == 10 else ["negative", "positive"] if n == 2 else [f"class {i:03d}" for i in range(n)]


def fake_run(
    path: Path,
    *,
    classes: Sequence[str] | int = 10,
    items: int = 600,
    roles: Sequence[str] = ("teacher", "baseline", "student"),
    kind: str = "image",
    seed: int = 0,
    skill: dict[str, float] | None = None,
    epochs: int = 8,
    temperature: float = 4.0,
    student: str = "torchvision:resnet18",
    notes: Sequence[str] = (),
    changes: dict[str, Any] | None = None,
) -> Path:
    """One finished run. ``changes`` are written over metrics.json last."""
    rng = np.random.default_rng(seed)
    names = class_names(classes) if isinstance(classes, int) else list(classes)
    path.mkdir(parents=True, exist_ok=True)
    labels = rng.integers(0, len(names), items)
    hard = rng.normal(0, 1.3, items)
    shared = rng.normal(size=(items, len(names)))
    logits = {}
    for role in roles:
        own = rng.normal(size=(items, len(names)))
        logits[role] = 0.7 * shared + 0.7 * own
        logits[role][np.arange(items), labels] += {**SKILL, **(skill or {})}[role] * math.sqrt(math.log10(len(names)) + 0.3) - hard
        logits[role] *= 1.5
    task = "text-classification" if kind == "text" else "image-classification"
    found = analyse(labels=labels, logits=logits, classes=names, sample=lambda i: _sample(kind, int(labels[i]), i))
    metrics = _metrics(task, labels, logits, found, seed)
    metrics["notes"] = list(notes)
    for key, value in (changes or {}).items():
        metrics[key] = value
    metrics["verdict"] = _verdict(metrics)
    _write(path / "metrics.json", metrics)
    _write(path / "analysis.json", found)
    _write(path / "environment.json", _environment(seed))
    recipe = RECIPE.format(task=task, seed=seed, student=student, epochs=epochs, temperature=temperature)
    if "teacher" not in roles:
        recipe = recipe.replace("teacher:\n  model: run:runs/teacher\n  weights: null\n", "")
    (path / "recipe.yaml").write_text(recipe, "utf-8")
    (path / "student").mkdir(exist_ok=True)
    prepared: dict[str, Any] = {
        "kind": "image",
        "channels": 3,
        "mean": [0.4914, 0.4822, 0.4465],
        "std": [0.247, 0.2435, 0.2616],
        "height": 32,
        "width": 32,
    }
    if kind == "text":
        (path / "student" / "config.json").write_text("{}", "utf-8")
        prepared = {"kind": "text", "max_length": 128, "inputs": ["input_ids", "attention_mask"]}
    _write(
        path / "student" / "model.json",
        {"spec": {"model": student, "weights": None, "options": {}}, "classes": names, "preprocessing": prepared},
    )
    _log(path / "log.jsonl", rng, found, roles, epochs)
    return path


def deployed(accuracy: float) -> dict[str, Any]:
    """Exports as `limbeck export` measures them, of a student with this accuracy."""

    def record(name: str, size: int, p50: float, lost: float, runtime: str = "ONNX Runtime") -> dict[str, Any]:
        return {
            "file": f"export/{name}",
            "sha256": hashlib.sha256(name.encode()).hexdigest(),
            "bytes": size,
            "max_abs_diff": 1e-5,
            "agreement": 1.0 - lost,
            "latency_ms": {"p50": p50, "p95": 1.3 * p50},
            "threads": 1,
            "throughput": {"items_per_second": 3000 / p50, "batch_size": 64},
            "test": {"items": 300, "metrics": {"accuracy": accuracy - lost}},
            "peak_rss_bytes": 61_000_000,
            "runtime": runtime,
        }

    return {
        "onnx": record("model.onnx", 1_130_000, 0.41, 0.0),
        "onnx-int8": record("onnx-int8/model.onnx", 320_000, 0.22, 0.003),
        "onnx-fp16": record("onnx-fp16/model.onnx", 590_000, 0.63, 0.0),
        "torchscript": record("model.torchscript.pt", 1_200_000, 1.0, 0.0, "TorchScript"),
        "pt2": record("model.pt2", 1_210_000, 1.35, 0.0, "torch.export"),
    }


def fake_seeds(path: Path, n: int, **settings: Any) -> Path:
    """A parent with ``n`` children: joint metrics in the parent, everything else in the children."""
    children = [json.loads((fake_run(path / f"seed-{i}", seed=i, **settings) / "metrics.json").read_text("utf-8")) for i in range(n)]
    joint = json.loads(json.dumps(children[0]))
    for role, model in joint["models"].items():
        values = {k: [c["models"][role]["metrics"][k] for c in children] for k in model["metrics"]}
        model["metrics"] = {k: float(np.mean(v)) for k, v in values.items()}
        model["metrics_std"] = {k: float(np.std(v, ddof=1)) for k, v in values.items()}
    joint.update(seeds=list(range(n)), best_seed=1, interval={"student_minus_baseline": [0.011, 0.034], "level": 0.95, "method": "seeds"})
    joint["verdict"] = _verdict(joint)
    _write(path / "metrics.json", joint)
    return path


def _verdict(metrics: dict[str, Any]) -> str:
    if metrics["models"]["student"]["metrics"]["accuracy"] is None:
        return "The student could not be measured."
    interval = (metrics.get("interval") or {}).get("student_minus_baseline")
    seeds = len(metrics["seeds"])
    return verdict(metrics["models"], interval, seeds, f"over {seeds} seeds" if seeds > 1 else "over the test items")


def _metrics(task: str, labels: np.ndarray, logits: dict[str, np.ndarray], found: dict[str, Any], seed: int) -> dict[str, Any]:
    models: dict[str, Any] = {}
    right = {role: values.argmax(1) == labels for role, values in logits.items()}
    for role, values in logits.items():
        shifted = values - values.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        parameters, size, flops, p50 = SIZE[role]
        models[role] = {
            "metrics": {
                "accuracy": float(right[role].mean()),
                "macro_f1": float(right[role].mean()) - 0.004,
                "nll": float(-log_p[np.arange(len(labels)), labels].mean()),
                "ece": found["models"][role]["ece"],
            },
            "parameters": parameters,
            "bytes": size,
            "flops": flops,
            "latency_ms": {"p50": p50, "p95": 1.3 * p50},
            "throughput": {"items_per_second": 21_000 / p50, "batch_size": 64},
        }
        if role == "student" and "teacher" in logits:
            models[role]["agreement"] = float((values.argmax(1) == logits["teacher"].argmax(1)).mean())
    accuracy = {role: model["metrics"]["accuracy"] for role, model in models.items()}
    metrics: dict[str, Any] = {
        "limbeck": "0.1.0",
        "task": task,
        "primary_metric": "accuracy",
        "seeds": [seed],
        "models": models,
        "gap_closed": None,
    }
    if "baseline" in accuracy and "student" in accuracy:
        gain = right["student"].astype(float) - right["baseline"]
        draws = np.random.default_rng(0).choice(gain, (500, len(gain))).mean(1)
        metrics["interval"] = {
            "student_minus_baseline": np.quantile(draws, [0.025, 0.975]).tolist(),
            "level": 0.95,
            "method": "paired bootstrap over test items",
        }
        if accuracy.get("teacher", 0) > accuracy["baseline"]:
            metrics["gap_closed"] = (accuracy["student"] - accuracy["baseline"]) / (accuracy["teacher"] - accuracy["baseline"])
    metrics["data"] = {"train": 45_000, "labelled": 4_000, "valid": 5_000, "test": len(labels)}
    metrics["cost"] = {
        "teacher_seconds": 96.0,
        "teacher_items": 180_000,
        "cache_hits": 1_440_000,
        "train_seconds": 512.4,
        "baseline_seconds": 498.1,
        "total_seconds": 1160.0,
        "peak_rss_bytes": 1_930_000_000,
    }
    metrics["export"] = {
        "onnx": {
            "file": "export/model.onnx",
            "bytes": 1_130_000,
            "max_abs_diff": 7.6e-6,
            "agreement": 1.0,
            "latency_ms": {"p50": 0.41, "p95": 0.58},
        }
    }
    return metrics


def _log(path: Path, rng: np.random.Generator, found: dict[str, Any], roles: Sequence[str], epochs: int) -> None:
    lines = []
    for role in ("baseline", "student"):
        if role not in roles:
            continue
        top = found["models"][role]["accuracy"] or 0.5
        for epoch in range(epochs):
            for i in range(12):
                step = epoch * 120 + (i + 1) * 10
                noise = float(np.exp(rng.normal(0, 0.09)))
                ce = (0.35 + 2.0 * math.exp(-step / 260)) * noise
                terms = {"kd": 6.2 * ce, "cross_entropy": ce} if role == "student" and "teacher" in roles else {"cross_entropy": ce}
                loss = 0.7 * terms["kd"] + 0.3 * ce if "kd" in terms else ce
                lines.append(
                    {
                        "role": role,
                        "step": step,
                        "epoch": epoch,
                        "loss": loss,
                        "terms": terms,
                        "lr": 1e-3,
                        "items_per_second": 4100.0,
                        "memory_bytes": 1_900_000_000,
                        "time": 1.0 * step,
                    }
                )
            accuracy = top * (1 - 0.75 * math.exp(-(epoch + 1) / 2.2)) + float(rng.normal(0, 0.005))
            lines.append(
                {
                    "role": role,
                    "epoch": epoch,
                    "step": (epoch + 1) * 120,
                    "valid": {"accuracy": accuracy, "nll": 2.2 * (1 - accuracy) + 0.2},
                }
            )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"role": "student", "st', "utf-8")


def _environment(seed: int) -> dict[str, Any]:
    return {
        "limbeck": "0.1.0",
        "python": "3.13.1",
        "platform": "Linux-6.8-x86_64",
        "versions": {"torch": "2.14.1", "torchvision": "0.29.1", "numpy": "2.3.0"},
        "device": {"type": "cpu", "name": "2 cores", "threads": 2},
        "world_size": 1,
        "precision": {"chosen": "bf16", "layout": "channels_last", "why": "fastest whose gradients agree (cosine 0.998)"},
        "seed": seed,
        "git": {"commit": hashlib.sha1(b"x").hexdigest(), "dirty": False},
        "facts": {"data": hashlib.sha256(b"data").hexdigest(), "teacher": hashlib.sha256(b"teacher").hexdigest()},
        "resumed_from": [],
    }


def _sample(kind: str, label: int, index: int) -> dict[str, Any]:
    if kind == "text":
        words = REVIEW.split()
        return {"text": " ".join(words[index % 5 : 9 + index % 17]) + "."}
    if kind == "tensor":
        return {}
    rng = np.random.default_rng(index)
    y, x = np.mgrid[0:32, 0:32]
    ground = np.stack([120 + 4 * y, 140 + 2 * y, 220 - 3 * y], -1) + rng.normal(0, 9, (32, 32, 3))
    ground[(x - 16) ** 2 / (40 + 8 * label) + (y - 17) ** 2 / 50 < 1] = rng.integers(20, 235, 3)
    buffer = io.BytesIO()
    Image.fromarray(ground.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return {"png": buffer.getvalue()}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), "utf-8")
