"""R7: a rank dies under torchrun, which starts the run again; a rank hangs, and the run ends."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

from faults.together import Torchrun, lab, lazy_recipe, left_alone, resumed, same_bytes, until

PROMISE = (
    "2 ranks under torchrun with restarts, kill -9 of one: the same bytes; a hung rank ends the run by the timeout; no process is left"
)
SEED = 20261127
LAZY = "0.08"
KILLS = 4  # of one run, one after each start


def killed(
    there: Path, recipe: Path, number: int, kills: int, quiet: Path, chance: random.Random
) -> tuple[int, list[str], list[list[Any]]]:
    """One run, of which a rank is killed so many times. How often it was, what is wrong, and where it was resumed."""
    out = there / f"run-{number}"
    started = Torchrun(recipe, out, "--max-restarts", str(kills), LAZY=LAZY)
    done, before = 0, set[int]()
    for _ in range(kills):
        # the next pair of workers, and something that they have done since they were started
        if not until(partial(fresh, started, frozenset(before)), started.living):
            break
        before |= set(started.workers().values())
        size = log_size(out)
        if not until(lambda size=size: log_size(out) != size, started.living):
            break
        time.sleep(chance.random() * 2.0)
        workers = started.workers()
        if len(workers) < 2 or not started.living():
            break
        os.kill(workers[chance.randrange(2)], signal.SIGKILL)
        done += 1
    code = started.process.wait(timeout=600)
    wrong = [f"torchrun left with {code}: {started.text()[-8000:]}"] if code else same_bytes(out, quiet)
    wrong += [f"processes are left: {left}"] if (left := started.orphans()) else []
    return done, wrong, resumed(out)


def fresh(started: Torchrun, before: frozenset[int]) -> bool:
    """Whether both workers are there, and neither is one of those before."""
    workers = started.workers()
    return len(workers) == 2 and not before & set(workers.values())


def log_size(out: Path) -> int:
    log = out / "log.jsonl"
    return log.stat().st_size if log.exists() else 0


def hung(there: Path, recipe: Path, number: int, chance: random.Random) -> list[str]:
    """One rank is stopped without being ended. What is wrong."""
    out = there / f"hung-{number}"
    started = Torchrun(recipe, out, LAZY=LAZY, LIMBECK_RANK_TIMEOUT="6")
    if not until(lambda: log_size(out) > 0, started.living):
        return [f"it ended by itself: {started.text()[-8000:]}"]
    time.sleep(chance.random())
    os.kill(started.workers()[number % 2], signal.SIGSTOP)
    code = started.process.wait(timeout=600)
    wrong = [] if code else ["torchrun left with 0"]
    if started.text().count("did not answer for 6 s") != 1:
        wrong.append(f"it said {started.text()[-8000:]}")
    return wrong + ([f"processes are left: {left}"] if (left := started.orphans()) else [])


def run(count: int | None = None) -> dict[str, Any]:
    """``count`` kills (20), of one rank of two at random times after a start, four of a run; and a tenth as many ranks that hang."""
    count, failed, done, runs = 20 if count is None else count, [], 0, 0
    seen: list[list[Any]] = []
    with lab() as there:
        recipe = lazy_recipe(there)
        quiet = left_alone(2, recipe, there / "quiet")
        while done < count:
            chance = random.Random(f"{SEED} {runs}")
            kills, wrong, at = killed(there, recipe, runs, min(KILLS, count - done), quiet, chance)
            done, runs, seen = done + kills, runs + 1, seen + at
            if wrong:
                failed.append({"run": runs, "kills": kills, "wrong": wrong})
        stuck = max(1, count // 10)
        for number in range(stuck):
            wrong = hung(there, recipe, number, random.Random(f"{SEED} hung {number}"))
            if wrong:
                failed.append({"hung": number, "wrong": wrong})
    lost = sum(f.get("kills", 1) for f in failed)
    details = {
        "kills": done,
        "runs": runs,
        "hung ranks": stuck,
        "resumed from": [f"{role} {step}" for role, step in seen],
        "failed": failed,
    }
    return {"id": "R7", "promise": PROMISE, "tried": done + stuck, "held": done + stuck - lost, "details": details}
