"""What every loss in the table promises, and the numbers of each against NumPy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.losses import LOSSES, Hint, LossEntry, cross_entropy, kd
from limbeck.objective import Objective, check_terms
from limbeck.recipe import Term
from limbeck.types import Batch, Outputs, Signal

N, C = 8, 5
FEATURES = {"vectors": ((6,), (4,)), "maps": ((3, 4, 4), (4, 2, 2)), "tokens": ((3, 6), (3, 4))}
AGREEING = {"vectors": ((4,), (4,)), "maps": ((3, 4, 4), (3, 4, 4)), "tokens": ((3, 4), (3, 4))}


class Kind(NamedTuple):
    """One loss on one kind of input."""

    entry: LossEntry
    inputs: str

    def __str__(self) -> str:
        return f"{self.entry.name}-{self.inputs}"


def kinds() -> list[Kind]:
    found = []
    for entry in LOSSES.values():
        reads_labels, reads_features = "labels" in entry.reads, any("features" in r for r in entry.reads)
        names = list(FEATURES) if reads_features else ["classes", "probabilities"] if reads_labels else ["logits"]
        found += [Kind(entry, name) for name in names]
    return found


KINDS = kinds()
every_loss = pytest.mark.parametrize("kind", KINDS, ids=str)


def draw(kind: Kind, dtype: torch.dtype = torch.float64, shapes: dict[str, Any] = FEATURES, seed: int = 0) -> list[Tensor]:
    """Random tensors for a loss, in the order in which it reads them."""
    g = torch.Generator().manual_seed(seed)

    def one(read: str) -> Tensor:
        if read == "labels":
            if kind.inputs == "classes":
                return torch.randint(C, (N,), generator=g)
            return torch.softmax(torch.randn(N, C, generator=g, dtype=torch.float64), -1).to(dtype)
        shape = (C,) if read.endswith("logits") else shapes[kind.inputs][read.startswith("teacher")]
        return 3 * torch.randn(N, *shape, generator=g, dtype=torch.float64).to(dtype)

    return [one(read) for read in kind.entry.reads]


def loss_of(kind: Kind, tensors: list[Tensor], **changed: Any) -> Callable[..., Tensor]:
    """The loss with its example's parameters, built for these tensors where it is a module."""
    values = {**kind.entry.example, **changed}
    if not kind.entry.learned:
        return lambda *x: kind.entry.function(*x, **values)
    torch.manual_seed(1)
    module = kind.entry.function(*(tuple(x.shape) for x in tensors[:2]), **values)
    return module.to(tensors[0].dtype)  # type: ignore[no-any-return]


def in_objective(
    kind: Kind, tensors: list[Tensor], **changed: Any
) -> tuple[Objective, Callable[[Batch, list[Tensor]], tuple[Outputs, Signal]]]:
    """An objective of this one loss, and how its outputs and signal are made from the tensors."""
    entry = kind.entry
    term = Term.model_validate({"loss": entry.name, "weight": 0.5, **entry.example, **changed})
    paths = {p.layer.side: entry.example[p.name] for p in entry.parameters.values() if p.layer is not None}
    given = dict(zip(entry.reads, tensors, strict=True))
    shapes = {side: {path: tuple(given[f"{side}.features"].shape)} for side, path in paths.items()}  # type: ignore[index]
    objective = Objective.build(
        [term],
        classes=[str(c) for c in range(C)],
        label_counts=[1] * C,
        shapes_student=shapes.get("student"),
        shapes_teacher=shapes.get("teacher"),
    ).to(tensors[0].dtype)

    def outputs(batch: Batch, now: list[Tensor]) -> tuple[Outputs, Signal]:
        x: dict[str, Tensor] = dict(zip(entry.reads, now, strict=True))
        logits = x.get("student.logits", torch.zeros(len(batch), C, dtype=now[0].dtype))
        student = {paths["student"]: x["student.features"]} if "student.features" in x else {}
        teacher = {paths["teacher"]: x["teacher.features"]} if "teacher.features" in x else {}
        return Outputs(logits, student), Signal(x.get("teacher.logits"), teacher)

    return objective, outputs


def batch_for(kind: Kind, tensors: list[Tensor], mask: Tensor) -> Batch:
    labels = tensors[kind.entry.reads.index("labels")] if "labels" in kind.entry.reads else torch.full((len(mask),), -1)
    return Batch(np.zeros((len(mask), 2), np.uint64), 0, {"x": torch.zeros(len(mask), 1)}, None, labels, mask)


# --- the table ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", LOSSES.values(), ids=lambda e: e.name)
def test_a_row_is_complete(entry: LossEntry) -> None:
    assert LOSSES[entry.name] is entry
    assert inspect.getdoc(entry.function)
    assert 20 < len(entry.summary) <= 140
    assert entry.summary.endswith(".")
    assert entry.source
    assert check_terms([Term.model_validate({"loss": entry.name, **entry.example})]) == []
    for parameter in entry.parameters.values():
        assert parameter.name not in ("loss", "weight")
        assert len(parameter.allowed) > 5
        if not parameter.required:
            assert parameter.read(parameter.default) == parameter.default


@pytest.mark.parametrize("entry", LOSSES.values(), ids=lambda e: e.name)
@pytest.mark.parametrize("wrong", [object(), True, [[]], {"nobody": object()}, float("nan"), ""])
def test_every_parameter_refuses_nonsense(entry: LossEntry, wrong: Any) -> None:
    for name, parameter in entry.parameters.items():
        problems = check_terms([Term.model_validate({"loss": entry.name, **entry.example, name: wrong})])
        assert [p.where for p in problems if not p.where.startswith(f"objective.0.{name}")] == []
        assert problems, f"{name} takes {wrong!r}"
        if not isinstance(wrong, dict):
            assert parameter.allowed in problems[0].message


# --- every loss --------------------------------------------------------------------------------------------------------------------------


@every_loss
def test_one_value_an_item(kind: Kind) -> None:
    for dtype in (torch.float32, torch.float64):
        tensors = draw(kind, dtype)
        values = loss_of(kind, tensors)(*tensors)
        assert values.shape == (N,)
        assert values.dtype == dtype
        assert torch.isfinite(values).all()
        assert (values > -1e-12).all()


@every_loss
def test_order_of_items_does_not_matter(kind: Kind) -> None:
    tensors = draw(kind)
    loss = loss_of(kind, tensors)
    mixed = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(loss(*(x[mixed] for x in tensors)), loss(*tensors)[mixed], rtol=1e-12, atol=1e-12)


@every_loss
def test_an_item_does_not_see_its_neighbours(kind: Kind) -> None:
    if not kind.entry.per_item:
        pytest.skip("relational")
    tensors = draw(kind)
    loss = loss_of(kind, tensors)
    torch.testing.assert_close(loss(*(x[2:5] for x in tensors)), loss(*tensors)[2:5], rtol=1e-12, atol=1e-12)


@every_loss
def test_zero_where_student_and_teacher_agree(kind: Kind) -> None:
    if kind.entry.zero_at is None:
        pytest.skip("not zero at a match")
    tensors = draw(kind, shapes=AGREEING)
    student = tensors[0].clone().requires_grad_()
    loss = loss_of(kind, tensors, **kind.entry.zero_at)
    values = loss(student, tensors[0], *tensors[2:])
    assert float(values.detach().abs().max()) < 1e-14
    assert float(torch.autograd.grad(values.sum(), student)[0].abs().max()) < 1e-14
    assert float(loss(*tensors).detach().min()) > 1e-3


@every_loss
def test_a_shift_of_all_logits(kind: Kind) -> None:
    logits = [i for i, read in enumerate(kind.entry.reads) if read.endswith("logits")]
    if not logits:
        pytest.skip("reads no logits")
    tensors = draw(kind)
    loss = loss_of(kind, tensors)
    for i in logits:
        shifted = [x + torch.arange(1.0, N + 1, dtype=x.dtype)[:, None] if i == j else x for j, x in enumerate(tensors)]
        same = torch.allclose(loss(*shifted), loss(*tensors), rtol=1e-10, atol=1e-10)
        assert same == kind.entry.shift_invariant


@every_loss
def test_gradient_is_the_derivative(kind: Kind) -> None:
    tensors = draw(kind)
    loss = loss_of(kind, tensors)
    student = tensors[0].requires_grad_()
    inputs = (student, *loss.parameters()) if isinstance(loss, nn.Module) else (student,)
    assert torch.autograd.gradcheck(lambda x, *_: loss(x, *tensors[1:]), inputs)


@every_loss
def test_the_teacher_gets_no_gradient(kind: Kind) -> None:
    tensors = draw(kind)
    for x in tensors:
        if x.is_floating_point():
            x.requires_grad_()
    loss_of(kind, tensors)(*tensors).sum().backward()
    for read, x in zip(kind.entry.reads, tensors, strict=True):
        if read.startswith("student"):
            assert x.grad is not None
            assert float(x.grad.abs().max()) > 0
        if read.startswith("teacher"):
            assert x.grad is None


@every_loss
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_types_are_raised(kind: Kind, half: torch.dtype) -> None:
    exact = [x.to(half).double() if x.is_floating_point() else x for x in draw(kind)]
    loss = loss_of(kind, exact)
    want = loss(*exact)
    if isinstance(loss, nn.Module):
        loss.float()
    got = loss(*(x.to(half) if x.is_floating_point() else x for x in exact))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


# --- every loss, through the objective ---------------------------------------------------------------------------------------------------


@every_loss
def test_masking_equals_slicing(kind: Kind) -> None:
    tensors = draw(kind)
    objective, outputs = in_objective(kind, tensors)
    mask = torch.tensor([True, False, True, True, False, False, True, True])
    poisoned = [x.clone() for x in tensors]
    for x in poisoned:
        if x.is_floating_point():
            x[~mask] = torch.nan
    student = poisoned[0].requires_grad_()
    part = [x[mask] for x in tensors]
    batch, sliced = batch_for(kind, poisoned, mask), batch_for(kind, part, torch.ones(5, dtype=torch.bool))
    assert objective.counts(batch) == objective.counts(sliced) == {kind.entry.name: 5}
    got, _ = objective(*outputs(batch, poisoned), batch, progress=0.0, counts=objective.counts(batch))
    want, _ = objective(*outputs(sliced, part), sliced, progress=0.0, counts=objective.counts(sliced))
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(got, student)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).any()


@every_loss
def test_the_cut_does_not_matter(kind: Kind) -> None:
    if not kind.entry.per_item:
        pytest.skip("relational")
    tensors = draw(kind)
    objective, outputs = in_objective(kind, tensors)
    assert objective.per_item
    mask = torch.tensor([True, True, False, True, False, False, True, True])  # 5 valid; 2, 1, 0, 2 of them in the microbatches of two
    results = []
    for cut in ([8], [2, 2, 2, 2], [1, 7], [5, 3]):
        student = tensors[0].clone().requires_grad_()
        now = [student, *tensors[1:]]
        whole = batch_for(kind, now, mask)
        counts = objective.counts(whole)
        objective.zero_grad()
        start, total = 0, torch.zeros((), dtype=torch.float64)
        for size in cut:
            part = whole.part(start, start + size)
            loss, _ = objective(*outputs(part, [x[start : start + size] for x in now]), part, progress=0.0, counts=counts)
            loss.backward()
            total, start = total + loss.detach(), start + size
        results.append([total, student.grad, *(p.grad for p in objective.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# --- numbers, against NumPy in float64 ---------------------------------------------------------------------------------------------------


def softmax(x: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    e = np.exp((x - x.max(-1, keepdims=True)) / temperature)
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 6.0])
def test_kd_is_the_formula(temperature: float) -> None:
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, N, C)) * 3
    p, q = softmax(t, temperature), softmax(s, temperature)
    student = torch.tensor(s, requires_grad=True)
    values = kd(student, torch.tensor(t), temperature=temperature)
    np.testing.assert_allclose(values.detach(), temperature**2 * (p * np.log(p / q)).sum(-1), rtol=1e-12)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    np.testing.assert_allclose(gradient, temperature * (q - p), rtol=1e-11, atol=1e-13)


def test_kd_corners_are_finite() -> None:
    inf = float("inf")
    for dtype in (torch.float32, torch.float64):
        student = torch.tensor([[1.0, 2.0, -inf], [2000.0, -2000.0, 0.0], [0.0, 1.0, 2.0]], dtype=dtype, requires_grad=True)
        teacher = torch.tensor([[2.0, 1.0, -inf], [-2000.0, 2000.0, 0.0], [5.0, -inf, -inf]], dtype=dtype)
        values = kd(student, teacher, temperature=1.0)
        (gradient,) = torch.autograd.grad(values.sum(), student)
        assert torch.isfinite(values).all()
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(values[0], kd(student[:1, :2], teacher[:1, :2], temperature=1.0)[0])
        assert gradient[0, 2] == 0
        assert values[1] == 4000
        torch.testing.assert_close(values[2], torch.logsumexp(student[2], 0))
    assert torch.isinf(kd(torch.tensor([[0.0, -inf]]), torch.tensor([[0.0, 0.0]]))).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_is_the_formula(smoothing: float, weighted: bool, soft: bool) -> None:
    rng = np.random.default_rng(1)
    s = rng.normal(size=(N, C)) * 3
    labels = rng.integers(C, size=N)
    target = rng.dirichlet(np.ones(C), size=N) if soft else np.eye(C)[labels]
    weight = rng.uniform(0.5, 2, C) if weighted else np.ones(C)
    smooth = (target * (1 - smoothing) + smoothing / C) * weight
    student = torch.tensor(s, requires_grad=True)
    values = cross_entropy(
        student,
        torch.tensor(target if soft else labels),
        label_smoothing=smoothing,
        class_weights=torch.tensor(weight) if weighted else None,
    )
    np.testing.assert_allclose(values.detach(), -(smooth * np.log(softmax(s))).sum(-1), rtol=1e-12)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    np.testing.assert_allclose(gradient, softmax(s) * smooth.sum(-1, keepdims=True) - smooth, rtol=1e-11, atol=1e-13)


def test_cross_entropy_with_a_masked_class_and_mixup() -> None:
    student = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    values = cross_entropy(student, torch.tensor([[0.3, 0.7, 0.0]]))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    torch.testing.assert_close(values, cross_entropy(student[:, :2], torch.tensor([[0.3, 0.7]])))
    assert gradient[0, 2] == 0


def test_hint_is_the_formula() -> None:
    rng = np.random.default_rng(2)
    s, t = rng.normal(size=(N, 3, 4, 4)), rng.normal(size=(N, 5, 2, 2))
    hint = Hint(s.shape, t.shape, student="a", teacher="b").double()
    weight, bias = (p.detach().numpy() for p in hint.parameters())
    projected = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0], s) + bias[None, :, None, None]
    pooled = projected.reshape(N, 5, 2, 2, 2, 2).mean((3, 5))
    np.testing.assert_allclose(hint(torch.tensor(s), torch.tensor(t)).detach(), ((pooled - t) ** 2).mean((1, 2, 3)), rtol=1e-12)

    s, t = rng.normal(size=(N, 3, 6)), rng.normal(size=(N, 3, 4))
    hint = Hint(s.shape, t.shape, student="a", teacher="b").double()
    weight, bias = (p.detach().numpy() for p in hint.parameters())
    np.testing.assert_allclose(hint(torch.tensor(s), torch.tensor(t)).detach(), ((s @ weight.T + bias - t) ** 2).mean((1, 2)), rtol=1e-12)


@pytest.mark.parametrize(
    ("size", "to"), [((8, 8), (4, 4)), ((4, 4), (8, 8)), ((8, 8), (8, 8)), ((8, 7), (5, 6)), ((3, 5), (3, 5))], ids=str
)
def test_convreg_reaches_the_teachers_size(size: tuple[int, int], to: tuple[int, int]) -> None:
    hint = Hint((4, 3, *size), (4, 5, *to), student="a", teacher="b", projector="convreg")
    assert hint.projection(torch.randn(4, 3, *size)).shape == (4, 5, *to)
    assert (hint.projection(torch.randn(4, 3, *size)) >= 0).all()
