"""R4: atomic commit. The process ends right after its n-th write, fsync, rename, mkdir or unlink, or in the middle of a write, for every n."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from faults.harness import Case, Lab, Trial, lab, patch, server
from running import left_over, read

PROMISE = "a crash after any write, fsync, rename or unlink: what is committed loads, nothing half-made has a final name, left-overs go"
ENDED = 99


def incomplete(out: Path, cache: Path | None = None) -> list[str]:
    """Files and folders that have a final name and are not complete."""
    from limbeck.cache import CacheDamaged, Reader
    from limbeck.run import file_sha256, is_left_over

    wrong = []
    for path in sorted(out.rglob("*")):
        if any(is_left_over(Path(part)) for part in path.relative_to(out).parts):
            continue
        if path.suffix == ".json" and path.is_file():
            try:
                read(path)
            except ValueError:
                wrong.append(f"{path.relative_to(out)} is no JSON")
        if path.name.startswith("step-"):
            try:
                files = read(path / "manifest.json")["files"]
                wrong += [f"{path.relative_to(out)}: {name}" for name, sha in files.items() if file_sha256(path / name) != sha]
            except (OSError, ValueError) as e:
                wrong.append(f"{path.relative_to(out)} is half a checkpoint: {e}")
        if path.name in ("student", "baseline") and path.parent == out:
            about = read(path / "model.json") if (path / "model.json").is_file() else {"files": {"model.json": None}}
            wrong += [f"{path.name}: {n}" for n, sha in about["files"].items() if not (path / n).is_file() or file_sha256(path / n) != sha]
        if path.name == "model.onnx.json" and path.is_file():
            record, file = read(path), path.with_name("model.onnx")
            if not file.is_file() or file_sha256(file) != record["sha256"]:
                wrong.append("export/model.onnx is not what its record says")
    if cache is not None:
        for path in cache.glob("*/manifest.json"):
            try:
                Reader(path.parent)
            except CacheDamaged as e:
                wrong.append(str(e))
    return wrong


def of_checkpoints(folder: Path, nth: int | None, how: str) -> tuple[int, list[str], list[dict[str, Any]]]:
    """Four checkpoints are saved one after the other, and the process ends at its ``nth`` event. Exit code, what is wrong, events."""
    from limbeck import checkpoint

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    events, committed = folder.with_name("events"), folder.with_name("committed")
    for file in (events, committed):
        file.unlink(missing_ok=True)
    order = {
        "arguments": [],
        "said": str(folder.with_name("said")),
        "environment": {},
        "patches": [patch("count_events", str(folder), str(events), nth, how), patch("save_checkpoints", str(folder), str(committed))],
    }
    code = int(server().ask({"wait": server().ask(order)["pid"]})["code"])
    wrong = incomplete(folder)
    newest = max((json.loads(line)["step"] for line in committed.read_text().splitlines()), default=0) if committed.exists() else 0
    found = checkpoint.load_newest(folder)
    if newest and (found is None or found[0] < newest):
        wrong.append(f"step {newest} was committed, and {None if found is None else found[0]} is loaded")
    if found is not None and found[1]["a"].tolist() != [float(found[0])] * 300:
        wrong.append("another state is loaded")
    if left_over(folder):
        wrong.append(f"left over: {left_over(folder)}")
    return code, wrong, [json.loads(line) for line in events.read_text().splitlines()]


def of_a_run(there: Lab, case: Case, nth: int, how: str) -> tuple[int, list[str]]:
    """A run that ends at its ``nth`` event, is resumed, and judged."""
    run = there.begin(case)
    code = run.go(patches=[patch("count_events", str(run.folder), None, nth, how)]).wait()
    wrong = incomplete(run.out, run.cache) if run.out.exists() else []
    run.stopped()
    if code == ENDED:
        again = run.go(resume=True).wait()
        wrong += run.judge() if again == 0 else [f"resumed, it left with {again}: {run.said()[-2000:]}"]
    run.clear()
    return code, wrong


def events_of_a_run(there: Lab, case: Case) -> list[dict[str, Any]]:
    run: Trial = there.begin(case)
    path = there.folder / "events"
    assert run.go(patches=[patch("count_events", str(run.folder), str(path))]).wait() == 0, run.said()
    run.clear()
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(count: int | None = None, runs: bool = True) -> dict[str, Any]:
    """Every event of four checkpoints; and (runs) every event of a whole run, or ``count`` of them, evenly spread."""
    kinds: Counter[str] = Counter()
    failed: list[dict[str, Any]] = []

    def note(where: str, event: dict[str, Any], how: str, code: int, wrong: list[str]) -> None:
        kinds[f"{'torn ' if how == 'torn' else ''}{event['kind']}"] += 1
        if code != ENDED:
            wrong = [*wrong, f"it left with {code}"]
        if wrong:
            failed.append({"where": where, "event": event, "how": how, "wrong": wrong})

    details: dict[str, Any] = {}
    with lab() as there:
        folder = there.folder / "checkpoints"
        code, wrong, events = of_checkpoints(folder, None, "after")
        assert code == 0, (code, there.folder)
        assert not wrong, wrong
        details["events of four checkpoints"] = len(events)
        for event in events:
            for how in ("after", "torn") if event["kind"] == "write" else ("after",):
                code, wrong, _ = of_checkpoints(folder, event["n"], how)
                note("checkpoints", event, how, code, wrong)
        if runs:
            case = Case(cache="filling", epochs=2, slow=0)
            events = events_of_a_run(there, case)
            details["events of a run"] = len(events)
            chosen = events if count is None else events[:: max(1, len(events) // count)][:count]
            for event in chosen:
                for how in ("after", "torn") if event["kind"] == "write" else ("after",):
                    code, wrong = of_a_run(there, case, event["n"], how)
                    note("run", event, how, code, wrong)
                    print(f"R4: {event} of {len(events)}, {how}: {wrong or 'held'}", file=sys.stderr, flush=True)
    tried = sum(kinds.values())
    details |= {"by kind": dict(kinds), "failed": failed}
    return {"id": "R4", "promise": PROMISE, "seed": None, "tried": tried, "held": tried - len(failed), "details": details}
