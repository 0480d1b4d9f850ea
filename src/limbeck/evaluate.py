"""Metrics, calibration, agreement, latency: what is printed was measured here."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.data import BatchBuilder, Split, evaluation_requests, stream
from limbeck.engine import Engine
from limbeck.models import Model
from limbeck.randomness import forked, seed_for, uniform
from limbeck.ranks import ALONE, Ranks
from limbeck.types import Batch, Inputs

__all__ = ["agreement", "bootstrap_interval", "latency", "metrics", "predict", "seeds_interval", "throughput"]

Logits = np.ndarray[Any, np.dtype[np.float64]]
ECE_BINS = 15
_PIECE = 1 << 22  # logits that are looked at at once


def predict(
    ask: Callable[[Batch], Tensor],
    split: Split,
    builder: BatchBuilder,
    engine: Engine,
    *,
    batch_size: int,
    lengths: np.ndarray[Any, Any] | None = None,
    workers: int = 0,
    tick: Callable[[int], None] = lambda n: None,
    ranks: Ranks = ALONE,
) -> Logits:
    """``(N, C)`` float64 logits of every row of ``split``, in the split's order, each row asked once (no padding rows).

    ask: a batch on ``engine``'s device -> ``(B, C)`` logits. The caller has put the model into eval mode. Several ranks share the batches, which are
    the same for any number of ranks, and each gets the logits of all. What a model draws while it answers is that of the batch.
    """
    found: Logits | None = None
    requests = evaluation_requests(split, batch_size, lengths)[ranks.rank :: ranks.size]
    with torch.no_grad(), engine.autocast(), forked("evaluate"):
        for request, batch in stream(builder, requests, workers=workers, pin_memory=False):
            engine.seed(seed_for("evaluate", request.step))
            logits = ask(engine.send(batch)).double().cpu().numpy()
            if found is None:
                found = np.zeros((len(split), logits.shape[1]), dtype=np.float64)
            found[request.rows] = logits
            tick(len(batch))
    classes = ranks.sum([found.shape[1] if found is not None and ranks.main else 0])[0]
    assert classes, "an empty split is refused before training"
    if found is None:
        found = np.zeros((len(split), classes), dtype=np.float64)
    ranks.add(found)
    return found


def metrics(logits: Logits, labels: np.ndarray[Any, Any]) -> dict[str, float]:
    """accuracy, macro_f1, nll (nats, mean over items) and ece (15 equal-width confidence bins, L1; Guo et al. 2017, arXiv 1706.04599, section 2).

    logits: ``(N, C)`` float64; labels: ``(N,)`` in ``0 .. C - 1``. macro_f1 averages over the classes that occur in labels or answers.
    """
    scores, target = torch.from_numpy(logits), torch.from_numpy(np.asarray(labels, dtype=np.int64))
    answers = scores.argmax(-1)
    rows = max(1, _PIECE // scores.shape[1])  # with many classes a second copy of all logits would be large
    found = [_of_rows(*piece) for piece in zip(torch.split(scores, rows), torch.split(target, rows), strict=True)]
    losses, confidence = (torch.cat(column) for column in zip(*found, strict=True))
    return {
        "accuracy": float((answers == target).double().mean()),
        "macro_f1": _macro_f1(answers, target, scores.shape[1]),
        "nll": float(losses.mean()),
        "ece": _calibration_error(confidence, answers == target),
    }


def _of_rows(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``(N,)`` each: the loss in nats, and the probability of the answer."""
    log_probabilities = scores.log_softmax(-1)
    return -log_probabilities.gather(1, target[:, None])[:, 0], log_probabilities.amax(-1).exp()


def _macro_f1(answers: Tensor, target: Tensor, classes: int) -> float:
    """2 x hits / (answered + labelled) of each class, averaged. answers, target: ``(N,)``."""
    hits = torch.bincount(target[answers == target], minlength=classes)
    both = torch.bincount(answers, minlength=classes) + torch.bincount(target, minlength=classes)
    return float((2 * hits[both > 0].double() / both[both > 0]).mean())


def _calibration_error(confidence: Tensor, right: Tensor) -> float:
    """The mean over items of |accuracy - mean confidence| of the bin that each is in; a bin holds its lower bound. confidence, right: ``(N,)``."""
    inner = torch.linspace(0, 1, ECE_BINS + 1, dtype=confidence.dtype)[1:-1]
    excess = right.to(confidence.dtype) - confidence
    sums = torch.zeros(ECE_BINS, dtype=confidence.dtype).index_add(0, torch.bucketize(confidence, inner, right=True), excess)
    return float(sums.abs().sum() / len(confidence))


def agreement(a: Logits, b: Logits) -> float:
    """The share of items on which both answer the same class."""
    return float((a.argmax(1) == b.argmax(1)).mean())


def bootstrap_interval(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], seed: int, level: float = 0.95, draws: int = 2000) -> list[float]:
    """Percentile interval of mean(a) - mean(b) over paired test items (Efron 1979): the noise of a finite test set, not of training.

    a, b: ``(N,)``, e.g. 1.0 where the item was answered correctly.
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    count = len(difference)
    means = np.empty(draws)
    for i in range(draws):
        counter = np.arange(i * count, (i + 1) * count, dtype=np.uint64)
        means[i] = difference[(uniform(counter, 1, seed_for(seed, "bootstrap"))[:, 0] * count).astype(np.int64)].mean()
    tail = (1 - level) / 2
    return [float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))]


# Two-sided 95 % quantiles of Student's t for 1 .. 30 degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def seeds_interval(differences: list[float]) -> list[float]:
    """95 % t interval of the mean of paired differences, one a seed (at least two)."""
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    t = _T95[min(len(differences) - 1, len(_T95)) - 1]
    return [mean - t * error, mean + t * error]


def latency(model: Model, inputs: Inputs, *, seconds: float = 2.0, runs: int = 200) -> dict[str, float]:
    """Milliseconds of one call on a batch of one, on this machine: {"p50", "p95"} over up to ``runs`` calls or ``seconds``, after a warm-up.

    inputs: on the model's device, batch size 1. The model is in eval mode.
    """
    times = _times(model, inputs, seconds, runs)
    return {"p50": float(np.quantile(times, 0.5)) * 1000, "p95": float(np.quantile(times, 0.95)) * 1000}


def throughput(model: Model, inputs: Inputs, *, seconds: float = 1.0, runs: int = 20) -> float:
    """Items a second at the batch size of ``inputs`` (median of the calls)."""
    size = len(next(iter(inputs.values())))
    return size / float(np.median(_times(model, inputs, seconds, runs)))


def _times(model: Model, inputs: Inputs, seconds: float, runs: int) -> list[float]:
    times: list[float] = []
    device = next(iter(inputs.values())).device

    def call() -> float:
        start = time.perf_counter()
        model(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.no_grad():
        for _ in range(3):
            call()
        end = time.perf_counter() + seconds
        while len(times) < runs and (len(times) < 3 or time.perf_counter() < end):
            times.append(call())
    return times
