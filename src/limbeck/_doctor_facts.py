"""What ``limbeck doctor`` finds out, and how. Nothing is judged here: :mod:`limbeck.doctor` does that from these facts alone."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from limbeck._machine import Memory, cpus_allowed, in_container, memory, shared_memory
from limbeck.run import existing_parent

__all__ = ["Cuda", "Device", "Facts", "Folder", "gather"]

VOLUMES = ("code", "data", "checkpoints")


@dataclass(frozen=True)
class Device:
    """A processor that computes. memory in bytes; capability: of a CUDA device; rates in GFLOP/s by dtype; bandwidth in bytes a second, of a copy
    (read and written bytes both count)."""

    name: str
    memory: int | None = None
    capability: tuple[int, int] | None = None
    rates: dict[str, float] = field(default_factory=dict)
    bandwidth: float | None = None
    failed: str = ""


@dataclass(frozen=True)
class Cuda:
    """runtime: what torch was built for, None of a build without CUDA; driver: the version of the kernel module; on_bus: NVIDIA display devices that
    the machine has; nodes: device files that this process sees; visible: CUDA_VISIBLE_DEVICES; error: why torch finds none."""

    runtime: str | None = None
    driver: str | None = None
    on_bus: int = 0
    nodes: int = 0
    visible: str | None = None
    available: bool = False
    error: str = ""
    archs: tuple[str, ...] = ()
    cudnn: str | None = None
    nccl: str | None = None


@dataclass(frozen=True)
class Folder:
    """there: whether it exists; writable: whether a file could be made in it; free: bytes."""

    path: Path
    there: bool
    writable: bool
    free: int | None


@dataclass(frozen=True)
class Facts:
    """Everything that is judged. versions: of packages, None where absent; vision_wants: the torch that torchvision was built for; locked: versions
    that a lock file asks for, None without one; reduced: bytes a second of a common sum, by backend, or a text on why there is none;
    hub: its address, None where no library for it is installed; hub_error: why it did not answer, empty where it did, None where nobody asked."""

    python: str
    versions: dict[str, str | None]
    vision_wants: str | None
    vision_error: str
    cuda: Cuda
    devices: tuple[Device, ...]
    reduced: dict[str, float | str]
    cpus: int
    cpus_allowed: float
    threads: int
    memory: Memory | None
    shared_memory: tuple[int, int] | None
    limits: dict[str, int | None]
    user: int | None
    container: bool
    folders: tuple[Folder, ...]
    locked: dict[str, str] | None
    lock_file: str
    offline: bool
    hub: str | None
    hub_error: str | None
    tokens: tuple[str, ...]


def gather() -> Facts:
    """Look at this machine; about ten seconds, most of them for measuring."""
    import torch

    cuda = _cuda()
    vision_wants, vision_error = _vision()
    lock, locked = _locked()
    offline = any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    hub = _hub()
    wanted = ["torch", "torchvision", "timm", "transformers", "onnx", "onnxruntime", "numpy", "pyarrow", "safetensors", "limbeck"]
    return Facts(
        python=platform.python_version(),
        versions={name: _version(name) for name in [*wanted, *(locked or {})]},
        vision_wants=vision_wants,
        vision_error=vision_error,
        cuda=cuda,
        devices=(_cpu(), *(_cuda_device(i) for i in range(torch.cuda.device_count() if cuda.available else 0))),
        reduced=_reduced(torch.cuda.device_count() if cuda.available else 0),
        cpus=os.cpu_count() or 1,
        cpus_allowed=cpus_allowed(),
        threads=torch.get_num_threads(),
        memory=memory(),
        shared_memory=shared_memory(),
        limits=_limits(),
        user=os.geteuid() if hasattr(os, "geteuid") else None,
        container=in_container(),
        folders=tuple(_folder(path) for path in _folders()),
        locked=locked,
        lock_file=lock,
        offline=offline,
        hub=hub,
        hub_error=None if offline or hub is None else _asked(hub),
        tokens=tuple(sorted(name for name, value in os.environ.items() if value and re.search(r"TOKEN|API_KEY|SECRET", name))),
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _vision() -> tuple[str | None, str]:
    """The torch that the installed torchvision was built for, and what its import says."""
    if _version("torchvision") is None:
        return None, ""
    asked = [
        re.fullmatch(r"torch\s*\(?==\s*([\w.+]+)\)?", r.split(";")[0].strip()) for r in importlib.metadata.requires("torchvision") or []
    ]
    wants = next((found[1] for found in asked if found), None)
    try:
        importlib.import_module("torchvision")
    except Exception as e:  # a torchvision that was built for another torch raises what it likes
        return wants, _line(e)
    return wants, ""


def _cuda() -> Cuda:
    import torch

    devices = list(Path("/sys/bus/pci/devices").glob("*"))
    # class 03: display controllers, of which NVIDIA's vendor number is 10de
    on_bus = sum(_read(d / "vendor") == "0x10de" and _read(d / "class").startswith("0x03") for d in devices)
    driver = re.search(r"Kernel Module\s+(?:for \w+\s+)?([\d.]+)", _read(Path("/proc/driver/nvidia/version")))
    available, error = torch.cuda.is_available(), ""
    if not available and torch.version.cuda is not None:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except Exception as e:
            error = _line(e)
    version = torch.backends.cudnn.version() if available else None  # type: ignore[no-untyped-call]
    nccl = ""
    with contextlib.suppress(Exception):
        found = torch.cuda.nccl.version() if available else ()  # type: ignore[no-untyped-call]
        nccl = ".".join(map(str, found))
    return Cuda(
        runtime=torch.version.cuda,
        driver=driver[1] if driver else None,
        on_bus=on_bus,
        nodes=len([p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        available=available,
        error=error,
        archs=tuple(torch.cuda.get_arch_list()) if available else (),
        cudnn=str(version) if version else None,
        nccl=nccl or None,
    )


def _cpu() -> Device:
    import torch

    lines = _read(Path("/proc/cpuinfo")).splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    found = memory()
    rates, bandwidth = _measured(torch.device("cpu"))
    return Device(f"{name}, {torch.backends.cpu.get_cpu_capability()}", found.total if found else None, None, rates, bandwidth)


def _cuda_device(index: int) -> Device:
    import torch

    about = torch.cuda.get_device_properties(index)
    capability = (about.major, about.minor)
    try:
        rates, bandwidth = _measured(torch.device("cuda", index))
    except Exception as e:  # no kernels for it, no memory left on it
        return Device(about.name, about.total_memory, capability, failed=_line(e))
    return Device(about.name, about.total_memory, capability, rates, bandwidth)


def _measured(device: object) -> tuple[dict[str, float], float]:
    """GFLOP/s of a square product in each dtype, and bytes a second of a copy: the best of a few after a warm-up."""
    import torch

    assert isinstance(device, torch.device)
    cuda = device.type == "cuda"

    def best(work: object, times: int = 4) -> float:
        assert callable(work)
        found = float("inf")
        for number in range(times):
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize(device)
            if number:
                found = min(found, time.perf_counter() - start)
        return found

    rates = {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if name == "fp16" and not cuda:
            continue  # unusable there
        size = 4096 if cuda else 256
        while True:  # larger, until it takes long enough to be measured; bf16 on a processor without instructions for it stays small
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            seconds = best(lambda a=a, b=b: torch.mm(a, b))
            if seconds > 0.02 or size >= 8192:
                break
            size *= 2
        rates[name] = 2 * size**3 / seconds / 1e9
    source = torch.ones(1 << (28 if cuda else 25), device=device)
    target = torch.empty_like(source)
    return rates, 2 * source.numel() * 4 / best(lambda: target.copy_(source))


def _reduced(devices: int) -> dict[str, float | str]:
    """A common sum of two CPU processes, and of all CUDA devices where there are several."""
    found: dict[str, float | str] = {"gloo": _sum_together(2, "gloo")}
    if devices > 1:
        found["nccl"] = _sum_together(devices, "nccl")
    return found


def _sum_together(size: int, backend: str) -> float | str:
    with tempfile.TemporaryDirectory(prefix="limbeck-doctor-") as folder:
        store = str(Path(folder) / "store")
        command = [sys.executable, "-m", "limbeck._doctor_reduce", store]
        processes = [
            subprocess.Popen([*command, str(rank), str(size), backend], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(size)
        ]
        said = []
        try:
            for process in processes:
                said.append(process.communicate(timeout=90))
        except subprocess.TimeoutExpired:
            return "no answer within 90 s"
        finally:
            for process in processes:
                process.kill()
                process.wait()
    wrong = next((err for process, (_, err) in zip(processes, said, strict=True) if process.returncode), None)
    if wrong is not None:
        return (wrong.strip().splitlines() or ["the processes ended without a word"])[-1][:300]
    return float(said[0][0])


def _limits() -> dict[str, int | None]:
    """Soft limits by name; None: no limit."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    found = {}
    for name, number in (
        ("open files", resource.RLIMIT_NOFILE),
        ("processes", resource.RLIMIT_NPROC),
        ("locked memory", resource.RLIMIT_MEMLOCK),
    ):
        soft = resource.getrlimit(number)[0]
        found[name] = None if soft == resource.RLIM_INFINITY else soft
    return found


def _folders() -> list[Path]:
    """The container's volumes where they are; else where this process stands. And where caches go."""
    from limbeck.cache import default_root

    volumes = [Path("/workspace") / name for name in VOLUMES]
    there = volumes if any(v.is_dir() for v in volumes) else [Path.cwd()]
    return [*there, default_root()]


def _folder(path: Path) -> Folder:
    there = path.is_dir()
    place = existing_parent(path)
    try:
        with tempfile.NamedTemporaryFile(prefix=".limbeck-doctor-", dir=place):
            writable = True
    except OSError:
        writable = False
    return Folder(path, there, writable, shutil.disk_usage(place).free)


def _locked() -> tuple[str, dict[str, str] | None]:
    """The file that ``LIMBECK_LOCK`` names (the images set it), and the versions in it."""
    name = os.environ.get("LIMBECK_LOCK", "")
    if not name:
        return "", None
    lines = _read(Path(name)).splitlines()
    found = (re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;\\]+)", line) for line in lines)
    return name, {m[1].lower(): m[2] for m in found if m}


def _hub() -> str | None:
    try:
        from huggingface_hub.constants import ENDPOINT
    except ImportError:
        return None
    return str(ENDPOINT)


def _asked(address: str) -> str:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=4):
            return ""
    except urllib.error.HTTPError:
        return ""  # it answered
    except (OSError, ValueError) as e:
        reason = getattr(e, "reason", e)
        return "no such name" if isinstance(reason, socket.gaierror) else _line(reason)


def _line(error: object) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
