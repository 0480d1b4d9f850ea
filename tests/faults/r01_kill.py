"""R1: kill -9 anywhere. A run that is killed at a random instant, as often as it takes, ends in the bytes of one that was left alone."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections import Counter
from itertools import product
from typing import Any

from faults.harness import Aim, Case, Lab, kill, lab

PROMISE = "kill -9 anywhere: the same bytes, and the log shows the step that was gone on from"
AIMED = ("checkpoint", "cache filling", "evaluation", "export", "report")
SEED = 20261124


def cases() -> list[Case]:
    """Workers 0 and 2, accumulation 1 and 4, the cache off, filling and ready."""
    return [Case(w, a, c) for a, w, c in product((1, 4), (0, 2), ("off", "filling", "ready"))]


def trial(lab: Lab, case: Case, stage: str | None, chance: random.Random) -> dict[str, Any] | None:
    """One run, killed once or (one in four) twice, and finished. None where it had ended, or left the stage, before it was killed."""
    run = lab.begin(case)
    kills = 2 if chance.random() < 0.25 else 1
    resumed: list[list[Any]] = []
    for number in range(kills):
        aim = Aim(lab, case, stage, chance) if stage is not None and number == 0 else None
        child = run.go(resume=number > 0, patches=aim.patches(run) if aim is not None else ())
        if aim is not None:
            aim.wait(child)
        else:
            time.sleep(chance.random() * lab.left_alone(case).seconds)
        if kill(child) != -signal.SIGKILL or (aim is not None and not aim.inside()):
            if number == 0:
                run.clear()
                return None
            break  # the second one came too late
        resumed = list(run.stopped())
    code = run.go(resume=True).wait()
    wrong = run.judge() if code == 0 else [f"it left with {code}: {run.said()[-2000:]}"]
    found = {"case": str(case), "stage": stage, "starts": run.starts, "resumed from": resumed, "wrong": wrong}
    run.clear()
    return found


def run(count: int | None = None, seed: int = SEED, chosen: list[Case] | None = None) -> dict[str, Any]:
    """``count`` instants (200), a quarter of them aimed, over all cases in turn."""
    count, rows = 200 if count is None else count, []
    every = cases() if chosen is None else chosen
    with lab() as there:
        for number in range(count):
            chance = random.Random(f"{seed} {number}")
            aimed = AIMED[(number // 4) % len(AIMED)] if number % 4 == 3 else None
            case = every[number % len(every)]
            if aimed == "cache filling" and case.cache != "filling":
                case = Case(case.workers, case.accumulate, "filling")
            found = None
            while found is None:
                found = trial(there, case, aimed, chance)
            rows.append(found)
            print(f"R1: {number + 1} of {count}: {found}", file=sys.stderr, flush=True)
    held = [row for row in rows if not row["wrong"]]
    steps = [step for row in rows for _, step in row["resumed from"]]
    details = {
        "aimed at": dict(Counter(row["stage"] or "any instant" for row in rows)),
        "cases": len({row["case"] for row in rows}),
        "killed twice": sum(row["starts"] > 2 for row in rows),
        "gone on from a checkpoint": sum(bool(row["resumed from"]) for row in rows),
        "steps gone on from": dict(sorted(Counter(steps).items())),
        "failed": [row for row in rows if row["wrong"]],
    }
    return {"id": "R1", "promise": PROMISE, "seed": seed, "tried": len(rows), "held": len(held), "details": details}
