"""Where the teacher sits, as only GPUs can show it. `make gpu` runs these; without enough CUDA devices they are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from running import make_folder, read, recipe, run, start, weights

DEVICES = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICES, reason="needs a CUDA device")]
two = pytest.mark.skipif(DEVICES < 2, reason=f"needs 2 CUDA devices, and there are {DEVICES}")

LAYERS = [
    {"loss": "kd", "weight": 0.5, "temperature": 2.0},
    {"loss": "hint", "weight": 1.0, "student": "norm", "teacher": "norm", "projector": "conv"},
    {"loss": "cross_entropy", "weight": 0.3},
]


def placed(folder: Path, placement: str, precision: str = "float32") -> Path:
    return recipe(
        folder,
        f"{placement.replace(':', '-')}-{precision}.yaml",
        teacher={"model": "python:nets.py:teacher", "placement": placement},
        student={"model": "python:nets.py:student", "options": {"dropout": 0.3}},
        train={"epochs": 3, "accumulate": 2, "precision": precision, "device": "cuda:0"},
        teacher_cache={"mode": "off"},
        objective=LAYERS,
    )


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("placement"), train=200)


def distance(one: Path, other: Path) -> float:
    a, b = (load_file(folder / "student/model.safetensors") for folder in (one, other))
    return max(float(np.abs(a[k].astype(np.float64) - b[k]).max()) for k in a)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_stream_of_its_own_on_the_students_device(there: Path, tmp_path: Path, precision: str) -> None:
    """Nothing is read before it is there, and no memory is given away while it is read: the bytes are those of one stream."""
    for name in ("same", "device:cuda:0"):
        run("distill", placed(there, name, precision), out=tmp_path / name.replace(":", "-"))
    assert weights(tmp_path / "same/student") == weights(tmp_path / "device-cuda-0/student")


def test_a_teacher_on_the_cpu(there: Path, tmp_path: Path) -> None:
    for name in ("same", "device:cpu"):
        run("distill", placed(there, name, "float64"), out=tmp_path / name.replace(":", "-"))
    assert distance(tmp_path / "same", tmp_path / "device-cpu") < 1e-9
    teacher = read(tmp_path / "device-cpu/metrics.json")["models"]["teacher"]
    assert teacher["latency_ms"] is None  # not measured where the student's was


@two
def test_a_teacher_on_the_other_device(there: Path, tmp_path: Path) -> None:
    run("distill", placed(there, "same"), out=tmp_path / "same")
    for name in ("device:cuda:1", "auto"):
        out = tmp_path / name.replace(":", "-")
        torch.cuda.reset_peak_memory_stats(1)
        run("distill", placed(there, name), out=out)
        assert torch.cuda.max_memory_allocated(1) > 0
        assert distance(tmp_path / "same", out) < 1e-5  # the same bytes where the devices are alike
        chosen: dict[str, Any] = read(out / "environment.json")["choices"]["teacher_placement"]
        assert chosen["value"] == f"device:cuda:{DEVICES - 1 if name == 'auto' else 1}"


@two
def test_a_teacher_on_a_rank_of_its_own(there: Path, tmp_path: Path) -> None:
    """torchrun gives the first device to the rank that teaches, and the second to the one that trains."""
    path = placed(there, "ranks:1", "float64")
    path.write_text(path.read_text().replace('"cuda:0"', '"auto"'))
    run("distill", placed(there, "same", "float64"), out=tmp_path / "same")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "limbeck")
    process = start("distill", path, "--out", tmp_path / "ranks", program=launcher)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert distance(tmp_path / "same", tmp_path / "ranks") < 1e-9


@two
def test_the_teacher_works_while_the_student_trains(tmp_path: Path) -> None:
    """By the devices' own clocks: for a good part of the time in which the teacher's device is busy, the student's is too."""
    folder = make_folder(tmp_path, train=400)
    wide = """

def wide(num_classes=3):
    return nn.Sequential(nn.Conv2d(1, 256, 3, padding=1), nn.ReLU(), *(nn.Conv2d(256, 256, 3, padding=1) for _ in range(6)),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, num_classes))
"""
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + wide)
    path = recipe(
        folder,
        teacher={"model": "python:nets.py:wide", "placement": "device:cuda:1"},
        student={"model": "python:nets.py:wide"},
        train={"epochs": 2, "batch_size": 100, "device": "cuda:0"},
        teacher_cache={"mode": "off"},
        baseline=False,
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run("distill", path, out=tmp_path / "run")
    busy: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.device_index in busy:
            busy[event.device_index].append((event.time_range.start, event.time_range.end))
    ends = sorted(busy[0])
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in busy[1] for c, d in ends if c < b and d > a)
    assert busy[1]
    assert both > 0.1 * sum(b - a for a, b in busy[1])
