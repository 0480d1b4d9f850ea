"""The losses, one file a family, and one visible table of them.

To add a loss, write the function (or module) and its row in ``_table.py``: recipes, ``limbeck losses`` and the property tests read the table.
"""

from __future__ import annotations

from limbeck.losses._seam import Layer, LossEntry, Parameter, PerClass, Schedulable, raised, shaped
from limbeck.losses._table import LOSSES
from limbeck.losses.divergences import fkl, hard, jsd, kd_sigmoid, mse_logits, rkl, soft_cross_entropy
from limbeck.losses.features import Hint
from limbeck.losses.logits import cross_entropy, kd, kd_sparse
from limbeck.losses.relations import dist
from limbeck.losses.targets import dkd, nkd, wsld

__all__ = [
    "LOSSES",
    "Hint",
    "Layer",
    "LossEntry",
    "Parameter",
    "PerClass",
    "Schedulable",
    "cross_entropy",
    "dist",
    "dkd",
    "fkl",
    "hard",
    "jsd",
    "kd",
    "kd_sigmoid",
    "kd_sparse",
    "mse_logits",
    "nkd",
    "raised",
    "rkl",
    "shaped",
    "soft_cross_entropy",
    "wsld",
]
