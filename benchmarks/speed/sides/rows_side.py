"""Other ways of keeping a teacher's answers (P7): ``memmap`` (a numpy file of float16, gathered by row number, without ids or checksums), ``files``
(one file of torch.save a sample), ``lmdb`` (one value a sample, by its id). Each gives (128, classes)
float32."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from speed.sides.answers import batches, ids, logits
from speed.turns import Turn

Rows = np.ndarray[Any, Any]
Read = Callable[[Rows], Rows]


def memmap(folder: Path, rows: int, classes: int) -> Read:
    path = folder / "logits.npy"
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, classes))
    for start in range(0, rows, 1024):
        out[start : start + 1024] = logits(np.arange(start, min(start + 1024, rows)), classes)
    out.flush()
    table = np.load(path, mmap_mode="r")
    return lambda chosen: table[chosen].astype(np.float32)


def files(folder: Path, rows: int, classes: int) -> Read:
    import torch

    (folder / "files").mkdir(exist_ok=True)
    for row in range(rows):
        torch.save(torch.from_numpy(logits(np.array([row]), classes)[0]).half(), folder / "files" / f"{row}.pt")
    return lambda chosen: torch.stack([torch.load(folder / "files" / f"{row}.pt", weights_only=True) for row in chosen]).float().numpy()


def lmdb(folder: Path, rows: int, classes: int) -> Read:
    import lmdb as library

    keys = ids(rows)
    base = library.open(str(folder / "lmdb"), map_size=1 << 32)
    with base.begin(write=True) as writer:
        for row in range(rows):
            writer.put(keys[row].tobytes(), logits(np.array([row]), classes)[0].astype(np.float16).tobytes())
    reader = base.begin(buffers=True)
    return lambda chosen: np.stack([np.frombuffer(reader.get(keys[row].tobytes()), np.float16) for row in chosen]).astype(np.float32)


def main() -> None:
    config = json.loads(sys.argv[1])
    turn = Turn(config["steps"])
    read = {"memmap": memmap, "files": files, "lmdb": lmdb}[config["way"]](Path(config["out"]), config["rows"], config["classes"])
    read(np.arange(config["rows"])) if config["way"] != "files" else None  # warm
    order = batches(config)
    turn.begin()
    total = 0.0
    for rows in order:
        total += float(read(rows)[0, 0])
        turn.step()
    turn.end(total=total)


if __name__ == "__main__":
    main()
