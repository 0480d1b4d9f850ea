"""A finished run, looked at again: its student evaluated or exported from what the folder holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from limbeck._artifacts import Exporter
from limbeck._folder import read_recipe
from limbeck._parts import Parts
from limbeck._results import figures
from limbeck.data import Data, load_data
from limbeck.engine import Engine, choose_device
from limbeck.errors import Problem, Stopped, UsageError, not_a_run
from limbeck.export import FORMATS
from limbeck.models import load_saved
from limbeck.recipe import Recipe
from limbeck.report import write_report
from limbeck.run import read_json, write_json

__all__ = ["evaluate_run", "export_run"]


def evaluate_run(run: Path) -> dict[str, Any]:
    """Measure the student (its peers, the baseline) of a run on its test split, on this machine, now; nothing is written.

    Returns {"models": {role: figures}}, each as in metrics.json, and {"recorded": {role: accuracy}} from the run's own metrics.
    """
    recipe, data = _of(run)
    device = choose_device("auto")
    models = {}
    for role in ("student", *sorted(path.name for path in run.glob("peer-*")), "baseline"):
        if (run / role / "model.json").is_file():
            model = load_saved(run / role)
            engine = Engine(device, "float64" if recipe.train.precision == "float64" else "float32")
            engine.place(model.module)
            parts = Parts(recipe, data, model.preprocessing, None)
            logits = parts.logits(model, data.test, engine)
            models[role] = figures(model, logits, data.test.labels, parts.samples(), engine)
    recorded = _recorded(run)
    return {"models": models, "recorded": {role: recorded[role]["accuracy"] for role in models if role in recorded}}


def export_run(
    run: Path,
    formats: Sequence[str],
    *,
    quantize: str | None = None,
    max_drop: float = 0.5,
    layouts: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Export the student of a run; the records by name. metrics.json and the report are brought up to date.

    Each file is checked against the student's weights on real test samples, and its accuracy, speed and memory are measured in its own runtime.
    quantize: a scheme of :data:`limbeck.export.SCHEMES`, decided on the validation split; max_drop: in points. layouts: ``folder``, ``triton``.
    With one of these or a scheme, ``onnx`` stands for the artifact ``export/onnx-SCHEME``, and not for ``export/model.onnx``.

    Raises: ParityFailed, and nothing is left under a final name, where a file does not answer as the student does; Refused where fewer bits cost too
    much. What was finished before is kept, and recorded.
    """
    recipe, data = _of(run)
    for name in formats:
        FORMATS[name].require()
    model = load_saved(run)
    Engine(torch.device("cpu")).place(model.module)
    model.module.eval()
    exporter = Exporter(run, model, Parts(recipe, data, model.preprocessing, None), data, model.weights_sha256)
    as_folder = "onnx" in formats and (quantize is not None or bool(layouts))
    exported: dict[str, Any] = exporter.files([f for f in formats if not (as_folder and f == "onnx")], progress)
    failure: Stopped | None = None
    if as_folder:
        try:
            key, record = exporter.folder(quantize, max_drop, "triton" in layouts, progress)
            exported[key] = record
        except Stopped as error:
            failure = error
    if exported and (run / "metrics.json").is_file():
        metrics = read_json(run / "metrics.json")
        metrics["export"] = {**metrics.get("export", {}), **exported}
        if set(recipe.export) <= set(metrics["export"]):  # what a run failed to export is there now
            metrics.pop("export_failure", None)
            metrics["notes"] = [note for note in metrics["notes"] if not note.startswith("The export failed: ")]
        write_json(run / "metrics.json", metrics)
        write_report([run], run / "report.html")
    if failure is not None:
        raise failure
    return exported


def _of(run: Path) -> tuple[Recipe, Data]:
    """The recipe and the data of a run."""
    if not (run / "recipe.yaml").is_file():
        raise UsageError(Problem(str(run), *not_a_run(run)))
    recipe = read_recipe(run)
    if recipe.data.source == "python":
        raise UsageError(
            Problem(str(run), "was made from Python with data that only the program had, so its test split cannot be read again.")
        )
    data = load_data(recipe.data, recipe.task, run)
    _same_data(run, data)
    return recipe, data


def _same_data(run: Path, data: Data) -> None:
    """Refuse data that are not those that the run was made with."""
    environment = read_json(run / "environment.json") if (run / "environment.json").is_file() else {}
    before = environment.get("facts", {}).get("data")
    if before is None:
        raise UsageError(
            Problem(str(run), "records no data (environment.json), so nothing can be compared with it.", "Is the run finished?")
        )
    if before == data.fingerprint:
        return
    counts = read_json(run / "metrics.json")["data"] if (run / "metrics.json").is_file() else {}
    now = {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)}
    other = [f"{counts[name]:,} {name} samples then, {count:,} now" for name, count in now.items() if counts.get(name, count) != count]
    what = "; ".join(other) or "as many samples, but their content or their labels differ"
    hint = "Put the data back, or run the recipe again."
    raise UsageError(
        Problem(str(run), f"the data changed since this run: {what} (fingerprint {before[:12]}, now {data.fingerprint[:12]}).", hint)
    )


def _recorded(run: Path) -> dict[str, dict[str, float]]:
    """The metrics of each role in the run's own metrics.json; of several seeds those of the best, whose student stands in the folder."""
    if not (run / "metrics.json").is_file():
        return {}
    metrics = read_json(run / "metrics.json")
    if "runs" in metrics:
        [best] = [row for row in metrics["runs"] if row["seed"] == metrics["best_seed"]]
        return {role: found for role, found in best.items() if role != "seed"}
    peers = {f"peer-{n}": peer["metrics"] for n, peer in enumerate(metrics["models"]["student"].get("peers", []))}
    return peers | {role: model["metrics"] for role, model in metrics["models"].items()}
