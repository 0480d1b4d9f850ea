"""What the operating system lets this process have: processors, memory, shared memory, files, disk. Containers included."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SHARED_ENOUGH", "Memory", "cpus_allowed", "in_container", "memory", "processors", "shared_memory"]

SHARED_ENOUGH = 512 << 20
"""Bytes of shared memory below which loader processes are not started by themselves."""

_UNLIMITED = 1 << 60  # what control groups write where there is no limit is near 2**63


@dataclass(frozen=True)
class Memory:
    """In bytes. total: of the machine, or of the control group where that allows less; left: what may still be taken; limited: whether a control
    group says so."""

    total: int
    left: int
    limited: bool


def cpus_allowed(root: Path = Path("/")) -> float:
    """How many processors this process may keep busy: those that it may run on, or the share of time that its control group has."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in _groups(root, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")  # version 2: "max 100000", or microseconds of each period
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            count = min(count, int(quota) / int(period))
    return count


def processors() -> int:
    """The same as a whole number, for how many threads or processes to start."""
    return max(1, int(cpus_allowed()))


def memory(root: Path = Path("/")) -> Memory | None:
    """None where the system does not say."""
    lines = dict(line.split(":", 1) for line in _text(root / "proc/meminfo").splitlines() if ":" in line)
    try:
        total, left = (1024 * int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    except (KeyError, ValueError, IndexError):
        return None
    limited = False
    for folder in _groups(root, "memory"):
        for most, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, taken = _text(folder / most), _text(folder / used)
            if limit.isdigit() and taken.isdigit() and int(limit) < min(_UNLIMITED, total + 1):
                # what the group has read from files is given back when it is needed
                given_back = next((int(w[1]) for w in map(str.split, _text(folder / "memory.stat").splitlines()) if w[:1] == [cached]), 0)
                total, left, limited = int(limit), max(0, min(left, int(limit) - int(taken) + given_back)), True
    return Memory(total, left, limited)


def shared_memory(folder: Path = Path("/dev/shm")) -> tuple[int, int] | None:
    """``(size, free)`` in bytes of what loader processes hand batches over in; None where there is none."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail


def in_container(root: Path = Path("/")) -> bool:
    """Whether this looks like a container: Docker, Podman or Kubernetes."""
    marks = (root / ".dockerenv", root / "run/.containerenv")
    return any(mark.exists() for mark in marks) or "KUBERNETES_SERVICE_HOST" in os.environ


def _groups(root: Path, controller: str) -> list[Path]:
    """The folders of the control groups that this process is in, the root's first: version 2, or version 1 of a controller."""
    mounts = root / "sys/fs/cgroup"
    found: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        base = mounts if not controllers else mounts / controller if controller in controllers.split(",") else None
        if base is None:
            continue
        within = Path(path.lstrip("/"))
        steps = [base / parent for parent in reversed([within, *within.parents])]
        found += [step for step in steps if step.is_dir() and step not in found]
    return found or [folder for folder in (mounts, mounts / controller) if folder.is_dir()]


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
