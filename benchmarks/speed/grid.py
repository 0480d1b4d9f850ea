"""P13: what share of the machine's matrix-product rate teacher and student reach, and whether `precision: auto` chooses well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from speed import measuring, text, work

AGREEMENT = 0.99  # auto's own: the least cosine with float32 channels-first


def shares(quick: bool) -> dict[str, Any]:
    """P13, for the CIFAR-10 pair at batch 128 and for MiniLM-L6 with two of its layers on R8 at batch 8.

    The best of the grid is the fastest whose values agree with float32 (cosine of logits or gradients at least 0.99): auto takes no other. The
    whole grid, with every cosine, is in the JSON file.
    """
    peak = {"float32": measuring.matmul_rate(torch.float32), "bf16": measuring.matmul_rate(torch.bfloat16)}
    pairs = {"CIFAR-10 pair": work.cifar("p13", rows=256)["recipe"], "MiniLM": text.prepare("r8", rows=256)["recipe"]}
    figures, grids = [], {}
    for name, recipe in pairs.items():
        recipe["train"]["precision"] = "auto"
        out = work.WORK / "p13" / f"{name.split()[0].lower()}.json"
        config = {"recipe": recipe, "out": str(out), "rounds": 3 if quick else 9}
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(work.ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])}
        script = Path(__file__).parent / "sides/grid_side.py"
        subprocess.run([sys.executable, script, json.dumps(config)], check=True, env=environment, cwd=work.ROOT)
        grids[name] = measuring.read_json(out)
        for role, found in grids[name].items():
            rows = found["grid"]
            for row in rows:
                row["ms"] = 1000 * measuring.median(row["seconds"])
                row["gflops"] = row["flops"] / row["ms"] / 1e6
                row["share"] = row["gflops"] / peak[row["dtype"]]
                what = f"{name}, {role}, {row['dtype']} {row['layout'].replace('_', '-')}: share of peak"
                figures.append(measuring.figure(what, 100 * row["share"], "%"))
            chosen = rows[found["chosen"]]
            best = min((row for row in rows if row["cosine"] >= AGREEMENT), key=lambda row: row["ms"])
            label = f"{name}, {role}: auto ({chosen['dtype']} {chosen['layout'].replace('_', '-')})"
            figures.append(measuring.figure(f"{label} / best", measuring.ratio(chosen["seconds"], best["seconds"]), at_most=1.05))
            figures.append(
                measuring.figure(f"{label} / float32 eager", measuring.ratio(chosen["seconds"], rows[0]["seconds"]), at_most=1.0)
            )
    return {"figures": figures, "grids": grids, "peak_gflops": peak, "left_out": "one step before each timed one (warm-up)"}
