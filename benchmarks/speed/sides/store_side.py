"""Limbeck's cache, filled by its own pass with given answers, then read batch by batch in training order (P7). Every lookup is by the 128-bit ids of
the samples; checksums are on, as always."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from speed.sides.answers import batches, ids, logits
from speed.turns import Turn

from limbeck.cache import Reader, Request, Stored, create, fill


def main() -> None:
    config = json.loads(sys.argv[1])
    turn = Turn(config["steps"])
    stored = Stored(config["classes"])
    keys = ids(config["rows"])
    made = {"precision": "float32", "layout": "channels_first", "block": 256, "threads": 1}
    about = {"num_classes": config["classes"], "classes": None, "class_ids": None, "model": "benchmark", "sources": None, "parameters": 0}
    identity = {"teacher": {"weights_sha256": "benchmark"}, "preprocessing": {}, "views": {}, "stored": {"codec": "float16"}}
    folder, _ = create(Path(config["out"]) / "cache", identity, made, about, stored.columns)

    def ask(blocks: list[np.ndarray], view: int):  # type: ignore[no-untyped-def,type-arg]
        for rows in blocks:
            yield stored.encode(logits(rows, config["classes"]), {}, keys[rows], view)

    fill(folder, [Request(0, keys)], ask)
    reader = Reader(folder)
    reader.check_all()  # warm: as in every epoch after the first
    order = batches(config)
    turn.begin()
    total = 0.0
    for rows in order:
        values = reader.gather("logits", *reader.locate(keys[rows], 0)).astype(np.float32)
        total += float(values[0, 0])
        turn.step()
    turn.end(total=total)


if __name__ == "__main__":
    main()
