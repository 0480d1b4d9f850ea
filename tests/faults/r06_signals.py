"""R6: SIGTERM and SIGINT. The run leaves with 75 after the step and a checkpoint, loses no step, and ends in the same bytes when it goes on."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections import Counter
from itertools import cycle, product
from typing import Any

from faults.harness import Aim, Case, Lab, lab
from running import steps

PROMISE = "SIGTERM and SIGINT, once and twice in a row: exit code 75 at once, no step lost, the same bytes"
STAGES = ("training", "evaluation", "cache filling", "export")
SEED = 20261125


def trial(lab: Lab, case: Case, stage: str | None, number: int, twice: bool, chance: random.Random) -> dict[str, Any] | None:
    """One run, asked to leave and resumed. stage: None for any instant. None where it had ended, or left the stage, before it was asked."""
    run = lab.begin(case)
    aim = Aim(lab, case, stage, chance) if stage is not None else None
    child = run.go(patches=aim.patches(run) if aim is not None else ())
    if aim is not None:
        aim.wait(child)
    else:
        while child.running() and not child.hears():
            time.sleep(0.001)
        time.sleep(chance.random() * lab.left_alone(case).seconds)
    before = {role: steps(run.out, role) for role in ("student", "baseline")}
    asked, used = time.monotonic(), child.cpu_so_far()
    child.send(number)
    if twice:
        time.sleep(chance.random() * 0.05)
        child.send(chance.choice((signal.SIGTERM, signal.SIGINT)))
    code = child.wait()
    seconds, cpu = time.monotonic() - asked, child.cpu_so_far() - used
    if code == 0 or (aim is not None and not aim.entered()):
        run.clear()
        return None
    wrong = []
    if code != 75:
        wrong.append(f"it left with {code}: {run.said()[-2000:]}")
    after = {role: steps(run.out, role) for role in ("student", "baseline")}
    committed = dict(run.stopped())
    for role, known in before.items():
        if len(after[role]) > len(known) + 2:  # one that was underway, and one that ended between looking and asking
            wrong.append(f"it went on from step {known[-1:]} to {after[role][-1:]} of the {role}")
        trained = any(run.out.glob(f"checkpoints/{role}-done/step-*"))
        if after[role] and not trained and committed.get(role) != after[role][-1]:
            wrong.append(f"steps were lost: {after[role][-1]} of the {role} was done, and {committed.get(role)} is committed")
    if code == 75 and (again := run.go(resume=True).wait()) != 0:
        wrong.append(f"resumed, it left with {again}: {run.said()[-2000:]}")
    wrong += run.judge() if not wrong else []
    run.clear()
    return {
        "case": str(case),
        "stage": stage,
        "signal": signal.Signals(number).name,
        "twice": twice,
        "seconds": round(seconds, 3),
        "cpu": round(cpu, 3),
        "committed": committed,
        "wrong": wrong,
    }


def run(count: int | None = None, seed: int = SEED, chosen: list[Case] | None = None) -> dict[str, Any]:
    """``count`` signals (100): a fifth each in training, evaluation, cache filling, export, and at any instant; half of them twice in a row."""
    count, rows = 100 if count is None else count, []
    every = chosen or [Case(w, a, c) for w, a, c in product((0, 2), (1, 4), ("filling", "off"))]
    with lab() as there:
        for number, (stage, sig) in zip(range(count), cycle(product((*STAGES, None), (signal.SIGTERM, signal.SIGINT))), strict=False):
            chance = random.Random(f"{seed} {number}")
            case = every[number % len(every)]
            if stage == "cache filling" and case.cache != "filling":
                case = Case(case.workers, case.accumulate, "filling")
            found = None
            while found is None:
                found = trial(there, case, stage, sig, (number // 10) % 2 == 1, chance)
            rows.append(found)
            print(f"R6: {number + 1} of {count}: {found}", file=sys.stderr, flush=True)
    seconds, cpu = (sorted(row[name] for row in rows) for name in ("seconds", "cpu"))
    details = {
        "asked in": dict(Counter(row["stage"] or "any instant" for row in rows)),
        "signals": dict(Counter(row["signal"] for row in rows)),
        "twice in a row": sum(row["twice"] for row in rows),
        "left after a checkpoint in mid-training": sum(bool(row["committed"]) for row in rows),
        "seconds to leave, median and most": [seconds[len(seconds) // 2], seconds[-1]],
        "of these computing": [cpu[len(cpu) // 2], cpu[-1]],
        "failed": [row for row in rows if row["wrong"]],
    }
    held = sum(not row["wrong"] for row in rows)
    return {"id": "R6", "promise": PROMISE, "seed": seed, "tried": len(rows), "held": held, "details": details}
