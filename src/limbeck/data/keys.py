"""What a view was made of, without making it."""

from __future__ import annotations

import numpy as np

from limbeck.data.ids import Ids, pair_ids
from limbeck.data.splits import Split
from limbeck.data.views import Partners
from limbeck.recipe import Augment

__all__ = ["view_keys"]


def view_keys(split: Split, augment: Augment | None, data_seed: int, view: int) -> Ids:
    """``(N, 2)`` uint64: :attr:`limbeck.types.Batch.keys` of every row of a split, as a :class:`BatchBuilder` of that split gives them."""
    if augment is None or not augment.mixup:
        return split.ids
    return pair_ids(split.ids, split.ids[Partners(split, data_seed).of(np.arange(len(split)), view)])
