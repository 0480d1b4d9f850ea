"""What several teachers say together, against NumPy float64, and who sees what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.data import BatchBuilder, evaluation_requests
from limbeck.engine import Engine
from limbeck.ensemble import Ensemble, Mixing
from limbeck.losses import kd
from limbeck.models import wrap_module
from limbeck.reading import build_recipe
from limbeck.teacher import LiveTeacher
from limbeck.types import Needs, TensorPreprocessing, of_member
from support import Big, Small, made, toy_data

RNG = np.random.default_rng(5)
THREE = [RNG.normal(0, spread, (6, 4)) for spread in (1.0, 3.0, 9.0)]


def softmax(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    p = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(p / p.sum(-1, keepdims=True))


def mixed(mixing: Mixing, logits: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return mixing([torch.from_numpy(z) for z in logits]).numpy()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_loss_at_the_temperature_reads_the_mean_of_the_softened_probabilities(temperature: float) -> None:
    weights = (0.5, 0.3, 0.2)
    told = mixed(Mixing("probabilities", weights, temperature), THREE)
    expected = sum(w * softmax(z / temperature) for w, z in zip(weights, THREE, strict=True))
    np.testing.assert_allclose(softmax(told / temperature), expected, rtol=1e-12)
    student = RNG.normal(size=(6, 4))
    own = np.log(softmax(student / temperature))
    loss = temperature**2 * (expected * (np.log(expected) - own)).sum(-1)
    np.testing.assert_allclose(kd(torch.from_numpy(student), torch.from_numpy(told), temperature=temperature).numpy(), loss, rtol=1e-9)


def test_the_mean_of_logits_is_the_geometric_mean_at_every_temperature() -> None:
    weights = (0.5, 0.3, 0.2)
    told = mixed(Mixing("logits", weights), THREE)
    for temperature in (1.0, 3.0):
        product = np.prod([softmax(z / temperature) ** w for w, z in zip(weights, THREE, strict=True)], axis=0)
        np.testing.assert_allclose(softmax(told / temperature), product / product.sum(-1, keepdims=True), rtol=1e-12)


def test_who_is_more_sure_of_a_sample_counts_more_in_it() -> None:
    p = [softmax(z) for z in THREE]
    largest = np.stack([each.max(-1) for each in p])
    sure = np.exp(np.stack([(each * np.log(each)).sum(-1) for each in p]))
    logits = torch.from_numpy(np.stack(THREE))
    for kind, expected in (("confidence", largest), ("entropy", sure)):
        shares = Mixing("probabilities", kind).shares(logits).numpy()  # type: ignore[arg-type]
        np.testing.assert_allclose(shares, expected / expected.sum(0), rtol=1e-12)
        assert shares[:, 0] != pytest.approx(shares[:, 1])
        told = mixed(Mixing("probabilities", kind, 2.0), THREE)  # type: ignore[arg-type]
        together = sum(w[:, None] * softmax(z / 2) for w, z in zip(expected / expected.sum(0), THREE, strict=True))
        np.testing.assert_allclose(softmax(told / 2), together, rtol=1e-12)


def test_teachers_that_agree_say_what_each_says() -> None:
    for kind in ((0.5, 0.5), "confidence", "entropy"):
        for average in ("probabilities", "logits"):
            told = mixed(Mixing(average, kind, 4.0), [THREE[0], THREE[0]])  # type: ignore[arg-type]
            np.testing.assert_allclose(softmax(told / 4), softmax(THREE[0] / 4), rtol=1e-12)


def test_it_is_finite_where_a_class_is_impossible_or_a_teacher_counts_for_nothing() -> None:
    never = np.array([[0.0, -np.inf], [800.0, 0.0]])
    other = np.array([[0.0, 1.0], [0.0, 900.0]])
    for weights in ((0.5, 0.5), "confidence", "entropy"):
        assert np.isfinite(mixed(Mixing("probabilities", weights, 1.0), [never, other])).all()  # type: ignore[arg-type]
    np.testing.assert_allclose(softmax(mixed(Mixing("probabilities", (0.0, 1.0)), [never, other])), softmax(other))
    np.testing.assert_allclose(mixed(Mixing("logits", (0.0, 1.0)), [never, other]), other)


def test_half_types_are_raised_and_double_stays() -> None:
    halves = [torch.from_numpy(z).bfloat16() for z in THREE]
    mixing = Mixing("probabilities", "entropy", 2.0)
    told = mixing(halves)
    assert told.dtype == torch.float32
    np.testing.assert_allclose(told.double().numpy(), mixing([z.double() for z in halves]).numpy(), atol=2e-5)
    assert mixing([torch.from_numpy(z) for z in THREE]).dtype == torch.float64


def recipe(**changes: Any) -> Any:
    plain = {"teacher": ["python:a.py:a", "python:a.py:b", "python:a.py:c"], "student": "python:a.py:s", "data": "digits", **changes}
    return build_recipe(plain, command="distill")


def test_a_recipe_says_how() -> None:
    kd_at = {"objective": [{"loss": "kd", "temperature": 3.0}, {"loss": "cross_entropy"}]}
    assert Mixing.of(recipe(**kd_at)) == Mixing("probabilities", (1 / 3, 1 / 3, 1 / 3), 3.0)
    assert Mixing.of(recipe(**kd_at, ensemble={"weights": [2, 0, 6]})) == Mixing("probabilities", (0.25, 0.0, 0.75), 3.0)
    assert Mixing.of(recipe(**kd_at, ensemble={"temperature": 1.5, "weights": "entropy"})) == Mixing("probabilities", "entropy", 1.5)
    assert Mixing.of(recipe(**kd_at, ensemble={"average": "logits"})).average == "logits"
    assert recipe(teacher=["python:a.py:a"]).teacher.model == "python:a.py:a"  # a list of one is that one


def test_what_reads_another_temperature_too_has_to_be_told() -> None:
    from limbeck.errors import UsageError

    with pytest.raises(UsageError, match=r"ensemble.temperature: is to be given.*4.0, 1.0"):
        recipe(objective=[{"loss": "cross_entropy"}, {"loss": "nkd", "temperature": 4.0}])
    off = [{"loss": "kd", "temperature": 2.0}, {"loss": "kd", "temperature": 4.0, "weight": 0.0}]
    assert Mixing.of(recipe(objective=off)).temperature == 2.0  # at weight 0 it reads nothing


def test_a_complete_recipe_reads_as_it_was_written(tmp_path: Path) -> None:
    from limbeck.reading import recipe_from_yaml

    text = "text-classification"
    for changes in ({}, {"ensemble": {"average": "logits", "weights": [1, 2, 3]}}, {"task": text, "data": "csv:a.csv"}):
        given = recipe(**changes)
        (tmp_path / "recipe.yaml").write_text(given.to_yaml(), encoding="utf-8")
        assert recipe_from_yaml(tmp_path / "recipe.yaml") == given


def test_each_teacher_sees_the_view_in_its_own_preparation() -> None:
    data = toy_data(20)
    student, first, second = (
        wrap_module(made(kind, name), role="teacher", data=data) for kind, name in ((Small, "s"), (Big, "a"), (Big, "b"))
    )
    builder = BatchBuilder(
        data.train, student=student.preprocessing, teacher=(first.preprocessing, None, second.preprocessing), num_classes=len(data.classes)
    )
    [request] = evaluation_requests(data.train, len(data.train))
    batch = builder(request)
    assert of_member(batch, 1) is None
    for number, model in ((0, first), (2, second)):
        inputs = of_member(batch, number)
        assert inputs is not None
        assert list(inputs) == list(model.preprocessing.inputs if not isinstance(model.preprocessing, TensorPreprocessing) else ["x"])
        torch.testing.assert_close(inputs["x"], batch.student["x"])
    cut = batch.part(1, 3)
    assert len(of_member(cut, 2)["x"]) == 2  # type: ignore[index]


def test_it_is_the_mean_of_what_its_members_answer_and_only_looks_at_them() -> None:
    data = toy_data(20)
    models = [wrap_module(made(Big, name), role="teacher", data=data) for name in ("a", "b")]
    engine = Engine(torch.device("cpu"), "float64")
    turned = np.array([1, 2, 3, 0])
    members = [LiveTeacher(models[0], engine), LiveTeacher(models[1], engine, turned)]
    builder = BatchBuilder(
        data.train,
        student=models[0].preprocessing,
        teacher=tuple(m.preprocessing for m in models),
        num_classes=len(data.classes),
        dtype=torch.float64,
    )
    [request] = evaluation_requests(data.train, len(data.train))
    batch = builder(request)
    together = Ensemble(members, Mixing("probabilities", (0.5, 0.5), 2.0), engine.device)
    told = together(batch, Needs()).logits
    with torch.no_grad():
        own = [m.module(batch.student["x"]).numpy() for m in models]
    expected = (softmax(own[0] / 2) + softmax(own[1][:, turned] / 2)) / 2
    assert told is not None
    np.testing.assert_allclose(softmax(told.numpy() / 2), expected, rtol=1e-9)
    for member in members:
        member.check_untouched()
    assert replace(together.mixing, temperature=1.0) == together.mixing.at_one()
