"""Several machines: hosts in network namespaces, each with files of its own, train as one process does; and what differs between machines is said."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import hosts
from running import arrays, ended, make_folder, ranks, read, recipe, run

SGD: dict[str, Any] = {
    "teacher": {"model": "run:teacher"},
    "student": {"model": "python:nets.py:plain"},
    "train": {"optimizer": "sgd", "precision": "float64", "accumulate": 2, "epochs": 3, "checkpoint_every": 2},
    "data": {"augment": {"crop": 1, "flip": True}},
    "teacher_cache": {"path": "cache", "views": 2},
}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every machine has: data, models, a trained teacher, a recipe; and a run of one process."""
    folder = make_folder(tmp_path_factory.mktemp("hosts") / "host-0", train=50)
    run("train", recipe(folder, "train.yaml", teacher=None, student={"model": "python:nets.py:teacher"}), out=folder / "teacher")
    recipe(folder, **SGD)
    machine(folder, 9)
    run("distill", folder.parent / "host-9/recipe.yaml", out=folder.parent / "host-9/run")
    return folder


def machine(like: Path, number: int) -> Path:
    """A machine of its own."""
    folder = like.with_name(f"host-{number}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("cache", "run"))
    return folder


def distance(one: Path, other: Path) -> float:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float(np.abs(a[k].astype(np.float64) - b[k]).max()) for k in a)


def cached(folder: Path) -> dict[str, bytes]:
    """The bytes of a machine's cache; figures.json has speeds, which are measured."""
    cache = folder / "cache"
    files = [p for p in sorted(cache.rglob("*")) if p.is_file() and p.name != "figures.json" and not p.name.startswith(".")]
    assert files
    return {str(p.relative_to(cache)): p.read_bytes() for p in files}


@pytest.mark.skipif(bool(hosts.missing()), reason=hosts.missing())
def test_two_hosts_end_in_the_weights_of_one_process(there: Path) -> None:
    folders = [machine(there, number) for number in (1, 2)]
    code = hosts.start(folders, ["distill", "recipe.yaml", "--out", "run"]).wait(timeout=600)
    assert code == 0, [(folder / "said.txt").read_text() for folder in folders]
    alone = there.with_name("host-9")
    for role in ("student", "baseline"):
        assert distance(alone / "run" / role, folders[0] / "run" / role) < 1e-9
    assert read(folders[0] / "run/environment.json")["world_size"] == 2
    assert not (folders[1] / "run").exists()  # only the main rank writes
    assert cached(folders[0]) == cached(folders[1]) == cached(alone)
    assert "student" not in (folders[1] / "said.txt").read_text()


@pytest.mark.skipif(bool(hosts.missing()), reason=hosts.missing())
def test_hosts_leave_nothing_behind_when_they_are_killed(there: Path) -> None:
    folder = machine(there, 1)
    started = hosts.start([folder], ["distill", "recipe.yaml", "--out", "run"])
    inside = _below(started.pid)
    end = time.monotonic() + 120
    while not (folder / "said.txt").exists() and time.monotonic() < end:
        time.sleep(0.05)
    inside |= _below(started.pid)
    started.kill()
    started.wait(timeout=60)
    while any(Path(f"/proc/{pid}").exists() for pid in inside) and time.monotonic() < end:
        time.sleep(0.05)
    assert inside
    assert not any(Path(f"/proc/{pid}").exists() for pid in inside)


def _below(pid: int) -> set[int]:
    """All descendants."""
    found: set[int] = set()
    try:
        children = {int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except (FileNotFoundError, ProcessLookupError):
        return found
    return children.union(*(_below(child) for child in children)) if children else found


class TestFilesOfTheirOwn:
    """Two ranks on this machine, each with the folder that a machine of its own would have."""

    def two(self, there: Path, *more: str, out: str = "run") -> tuple[list[int | None], str]:
        """host-0's are the files of rank 0, host-1's those of rank 1."""
        arguments = ("distill", there.parent / "host-{rank}/recipe.yaml", "--out", there.parent / "host-{rank}" / out, *more)
        return ended(ranks(2, *arguments, said=there.parent / "said"))

    @pytest.mark.parametrize("has", [0, 1])
    def test_a_cache_that_only_one_machine_has(self, there: Path, has: int) -> None:
        for number in (0, 1):
            shutil.rmtree(there.with_name(f"host-{number}") / "run", ignore_errors=True)
            shutil.rmtree(there.with_name(f"host-{number}") / "cache", ignore_errors=True)
        other = machine(there, 1)
        shutil.copytree(there.with_name("host-9") / "cache", there.with_name(f"host-{has}") / "cache")
        codes, said = self.two(there)
        assert codes == [0, 0], said
        assert distance(there.with_name("host-9") / "run/student", there / "run/student") < 1e-9
        assert not (other / "run").exists()
        assert cached(there) == cached(other)

    @pytest.mark.parametrize(
        ("change", "said_of"),
        [
            ({"train": {**SGD["train"], "lr": 0.06}}, "train is"),
            ({"data": {"source": "npz:other.npz"}}, "data is"),
            ({"teacher": {"model": "run:other"}}, "teacher is"),
        ],
    )
    def test_what_differs_is_said_once_and_nothing_is_written(self, there: Path, change: dict[str, Any], said_of: str) -> None:
        other = machine(there, 1)
        shutil.rmtree(there / "run", ignore_errors=True)
        np.savez(other / "other.npz", **arrays(49))
        changed = {**SGD, **change, "data": {**SGD["data"], **change.get("data", {})}}
        recipe(other, **changed)
        if said_of == "teacher is":
            run(
                "train", recipe(other, "train.yaml", teacher=None, student={"model": "python:nets.py:teacher"}, seed=1), out=other / "other"
            )
        codes, said = self.two(there)
        assert codes == [2, 2], said
        assert said.count(said_of) == 1
        assert "rank 1 on" in said
        assert "Traceback" not in said
        assert not (there / "run").exists()

    def test_a_cache_in_another_precision_is_refused(self, there: Path) -> None:
        other = machine(there, 1)
        shutil.rmtree(there / "run", ignore_errors=True)
        shutil.rmtree(there / "cache", ignore_errors=True)
        recipe(other, "bf16.yaml", **{**SGD, "teacher": {"model": "run:teacher", "precision": "bf16"}})
        run("distill", other / "bf16.yaml", "--set", "train.epochs=1", out=other / "elsewhere")
        codes, said = self.two(there)
        assert codes == [2, 2], said
        assert "holds answers in bf16" in said
        assert "Traceback" not in said


def test_restarts_need_a_named_folder(there: Path, tmp_path: Path) -> None:
    codes, said = ended(ranks(2, "distill", there / "recipe.yaml", said=tmp_path, TORCHELASTIC_MAX_RESTARTS="3"))
    assert codes == [2, 2]
    assert said.count("--out: is needed with torchrun's --max-restarts") == 1
    assert json.dumps(said).count("Traceback") == 0
