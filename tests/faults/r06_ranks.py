"""R6 of several ranks: SIGTERM and SIGINT to one rank of two, or to torchrun. All leave with 75, no step is lost, the bytes are the same."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from faults.together import Torchrun, lab, lazy_recipe, left_alone, same_bytes, several, steps, steps_lost, until
from running import ended

PROMISE = "SIGTERM, SIGINT, once or twice, to one rank of two or to torchrun: both leave with 75, no step lost, the same bytes"
SEED = 20261128
LAZY = "0.04"
STAGES = ("training", "cache filling", "evaluation", "export")
LAUNCHED = 10  # every so many trials the signal goes to torchrun itself


def entered(out: Path, cache: Path, stage: str, role: str, step: int) -> bool:
    """Whether a run has come to a stage; of training to a step."""
    if stage == "cache filling":
        return (out / "recipe.yaml").exists() and any(cache.glob("*/plan-*"))
    if stage == "training":
        return step in steps(out, role)
    if not any(out.glob("checkpoints/baseline-done/step-*")):
        return False
    return stage == "evaluation" or (out / "export").exists()


def recipes(there: Path, cache: Path, stage: str, name: str) -> Path:
    kept = {"mode": "auto", "path": str(cache), "views": 2} if stage == "cache filling" else {"mode": "off"}
    return lazy_recipe(there, name, teacher_cache=kept, export=["torchscript"] if stage == "export" else [])


def trial(there: Path, number: int, stage: str, sig: signal.Signals, quiet: dict[str, Path]) -> dict[str, Any]:
    """One run that is asked to leave, and goes on."""
    chance = random.Random(f"{SEED} {number}")
    out, cache = there / f"run-{number}", there / f"cache-{number}"
    recipe, twice, launched = recipes(there, cache, stage, f"{number}.yaml"), number % 3 == 2, number % LAUNCHED == LAUNCHED - 1
    role, step = chance.choice(("student", "baseline")), chance.randrange(1, 11)
    there_yet = partial(entered, out, cache, stage, role, step)
    if launched:
        started = Torchrun(recipe, out, LAZY=LAZY)
        came = until(there_yet, started.living)
        time.sleep(chance.random() * 0.1)
        if came and started.living():
            started.workers()
            asked = time.monotonic()
            started.process.send_signal(sig)
            if twice:  # what a terminal's Ctrl-C is with an older launcher: the workers get the signal, and that of their launcher too
                for pid in started.workers().values():
                    _send(pid, sig)
        code = started.process.wait(timeout=600)
        said, seconds = started.text(), time.monotonic() - asked if came else 0.0
        codes: list[int | None] = [75 if code else 0] * 2
        wrong = [f"processes are left: {left}"] if (left := started.orphans()) else []
        # torchrun itself leaves with 1; what its workers did is in what they said
        finished = "after a checkpoint" in said or "Stopped by a signal" in said
        wrong += [] if code == 0 or finished else [f"it said {said[-1500:]}"]
    else:
        processes = several(2, recipe, out, said=out.with_suffix(".said"), LAZY=LAZY)
        came = until(there_yet, lambda: processes[0].poll() is None)
        time.sleep(chance.random() * 0.1)
        asked = time.monotonic()
        if came and processes[0].poll() is None:
            processes[number % 2].send_signal(sig)
            if twice:
                time.sleep(chance.random() * 0.05)
                processes[number % 2].send_signal(chance.choice((signal.SIGTERM, signal.SIGINT)))
        codes, said = ended(processes)
        seconds, wrong = time.monotonic() - asked, []
    if codes not in ([75, 75], [0, 0]):
        wrong.append(f"they left with {codes}: {said[-1500:]}")
    if codes == [75, 75]:
        wrong += steps_lost(out)
        again, told = ended(several(2, recipe, out, "--resume", said=out.with_suffix(".again"), LAZY="0"))
        wrong += [] if again == [0, 0] else [f"resumed, they left with {again}: {told[-1500:]}"]
    if not wrong:
        wrong = same_bytes(out, quiet["filling" if stage == "cache filling" else "off"])
    return {
        "stage": stage,
        "came": came,
        "codes": codes,
        "seconds": round(seconds, 2),
        "launched": launched,
        "twice": twice,
        "wrong": wrong,
    }


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def run(count: int | None = None) -> dict[str, Any]:
    """``count`` (100) signals: half of them in training, the rest in cache filling, evaluation and export."""
    count, rows = 100 if count is None else count, []
    order = ("training", "cache filling", "training", "evaluation", "training", "export")
    with lab() as there:
        quiet = {
            name: left_alone(2, recipes(there, there / "quiet-cache", stage, f"{name}.yaml"), there / f"quiet-{name}")
            for name, stage in (("off", "training"), ("filling", "cache filling"))
        }
        ways = list(product(order, (signal.SIGTERM, signal.SIGINT)))
        for number in range(count):
            rows.append(trial(there, number, *ways[number % len(ways)], quiet))
    left = [r for r in rows if r["codes"] == [75, 75]]
    details = {
        "left with 75": dict(Counter(r["stage"] for r in left)),
        "had nothing left to do, 0": dict(Counter(r["stage"] for r in rows if r["codes"] == [0, 0])),
        "to torchrun": sum(r["launched"] for r in rows),
        "twice": sum(r["twice"] for r in rows),
        "seconds until both had left, median": sorted(r["seconds"] for r in left)[len(left) // 2] if left else None,
        "failed": [r for r in rows if r["wrong"]],
    }
    return {"id": "R6-ranks", "promise": PROMISE, "tried": count, "held": sum(not r["wrong"] for r in rows), "details": details}
