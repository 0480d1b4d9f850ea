"""What a step costs on a CUDA device: without a teacher, with a cached one, with one that is asked in every step, and without ordered kernels.

    python benchmarks/cuda.py [--quick]

ResNet-50 into ResNet-18 (torchvision, random weights) on noise of 64x64 in bf16, 256 images a step. Four processes take turns (A B C D, B C D A
...); the time is that of whole steps: batches, the host's work and the device's. Writes benchmarks/results/cuda.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import measuring
from speed.turns import Side, timed

PAIRS, STEPS, BATCH, ROWS, CLASSES = 8, 32, 256, 4096, 100
NAMES = {
    "floor": "no teacher",
    "fastest": "no teacher, deterministic: false",
    "cached": "a cached teacher",
    "live": "a teacher in every step",
}


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """By name: the recipe of each side."""
    rng = np.random.default_rng(measuring.SEED)

    def split(rows: int) -> tuple[Any, Any]:
        return rng.integers(0, 256, (rows, 64, 64, 3), dtype=np.uint8), np.arange(rows) % CLASSES

    (x, y), (valid_x, valid_y), (test_x, test_y) = split(ROWS), split(BATCH), split(BATCH)
    np.savez(folder / "noise.npz", train_x=x, train_y=y, valid_x=valid_x, valid_y=valid_y, test_x=test_x, test_y=test_y)
    model = folder / "models.py"
    model.write_text(
        "from torchvision.models import resnet18, resnet50\n\n"
        "def teacher(num_classes):\n    return resnet50(num_classes=num_classes)\n\n"
        "def student(num_classes):\n    return resnet18(num_classes=num_classes)\n"
    )
    plain: dict[str, Any] = {
        "student": {"model": f"python:{model}:student"},
        "data": {"source": f"npz:{folder / 'noise.npz'}", "augment": {"flip": True}},
        "train": {
            "epochs": 1 + STEPS * (PAIRS + 2) * BATCH // ROWS,
            "batch_size": BATCH,
            "optimizer": "sgd",
            "lr": 0.001,
            "precision": "bf16",
            "layout": "channels_last",
        },
        "baseline": False,
        "export": [],
        "objective": [{"loss": "cross_entropy"}],
    }
    taught = {
        **plain,
        "teacher": {"model": f"python:{model}:teacher"},
        "objective": [{"loss": "kd", "weight": 0.7, "temperature": 4.0}, {"loss": "cross_entropy", "weight": 0.3}],
    }
    return {
        "floor": plain,
        "fastest": {**plain, "train": {**plain["train"], "deterministic": False}},
        "cached": {**taught, "teacher_cache": {"path": str(folder / "cache"), "views": 2}},
        "live": {**taught, "teacher_cache": {"views": "live"}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs of four steps, to try the script; nothing is kept")
    asked = parser.parse_args()
    if not torch.cuda.is_available() and not asked.quick:
        sys.exit("There is no CUDA device.")
    pairs, steps = (2, 4) if asked.quick else (PAIRS, STEPS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        common = {"steps": steps, "out": str(folder), "work": str(folder)}
        sides = [Side(name, "limbeck_side.py", {**common, "name": name, "recipe": recipe}) for name, recipe in recipes(folder).items()]
        try:
            seconds = timed(sides, pairs)
        finally:
            for side in sides:
                side.close()
    floor = seconds["floor"]
    result = {
        "command": "python benchmarks/cuda.py",
        "seed": measuring.SEED,
        "machine": measuring.machine(),
        "images_per_second": steps * BATCH / measuring.median(floor),
        "times": {name: measuring.ratio(seconds[name], floor) for name in NAMES if name != "floor"},
    }
    if not asked.quick:
        (measuring.ROOT / "benchmarks/results/cuda.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"no teacher: {result['images_per_second']:,.0f} images/s on {result['machine'].get('gpu', 'the CPU')}")
    for name, value in result["times"].items():
        print(f"{NAMES[name]}: {value['median']:.3f}x [{value['interval'][0]:.3f}, {value['interval'][1]:.3f}] of the time of a step")


if __name__ == "__main__":
    main()
