"""The losses, one file a family, and one visible table of them.

To add a loss, write the function (or module) and its row: recipes, ``limbeck losses`` and the property tests read the table.
"""

from __future__ import annotations

from limbeck.losses._seam import Layer, LossEntry, Parameter, PerClass, Schedulable, raised
from limbeck.losses.features import Hint
from limbeck.losses.logits import cross_entropy, kd, kd_sparse

__all__ = ["LOSSES", "Hint", "Layer", "LossEntry", "Parameter", "PerClass", "Schedulable", "cross_entropy", "kd", "kd_sparse", "raised"]

LOSSES: dict[str, LossEntry] = {
    entry.name: entry
    for entry in (
        LossEntry(
            name="kd",
            function=kd,
            reads=("student.logits", "teacher.logits"),
            per_item=True,
            zero_at={},
            shift_invariant=True,
            summary="The classic: match the teacher's softened probabilities. Start here; it also learns from unlabelled samples.",
            source="Hinton et al. 2015, arXiv:1503.02531",
            example={"temperature": 4.0},
            sparse=kd_sparse,
        ),
        LossEntry(
            name="cross_entropy",
            function=cross_entropy,
            reads=("student.logits", "labels"),
            per_item=True,
            zero_at=None,
            shift_invariant=True,
            summary="Match the labels. Beside kd wherever labels can be trusted; alone, it is training without a teacher.",
            source="torch.nn.functional.cross_entropy",
            example={"label_smoothing": 0.1},
        ),
        LossEntry(
            name="hint",
            function=Hint,
            reads=("student.features", "teacher.features"),
            per_item=True,
            zero_at={"projector": "none"},
            shift_invariant=False,
            summary="Match a layer inside the teacher through a learned projection. Add to kd where the student is thin or data scarce.",
            source="Romero et al. 2015 (FitNets), arXiv:1412.6550",
            example={"student": "layer3", "teacher": "layer3", "projector": "auto"},
        ),
    )
}
