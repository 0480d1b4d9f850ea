"""What only a GPU can show. `make gpu` runs these; without a CUDA device they are skipped."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from running import limbeck, lines, make_folder, read, recipe, run, start

DEVICES = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICES, reason="needs a CUDA device")]
two = pytest.mark.skipif(DEVICES < 2, reason=f"needs 2 CUDA devices, and there are {DEVICES}")

PLAIN: dict[str, Any] = {
    "teacher": {"model": "python:nets.py:plain"},
    "student": {"model": "python:nets.py:plain"},
    "train": {"optimizer": "sgd", "precision": "float64", "epochs": 3, "batch_size": 16},
}


def distance(one: Path, other: Path) -> float:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return max(float(np.abs(a[k].astype(np.float64) - b[k]).max()) for k in a)


def torchrun(size: int, *arguments: Any) -> str:
    """What two ranks under torchrun printed to standard error; they succeed."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "-m", "limbeck")
    process = start(*arguments, program=launcher)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    return said


@two
def test_two_ranks_over_nccl_end_in_the_weights_of_one(tmp_path: Path) -> None:
    path = recipe(make_folder(tmp_path, train=50), **PLAIN)
    run("distill", path, out=tmp_path / "one")
    torchrun(2, "distill", path, "--out", tmp_path / "two")
    for role in ("student", "baseline"):
        assert distance(tmp_path / "one" / role, tmp_path / "two" / role) < 1e-9
    environment = read(tmp_path / "two/environment.json")
    assert environment["world_size"] == 2
    assert environment["device"].startswith("cuda")


@two
@pytest.mark.parametrize("objective", ["gathered", "projected"])
def test_gathered_losses_and_cut_steps_over_nccl(tmp_path: Path, objective: str) -> None:
    """The items of all ranks for a relational loss, with their gradients; a projection that is averaged with the student; two microbatches each."""
    terms: dict[str, list[dict[str, Any]]] = {
        "gathered": [{"loss": "similarity_preserving", "weight": 30.0, "student": "1", "teacher": "1"}, {"loss": "cross_entropy"}],
        "projected": [{"loss": "hint", "student": "1", "teacher": "1", "projector": "linear"}, {"loss": "cross_entropy"}],
    }
    changes = {**PLAIN, "objective": terms[objective], "teacher_cache": {"mode": "off"}, "train": {**PLAIN["train"], "accumulate": 2}}
    folder = make_folder(tmp_path, train=64)
    run(
        "distill",
        recipe(folder, "one.yaml", **(changes if objective == "projected" else {**changes, "train": PLAIN["train"]})),
        out=tmp_path / "one",
    )
    # one process compares 16 items at once; two ranks with 8 each gather them, if none cuts its own
    path = recipe(folder, "two.yaml", **(changes if objective == "projected" else {**changes, "train": PLAIN["train"]}))
    torchrun(2, "distill", path, "--out", tmp_path / "two")
    assert distance(tmp_path / "one/student", tmp_path / "two/student") < 1e-9


@two
def test_a_hung_rank_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    """And not by NCCL's watchdog, which would abort the process."""
    folder = make_folder(tmp_path)
    note = """

class Hanging(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        if self.training and os.environ["RANK"] == "1":
            time.sleep(600)
        return self.head(x.flatten(1))


def hanging(num_classes=3):
    return Hanging(num_classes)
"""
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + note)
    path = recipe(folder, **{**PLAIN, "student": {"model": "python:nets.py:hanging"}})
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "limbeck")
    process = start("distill", path, "--out", tmp_path / "run", program=launcher, LIMBECK_RANK_TIMEOUT="20")
    _, said = process.communicate(timeout=300)
    assert "did not answer for 20 s" in said
    assert "SIGABRT" not in said


@two
def test_a_rank_takes_the_device_of_its_number_on_the_machine(tmp_path: Path) -> None:
    """Each rank writes down on which device its student is trained."""
    folder = make_folder(tmp_path)
    note = """

class Noting(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        if self.training:
            with open(os.environ["NOTE"] + os.environ["RANK"], "w") as file:
                file.write(f"{x.device} {self.head.weight.device}")
        return self.head(x.flatten(1))


def noting(num_classes=3):
    return Noting(num_classes)
"""
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + note)
    path = recipe(folder, **{**PLAIN, "student": {"model": "python:nets.py:noting"}, "baseline": False})
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "limbeck")
    process = start("distill", path, "--out", tmp_path / "run", program=launcher, NOTE=str(tmp_path / "rank-"))
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["cuda:0 cuda:0", "cuda:1 cuda:1"]


def between_steps(monkeypatch: pytest.MonkeyPatch, step: Callable[[int], None]) -> None:
    """``step(n)`` is called after the n-th optimiser step of a fit, n from 1 on."""
    from limbeck import _roles

    real = _roles.fit

    def fit(*given: Any, **named: Any) -> Any:
        arguments = list(given)
        at = next(i for i, value in enumerate(arguments) if hasattr(value, "checkpoints"))
        done = 0

        def stop() -> bool:
            nonlocal done
            done += 1
            step(done)
            return False

        arguments[at] = replace(arguments[at], stop=stop)
        return real(*arguments, **named)

    monkeypatch.setattr(_roles, "fit", fit)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("teacher", ["live", "cached"])
def test_a_step_reads_nothing_back(precision: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises at a call that makes the host wait for the device. 12 steps of one epoch, nothing logged; the first and the last are left out."""

    def step(done: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if 1 <= done < 11 else "default")

    between_steps(monkeypatch, step)
    cache = {"mode": "off"} if teacher == "live" else {"path": str(tmp_path / "cache"), "views": 1}
    path = recipe(
        make_folder(tmp_path, train=12 * 16),
        train={"epochs": 1, "precision": precision, "log_every": 1000, "checkpoint_every": 1000, "clip_norm": 1.0, "ema": 0.9},
        teacher_cache=cache,
    )
    try:
        run("distill", path, out=tmp_path / "run")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batches_come_from_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import limbeck._roles as roles
    from limbeck.engine import Engine

    seen: list[bool] = []
    inside: list[bool] = []
    send_, fit_ = Engine.send, roles.fit

    def fit(*given: Any, **named: Any) -> Any:
        inside.append(True)
        try:
            return fit_(*given, **named)
        finally:
            inside.pop()

    def send(self: Engine, batch: Any) -> Any:
        if inside and torch.is_grad_enabled():  # a batch of the loop, and not one of a validation
            seen.append(all(v.is_pinned() for v in batch.student.values()))
        return send_(self, batch)

    monkeypatch.setattr(roles, "fit", fit)
    monkeypatch.setattr(Engine, "send", send)
    run("distill", recipe(make_folder(tmp_path)), out=tmp_path / "run")
    assert read(tmp_path / "run/environment.json")["choices"]["pin_memory"]["value"]
    assert seen
    assert all(seen)


def test_bf16_keeps_float32_weights_and_stays_near(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for precision in ("float32", "bf16"):
        path = recipe(folder, f"{precision}.yaml", train={"precision": precision, "lr": 0.01})
        run("distill", path, out=tmp_path / precision)
        assert read(tmp_path / precision / "environment.json")["precision"] == precision
    a, b = (load_file(tmp_path / name / "student/model.safetensors") for name in ("float32", "bf16"))
    assert {v.dtype for v in b.values()} <= {np.dtype(np.float32), np.dtype(np.int64)}
    assert max(float(np.abs(a[k] - b[k]).max()) for k in a) < 0.1
    assert any((a[k] != b[k]).any() for k in a)


def test_an_fp16_step_that_overflows_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a scale of 2^24 the first gradients are beyond a half's 65,504: those steps are left out, the scale halves, and the training goes on."""
    from limbeck.engine import Engine

    scalers: list[torch.amp.GradScaler] = []
    real = Engine.scaler

    def scaler(self: Engine) -> torch.amp.GradScaler:
        made = real(self)
        if made.is_enabled():
            made = torch.amp.GradScaler("cuda", init_scale=2.0**24)
        scalers.append(made)
        return made

    monkeypatch.setattr(Engine, "scaler", scaler)
    path = recipe(make_folder(tmp_path), train={"precision": "fp16", "epochs": 4, "lr": 0.01}, baseline=False)
    run("distill", path, out=tmp_path / "run")
    assert scalers[-1].get_scale() < 2.0**24
    losses = [line["loss"] for line in lines(tmp_path / "run", "student") if "loss" in line]
    assert len(losses) == 4 * 3  # every step is in the log, the ones left out too
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


def test_a_stopped_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """On one device, float32: what a resume brings back includes what lives on the device."""
    folder = make_folder(tmp_path)
    path = recipe(
        folder, student={"model": "python:nets.py:student", "options": {"dropout": 0.3}}, train={"epochs": 3, "checkpoint_every": 100}
    )
    run("distill", path, out=tmp_path / "quiet")
    process = start("distill", path, "--out", tmp_path / "run", SLOW="0.2")
    while process.poll() is None and not any("loss" in line for line in lines(tmp_path / "run", "student")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 75
    run("distill", path, "--resume", out=tmp_path / "run")
    for role in ("student", "baseline"):
        a, b = (load_file(tmp_path / name / role / "model.safetensors") for name in ("quiet", "run"))
        assert all((a[k] == b[k]).all() for k in a)


ORDERED = """

class Seeing(nn.Module):
    \"\"\"Convolutions wide enough for kernels that add up in any order, and attention with a mask, whose backward pass does too.\"\"\"

    def __init__(self, num_classes, bins):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
        self.bins, self.mixed, self.head = bins, nn.Linear(64, 192), nn.Linear(64 * bins * bins, num_classes)

    def forward(self, x):
        x = self.body(x)
        q, k, v = self.mixed(x.flatten(2).mT).unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        seen = torch.ones(q.shape[0], 1, q.shape[2], q.shape[2], dtype=torch.bool, device=x.device).tril()
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, seen).mT.flatten(1, 2).unflatten(2, x.shape[2:])
        pooled = nn.functional.avg_pool2d(x, 4) if self.bins == 2 else nn.functional.adaptive_avg_pool2d(x, self.bins)
        return self.head(pooled.flatten(1))


def seeing(num_classes=3, bins=2):
    return Seeing(num_classes, bins)
"""


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("wanted", ["auto", True])
def test_a_run_again_ends_in_the_same_bytes(wanted: Any, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With true whatever it is made of; with auto too, unless it is said that an operation has no ordered kernel."""
    folder = make_folder(tmp_path, train=192)
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + ORDERED)
    train = {"precision": precision, "deterministic": wanted, "epochs": 4, "batch_size": 64, "lr": 0.001}
    path = recipe(folder, student={"model": "python:nets.py:seeing"}, train=train, baseline=False)
    for name in ("one", "two"):
        run("distill", path, out=tmp_path / name)
    same = distance(tmp_path / "one/student", tmp_path / "two/student") == 0
    told = "can differ in the last bits" in capsys.readouterr().err
    assert same or (wanted == "auto" and told)
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_has_no_ordered_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adaptive pooling: with auto it is named and the run goes on, true ends the run, which goes on with auto; false says nothing."""
    folder = make_folder(tmp_path)
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + ORDERED)
    for wanted, code, said in (("auto", 0, True), (True, 3, True), (False, 0, False)):
        student = {"model": "python:nets.py:seeing", "options": {"bins": 3}}
        path = recipe(folder, f"{wanted}.yaml", student=student, train={"deterministic": wanted, "epochs": 1, "lr": 0.001}, baseline=False)
        capsys.readouterr()
        assert limbeck("distill", path, "--out", tmp_path / str(wanted)) == code
        assert ("adaptive_avg_pool2d" in capsys.readouterr().err) is said
    assert limbeck("distill", folder / "auto.yaml", "--out", tmp_path / "True", "--resume") == 0


def test_blocks_that_are_computed_again_end_in_the_same_bytes(tmp_path: Path) -> None:
    """Dropout is drawn on the device, from the state of its generator in the first pass. fp16 as well, whose scaler sees the same gradient."""
    folder = make_folder(tmp_path)
    for precision in ("float32", "bf16", "fp16"):
        found = {}
        for name, setting in (("kept", False), ("again", ["body", "norm", "drop"])):
            train = {"gradient_checkpointing": setting, "precision": precision, "accumulate": 2}
            student = {"model": "python:nets.py:student", "options": {"dropout": 0.5}}
            path = recipe(folder, f"{name}.yaml", student=student, train=train, baseline=False)
            run("distill", path, out=tmp_path / precision / name)
            found[name] = load_file(tmp_path / precision / name / "student/model.safetensors")
        assert all(np.array_equal(value, found["again"][name]) for name, value in found["kept"].items()), precision


def test_an_automatic_cut_fits_where_the_whole_step_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator is held to what is said to be free; without the cut it runs out of memory."""
    import limbeck._microbatch as microbatch

    folder = make_folder(tmp_path)
    wide = (
        "\n\ndef wide(num_classes=3):\n    parts = [nn.Linear(64, 4096), *[nn.Tanh() for _ in range(400)], nn.Linear(4096, num_classes)]\n"
    )
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + wide + "    return nn.Sequential(nn.Flatten(), *parts)\n")
    train = {"accumulate": "auto", "batch_size": 48, "precision": "float32", "epochs": 1, "optimizer": "sgd"}  # Adam's first step is a sign
    path = recipe(folder, student={"model": "python:nets.py:wide"}, train=train, baseline=False)
    run("distill", path, out=tmp_path / "whole")
    whole = read(tmp_path / "whole/environment.json")["choices"]["accumulate"]
    assert whole["value"] == 1
    monkeypatch.setattr(microbatch, "available", lambda *_: int(0.5 * whole["uncut_bytes"] / microbatch.SHARE))
    torch.cuda.reset_peak_memory_stats()
    run("distill", path, out=tmp_path / "cut")
    cut = read(tmp_path / "cut/environment.json")["choices"]["accumulate"]
    assert cut["value"] > 1
    assert lines(tmp_path / "cut", "student")[-1]
    assert distance(tmp_path / "whole/student", tmp_path / "cut/student") < 1e-5
