"""CRD's memory: what is drawn from it, when it moves, and that neither stops, cuts nor ranks change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.errors import Interrupted, UsageError
from limbeck.losses import Crd, Population
from limbeck.objective import Objective
from limbeck.ranks import ALONE
from limbeck.recipe import Term
from relational import fit_once, fit_together
from support import run_fit, settings, state_bytes, toy_data

CRD = Term(loss="crd", weight=0.8, student="body", teacher="norm", dim=4, negatives=6)
TERMS = [Term(loss="cross_entropy"), CRD]
SHAPES: dict[str, Any] = {"shapes_student": {"body": (2, 5)}, "shapes_teacher": {"norm": (2, 16)}}


def ids_of(count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.random.default_rng(0).integers(0, 2**63, (count, 2)).astype(np.uint64)


class TestPopulation:
    def test_others_are_of_another_class_and_all_of_them_come(self) -> None:
        ids, labels = ids_of(30), np.arange(30) % 3
        population = Population(ids, labels)
        places = population.places(ids)
        assert sorted(places.tolist()) == list(range(30))
        of_place = labels[np.argsort(places)]
        drawn = population.drawn(ids, 2000, 0, "x")
        assert (drawn[:, 0] == places).all()
        for row, label in enumerate(labels):
            counts = np.bincount(drawn[row, 1:], minlength=30)
            assert (counts[of_place == label] == 0).all()
            assert (counts[of_place != label] > 50).all()  # 100 each are expected
            assert (counts[of_place != label] < 150).all()

    def test_a_row_without_label_is_told_from_all_others(self) -> None:
        ids, labels = ids_of(6), np.array([0, 0, 1, 1, -1, -1])
        population = Population(ids, labels)
        places = population.places(ids)
        drawn = population.drawn(ids, 500, 0)
        for row in (4, 5):
            assert set(drawn[row, 1:].tolist()) == set(range(6)) - {places[row]}
        assert set(drawn[0, 1:].tolist()) == set(places[2:].tolist())

    def test_one_class_alone(self) -> None:
        ids = ids_of(3)
        population = Population(ids, np.zeros(3, np.int64))
        drawn = population.drawn(ids, 100, 0)
        assert all(set(row[1:]) == set(range(3)) - {row[0]} for row in drawn.tolist())

    def test_it_is_a_function_of_key_and_sample(self) -> None:
        ids, labels = ids_of(12), np.arange(12) % 3
        mixed = np.random.default_rng(1).permutation(12)
        one, other = Population(ids, labels), Population(ids[mixed], labels[mixed])
        drawn = one.drawn(ids, 20, 3, "step 1")
        assert (other.drawn(ids, 20, 3, "step 1") == drawn).all()
        assert (one.drawn(ids[mixed], 20, 3, "step 1") == drawn[mixed]).all()
        assert (one.drawn(ids[4:5], 20, 3, "step 1") == drawn[4:5]).all()
        assert (one.drawn(ids, 20, 3, "step 2") != drawn).any()
        assert (one.drawn(ids, 20, 4, "step 1") != drawn).any()

    def test_equal_samples_share_a_place_and_strangers_have_none(self) -> None:
        ids = ids_of(5)
        population = Population(np.concatenate([ids, ids[:2]]), np.array([0, 1, 0, 1, 0, 0, 1]))
        assert len(population) == 5
        with pytest.raises(KeyError, match="not among the training rows"):
            population.places(ids_of(7)[5:])


def built(rows: int = 30, seed: int = 0) -> Objective:
    data = toy_data(rows)
    return Objective.build(
        TERMS, classes="abcd", label_counts=[1] * 4, population=Population(data.train.ids, data.train.labels), seed=seed, **SHAPES
    )


def test_the_memory_moves_behind_the_step_and_not_before() -> None:
    torch.manual_seed(0)
    loss = Crd((2, 3), (2, 5), 6, student="a", teacher="b", dim=4, negatives=2).double()
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    parts = [(torch.randn(1, 3).double(), torch.randn(1, 5).double(), torch.tensor([[i, 4, 5]])) for i in (0, 1)]
    for part in parts:
        loss(*part)
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())
    loss.stepped(keep=False)
    loss.stepped()
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())
    for part in parts:
        loss(*part)
    loss.stepped()
    after = loss.state_dict()
    assert (after["scale"] > 0).all()
    for name, linear, at in (("of_student", loss.embed_student, 0), ("of_teacher", loss.embed_teacher, 1)):
        assert torch.equal(after[name][2:], before[name][2:])
        for i, part in enumerate(parts):
            new = torch.nn.functional.normalize(linear(part[at]), dim=1).detach()
            moved = torch.nn.functional.normalize(0.5 * before[name][i] + 0.5 * new[0], dim=0)
            torch.testing.assert_close(after[name][i], moved, rtol=1e-12, atol=1e-12)


def test_a_zero_vector_is_finite() -> None:
    loss = Crd((1, 3), (1, 3), 4, student="a", teacher="b", dim=2, negatives=3)
    with torch.no_grad():
        loss.embed_student.bias.zero_()
    student = torch.zeros(1, 3, requires_grad=True)
    value = loss(student, torch.ones(1, 3), torch.tensor([[0, 1, 2, 3]])).sum()
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_one_row_is_refused() -> None:
    data = toy_data(30)
    one = Population(data.train.ids[:1], data.train.labels[:1])
    with pytest.raises(UsageError, match="tells samples apart, and there is 1 of them"):
        Objective.build(TERMS, classes="abcd", label_counts=[1] * 4, population=one, **SHAPES)


def test_a_stop_at_every_step_ends_in_the_same_bytes(tmp_path: Path) -> None:
    data = toy_data(30)

    def go(folder: Path, left: int | None) -> dict[str, bytes]:
        count, objective = iter(range(1000)), built()
        model, _ = run_fit(
            folder, data=data, objective=objective, train=settings(accumulate=2), stop=lambda: left is not None and next(count) >= left
        )
        return state_bytes(model.module) | state_bytes(objective)

    whole = go(tmp_path / "whole", None)
    assert any(name.endswith("of_student") for name in whole)
    fresh = state_bytes(built())
    assert all(whole[name] != fresh[name] for name in fresh), "nothing was learned or kept"
    for step in range(12):
        folder = tmp_path / f"stopped-{step}"
        with pytest.raises(Interrupted):
            go(folder, step)
        assert go(folder, None) == whole, f"stopped after step {step + 1}"


def test_computing_blocks_again_changes_nothing(tmp_path: Path) -> None:
    found = []
    for name, blocks in (("kept", False), ("again", ["body"])):
        objective = built()
        model, _ = run_fit(tmp_path / name, objective=objective, train=settings(gradient_checkpointing=blocks))
        found.append(state_bytes(model.module) | state_bytes(objective))
    assert found[0] == found[1]


def test_ranks_have_the_memory_of_one_process(tmp_path: Path) -> None:
    """Uneven shares, rows without labels, and a last step that one rank has no rows of."""
    alone = fit_once(tmp_path / "alone", ALONE, TERMS)
    assert any(name.endswith("of_teacher") for name in alone)
    for found in fit_together(tmp_path, 2, TERMS):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-8, atol=1e-9, err_msg=name)


def test_what_was_measured_before_leaves_no_trace(tmp_path: Path) -> None:
    states = []
    for name, ask in (("plain", False), ("asked", True)):
        objective = built()
        if ask:
            features = torch.randn(4, 5).double(), torch.randn(4, 16).double()
            objective.double()
            loss = objective.terms[1].loss  # type: ignore[union-attr]
            loss(*features, torch.tensor([[0, 1, 2, 3, 4, 5, 6]] * 4))
        model, _ = run_fit(tmp_path / name, objective=objective.double())
        states.append(state_bytes(model.module) | state_bytes(objective))
    assert states[0] == states[1]
