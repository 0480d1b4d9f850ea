"""``limbeck demo``: the main job from nothing, in about a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck._folder import next_free, refuse_taken
from limbeck.progress import Progress
from limbeck.reading import build_recipe
from limbeck.spine import run_into

__all__ = ["demo"]

MODELS = Path(__file__).with_name("_demo_models.py")
LABELLED = 100
"""Few labels and many unlabelled images: where a teacher honestly helps, because it can label what nobody did."""


def demo(out: Path | None = None, progress: str = "auto") -> dict[str, Any]:
    """Train a teacher on digits with all labels; distil it into a far smaller student that sees 100 labels and the rest unlabelled; 3 seeds."""
    folder = out or next_free(Path("runs"), "demo")
    refuse_taken(folder, False)
    with Progress(progress) as shown:
        shown.say("1 of 2: a teacher, trained on all labelled digits.")
    teacher = build_recipe(
        {
            "task": "image-classification",
            "student": {"model": f"python:{MODELS}:teacher"},
            "data": {"source": "digits", "augment": "standard"},
            "objective": [{"loss": "cross_entropy", "weight": 1.0}],
            "train": {"epochs": 20, "batch_size": 64, "lr": 3e-3, "precision": "float32", "workers": 0},
            "export": [],
        },
        command="train",
        where="demo",
    )
    run_into(teacher, base=Path.cwd(), out=folder / "teacher-run", progress=progress)
    with Progress(progress) as shown:
        shown.say(f"2 of 2: a student, with {LABELLED} labels and the other training images unlabelled; 3 seeds, each beside its baseline.")
    student = build_recipe(
        {
            "task": "image-classification",
            "teacher": {"model": f"run:{(folder / 'teacher-run').resolve()}"},
            "student": {"model": f"python:{MODELS}:student"},
            "data": {"source": "digits", "labelled_limit": LABELLED},
            "objective": [{"loss": "kd", "weight": 0.9, "temperature": 4.0}, {"loss": "cross_entropy", "weight": 0.1}],
            "train": {"epochs": 20, "batch_size": 64, "lr": 2e-2, "precision": "float32", "workers": 0},
        },
        command="distill",
        where="demo",
    )
    return run_into(student, base=Path.cwd(), out=folder, seeds=3, progress=progress)
