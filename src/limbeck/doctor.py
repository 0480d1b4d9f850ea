"""limbeck doctor: what this machine can do, what is wrong with it, and how to mend that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from limbeck._doctor_facts import Cuda, Device, Facts, gather
from limbeck._machine import SHARED_ENOUGH

__all__ = ["Finding", "examine", "has_kernels", "judge"]

Level = Literal["ok", "warn", "fail"]

_GIB = 1 << 30
# The oldest driver for each CUDA release line (NVIDIA, "CUDA Toolkit and Corresponding Driver Versions", minor version compatibility, Linux).
_DRIVERS = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
# The oldest compute capability that an architecture family came with, and the first CUDA runtime that has kernels for it.
_KERNELS_SINCE = {
    (7, 0): "9.0",
    (7, 5): "10.0",
    (8, 0): "11.0",
    (8, 6): "11.1",
    (8, 9): "11.8",
    (9, 0): "11.8",
    (10, 0): "12.8",
    (12, 0): "12.8",
}
_OPEN_FILES, _PROCESSES = 4096, 1024


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. level: ok; warn: a run works, and worse than it could; fail: something that was asked of this machine does not
    work. mend: what to do, empty where it is ok."""

    name: str
    level: Level
    found: str
    mend: str = ""


def examine() -> dict[str, Any]:
    """Look at this machine: ``{"findings": [{name, level, found, mend}], "level": the worst, "counts": {ok, warn, fail}}``."""
    findings = judge(gather())
    counts = {level: sum(f.level == level for f in findings) for level in ("ok", "warn", "fail")}
    worst = "fail" if counts["fail"] else "warn" if counts["warn"] else "ok"
    return {"level": worst, "counts": counts, "findings": [vars(f) for f in findings]}


def judge(facts: Facts) -> list[Finding]:
    """Every finding about these facts, in a fixed order. Tokens are named and never shown."""
    looks: tuple[Callable[[Facts], list[Finding]], ...] = (
        *(_python, _torch, _torchvision, _cuda, _devices, _together, _processors, _memory, _shared_memory),
        *(_limits, _user, _folders, _versions, _network),
    )
    return [finding for look in looks for finding in look(facts)]


def has_kernels(capability: tuple[int, int], archs: tuple[str, ...]) -> bool:
    """Whether a build of torch with these architectures runs on a device of this compute capability: machine code of the same major version and no
    higher minor one, or intermediate code (compute_XY) of no higher version, which the driver translates.

    >>> has_kernels((8, 9), ("sm_80", "sm_86")), has_kernels((12, 0), ("sm_80", "sm_90")), has_kernels((12, 0), ("sm_90", "compute_90"))
    (True, False, True)
    """
    for arch in archs:
        kind, _, digits = arch.partition("_")
        number = digits.rstrip("af")
        if not number.isdigit():
            continue
        of = (int(number[:-1]), int(number[-1]))
        if digits != number:  # sm_90a: code for this very one alone
            if kind == "sm" and of == capability:
                return True
        elif (kind == "sm" and of[0] == capability[0] and of[1] <= capability[1]) or (kind == "compute" and of <= capability):
            return True
    return False


def _python(facts: Facts) -> list[Finding]:
    return [Finding("python", "ok", facts.python)]


def _torch(facts: Facts) -> list[Finding]:
    version = facts.versions["torch"]
    of = f"for CUDA {facts.cuda.runtime}" if facts.cuda.runtime else "for the CPU alone"
    return [Finding("torch", "ok", f"{version}, built {of}")]


def _torchvision(facts: Facts) -> list[Finding]:
    vision, torch = facts.versions["torchvision"], facts.versions["torch"]
    if vision is None:
        return [Finding("torchvision", "ok", "not installed; image models of torchvision and timm need it")]
    mend = "Install both together: pip install torch torchvision (the same command, the same index)."
    wants = facts.vision_wants
    if wants is not None and torch is not None and _release(wants) != _release(torch):
        return [Finding("torchvision", "fail", f"{vision} was built for torch {wants}, and torch is {torch}", mend)]
    if facts.vision_error:
        return [Finding("torchvision", "fail", f"{vision} cannot be imported: {facts.vision_error}", mend)]
    return [Finding("torchvision", "ok", vision)]


def _cuda(facts: Facts) -> list[Finding]:
    cuda = facts.cuda
    if cuda.available:
        parts = [
            f"runtime {cuda.runtime}",
            f"driver {cuda.driver or 'unknown'}",
            f"cuDNN {_cudnn(cuda.cudnn)}",
            f"NCCL {cuda.nccl or 'none'}",
        ]
        return [Finding("cuda", "ok", ", ".join(parts))]
    if not cuda.on_bus and not cuda.nodes and cuda.driver is None:
        return [Finding("cuda", "ok", "no NVIDIA device on this machine; the CPU is used")]
    found, mend = _why_no_cuda(cuda)
    return [Finding("cuda", "fail", found, mend)]


def _why_no_cuda(cuda: Cuda) -> tuple[str, str]:
    """An NVIDIA device is there, and torch finds none."""
    if cuda.runtime is None:
        return (
            "there is an NVIDIA device, and this torch was built for the CPU alone",
            "Install a CUDA build of torch and torchvision (the default on PyPI for Linux; pytorch.org lists the indexes of the others).",
        )
    if cuda.visible is not None and cuda.visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {cuda.visible!r}, which hides every device", "Unset it, or name devices: CUDA_VISIBLE_DEVICES=0."
    if cuda.driver is None and not cuda.nodes:
        return (
            "the machine has an NVIDIA device, and neither its driver nor its device files are seen here",
            "In a container: install the NVIDIA Container Toolkit on the host and start with --gpus all (Kubernetes: ask for nvidia.com/gpu). "
            "On the host itself: install the driver.",
        )
    least = _DRIVERS.get(int(cuda.runtime.split(".")[0]))
    if cuda.driver is not None and least is not None and _numbers(cuda.driver) < least:
        wanted = ".".join(f"{n:02d}" if i else str(n) for i, n in enumerate(least))
        return (
            f"the driver {cuda.driver} is too old for CUDA {cuda.runtime}, for which this torch was built: it needs {wanted} or newer",
            "Update the driver on the host, or install a torch that was built for an older CUDA.",
        )
    if not cuda.nodes:
        return (
            f"the driver {cuda.driver} is loaded, and no /dev/nvidia* is seen here",
            "Start the container with --gpus all (Docker, with the NVIDIA Container Toolkit) or --device nvidia.com/gpu=all (Podman, with CDI).",
        )
    return (
        f"torch cannot start CUDA: {cuda.error or 'it gives no reason'}",
        "See what nvidia-smi says here; a restart after a driver update helps.",
    )


def _devices(facts: Facts) -> list[Finding]:
    return [_device(f"device cuda:{i - 1}" if i else "device cpu", device, facts.cuda) for i, device in enumerate(facts.devices)]


def _device(name: str, device: Device, cuda: Cuda) -> Finding:
    rates = ", ".join(f"{dtype} {_short(rate)}" for dtype, rate in device.rates.items())
    speed = f"; matrix products in GFLOP/s: {rates}; copies {_short(device.bandwidth / 1e9)} GB/s" if device.bandwidth else ""
    size = f", {device.memory / _GIB:.0f} GiB" if device.memory else ""
    if device.capability is None:
        slow = device.rates.get("bf16", 0.0) < device.rates.get("float32", 0.0)
        half = "; bf16 is slower than float32 here, and precision: auto will not choose it" if slow and device.rates else ""
        return Finding(name, "ok", f"{device.name}{size}{speed}{half}")
    major, minor = device.capability
    of = f"{device.name}{size}, compute capability {major}.{minor}"
    if not has_kernels(device.capability, cuda.archs):
        since = next((v for least, v in sorted(_KERNELS_SINCE.items(), reverse=True) if least <= device.capability), None)
        newer = device.capability > max((_capability(a) for a in cuda.archs if a.startswith("sm_")), default=(0, 0))
        mend = (
            f"Install a newer torch, built for CUDA {since} or later (for the newest devices: pip install --upgrade torch torchvision)."
            if newer
            else "This torch has dropped it: install an older one, built for an older CUDA."
        )
        return Finding(name, "fail", f"{of}: this torch has no kernels for it (it has {', '.join(cuda.archs)})", mend)
    if device.failed:
        return Finding(name, "fail", f"{of}: {device.failed}", "See in nvidia-smi whether other programs fill its memory.")
    can = "bf16 and fp16 tensor cores" if major >= 8 else "fp16 tensor cores, no bf16" if major == 7 else "no tensor cores: float32 is best"
    return Finding(name, "ok", f"{of}; {can}{speed}")


def _together(facts: Facts) -> list[Finding]:
    findings = []
    for backend, rate in facts.reduced.items():
        who = "two processes on the CPU" if backend == "gloo" else "all CUDA devices"
        if isinstance(rate, str):
            mend = "Without it torchrun cannot be used here; a run of one process can."
            if backend == "nccl":
                mend += " NCCL_DEBUG=INFO says more; in a container it needs shared memory (--shm-size=8g) or --ipc=host."
            findings.append(Finding(f"all-reduce {backend}", "fail", f"{who} cannot sum together: {rate}", mend))
        else:
            findings.append(Finding(f"all-reduce {backend}", "ok", f"{who}: {rate / 1e9:.2f} GB/s"))
    return findings


def _processors(facts: Facts) -> list[Finding]:
    allowed = f"{facts.cpus_allowed:g} of {facts.cpus}" if facts.cpus_allowed < facts.cpus else str(facts.cpus)
    found = f"{allowed} processors may be used; torch uses {facts.threads} threads"
    if facts.threads > max(1.0, facts.cpus_allowed) + 0.5:
        number = max(1, int(facts.cpus_allowed))
        return [Finding("processors", "warn", found, f"More threads than processors slow each other down: OMP_NUM_THREADS={number}.")]
    return [Finding("processors", "ok", found)]


def _memory(facts: Facts) -> list[Finding]:
    if facts.memory is None:
        return []
    whose = "the container's limit" if facts.memory.limited else "of the machine"
    found = f"{facts.memory.left / _GIB:.1f} GiB free of {facts.memory.total / _GIB:.1f} GiB ({whose})"
    if facts.memory.left < 2 * _GIB:
        return [
            Finding(
                "memory", "warn", found, "Below 2 GiB only small models train: end other programs, or raise the limit of the container."
            )
        ]
    return [Finding("memory", "ok", found)]


def _shared_memory(facts: Facts) -> list[Finding]:
    if facts.shared_memory is None:
        return []
    size, free = facts.shared_memory
    found = f"/dev/shm has {free / (1 << 20):,.0f} MiB free of {size / (1 << 20):,.0f} MiB"
    if free < SHARED_ENOUGH:
        mend = (
            "Too little for loader processes: data are read by a thread instead, which is slower for files. Docker: --shm-size=8g. Kubernetes: an "
            "emptyDir with medium: Memory at /dev/shm."
        )
        return [Finding("shared memory", "warn", found, mend)]
    return [Finding("shared memory", "ok", found)]


def _limits(facts: Facts) -> list[Finding]:
    findings = []
    for name, least, option in (("open files", _OPEN_FILES, "nofile"), ("processes", _PROCESSES, "nproc")):
        if name not in facts.limits:
            continue
        limit = facts.limits[name]
        if limit is not None and limit < least:
            mend = f"Loader processes and ranks may need more: ulimit, or --ulimit {option}={least}:{least} for Docker."
            findings.append(Finding(f"limit of {name}", "warn", f"{limit:,}", mend))
        else:
            findings.append(Finding(f"limit of {name}", "ok", "none" if limit is None else f"{limit:,}"))
    return findings


def _user(facts: Facts) -> list[Finding]:
    if facts.user is None:
        return []
    if facts.user == 0:
        mend = "Files in volumes will belong to root. Start as an ordinary user: --user $(id -u):$(id -g), runAsNonRoot: true."
        return [Finding("user", "warn" if facts.container else "ok", "root", mend if facts.container else "")]
    return [Finding("user", "ok", f"uid {facts.user}")]


def _folders(facts: Facts) -> list[Finding]:
    findings = []
    for folder in facts.folders:
        name, free = f"folder {folder.path}", "" if folder.free is None else f", {folder.free / _GIB:.1f} GiB free"
        if not folder.writable:
            reading = folder.path.name in ("code", "data") and folder.there
            mend = f"Give it to the user of this process (on the host: chown -R {facts.user or 1000} FOLDER), or start with --user of its owner."
            level: Level = "warn" if reading else "fail"
            findings.append(Finding(name, level, f"cannot be written{free}", "Fine for reading alone. " + mend if reading else mend))
        elif folder.free is not None and folder.free < 2 * _GIB:
            level = "fail" if folder.free < 200 << 20 else "warn"
            findings.append(
                Finding(name, level, f"can be written{free}", "Checkpoints and caches need room: make some, or name another disk.")
            )
        else:
            findings.append(Finding(name, "ok", f"can be written{free}"))
    return findings


def _versions(facts: Facts) -> list[Finding]:
    if facts.locked is None:
        return []
    if not facts.locked:
        return [
            Finding(
                "lock",
                "warn",
                f"LIMBECK_LOCK names {facts.lock_file}, in which no version stands",
                "Name the lock file of the image, or unset it.",
            )
        ]
    other = [
        f"{name} {facts.versions.get(name) or 'absent'} (locked: {version})"
        for name, version in facts.locked.items()
        if _release(facts.versions.get(name) or "") != _release(version)
    ]
    if other:
        mend = f"Install what was tested together: pip install --require-hashes -r {facts.lock_file}"
        return [Finding("lock", "warn", "; ".join(other), mend)]
    return [Finding("lock", "ok", f"all {len(facts.locked)} packages have the versions of {facts.lock_file}")]


def _network(facts: Facts) -> list[Finding]:
    tokens = f"set and not shown: {', '.join(facts.tokens)}" if facts.tokens else "none in the environment"
    secret = Finding("tokens", "ok", tokens)
    if facts.offline:
        return [Finding("hub", "ok", "offline mode: nothing is asked for on the network"), secret]
    if facts.hub is None or facts.hub_error is None:
        return [secret]
    if facts.hub_error:
        mend = "Models and data by hub id cannot be fetched. HF_HUB_OFFLINE=1 says so at once instead of after a wait; HF_ENDPOINT names a mirror."
        return [Finding("hub", "warn", f"{facts.hub} does not answer: {facts.hub_error}", mend), secret]
    return [Finding("hub", "ok", f"{facts.hub} answers"), secret]


def _release(version: str) -> str:
    """Without what a build adds: 2.6.0+cu124 is 2.6.0."""
    return version.partition("+")[0]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in version.split(".") if n.isdigit())


def _capability(arch: str) -> tuple[int, int]:
    digits = arch.partition("_")[2].rstrip("af")
    return (int(digits[:-1]), int(digits[-1])) if digits.isdigit() else (0, 0)


def _cudnn(version: str | None) -> str:
    """90100 is 9.1.0; before 9 it was 8902 for 8.9.2."""
    if version is None or not version.isdigit():
        return "none"
    number = int(version)
    thousands = 10_000 if number >= 90_000 else 1_000
    return f"{number // thousands}.{number % thousands // 100}.{number % 100}"
