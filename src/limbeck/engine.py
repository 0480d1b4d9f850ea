"""Device, precision and layout: PyTorch's own autocast and gradient scaler, and the measurement that chooses between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import Problem, UsageError
from limbeck.types import Batch

__all__ = ["Engine", "Work", "candidates", "choose_device", "measure"]

GAIN = 1.2
"""How many times faster than float32 channels-first another choice must be before ``auto`` takes it."""

AGREEMENT = 0.99
"""The least cosine between gradients (or logits) of a choice and of float32 channels-first."""


@dataclass(frozen=True)
class Engine:
    """Where and in which numbers one model runs. ``precision``: float32, float64, bf16, fp16; ``layout``: channels_first, channels_last."""

    device: torch.device
    precision: str = "float32"
    layout: str = "channels_first"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and floating-point inputs; bf16 and fp16 keep float32 weights and compute under autocast."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module here, in place."""
        module.to(device=self.device, dtype=self.dtype)
        for parameter in module.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.to(memory_format=self.memory_format)
        return module

    def send(self, batch: Batch) -> Batch:
        return batch.to(self.device, self.dtype, self.memory_format)

    def copied(self, x: Tensor) -> Tensor:
        """A copy of an input here, as :meth:`send` would bring it."""
        if not x.is_floating_point():
            return x.to(self.device, copy=True)
        if x.ndim == 4:
            return x.to(self.device, self.dtype, copy=True, memory_format=self.memory_format)
        return x.to(self.device, self.dtype, copy=True)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision in ("bf16", "fp16"):
            return torch.autocast(self.device.type, dtype=torch.bfloat16 if self.precision == "bf16" else torch.float16)
        return nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for fp16; passes everything through otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    @property
    def asynchronous(self) -> bool:
        """Whether work is only queued by a call, so that reading a value back would make the host wait, and then the device."""
        return self.device.type == "cuda"

    def seed(self, seed: int) -> None:
        """Seed what a module here draws from, as ``torch.manual_seed`` does, which first looks at every backend that there could be: that
        takes 80 microseconds, and this 1."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            at = torch.cuda.current_device() if self.device.index is None else self.device.index
            torch.cuda.default_generators[at].manual_seed(seed)
        elif self.device.type != "cpu":
            torch.manual_seed(seed)

    def label(self) -> str:
        return f"{self.precision} {self.layout}"


def choose_device(setting: str) -> torch.device:
    """``auto``: the current CUDA device where there is one, else the CPU. Anything else is taken as torch names it, and checked."""
    if setting == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(setting)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise UsageError(
            Problem("train.device", f"got {setting!r}, which cannot be used here ({reason}).", "Allowed: auto, cpu, cuda, cuda:N.")
        ) from e
    return device


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse what this device cannot do."""
    if precision == "fp16" and device.type != "cuda":
        raise UsageError(
            Problem("train.precision", "fp16 needs a CUDA device; on a CPU it is unusable.", "Allowed here: auto, float32, float64, bf16.")
        )


def candidates(device: torch.device, layouts: list[str], precisions: list[str] | None = None) -> list[Engine]:
    """What ``precision: auto`` measures; the first is always float32 in the first layout."""
    half = device.type != "cuda" or torch.cuda.is_bf16_supported()
    names = precisions or (["float32", "bf16"] if half else ["float32"])
    return [Engine(device, precision, layout) for precision in names for layout in layouts]


@dataclass(frozen=True)
class Work:
    """One engine's share of a measurement: ``vector()`` gives the values by which choices are compared, ``step()`` is what is timed."""

    vector: Callable[[], Tensor]
    step: Callable[[], object]


def measure(
    engines: list[Engine], prepare: Callable[[Engine], Work], turns: tuple[int, int] = (2, 6), seconds: float = 4.0
) -> tuple[Engine, dict[str, Any]]:
    """Time the same work under each engine and choose.

    The first engine is the reference: another is taken if its vector (gradients, or logits) has a cosine of at least 0.99 with the
    reference's and its step is at least 1.2 times as fast. They take turns, forwards and then backwards, so that a machine that gets slower
    meanwhile is not held against one of them: at least ``turns[0]`` of them, and up to ``turns[1]`` within ``seconds``. A turn is one step as
    warm-up and two that are timed. The fastest step counts, which others on the machine disturbed least.

    Returns the choice and a record for environment.json: milliseconds and cosine of each, and the reason.
    """
    reference = engines[0]
    rows: list[dict[str, Any]] = [{"precision": e.precision, "layout": e.layout, "ms": None, "cosine": None} for e in engines]
    baseline: Tensor | None = None
    began = time.perf_counter()
    for turn in range(turns[1]):
        if turn >= turns[0] and time.perf_counter() - began > seconds:
            break
        for engine, row in list(zip(engines, rows, strict=True))[:: -1 if turn % 2 else 1]:
            if "error" in row or (row["ms"] or 0) > 5000:  # what takes so long needs no second look
                continue
            try:
                work = prepare(engine)
                if turn == 0:
                    vector = work.vector().detach().double().flatten()
                    baseline = vector if baseline is None else baseline
                    row["cosine"] = float(torch.nn.functional.cosine_similarity(vector, baseline, dim=0))
                work.step()
                for _ in range(2):
                    ms = 1000 * _seconds(work.step, engine.device)
                    row["ms"] = ms if row["ms"] is None else min(row["ms"], ms)
            except RuntimeError as e:
                if engine == reference:
                    raise
                row |= {"ms": None, "cosine": None, "error": str(e).splitlines()[0]}
    base = rows[0]["ms"]
    eligible = [
        (row["ms"], engine)
        for row, engine in zip(rows, engines, strict=True)
        if row["ms"] is not None and row["cosine"] >= AGREEMENT and base / row["ms"] >= GAIN
    ]
    if not eligible:
        return reference, {
            "measured": rows,
            "reason": f"nothing measured was {GAIN} times faster than {reference.label()} with agreeing values",
        }
    ms, chosen = min(eligible, key=lambda pair: pair[0])
    return chosen, {
        "measured": rows,
        "reason": f"{chosen.label()} took {ms:.1f} ms, {reference.label()} {base:.1f} ms ({base / ms:.1f} times faster)",
    }


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    step()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
