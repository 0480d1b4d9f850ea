"""What is told of the machine while a run trains, and where: in the log, on the terminal, at a port."""

from __future__ import annotations

import socket
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.errors import UsageError
from limbeck.monitor import MetricsPort, Monitor, shown
from limbeck.progress import Progress
from running import limbeck, make_folder, recipe, run


class _Error(Exception):
    pass


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """nvidia-ml-py and torch, as if this process saw the devices B and A, in that order, of a machine with three."""
    asked: dict[str, Any] = {"uuids": [], "fails": set()}

    def figure(name: str, value: Any) -> Any:
        def read(handle: str, *_: Any) -> Any:
            if name in asked["fails"]:
                raise _Error
            return value(handle)

        return read

    def handle_of(uuid: str) -> str:
        asked["uuids"].append(uuid)
        return uuid

    library = types.ModuleType("pynvml")
    library.NVMLError, library.NVML_TEMPERATURE_GPU = _Error, 0  # type: ignore[attr-defined]
    library.nvmlInit, library.nvmlDeviceGetHandleByUUID = lambda: None, handle_of  # type: ignore[attr-defined]
    of_b = {"GPU-B": 1, "GPU-A": 2}
    library.nvmlDeviceGetUtilizationRates = figure("rates", lambda h: types.SimpleNamespace(gpu=10 * of_b[h]))  # type: ignore[attr-defined]
    library.nvmlDeviceGetMemoryInfo = figure("memory", lambda h: types.SimpleNamespace(used=of_b[h] << 30, total=8 << 30))  # type: ignore[attr-defined]
    library.nvmlDeviceGetTemperature = figure("temperature", lambda h: 60 + of_b[h])  # type: ignore[attr-defined]
    library.nvmlDeviceGetPowerUsage = figure("power", lambda h: 100_500 * of_b[h])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: types.SimpleNamespace(uuid="BA"[i]))
    return asked


def test_each_device_of_the_process_is_told_under_its_own_number(gpus: dict[str, Any]) -> None:
    found = Monitor().now()
    assert gpus["uuids"] == ["GPU-B", "GPU-A"]
    assert found["gpu0_percent"] == 10
    assert found["gpu1_percent"] == 20
    assert found["gpu1_bytes"] == 2 << 30
    assert found["gpu0_celsius"] == 61
    assert found["gpu0_watts"] == 100.5
    assert "GPU 0 10 % 1.0 GiB 61 °C 100 W, GPU 1 20 %" in shown(found)


def test_what_a_device_does_not_know_is_left_out(gpus: dict[str, Any]) -> None:
    gpus["fails"] = {"power", "rates"}
    found = Monitor().now()
    assert "gpu0_watts" not in found
    assert "gpu0_percent" not in found
    assert found["gpu0_celsius"] == 61


def test_without_the_library_a_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not [name for name in Monitor().now() if name.startswith("gpu")]


def test_how_busy_the_processors_were_between_two_looks(tmp_path: Path) -> None:
    """user nice system idle iowait irq softirq steal: of 200 ticks in between, 150 were idle or waiting."""
    (tmp_path / "stat").write_text("cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 2 3\n")
    monitor = Monitor(every=0.0, proc=tmp_path)
    assert "cpu_percent" not in monitor.now()
    (tmp_path / "stat").write_text("cpu  140 0 60 900 100 0 0 0 0 0\n")
    assert monitor.now()["cpu_percent"] == 25.0


def test_a_look_is_kept_for_a_while(tmp_path: Path) -> None:
    monitor = Monitor(every=1000.0, proc=tmp_path)
    assert monitor.now() is monitor.now()


def test_the_log_tells_it(tmp_path: Path) -> None:
    import json

    folder = make_folder(tmp_path)
    run("distill", recipe(folder, train={"epochs": 1, "lr": 0.01}, baseline=False), out=folder / "run")
    steps = [row for row in map(json.loads, (folder / "run/log.jsonl").read_text().splitlines()) if "loss" in row]
    assert steps
    for row in steps:
        assert 0 < row["machine"]["ram_bytes"] < row["machine"]["ram_total_bytes"]
        assert row["steps"] == steps[-1]["step"]


def text_at(address: str) -> str:
    with urllib.request.urlopen(address, timeout=10) as answer:
        return str(answer.read().decode())


def test_steps_at_a_port() -> None:
    with Progress("none", "0") as progress:
        assert progress._port is not None
        address = progress._port.address
        assert address.startswith("http://127.0.0.1:")
        progress.step("student", epoch=1, epochs=3, step=7, steps=30, items_per_second=512.0, values={"loss": 0.5, "kd": 0.25}, left=1.0)
        said = text_at(address)
    for line in (
        'limbeck_step{role="student"} 7.0',
        'limbeck_steps{role="student"} 30.0',
        'limbeck_items_per_second{role="student"} 512.0',
        'limbeck_loss{role="student",term="kd"} 0.25',
        'limbeck_machine{what="ram_bytes"}',
    ):
        assert line in said
    with pytest.raises(urllib.error.URLError):
        text_at(address)


@pytest.mark.parametrize("where", ["", "metrics", "70000", ":9100", "host:", "-1", "1.5"])
def test_an_address_that_makes_no_sense(where: str) -> None:
    with pytest.raises(UsageError, match="expected a port from 0 to 65535"):
        MetricsPort(where)


def test_a_port_that_is_taken_is_told_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert limbeck("distill", recipe(folder), "--metrics-port", port, "--out", folder / "run") == 2
    assert f"--metrics-port: nothing can listen at 127.0.0.1:{port} (address already in use)" in capsys.readouterr().err
    assert not (folder / "run").exists()
