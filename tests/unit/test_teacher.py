"""A live teacher: its own inputs, its outputs in the order of the data's classes, and nothing of it moves."""

from __future__ import annotations

import numpy as np
import torch

from limbeck.engine import Engine
from limbeck.models import state_hash, wrap_module
from limbeck.teacher import LiveTeacher
from limbeck.types import Batch, Needs
from support import CLASSES, Big, made, tensors, toy_data

COLUMNS = np.array([2, 0, 3, 1])


def live(columns: np.ndarray | None = None) -> LiveTeacher:
    module = made(Big, "teacher").train()
    return LiveTeacher(wrap_module(module, role="teacher", data=toy_data()), Engine(torch.device("cpu"), "float64"), columns)


def batch_of(student: torch.Tensor, teacher: torch.Tensor) -> Batch:
    count = len(student)
    ids, labels, mask = np.zeros((count, 2), np.uint64), torch.full((count,), -1), torch.ones(count, dtype=torch.bool)
    return Batch(ids, 0, {"x": student}, {"x": teacher}, labels, mask)


def test_it_answers_to_its_own_inputs_in_eval_mode_without_gradient() -> None:
    teacher = live()
    student_x, teacher_x = tensors(5)[0], tensors(5, 1)[0]
    before = state_hash(teacher.model.module)
    signal = teacher(batch_of(student_x, teacher_x), Needs(features=("body", "norm")))
    plain = made(Big, "teacher").eval()
    assert signal.logits is not None
    torch.testing.assert_close(signal.logits, plain(teacher_x).detach(), rtol=0, atol=0)
    torch.testing.assert_close(signal.features["body"], plain.body(teacher_x).detach(), rtol=0, atol=0)
    assert not any(t.requires_grad for t in (signal.logits, *signal.features.values()))
    assert state_hash(teacher.model.module) == before
    assert teacher.meter.items == 5


def test_its_outputs_come_in_the_order_of_the_datas_classes() -> None:
    x = tensors(5)[0]
    raw, mapped = (live(c)(batch_of(x, x), Needs()).logits for c in (None, COLUMNS))
    assert raw is not None
    assert mapped is not None
    for j in range(CLASSES):
        assert torch.equal(mapped[:, j], raw[:, COLUMNS[j]])
    assert np.array_equal(live(COLUMNS).in_data_order(raw.numpy()), mapped.numpy())
    assert np.array_equal(live().in_data_order(raw.numpy()), raw.numpy())
