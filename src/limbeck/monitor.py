"""How busy the machine is while a run trains: processors, memory, and NVIDIA devices; and the same as Prometheus text at a port."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck._machine import memory
from limbeck.errors import Problem, UsageError, missing_extra

__all__ = ["MetricsPort", "Monitor", "shown"]

SECONDS = 5.0  # between two looks: a look at a GPU takes a millisecond


class Monitor:
    """``now()``: what was seen at the last look, which is at most five seconds old.

    ``cpu_percent``: of all processors of the machine, since the look before (absent at the first); ``ram_bytes``, ``ram_total_bytes``: in use and in
    all, a container's limit where it has one; ``gpuN_percent``, ``gpuN_bytes``, ``gpuN_total_bytes``, ``gpuN_celsius``, ``gpuN_watts`` for each
    CUDA device of this process, where nvidia-ml-py is installed. What the system does not say is absent.
    """

    def __init__(self, every: float = SECONDS, proc: Path = Path("/proc")) -> None:
        self._every, self._proc = every, proc
        self._looked, self._found = -float("inf"), dict[str, float]()
        self._busy: tuple[float, float] | None = None
        self._devices: list[Any] | None = None

    def now(self) -> dict[str, float]:
        clock = time.monotonic()
        if clock - self._looked >= self._every:
            self._looked = clock
            self._found = {**self._processors(), **_memory(), **self._gpus()}
        return self._found

    def _processors(self) -> dict[str, float]:
        try:
            fields = [float(n) for n in (self._proc / "stat").read_text().partition("\n")[0].split()[1:9]]
        except (OSError, ValueError):
            return {}
        total, idle = sum(fields), fields[3] + fields[4]
        before, self._busy = self._busy, (total, total - idle)
        if before is None or total <= before[0]:
            return {}
        return {"cpu_percent": round(100 * (self._busy[1] - before[1]) / (total - before[0]), 1)}

    def _gpus(self) -> dict[str, float]:
        if self._devices is None:
            self._devices = _devices()
        found: dict[str, float] = {}
        for number, handle in enumerate(self._devices):
            import pynvml

            # each of these may be unknown to a device (a slice of one, an old one), and the others not
            with contextlib.suppress(pynvml.NVMLError):
                found[f"gpu{number}_percent"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            with contextlib.suppress(pynvml.NVMLError):
                about = pynvml.nvmlDeviceGetMemoryInfo(handle)
                found |= {f"gpu{number}_bytes": about.used, f"gpu{number}_total_bytes": about.total}
            with contextlib.suppress(pynvml.NVMLError):
                found[f"gpu{number}_celsius"] = float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
            with contextlib.suppress(pynvml.NVMLError):
                found[f"gpu{number}_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
        return found


def _memory() -> dict[str, float]:
    found = memory()
    return {} if found is None else {"ram_bytes": found.total - found.left, "ram_total_bytes": found.total}


def _devices() -> list[Any]:
    """A handle for each CUDA device of this process, in its order; none where the library, the driver or the devices are missing."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    try:
        import pynvml

        pynvml.nvmlInit()
        # the library counts all devices of the machine, and this process may see others, or in another order
        return [
            pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(i).uuid}") for i in range(torch.cuda.device_count())
        ]
    except Exception:  # no library, no driver, a slice of a device: a run goes on without being watched
        return []


def shown(found: Mapping[str, float]) -> str:
    """In a few words, for a line on the terminal.

    >>> shown({"cpu_percent": 97.4, "ram_bytes": 3 << 30, "ram_total_bytes": 8 << 30, "gpu0_percent": 93.0, "gpu0_celsius": 61.0})
    'CPU 97 %, RAM 3.0/8.0 GiB, GPU 0 93 % 61 °C'
    """
    parts = []
    if "cpu_percent" in found:
        parts.append(f"CPU {found['cpu_percent']:.0f} %")
    if "ram_bytes" in found:
        parts.append(f"RAM {found['ram_bytes'] / 2**30:.1f}/{found['ram_total_bytes'] / 2**30:.1f} GiB")
    for number in sorted({int(name[3:].partition("_")[0]) for name in found if name.startswith("gpu")}):
        said = [f"GPU {number}"]
        for name, unit, divisor in (("percent", "%", 1), ("bytes", "GiB", 2**30), ("celsius", "°C", 1), ("watts", "W", 1)):
            value = found.get(f"gpu{number}_{name}")
            if value is not None:
                said.append(f"{value / divisor:.1f} {unit}" if divisor > 1 else f"{value:.0f} {unit}")
        parts.append(" ".join(said))
    return ", ".join(parts)


class MetricsPort:
    """Prometheus text at ``http://HOST:PORT/metrics`` while a run trains. where: ``PORT`` (this machine alone) or ``HOST:PORT``.

    Raises: UsageError where the address makes no sense, is taken, or prometheus-client is not installed.
    """

    def __init__(self, where: str) -> None:
        host, port = _address(where)
        try:
            from prometheus_client import CollectorRegistry, Gauge, start_http_server
        except ImportError:
            raise missing_extra("prometheus_client", "track", "--metrics-port") from None
        registry = CollectorRegistry()
        self._step = Gauge("limbeck_step", "Optimiser steps done.", ["role"], registry=registry)
        self._steps = Gauge("limbeck_steps", "Optimiser steps in all.", ["role"], registry=registry)
        self._epoch = Gauge("limbeck_epoch", "The epoch, from 0.", ["role"], registry=registry)
        self._rate = Gauge("limbeck_items_per_second", "Samples trained on a second.", ["role"], registry=registry)
        self._loss = Gauge(
            "limbeck_loss", "The loss of the last logged step, and its unweighted terms.", ["role", "term"], registry=registry
        )
        self._when = Gauge("limbeck_last_step_timestamp_seconds", "When the last step was logged (Unix time).", registry=registry)
        self._machine = Gauge("limbeck_machine", "Processors, memory and GPUs, by what is measured.", ["what"], registry=registry)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as e:
            reason = (e.strerror or str(e)).lower()
            raise UsageError(Problem("--metrics-port", f"nothing can listen at {host}:{port} ({reason}).", "Name another port.")) from None
        self.address = f"http://{host}:{self._server.server_port}/metrics"

    def step(
        self,
        role: str,
        *,
        epoch: int,
        step: int,
        steps: int,
        items_per_second: float,
        values: Mapping[str, float],
        machine: Mapping[str, float],
    ) -> None:
        """One logged step."""
        self._step.labels(role).set(step)
        self._steps.labels(role).set(steps)
        self._epoch.labels(role).set(epoch)
        self._rate.labels(role).set(items_per_second)
        for term, value in values.items():
            self._loss.labels(role, term).set(value)
        self._when.set(time.time())
        for what, number in machine.items():
            self._machine.labels(what).set(number)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _address(where: str) -> tuple[str, int]:
    host, colon, port = where.rpartition(":")
    if not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65535 or (colon and not host):
        raise UsageError(
            Problem("--metrics-port", f"got '{where}', expected a port from 0 to 65535, or HOST:PORT.", "Example: 0.0.0.0:9100.")
        )
    return host or "127.0.0.1", int(port)
