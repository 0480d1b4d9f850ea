"""Hugging Face Trainer with a distillation loss, in its fastest documented setting: texts of similar length grouped, each batch padded to its
longest, a fused optimiser, no checkpoints."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from speed.sides.texts import load
from speed.turns import Turn
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments


class Distilling(Trainer):
    def __init__(self, *arguments: Any, teacher: Any, temperature: float, alpha: float, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.teacher, self.temperature, self.alpha = teacher, temperature, alpha

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        with torch.no_grad():
            soft = functional.log_softmax(self.teacher(**{k: v for k, v in inputs.items() if k != "labels"}).logits / self.temperature, -1)
        outputs = model(**inputs)
        ours = functional.log_softmax(outputs.logits / self.temperature, -1)
        kd = functional.kl_div(ours, soft, reduction="batchmean", log_target=True) * self.temperature**2
        loss = self.alpha * kd + (1 - self.alpha) * outputs.loss
        return (loss, outputs) if return_outputs else loss


class Count(TrainerCallback):
    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.turn.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.turn.step()


def main() -> None:
    config = json.loads(sys.argv[1])
    turn = Turn(config["steps"])
    about, texts, teacher, student = load(config)
    settings = TrainingArguments(
        output_dir=config["out"],
        use_cpu=True,
        per_device_train_batch_size=about["batch"],
        num_train_epochs=1,
        learning_rate=about["lr"],
        weight_decay=about["weight_decay"],
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        train_sampling_strategy="group_by_length",
        dataloader_drop_last=True,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Distilling(
        student,
        settings,
        data_collator=texts.collate,
        train_dataset=texts,
        callbacks=[Count(turn)],
        teacher=teacher,
        temperature=about["temperature"],
        alpha=about["alpha"],
    )
    trainer.train()
    turn.end()


if __name__ == "__main__":
    main()
