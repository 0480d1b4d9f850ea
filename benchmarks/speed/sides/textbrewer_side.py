"""TextBrewer 0.2.1: GeneralDistiller.train as its documentation shows it; texts in random order, each batch padded to its longest.

Nothing of it had to be changed for this PyTorch. Turns are counted by the scheduler that it calls after each optimiser step; its own loop writes the
losses to TensorBoard at every step.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import textbrewer
import torch
from speed.sides.texts import load
from speed.turns import Turn


class Count:
    """Called by the distiller after each optimiser step, as a scheduler is."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def step(self) -> None:
        self.turn.step()


def adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
    return {"logits": (outputs.logits,), "losses": (outputs.loss,)}


def main() -> None:
    config = json.loads(sys.argv[1])
    turn = Turn(config["steps"])
    about, texts, teacher, student = load(config)
    torch.manual_seed(0)
    loader: Any = torch.utils.data.DataLoader(
        texts, batch_size=about["batch"], shuffle=True, collate_fn=lambda rows: dict(texts.collate(rows)), drop_last=True
    )
    train = textbrewer.TrainingConfig(device="cpu", log_dir=config["out"], output_dir=config["out"])
    distill = textbrewer.DistillationConfig(
        temperature=about["temperature"], kd_loss_weight=about["alpha"], hard_label_weight=1 - about["alpha"]
    )
    distiller = textbrewer.GeneralDistiller(train, distill, teacher, student, adaptor, adaptor)
    optimizer = torch.optim.AdamW(student.parameters(), lr=about["lr"], weight_decay=about["weight_decay"], fused=True)
    turn.begin()
    distiller.train(optimizer, loader, num_epochs=1, scheduler=Count(turn), max_grad_norm=1.0)
    turn.end()


if __name__ == "__main__":
    main()
