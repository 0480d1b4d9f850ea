"""How answers become columns and columns answers: dense logits in 16 or 32 bits, sparse ones for many classes, and features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from limbeck.cache._manifest import Column
from limbeck.cache._store import Reader
from limbeck.errors import LimbeckError
from limbeck.randomness import uniform
from limbeck.types import Signal, SparseLogits

__all__ = ["Sparse", "Stored", "sparse_differences", "sparse_of"]

Keys = npt.NDArray[np.uint64]
Floats = npt.NDArray[Any]


@dataclass(frozen=True)
class Sparse:
    """top: classes kept exactly, the most probable. samples: classes drawn from the rest. temperature: of the softmax they are drawn from."""

    temperature: float
    top: int
    samples: int

    @property
    def entries(self) -> int:
        return self.top + self.samples


@dataclass(frozen=True)
class Stored:
    """What is stored of a row. classes: of the teacher, None where no logits are kept. features: shape of one row by module path."""

    classes: int | None
    features: dict[str, tuple[int, ...]] = field(default_factory=dict)
    codec: str = "float16"
    sparse: Sparse | None = None

    @property
    def columns(self) -> tuple[Column, ...]:
        kind = "float32" if self.codec == "float32" else "float16"
        found = [Column(f"features/{path}", kind, tuple(shape)) for path, shape in self.features.items()]
        if self.classes is None:
            return tuple(found)
        if self.sparse is None:
            return (Column("logits", kind, (self.classes,)), *found)
        index = "uint16" if self.classes <= 1 << 16 else "uint32"
        width = (min(self.sparse.entries, self.classes),)
        return (Column("index", index, width), Column("weight", "float32", width), Column("entropy", "float32", ()), *found)

    @staticmethod
    def of(columns: tuple[Column, ...], classes: int | None, sparse: Sparse | None, codec: str) -> Stored:
        """What a manifest's columns hold."""
        features = {c.name.removeprefix("features/"): c.shape for c in columns if c.name.startswith("features/")}
        return Stored(classes, features, codec, sparse)

    def encode(self, logits: Floats | None, features: dict[str, Floats], keys: Keys, view: int) -> dict[str, Floats]:
        """Columns from a teacher's raw answers. Raises LimbeckError where a number does not fit."""
        kind = np.float32 if self.codec == "float32" else np.float16
        out = {f"features/{path}": _narrow(values, kind, f"The layer {path}") for path, values in features.items() if path in self.features}
        if self.classes is None or logits is None:
            return out
        if self.sparse is None:
            return {"logits": _narrow(logits, kind, "The teacher's logits"), **out}
        if not np.isfinite(logits).all():
            raise LimbeckError("The teacher's logits have NaN or infinity, which the sparse codec cannot keep.")
        index, weight, entropy = sparse_of(logits, self.sparse, keys, view)
        return {"index": index.astype(self.columns[0].dtype), "weight": weight, "entropy": entropy, **out}

    def read(
        self, reader: Reader, parts: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64] | None
    ) -> Signal:
        """The answers at these places, on the CPU; dense ones as float32. columns: the teacher's output for each class of the data."""
        features = {p: torch.from_numpy(reader.gather(f"features/{p}", parts, rows).astype(np.float32, copy=False)) for p in self.features}
        if self.classes is None:
            return Signal(None, features)
        if self.sparse is None:
            logits = reader.gather("logits", parts, rows)
            if columns is not None:
                logits = logits[:, columns]
            return Signal(torch.from_numpy(logits.astype(np.float32, copy=False)), features)
        index = reader.gather("index", parts, rows).astype(np.int64)
        if columns is not None:
            place = np.empty(self.classes, dtype=np.int64)
            place[columns] = np.arange(self.classes)
            index = place[index]
        weight, entropy = reader.gather("weight", parts, rows), reader.gather("entropy", parts, rows)
        kept = SparseLogits(
            torch.from_numpy(index), torch.from_numpy(weight), torch.from_numpy(entropy), self.classes, self.sparse.temperature
        )
        return Signal(None, features, "sparse", kept)


def _narrow(values: Floats, kind: type[np.floating[Any]], what: str) -> Floats:
    """In the codec's type; minus infinity (a masked class) stays, any other number without a finite value there is refused."""
    with np.errstate(over="ignore"):
        narrow = values.astype(kind)
    if not (np.isfinite(narrow) | (values == -np.inf)).all():
        largest = np.nanmax(np.abs(np.where(np.isfinite(values), values, np.nan)), initial=0)
        hint = (
            "use teacher_cache.codec: float32."
            if (np.isfinite(values) | (values == -np.inf)).all()
            else "they are NaN or infinite already as the teacher gives them."
        )
        raise LimbeckError(f"{what} do not fit {np.dtype(kind).name} (up to {largest:.3g}): {hint}")
    return narrow


def sparse_of(logits: Floats, spec: Sparse, keys: Keys, view: int) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """``(index (N, M), weight (N, M) float32, entropy (N,) float32)`` with M = top + samples (at most the number of classes).

    p is the softmax of the logits at the temperature. The ``top`` most probable classes have their exact probability as weight. The rest, of
    mass r, is represented by ``samples`` classes drawn from it in proportion to p, one from each of as many equal strata of its mass, each of weight
    r / samples: for any function f, the weighted sum of f over the entries has the expectation sum_c p_c f(c), so that value and gradient of a
    cross entropy with p are unbiased (importance sampling with p itself as the proposal; compare Anshumann et al. 2025, "Sparse Logit
    Sampling", arXiv:2503.16870, who draw from the whole of p). The draws are a function of (key, view). The entropy is the exact one of p.
    """
    count, classes = logits.shape
    scaled = logits.astype(np.float64) / spec.temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    mass = np.exp(scaled)
    total = mass.sum(axis=1, keepdims=True)
    p = mass / total
    entropy = np.log(total[:, 0]) - (p * scaled).sum(axis=1)
    if spec.entries >= classes:  # everything fits
        index = np.broadcast_to(np.arange(classes), (count, classes)).copy()
        return index, p.astype(np.float32), entropy.astype(np.float32)
    index = np.empty((count, spec.entries), dtype=np.int64)
    weight = np.empty((count, spec.entries), dtype=np.float32)
    # ties are broken by the number of the class, so that the same logits always keep the same classes
    top = np.argsort(-p, axis=1, kind="stable")[:, : spec.top]
    index[:, : spec.top], weight[:, : spec.top] = top, np.take_along_axis(p, top, axis=1)
    if spec.samples:
        tail = p.copy()
        np.put_along_axis(tail, top, 0.0, axis=1)
        running = np.cumsum(tail, axis=1)
        rest = running[:, -1:]
        draws = uniform(keys, spec.samples, "sparse", view)
        at = (np.arange(spec.samples) + draws) / spec.samples * rest
        for row in range(count):
            found = np.searchsorted(running[row], at[row], side="right")
            # rounding at the end of the sum: the last class that has any mass
            index[row, spec.top :] = np.minimum(found, np.searchsorted(running[row], running[row, -1], side="left"))
        weight[:, spec.top :] = rest / spec.samples
    return index, weight, entropy.astype(np.float32)


_NOTHING = -60.0  # log of a mass that a float32 does not tell well from none
_ROUNDING = 1e-5


def sparse_differences(
    index: npt.NDArray[np.int64], weight: Floats, entropy: Floats, logits: Floats, spec: Sparse, keys: Keys, view: int, shift: float
) -> dict[str, tuple[Floats, Floats]]:
    """How far what :func:`sparse_of` gave, ``(N, M)``, ``(N, M)`` and ``(N,)``, is from a teacher's logits ``(N, C)``, float64: of each row
    ``(difference, allowed)``, ``(N,)`` both.

    Another rounding of the logits, by at most ``shift``, may swap classes that are nearly tied, and move a draw to the next class; so classes are not
    compared, but what they stand for. By at most 2 shift / T may move: the log of a class's share and of the rest's, by how much a class that was
    left out is more probable than one that was kept, and the log odds of the rest's cumulative share, of which the drawn class's part must hold
    the place that was drawn.
    """
    (rows, classes), moved = logits.shape, 2 * shift / spec.temperature
    inside = index < classes
    if not inside.all():
        return {"numbers of classes": (np.where(inside, 0, index - classes + 1).max(1).astype(np.float64), np.full(rows, 0.5))}
    scaled = logits / spec.temperature
    log_p = scaled - scaled.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    share, stored = np.maximum(np.take_along_axis(log_p, index, 1), _NOTHING), _log(weight)
    log_bound = np.full(rows, moved + _ROUNDING)
    h = -(np.exp(log_p) * np.maximum(log_p, -1e4)).sum(1)
    found = {"entropies": (np.abs(entropy - h), np.expm1(moved) * h + np.exp(moved) * moved + _ROUNDING * (1 + h))}
    top = classes if spec.entries >= classes else spec.top
    if top:
        found["shares of the most probable classes"] = (np.abs(stored - share)[:, :top].max(1), log_bound)
    if top == classes:
        return found
    tail = log_p.copy()
    np.put_along_axis(tail, index[:, :top], -np.inf, 1)
    if top:
        found["most probable classes"] = (np.maximum(tail.max(1), _NOTHING) - share[:, :top].min(1), log_bound)
    if spec.samples:
        mass = np.exp(tail)
        rest = mass.sum(1, keepdims=True)
        found["shares of the rest"] = (np.abs(stored[:, top:] - _log(rest / spec.samples)).max(1), log_bound)
        until = np.cumsum(mass, 1) / np.maximum(rest, np.exp(_NOTHING))
        drawn = index[:, top:]
        upper = np.take_along_axis(until, drawn, 1)
        lower = np.where(drawn > 0, np.take_along_axis(until, np.maximum(drawn - 1, 0), 1), 0.0)
        at = _log_odds((np.arange(spec.samples) + uniform(keys, spec.samples, "sparse", view)) / spec.samples)
        beside = np.maximum(np.maximum(_log_odds(lower) - at, at - _log_odds(upper)), 0.0)
        found["places of the drawn classes"] = (np.where(rest > np.exp(_NOTHING), beside, 0.0).max(1), log_bound)
    return found


def _log(mass: Floats) -> Floats:
    found: Floats = np.log(np.maximum(mass.astype(np.float64), np.exp(_NOTHING)))
    return found


def _log_odds(share: Floats) -> Floats:
    inside: Floats = np.clip(share, 1e-6, 1 - 1e-6)  # nearer to an end the sum's own rounding counts
    odds: Floats = np.log(inside) - np.log1p(-inside)
    return odds
