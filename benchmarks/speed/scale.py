"""P10, P11 and P12: whole runs by the command line, each in a fresh process."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from speed import measuring, work


def views(quick: bool) -> dict[str, Any]:
    """P10: the quick pair (examples/cifar10-quick.yaml) with 1, 4 and 16 views and with new views in every epoch: test accuracy over 3 seeds, and the
    time of all three together, the teacher's pass included. No baseline, no export."""
    extra = ["--set", "data.train_limit=640", "--set", "train.epochs=2"] if quick else []
    folder = work.fresh("p10")
    work.data("cifar10.npz", "cifar10")
    teacher = work.cifar_teacher()
    found: dict[str, dict[str, Any]] = {}
    for name in ("live", 16, 4, 1):
        out = folder / f"views-{name}"
        cache = ["mode=off", "views=live"] if name == "live" else ["mode=auto", f"views={name}", f"path={folder / f'cache-{name}'}"]
        settings = [argument for setting in cache for argument in ("--set", f"teacher_cache.{setting}")]
        run = [
            "distill",
            "examples/cifar10-quick.yaml",
            "--teacher",
            f"run:{teacher}",
            "--seeds",
            "3",
            "--no-baseline",
            "--set",
            "export=[]",
        ]
        seconds = measuring.limbeck(*run, *settings, *extra, "--out", str(out), out=out)
        accuracies = [
            100 * measuring.read_json(out / f"seed-{seed}" / "metrics.json")["models"]["student"]["metrics"]["accuracy"]
            for seed in range(3)
        ]
        found[str(name)] = {"accuracy": accuracies, "seconds": seconds}
    figures = []
    for name, values in found.items():
        label = "live" if name == "live" else f"K = {name}"
        accuracy = {"median": statistics.mean(values["accuracy"])}
        figures.append(measuring.figure(f"{label}: mean accuracy (deviation {statistics.stdev(values['accuracy']):.2f})", accuracy, "%"))
        figures.append(measuring.figure(f"{label}: three seeds", values["seconds"] / 60, "min"))
    default = work.default_views()
    noise = max(0.3, *(statistics.stdev(found[name]["accuracy"]) for name in ("live", str(default))))
    lost = statistics.mean(found[str(default)]["accuracy"]) - statistics.mean(found["live"]["accuracy"])
    figures.append(measuring.figure(f"K = {default} (the default) against live", lost, "points", at_least=-noise))
    return {"figures": figures, "runs": found, "left_out": "nothing: whole commands"}


def growth(quick: bool) -> dict[str, Any]:
    """P11: how time and memory grow. Small models on vectors of 64 numbers, batch 256, a cache of one view; each point is a run in a fresh process.

    Time is that of training without the first start (the run's own train_seconds), memory the peak resident size of the process. Slopes are of
    logarithms: 1 is linear, 0 is flat.
    """
    k = 1000
    sizes = {
        "epochs": (1, 4) if quick else (1, 2, 4, 8, 16),
        "samples": (k, 4 * k) if quick else (k, 4 * k, 16 * k, 64 * k, 256 * k),
        "classes": (10, 100) if quick else (10, 100, k, 20 * k),
        "teacher": (1, 4) if quick else (1, 2, 4, 8, 16),
    }
    base = {"epochs": 2, "samples": 4 * k if quick else 64 * k, "classes": 10, "teacher": 1}
    runs: dict[str, list[dict[str, Any]]] = {}
    for what, values in sizes.items():
        runs[what] = []
        for value in values:
            point = {**base, **({"epochs": 1} if what == "classes" else {}), what: value}
            if what == "classes":
                point["samples"] = 2 * k if quick else 16 * k
            runs[what].append({what: value, **one_run(point)})
    figures = [
        measuring.figure(f"training time over {what}, slope", measuring.slope(sizes[what], times(runs[what])), "", at_most=1.1)
        for what in ("epochs", "samples")
    ]
    small, large = runs["samples"][0], runs["samples"][-1]
    beyond = (large["peak_bytes"] - small["peak_bytes"]) / (large["data_bytes"] - small["data_bytes"])
    figures.append(measuring.figure("memory from the fewest samples to the most, as a multiple of the data", beyond, at_most=2.0))
    steps = [run["seconds"] / run["steps"] for run in runs["teacher"]]
    figures.append(measuring.figure("cached step over teacher size, slope", measuring.slope(sizes["teacher"], steps), "", at_most=0.05))
    for run in runs["classes"]:
        figures.append(measuring.figure(f"cached step at {run['classes']:,} classes", 1000 * run["seconds"] / run["steps"], "ms"))
    return {"figures": figures, "runs": runs, "left_out": "start, labelling, evaluation, export (from times; not from memory)"}


def times(runs: list[dict[str, Any]]) -> list[float]:
    return [run["seconds"] for run in runs]


def one_run(point: dict[str, int]) -> dict[str, Any]:
    folder = work.fresh("p11")
    drawn = np.random.default_rng(measuring.SEED)
    labels = np.arange(point["samples"]) % point["classes"]
    x = drawn.standard_normal((point["samples"], 64), dtype=np.float32)
    few = max(128, min(2 * point["classes"], 1000))
    if point["samples"] < point["classes"]:  # every class has a sample
        labels = np.arange(point["classes"])
        x = drawn.standard_normal((point["classes"], 64), dtype=np.float32)
    test = {"test_x": drawn.standard_normal((few, 64), dtype=np.float32), "test_y": np.arange(few) % point["classes"]}
    np.savez(folder / "train.npz", train_x=x, train_y=labels, **test, valid_x=test["test_x"] + 1, valid_y=test["test_y"])
    models = work.MODELS / "growth.py"
    recipe = {
        "task": "image-classification",
        "teacher": {"model": f"python:{models}:teacher", "options": {"times": point["teacher"]}},
        "student": {"model": f"python:{models}:student"},
        "data": {"source": f"npz:{folder / 'train.npz'}"},
        "objective": work.KD,
        "train": {"epochs": point["epochs"], "batch_size": 256, "precision": "float32", "workers": 0, "device": "cpu"},
        "teacher_cache": {"mode": "auto", "views": 1, "path": str(folder / "cache")},
        "baseline": False,
        "export": [],
    }
    path = work.save_recipe({"work": str(folder)}, recipe)
    # filled by a process of its own: what the run needs itself is measured, and not what its teacher needed
    measuring.limbeck("label", str(path), out=folder / "label")
    measuring.limbeck("distill", str(path), "--out", str(folder / "run"), out=folder / "run-log")
    cost = measuring.read_json(folder / "run/metrics.json")["cost"]
    return {
        "seconds": cost["train_seconds"],
        "steps": point["epochs"] * -(-len(x) // 256),
        "peak_bytes": cost["peak_rss_bytes"],
        "data_bytes": x.nbytes + labels.nbytes,
        "teacher_items": cost["teacher_items"],
    }


def sweep(quick: bool) -> dict[str, Any]:
    """P12: five temperatures by `limbeck sweep` (a cache of one view, its filling included), against five live `limbeck distill` runs of the same
    recipe. Whole commands, start and evaluation included, alternating; no baseline, no export.

    S is a student-only epoch (`limbeck train` of the same recipe), T the rest of a live one, by the runs' own train_seconds.
    """
    # the formula knows no start and no evaluation: a training has to be long beside them
    epochs, rows, pairs = (2, 256, 1) if quick else (6, 1280, 7)
    prepared = work.cifar("p12", rows=rows, test=128, epochs=epochs, layout="channels_last", checkpoint_every=10**6)
    folder = Path(prepared["work"])
    live = work.save_recipe(prepared, prepared["recipe"])
    alone = {k: v for k, v in prepared["recipe"].items() if k not in ("teacher", "baseline", "teacher_cache")}
    student = work.save_recipe(prepared, {**alone, "objective": [{"loss": "cross_entropy", "weight": 1.0}]}, "student")
    temperatures = (1, 2, 4, 6, 8)
    seconds: dict[str, list[float]] = {"sweep": [], "five live": []}
    spent: dict[str, list[float]] = {"live": [], "student": []}

    def run_sweep(number: int) -> float:
        cache = {"mode": "auto", "views": 1, "path": str(work.fresh(f"p12/cache-{number}")), "codec": "float16"}
        recipe = work.save_recipe(prepared, {**prepared["recipe"], "teacher_cache": cache}, "cached")
        values = ",".join(map(str, temperatures))
        out = folder / f"sweep-{number}"
        return measuring.limbeck("sweep", str(recipe), "--vary", f"objective.0.temperature={values}", "--out", str(out), out=out)

    def run_live(number: int) -> float:
        total = 0.0
        for temperature in temperatures:
            out = folder / f"live-{number}-{temperature}"
            total += measuring.limbeck("distill", str(live), "--set", f"objective.0.temperature={temperature}", "--out", str(out), out=out)
            spent["live"].append(train_seconds(out))
        return total

    for number in range(pairs):
        one, other = ("sweep", run_sweep), ("five live", run_live)
        for name, run in (one, other) if number % 2 == 0 else (other, one):
            seconds[name].append(run(number))
        out = folder / f"student-{number}"
        measuring.limbeck("train", str(student), "--out", str(out), out=out)
        spent["student"].append(train_seconds(out))
    s, both = (measuring.median(spent[name]) / epochs for name in ("student", "live"))
    ceiling = ((both - s) + 5 * epochs * s) / (5 * epochs * both)
    found = measuring.ratio(seconds["sweep"], seconds["five live"])
    return {
        "figures": [
            measuring.figure("sweep / five live runs", found, at_most=1.1 * ceiling),
            measuring.figure("(K T + 5 E S)/(5 E (T + S)), K = 1", ceiling),
        ],
        "floor": {"what": "student-only step", "ms": 1000 * s / (rows // 128)},
        "seconds": seconds,
        "train_seconds": spent,
        "left_out": "nothing: whole commands",
    }


def train_seconds(run: Path) -> float:
    return float(measuring.read_json(run / "metrics.json")["cost"]["train_seconds"])
