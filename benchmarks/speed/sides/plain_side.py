"""The loop that an expert would write by hand for data in memory, with the same models, rows, batch size and optimiser as Limbeck's.

- Before the loop: all images as normalised float32 tensors, padded, in one tensor; models in the wanted memory format.
- A batch: rows by index; random crops as windows of the padded images and flips by a mask, for the whole batch at once, on the main thread.
- A step: teacher under inference mode, student, KL at temperature T with log targets times T^2 and cross entropy, backward, gradient clipping, a
  fused optimiser, a cosine schedule with warm-up; the loss is looked at every 10 steps, as Limbeck logs it.
- Nothing else: no validation, no checkpoint, no check for NaN.

``student_only``: no teacher, cross entropy alone: the floor of every row. Started as one of several ranks, it is the loop with
DistributedDataParallel around the student, as PyTorch's documentation has it, each rank taking an equal part of every batch.
"""

from __future__ import annotations

import json
import math
import os
import sys

import torch
import torch.distributed as dist
from speed.sides.prepared import Work, keep
from speed.turns import Turn
from torch import Tensor
from torch.nn import functional


def padded(work: Work, pad: int) -> Tensor:
    """``(N, channels, H + 2 pad, W + 2 pad)`` float32, normalised; the border is a black image's."""
    mean, std = (torch.tensor(work.about[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
    images = functional.pad(torch.from_numpy(work.x).permute(0, 3, 1, 2), (pad, pad, pad, pad))
    images = images.float().div_(255).sub_(mean).div_(std)
    # as they were stored their channels are last, and so would be every convolution after them, whatever the layout is called
    return images.contiguous(memory_format=torch.channels_last if work.about["layout"] == "channels_last" else torch.contiguous_format)


def views(batch: Tensor, pad: int, flip: bool) -> Tensor:
    count, size = len(batch), batch.shape[-1] - 2 * pad
    if pad:
        top, left = torch.randint(2 * pad + 1, (2, count))
        batch = batch.unfold(2, size, 1).unfold(3, size, 1)[torch.arange(count), :, top, left]
    if flip:
        batch = torch.where(torch.rand(count, 1, 1, 1) < 0.5, batch.flip(3), batch)
    return batch


def main() -> None:
    config = json.loads(sys.argv[1])
    turn, work = Turn(config["steps"]), Work(config["work"])
    about, rows = work.about, work.rows
    torch.manual_seed(0)
    images, labels = padded(work, about["crop"]), torch.from_numpy(work.y)
    student = work.model("student").train()
    teacher = None if config.get("student_only") else work.model("teacher").eval()
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    model = student
    if size > 1:
        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(student)
    last = about["layout"] == "channels_last"
    temperature, alpha = about["temperature"], about["alpha"]
    parameters = list(student.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": about["weight_decay"]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[about["optimizer"]]
    optimizer = kind(groups, lr=about["lr"], fused=True)
    total, warm = len(rows), round(0.05 * len(rows))

    def factor(step: int) -> float:
        if about["schedule"] == "constant":
            return 1.0
        return (step + 1) / (warm + 1) if step < warm else (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    turn.begin()
    for step, batch in enumerate(rows):
        chosen = batch[rank * len(batch) // size : (rank + 1) * len(batch) // size]
        x, y = views(images[chosen], about["crop"], about["flip"]), labels[chosen]
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        answers = model(x)
        loss = functional.cross_entropy(answers, y)
        if teacher is not None:
            with torch.inference_mode():
                soft = functional.log_softmax(teacher(x) / temperature, 1)
            ours = functional.log_softmax(answers / temperature, 1)
            kd = functional.kl_div(ours, soft, reduction="batchmean", log_target=True) * temperature**2
            loss = alpha * kd + (1 - alpha) * loss
        loss.backward()
        if about["clip_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(parameters, about["clip_norm"])
        optimizer.step()
        schedule.step()
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
        turn.step()
        if size > 1 and (step + 1) % config["steps"] == 0:
            dist.barrier()  # no rank works in another side's turn
    if rank == 0:
        keep(student, config)
    turn.end()


if __name__ == "__main__":
    main()
