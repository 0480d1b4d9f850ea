"""R2: exact order. Stopped at every batch, a run reads the same ids in the same order; and resuming late in a long epoch costs what it costs
early."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from faults.harness import Case, Lab, lab, patch
from support import Big, Small, made, settings, toy_data

PROMISE = "stopped at every batch of 3 epochs: the same ids; resumed at 99 % of a million samples: the work of 1 %"
BATCHES = 9  # of 3 epochs, for each of two roles


def ids_of(path: Path) -> list[tuple[int, list[int]]]:
    return [(row["step"], row["ids"]) for row in map(json.loads, path.read_text().splitlines())]


def stopped_at(there: Lab, case: Case, number: int, expected: list[tuple[int, list[int]]]) -> list[str]:
    """Killed when the loop has taken its ``number``-th batch, and resumed: what is wrong with the ids."""
    run, taken = there.begin(case), there.folder / f"taken-{number}"
    patches = [patch("note_ids", str(taken)), patch("kill_at_batch", number)]
    if (code := run.go(patches=patches).wait()) != -signal.SIGKILL:
        return [f"it left with {code}"]
    before = ids_of(taken) if taken.exists() else []
    run.stopped()
    taken.unlink(missing_ok=True)
    code = run.go(resume=True, patches=patches[:1]).wait()
    after = ids_of(taken) if taken.exists() else []
    wrong = run.judge() if code == 0 else [f"resumed, it left with {code}: {run.said()[-2000:]}"]
    if before != expected[: len(before)]:
        wrong.append("other ids before the stop")
    if after != expected[len(expected) - len(after) :] or len(before) + len(after) < len(expected):
        wrong.append("other ids after the stop")
    run.clear()
    return wrong


def work_to_first_batch(count: int, part: float) -> dict[str, int]:
    """What it takes to the first batch when a run goes on at ``part`` of an epoch of ``count`` samples: Python and C calls, and rows read."""
    from limbeck.data import BatchBuilder, Plan, stream
    from limbeck.models import wrap_module

    data = _data(count)
    models = [wrap_module(made(kind, role), role=role, data=data) for kind, role in ((Small, "student"), (Big, "teacher"))]
    builder = BatchBuilder(
        data.train,
        student=models[0].preprocessing,
        teacher=models[1].preprocessing,
        augment=None,
        data_seed=0,
        num_classes=len(data.classes),
        dtype=torch.float64,
    )
    read = {"rows": 0, "calls": 0}

    def build(request: Any) -> Any:
        read["rows"] += len(request.rows)
        return builder(request)

    def count_calls(frame: Any, event: str, argument: Any) -> None:
        read["calls"] += event in ("call", "c_call")

    train = settings(epochs=1, batch_size=8)
    plan = Plan(data.train, seed=3, data_seed=0, epochs=1, batch_size=train.batch_size, views=None, lengths=None, drop_single=False)
    start = int(part * plan.total_steps)
    sys.setprofile(count_calls)
    try:
        batches = stream(build, (plan.request(step) for step in range(start, plan.total_steps)), workers=0)
        request, _ = next(batches)
    finally:
        sys.setprofile(None)
    batches.close()  # type: ignore[attr-defined]
    assert request.step == start
    return read


_KEPT: dict[int, Any] = {}


def _data(count: int) -> Any:
    if count not in _KEPT:
        _KEPT[count] = toy_data(count)
    return _KEPT[count]


def run(count: int | None = None, samples: int = 1_000_000, case: Case | None = None) -> dict[str, Any]:
    """Every batch (``count`` of them), and the million."""
    failed: list[Any] = []
    case = case or Case(workers=2, accumulate=4, export=False, slow=0)
    numbers = range(1, 2 * BATCHES + 1) if count is None else np.linspace(1, 2 * BATCHES, count).astype(int).tolist()
    with lab() as there:
        quiet, taken = there.begin(case), there.folder / "taken"
        assert quiet.go(patches=[patch("note_ids", str(taken))]).wait() == 0, quiet.said()
        expected = ids_of(taken)
        assert len(expected) == 2 * BATCHES
        for number in numbers:
            wrong = stopped_at(there, case, int(number), expected)
            print(f"R2: stopped at batch {number}: {wrong or 'held'}", file=sys.stderr, flush=True)
            if wrong:
                failed.append({"batch": int(number), "wrong": wrong})
    work_to_first_batch(samples, 0.5)  # what is made once is made
    early, late = work_to_first_batch(samples, 0.01), work_to_first_batch(samples, 0.99)
    if late["calls"] > early["calls"] or late["rows"] > early["rows"]:
        failed.append({"early": early, "late": late})
    details = {
        "batches stopped at": len(numbers),
        "samples": samples,
        "to the first batch at 1 %": early,
        "at 99 %": late,
        "failed": failed,
    }
    tried = len(numbers) + 1
    return {"id": "R2", "promise": PROMISE, "seed": None, "tried": tried, "held": tried - len(failed), "details": details}
