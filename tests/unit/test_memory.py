"""Memory: how much there is, how much a step holds, and into how many microbatches it is cut; shared memory for loaders."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import limbeck._microbatch as microbatch
import limbeck.data.loader as loader
import limbeck.loop as loop
from limbeck import _machine
from limbeck.data import BatchBuilder, Request, stream
from limbeck.data.sources import Tensors
from limbeck.engine import Engine
from limbeck.errors import Stopped
from limbeck.memory import available, largest
from limbeck.models import wrap_module
from limbeck.objective import Objective
from limbeck.placement import Here, Seat
from limbeck.progress import Progress
from limbeck.teacher import LiveTeacher
from limbeck.types import Batch
from running import limbeck, lines, make_folder, read, recipe, run, weights
from support import KD_MIX, Big, Small, made, run_fit, settings, toy_data

CPU = torch.device("cpu")
GIB = 2**30


def test_what_is_left_is_that_of_the_control_group_and_shared_by_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/memory.max": f"{3 * GIB}\n",
        "sys/fs/cgroup/job/memory.current": f"{2 * GIB}\n",
        "sys/fs/cgroup/job/memory.stat": f"anon 1\ninactive_file {GIB // 2}\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    real = _machine.memory
    monkeypatch.setattr(_machine, "memory", lambda: real(tmp_path))
    assert available(CPU) == 3 * GIB // 2
    assert available(CPU, 3) == GIB // 2
    (tmp_path / "sys/fs/cgroup/job/memory.max").write_text("max")
    assert available(CPU) == 8 * GIB


def test_the_most_that_was_held_at_one_time() -> None:
    with largest(CPU) as peak:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1
        view = b.reshape(10, 100)
        del a, b
        assert peak() == 8000
        c = torch.zeros(500)
        assert peak() == 8000
        d = torch.zeros(1000)
        assert peak() == 4000 + 2000 + 4000
    torch.zeros(10**6)
    assert peak() == 10000
    del view, c, d


@pytest.mark.parametrize(("most", "expected"), [(10**9, 1), (340, 2), (170, 6), (130, 11), (120, 15), (119, None)])
def test_the_fewest_microbatches(most: float, expected: int | None) -> None:
    assert microbatch.fewest(43, lambda rows: 90 + 10 * rows if most < 340 else 100 + 10 * rows, most) == expected


NETS = """
import torch

class Wide(nn.Module):
    '''Little weight, much to keep for the backward pass.'''
    def __init__(self, norm, num_classes):
        super().__init__()
        self.first, self.head = nn.Linear(64, 16), nn.Linear(16, num_classes)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()

    def forward(self, x):
        x = self.norm(self.first(x.flatten(1)))
        for _ in range(200):
            x = torch.tanh(x) + 0.1 * x
        return self.head(x)

def wide(num_classes=3):
    return Wide(False, num_classes)

def normed(num_classes=3):
    return Wide(True, num_classes)
"""

TRAIN: dict[str, Any] = {
    "precision": "float64",
    "optimizer": "sgd",
    "lr": 0.1,
    "accumulate": "auto",
    "batch_size": 48,
    "epochs": 2,
    "workers": 0,
}


@pytest.fixture
def there(tmp_path: Path) -> Path:
    folder = make_folder(tmp_path)
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + NETS)
    return folder


def limited(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(microbatch, "available", lambda *_: count)


def test_a_small_limit_cuts_the_step_and_changes_no_weight(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(there, student={"model": "python:nets.py:wide"}, train=TRAIN)
    run("distill", path, out=tmp_path / "whole")
    whole = read(tmp_path / "whole/environment.json")["choices"]["accumulate"]
    assert (whole["value"], whole["rows"]) == (1, 48)
    limited(monkeypatch, int(0.5 * whole["uncut_bytes"] / 0.8))
    run("distill", path, out=tmp_path / "cut")
    cut = read(tmp_path / "cut/environment.json")["choices"]["accumulate"]
    assert cut["value"] > 1
    assert cut["needed_bytes"] <= cut["may_use_bytes"] < cut["uncut_bytes"]
    assert f"accumulate: {cut['value']}\n" in (tmp_path / "cut/recipe.yaml").read_text()
    for role in ("student", "baseline"):
        from safetensors.numpy import load_file

        a, b = (load_file(tmp_path / name / role / "model.safetensors") for name in ("whole", "cut"))
        assert max(float(np.abs(a[k] - b[k]).max()) for k in a) < 1e-12
        assert weights(tmp_path / "whole" / role) != weights(tmp_path / "cut" / role), "nothing was cut"
    # a run with the recorded recipe, and a resumed one, measure nothing
    monkeypatch.setattr(microbatch, "available", lambda *_: pytest.fail("measured again"))
    (there / "again.yaml").write_text((tmp_path / "cut/recipe.yaml").read_text())
    run("distill", there / "again.yaml", out=tmp_path / "again")
    assert weights(tmp_path / "again/student") == weights(tmp_path / "cut/student")
    assert limbeck("distill", path, "--out", tmp_path / "cut", "--resume") == 0


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, number format, mode and buffers, of a model that is in float64 and is measured in float32."""
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double().eval()
    with torch.no_grad():
        net[0].weight += 1e-12
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with microbatch._put_back(net):
        Engine(CPU).place(net)
        net.train()(torch.randn(5, 6))
        assert net[0].weight.dtype == torch.float32
        assert int(net[1].num_batches_tracked) == 1
    assert not any(m.training for m in net.modules())
    for name, value in net.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name


def test_the_prediction_is_what_a_step_holds(there: Path, tmp_path: Path) -> None:
    """Of the part that grows with the rows: the tensors that 200 times tanh and a sum keep, by hand."""
    run("train", recipe(there, teacher=None, student={"model": "python:nets.py:wide"}, train=TRAIN), out=tmp_path / "run")
    found = read(tmp_path / "run/environment.json")["choices"]["accumulate"]
    grown = found["uncut_bytes"] - found["held_bytes"]
    kept = 48 * 16 * 8 * 200  # each tanh keeps its result, float64
    assert kept <= grown <= 1.3 * kept


def test_a_step_that_batch_statistics_tie_together_is_not_cut(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(there, student={"model": "python:nets.py:normed"}, train=TRAIN)
    run("distill", path, out=tmp_path / "whole")
    need = read(tmp_path / "whole/environment.json")["choices"]["accumulate"]["uncut_bytes"]
    limited(monkeypatch, int(0.5 * need / 0.8))
    capsys.readouterr()
    assert limbeck("distill", path, "--out", tmp_path / "run") == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "The step is not cut, because the model has batch statistics (BatchNorm)" in said
    assert "To cut all the same, say so: train.accumulate: " in said
    assert not (tmp_path / "run/checkpoints/student").exists()


def test_a_term_over_the_batch_is_not_cut() -> None:
    record = {"value": 2, "rows": 8, "uncut_bytes": 4 * 10**9, "may_use_bytes": 2 * 10**9, "free_bytes": 3 * 10**9}
    tied: Any = SimpleNamespace(per_item=False)
    parts: Any = SimpleNamespace(batch_statistics=False)
    with pytest.raises(Stopped, match="a term over the batch"):
        microbatch._judge(record, None, tied, parts)  # type: ignore[arg-type]
    microbatch._judge({**record, "value": 1}, None, tied, parts)  # type: ignore[arg-type]
    microbatch._judge(record, None, SimpleNamespace(per_item=True), parts)  # type: ignore[arg-type]


def test_what_fits_in_no_cut_is_refused(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limited(monkeypatch, 1000)
    assert limbeck("distill", recipe(there, student={"model": "python:nets.py:wide"}, train=TRAIN), "--out", tmp_path / "run") == 3
    assert "Not even 2 rows at a time fit" in " ".join(capsys.readouterr().err.split())


def test_answers_that_come_a_step_ahead_are_held_beside_it() -> None:
    """Those of two steps of 24 rows, 4 classes in float64; and what the teacher works in, where that is the same memory."""
    data, engine, train = toy_data(30), Engine(CPU, "float64"), settings()
    student = wrap_module(made(Small, "student"), role="student", data=data)
    live = LiveTeacher(wrap_module(made(Big, "teacher"), role="teacher", data=data), engine)
    objective = Objective.build(KD_MIX, classes=data.classes, label_counts=np.bincount(data.train.labels))
    both: Any = {"student": student.preprocessing, "teacher": live.model.preprocessing}
    batch = BatchBuilder(data.train, **both, num_classes=4, dtype=engine.dtype)(Request(0, 0, 0, np.arange(24)))
    with largest(CPU) as works:
        answer = live(engine.send(batch.part(0, 8)), objective.teacher_needs)

    def peak(teacher: Any) -> float:
        return microbatch._Work(student, teacher, objective, engine, train, 0, batch).peak(8)

    alone = peak(lambda part, needs: answer)
    two = 2 * 24 * 4 * 8
    assert peak(Here(live, CPU, Seat(CPU, ranks=1))) == alone + two
    assert peak(Here(live, CPU, Seat(CPU, ahead=True))) == alone + two + works()
    assert peak(Here(live, CPU, Seat(CPU))) < alone + two + works()


# --- loaders


class Built:
    """Batches of 1,000 float32 a row."""

    def __call__(self, request: Request) -> Batch:
        n = len(request.rows)
        ids = np.zeros((n, 2), dtype=np.uint64)
        x = torch.full((n, 1000), float(request.step))
        return Batch(ids, 0, {"x": x}, None, torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool))


def requests(count: int = 5) -> list[Request]:
    return [Request(step, 0, 0, np.arange(8)) for step in range(count)]


@pytest.mark.parametrize(
    ("free", "workers", "said"),
    [
        (10**9, 3, ""),
        (7 * 33_000, 2, "3 loader processes (train.workers) need 0 MiB for their batches: going on with 2 of them."),
        (
            3 * 32_000,
            0,
            "going on with a background thread in their place. Give it more: docker run --shm-size=8g; in Kubernetes, a volume `emptyDir:",
        ),
    ],
)
def test_shared_memory_that_is_too_small_is_noticed(monkeypatch: pytest.MonkeyPatch, free: int, workers: int, said: str) -> None:
    told: list[str] = []
    used: list[int] = []
    full = os.statvfs_result((512, 512, free // 512, free // 512, free // 512, 0, 0, 0, 0, 255))
    monkeypatch.setattr(_machine.os, "statvfs", lambda path: full if str(path) == "/dev/shm" else pytest.fail(str(path)))
    plain = loader._processes
    monkeypatch.setattr(loader, "_processes", lambda b, r, n, p: used.append(n) or loader._local(b, r, p))
    found = list(stream(Built(), requests(), workers=3, say=told.append))
    assert plain is not loader._processes
    assert [request.step for request, _ in found] == [0, 1, 2, 3, 4]
    assert [float(batch.student["x"][0, 0]) for _, batch in found] == [0, 1, 2, 3, 4]
    assert used == ([workers] if workers else [])
    assert (said in told[0]) if said else told == []


def test_further_views_go_through_shared_memory_too() -> None:
    batch = Built()(requests(1)[0])
    assert loader._shared_bytes(replace(batch, others=(batch.student,) * 2)) == loader._shared_bytes(batch) + 2 * 8 * 1000 * 4


def test_ranks_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(loader, "shared_memory", lambda: (10**9, 10 * 33_000))
    monkeypatch.setattr(loader, "_processes", lambda b, r, n, p: loader._local(b, r, p))
    list(stream(Built(), requests(), workers=4, say=told.append))
    assert told == []
    list(stream(Built(), requests(), workers=4, ranks=2, say=told.append))
    assert len(told) == 1
    assert list(stream(Built(), [], workers=4, say=told.append)) == []


def test_a_slow_loader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(loop, "_WINDOW", (6, 0.0))
    monkeypatch.setattr(Progress, "say", lambda _, text: told.append(text))
    data, read = toy_data(40), Tensors.read
    monkeypatch.setattr(Tensors, "read", lambda self, rows: (time.sleep(0.1), read(self, rows))[1])
    run_fit(tmp_path, data=data, train=settings())
    found = lines(tmp_path, "student")
    waits = [line["wait"] for line in found if "loss" in line]
    [named] = [line["slow_loader"] for line in found if "slow_loader" in line]
    assert "went by waiting for batches, which this process itself made. Raise train.workers" in named
    assert f"student: {named}" in told
    assert waits[0] is None
    shares = [share for share in waits if share is not None]
    assert max(shares) > 0.2
    assert all(0 <= share <= 1 for share in shares)


def test_the_share_of_the_time_that_steps_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that the test moves: 3 seconds for a batch, 7 for a step, and 100 for a validation that does not count."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])

    def slow(seconds: float) -> Any:
        for _ in range(24):
            now[0] += seconds
            yield None, None

    for batch, share, named in ((3, 0.3, 1), (1, 0.125, 0)):
        wait = loop._Wait(2)
        shares, told = [], []
        for step, _ in enumerate(wait.over(slow(batch))):
            now[0] += 7
            if step % 4 == 3:
                shares.append(wait.take())
                told.append(wait.slow())
            if step == 15:
                now[0] += 100
                wait.restart()
        # the first batch, and the first after the validation, start what loads them
        for found, steps in zip(shares, (3, 4, 4, 4, 3, 4), strict=True):
            whole = 7 + steps * (batch + 7) if steps == 3 else steps * (batch + 7)
            assert found == pytest.approx(steps * batch / whole)
        assert shares[1] == pytest.approx(share)
        assert sum(map(bool, told)) == named
        assert not named or "which 2 loader processes made" in "".join(told)
