"""R5: corruption. Every byte of a small checkpoint changed, and every length: refused by name; the one before is taken, and that is said."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from faults.harness import Case, Lab, lab, patch
from limbeck import checkpoint

PROMISE = "every byte of a checkpoint changed, every length: refused by name, and the run falls back to the one before"
FILES = ("manifest.json", "state.json", "state.safetensors")
MASKS = (1, 2, 4, 8, 16, 32, 64, 128)
SEED = 20261126


def small_checkpoints(folder: Path) -> Path:
    """Two; the newest one."""
    for step in (1, 2):
        checkpoint.save(folder, step, {"a": torch.full((3,), float(step)), "nested": {0: {"m": torch.arange(2)}}, "step": step})
    return folder / "step-00000002"


def passed_over(folder: Path) -> bool:
    """Whether the newest one is refused, by the name of its folder, for the one before."""
    said: list[str] = []
    found = checkpoint.load_newest(folder, said.append)
    return found is not None and found[0] == 1 and found[1]["a"].tolist() == [1.0] * 3 and len(said) == 1 and "step-00000002" in said[0]


def bytes_and_lengths(folder: Path, masks: tuple[int, ...]) -> tuple[dict[str, int], list[str]]:
    newest, counts, failed = small_checkpoints(folder), {"bytes": 0, "changes": 0, "lengths": 0}, []
    for name in FILES:
        path = newest / name
        good = path.read_bytes()
        counts["bytes"] += len(good)
        for at in range(len(good)):
            for mask in masks:
                path.write_bytes(good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :])
                counts["changes"] += 1
                if not passed_over(folder):
                    failed.append(f"{name}, byte {at} ^ {mask}")
        for length in [*range(len(good)), len(good) + 1]:
            path.write_bytes((good + b"\n")[:length])
            counts["lengths"] += 1
            if not passed_over(folder):
                failed.append(f"{name}, {length} of {len(good)} bytes")
        path.write_bytes(good)
    found = checkpoint.load_newest(folder)
    assert found is not None
    assert found[0] == 2
    return counts, failed


def spoiled_run(there: Lab, chance: random.Random) -> list[str]:
    """A run that is killed late, whose newest checkpoint is then spoiled somewhere, goes on from the one before."""
    case = Case(export=False, slow=0)
    run = there.begin(case)
    run.go(patches=[patch("kill_at_batch", 8)]).wait()
    newest = run.out / "checkpoints" / "student" / "step-00000006"
    path = newest / chance.choice(FILES)
    raw = bytearray(path.read_bytes())
    at = chance.randrange(len(raw))
    if chance.random() < 0.5:
        raw[at] ^= 1 << chance.randrange(8)
        path.write_bytes(raw)
    else:
        path.write_bytes(raw[:at])
    run.expected = [["student", 4]]
    code = run.go(resume=True).wait()
    wrong = run.judge() if code == 0 else [f"it left with {code}"]
    if f"{newest.name} is passed over" not in run.said():
        wrong.append("it was not said")
    run.clear()
    return [f"{path.name}, byte {at}: {text}" for text in wrong]


def run(count: int | None = None, masks: tuple[int, ...] = MASKS, seed: int = SEED) -> dict[str, Any]:
    """Every bit and length of a small checkpoint, and ``count`` (24) runs whose newest checkpoint is spoiled at a random place."""
    count = 24 if count is None else count
    with tempfile.TemporaryDirectory() as folder:
        counts, failed = bytes_and_lengths(Path(folder), masks)
    with lab() as there:
        for number in range(count):
            wrong = spoiled_run(there, random.Random(f"{seed} {number}"))
            print(f"R5: run {number + 1} of {count}: {wrong or 'held'}", file=sys.stderr, flush=True)
            failed += wrong[:1]
    tried = counts["changes"] + counts["lengths"] + count
    details = {**counts, "runs with a spoiled checkpoint": count, "failed": failed}
    return {"id": "R5", "promise": PROMISE, "seed": seed, "tried": tried, "held": tried - len(failed), "details": details}
