"""P6: texts of their natural, long-tailed lengths."""

from __future__ import annotations

import csv
import json
from typing import Any

import numpy as np

from limbeck.data import load_data
from limbeck.models import build_model
from limbeck.reading import build_recipe
from speed import measuring, work
from speed.turns import Side, alternate

MAX_LENGTH = 512  # what MiniLM can read
BATCH = 8


def lengths(quick: bool) -> dict[str, Any]:
    """P6: the live step with length buckets against Limbeck's own with fixed padding, TextBrewer, and HF Trainer, float32, batch 8.

    Every side goes once over the same texts; which ones meet in a batch is its own doing. The teacher is MiniLM-L6 with a head for the classes, the
    student two of its layers; neither is fine-tuned, for only time is measured. Turns hold texts of other lengths, so the
    ratio is that of the sums over all turns.
    """
    steps, pairs = (3, 2) if quick else (4, 7)
    figures, seconds, facts, floors = [], {}, {}, {}
    for name in ("r8", "imdb"):
        prepared = prepare(name, rows=BATCH * steps * (pairs + 1))
        folder = prepared["work"]
        common = {"steps": steps, "out": folder, "work": folder}
        recipe = prepared["recipe"]
        alone = {k: v for k, v in recipe.items() if k not in ("teacher", "baseline", "teacher_cache")}
        alone["objective"] = [{"loss": "cross_entropy", "weight": 1.0}]
        sides = [
            Side("limbeck", "limbeck_side.py", {**common, "name": "limbeck", "recipe": recipe}),
            Side("fixed padding", "limbeck_side.py", {**common, "name": "fixed", "recipe": recipe, "fixed_padding": True}),
            Side("TextBrewer", "textbrewer_side.py", {**common, "name": "textbrewer"}, python=str(measuring.PEERS)),
            Side("HF Trainer", "trainer_side.py", {**common, "name": "trainer"}, python=str(measuring.PEERS)),
            Side("student only", "limbeck_side.py", {**common, "name": "floor", "recipe": alone}),
        ]
        seconds[name], facts[name] = alternate(sides, pairs)
        floors[name] = 1000 * measuring.median(seconds[name]["student only"]) / steps
        for against, least in (("fixed padding", 1.5), ("TextBrewer", 1.2), ("HF Trainer", None)):
            found = measuring.ratio(seconds[name][against], seconds[name]["limbeck"], sums=True)
            figures.append(measuring.figure(f"{name}: times as fast as {against}", found, at_least=least))
    return {
        "figures": figures,
        "floor": {"what": "student-only step of Limbeck, R8", "ms": floors["r8"]},
        "floors_ms": floors,
        "seconds": seconds,
        "steps_a_turn": steps,
        "sides": facts,
        "left_out": "the first turn of each side (warm-up); imports, loading, tokenising, models; validation, evaluation, export",
    }


def prepare(name: str, rows: int) -> dict[str, Any]:
    """``rows`` texts (chosen by a seed), the teacher and the student as Hugging Face folders, and the recipe."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source, minilm = work.data(f"{name}.csv", name), work.data("minilm-l6", "minilm")
    folder = work.fresh(f"p6-{name}")
    with source.open(encoding="utf-8", newline="") as file:
        texts = list({row["text"]: row for row in csv.DictReader(file)}.values())
    classes = sorted({row["label"] for row in texts})
    drawn = np.random.default_rng(measuring.SEED).permutation(len(texts))
    for part, chosen in (("train", drawn[:rows]), ("test", drawn[rows : rows + 64]), ("valid", drawn[rows + 64 : rows + 128])):
        with (folder / f"{part}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(texts[i] for i in chosen)
    names = dict(enumerate(classes))
    teacher = AutoModelForSequenceClassification.from_pretrained(
        minilm, num_labels=len(classes), id2label=names, label2id={v: k for k, v in names.items()}
    )
    teacher.save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder / "teacher")
    recipe: dict[str, Any] = {
        "task": "text-classification",
        "seed": 0,
        "teacher": {"model": f"hf:{folder / 'teacher'}"},
        "student": {"model": f"hf:{folder / 'teacher'}", "options": {"layers": [0, 5]}},
        "data": {
            "source": f"csv:{folder / 'train.csv'}",
            "test": str(folder / "test.csv"),
            "valid": str(folder / "valid.csv"),
            "max_length": MAX_LENGTH,
        },
        "objective": work.KD,
        "train": {
            "epochs": 1,
            "batch_size": BATCH,
            "lr": 1e-4,
            "weight_decay": 0.01,
            "precision": "float32",
            "workers": 0,
            "device": "cpu",
            "checkpoint_every": 10**6,
        },
        "teacher_cache": {"mode": "off", "views": "live"},
        "baseline": False,
        "export": [],
    }
    checked = build_recipe(recipe, command="distill")
    loaded = load_data(checked.data, checked.task, work.ROOT)
    student = build_model(checked.student, role="student", data=loaded, seed=0, base=work.ROOT, max_length=MAX_LENGTH)
    student.module.save_pretrained(folder / "student")  # type: ignore[operator]
    about = {"classes": classes, "max_length": MAX_LENGTH, "batch": BATCH, "lr": 1e-4, "weight_decay": 0.01}
    (folder / "work.json").write_text(json.dumps({**about, "temperature": work.KD[0]["temperature"], "alpha": work.KD[0]["weight"]}))
    return {"recipe": recipe, "work": str(folder)}
