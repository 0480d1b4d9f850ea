"""The losses, one file a family, and one visible table of them.

To add a loss, write the function (or module) and its row in ``_table.py``: recipes, ``limbeck losses`` and the property tests read the table.
"""

from __future__ import annotations

from limbeck.losses._population import Population
from limbeck.losses._seam import AUTO, Layer, LossEntry, Parameter, PerClass, Schedulable, raised, shaped
from limbeck.losses._table import LOSSES
from limbeck.losses.contrast import Crd
from limbeck.losses.divergences import fkl, hard, jsd, kd_sigmoid, mse_logits, rkl, soft_cross_entropy
from limbeck.losses.exits import Byot, OfaExits, ofa
from limbeck.losses.features import Correlation, Cosine, Hint
from limbeck.losses.logits import cross_entropy, kd, kd_sparse
from limbeck.losses.maps import Ofd, Review, Vid, attention_transfer, nst
from limbeck.losses.peers import Kdcl, MeanTeacher, Mutual, Peers
from limbeck.losses.relations import cka, correlation_rbf, dist, pkt, rkd_angle, rkd_distance, similarity_preserving
from limbeck.losses.targets import dkd, nkd, wsld
from limbeck.losses.transformers import minilm, minilm_v2, patient, tinybert_attention, tinybert_scores

__all__ = [
    "AUTO",
    "LOSSES",
    "Byot",
    "Correlation",
    "Cosine",
    "Crd",
    "Hint",
    "Kdcl",
    "Layer",
    "LossEntry",
    "MeanTeacher",
    "Mutual",
    "OfaExits",
    "Ofd",
    "Parameter",
    "Peers",
    "PerClass",
    "Population",
    "Review",
    "Schedulable",
    "Vid",
    "attention_transfer",
    "cka",
    "correlation_rbf",
    "cross_entropy",
    "dist",
    "dkd",
    "fkl",
    "hard",
    "jsd",
    "kd",
    "kd_sigmoid",
    "kd_sparse",
    "minilm",
    "minilm_v2",
    "mse_logits",
    "nkd",
    "nst",
    "ofa",
    "patient",
    "pkt",
    "raised",
    "rkd_angle",
    "rkd_distance",
    "rkl",
    "shaped",
    "similarity_preserving",
    "soft_cross_entropy",
    "tinybert_attention",
    "tinybert_scores",
    "wsld",
]
