"""Sample ids: 128-bit xxh3 hashes of raw content, never of labels, so that a sample is the same sample wherever it stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from limbeck.randomness import mix

__all__ = ["Ids", "array_id", "array_ids", "bytes_id", "from_digests", "groups", "pair_ids", "rows_of", "text_ids"]

Ids = npt.NDArray[np.uint64]
"""``(N, 2)`` uint64: the two words of each hash, the high one first."""


def from_digests(digests: Iterable[bytes]) -> Ids:
    """``(N, 2)`` uint64 from 16-byte digests."""
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)


def bytes_id(content: bytes) -> bytes:
    """The digest of a file's bytes."""
    return xxhash.xxh3_128_digest(content)


def array_id(sample: npt.NDArray[np.generic]) -> bytes:
    """The digest of one array: its bytes, then its type and shape (images: uint8 in height, width, channel order)."""
    digest = xxhash.xxh3_128(np.ascontiguousarray(sample).tobytes())
    digest.update(f"{sample.dtype.str}{sample.shape}".encode())
    return digest.digest()


def array_ids(samples: Sequence[npt.NDArray[np.generic]] | npt.NDArray[np.generic]) -> Ids:
    """The ids of every ``samples[i]``."""
    return from_digests(array_id(sample) for sample in samples)


def text_ids(texts: Sequence[str], pairs: Sequence[str | None] | None = None) -> Ids:
    """The ids of texts or of pairs of texts."""
    # surrogatepass: JSON may hold lone surrogates, which are still content
    if pairs is None:
        return from_digests(xxhash.xxh3_128_digest(f"{t}\x1f".encode("utf-8", "surrogatepass")) for t in texts)
    both = (f"{t}\x1f{p or ''}" for t, p in zip(texts, pairs, strict=True))
    return from_digests(xxhash.xxh3_128_digest(b.encode("utf-8", "surrogatepass")) for b in both)


def pair_ids(first: Ids, second: Ids) -> Ids:
    """``(N, 2)``: an id for each ordered pair of samples, as mixup makes one of two."""
    words = [*first.T, *second.T]
    out = np.empty_like(first)
    for place, start in enumerate((np.uint64(0x6A09E667F3BCC908), np.uint64(0xBB67AE8584CAA73B))):  # two unrelated beginnings: 128 bits
        state = np.full(len(first), start)
        for word in words:
            state = mix(state ^ word)
        out[:, place] = state
    return out


def groups(ids: Ids) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """``(first, group)``: rows with equal ids share a group; ``first[g]`` is the first row of group g, ``group`` is ``(N,)``.

    Groups are numbered in id order, so that they do not depend on the order of rows.
    """
    if not len(ids):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    by_id = np.lexsort((np.arange(len(ids)), ids[:, 1], ids[:, 0]))
    ordered = ids[by_id]
    starts = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    group = np.empty(len(ids), np.int64)
    group[by_id] = np.cumsum(starts) - 1
    return by_id[starts].astype(np.int64), group


def rows_of(wanted: Ids, keys: Ids) -> npt.NDArray[np.int64]:
    """The first row of ``keys``, ``(N, 2)``, that is each of ``wanted``, ``(M, 2)``; -1 where there is none. Arrays alone: a mapping of tuples takes
    200 bytes a key."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal ones the first row of the split comes first
    high, low = keys[order, 0], keys[order, 1]
    at = np.searchsorted(high, wanted[:, 0])
    rows = np.full(len(wanted), -1, dtype=np.int64)
    open_ = np.flatnonzero(at < len(keys))
    while len(open_):  # once, but for keys that agree in their first word
        place = at[open_]
        same = high[place] == wanted[open_, 0]
        hit = same & (low[place] == wanted[open_, 1])
        rows[open_[hit]] = order[place[hit]]
        at[open_] += 1
        open_ = open_[same & ~hit & (place + 1 < len(keys))]
    return rows
