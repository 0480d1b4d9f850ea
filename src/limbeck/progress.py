"""What a person sees while it runs: a live line on a terminal, plain lines when piped. Everything goes to standard error."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from limbeck.monitor import MetricsPort, Monitor, shown

__all__ = ["Progress", "duration", "peak_rss_bytes", "resident_bytes"]

PLAIN_SECONDS = 15.0


class Progress:
    """mode: ``auto`` (live on a terminal, plain otherwise), ``plain``, ``none``. metrics_port: where steps are told as Prometheus text too (see
    :class:`limbeck.monitor.MetricsPort`)."""

    def __init__(self, mode: str = "auto", metrics_port: str | None = None) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = mode == "none"
        self._live = (
            Live(console=self.console, refresh_per_second=4, transient=True) if mode == "auto" and self.console.is_terminal else None
        )
        self._last_plain = 0.0
        self._monitor = Monitor()
        self._port = None if metrics_port is None else MetricsPort(metrics_port)
        if self._port is not None:
            self.say(f"Metrics: {self._port.address}")

    def machine(self) -> dict[str, float]:
        """How busy the machine is, for the log."""
        return self._monitor.now()

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
        if self._port is not None:
            self._port.close()

    def say(self, text: str) -> None:
        """One sentence, kept."""
        if not self.quiet:
            self.console.print(escape(text))

    def step(
        self, role: str, *, epoch: int, epochs: int, step: int, steps: int, items_per_second: float, values: dict[str, float], left: float
    ) -> None:
        """One training step that was logged: rate, loss and its terms, time left, memory, and how busy the machine is."""
        now = time.monotonic()
        if self._port is not None:
            self._port.step(
                role, epoch=epoch, step=step, steps=steps, items_per_second=items_per_second, values=values, machine=self.machine()
            )
        if self.quiet or (self._live is None and now - self._last_plain < PLAIN_SECONDS):
            return
        terms = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        line = (
            f"{role:8}  epoch {epoch + 1}/{epochs}  step {step}/{steps}  {terms}  {items_per_second:,.0f} items/s  "
            f"{duration(left)} left  {resident_bytes() / 2**20:,.0f} MiB"
        )
        busy = shown(self.machine())
        line = f"{line}  ({busy})" if busy else line
        if self._live is not None:
            self._live.update(Text(line))
        else:
            self._last_plain = now
            self.say(line)

    def asked(self, who: str, done: int, rows: int, rate: float) -> None:
        """How far a teacher's pass is."""
        now = time.monotonic()
        if self.quiet or (self._live is None and now - self._last_plain < PLAIN_SECONDS):
            return
        left = (rows - done) / rate if rate else 0.0
        line = f"asking {who}  {done:,}/{rows:,}  {rate:,.0f} items/s  {duration(left)} left  {resident_bytes() / 2**20:,.0f} MiB"
        if self._live is not None:
            self._live.update(Text(line))
        else:
            self._last_plain = now
            self.say(line)

    def epoch(self, role: str, *, epoch: int, epochs: int, valid: dict[str, float] | None, seconds: float) -> None:
        shown = "" if valid is None else "  validation " + "  ".join(f"{k} {v:.4f}" for k, v in valid.items())
        self.say(f"{role:8}  epoch {epoch + 1}/{epochs} done{shown}  {duration(seconds)}")


def duration(seconds: float) -> str:
    """Hours, minutes, seconds: 1:02:03, or 2:03."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02d}"


def peak_rss_bytes() -> int:
    """The largest resident size of this process so far; where the system tells no better, that of the process that started it counts too."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii", errors="replace") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith("VmHWM:"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """The resident size now (where the system tells it), else the peak."""
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_rss_bytes()


def memory_bytes(device: Any) -> int:
    """What a log line calls memory: the CUDA allocator's peak on a GPU, the resident size on a CPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return resident_bytes()
