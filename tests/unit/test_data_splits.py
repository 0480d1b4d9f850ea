"""Splits, limits and duplicates."""

from __future__ import annotations

import numpy as np
import pytest

from limbeck.data import data_from_python
from limbeck.data.ids import array_ids, groups, text_ids
from limbeck.data.splits import carve, stratified_order
from limbeck.errors import UsageError
from limbeck.recipe import DataSpec

RNG = np.random.default_rng(0)


def ids_of(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 2**63, (count, 2), dtype=np.uint64)


def spec(**keys: object) -> DataSpec:
    return DataSpec(source="python", **keys)


def test_splits_are_stratified() -> None:
    labels = np.repeat([0, 1, 2], [700, 250, 50])
    side = carve(ids_of(1000), labels, (0.2, 0.1), 0)
    for value, count in ((0, 700), (1, 250), (2, 50)):
        assert [((side == s) & (labels == value)).sum() for s in (1, 2)] == [count // 5, count // 10]


def test_splits_do_not_depend_on_the_order_of_rows_but_on_the_seed() -> None:
    ids, labels = ids_of(500), np.arange(500) % 4
    turn = np.random.default_rng(1).permutation(500)
    assert np.array_equal(carve(ids, labels, (0.2, 0.1), 3)[turn], carve(ids[turn], labels[turn], (0.2, 0.1), 3))
    assert not np.array_equal(carve(ids, labels, (0.2, 0.1), 3), carve(ids, labels, (0.2, 0.1), 4))


def test_duplicates_fall_on_one_side_whatever_their_labels() -> None:
    ids = ids_of(200)[np.random.default_rng(2).integers(0, 200, 1000)]
    labels = np.random.default_rng(3).integers(0, 3, 1000)
    side = carve(ids, labels, (0.3, 0.2), 0)
    first, group = groups(ids)
    assert np.array_equal(side, side[first][group])
    turn = np.random.default_rng(1).permutation(1000)
    assert np.array_equal(side[turn], carve(ids[turn], labels[turn], (0.3, 0.2), 0))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_every_class_keeps_training_samples(count: int) -> None:
    side = carve(ids_of(count * 5), np.repeat(np.arange(5), count), (0.2, 0.1), 0)
    left = (side == 0).reshape(5, count).sum(axis=1)
    assert (left >= 1).all()
    if count >= 3:
        assert all(((side == s).reshape(5, count).sum(axis=1) >= 1).all() for s in (1, 2))


def test_limits_are_stratified_and_nested() -> None:
    ids, labels = ids_of(1000), np.repeat([0, 1, 2], [700, 290, 10])
    ranked = stratified_order(ids, labels, 0, "x")
    assert sorted(ranked.tolist()) == list(range(1000))
    for n in (3, 10, 100):
        counts = np.bincount(labels[ranked[:n]], minlength=3)
        assert (counts >= 1).all()
        assert np.abs(counts - n * np.array([0.7, 0.29, 0.01])).max() <= 2


def test_ids_are_of_content_alone() -> None:
    x = RNG.integers(0, 256, (4, 2, 3, 1), dtype=np.uint8)
    assert np.array_equal(array_ids(x), array_ids(list(x)))
    assert not (array_ids(x) == array_ids(x.reshape(4, 3, 2, 1))).all(axis=1).any()
    assert len(np.unique(text_ids(["ab", "a", "a"], ["c", "bc", ""]), axis=0)) == 3
    assert np.array_equal(text_ids(["a"]), text_ids(["a"], [""]))


def test_notes_tell_of_duplicates_contradictions_and_limits() -> None:
    x = RNG.normal(size=(200, 3))
    x[:20] = x[20:40]
    y = np.arange(200) % 2
    y[:10] = 1 - y[20:30]
    test = (np.concatenate([x[100:103], RNG.normal(size=(40, 3))]), np.arange(43) % 2)
    data = data_from_python(
        task="image-classification",
        train=(x, y),
        test=test,
        valid=test,
        unlabelled=x[:50] + 1,
        spec=spec(train_limit=120, labelled_limit=30),
    )
    notes = " ".join(data.notes)
    assert "10 samples occur several times" in notes
    assert "3 of 200 training rows have the same content as a row of the test split" in notes
    assert len(data.train) == 120
    assert (data.train.labels >= 0).sum() == 30
    more = data_from_python(
        task="image-classification",
        train=(x, y),
        test=test,
        valid=test,
        unlabelled=x[:50] + 1,
        spec=spec(train_limit=120, labelled_limit=60),
    )
    first, second = (set(np.flatnonzero(d.train.labels >= 0).tolist()) for d in (data, more))
    assert first < second


def test_unlabelled_rows_of_other_splits_are_left_out() -> None:
    """The same array given labelled and unlabelled: no test or validation row is trained on, and no labelled row stands twice."""
    x, y = RNG.normal(size=(200, 3)), np.arange(200) % 2
    data = data_from_python(task="image-classification", train=(x, y), unlabelled=np.concatenate([x, x[:7] + 9]))
    for split in (data.test, data.valid):
        assert len(split)
        assert not set(map(bytes, split.ids)) & set(map(bytes, data.train.ids))
    labelled = data.train.labels >= 0
    assert labelled.sum() == 200 - len(data.test) - len(data.valid)
    assert np.array_equal(np.asarray(data.train.read(np.flatnonzero(~labelled))), x[:7] + 9)
    assert np.array_equal(data.train.ids[~labelled], array_ids(x[:7] + 9))
    notes = " ".join(data.notes)
    assert f"{len(data.test)} of 207 unlabelled rows have the same content as a row of the test split" in notes
    assert f"{len(data.valid)} of 207 unlabelled rows have the same content as a row of the valid split" in notes
    assert f"{labelled.sum()} of 207 unlabelled rows have the same content as a labelled training row" in notes
    given = (RNG.normal(size=(20, 3)), np.arange(20) % 2)
    other = data_from_python(task="image-classification", train=(x, y), test=given, valid=given, unlabelled=given[0])
    assert len(other.train) == 200
    assert other.fingerprint == data_from_python(task="image-classification", train=(x, y), test=given, valid=given).fingerprint
    assert "20 of 20 unlabelled rows" in " ".join(other.notes)


def test_impossible_limits_and_fractions_are_refused() -> None:
    x, y = RNG.normal(size=(50, 3)), np.arange(50) % 5
    with pytest.raises(UsageError, match="less than one sample for each of the 5 classes"):
        data_from_python(task="image-classification", train=(x, y), spec=spec(labelled_limit=4))
    with pytest.raises(UsageError, match="leave nothing to train on"):
        data_from_python(task="image-classification", train=(x, y), spec=spec(test_fraction=0.6, valid_fraction=0.5))
    with pytest.raises(UsageError, match="test split is empty"):
        data_from_python(task="image-classification", train=(x[:2], np.arange(2)))
