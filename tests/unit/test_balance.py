"""``weight: auto``: the weight under which a term's gradient is as long as that of the others, however a step is cut and wherever a run stops."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from limbeck.data import Plan, StagedPlan
from limbeck.errors import Interrupted, UsageError
from limbeck.losses import LOSSES
from limbeck.models import wrap_module
from limbeck.objective import Objective, StagedObjective, check_terms
from limbeck.ranks import ALONE
from limbeck.reading import RecipeError, build_recipe, read_yaml
from limbeck.recipe import Term
from limbeck.report import _curves
from relational import TERMS, TESTED, fit_once, fit_together
from support import KD_MIX, Big, Small, made, run_fit, settings, state_bytes, tensors, toy_data

SHAPES: dict[str, Any] = {"shapes_student": {"body": (2, 5)}, "shapes_teacher": {"norm": (2, 16)}}
HINT = Term(loss="hint", weight="auto", student="body", teacher="norm")
CE = Term(loss="cross_entropy", weight=0.3)


def built(terms: list[Term]) -> Objective:
    return Objective.build(terms, classes="abcd", label_counts=[1] * 4, **SHAPES)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in line]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loop_written_plainly_gives_the_same_weights(tmp_path: Path, accumulate: int) -> None:
    """Every 5 steps: |gradient of 0.7 kd + 0.3 cross entropy| / |gradient of the hint| on the student's body, which both reach; the first
    one as it is, then 0.7 of the logarithm of the one before and 0.3 of the new one. The projection, which the hint alone reaches, learns with
    that weight too."""
    data, objective = toy_data(30), built([*KD_MIX, HINT])
    train = settings(
        optimizer="sgd",
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
        lr=0.1,
        schedule="constant",
        warmup=0.0,
        clip_norm=None,
        balance_every=5,
        accumulate=accumulate,
    )
    projection = {name.rpartition(".")[2]: p.detach().double().clone() for name, p in objective.named_parameters()}
    student, _ = run_fit(tmp_path, data=data, objective=objective, train=train)

    x, y = tensors(30)
    plain, teacher = made(Small, "student"), made(Big, "teacher").eval()
    weight, bias = (projection[name].requires_grad_() for name in ("weight", "bias"))
    plan = StagedPlan([Plan(data.train, seed=3, data_seed=0, epochs=3, batch_size=8)])
    balance, seen = 0.0, []
    for step in range(plan.total_steps):
        rows = data.train.rows[plan.request(step).rows]
        hidden, theirs = plain.body(x[rows]), teacher.norm(teacher.body(x[rows])).detach()
        logits, soft = plain(x[rows]), F.log_softmax(teacher(x[rows]).detach() / 6, 1)
        kd = 36 * (soft.exp() * (soft - F.log_softmax(logits / 6, 1))).sum(1).mean()
        fixed = 0.7 * kd + 0.3 * F.cross_entropy(logits, y[rows])
        hint = (hidden @ weight.T + bias - theirs).square().mean()
        body = list(plain.body.parameters())
        if step % 5 == 0:
            lengths = [torch.cat([g.flatten() for g in torch.autograd.grad(v, body, retain_graph=True)]).norm() for v in (fixed, hint)]
            ratio = float(lengths[0] / lengths[1])
            balance = ratio if step == 0 else balance**0.7 * ratio**0.3
        seen.append(balance)
        parameters = [*plain.parameters(), weight, bias]
        gradients = torch.autograd.grad(fixed + balance * hint, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * gradient
        logged = lines(tmp_path)[step]
        assert logged["loss"] == pytest.approx((fixed + balance * hint).item(), rel=1e-9)
        assert logged["terms"]["hint"] == pytest.approx(hint.item(), rel=1e-9)
        assert logged["weights"]["hint"] == pytest.approx(balance, rel=1e-9)
    assert len({round(b, 12) for b in seen}) == 3  # 12 steps: measured at 0, 5 and 10
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(student.module.state_dict()[name], value, rtol=1e-9, atol=1e-12)
    for name, value in objective.named_parameters():
        torch.testing.assert_close(value, {"weight": weight, "bias": bias}[name.rpartition(".")[2]], rtol=1e-9, atol=1e-12)


def test_ranks_balance_as_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uneven shares, a last step that one rank has no rows of, and a relational loss, whose gradient is gathered."""
    for name, value in TESTED.items():
        monkeypatch.setitem(LOSSES, name, value)
    terms = [t.model_copy(update={"weight": "auto"}) if t.loss in ("projected", "of_one_class") else t for t in TERMS]
    alone = fit_once(tmp_path / "alone", ALONE, terms)
    assert alone["balance"].shape == (2,)
    assert (alone["balance"] != 1).all()
    for found in fit_together(tmp_path, 2, terms):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-8, atol=1e-9, err_msg=name)


def test_a_stop_at_every_step_ends_in_the_same_bytes(tmp_path: Path) -> None:
    data = toy_data(40)
    train = settings(accumulate=2, balance_every=4, gradient_checkpointing=["body"], ema=0.9)

    def go(folder: Path, left: int | None) -> dict[str, bytes]:
        student = wrap_module(made(Small, "student", dropout=0.3), role="student", data=data)
        objective, count = built([*KD_MIX, HINT]), iter(range(1000))
        model, _ = run_fit(
            folder, data=data, student=student, objective=objective, train=train, stop=lambda: left is not None and next(count) >= left
        )
        return state_bytes(model.module) | state_bytes(objective)

    whole = go(tmp_path / "whole", None)
    assert "balance" in whole
    for step in range(15):
        folder = tmp_path / f"stopped-{step}"
        with pytest.raises(Interrupted):
            go(folder, step)
        assert go(folder, None) == whole, f"stopped after step {step + 1}"


def test_computing_blocks_again_changes_nothing(tmp_path: Path) -> None:
    found = [
        state_bytes(run_fit(tmp_path / name, objective=built([*KD_MIX, HINT]), train=settings(gradient_checkpointing=blocks))[0].module)
        for name, blocks in (("kept", False), ("again", ["body"]))
    ]
    assert found[0] == found[1]


def test_each_stage_begins_with_a_measurement_of_its_own(tmp_path: Path) -> None:
    data = toy_data(30)
    stages = StagedObjective([built([*KD_MIX, HINT]), built([CE, HINT])])
    plans = [Plan(data.train, seed=3, data_seed=0, epochs=n, batch_size=8, first_epoch=i, stage=i) for i, n in enumerate((1, 2))]
    student = {"epochs": 3, "balance_every": 3}
    run_fit(tmp_path, data=data, objective=stages, train=settings(**student), plan=StagedPlan(plans))
    weights = [line["weights"]["hint"] for line in lines(tmp_path)]
    changed = [0] + [i for i in range(1, len(weights)) if weights[i] != weights[i - 1]]
    assert changed == [0, 3, 4, 7, 10]


def test_a_term_without_gradient_keeps_its_weight() -> None:
    objective = built([CE, HINT])
    for ratio in (0.0, float("nan"), float("inf")):
        objective.rebalance(0, torch.tensor(ratio), first=True)
        assert objective.weights(0.0) == {"cross_entropy": 0.3, "hint": 1.0}
    objective.rebalance(0, torch.tensor(16.0), first=True)
    objective.rebalance(0, torch.tensor(1.0), first=False)
    assert objective.weights(0.0)["hint"] == pytest.approx(16**0.7)


def test_the_first_gradient_that_is_not_zero_decides() -> None:
    """Nothing was measured before it that it could be averaged with."""
    objective = built([CE, HINT])
    objective.rebalance(0, torch.tensor(0.0), first=True)
    objective.rebalance(0, torch.tensor(16.0), first=False)
    assert objective.weights(0.0)["hint"] == pytest.approx(16)
    objective.rebalance(0, torch.tensor(1.0), first=False)
    assert objective.weights(0.0)["hint"] == pytest.approx(16**0.7)


def test_something_must_have_a_number() -> None:
    [problem] = check_terms([HINT])
    assert problem.where == "objective.0.weight"
    assert "no term with a number above 0" in problem.message
    assert not check_terms([CE, HINT])


def test_a_recipe_keeps_auto_and_says_what_it_allows(tmp_path: Path) -> None:
    terms = [{"loss": "kd", "weight": "auto"}, {"loss": "cross_entropy"}]
    plain = {"teacher": {"model": "python:a.py:b"}, "student": {"model": "python:a.py:c"}, "data": {"source": "digits"}}
    recipe = build_recipe({**plain, "objective": terms, "train": {"balance_every": 10}}, command="distill")
    assert recipe.objective[0].weight == "auto"
    assert "weight: auto" in recipe.to_yaml()
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert build_recipe(read_yaml(tmp_path / "recipe.yaml"), command="distill") == recipe
    with pytest.raises(RecipeError, match=r"train.balance_every.*no term has weight: auto"):
        build_recipe({**plain, "train": {"balance_every": 10}}, command="distill")
    with pytest.raises(UsageError, match=r"objective.0.weight.*'automatic'.*'auto'"):
        build_recipe({**plain, "objective": [{"loss": "kd", "weight": "automatic"}]}, command="distill")


def test_the_report_draws_weights_that_change() -> None:
    def run(*weights: float) -> Any:
        log = [{"step": i, "role": "student", "weights": {"cross_entropy": 0.3, "hint": w}} for i, w in enumerate(weights)]
        return SimpleNamespace(log=[*log, {"step": 0, "role": "baseline", "weights": {"cross_entropy": 1.0}}])

    assert _curves.weights([run(2.0, 2.0)]) == []
    drawn = _curves.weights([run(2.0, 2.0), run(2.0, 3.0)])
    assert [curve.name for curve in drawn] == ["cross_entropy", "hint"]
    assert drawn[1].seeds == [[(0, 2.0), (1, 2.0)], [(0, 2.0), (1, 3.0)]]
