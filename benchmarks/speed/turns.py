"""Programs that take turns: the standard library alone, because it is imported in the peers' environment too.

Every side of a comparison is a process of its own that trains as it would alone, and calls :meth:`Turn.step` after each optimiser step. After
so many steps it says how long they took and waits until it is its turn again. So the sides alternate on one machine (A B B A ...), only one
of them works at any time, and whatever a step needs (its batch, its logging) is inside its time. Imports, models and data that a side loads
before its first step are not. A side that prepares batches ahead may have a few (three for Limbeck, two for each DataLoader worker) ready
when its turn begins, and gets as many ready for the next one: over a turn of many steps it evens out.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Turn:
    """A side's end. ``steps``: how many optimiser steps a turn has. Of several ranks the first one takes turns; the others wait for it in their
    next common step."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done, self._began = steps, 0, 0.0
        self._speaks = "TURN_FROM" in os.environ
        if self._speaks:
            self._from = os.fdopen(int(os.environ["TURN_FROM"]))
            self._to = os.fdopen(int(os.environ["TURN_TO"]), "w")

    def begin(self) -> None:
        """Everything is loaded: wait for the first turn."""
        self._say({"ready": True})
        self._wait()

    @property
    def last(self) -> bool:
        """Whether the next step ends a turn."""
        return (self._done + 1) % self._steps == 0

    def step(self) -> None:
        """A step is done. At the end of a turn: say so, and wait."""
        self._done += 1
        if self._done % self._steps == 0:
            self._say({"seconds": time.perf_counter() - self._began})
            self._wait()

    def end(self, **facts: Any) -> None:
        """The training is over; ``facts`` go into the results."""
        self._say({"end": {**facts, "steps": self._done, "peak_bytes": peak_bytes()}})

    def _say(self, message: dict[str, Any]) -> None:
        if self._speaks:
            print(json.dumps(message), file=self._to, flush=True)

    def _wait(self) -> None:
        if self._speaks and not self._from.readline():  # nobody listens any more
            sys.exit(1)
        self._began = time.perf_counter()


class Side:
    """A side, seen from where turns are given."""

    def __init__(self, name: str, script: str, config: dict[str, Any], python: str = sys.executable, threads: int | None = None) -> None:
        self.name, self.key = name, config["name"]
        to_side, from_side = os.pipe(), os.pipe()
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "TURN_FROM": str(to_side[0]), "TURN_TO": str(from_side[1]), "PYTHONPATH": os.pathsep.join(path)}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._log = Path(config["out"]) / f"{config['name']}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = [python, str(ROOT / "speed/sides" / script), json.dumps(config)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(to_side[0], from_side[1]), env=environment
            )
        os.close(to_side[0])
        os.close(from_side[1])
        self._to, self._from = os.fdopen(to_side[1], "w"), os.fdopen(from_side[0])
        began = time.perf_counter()
        self._hear("ready")
        self.setup_seconds = time.perf_counter() - began

    def turn(self) -> float:
        """One turn; the seconds that it took there."""
        self._go()
        return float(self._hear("seconds"))

    def end(self) -> dict[str, Any]:
        """After its last turn: what the side says of itself."""
        self._go()
        facts = dict(self._hear("end"))
        self.close()
        return {"setup_seconds": self.setup_seconds, **facts}

    def close(self) -> None:
        """Close the pipes, and see the process end."""
        for pipe in (self._to, self._from):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _go(self) -> None:
        print("go", file=self._to, flush=True)

    def _hear(self, what: str) -> Any:
        line = self._from.readline()
        message = json.loads(line) if line else {}
        if what not in message:
            self.close()
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{self.name}: expected {what!r}, got {line!r}. The end of {self._log.name}:\n{tail}")
        return message[what]


def timed(sides: Sequence[Side], pairs: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each side's turns, the first ``warm`` left out. Two sides: A B B A ...; several begin one further each time, and run backwards
    every other round, so that each comes in each place."""
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(warm + pairs):
        at = number % len(sides)
        turned = [*sides[at:], *sides[:at]]
        for side in turned if len(sides) < 3 or number // len(sides) % 2 == 0 else reversed(turned):
            taken = side.turn()
            if number >= warm:
                seconds[side.name].append(taken)
    return seconds


def alternate(sides: Sequence[Side], pairs: int, warm: int = 1) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of each side's turns (:func:`timed`), and what each side said at its end."""
    try:
        return timed(sides, pairs, warm), {side.name: side.end() for side in sides}
    finally:
        for side in sides:
            side.close()


def peak_bytes() -> int | None:
    """The highest resident size of this process so far (not of one that it was forked from, which getrusage would count)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)
