"""P7, P8 and P9: the cache's files alone, with made answers and no model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.cache import Request, Sparse, Stored, create, fill, read_manifest
from speed import measuring, work
from speed.sides.answers import ids
from speed.turns import Side, alternate

MADE = {"precision": "float32", "layout": "channels_first", "block": 256, "threads": 1}


def reading(quick: bool) -> dict[str, Any]:
    """P7: batches of 128 in training order from 50,000 rows of 1,000 classes, everything in the page cache; each way gives float32 logits."""
    rows, steps, pairs = (2048, 16, 3) if quick else (50_000, 100, 9)
    folder = work.fresh("p7")
    common = {"steps": steps, "out": str(folder), "rows": rows, "classes": 1000, "batches": steps * (pairs + 1)}
    peers = str(measuring.PEERS)
    sides = [Side("limbeck", "store_side.py", {**common, "name": "limbeck"})]
    sides += [Side(way, "rows_side.py", {**common, "name": way, "way": way}, python=peers) for way in ("memmap", "files", "lmdb")]
    seconds, facts = alternate(sides, pairs)
    figures = [
        measuring.figure(f"rate against {name}", measuring.ratio(seconds[way], seconds["limbeck"]), at_least=least)
        for way, name, least in (("memmap", "numpy memmap", 0.5), ("files", "one torch file a sample", 50), ("lmdb", "LMDB", 3))
    ]
    rate = steps * 128 / measuring.median(seconds["limbeck"])
    figures.append(measuring.figure("rows a second", rate, ""))
    shutil.rmtree(folder)
    return {
        "figures": figures,
        "seconds": seconds,
        "steps_a_turn": steps,
        "sides": facts,
        "left_out": "the first turn of each side (warm-up); writing",
    }


def size(quick: bool) -> dict[str, Any]:
    """P8: the bytes on disk of a row (ids, checksums and manifest included), and the error of the sparse codec at 20,000 classes.

    A block is 256 rows, as for small images on a CPU; the fewer rows a block has, the more parts there are, and the larger the manifest is.
    """
    folder, figures = work.fresh("p8"), []
    for classes in (10, 100, 1000, 20_000):
        rows = 1024 if quick or classes > 1000 else 16_384
        found = stored_bytes(folder / str(classes), rows, Stored(classes))
        least = 1.05 if classes >= 100 else None
        figures.append(measuring.figure(f"{classes:,} classes, float16: bytes / (2 x classes)", found / (2 * classes), at_most=least))
    spec = Sparse(2.0, 62, 64)
    classes, rows = 20_000, 1024
    found = stored_bytes(folder / "sparse", rows, Stored(classes, codec="sparse", sparse=spec))
    figures.append(measuring.figure("20,000 classes, sparse: share of dense", 100 * found / (2 * classes), "%", at_most=2.0))
    for temperature in (1.0, 2.0):
        one, mean = sparse_error(classes, temperature)
        figures.append(measuring.figure(f"sparse, T = {temperature:.0f}: relative error of a batch's gradient", one, ""))
        figures.append(measuring.figure(f"sparse, T = {temperature:.0f}: of the mean over 16 views", mean, ""))
    shutil.rmtree(folder)
    return {"figures": figures, "left_out": "nothing: the sizes of all files of a directory"}


def stored_bytes(root: Path, rows: int, stored: Stored) -> float:
    folder = filled(root, rows, stored)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / rows


def filled(root: Path, rows: int, stored: Stored, *, zeros: bool = False) -> Path:
    keys, count = ids(rows), int(stored.classes or 0)
    about = {"num_classes": count, "classes": None, "class_ids": None, "model": "benchmark", "sources": None, "parameters": 0}
    identity = {"teacher": {"weights_sha256": "benchmark"}, "preprocessing": {}, "views": {}, "stored": {"codec": stored.codec}}
    folder, _ = create(root, identity, MADE, about, stored.columns)

    def ask(blocks: list[np.ndarray[Any, Any]], view: int) -> Any:
        for chosen in blocks:
            values = np.zeros((len(chosen), count), np.float32) if zeros else tailed(chosen, count)
            yield stored.encode(values, {}, keys[chosen], view)

    fill(folder, [Request(0, keys)], ask)
    return folder


def tailed(rows: np.ndarray[Any, Any], classes: int) -> np.ndarray[Any, Any]:
    """Logits of a teacher that is rather sure: one class stands out, ten follow, and the many others are spread about 0."""
    drawn = np.random.default_rng(int(rows[0]))
    values = drawn.standard_normal((len(rows), classes), dtype=np.float32)
    top = drawn.integers(classes, size=(len(rows), 11))
    np.add.at(values, (np.arange(len(rows))[:, None], top), np.array([13.0] + [8.0] * 10, np.float32))
    return values


def sparse_error(classes: int, temperature: float) -> tuple[float, float]:
    """Relative error of the gradient with respect to a student's last layer (64 features, a batch of 128, a student that is half way to the
    teacher), for one draw of the sparse codec, and for the mean over 16 draws (views), which an unbiased codec brings to a quarter."""
    rows, spec = np.arange(128), Sparse(temperature, 62, 64)
    teacher = tailed(rows, classes).astype(np.float64)
    exact, student = softmax(teacher / temperature), softmax(teacher / 2 / temperature)
    features = np.random.default_rng(4).standard_normal((len(rows), 64))
    gradient = (student - exact).T @ features
    stored, errors = Stored(classes, codec="sparse", sparse=spec), []
    for view in range(16):
        kept = stored.encode(tailed(rows, classes), {}, ids(len(rows)), view)
        told = np.zeros_like(exact)
        np.add.at(told, (rows[:, None], kept["index"].astype(np.int64)), kept["weight"])
        errors.append((exact - told).T @ features)
    size = np.linalg.norm(gradient)
    return float(np.median([np.linalg.norm(e) for e in errors]) / size), float(np.linalg.norm(np.mean(errors, axis=0)) / size)


def softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(x - x.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def opening(quick: bool) -> dict[str, Any]:
    """P9: open and read one batch of 128 rows, in a fresh process: of a cache of 10 GB, and of one of a tenth of it.

    Their answers are zeros; ids, parts and checksums are those of any cache.
    """
    sizes = (0.02, 0.2) if quick else (1.0, 10.0)
    repeats = 3 if quick else 9
    found: dict[float, list[dict[str, Any]]] = {gigabytes: [] for gigabytes in sizes}
    folder = work.fresh("p9")
    places = {gigabytes: grown(folder / str(gigabytes), gigabytes) for gigabytes in sizes}
    for number in range(repeats + 1):
        for gigabytes in sizes if number % 2 == 0 else reversed(sizes):
            cache, keys = places[gigabytes]
            script = Path(__file__).parent / "sides/open_side.py"
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(work.ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])}
            out = subprocess.run([sys.executable, script, cache, keys], check=True, capture_output=True, text=True, env=environment).stdout
            if number:
                found[gigabytes].append(json.loads(out))
    small, large = ([run["seconds"] for run in found[g]] for g in sizes)
    actual = sum(part.size for part in read_manifest(places[sizes[-1]][0]).parts) / 1e9
    memory = measuring.median([run["bytes"] for run in found[sizes[-1]]]) / 1e6
    figures = [
        measuring.figure(f"seconds to the first batch ({actual:.1f} GB)", measuring.median(large), "s", at_most=0.5),
        measuring.figure("resident memory", memory, "MB", at_most=50),
        measuring.figure("time at ten times the size", measuring.ratio(large, small), at_most=1.5),
    ]
    shutil.rmtree(folder)
    return {"figures": figures, "runs": {str(k): v for k, v in found.items()}, "left_out": "the first round (warm-up); imports"}


def grown(root: Path, gigabytes: float) -> tuple[Path, Path]:
    """A cache of that size, with real ids and checksums, and 128 of its ids: rows of 20,000 classes."""
    rows = max(256, int(gigabytes * 1e9 / 40_000))
    folder = filled(root, rows, Stored(20_000), zeros=True)
    keys = root / "keys.npy"
    np.save(keys, ids(rows)[np.random.default_rng(3).permutation(rows)[:128]])
    return folder, keys
