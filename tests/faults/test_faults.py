"""The short version of each row of docs/reliability.md; ``make faults`` runs the long ones."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import r01_kill, r02_order, r04_crash, r05_corruption, r06_signals, r13_old_files, run
from faults.harness import Case, Lab, lab
from running import lines, make_folder, recipe, start, wait_for

SMALL = Case(cache="filling", export=False, slow=0.01)


@pytest.fixture(scope="module")
def there() -> Iterator[Lab]:
    with lab() as made:
        yield made


def held(found: dict[str, Any]) -> None:
    assert found["tried"] > 0
    assert found["details"]["failed"] == []
    assert found["held"] == found["tried"]


def test_r1_killed_at_any_instant() -> None:
    held(r01_kill.run(4, chosen=[SMALL]))


def test_r2_the_same_ids_wherever_it_was_stopped() -> None:
    found = r02_order.run(1, samples=100_000)
    held(found)
    assert found["details"]["at 99 %"]["rows"] == 8  # and nothing of what was read before


def test_r4_a_crash_after_every_event_of_a_checkpoint() -> None:
    found = r04_crash.run(runs=False)
    held(found)
    kinds = found["details"]["by kind"]
    assert min(kinds[kind] for kind in ("write", "torn write", "fsync", "rename", "unlink")) > 2


def test_r4_a_crash_while_a_run_puts_its_checkpoints_away(there: Lab) -> None:
    """After the report, which says that the run is finished."""
    events = r04_crash.events_of_a_run(there, SMALL)
    last = [event["n"] for event in events if event["kind"] == "unlink"][-2]
    assert r04_crash.of_a_run(there, SMALL, last, "after") == (r04_crash.ENDED, [])


def test_r4_a_crash_between_the_last_answers_and_the_end_of_their_filling(there: Lab) -> None:
    """Nothing is missing then, so nothing is filled when the run goes on: what the dead process left is put away all the same."""
    events = r04_crash.events_of_a_run(there, SMALL)
    manifests = [event["n"] for event in events if event["kind"] == "rename" and event["path"].endswith("/manifest.json")]
    figures = [event["n"] for event in events if event["kind"] == "write" and "/.figures.json" in event["path"]]
    for nth in (manifests[-1], figures[-1]):
        assert r04_crash.of_a_run(there, SMALL, nth, "after") == (r04_crash.ENDED, [])


def test_r5_a_run_whose_newest_checkpoint_is_spoiled() -> None:
    """Every byte and length of one: ``tests/unit/test_checkpoint.py``."""
    held(r05_corruption.run(1, masks=()))


def test_r6_asked_to_leave_in_every_stage() -> None:
    held(r06_signals.run(4, chosen=[SMALL]))


@pytest.mark.parametrize("case", r13_old_files.CASES, ids=lambda case: case.__name__)
def test_r13_files_of_other_versions(case: Callable[[Path], None], tmp_path: Path) -> None:
    case(r13_old_files.lay_out(tmp_path.resolve()))


def test_nothing_big_among_the_golden_files() -> None:
    sizes = [path.stat().st_size for path in r13_old_files.GOLDEN.rglob("*") if path.is_file()]
    assert max(sizes) < 100_000
    assert sum(sizes) < 300_000


def test_a_harness_that_sees_nothing_would_be_no_evidence(there: Lab) -> None:
    """One bit of one weight, one step of the log: each is found."""
    run = there.begin(SMALL)
    assert run.go().wait() == 0, run.said()
    assert run.judge() == []
    path = run.out / "student" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert len(run.judge()) == 1
    with open(run.out / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"role": "baseline", "step": 9, "loss": 1.0}\n')
    assert len(run.judge()) == 2


def test_the_table_is_that_of_the_results() -> None:
    text = run.DOCUMENT.read_text(encoding="utf-8")
    assert run.table() in text, "python tests/faults/run.py --table"


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    direct = [int(n) for n in found.read_text().split()] if found.exists() else []
    return direct + [inner for child in direct for inner in _children(child)]


@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task").is_dir(), reason="no /proc")
def test_the_workers_of_a_killed_run_end(tmp_path: Path) -> None:
    """A process of its own, as a person starts it: its workers are children of a fork server, which waits for them."""
    folder = make_folder(tmp_path)
    process = start("distill", recipe(folder, train={"epochs": 400, "workers": 2}), "--out", tmp_path / "run")
    assert isinstance(process, subprocess.Popen)
    wait_for(process, lambda: len(lines(tmp_path / "run")) > 1)
    children = _children(process.pid)
    assert len(children) >= 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < end:
        time.sleep(0.05)
    left = [pid for pid in children if Path(f"/proc/{pid}").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_the_results_are_of_all_rows_that_there_are() -> None:
    assert {"R1", "R2", "R4", "R5", "R6", "R13"} <= set(run.modules())
    assert {path.stem for path in run.RESULTS.glob("R*.json")} <= set(run.modules())
