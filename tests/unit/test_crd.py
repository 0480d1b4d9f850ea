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
from limbeck.types import Batch, Outputs, Signal
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


def test_two_steps_at_another_momentum_are_the_formula() -> None:
    rng = np.random.default_rng(1)
    torch.manual_seed(0)
    loss = Crd((2, 3), (2, 5), 6, student="a", teacher="b", dim=4, negatives=2, momentum=0.8).double()
    kept = {name: getattr(loss, name).numpy().copy() for name in ("of_student", "of_teacher")}
    for places in ([0, 2, 5], [2, 1, 2]):  # a sample twice in one step: the mean of both
        given = rng.normal(size=(3, 3)), rng.normal(size=(3, 5))
        samples = torch.tensor([[place, 3, 4] for place in places])
        loss(torch.tensor(given[0]), torch.tensor(given[1]), samples)
        loss.stepped()
        for name, linear, x in zip(kept, (loss.embed_student, loss.embed_teacher), given, strict=True):
            new = x @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
            new /= np.linalg.norm(new, axis=1, keepdims=True)
            for place in set(places):
                moved = 0.8 * kept[name][place] + 0.2 * new[np.array(places) == place].mean(0)
                kept[name][place] = moved / np.linalg.norm(moved)
            np.testing.assert_allclose(getattr(loss, name), kept[name], rtol=1e-12, atol=1e-14)


def test_neither_order_nor_cut_decides_about_equal_samples() -> None:
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(6, 3, generator=g).double(), torch.randn(6, 5, generator=g).double()
    samples = torch.tensor([[place, 4, 5] for place in (0, 1, 0, 2, 0, 1)])

    def moved(order: list[int], cut: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        loss = Crd((2, 3), (2, 5), 6, student="a", teacher="b", dim=4, negatives=2).double()
        loss.scale.fill_(1.0)  # known: it depends on the cut of the very first step
        for part in torch.tensor(order).chunk(cut):
            loss(x[part], y[part], samples[part])
        loss.stepped()
        return {name: getattr(loss, name) for name in ("of_student", "of_teacher")}

    plain = moved([0, 1, 2, 3, 4, 5], 1)
    for order, cut in (([5, 4, 3, 2, 1, 0], 1), ([0, 1, 2, 3, 4, 5], 3), ([2, 0, 4, 1, 5, 3], 2)):
        for name, value in moved(order, cut).items():
            torch.testing.assert_close(value, plain[name], rtol=1e-12, atol=1e-14)


def test_another_step_draws_others() -> None:
    """The values of the same samples, weights and memory at two steps: other negatives."""
    data, objective = toy_data(30), built().double()
    rows = torch.arange(8)
    batch = Batch(data.train.ids[:8], 0, {"x": torch.zeros(8, 1)}, None, torch.from_numpy(data.train.labels[:8]), rows >= 0)
    torch.manual_seed(1)
    outputs = Outputs(torch.zeros(8, 4).double(), {"body": torch.randn(8, 5).double()})
    signal = Signal(None, {"norm": torch.randn(8, 16).double()})
    found = []
    for progress in (0.0, 0.0, 0.1):
        _, parts = objective(outputs, signal, batch, progress=progress, counts=objective.counts(batch))
        objective.stepped(keep=False)
        found.append(float(parts["crd"]))
    assert found[0] == found[1] != found[2]


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
