"""P13: what `precision: auto` measures, measured longer: each layout and dtype of teacher and student in turn, on the run's own models and batch.

The grid is taken where auto takes its own (limbeck._choices calls `measure` with the candidates and how to prepare each), so it is the same work: a
teacher's forward pass, a student's forward and backward pass with the loss. Auto's choice is left to auto.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from limbeck import _choices, _roles, spine
from limbeck.reading import build_recipe


def main() -> None:
    config = json.loads(sys.argv[1])
    grids: list[dict[str, Any]] = []
    auto = _choices.measure

    def measure(engines: Any, prepare: Any, *arguments: Any) -> Any:
        rows: list[dict[str, Any]] = []
        for engine in engines:
            work = prepare(engine)
            with FlopCounterMode(display=False) as counter:
                vector = work.vector().detach().double().flatten()
            first = rows[0]["vector"] if rows else vector
            cosine = float(torch.nn.functional.cosine_similarity(vector, first, dim=0))
            row = {"dtype": engine.precision, "layout": engine.layout, "cosine": cosine, "flops": counter.get_total_flops()}
            rows.append({**row, "vector": vector, "seconds": []})
        for number in range(config["rounds"]):
            order = list(range(len(engines)))
            for i in order if number % 2 == 0 else reversed(order):
                work = prepare(engines[i])
                work.step()  # warm-up: the weights have just been laid out anew
                start = time.perf_counter()
                work.step()
                rows[i]["seconds"].append(time.perf_counter() - start)
        chosen, record = auto(engines, prepare, *arguments)
        kept = [{k: v for k, v in row.items() if k != "vector"} for row in rows]
        grids.append({"grid": kept, "chosen": engines.index(chosen), "reason": record["reason"]})
        return chosen, record

    def no_fit(*_: Any, **__: Any) -> None:
        names = ("teacher", "student")
        Path(config["out"]).write_text(json.dumps(dict(zip(names, grids, strict=True))))
        sys.exit(0)

    # patched so that a name that moved is an error, and not a measurement of something else
    with patch.object(_choices, "measure", measure), patch.object(_roles, "fit", no_fit), tempfile.TemporaryDirectory() as folder:
        spine.run_recipe(build_recipe(config["recipe"], command="distill"), base=Path.cwd(), out=Path(folder) / "run", progress="none")


if __name__ == "__main__":
    main()
