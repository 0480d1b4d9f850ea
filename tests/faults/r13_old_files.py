"""R13: old files. What an earlier version wrote (``tests/golden``) is loaded; what a later one wrote is refused, with what to do."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck import checkpoint
from limbeck._teaching import machine
from limbeck.cache import FIGURES, Reader, read_figures, seal
from limbeck.reading import load_recipe
from limbeck.run import write_atomic
from running import ROOT, read, steps

PROMISE = "files of the first version load; files of a later one are refused, with what to do"
GOLDEN = ROOT / "tests" / "golden"


def lay_out(folder: Path) -> Path:
    """A copy of the golden files that knows where it is."""
    shutil.copytree(GOLDEN, folder, dirs_exist_ok=True)
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".yaml", ".jsonl"):
            path.write_bytes(path.read_bytes().replace(b"HERE", str(folder).encode()))
    return folder


def logits_of(folder: Path) -> list[list[float]]:
    """What the student of a run says to eight test images."""
    import limbeck

    with np.load(folder.parent / "pictures.npz") as data, torch.no_grad():
        images = torch.from_numpy(data["test_x"][:8, None] / np.float32(255))
        found: list[list[float]] = limbeck.load(folder)(images).tolist()
        return found


def distill(*arguments: Any) -> tuple[int, str]:
    """``limbeck distill ARGUMENTS`` in this process: its exit code, and what it printed."""
    import contextlib
    import io

    from limbeck.cli import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main([str(a) for a in arguments])
        except SystemExit as left:
            return int(left.code or 0), said.getvalue()
    raise AssertionError("it did not leave")


def a_recipe(here: Path) -> None:
    found, _ = load_recipe(here / "recipe.json", {}, [], "distill")
    assert (found.train.epochs, found.train.checkpoint_every, found.objective[0].loss) == (2, 2, "kd")


def a_run(here: Path) -> None:
    """Its student answers as it did; it can be a teacher."""
    expected = read(here / "expected.json")["run"]
    np.testing.assert_allclose(np.array(logits_of(here / "run")), np.array(expected["logits"]), rtol=1e-4, atol=1e-5)
    assert read(here / "run" / "metrics.json")["models"]["student"]["metrics"] == expected["metrics"]
    plan = ["--dry-run", "--json", "--set", f"teacher.model=run:{here / 'run'}"]
    code, said = distill("distill", here / "recipe.json", *plan)
    assert code == 0, said


def a_checkpoint(here: Path) -> None:
    """Every value in it is what it was, and a run goes on from it."""
    from faults.inside import state_digest

    expected = read(here / "expected.json")["checkpoint"]
    found = checkpoint.load_newest(here / "stopped" / "checkpoints" / expected["role"])
    assert found is not None
    assert (found[0], state_digest(found[1])) == (expected["step"], expected["digest"])
    code, said = distill("distill", here / "recipe.json", "--resume", "--out", here / "stopped")
    assert code == 0, said
    assert read(here / "stopped" / "environment.json")["resumed"][expected["role"]] == [expected["step"]]
    assert steps(here / "stopped", expected["role"]) == list(range(1, 7))


def a_cache(here: Path) -> None:
    """Every part is whole, and a run asks its teacher nothing."""
    for name, parts in read(here / "expected.json")["cache"].items():
        reader = Reader(here / "cache" / name)
        assert [[part.name, part.rows] for part in reader.manifest.parts] == parts
        folder = here / "cache" / name
        if (folder / FIGURES).exists():  # on another processor the teacher would be timed again, which is no part of the promise
            told = {**read_figures(folder), "measured_on": machine(torch.device("cpu"))}
            write_atomic(folder / FIGURES, seal({"of": name, "figures": told}))
    more = ["--set", "teacher_cache.mode=require", "--set", "train.epochs=1", "--no-baseline", "--verify-cache", "0"]
    code, said = distill("distill", here / "recipe.json", "--out", here / "second", *more)
    assert code == 0, said
    assert read(here / "second" / "metrics.json")["cost"]["teacher_items"] == 0


def _refused(here: Path, words: tuple[str, ...], *arguments: Any) -> None:
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file() and p.name != ".lock"}
    code, said = distill("distill", *arguments)
    assert code == 2, said
    assert "Traceback" not in said
    assert all(word in said for word in ("99", "pip install -U limbeck", *words)), said
    assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file() and p.name != ".lock"} == before, "something was written"


def a_later_checkpoint(here: Path) -> None:
    for path in here.glob("stopped/checkpoints/baseline/*/manifest.json"):
        path.write_text(json.dumps({**read(path), "format": 99}))
    _refused(here, ("step-00000002",), here / "recipe.json", "--resume", "--out", here / "stopped")


def a_later_cache(here: Path) -> None:
    for path in here.glob("cache/*/manifest*.json"):
        body = {k: v for k, v in read(path).items() if k != "sha256"}
        path.write_text(seal({**body, "format": 99}))
    _refused(here, ("manifest.json",), here / "recipe.json", "--out", here / "second")


def a_later_run(here: Path) -> None:
    path = here / "run" / "student" / "model.json"
    path.write_text(json.dumps({**read(path), "format": 99}))
    _refused(here, ("model.json",), here / "recipe.json", "--set", f"teacher.model=run:{here / 'run'}", "--out", here / "second")


def a_later_recipe(here: Path) -> None:
    """A recipe has no version: a key that this version does not know is named."""
    code, said = distill("distill", here / "recipe.json", "--set", "train.not_yet_known=1", "--out", here / "second")
    assert code == 2, said
    assert "not_yet_known" in said
    assert not (here / "second").exists()


CASES: tuple[Callable[[Path], None], ...] = (
    a_recipe, a_run, a_checkpoint, a_cache, a_later_checkpoint, a_later_cache, a_later_run, a_later_recipe,
)  # fmt: skip


def run(count: int | None = None) -> dict[str, Any]:
    """Every kind of file, of this version and of a later one."""
    failed = []
    for case in CASES[:count]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                case(lay_out(Path(folder).resolve()))
            except AssertionError as e:
                failed.append(f"{case.__name__}: {e}")
    tried = len(CASES[:count])
    details = {"files": len([p for p in GOLDEN.rglob("*") if p.is_file()]), "failed": failed}
    return {"id": "R13", "promise": PROMISE, "seed": None, "tried": tried, "held": tried - len(failed), "details": details}
