"""Sparse answers: the loss that they give is kd's, in expectation; and what they would bias is refused when the recipe is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from limbeck.cache import Sparse
from limbeck.cache._codec import sparse_of
from limbeck.losses import LOSSES, kd, kd_sparse
from limbeck.reading import RecipeError, build_recipe
from limbeck.types import SparseLogits


def kept(logits: np.ndarray[Any, Any], spec: Sparse, keys: np.ndarray[Any, Any], view: int = 0) -> SparseLogits:
    index, weight, entropy = sparse_of(logits, spec, keys, view)
    tensors = (torch.from_numpy(index), torch.from_numpy(weight), torch.from_numpy(entropy))
    return SparseLogits(*tensors, logits.shape[1], spec.temperature)


def keys_of(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(count).integers(0, 2**64, (count, 2), dtype=np.uint64, endpoint=False)


def logits_of(count: int, classes: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(count, classes)) * 3


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_with_every_class_kept_it_is_kd(temperature: float) -> None:
    teacher, student = logits_of(5, 12, 0), torch.from_numpy(logits_of(5, 12, 1)).requires_grad_()
    sparse = kept(teacher, Sparse(temperature, 12, 0), keys_of(5))
    for loss, given in ((kd, torch.from_numpy(teacher)), (kd_sparse, sparse)):
        values = loss(student, given, temperature=temperature)
        (gradient,) = torch.autograd.grad(values.sum(), student)
        if loss is kd:
            expected = values.detach(), gradient
    torch.testing.assert_close(values.detach(), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, expected[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("top", [0, 4])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_value_and_gradient_are_unbiased(top: int, temperature: float) -> None:
    """The mean over 20,000 draws (one a key) lies within five standard errors of kd's own value and gradient, class by class; of a bare
    top-k it would not."""
    draws, classes = 20_000, 60
    teacher, student = logits_of(1, classes, 2), torch.from_numpy(logits_of(1, classes, 3))
    many = np.repeat(teacher, draws, axis=0)
    repeated = student.repeat(draws, 1).requires_grad_()
    values = kd_sparse(repeated, kept(many, Sparse(temperature, top, 6), keys_of(draws)), temperature=temperature)
    (gradients,) = torch.autograd.grad(values.sum(), repeated)
    exact = student.clone().requires_grad_()
    value = kd(exact, torch.from_numpy(teacher), temperature=temperature)
    (gradient,) = torch.autograd.grad(value.sum(), exact)
    for found, wanted in ((values.detach()[:, None], value.detach()), (gradients, gradient[0])):
        error = found.std(0) / draws**0.5
        assert bool(((found.mean(0) - wanted).abs() <= 5 * error + 5e-5).all())  # classes so rare that none was drawn have no spread


def test_stratified_draws_vary_less_than_independent_ones() -> None:
    classes, draws, count = 500, 3000, 20
    teacher, f = logits_of(1, classes, 4), np.random.default_rng(5).normal(size=classes)
    p = np.exp(teacher[0] - teacher.max())
    p /= p.sum()
    index, weight, _ = sparse_of(np.repeat(teacher, draws, 0), Sparse(1.0, 0, count), keys_of(draws), 0)
    ours = (weight * f[index]).sum(1)
    independent = f[np.random.default_rng(6).choice(classes, (draws, count), p=p)].mean(1)
    assert ours.std() < 0.9 * independent.std()


def test_draws_are_of_the_key_and_the_view() -> None:
    logits, keys, spec = logits_of(3, 40, 7), keys_of(3), Sparse(1.0, 2, 5)
    first = sparse_of(logits, spec, keys, 0)
    alone = sparse_of(logits[1:2], spec, keys[1:2], 0)
    assert all(np.array_equal(a[1:2], b) for a, b in zip(first, alone, strict=True))
    assert not np.array_equal(first[0], sparse_of(logits, spec, keys, 1)[0])
    assert np.array_equal(first[0][:, :2], np.argsort(-logits, axis=1)[:, :2])


def test_another_temperature_is_refused() -> None:
    sparse = kept(logits_of(2, 9, 8), Sparse(2.0, 3, 2), keys_of(2))
    with pytest.raises(ValueError, match=r"of temperature 2\.0, not 4\.0"):
        kd_sparse(torch.zeros(2, 9), sparse, temperature=4.0)


KD = {"loss": "kd", "temperature": 2.0}
SPARSE = {"codec": "sparse"}


@pytest.mark.parametrize(
    ("objective", "cache", "where"),
    [
        ([{**KD, "temperature": {"start": 4, "end": 1}}], SPARSE, "objective.0.temperature"),
        ([KD, {**KD, "temperature": 3.0}], SPARSE, "objective.1.temperature"),
        ([KD], {**SPARSE, "temperature": 4.0}, "objective.0.temperature"),
        ([{"loss": "hint", "student": "a", "teacher": "b"}], SPARSE, "teacher_cache.codec"),
        ([KD], {"temperature": 2.0}, "teacher_cache.temperature"),
        ([KD], {"codec": "float16", "top": 5}, "teacher_cache.top"),
        ([KD], {"mode": "off", "codec": "float32"}, "teacher_cache.codec"),
        ([KD], {"views": "live", "path": "x"}, "teacher_cache.path"),
        ([KD], {"views": "live", "mode": "require"}, "teacher_cache.mode"),
        ([KD], {"store": "features"}, "teacher_cache.store"),
        ([KD], {"store": "both"}, "teacher_cache.store"),
        ([{"loss": "hint", "student": "a", "teacher": "b"}], {"store": "logits"}, "teacher_cache.store"),
    ],
)
def test_what_would_be_biased_or_ignored_is_refused(objective: list[Any], cache: dict[str, Any], where: str) -> None:
    given = {"teacher": "run:t", "student": "a", "data": "digits", "objective": objective, "teacher_cache": cache}
    with pytest.raises(RecipeError) as refused:
        build_recipe(given, command="distill")
    assert where in [p.where for p in refused.value.problems], refused.value


def test_every_loss_on_the_teachers_logits_says_whether_it_can() -> None:
    """A loss that reads the teacher's logits and has no sparse form is refused on the sparse codec."""
    for entry in LOSSES.values():
        if "teacher.logits" in entry.reads:
            given = {"teacher": "run:t", "student": "a", "data": "digits", "teacher_cache": SPARSE}
            given["objective"] = [{"loss": entry.name, **entry.example}]
            if entry.sparse is None:
                with pytest.raises(RecipeError):
                    build_recipe(given, command="distill")
            else:
                build_recipe(given, command="distill")
