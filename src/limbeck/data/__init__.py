"""Data: sources, splits, views and batches.

A source gives raw samples by row; a split says which rows, with their ids and labels; a plan says which of them an optimiser step reads; a
builder makes the batch, each model's inputs from the same view; a stream does so ahead of time.
"""

from __future__ import annotations

from limbeck.data.batches import (
    BatchBuilder,
    Plan,
    Request,
    Several,
    StagedBuilder,
    StagedPlan,
    cuts,
    evaluation_requests,
    nested,
    same_inputs,
)
from limbeck.data.ids import groups, rows_of
from limbeck.data.keys import view_keys
from limbeck.data.load import FORMS, load_data
from limbeck.data.loader import choose_workers, stream
from limbeck.data.python import data_from_python
from limbeck.data.show import skipped_csv, text_of, thumbnail
from limbeck.data.sources import Raw, Source
from limbeck.data.splits import SKIPPED, Data, Split, carve
from limbeck.data.text import token_lengths
from limbeck.data.views import augmentation

__all__ = [
    "FORMS",
    "SKIPPED",
    "BatchBuilder",
    "Data",
    "Plan",
    "Raw",
    "Request",
    "Several",
    "Source",
    "Split",
    "StagedBuilder",
    "StagedPlan",
    "augmentation",
    "carve",
    "choose_workers",
    "cuts",
    "data_from_python",
    "evaluation_requests",
    "groups",
    "load_data",
    "nested",
    "rows_of",
    "same_inputs",
    "skipped_csv",
    "stream",
    "text_of",
    "thumbnail",
    "token_lengths",
    "view_keys",
]
