"""The rows of the table: what each measures, against what, and what it is to reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from speed import cifar, grid, ranks, scale, steps, store, text
from speed.notes import NOTES


@dataclass(frozen=True)
class Row:
    what: str
    against: str
    target: str
    run: Callable[[bool], dict[str, Any]]
    needs_peers: bool = False
    alone: bool = False  # takes long, and is only run when it is named


ROWS = {
    "P1": Row("live distillation step, CIFAR-10 pair, batch 128", "plain hand-written loop", "at most 1.03x its time", steps.live_step),
    "P2": Row("live step, tiny MLP, batch 32 (overhead)", "plain hand-written loop", "at most 1.15x", steps.tiny_step),
    "P3": Row("cached step", "student-only step of the plain loop", "at most 1.05x", steps.cached_step),
    "P4": Row(
        "10 epochs with the filling, K = 1 and the default K",
        "own live run",
        "at least 0.9 of the ceiling E(S+T)/(E S + K T)",
        cifar.caching,
    ),
    "P5": Row(
        "CIFAR-10 pair, 10 epochs, float32; and with precision: auto",
        "torchdistill 1.1.5; the article's loop",
        "live at least 1.0x as fast; cached at least 0.9 of the ceiling",
        cifar.end_to_end,
        needs_peers=True,
    ),
    "P6": Row(
        "R8 and IMDB, natural lengths up to 512 tokens",
        "own fixed padding; TextBrewer 0.2.1; HF Trainer",
        "at least 1.5x; at least 1.2x",
        text.lengths,
        needs_peers=True,
    ),
    "P7": Row(
        "random cache read in training order, warm, checksums on, 50,000 x 1,000 classes",
        "numpy memmap gather; one torch file a sample; LMDB",
        "at least 0.5x memmap, 50x files, 3x LMDB",
        store.reading,
        needs_peers=True,
    ),
    "P8": Row(
        "bytes a sample at 10 to 20,000 classes", "2 bytes x classes", "at most 1.05x from 100 classes on; sparse at most 2 %", store.size
    ),
    "P9": Row("opening a 10 GB cache to the first batch", "-", "0.5 s, +50 MB resident, flat in size", store.opening),
    "P10": Row(
        "K = 1, 4, 16, live: accuracy against time, 3 seeds",
        "live",
        "the default K within 0.3 points or the noise",
        scale.views,
        alone=True,
    ),
    "P11": Row(
        "growth in epochs, samples, classes, teacher size",
        "fitted slopes",
        "linear time; flat memory; cached step flat in the teacher",
        scale.growth,
    ),
    "P12": Row("a sweep of five on one teacher", "five live runs", "at most 1.1x (K T + 5 E S)/(5 E (T + S))", scale.sweep),
    "P13": Row(
        "share of the matrix-product rate, each layout and dtype",
        "machine peak",
        "auto within 5 % of the best of the grid, never slower than float32 eager",
        grid.shares,
    ),
    "S1": Row("2 ranks of 1 thread, CIFAR-10 pair, batch 128", "1 rank of 2 threads", "at least 0.85x as fast", ranks.scaling),
    "S2": Row("2 ranks of 1 thread, CIFAR-10 pair, batch 128", "plain DDP loop of 2 ranks", "at most 1.03x its time", ranks.against_ddp),
}


def judge(name: str, row: Row, measured: dict[str, Any]) -> dict[str, Any]:
    """A row passes where all its figures do. On a miss: by how much, and (from speed/notes.py) why and what would close it."""
    asked = [figure for figure in measured["figures"] if figure["pass"] is not None]
    missed = [figure for figure in asked if not figure["pass"]]
    verdict: dict[str, Any] = {"pass": not missed if asked else None}
    if missed:
        by = "; ".join(f"{figure['what']}: {figure['value']:.3g} where {_asked(figure)} is asked" for figure in missed)
        verdict["note"] = f"{by}. {NOTES.get(name, 'Not profiled yet.')}"
    return {**verdict, **measured}


def _asked(figure: dict[str, Any]) -> str:
    return f"at most {figure['at_most']:.3g}" if figure["at_most"] is not None else f"at least {figure['at_least']:.3g}"
