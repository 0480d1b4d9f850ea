"""What the two text peers share: tokens made beforehand, and batches padded to their longest text."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding


class Texts(torch.utils.data.Dataset[Any]):
    """Tokens of each text, cut at max_length, and its label."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
        tokenizer.backend_tokenizer.no_padding()  # this model's tokenizer file pads by itself
        with (folder / "train.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        tokens = tokenizer([row["text"] for row in rows], truncation=True, max_length=about["max_length"])
        self.rows = [{"input_ids": tokens["input_ids"][i], "labels": about["classes"].index(row["label"])} for i, row in enumerate(rows)]
        self.collate = DataCollatorWithPadding(tokenizer)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def load(config: dict[str, Any]) -> tuple[dict[str, Any], Texts, Any, Any]:
    """What the work says, the texts, the teacher and the student."""
    folder = Path(config["work"])
    about = json.loads((folder / "work.json").read_text())
    teacher, student = (AutoModelForSequenceClassification.from_pretrained(folder / role) for role in ("teacher", "student"))
    teacher.eval().requires_grad_(False)
    return about, Texts(folder, about), teacher, student.train()
