"""Randomness without state: every draw is a pure function of (seed, what it is for, which item).

Nothing here reads or advances a global generator, so a run that is resumed, or read by another number of workers, draws the same numbers.
The generator is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") used as a hash of its counter; it is
written out, vectorised, because NumPy does not promise the same stream across its versions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import xxhash

__all__ = ["forked", "mix", "order", "seed_for", "uniform"]

U64 = np.ndarray[Any, np.dtype[np.uint64]]


def mix(x: U64) -> U64:
    """SplitMix64's finaliser, element by element: uint64 in, well-mixed uint64 out (any shape)."""
    with np.errstate(over="ignore"):
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed from the parts that name a draw, e.g. ``seed_for(recipe.seed, "student")``.

    >>> seed_for(0, "student") == seed_for(0, "student"), seed_for(0, "student") == seed_for(1, "student")
    (True, False)
    """
    return xxhash.xxh3_64_intdigest("\x1f".join(str(p) for p in parts).encode()) >> 1


def uniform(ids: U64, draws: int, *key: int | str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``(len(ids), draws)`` float64 in [0, 1): row i depends only on ``ids[i]`` and ``key``, not on its neighbours.

    ids: ``(B,)`` uint64, or ``(B, 2)`` of which both words are used. key: e.g. ``(data seed, "crop", view)``.
    """
    words = ids if ids.ndim == 1 else mix(ids[:, 0]) ^ ids[:, 1]
    base = mix(words ^ np.uint64(seed_for(*key)))
    counters = mix(base[:, None] ^ mix(np.arange(draws, dtype=np.uint64))[None, :])
    return (counters >> np.uint64(11)).astype(np.float64) * 2.0**-53


def order(count: int, *key: int | str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A permutation of ``range(count)`` that is a function of ``key`` alone, e.g. ``order(n, seed, "order", epoch)``."""
    keys = mix(mix(np.arange(count, dtype=np.uint64)) ^ np.uint64(seed_for(*key)))
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


@contextmanager
def forked(*key: int | str) -> Iterator[None]:
    """Run a block under generators seeded by ``key`` (torch, NumPy's global one, ``random``) and put the old states back.

    Used for what draws from global generators and cannot be asked not to: initial weights of modules, users' own callables, dropout.
    """
    seed = seed_for(*key)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
