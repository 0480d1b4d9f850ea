"""Runs of several processes that are disturbed: what they train, how they are started, and what is compared.

python tests/faults/together.py R3 | R6-ranks | R7 [--count N]      the long version of a row, into benchmarks/results/faults/
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from safetensors.numpy import load_file

from running import ROOT, Started, ended, left_over, lines, make_folder, ranks, recipe, steps, weights

ROLES = ("student", "baseline")
MODULES = {"R3": "faults.r03_world_size", "R6-ranks": "faults.r06_ranks", "R7": "faults.r07_lost_rank"}
RESULTS = ROOT / "benchmarks" / "results" / "faults"

NOTING = '''

class Lazy(nn.Module):
    """Dropout and batch statistics; slow in every pass, so that a signal finds it in whatever it does."""

    def __init__(self, width, num_classes):
        super().__init__()
        self.body, self.norm, self.drop = nn.Linear(64, width), nn.BatchNorm1d(width), nn.Dropout(0.3)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        if not torch.jit.is_tracing():
            time.sleep(float(os.environ.get("LAZY", "0")))
        return self.head(self.drop(self.norm(self.body(x.flatten(1))).relu()))


def lazy(num_classes=3, width=6):
    return Lazy(width, num_classes)


class Plain(nn.Module):
    """No batch statistics: the weights do not depend on how a step is shared."""

    def __init__(self, width, num_classes):
        super().__init__()
        self.body, self.head = nn.Linear(64, width), nn.Linear(width, num_classes)

    def forward(self, x):
        time.sleep(float(os.environ.get("LAZY", "0")))
        return self.head(self.body(x.flatten(1)).tanh())


def dense(num_classes=3, width=7):
    return Plain(width, num_classes)


if "NOTE_IDS" in os.environ:
    # the ids that each rank of a run reads at each step
    import json

    import limbeck.loop
    import limbeck._roles

    fit, stream = limbeck._roles.fit, limbeck.loop.stream

    def noting_fit(*given, **named):
        noting_fit.role = next(v for v in given if hasattr(v, "checkpoints")).role
        return fit(*given, **named)

    def noting_stream(builder, requests, **how):
        for request, batch in stream(builder, requests, **how):
            line = {"role": noting_fit.role, "step": request.step, "rank": int(os.environ.get("RANK", "0"))}
            line["ids"] = [f"{a:016x}{b:016x}" for a, b in batch.ids.tolist()] if request.counted else []
            with open(os.environ["NOTE_IDS"], "a") as file:
                file.write(json.dumps(line) + "\\n")
            yield request, batch

    if fit.__name__ != "noting_fit":
        limbeck._roles.fit, limbeck.loop.stream = noting_fit, noting_stream
'''


def place(folder: Path) -> Path:
    """Data and models."""
    made = make_folder(folder, train=50)
    (made / "nets.py").write_text((made / "nets.py").read_text() + NOTING)
    return made


def lazy_recipe(folder: Path, name: str = "recipe.yaml", **changes: Any) -> Path:
    """AdamW, dropout, batch statistics, an average: everything that a resume has to bring back. 12 steps for each of two roles."""
    how: dict[str, Any] = {
        "teacher": {"model": "python:nets.py:lazy", "options": {"width": 11}},
        "student": {"model": "python:nets.py:lazy"},
        "data": {"augment": {"crop": 1, "flip": True}},
        "train": {"epochs": 3, "checkpoint_every": 3, "ema": 0.9, "select": "best", "lr": 0.02},
        "teacher_cache": {"mode": "off"},
    }
    merged = {**how, **changes, "train": {**how["train"], **changes.get("train", {})}}
    return recipe(folder, name, **merged)


def exact_recipe(folder: Path, name: str = "exact.yaml") -> Path:
    """float64 and SGD, no batch statistics: the same weights for any number of processes."""
    return recipe(
        folder,
        name,
        teacher={"model": "python:nets.py:dense", "options": {"width": 11}},
        student={"model": "python:nets.py:dense"},
        data={"augment": {"crop": 1, "flip": True}, "labelled_limit": 29},
        train={"optimizer": "sgd", "precision": "float64", "accumulate": 2, "epochs": 3, "checkpoint_every": 2},
    )


def several(size: int, recipe: Path, out: Path, *more: str, said: Path, **environment: str) -> list[Started]:
    """So many ranks; a single process where it is one."""
    return ranks(size, "distill", recipe, "--out", out, *more, said=said, **environment)


def left_alone(size: int, recipe: Path, out: Path, **environment: str) -> Path:
    codes, said = ended(several(size, recipe, out, said=out.with_suffix(".said"), **environment))
    assert codes == [0] * size, said
    return out


def same_bytes(one: Path, other: Path) -> list[str]:
    """What of two runs is not the same; empty where all is: every weight, every step of the log, nothing left over."""
    wrong = [f"weights of the {role}" for role in ROLES if weights(one / role) != weights(other / role)]
    wrong += [f"steps of the {role}" for role in ROLES if steps(one, role) != steps(other, role)]
    wrong += [f"left over: {left_over(one)}"] if left_over(one) else []
    return wrong + (["checkpoints are still there"] if (one / "checkpoints").exists() else [])


def distance(one: Path, other: Path) -> float:
    found = [[load_file(run / role / "model.safetensors") for run in (one, other)] for role in ROLES]
    return max(float(np.abs(a[k] - b[k]).max()) for a, b in found for k in a)


def steps_lost(out: Path) -> list[str]:
    """Steps of a run that was asked to leave which no checkpoint holds."""
    wrong = []
    for role in ROLES if (out / "checkpoints").exists() else ():  # they go when a run is finished
        known = steps(out, role)
        if not known or any(out.glob(f"checkpoints/{role}-done/step-*")):
            continue
        committed = max((int(p.name[5:]) for p in (out / "checkpoints" / role).glob("step-*")), default=0)
        if committed != known[-1]:
            wrong.append(f"step {known[-1]} of the {role} was done, and {committed} is committed")
    return wrong


def until(happened: Callable[[], bool], living: Callable[[], bool], seconds: float = 900) -> bool:
    """Wait for it; False where the process ended before."""
    end = time.monotonic() + seconds
    while not happened():
        if not living():
            return happened()
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.005)
    return True


class Torchrun:
    """``torchrun --nproc-per-node 2 -m limbeck distill ...`` as a person starts it."""

    def __init__(self, recipe: Path, out: Path, *options: str, **environment: str) -> None:
        self.said = out.with_suffix(".said")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
        environ = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "LOGLEVEL": "ERROR", **environment}
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [*launcher, "-m", "limbeck", "distill", str(recipe), "--out", str(out)], env=environ, stdout=said, stderr=said
            )
        self.seen: set[int] = set()

    def living(self) -> bool:
        return self.process.poll() is None

    def workers(self) -> dict[int, int]:
        """The process of each rank that lives now."""
        found = {}
        for pid in children(self.process.pid):
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            rank = next((v for v in variables if v.startswith(b"RANK=")), None)
            if rank is not None and alive(pid):
                found[int(rank[5:])] = pid
        self.seen |= set(found.values())
        return found

    def orphans(self) -> list[int]:
        """Processes of the run that outlive the launcher."""
        end = time.monotonic() + 10
        while (left := [pid for pid in self.seen if alive(pid)]) and time.monotonic() < end:
            time.sleep(0.1)
        return left

    def text(self) -> str:
        return self.said.read_text(encoding="utf-8", errors="replace")


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def lab(folder: Path | None = None) -> Iterator[Path]:
    made = place(folder or Path(tempfile.mkdtemp(prefix="limbeck-together-")))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def noted(path: Path) -> dict[str, dict[int, list[str]]]:
    """What ranks noted: the ids of each step of each role, in the order of the ranks; of a step that was done twice, the last time."""
    found: dict[str, dict[int, dict[int, list[str]]]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        found.setdefault(line["role"], {}).setdefault(line["step"], {})[line["rank"]] = line["ids"]
    return {role: {step: [i for rank in sorted(by) for i in by[rank]] for step, by in of.items()} for role, of in found.items()}


def resumed(out: Path) -> list[list[Any]]:
    return [[line["role"], line["resumed_from"]] for line in lines(out) if "resumed_from" in line]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=MODULES)
    parser.add_argument("--count", type=int)
    given = parser.parse_args()
    began = time.time()
    module = importlib.import_module(MODULES[given.row])
    found: dict[str, Any] = module.run(given.count)
    import torch

    result = {
        **found,
        "command": f"python tests/faults/together.py {given.row}" + (f" --count {given.count}" if given.count else ""),
        "seed": module.SEED,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.time() - began),
        "torch": torch.__version__,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{given.row}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{given.row}: {result['held']} of {result['tried']} held; {result['details']}")
    return int(result["held"] != result["tried"])


if __name__ == "__main__":
    sys.exit(main())
