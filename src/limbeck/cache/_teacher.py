"""A teacher that has already spoken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from limbeck.cache._codec import Sparse, Stored, sparse_differences
from limbeck.cache._store import Reader
from limbeck.errors import LimbeckError, UsageError
from limbeck.teacher import Asking, Coming
from limbeck.types import Batch, Needs, Signal

__all__ = ["CachedTeacher", "compare"]

Keys = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]
Floats = npt.NDArray[Any]


class CachedTeacher:
    """Reads what a teacher said of each (sample, view). ``hits`` counts the samples that it answered for.

    columns: ``(C,)`` int64, the teacher's output for each class of the data, or None. views: how many there are; a batch's view counts modulo it.
    """

    def __init__(self, reader: Reader, stored: Stored, columns: Int64 | None, device: torch.device, views: int) -> None:
        self.reader, self.stored, self.columns, self.device, self.views = reader, stored, columns, device, views
        self.identity: dict[str, Any] = reader.manifest.identity["teacher"]
        self.hits = 0

    def __call__(self, batch: Batch, needs: Needs) -> Signal:
        """batch: of any device; its ids are enough. Features by token are cut to the batch's own length."""
        keys = batch.ids if batch.keys is None else batch.keys
        view = batch.view % self.views
        parts, rows = self.reader.locate(keys, view)
        if (parts < 0).any():
            high, low = keys[int(np.argmax(parts < 0))].tolist()
            raise LimbeckError(f"{self.reader.folder} has no answer for the sample {high:016x}{low:016x} under view {view}.")
        signal = self.stored.read(self.reader, parts, rows, self.columns)
        self.hits += len(batch)
        mask = batch.student.get("attention_mask")
        if mask is not None and signal.features:
            cut = {k: v[:, : mask.shape[1]] if v.ndim == 3 else v for k, v in signal.features.items()}
            signal = replace(signal, features=cut)
        return signal.to(self.device)

    def ahead(self, coming: Coming, asked: Asking) -> Coming:
        return coming


def compare(told: Signal, live: Signal, *, half: bool, folder: Path, ids: Keys, sparse: Sparse | None = None, view: int = 0) -> None:
    """Refuse a cache whose answers are not the teacher's own, beyond codec and rounding.

    half: the cache was filled in bf16 or fp16. The bound is relative to the largest value: 2^-9 for a codec of 16 bits and another composition of
    the batch, 2^-3 where the teacher ran in half precision. sparse: how sparse answers to ``ids`` under ``view`` were drawn; live has the logits.
    Raises: UsageError.
    """
    pairs = {f"layer {k}": (v, live.features[k]) for k, v in told.features.items()}
    if told.logits is not None and live.logits is not None:
        pairs["logits"] = (told.logits, live.logits)
    bound = 2.0**-3 if half else 2.0**-9
    for what, (a, b) in pairs.items():
        x, y = a.double().cpu().flatten(1), b.double().cpu().flatten(1)
        both = x.isfinite() & y.isfinite()
        difference = torch.where(both, (x - y).abs(), torch.where(x == y, 0.0, torch.inf)).amax(1)
        allowed = bound * max(1.0, float(torch.where(both, y.abs(), 0.0).max()))
        _refuse_other(what, difference.numpy(), allowed, folder, ids)
    if told.sparse is not None and live.logits is not None and sparse is not None:
        logits = live.logits.double().cpu().numpy()
        entries = (told.sparse.index.cpu().numpy(), told.sparse.weight.double().cpu().numpy(), told.sparse.entropy.double().cpu().numpy())
        shift = bound * max(1.0, float(np.abs(logits).max()))
        for what, (moved, of_each) in sparse_differences(*entries, logits, sparse, ids, view, shift).items():
            _refuse_other(what, moved, of_each, folder, ids)


def _refuse_other(what: str, difference: Floats, allowed: Floats | float, folder: Path, ids: Keys) -> None:
    """difference: ``(N,)`` of each row; allowed: of each, or of all."""
    excess = np.where(np.isnan(difference), np.inf, difference) / allowed
    worst = int(excess.argmax())
    if excess[worst] > 1:
        high, low = ids[worst].tolist()
        raise UsageError(
            f"The cache {folder} does not answer as the teacher does: the {what} differ by up to {float(difference[worst]):.3g} "
            f"(sample {high:016x}{low:016x}; {len(ids)} were compared, {float(np.broadcast_to(allowed, excess.shape)[worst]):.3g} is allowed). "
            "The teacher computes something else than when it was asked: name another teacher_cache.path, or remove this one (limbeck cache rm)."
        )
