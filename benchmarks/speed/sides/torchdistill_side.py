"""torchdistill, by its DistillationBox and the training loop of its own image classification example (train_one_epoch).

Its settings are those of its CIFAR-10 knowledge distillation examples: teacher without gradient, KDLoss (its alpha is the share of cross entropy),
torchvision transforms for each sample. ``workers`` is its ``num_workers``. Only the example's loop is rewritten, for it is not in the package: the
metric logger is the package's.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from speed.sides.prepared import Work, keep, pictures
from speed.turns import Turn
from torchdistill.core.distillation import DistillationBox
from torchdistill.misc.log import MetricLogger, SmoothedValue


def train_config(work: Work, workers: int) -> dict[str, Any]:
    about, rows = work.about, work.rows
    return {
        "num_epochs": 1,  # of the rows of all epochs, one after the other
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": lambda dataset: rows.flatten().tolist()},
            "kwargs": {"batch_size": rows.shape[1], "num_workers": workers, "drop_last": False},
        },
        "teacher": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": True},
        "optimizer": {"key": "Adam", "kwargs": {"lr": about["lr"]}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {
                            "key": "KDLoss",
                            "kwargs": {
                                "student_module_path": ".",
                                "student_module_io": "output",
                                "teacher_module_path": ".",
                                "teacher_module_io": "output",
                                "temperature": about["temperature"],
                                "alpha": 1 - about["alpha"],
                                "reduction": "batchmean",
                            },
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    }


def main() -> None:
    config = json.loads(sys.argv[1])
    turn, work = Turn(config["steps"]), Work(config["work"])
    torch.manual_seed(0)
    device = torch.device("cpu")
    teacher, student = work.model("teacher").to(device), work.model("student").to(device)
    settings = train_config(work, config["workers"])
    box = DistillationBox(teacher, student, {"train": pictures(work)}, settings, device, None, False, 1.0)
    logger = MetricLogger(delimiter="  ")
    logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
    logger.add_meter("img/s", SmoothedValue(window_size=10, fmt="{value}"))
    turn.begin()
    box.pre_epoch_process(epoch=0)
    # The box leaves the teacher in the mode in which it finds it. All sides' teachers are in eval mode.
    box.teacher_model.eval()
    for x, y, supplement in logger.log_every(box.train_data_loader, 100, "Epoch: [0]"):
        start = time.time()
        x, y = x.to(device), y.to(device)
        loss = box.forward_process(x, y, supplement)
        box.post_forward_process(loss=loss)
        logger.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
        logger.meters["img/s"].update(len(x) / (time.time() - start))
        if torch.isnan(loss) or torch.isinf(loss):
            raise ValueError("the loss is not finite")
        turn.step()
    keep(student, config)
    turn.end()


if __name__ == "__main__":
    main()
