"""What every row needs: intervals, facts about the machine, and the file of a result."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/bench"
WORK = ROOT / "benchmarks/.work"
PEERS = ROOT / "benchmarks/.peers/bin/python"
SEED = 0


def ratio(ours: Sequence[float], theirs: Sequence[float], *, sums: bool = False) -> dict[str, Any]:
    """Median of the pairs' ratios ours / theirs, with a bootstrap 95 % interval of that median (10,000 resamples of the pairs, seeded).

    sums: instead of the median the ratio of the sums, for turns that are not alike (texts of other lengths in each)."""
    pairs = np.stack([ours, theirs])
    draws = np.random.default_rng(SEED).integers(len(ours), size=(10_000, len(ours)))

    def of(chosen: np.ndarray[Any, Any]) -> Any:
        return np.divide(*chosen.sum(-1)) if sums else np.median(chosen[0] / chosen[1], axis=-1)

    low, high = np.percentile(of(pairs[:, draws]), [2.5, 97.5])
    return {"median": float(of(pairs)), "interval": [float(low), float(high)], "pairs": len(ours)}


def figure(
    what: str, value: float | dict[str, Any], unit: str = "x", *, at_most: float | None = None, at_least: float | None = None
) -> dict[str, Any]:
    """One number of a row: a ratio (with its interval) or a plain value, and whether it reaches what is asked of it, if anything is."""
    found = value if isinstance(value, dict) else {"median": float(value)}
    reached: bool | None = None
    if at_most is not None:
        reached = found["median"] <= at_most
    elif at_least is not None:
        reached = found["median"] >= at_least
    return {"what": what, "value": found["median"], "interval": found.get("interval"), "pairs": found.get("pairs"), "unit": unit} | {
        "at_most": at_most,
        "at_least": at_least,
        "pass": reached,
    }


def matmul_rate(dtype: torch.dtype, size: int = 2048, rounds: int = 7) -> float:
    """The best rate of a square matrix product in GFLOP/s, after one warm-up: what the shares of P13 are shares of.

    A smaller product is taken where one of this size would take more than a second (bf16 on a processor that has no instructions for it).
    """
    a, b = (torch.randn(256, 256, dtype=dtype) for _ in range(2))
    start = time.perf_counter()
    torch.mm(a, b)
    if (time.perf_counter() - start) * (size / 256) ** 3 > 1.0:
        size = 256
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:]) / 1e9


def machine() -> dict[str, Any]:
    """The machine as it is now; ``load`` is the load average before the row began, which says whether it was quiet."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name = next((line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), name)
    return {
        "cpu": name,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "matmul_gflops": {"float32": matmul_rate(torch.float32), "bf16": matmul_rate(torch.bfloat16)},
        "load": os.getloadavg()[0],
    }


def limbeck(*arguments: str, out: Path, **environment: str) -> float:
    """Run a ``limbeck`` command in a fresh process; its wall seconds. Its output goes to ``out`` with the suffix .log."""
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with out.with_suffix(".log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "limbeck", *arguments], cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **environment}
        )
    seconds = time.perf_counter() - start
    if done.returncode:
        tail = "\n".join(out.with_suffix(".log").read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"limbeck {' '.join(arguments)} ended with {done.returncode}:\n{tail}")
    return seconds


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x: 1 is linear growth, 0 is flat."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def write(result: dict[str, Any], *, quick: bool = False) -> Path:
    """The result under its final name, complete or not at all; quick ones go to a folder that git ignores."""
    folder = WORK / "quick" if quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"bench-{result['id']}.json"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(target)
    return target
