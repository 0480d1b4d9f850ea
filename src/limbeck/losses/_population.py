"""The training rows as a contrastive loss sees them: places in a memory, and others to tell a sample from."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.randomness import uniform

__all__ = ["Population"]

Ids = np.ndarray[Any, np.dtype[np.uint64]]
Int64 = npt.NDArray[np.int64]


class Population:
    """Places 0 .. N - 1 of the training rows, in the order of (class, id), so that the order of the data decides nothing; equal samples share one.

    ids: (N, 2) uint64. labels: (N,) int64, -1 for a row without label.
    """

    def __init__(self, ids: Ids, labels: Int64) -> None:
        found, first = np.unique(ids, axis=0, return_index=True)
        order = np.lexsort((found[:, 1], found[:, 0], labels[first]))
        self._ids = np.ascontiguousarray(found).view([("a", np.uint64), ("b", np.uint64)]).ravel()  # sorted, as np.unique gives them
        self._places = np.empty(len(order), dtype=np.int64)
        self._places[order] = np.arange(len(order))
        classes = labels[first][order]
        start = np.searchsorted(classes, classes, side="left")
        stop = np.searchsorted(classes, classes, side="right")
        alone = classes < 0
        own = np.arange(len(order))
        self._start, self._stop = np.where(alone, own, start), np.where(alone, own + 1, stop)
        one = self._stop - self._start == len(order)  # no other class: all but the sample itself
        self._start, self._stop = np.where(one, own, self._start), np.where(one, own + 1, self._stop)

    def __len__(self) -> int:
        return len(self._places)

    def places(self, ids: Ids) -> Int64:
        """(B, 2) ids -> (B,). Raises KeyError for a sample that is not among the training rows."""
        wanted = np.ascontiguousarray(ids).view(self._ids.dtype).ravel()
        at = np.minimum(np.searchsorted(self._ids, wanted), len(self._ids) - 1)
        if not (self._ids[at] == wanted).all():
            raise KeyError("a sample of the batch is not among the training rows")
        return self._places[at]

    def drawn(self, ids: Ids, count: int, *key: str | int) -> Int64:
        """(B, 1 + count): each sample's own place, and places of others, with replacement, each as likely: of another class where the sample has a
        label, else any but itself. A function of (key, id) alone, however samples are put into batches."""
        places = self.places(ids)
        start, width = self._start[places, None], (self._stop - self._start)[places, None]
        others = (uniform(ids, count, *key) * (len(self) - width)).astype(np.int64)
        return np.concatenate([places[:, None], others + width * (others >= start)], axis=1)
