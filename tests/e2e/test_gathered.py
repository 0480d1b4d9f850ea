"""A relational loss compares the items of a batch: on several ranks those of all of them, with gradient, so that ranks end as one process does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.data import Plan, StagedPlan
from limbeck.losses import LOSSES
from limbeck.objective import Objective
from limbeck.ranks import ALONE
from limbeck.recipe import Term
from relational import TERMS, TESTED, fit_once, fit_together
from support import Big, Small, made, run_fit, settings, tensors, toy_data


@pytest.fixture(autouse=True)
def losses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TESTED.items():
        monkeypatch.setitem(LOSSES, name, value)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_end_in_the_weights_of_one_process(tmp_path: Path, size: int) -> None:
    alone = fit_once(tmp_path / "alone", ALONE, TERMS)
    for found in fit_together(tmp_path, size, TERMS):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-9, err_msg=name)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("alone", "0")]
    for one, other in zip(*([line for line in log if "loss" in line] for log in logs), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-9)
        assert other["terms"] == pytest.approx(one["terms"], rel=1e-9)


def test_ranks_with_other_numbers_of_microbatches_go_together(tmp_path: Path) -> None:
    """Shares of 6, 5 and 5 rows would be cut into 3, 2 and 2 parts: all have 2, and the ranks end with the same weights."""
    first, *others = fit_together(tmp_path, 3, TERMS, accumulate=3)
    for other in others:
        assert all(np.array_equal(first[name], other[name]) for name in first)


def test_one_process_is_the_published_scalar(tmp_path: Path) -> None:
    """Three epochs written plainly: the loss of a step is |G_t - G_s|^2 / N^2 over its N rows."""
    data = toy_data(30)
    objective = Objective.build([Term(loss="similarities", weight=3.0)], classes=data.classes, label_counts=[1] * 4)
    train = settings(
        optimizer="sgd", momentum=0.0, nesterov=False, weight_decay=0.0, lr=0.5, schedule="constant", warmup=0.0, clip_norm=None
    )
    student, _ = run_fit(tmp_path, data=data, objective=objective, train=train)
    x, _ = tensors(30)
    plain, teacher = made(Small, "student"), made(Big, "teacher").eval()
    plan = StagedPlan([Plan(data.train, seed=3, data_seed=0, epochs=3, batch_size=8)])
    for step in range(plan.total_steps):
        rows = data.train.rows[plan.request(step).rows]
        ours, theirs = plain(x[rows]), teacher(x[rows]).detach()
        similar = [m / m.norm(dim=1, keepdim=True) for m in (ours @ ours.T, theirs @ theirs.T)]
        plain.zero_grad()
        (3.0 * (similar[0] - similar[1]).norm() ** 2 / len(rows) ** 2).backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= 0.5 * (0 if parameter.grad is None else parameter.grad)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(student.module.state_dict()[name], value, rtol=0, atol=1e-9)
        assert not torch.equal(value, made(Small, "student").state_dict()[name])
