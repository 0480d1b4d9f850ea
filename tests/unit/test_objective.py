"""The objective divides once, by the counts of the whole step; it selects items, resolves parameters and reports mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.errors import UsageError
from limbeck.objective import Objective, check_terms, needs_of, value_at
from limbeck.recipe import Schedule, Term
from limbeck.types import Batch, Needs, Outputs, Signal

N, C = 8, 4
CLASSES = ("ant", "bee", "cat", "dog")
COUNTS = (10, 20, 30, 40)


def terms(*rows: dict[str, Any]) -> list[Term]:
    return [Term.model_validate(row) for row in rows]


def build(*rows: dict[str, Any], **shapes: Any) -> Objective:
    return Objective.build(terms(*rows), classes=CLASSES, label_counts=COUNTS, **shapes)


def batch_of(labels: Any, mask: Any = None, student: dict[str, Tensor] | None = None, teacher: dict[str, Tensor] | None = None) -> Batch:
    labels = torch.as_tensor(labels)
    mask = torch.ones(len(labels), dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    return Batch(np.zeros((len(labels), 2), np.uint64), 0, student or {}, teacher, labels, mask)


def problems(*rows: dict[str, Any], **shapes: Any) -> dict[str, str]:
    with pytest.raises(UsageError) as raised:
        build(*rows, **shapes)
    return {p.where: str(p) for p in raised.value.problems}


def softmax(x: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    e = np.exp((x - x.max(-1, keepdims=True)) / temperature)
    return e / e.sum(-1, keepdims=True)


# --- one step's loss, against NumPy in float64 -------------------------------------------------------------------------------------------

LABELS = np.array([0, -1, 3, 1, -1, -1, 2, 0])
MASK = np.array([True, True, True, False, True, True, True, True])
MIX = (
    {"loss": "kd", "weight": 0.7, "temperature": {"start": 6.0, "end": 2.0}},
    {"loss": "cross_entropy", "weight": {"start": 0.0, "end": 0.6, "shape": "cosine"}, "label_smoothing": 0.1, "class_weights": "balanced"},
)


def by_numpy(s: np.ndarray, t: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray, dict[str, float]]:
    """Loss, gradient with respect to the logits, and terms at progress 0.25, from the definitions."""
    temperature, ce_weight = 5.0, 0.6 * (1 - np.cos(np.pi * 0.25)) / 2
    soft = labels if labels.ndim == 2 else np.where(labels[:, None] >= 0, np.eye(C)[labels], 0)
    labelled = MASK & (soft.sum(1) > 0)
    p, q = softmax(t, temperature), softmax(s, temperature)
    kd = temperature**2 * (p * np.log(p / q)).sum(1)
    weight = sum(COUNTS) / (C * np.array(COUNTS, float))
    target = (soft * 0.9 + 0.1 / C) * weight
    ce = -(target * np.log(softmax(s))).sum(1)
    means = {"kd": kd[MASK].sum() / MASK.sum(), "cross_entropy": ce[labelled].sum() / labelled.sum()}
    gradient = 0.7 * temperature * (q - p) * MASK[:, None] / MASK.sum()
    gradient += ce_weight * (softmax(s) * target.sum(1, keepdims=True) - target) * labelled[:, None] / labelled.sum()
    return 0.7 * means["kd"] + ce_weight * means["cross_entropy"], gradient, means


def mixup_labels() -> np.ndarray:
    mixed = np.random.default_rng(5).dirichlet(np.ones(C), size=N)
    mixed[LABELS < 0] = 0
    return mixed


@pytest.mark.parametrize("labels", [LABELS, mixup_labels()], ids=["classes", "mixup"])
@pytest.mark.parametrize("cut", [[8], [2, 2, 2, 2], [1, 7], [1] * 8], ids=str)
def test_a_step_is_the_formula_however_it_is_cut(labels: np.ndarray, cut: list[int]) -> None:
    rng = np.random.default_rng(3)
    s, t = rng.normal(size=(2, N, C)) * 2
    value, gradient, means = by_numpy(s, t, labels)
    objective = build(*MIX)
    student = torch.tensor(s, requires_grad=True)
    whole = batch_of(labels, MASK)
    counts = objective.counts(whole)
    assert counts == {"kd": 7, "cross_entropy": 4}
    loss, logged, start = 0.0, dict.fromkeys(objective.names, 0.0), 0
    for size in cut:
        stop = start + size
        part = whole.part(start, stop)
        share, values = objective(Outputs(student[start:stop]), Signal(torch.tensor(t[start:stop])), part, progress=0.25, counts=counts)
        share.backward()
        loss, start = loss + share.item(), stop
        logged = {name: logged[name] + values[name].item() for name in logged}
        assert not any(v.requires_grad for v in values.values())
    assert student.grad is not None
    np.testing.assert_allclose(loss, value, rtol=1e-12)
    np.testing.assert_allclose(student.grad, gradient, rtol=1e-12, atol=1e-14)
    assert logged == pytest.approx(means, rel=1e-12)


def test_a_term_without_items_is_a_differentiable_zero() -> None:
    objective = build({"loss": "cross_entropy"}, {"loss": "hint", "student": "a", "teacher": "b"}, **SHAPES["maps"])
    student, feature = torch.randn(N, C, requires_grad=True), torch.randn(N, 3, 4, 4, requires_grad=True)
    batch = batch_of([-1] * N, [False] * N)
    counts = objective.counts(batch)
    assert counts == {"cross_entropy": 0, "hint": 0}
    outputs, signal = Outputs(student, {"a": feature}), Signal(None, {"b": torch.randn(N, 5, 2, 2)})
    loss, logged = objective(outputs, signal, batch, progress=0.0, counts=counts)
    loss.backward()
    assert loss == 0
    assert [float(v) for v in logged.values()] == [0.0, 0.0]
    assert student.grad is not None
    assert feature.grad is not None
    assert not student.grad.any()
    assert not feature.grad.any()


def test_a_term_of_weight_zero_is_off() -> None:
    objective = build({"loss": "kd", "weight": {"start": 0.0, "end": 1.0}}, {"loss": "cross_entropy"})
    student = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]], requires_grad=True)
    batch = batch_of([1])
    loss, logged = objective(Outputs(student), Signal(torch.zeros(1, C)), batch, progress=0.0, counts=objective.counts(batch))
    loss.backward()
    assert torch.isinf(logged["kd"])
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_losses_are_computed_outside_autocast() -> None:
    objective = build({"loss": "hint", "student": "a", "teacher": "b"}, **SHAPES["vectors"])
    a, b = torch.randn(N, 3), torch.randn(N, 5)
    batch = batch_of([-1] * N)
    weight, bias = objective.parameters()
    want = (a @ weight.T + bias - b).square().mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = objective(
            Outputs(torch.zeros(N, C), {"a": a}), Signal(None, {"b": b}), batch, progress=0.0, counts=objective.counts(batch)
        )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


# --- features ----------------------------------------------------------------------------------------------------------------------------

SHAPES = {
    "vectors": {"shapes_student": {"a": (2, 3)}, "shapes_teacher": {"b": (2, 5)}},
    "maps": {"shapes_student": {"a": (2, 3, 4, 4)}, "shapes_teacher": {"b": (2, 5, 2, 2)}},
    "tokens": {"shapes_student": {"a": (2, 6, 3)}, "shapes_teacher": {"b": (2, 6, 5)}},
}
HINT = {"loss": "hint", "student": "a", "teacher": "b"}


def test_tokens_are_the_items_of_text_features() -> None:
    objective = build(HINT, **SHAPES["tokens"]).double()
    rng = np.random.default_rng(4)
    s, t = rng.normal(size=(3, 6, 3)), rng.normal(size=(3, 6, 5))
    attention = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    batch = batch_of([-1, 0, 1], [True, False, True], {"attention_mask": torch.tensor(attention)})
    assert objective.counts(batch) == {"hint": 4}
    weight, bias = (p.detach().numpy() for p in objective.parameters())
    error = ((s @ weight.T + bias - t) ** 2).mean(-1)
    want = (error[0, :3].sum() + error[2, 0]) / 4
    outputs, signal = Outputs(torch.zeros(3, C, dtype=torch.float64), {"a": torch.tensor(s)}), Signal(None, {"b": torch.tensor(t)})
    loss, _ = objective(outputs, signal, batch, progress=0.0, counts={"hint": 4})
    np.testing.assert_allclose(loss.item(), want, rtol=1e-12)


def test_other_tokens_are_refused() -> None:
    objective = build(HINT, **SHAPES["tokens"])
    student = {"attention_mask": torch.tensor([[1, 1, 0]])}
    batch = batch_of([0], None, student)
    with pytest.raises(UsageError, match=r"layer 'b' of the teacher gives \(1, 4, 5\)"):
        objective(
            Outputs(torch.zeros(1, C), {"a": torch.zeros(1, 3, 3)}),
            Signal(None, {"b": torch.zeros(1, 4, 5)}),
            batch,
            progress=0.0,
            counts={"hint": 2},
        )


def test_a_teacher_with_other_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="4 classes and the teacher 1"):
        build({"loss": "kd"})(Outputs(torch.zeros(2, C)), Signal(torch.zeros(2, 1)), batch_of([0, 1]), progress=0.0, counts={"kd": 2})


@pytest.mark.parametrize(
    ("row", "student", "teacher", "message"),
    [
        (HINT, (2, 3), (2, 3, 4, 4), "layer 'a' of the student gives (B, 3), layer 'b' of the teacher (B, 3, 4, 4)"),
        (HINT, (2, 5, 3), (2, 6, 3), "linear cannot compare these"),
        ({**HINT, "projector": "conv"}, (2, 5, 3), (2, 5, 3), "conv cannot compare these"),
        ({**HINT, "projector": "none"}, (2, 3), (2, 4), "Choose layers of equal shapes"),
        ({**HINT, "projector": "none"}, (2, 3, 4, 4), (2, 5, 4, 4), "Choose layers of equal shapes"),
        ({**HINT, "projector": "convreg"}, (2, 3, 4, 4), (2, 3, 7, 7), "convreg cannot bring a map of 4 x 4 to 7 x 7"),
    ],
)
def test_features_that_do_not_fit(row: dict[str, Any], student: Any, teacher: Any, message: str) -> None:
    found = problems({"loss": "kd"}, row, shapes_student={"a": student}, shapes_teacher={"b": teacher})
    assert list(found) == ["objective.1.projector"]
    assert message in found["objective.1.projector"]


def test_unknown_layers_are_all_named() -> None:
    assert set(problems(HINT)) == {"objective.0.student", "objective.0.teacher"}


def test_projections_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    weights = [list(build(HINT, seed=seed, **SHAPES["maps"]).state_dict().values()) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not torch.equal(weights[0][0], weights[2][0])


def test_batch_statistics_are_admitted() -> None:
    assert build(HINT, **SHAPES["maps"]).per_item
    assert not build({**HINT, "projector": "convreg"}, **SHAPES["maps"]).per_item


# --- what it asks for, names, baseline ---------------------------------------------------------------------------------------------------


def test_needs_and_names() -> None:
    assert needs_of(terms({"loss": "cross_entropy"})) == (Needs(), Needs(logits=False))
    assert needs_of(terms({"loss": "kd"}, HINT, HINT)) == (Needs(features=("a",)), Needs(features=("b",)))
    assert needs_of(terms(HINT)) == (Needs(features=("a",)), Needs(logits=False, features=("b",)))
    objective = build({"loss": "kd"}, {"loss": "cross_entropy"}, {"loss": "kd", "weight": 2}, HINT, **SHAPES["vectors"])
    assert objective.names == ("kd", "cross_entropy", "kd.2", "hint")
    assert objective.needs_teacher
    assert objective.weights(0.0) == {"kd": 1.0, "cross_entropy": 1.0, "kd.2": 2.0, "hint": 1.0}
    assert sum(p.numel() for p in objective.parameters()) == 3 * 5 + 5
    assert not build({"loss": "cross_entropy"}).needs_teacher


def test_the_baseline_keeps_what_cross_entropy_was_told() -> None:
    rows = terms(
        {"loss": "kd", "weight": 0.7}, {"loss": "cross_entropy", "weight": 0.3, "label_smoothing": 0.2, "class_weights": {"bee": 3}}
    )
    baseline = Objective.baseline(rows, classes=CLASSES, label_counts=COUNTS)
    student, batch = torch.randn(N, C), batch_of([1, 0, 2, 3, -1, 1, 1, 0])
    weight = torch.tensor([1.0, 3.0, 1.0, 1.0])
    known = batch.labels >= 0
    want = torch.nn.functional.cross_entropy(student[known], batch.labels[known], weight, label_smoothing=0.2, reduction="none").mean()
    got, _ = baseline(Outputs(student), None, batch, progress=0.9, counts=baseline.counts(batch))
    torch.testing.assert_close(got, want)
    assert not baseline.needs_teacher
    plain = Objective.baseline(terms({"loss": "kd"}), classes=CLASSES, label_counts=COUNTS)
    got, _ = plain(Outputs(student), None, batch, progress=0.0, counts=plain.counts(batch))
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(student[known], batch.labels[known]))


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ({"dog": 0.5}, [1, 1, 1, 0.5]),
        ("balanced", [2.5, 1.25, 100 / 120, 0.625]),
    ],
)
def test_class_weights(given: Any, want: list[float]) -> None:
    objective = build({"loss": "cross_entropy", "class_weights": given})
    student = torch.zeros(C, C, dtype=torch.float64)
    for c in range(C):
        batch = batch_of([c])
        value, _ = objective(Outputs(student[c : c + 1]), None, batch, progress=0.0, counts={"cross_entropy": 1})
        assert float(value) == pytest.approx(want[c] * np.log(C), rel=1e-12)


def test_balanced_leaves_out_classes_that_never_occur() -> None:
    rows = terms({"loss": "cross_entropy", "class_weights": "balanced"})
    objective = Objective.build(rows, classes=CLASSES, label_counts=np.array([1, 0, 3, 0]))
    batch = batch_of([0, 2, 2, 2])
    value, _ = objective(Outputs(torch.zeros(4, C)), None, batch, progress=0.0, counts={"cross_entropy": 4})
    assert float(value) == pytest.approx(np.log(C))
    with pytest.raises(UsageError, match="there are none"):
        Objective.build(rows, classes=CLASSES, label_counts=[0, 0, 0, 0])


# --- schedules ---------------------------------------------------------------------------------------------------------------------------


def test_schedules() -> None:
    linear = Schedule(start=2.0, end=1.0, until=0.5)
    assert [value_at(linear, p) for p in (0, 0.25, 0.5, 1.0)] == [2.0, 1.5, 1.0, 1.0]
    cosine = Schedule(start=0.0, end=1.0, shape="cosine")
    assert [value_at(cosine, p) for p in (0, 0.5, 1.0)] == pytest.approx([0.0, 0.5, 1.0])
    assert value_at(cosine, 0.25) == pytest.approx((1 - np.sqrt(0.5)) / 2)
    assert value_at(3, 0.4) == 3.0


# --- mistakes ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "where", "message"),
    [
        ({"loss": "kdd"}, "loss", "Did you mean 'kd'?"),
        ({"loss": "kd", "temprature": 3}, "temprature", "Did you mean 'temperature'?"),
        ({"loss": "kd", "temperature": 0}, "temperature", "0 is not allowed; give a number above 0"),
        ({"loss": "kd", "temperature": -1.0}, "temperature", "a number above 0"),
        ({"loss": "kd", "temperature": float("inf")}, "temperature", "a number above 0"),
        ({"loss": "kd", "temperature": "warm"}, "temperature", "a number above 0"),
        ({"loss": "kd", "temperature": {"start": 4, "end": 0}}, "temperature.end", "0.0 is not allowed"),
        ({"loss": "kd", "temperature": {"start": 4}}, "temperature.end", "required"),
        ({"loss": "kd", "weight": -0.1}, "weight", "-0.1 is not allowed; give a number from 0 up"),
        ({"loss": "kd", "weight": {"start": -1, "end": 1}}, "weight.start", "-1.0 is not allowed"),
        ({"loss": "kd", "label_smoothing": 0.1}, "label_smoothing", "'kd' has no parameter 'label_smoothing'"),
        ({"loss": "cross_entropy", "label_smoothing": 1.0}, "label_smoothing", "up to but not including 1"),
        ({"loss": "cross_entropy", "label_smoothing": {"start": 0, "end": 0.1}}, "label_smoothing", "is not allowed"),
        ({"loss": "cross_entropy", "class_weights": "balance"}, "class_weights", "or balanced"),
        ({"loss": "cross_entropy", "class_weights": {"bee": -1}}, "class_weights", "from 0 up"),
        ({"loss": "hint", "teacher": "b"}, "student", "'hint' needs it"),
        ({**HINT, "projector": "liner"}, "projector", "Did you mean 'linear'?"),
        ({"loss": "cross_entropy", "class_weights": [1, 2]}, "class_weights", "has 2 numbers for 4 classes"),
        ({"loss": "cross_entropy", "class_weights": {"bea": 2}}, "class_weights", "Did you mean 'bee'?"),
    ],
)
def test_mistakes_are_sentences(row: dict[str, Any], where: str, message: str) -> None:
    found = problems({"loss": "kd"}, row)
    assert list(found) == [f"objective.1.{where}"]
    assert message in found[f"objective.1.{where}"]


def test_all_mistakes_at_once() -> None:
    assert len(check_terms(terms({"loss": "kdd"}, {"loss": "kd", "temperature": 0, "tau": 1}, {"loss": "hint", "weight": -1}))) == 6
    assert [p.where for p in check_terms([])] == ["objective"]
    assert "every weight is 0" in str(
        check_terms(terms({"loss": "kd", "weight": 0}, {"loss": "cross_entropy", "weight": {"start": 0, "end": 0}}))[0]
    )
    assert check_terms(terms({"loss": "kd", "weight": {"start": 0, "end": 1}, "temperature": "1e-3"})) == []
