"""limbeck doctor: the classic failures are told apart, each with how to mend it; and what it reads of a machine is what stands there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from limbeck import _doctor_facts, doctor
from limbeck._cli_run import call
from limbeck._doctor_facts import Cuda, Device, Facts, Folder
from limbeck._machine import Memory, cpus_allowed, memory
from limbeck.doctor import Finding, has_kernels, judge

GIB = 1 << 30
H100 = Device("H100", 80 * GIB, (9, 0), {"float32": 50_000.0, "bf16": 600_000.0, "fp16": 600_000.0}, 2.5e12)
WORKING = Cuda("12.4", "550.54.15", 1, 1, None, True, "", ("sm_50", "sm_80", "sm_86", "sm_90"), "90100", "2.21.5")
HEALTHY = Facts(
    python="3.11.7",
    versions={"torch": "2.6.0+cu124", "torchvision": "0.21.0+cu124"},
    vision_wants="2.6.0",
    vision_error="",
    cuda=WORKING,
    devices=(Device("a CPU", 64 * GIB, None, {"float32": 100.0, "bf16": 400.0}, 1e10), H100),
    reduced={"gloo": 1e9},
    cpus=16,
    cpus_allowed=16.0,
    threads=8,
    memory=Memory(64 * GIB, 60 * GIB, False),
    shared_memory=(8 * GIB, 8 * GIB),
    limits={"open files": 1 << 20, "processes": None},
    user=1000,
    container=True,
    folders=(Folder(Path("/workspace/checkpoints"), True, True, 100 * GIB),),
    locked={"torch": "2.6.0"},
    lock_file="lock.txt",
    offline=False,
    hub="https://hub",
    hub_error="",
    tokens=(),
)


def found(name: str, **changes: Any) -> Finding:
    """The one finding of that name, of a healthy machine with these changes."""
    (one,) = [f for f in judge(replace(HEALTHY, **changes)) if f.name == name]
    return one


def absent(**changes: Any) -> Cuda:
    """torch finds no device, although the machine has one."""
    return replace(WORKING, **{"available": False, "archs": (), "cudnn": None, "nccl": None, **changes})


def test_a_healthy_machine_has_nothing_to_mend() -> None:
    for finding in judge(HEALTHY):
        assert (finding.level, finding.mend) == ("ok", ""), finding


@pytest.mark.parametrize(
    ("cuda", "said", "mend"),
    [
        (absent(runtime=None), "built for the CPU alone", "Install a CUDA build"),
        (absent(driver="470.82.01"), "the driver 470.82.01 is too old for CUDA 12.4", "Update the driver"),
        (absent(runtime="13.0", driver="550.54.15"), "it needs 580.65.06 or newer", "Update the driver"),
        (absent(driver=None, nodes=0), "neither its driver nor its device files are seen", "Container Toolkit"),
        (absent(nodes=0), "no /dev/nvidia* is seen here", "--gpus all"),
        (absent(visible=""), "CUDA_VISIBLE_DEVICES is '', which hides every device", "Unset it"),
        (absent(error="CUDA unknown error"), "torch cannot start CUDA: CUDA unknown error", "nvidia-smi"),
    ],
)
def test_why_torch_finds_no_device_although_there_is_one(cuda: Cuda, said: str, mend: str) -> None:
    finding = found("cuda", cuda=cuda, devices=HEALTHY.devices[:1])
    assert finding.level == "fail"
    assert said in finding.found
    assert mend in finding.mend


def test_a_machine_without_a_device_is_well() -> None:
    assert found("cuda", cuda=Cuda("12.4"), devices=HEALTHY.devices[:1]).level == "ok"
    assert found("cuda", cuda=Cuda(None), devices=HEALTHY.devices[:1]).level == "ok"


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((9, 0), ("sm_80", "sm_90"), True),
        ((8, 9), ("sm_80", "sm_90"), True),  # code for 8.0 runs on 8.9
        ((12, 0), ("sm_50", "sm_80", "sm_90"), False),
        ((12, 0), ("sm_90", "sm_120"), True),
        ((12, 1), ("sm_120",), True),
        ((10, 0), ("sm_90a",), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("sm_80", "compute_90"), True),
        ((6, 1), ("sm_70", "compute_90"), False),
        ((8, 0), ("sm_86",), False),
    ],
)
def test_which_devices_a_build_has_kernels_for(capability: tuple[int, int], archs: tuple[str, ...], runs: bool) -> None:
    assert has_kernels(capability, archs) is runs


def test_a_device_that_is_too_new_for_this_torch() -> None:
    new = replace(H100, name="RTX 5090", capability=(12, 0), failed="no kernel image is available for execution on the device")
    finding = found("device cuda:0", devices=(HEALTHY.devices[0], new))
    assert finding.level == "fail"
    assert "compute capability 12.0: this torch has no kernels for it (it has sm_50, sm_80, sm_86, sm_90)" in finding.found
    assert "CUDA 12.8 or later" in finding.mend


def test_a_device_that_this_torch_has_dropped() -> None:
    old = found(
        "device cuda:0", cuda=replace(WORKING, archs=("sm_75", "sm_90")), devices=(HEALTHY.devices[0], replace(H100, capability=(6, 1)))
    )
    assert old.level == "fail"
    assert "dropped" in old.mend


@pytest.mark.parametrize(
    ("capability", "can"), [((9, 0), "bf16 and fp16"), ((7, 0), "fp16 tensor cores, no bf16"), ((6, 1), "no tensor cores")]
)
def test_what_a_device_is_good_at(capability: tuple[int, int], can: str) -> None:
    cuda = replace(WORKING, archs=("sm_60", "sm_70", "sm_90"))
    assert can in found("device cuda:0", cuda=cuda, devices=(HEALTHY.devices[0], replace(H100, capability=capability))).found


@pytest.mark.parametrize(
    ("name", "changes", "level", "said", "mend"),
    [
        ("torchvision", {"vision_wants": "2.14.1"}, "fail", "built for torch 2.14.1, and torch is 2.6.0", "Install both together"),
        (
            "torchvision",
            {"vision_error": "operator torchvision::nms does not exist"},
            "fail",
            "nms does not exist",
            "Install both together",
        ),
        ("shared memory", {"shared_memory": (64 << 20, 64 << 20)}, "warn", "64 MiB free of 64 MiB", "--shm-size=8g"),
        ("all-reduce gloo", {"reduced": {"gloo": "Connection refused"}}, "fail", "cannot sum together: Connection refused", "torchrun"),
        ("all-reduce nccl", {"reduced": {"nccl": "unhandled system error"}}, "fail", "unhandled system error", "NCCL_DEBUG"),
        ("processors", {"cpus_allowed": 2.0, "threads": 16}, "warn", "2 of 16", "OMP_NUM_THREADS=2"),
        ("memory", {"memory": Memory(4 * GIB, GIB, True)}, "warn", "the container's limit", "raise the limit"),
        ("limit of open files", {"limits": {"open files": 1024}}, "warn", "1,024", "nofile=4096"),
        ("user", {"user": 0}, "warn", "root", "--user"),
        ("lock", {"locked": {"torch": "2.7.0"}}, "warn", "torch 2.6.0+cu124 (locked: 2.7.0)", "--require-hashes"),
        ("lock", {"locked": {"numpy": "2.0.0"}}, "warn", "numpy absent (locked: 2.0.0)", "--require-hashes"),
        ("hub", {"hub_error": "no such name"}, "warn", "does not answer: no such name", "HF_HUB_OFFLINE"),
        ("hub", {"offline": True, "hub_error": None}, "ok", "offline mode", ""),
    ],
)
def test_what_is_wrong_and_how_to_mend_it(name: str, changes: dict[str, Any], level: str, said: str, mend: str) -> None:
    finding = found(name, **changes)
    assert finding.level == level
    assert said in finding.found
    assert mend in finding.mend


def test_folders_that_cannot_be_written() -> None:
    folders = (
        Folder(Path("/workspace/data"), True, False, 9 * GIB),
        Folder(Path("/workspace/checkpoints"), True, False, 9 * GIB),
        Folder(Path("/tmp/small"), True, True, 100 << 20),
    )
    changes = {"folders": folders}
    assert found("folder /workspace/data", **changes).level == "warn"
    assert found("folder /workspace/checkpoints", **changes).level == "fail"
    assert found("folder /tmp/small", **changes).level == "fail"


def test_tokens_are_named_and_never_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the whole command, as people paste it into issues."""
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsASecret")
    monkeypatch.setattr(_doctor_facts, "_measured", lambda device: ({}, 1e9))
    monkeypatch.setattr(_doctor_facts, "_reduced", lambda devices: {"gloo": 1e9})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("--json") in (0, 3)
    said = capsys.readouterr().out
    assert "HF_TOKEN" in said
    assert "thisIsASecret" not in said
    assert {f["name"] for f in json.loads(said)["findings"]} >= {"torch", "device cpu", "shared memory", "tokens"}


@pytest.mark.parametrize(("changes", "code"), [({}, 0), ({"user": 0}, 0), ({"vision_error": "broken"}, 3)])
def test_the_exit_code_says_whether_something_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], code: int
) -> None:
    monkeypatch.setattr(doctor, "gather", lambda: replace(HEALTHY, **changes))
    assert run() == code
    said = capsys.readouterr().out
    assert ("-> " in said) == bool(changes)


def run(*arguments: str) -> int:
    import typer

    from limbeck.cli import app

    try:
        return call(typer.main.get_command(app), ["doctor", *arguments], "limbeck")
    except SystemExit as left:
        return int(left.code or 0)


class TestMachine:
    """Read from folders that look like a container's."""

    def root(self, tmp_path: Path, files: dict[str, str]) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text("MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:   8000000 kB\n")
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    def test_without_limits(self, tmp_path: Path) -> None:
        root = self.root(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000", "sys/fs/cgroup/memory.max": "max"})
        assert memory(root) == Memory(16_000_000 << 10, 8_000_000 << 10, False)
        assert cpus_allowed(root) == cpus_allowed(tmp_path / "nothing")

    def test_version_two(self, tmp_path: Path) -> None:
        """The tightest of all groups above counts; what was read from files is given back."""
        group = "sys/fs/cgroup/pods/one"
        files = {
            "proc/self/cgroup": "0::/pods/one\n",
            f"{group}/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/pods/memory.max": str(4 * GIB),
            "sys/fs/cgroup/pods/memory.current": str(3 * GIB),
            "sys/fs/cgroup/pods/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            f"{group}/memory.max": "max",
        }
        root = self.root(tmp_path, files)
        assert cpus_allowed(root) == 0.5
        assert memory(root) == Memory(4 * GIB, 2 * GIB, True)

    def test_version_one(self, tmp_path: Path) -> None:
        files = {
            "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "100000",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": str(GIB),
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": str(GIB // 4),
        }
        root = self.root(tmp_path, files)
        assert cpus_allowed(root) == 1.0
        assert memory(root) == Memory(GIB, GIB - GIB // 4, True)
