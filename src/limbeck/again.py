"""A finished run, looked at again: its student evaluated or exported from what the folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from limbeck._folder import read_recipe
from limbeck._parts import Parts
from limbeck._results import figures
from limbeck.data import Data, load_data
from limbeck.engine import Engine, choose_device
from limbeck.errors import Problem, UsageError
from limbeck.export import export_model
from limbeck.models import load_saved
from limbeck.recipe import Recipe
from limbeck.report import write_report
from limbeck.run import read_json, write_json

__all__ = ["evaluate_run", "export_run"]


def evaluate_run(run: Path) -> dict[str, Any]:
    """Measure the student (and the baseline) of a run on its test split, on this machine, now; nothing is written.

    Returns {"models": {role: figures}}, each as in metrics.json, and {"recorded": {role: accuracy}} from the run's own metrics.
    """
    recipe, data = _of(run)
    device = choose_device("auto")
    models = {}
    for role in ("student", "baseline"):
        if (run / role / "model.json").is_file():
            model = load_saved(run / role)
            engine = Engine(device, "float64" if recipe.train.precision == "float64" else "float32")
            engine.place(model.module)
            parts = Parts(recipe, data, model.preprocessing, None)
            logits = parts.logits(model, data.test, engine)
            models[role] = figures(model, logits, data.test.labels, parts.samples(), engine)
    recorded = _recorded(run)
    return {"models": models, "recorded": {role: recorded[role]["accuracy"] for role in models if role in recorded}}


def export_run(run: Path, formats: list[str]) -> dict[str, Any]:
    """Export the student of a run, each file checked against its weights on real test samples; metrics.json and the report are brought up to date.

    Raises: ParityFailed, and nothing is left under a final name, where a file does not answer as the student does.
    """
    recipe, data = _of(run)
    model = load_saved(run)
    Engine(torch.device("cpu")).place(model.module)
    model.module.eval()
    inputs = Parts(recipe, data, model.preprocessing, None).parity_inputs()
    exported = export_model(model, formats, run / "export", inputs=inputs, classes=model.classes or data.classes, task=recipe.task)
    if (run / "metrics.json").is_file():
        metrics = read_json(run / "metrics.json")
        metrics["export"] = {**metrics.get("export", {}), **exported}
        if set(recipe.export) <= set(metrics["export"]):  # what a run failed to export is there now
            metrics.pop("export_failure", None)
            metrics["notes"] = [note for note in metrics["notes"] if not note.startswith("The export failed: ")]
        write_json(run / "metrics.json", metrics)
        write_report([run], run / "report.html")
    return exported


def _of(run: Path) -> tuple[Recipe, Data]:
    """The recipe and the data of a run."""
    if not (run / "recipe.yaml").is_file():
        raise UsageError(Problem(str(run), "is not a run: it has no recipe.yaml."))
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
    return {role: model["metrics"] for role, model in metrics["models"].items()}
