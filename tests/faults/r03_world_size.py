"""R3: another number of ranks. A run that is stopped and goes on with 1, 2, 1 and 4 processes reads the same ids at every step."""

from __future__ import annotations

import random
import signal
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from faults.together import ROLES, distance, ended, exact_recipe, lab, lazy_recipe, left_alone, noted, same_bytes, several, steps, until
from running import Started

PROMISE = (
    "1, 2, 1, 4 ranks one after the other: the same ids at every step, float64 weights to 1e-9; the same number of ranks: the same bytes"
)
SEED = 20261126
LAZY = "0.03"


def stops(out: Path) -> int:
    """Steps of all roles that are in the log."""
    return sum(len(steps(out, role)) for role in ROLES)


def reached(out: Path, stop: int) -> bool:
    return stops(out) >= stop


def lives(process: Started) -> bool:
    return process.poll() is None


def through(sizes: list[int], recipe: Path, out: Path, chance: random.Random, **environment: str) -> list[str]:
    """A run that is stopped at random steps, each time going on with the next number of ranks. What went wrong."""
    total = 24  # 12 of the student, 12 of the baseline
    at = sorted(chance.sample(range(1, total - 1), len(sizes) - 1))
    more: tuple[str, ...] = ()
    for size, place in zip(sizes, [*at, None], strict=True):
        stop = place
        if stop is not None:  # one more step at least than was done before
            stop = max(stop, stops(out) + 1)
        processes = several(size, recipe, out, *more, said=out.with_suffix(".said"), LAZY=LAZY, **environment)
        if stop is not None:
            if until(partial(reached, out, stop), partial(lives, processes[0])):
                processes[chance.randrange(size)].send_signal(signal.SIGTERM)
            codes, said = ended(processes)
            if codes != [75] * size:
                return [f"{size} ranks, asked to leave at step {stop}, left with {codes}: {said[-1500:]}"]
        else:
            codes, said = ended(processes)
            if codes != [0] * size:
                return [f"{size} ranks, at the end, left with {codes}: {said[-1500:]}"]
        more = ("--resume",)
    return []


def run(count: int | None = None) -> dict[str, Any]:
    """``count`` (12) runs: three quarters go through 1, 2, 1, 4 ranks (or an order of them), a quarter through 2, 2, 2."""
    count, failed = 12 if count is None else count, []
    tried = {"other sizes": 0, "same size": 0}
    largest = 0.0
    with lab() as there:
        exact, lazy = exact_recipe(there), lazy_recipe(there)
        alone = left_alone(1, exact, there / "alone", NOTE_IDS=str(there / "alone.ids"))
        quiet = left_alone(2, lazy, there / "quiet")
        ids = noted(there / "alone.ids")
        for number in range(count):
            chance, out = random.Random(f"{SEED} {number}"), there / f"run-{number}"
            if number % 4 == 3:
                tried["same size"] += 1
                wrong = through([2, 2, 2], lazy, out, chance) or same_bytes(out, quiet)
            else:
                tried["other sizes"] += 1
                sizes = [1, 2, 1, 4] if number % 4 == 0 else chance.sample([1, 2, 3, 4], 4)
                noting = there / f"{number}.ids"
                wrong = through(sizes, exact, out, chance, NOTE_IDS=str(noting))
                if not wrong:
                    found = noted(noting)
                    wrong = [f"ids of the {role}" for role in ids if found.get(role) != ids[role]]
                    largest = max(largest, distance(out, alone))
                    wrong += [] if distance(out, alone) < 1e-9 else [f"weights differ by {distance(out, alone):.2g}"]
                    wrong += [f"steps of the {role}" for role in ROLES if steps(out, role) != steps(alone, role)]
            if wrong:
                failed.append({"number": number, "wrong": wrong})
        assert all(a != b for role in ROLES for a, b in pairwise(list(ids[role].values())))  # the ids tell steps apart
    details = {**tried, "largest difference of weights": largest, "failed": failed}
    return {"id": "R3", "promise": PROMISE, "tried": count, "held": count - len(failed), "details": details}
