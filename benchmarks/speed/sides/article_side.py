"""The article's loop, and nothing else (see docs/benchmarks.md), on a CPU, where its autocast and gradient scaler are inactive.

The data set is what one writes around it: a PIL image, torchvision's crop and flip, ToTensor and Normalize, for each sample. ``DataLoader`` is the
default one, but for its sampler, which gives the same rows as all sides read.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from speed.sides.prepared import Work, keep, pictures
from speed.turns import Turn
from torch import nn


def main() -> None:
    config = json.loads(sys.argv[1])
    turn, work = Turn(config["steps"]), Work(config["work"])
    torch.manual_seed(0)
    device = torch.device("cpu")
    loader: Any = torch.utils.data.DataLoader(pictures(work), batch_size=work.rows.shape[1], sampler=work.rows.flatten().tolist())
    teacher, student = work.model("teacher").to(device), work.model("student").to(device)
    teacher.eval()
    student.train()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    temperature, alpha = 6.0, 0.7
    kl, ce = nn.KLDivLoss(reduction="batchmean"), nn.CrossEntropyLoss()
    turn.begin()
    for number, (x, y) in enumerate(loader):
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        with torch.no_grad():
            soft = torch.softmax(teacher(x) / temperature, dim=1)
        with torch.autocast("cuda", enabled=False):
            answers = student(x)
            kd = kl(torch.log_softmax(answers / temperature, dim=1), soft) * temperature**2
            loss = alpha * kd + (1 - alpha) * ce(answers, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if number % 100 == 0:
            print(f"step {number}: loss {loss.item():.4f}")
        turn.step()
    keep(student, config)
    turn.end()


if __name__ == "__main__":
    main()
