"""The check that every exported file must pass: it answers as the trained student does, at sizes that were not traced."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from limbeck.errors import Stopped
from limbeck.export._job import Job, brief, frozen_copy

if TYPE_CHECKING:
    from limbeck.models import Model

__all__ = ["Parity", "Runner", "compare", "latency", "student_logits", "throughput"]

Logits = np.ndarray[Any, np.dtype[np.float64]]
Runner = Callable[[tuple[Tensor, ...]], Logits]
"""A loaded file: the inputs of one case in, ``(B, C)`` logits out."""

RELATIVE_TOLERANCE = 1e-4
WARM_UP = 5


@dataclass(frozen=True)
class Parity:
    """How a file compares with its student.

    ``tolerance`` is ``1e-4 * max(1, largest_logit)``, in units of the logits. ``agreement`` is the share of items with the same best class;
    an item whose two best logits lie within twice the tolerance counts as agreed. ``problem`` is what else was wrong, or empty.
    """

    max_abs_diff: float
    tolerance: float
    agreement: float
    largest_logit: float
    items: int
    batch_sizes: tuple[int, ...]
    worst: str
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.max_abs_diff <= self.tolerance and self.agreement == 1.0

    def __str__(self) -> str:
        text = (
            f"max_abs_diff {self.max_abs_diff:.3g}, tolerance {self.tolerance:.3g}, agreement {self.agreement:.4g} of {self.items} items, "
            f"largest logit {self.largest_logit:.4g}"
        )
        return f"{text}; worst at {self.worst}{'; ' + self.problem if self.problem else ''}"


def student_logits(model: Model, job: Job) -> list[Logits]:
    """What the trained student itself says to every case of ``job``, in at least float32 and in eval mode.

    The student's own module is asked where it is (half-precision weights: an exact float32 copy of it); its modes are put back afterwards.
    Raises :class:`Stopped` where the student does not answer the same question twice in the same way.
    """
    module = model.module
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    if any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors):
        module = frozen_copy(module)
        tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    device = tensors[0].device if tensors else torch.device("cpu")
    modes = [(part, part.training) for part in module.modules()]
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    asked = _with_module(model, module)

    def ask(case: tuple[Tensor, ...]) -> Logits:
        inputs = {n: v.to(device, dtype if v.is_floating_point() else v.dtype) for n, v in zip(job.names, case, strict=True)}
        return np.asarray(asked(inputs).double().cpu().numpy())

    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        module.eval()
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            answers = [ask(case) for case in job.cases]
            again = ask(job.cases[-1])
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        for part, training in modes:
            part.training = training
    difference, tolerance = _difference(answers[-1], again), RELATIVE_TOLERANCE * max(1.0, _largest(answers))
    if difference > tolerance:
        raise Stopped(
            f"The student cannot be exported: in eval mode it gives other logits when it is asked the same twice "
            f"(difference {difference:.3g}). Something random is active in its forward pass, such as a dropout that ignores eval mode."
        )
    return answers


def _with_module(model: Model, module: torch.nn.Module) -> Model:
    import copy

    twin = copy.copy(model)
    twin.module = module
    return twin


def compare(run: Runner, job: Job, expected: Sequence[Logits]) -> Parity:
    """Ask a loaded file every case and hold its answers against the student's."""
    largest = _largest(expected)
    tolerance = RELATIVE_TOLERANCE * max(1.0, largest)
    sizes = tuple(sorted({len(e) for e in expected}))
    worst, where, agreed, items, problem = 0.0, "", 0, 0, ""
    for case, wanted in zip(job.cases, expected, strict=True):
        items += len(wanted)
        shapes = ", ".join(f"{n} {tuple(v.shape)}" for n, v in zip(job.names, case, strict=True))
        try:
            got = run(case)
        except Exception as error:
            problem = problem or f"it does not run on {shapes}: {brief(error)}"
            worst, where = float("inf"), shapes
            continue
        if got.shape != wanted.shape:
            problem = problem or f"it answers {got.shape} instead of {wanted.shape} to {shapes}"
            worst, where = float("inf"), shapes
            continue
        difference = _difference(wanted, got)
        if difference > worst or not where:
            worst, where = difference, shapes
        agreed += _agreed(wanted, got, tolerance)
    return Parity(worst, tolerance, agreed / items, largest, items, sizes, where, problem)


def _largest(answers: Sequence[Logits]) -> float:
    finite = [np.abs(a[np.isfinite(a)]) for a in answers]
    return float(max((a.max() for a in finite if a.size), default=0.0))


def _difference(a: Logits, b: Logits) -> float:
    """Largest absolute difference; equal infinities differ by nothing, and a NaN by infinity."""
    with np.errstate(invalid="ignore"):
        difference = np.where(a == b, 0.0, np.abs(a - b))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))


def _agreed(wanted: Logits, got: Logits, tolerance: float) -> int:
    same = wanted.argmax(-1) == got.argmax(-1)
    if wanted.shape[-1] < 2:
        return int(same.sum())
    best = np.sort(wanted, axis=-1)[:, -2:]
    with np.errstate(invalid="ignore"):
        close = best[:, 1] - best[:, 0] <= 2 * tolerance
    return int((same | close).sum())


def latency(run: Runner, single: tuple[Tensor, ...], *, seconds: float = 1.0, runs: int = 200) -> dict[str, float]:
    """Milliseconds of one call on one sample, after a warm-up: {"p50", "p95"} over 20 to ``runs`` calls in about ``seconds``."""
    for _ in range(WARM_UP):
        run(single)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 20 or (len(times) < runs and time.perf_counter() < until):
        start = time.perf_counter()
        run(single)
        times.append((time.perf_counter() - start) * 1000)
    return {"p50": float(np.quantile(times, 0.5)), "p95": float(np.quantile(times, 0.95))}


def throughput(run: Runner, many: tuple[Tensor, ...], *, seconds: float = 1.0, runs: int = 20) -> dict[str, Any]:
    """``items_per_second`` at the batch size of ``many``, by the median of 3 to ``runs`` calls after a warm-up, and that ``batch_size``."""
    run(many)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or (len(times) < runs and time.perf_counter() < until):
        start = time.perf_counter()
        run(many)
        times.append(time.perf_counter() - start)
    return {"items_per_second": len(many[0]) / float(np.median(times)), "batch_size": len(many[0])}
