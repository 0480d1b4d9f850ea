"""How answers are stored: dense in 16 and 32 bits, sparse without bias, features; what does not fit is refused with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from caching import ABOUT, MADE, answers, identity_of, make_cache, some_keys
from limbeck.cache import CachedTeacher, Reader, Request, Sparse, Stored, compare, create, fill
from limbeck.cache._codec import sparse_of
from limbeck.errors import LimbeckError, UsageError
from limbeck.types import Batch, Needs, Signal, SparseLogits

CPU = torch.device("cpu")


def batch_of(keys: Any, view: int = 0, student: dict[str, torch.Tensor] | None = None) -> Batch:
    count = len(keys)
    return Batch(keys, view, student or {}, None, torch.full((count,), -1), torch.ones(count, dtype=torch.bool))


@pytest.mark.parametrize(("codec", "relative"), [("float16", 2.0**-11), ("float32", 0.0)])
def test_dense_answers_come_back(tmp_path: Path, codec: str, relative: float) -> None:
    """Within half a unit of the last place; the views of a batch count modulo their number; hits are counted."""
    keys, stored = some_keys(30), Stored(5, codec=codec)
    folder, _ = make_cache(tmp_path, keys, views=2, stored=stored)
    teacher = CachedTeacher(Reader(folder), stored, None, CPU, 2)
    for view in (0, 1, 5):
        told = teacher(batch_of(keys[::-1], view), Needs()).logits
        assert told is not None
        assert told.dtype == torch.float32
        expected = torch.from_numpy(answers(keys[::-1], view % 2, 5))
        assert bool(((told - expected).abs() <= relative * expected.abs() + 1e-7).all())
    assert teacher.hits == 90
    assert teacher.identity == {"weights_sha256": "a", "architecture_sha256": "a"}


def test_the_datas_classes_are_picked_on_reading(tmp_path: Path) -> None:
    keys, stored = some_keys(8), Stored(5, codec="float32")
    folder, _ = make_cache(tmp_path, keys, stored=stored)
    columns = np.array([4, 0, 2])
    told = CachedTeacher(Reader(folder), stored, columns, CPU, 1)(batch_of(keys), Needs()).logits
    assert told is not None
    assert np.array_equal(told.numpy(), answers(keys, 0, 5)[:, columns])


def test_a_row_that_is_not_there_is_said(tmp_path: Path) -> None:
    keys, stored = some_keys(8), Stored(3)
    folder, _ = make_cache(tmp_path, keys[:7], stored=stored)
    with pytest.raises(LimbeckError, match=f"no answer for the sample {int(keys[7, 0]):016x}{int(keys[7, 1]):016x} under view 0"):
        CachedTeacher(Reader(folder), stored, None, CPU, 1)(batch_of(keys), Needs())


def test_by_what_a_view_was_made_of(tmp_path: Path) -> None:
    """Beside mixup a batch has keys of its own, and its ids do not count."""
    keys, stored = some_keys(8), Stored(3)
    folder, _ = make_cache(tmp_path, keys, stored=stored)
    batch = batch_of(some_keys(8, 1))
    mixed = Batch(batch.ids, 0, {}, None, batch.labels, batch.mask, keys)
    told = CachedTeacher(Reader(folder), stored, None, CPU, 1)(mixed, Needs()).logits
    assert told is not None
    assert np.array_equal(told.numpy(), answers(keys, 0, 3).astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("codec", ["float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_refused(codec: str, value: float) -> None:
    logits = np.zeros((2, 3), np.float32)
    logits[1, 2] = value
    with pytest.raises(LimbeckError, match="NaN or infinite already as the teacher gives them"):
        Stored(3, codec=codec).encode(logits, {}, some_keys(2), 0)
    with pytest.raises(LimbeckError, match="The layer body do not fit"):
        Stored(3, {"body": (3,)}, codec).encode(np.zeros((2, 3)), {"body": logits}, some_keys(2), 0)
    with pytest.raises(LimbeckError, match="NaN or infinity, which the sparse codec cannot keep"):
        Stored(3, codec="sparse", sparse=Sparse(1.0, 1, 1)).encode(logits, {}, some_keys(2), 0)


def test_what_is_too_large_is_refused_and_a_masked_class_is_kept() -> None:
    logits = np.array([[1.0, -np.inf, 65504.0]], np.float32)
    kept = Stored(3).encode(logits, {}, some_keys(1), 0)["logits"]
    assert kept.dtype == np.float16
    assert kept.tolist() == logits.tolist()
    logits[0, 2] = 70_000
    with pytest.raises(LimbeckError, match=r"do not fit float16 \(up to 7e\+04\): use teacher_cache.codec: float32"):
        Stored(3).encode(logits, {}, some_keys(1), 0)
    assert Stored(3, codec="float32").encode(logits, {}, some_keys(1), 0)["logits"].tolist() == logits.tolist()
    with pytest.raises(LimbeckError, match="do not fit float16"):
        Stored(3).encode(-np.abs(logits[:, 2:]).repeat(3, 1), {}, some_keys(1), 0)


def test_features_of_tokens_are_cut_to_the_batch(tmp_path: Path) -> None:
    """They are stored as long as a text can be; a batch gets as many as its longest text has."""
    keys = some_keys(6)
    stored = Stored(None, {"layer": (7, 2), "pooled": (2,)}, "float32")
    tokens = np.arange(6 * 7 * 2, dtype=np.float32).reshape(6, 7, 2)
    folder, _ = create(tmp_path, identity_of(), MADE, {**ABOUT}, stored.columns)

    def ask(blocks: list[Any], view: int) -> Any:
        for rows in blocks:
            yield stored.encode(None, {"layer": tokens[rows], "pooled": tokens[rows, 0]}, keys[rows], view)

    fill(folder, [Request(0, keys)], ask)
    student = {"attention_mask": torch.ones(6, 4, dtype=torch.int64)}
    told = CachedTeacher(Reader(folder), stored, None, CPU, 1)(batch_of(keys, student=student), Needs(False, ("layer", "pooled")))
    assert told.logits is None
    assert np.array_equal(told.features["layer"].numpy(), tokens[:, :4])
    assert np.array_equal(told.features["pooled"].numpy(), tokens[:, 0])


# --- many classes


def softmax(logits: Any, temperature: float) -> Any:
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize(("top", "samples"), [(5, 8), (0, 8), (1, 1), (6, 0)])
def test_sparse_answers_are_an_unbiased_sample(temperature: float, top: int, samples: int) -> None:
    """Over many keys the weighted sum of any f has the mean sum(p f); the most probable classes are exact, and the weights sum to the mass kept."""
    rng = np.random.default_rng(1)
    classes, draws = 40, 4000
    logits = np.repeat(rng.normal(0, 3, (1, classes)), draws, 0).astype(np.float32)
    p = softmax(logits[:1], temperature)[0]
    index, weight, entropy = sparse_of(logits, Sparse(temperature, top, samples), some_keys(draws), 0)
    assert index.shape == weight.shape == (draws, top + samples)
    best = np.argsort(-p, kind="stable")[:top]
    assert (index[:, :top] == best).all()
    np.testing.assert_allclose(weight[:, :top], np.broadcast_to(p[best], (draws, top)), rtol=1e-6)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(), rtol=1e-6)
    rest = 1 - p[best].sum()
    if not samples:
        return
    np.testing.assert_allclose(weight.sum(1), 1.0, rtol=1e-5)
    assert not np.isin(index[:, top:], best).any()
    tail = np.delete(p, best) / rest
    for f in (rng.normal(size=classes), rng.normal(size=classes) ** 3, *np.eye(classes)):
        sums = (weight.astype(np.float64) * f[index]).sum(1)
        of_tail = np.delete(f, best)
        alone = rest**2 * ((tail * of_tail**2).sum() - (tail * of_tail).sum() ** 2) / samples  # the variance of independent draws
        assert abs(sums.mean() - (p * f).sum()) <= 6 * np.sqrt(alone / draws) + 1e-6
        if np.count_nonzero(f) > 1:
            assert sums.var() <= 1.1 * alone, "strata are never worse than independent draws"


def test_sparse_draws_are_a_function_of_key_and_view() -> None:
    logits = np.random.default_rng(0).normal(0, 1, (20, 50))
    keys, spec = some_keys(20), Sparse(2.0, 4, 6)
    one = sparse_of(logits, spec, keys, 0)
    half = sparse_of(logits[10:], spec, keys[10:], 0)
    for a, b in zip(one, half, strict=True):
        assert np.array_equal(a[10:], b)
    assert not np.array_equal(one[0], sparse_of(logits, spec, keys, 1)[0])
    assert not np.array_equal(one[0], sparse_of(logits, spec, keys[::-1], 0)[0])


def test_sparse_answers_at_the_edges() -> None:
    """Few classes are all kept; ties are broken by the number; mass that underflows draws nothing wrong."""
    keys = some_keys(3)
    logits = np.array([[0.0, 0.0, 0.0, 1.0]] * 3)
    index, weight, _ = sparse_of(logits, Sparse(1.0, 2, 2), keys, 0)
    assert index.tolist() == [[0, 1, 2, 3]] * 3
    np.testing.assert_allclose(weight, softmax(logits, 1.0), rtol=1e-6)
    index, _, _ = sparse_of(logits, Sparse(1.0, 2, 1), keys, 0)
    assert index[:, :2].tolist() == [[3, 0]] * 3
    assert set(index[:, 2].tolist()) <= {1, 2}
    sure = np.full((3, 6), -1e5)
    sure[:, 4] = 0
    index, weight, entropy = sparse_of(sure, Sparse(1.0, 1, 2), keys, 0)
    assert index[:, 0].tolist() == [4] * 3
    assert weight.tolist() == [[1.0, 0.0, 0.0]] * 3
    assert entropy.tolist() == [0.0] * 3
    assert (index >= 0).all()
    assert (index < 6).all()


@pytest.mark.parametrize("classes", [300, 70_000])
def test_sparse_answers_come_back(tmp_path: Path, classes: int) -> None:
    keys = some_keys(6)
    stored = Stored(classes, {}, "sparse", Sparse(2.0, 6, 10))
    folder, _ = make_cache(tmp_path, keys, stored=stored)
    signal = CachedTeacher(Reader(folder), stored, None, CPU, 1)(batch_of(keys), Needs())
    index, weight, entropy = sparse_of(answers(keys, 0, classes), Sparse(2.0, 6, 10), keys, 0)
    assert signal.kind == "sparse"
    assert signal.sparse is not None
    assert np.array_equal(signal.sparse.index.numpy(), index)
    assert np.array_equal(signal.sparse.weight.numpy(), weight)
    assert np.array_equal(signal.sparse.entropy.numpy(), entropy)
    assert (signal.sparse.classes, signal.sparse.temperature) == (classes, 2.0)
    order = np.random.default_rng(0).permutation(classes)
    mapped = CachedTeacher(Reader(folder), stored, order, CPU, 1)(batch_of(keys), Needs()).sparse
    assert mapped is not None
    assert np.array_equal(order[mapped.index.numpy()], index), "the data's class j is the teacher's output order[j]"


# --- compared with the teacher


def signal_of(logits: Any, **features: Any) -> Signal:
    return Signal(torch.tensor(logits), {k: torch.tensor(v) for k, v in features.items()})


@pytest.mark.parametrize("half", [False, True])
def test_answers_are_compared_within_codec_and_rounding(tmp_path: Path, half: bool) -> None:
    ids = some_keys(2)
    live = signal_of([[10.0, -3.0], [0.5, 0.25]], body=[[1.0], [2.0]])
    bound = 10 * (2.0**-3 if half else 2.0**-9)

    def check(told: Signal) -> None:
        compare(told, live, half=half, folder=tmp_path, ids=ids)

    check(live)
    check(signal_of([[10.0, -3.0 + 0.9 * bound], [0.5, 0.25]], body=[[1.0], [2.0]]))
    with pytest.raises(UsageError, match=f"the logits differ by up to .*sample {int(ids[1, 0]):016x}"):
        check(signal_of([[10.0, -3.0], [0.5, 0.25 + 1.1 * bound]], body=[[1.0], [2.0]]))
    with pytest.raises(UsageError, match="the layer body differ"):
        check(signal_of([[10.0, -3.0], [0.5, 0.25]], body=[[1.0], [2.5]]))
    with pytest.raises(UsageError, match="the logits differ by up to inf"):
        check(signal_of([[10.0, float("-inf")], [0.5, 0.25]], body=[[1.0], [2.0]]))
    masked = signal_of([[10.0, float("-inf")]])
    compare(masked, masked, half=half, folder=tmp_path, ids=ids[:1])


def swap_columns(x: Any, a: int, b: int) -> Any:
    x = x.copy()
    x[:, [a, b]] = x[:, [b, a]]
    return x


def other_draws(index: Any, top: int, classes: int) -> Any:
    """Each drawn class replaced by the next one that is not among the kept."""
    index = index.copy()
    for row in index:
        for at in range(top, len(row)):
            row[at] = next(c % classes for c in range(row[at] + 1, row[at] + classes) if c % classes not in row[:top])
    return index


SPARSE = Sparse(2.0, 4, 6)
WRONG: dict[str, tuple[str, Any]] = {
    "a share": ("shares of the most probable", lambda i, w, h: (i, w * np.where(np.arange(10) == 1, 1.2, 1), h)),
    "classes swapped": ("shares of the most probable", lambda i, w, h: (swap_columns(i, 0, 3), w, h)),
    "the rest's weight": ("shares of the rest", lambda i, w, h: (i, w * np.where(np.arange(10) >= 4, 0.8, 1), h)),
    "other draws": ("places of the drawn", lambda i, w, h: (other_draws(i, 4, 50), w, h)),
    "the draws of other samples": ("places of the drawn", lambda i, w, h: (np.concatenate([i[:, :4], i[:, 9:3:-1]], 1), w, h)),
    "no class of it": ("numbers of classes", lambda i, w, h: (i + (np.arange(10) == 9) * 50, w, h)),
    "the entropy": ("entropies", lambda i, w, h: (i, w, h + 0.1)),
    "no number": ("entropies", lambda i, w, h: (i, w, h * np.nan)),
}


def sparse_signals(change: Any = lambda i, w, h: (i, w, h), noise: float = 0.0) -> tuple[Signal, Signal, Any]:
    """20 sparse answers, a teacher that says the same within ``noise``, and the keys."""
    rng = np.random.default_rng(3)
    logits, keys = rng.normal(0, 2, (20, 50)), some_keys(20)
    logits[:, 7] = logits[:, 8] = np.sort(logits, 1)[:, -4]  # tied for the last place of the top
    index, weight, entropy = change(*sparse_of(logits, SPARSE, keys, 1))
    told = SparseLogits(torch.from_numpy(index), torch.from_numpy(weight), torch.from_numpy(entropy), 50, SPARSE.temperature)
    live = torch.from_numpy(logits + rng.uniform(-noise, noise, logits.shape))
    return Signal(None, {}, "sparse", told), Signal(live), keys


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_sparse_answers_are_compared_with_what_they_stand_for(tmp_path: Path, noise: float) -> None:
    """Rounding may swap tied classes and move a draw; that is no difference."""
    told, live, keys = sparse_signals(noise=noise)
    assert live.logits is not None
    assert told.sparse is not None
    again = sparse_of(live.logits.numpy(), SPARSE, keys, 1)[0]
    assert np.array_equal(told.sparse.index.numpy(), again) == (noise == 0), "the noise has to be seen"
    compare(told, live, half=False, folder=tmp_path, ids=keys, sparse=SPARSE, view=1)


@pytest.mark.parametrize("name", WRONG)
def test_sparse_answers_of_another_teacher_are_refused(tmp_path: Path, name: str) -> None:
    what, change = WRONG[name]
    told, live, keys = sparse_signals(change)
    with pytest.raises(UsageError, match=f"does not answer as the teacher does: the {what}"):
        compare(told, live, half=False, folder=tmp_path, ids=keys, sparse=SPARSE, view=1)


def test_a_class_that_is_not_among_the_most_probable_is_refused(tmp_path: Path) -> None:
    """Although its own share is right."""
    told, live, keys = sparse_signals()
    assert told.sparse is not None
    assert live.logits is not None
    p = softmax(live.logits.numpy(), SPARSE.temperature)
    told.sparse.index[:, 3] = torch.from_numpy(p.argmin(1))
    told.sparse.weight[:, 3] = torch.from_numpy(p.min(1).astype(np.float32))
    with pytest.raises(UsageError, match="the most probable classes differ"):
        compare(told, live, half=False, folder=tmp_path, ids=keys, sparse=SPARSE, view=1)


def test_sparse_answers_under_another_view_are_refused(tmp_path: Path) -> None:
    told, live, keys = sparse_signals()
    with pytest.raises(UsageError, match="places of the drawn"):
        compare(told, live, half=False, folder=tmp_path, ids=keys, sparse=SPARSE, view=2)


@pytest.mark.parametrize("spec", [Sparse(0.5, 0, 5), Sparse(4.0, 5, 0), Sparse(1.0, 9, 3), Sparse(1.0, 1, 2)])
@pytest.mark.parametrize("scale", [0.1, 300.0])
def test_every_kind_of_sparse_answers_agrees_with_itself(tmp_path: Path, spec: Sparse, scale: float) -> None:
    """No class kept exactly, none drawn, every one kept; flat, and so sure that the rest has no mass."""
    keys, logits = some_keys(30), np.random.default_rng(0).normal(0, scale, (30, 12)).astype(np.float32)
    index, weight, entropy = (torch.from_numpy(x) for x in sparse_of(logits, spec, keys, 0))
    told = Signal(None, {}, "sparse", SparseLogits(index, weight, entropy, 12, spec.temperature))
    compare(told, Signal(torch.from_numpy(logits)), half=False, folder=tmp_path, ids=keys, sparse=spec)
    off = Signal(torch.from_numpy(np.roll(logits, 1, 1)))
    with pytest.raises(UsageError, match="does not answer as the teacher does"):
        compare(told, off, half=False, folder=tmp_path, ids=keys, sparse=spec)
