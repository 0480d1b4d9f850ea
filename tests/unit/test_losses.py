"""What every loss in the table promises, and the numbers of each against NumPy."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from limbeck.errors import UsageError
from limbeck.losses import (
    LOSSES,
    Correlation,
    Cosine,
    Hint,
    Kdcl,
    LossEntry,
    MeanTeacher,
    Mutual,
    Ofd,
    Population,
    Vid,
    _described,
    attention_transfer,
    cka,
    correlation_rbf,
    cross_entropy,
    dist,
    dkd,
    fkl,
    hard,
    jsd,
    kd,
    kd_sigmoid,
    minilm,
    minilm_v2,
    mse_logits,
    nkd,
    nst,
    ofa,
    patient,
    pkt,
    rkd_angle,
    rkd_distance,
    rkl,
    similarity_preserving,
    soft_cross_entropy,
    tinybert_attention,
    wsld,
)
from limbeck.losses.transformers import split_heads, tinybert_scores
from limbeck.objective import Objective, check_terms
from limbeck.recipe import Term
from limbeck.types import Batch, Outputs, Signal

N, C = 8, 5
FEATURES = {"vectors": ((6,), (4,)), "maps": ((3, 4, 4), (4, 2, 2)), "tokens": ((3, 6), (3, 4)), "projections": ((3, 24), (3, 12))}
AGREEING = {"vectors": ((4,), (4,)), "maps": ((3, 4, 4), (3, 4, 4)), "tokens": ((3, 4), (3, 4)), "projections": ((3, 24), (3, 24))}
EXAMPLE = {"heads": 2, "negatives": 5}
"""In place of what stands in an example, for features and data as small as these."""
IDS = np.stack([np.arange(20, dtype=np.uint64), np.zeros(20, np.uint64)], axis=1)
POPULATION = Population(IDS, np.arange(20) % 4)


class Kind(NamedTuple):
    """One loss on one kind of input."""

    entry: LossEntry
    inputs: str

    def __str__(self) -> str:
        return f"{self.entry.name}-{self.inputs}"


def shapes_of(entry: LossEntry, name: str, agreeing: bool = False) -> Any:
    """(student, teacher) shapes, batch first: unequal ones wherever the loss takes them."""
    given = [tuple((N, *shape) for shape in table[name]) for table in (FEATURES, AGREEING)]
    return given[0] if not agreeing and fit(entry, *given[0]) else given[1]


def fit(entry: LossEntry, student: Any, teacher: Any) -> bool:
    """Whether the loss takes features of these shapes."""
    if not entry.learned:
        return entry.fits is None or not entry.fits(student, teacher, example(entry))
    try:
        built(entry, (student, teacher), entry.example)
    except UsageError:
        return False
    return True


@dataclass
class Peer:
    """Answers with what stands in the batch for it."""

    number: int
    module: nn.Module = field(default_factory=nn.Identity)

    def __call__(self, inputs: Any) -> Tensor:
        return inputs["average"] if self.number < 0 else inputs["peers"][:, self.number]


def built(entry: LossEntry, shapes: Any, values: dict[str, Any]) -> nn.Module:
    """A loss that is a module, for features of these shapes."""
    if "peers.logits" in entry.reads:
        return entry.function([Peer(i) for i in range(2)], **values)  # type: ignore[no-any-return]
    if entry.exits:
        return entry.function(shapes[0], C, **values)  # type: ignore[no-any-return]
    if "average.logits" in entry.reads:
        return entry.function(None, **values)  # type: ignore[no-any-return]
    rows = [len(POPULATION)] * ("samples" in entry.reads)
    return entry.function(*shapes, *rows, **values)  # type: ignore[no-any-return]


def example(entry: LossEntry) -> dict[str, Any]:
    one_level = {side: each[0] for side, each in entry.example.items() if entry.layers == "together"}
    return {**entry.example, **one_level, **{k: v for k, v in EXAMPLE.items() if k in entry.example}}


def kinds() -> list[Kind]:
    found: list[Kind] = []
    for entry in LOSSES.values():
        if any("features" in r for r in entry.reads):
            names = [n for n in FEATURES if (n == "projections") == bool(entry.part) and fit(entry, *shapes_of(entry, n))]
        elif "labels" in entry.reads:
            names = ["classes"] if entry.hard_labels else ["classes", "probabilities"]
        else:
            names = ["logits"]
        assert names, f"no kind of input fits {entry.name}"
        found += [Kind(entry, name) for name in names]
    return found


KINDS = kinds()
every_loss = pytest.mark.parametrize("kind", KINDS, ids=str)


def draw(kind: Kind, dtype: torch.dtype = torch.float64, agreeing: bool = False, seed: int = 0) -> list[Tensor]:
    """Random tensors for a loss, in the order in which it reads them."""
    g = torch.Generator().manual_seed(seed)

    def one(read: str) -> Tensor:
        if read == "labels":
            if kind.inputs == "classes":
                return torch.randint(C, (N,), generator=g)
            return torch.softmax(torch.randn(N, C, generator=g, dtype=torch.float64), -1).to(dtype)
        if read == "samples":
            return torch.from_numpy(POPULATION.drawn(IDS[:N], EXAMPLE["negatives"], seed))
        if read == "peers.logits":
            return 3 * torch.randn(N, 2, C, generator=g, dtype=torch.float64).to(dtype)
        if read == "mask":
            return (torch.arange(3) < torch.randint(1, 4, (N, 1), generator=g)).long()
        shape = (N, C) if read.endswith("logits") else shapes_of(kind.entry, kind.inputs, agreeing)[read.startswith("teacher")]
        return 3 * torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return [one(read) for read in kind.entry.reads]


def loss_of(kind: Kind, tensors: list[Tensor], **changed: Any) -> Callable[..., Tensor]:
    """The loss with its example's parameters, built for these tensors where it is a module."""
    values = {**example(kind.entry), **changed}
    if not kind.entry.learned:
        paths = {p.name for p in kind.entry.parameters.values() if p.layer is not None}
        return lambda *x: kind.entry.function(*x, **{k: v for k, v in values.items() if k not in paths})
    torch.manual_seed(1)
    return built(kind.entry, [tuple(x.shape) for x in tensors[:2]], values).to(tensors[0].dtype)


def in_objective(
    kind: Kind, tensors: list[Tensor], **changed: Any
) -> tuple[Objective, Callable[[Batch, list[Tensor]], tuple[Outputs, Signal]]]:
    """An objective of this one loss, and how its outputs and signal are made from the tensors."""
    entry = kind.entry
    term = Term.model_validate({"loss": entry.name, "weight": 0.5, **example(entry), **changed})
    paths = {side: each[0] for side, each in entry.paths(entry.example).items()}
    given = dict(zip(entry.reads, tensors, strict=True))
    shapes = {side: {path: tuple(given[f"{side}.features"].shape)} for side, path in paths.items()}  # type: ignore[index]
    objective = Objective.build(
        [term],
        classes=[str(c) for c in range(C)],
        label_counts=[1] * C,
        shapes_student=shapes.get("student"),
        shapes_teacher=shapes.get("teacher"),
        population=POPULATION,
        peers=[Peer(i) for i in range(2)],
        student=Peer(-1),
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
    inputs = {"x": torch.zeros(len(mask), 1)}
    if "mask" in kind.entry.reads:
        inputs = {"attention_mask": tensors[kind.entry.reads.index("mask")]}
    if "peers.logits" in kind.entry.reads:
        inputs = {"peers": tensors[kind.entry.reads.index("peers.logits")]}
    if "average.logits" in kind.entry.reads:
        inputs = {"average": tensors[kind.entry.reads.index("average.logits")]}
    ids = IDS[tensors[2][:, 0]] if "samples" in kind.entry.reads else np.zeros((len(mask), 2), np.uint64)
    return Batch(ids, 0, inputs, None, labels, mask)


# --- the table ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", LOSSES.values(), ids=lambda e: e.name)
def test_a_row_is_complete(entry: LossEntry) -> None:
    assert LOSSES[entry.name] is entry
    assert inspect.getdoc(entry.function)
    assert 20 < len(entry.summary) <= 160
    assert entry.summary.endswith(".")
    assert entry.compares
    assert entry.helps
    said = inspect.getdoc(entry.function) or ""
    assert said.startswith("``"), "a docstring begins with the formula"
    assert "\n>>> " in said
    assert entry.name == "cross_entropy" or re.search(r"Source: .*arXiv:\d", said, re.DOTALL)
    (first, *_) = yaml.safe_load(_described.snippet(entry))["objective"]
    assert check_terms([Term.model_validate(first)]) == []
    assert first["loss"] == entry.name
    assert entry.source
    assert entry.cost
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
        if parameter.plain is type(wrong):  # true is a sensible value there
            continue
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
        assert kind.entry.below_zero or (values > -1e-12).all()


ORDERED = {"correlation": "compares neighbours in the batch, by definition"}


@every_loss
def test_order_of_items_does_not_matter(kind: Kind) -> None:
    if kind.entry.name in ORDERED:
        pytest.skip(ORDERED[kind.entry.name])
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
    tensors = draw(kind, agreeing=True)
    student = tensors[0].clone().requires_grad_()
    loss = loss_of(kind, tensors, **kind.entry.zero_at)
    values = loss(student, tensors[0], *tensors[2:])
    near = kind.entry.near_zero + 1e-14
    assert float(values.detach().abs().max()) < near
    assert float(torch.autograd.grad(values.sum(), student)[0].abs().max()) < near
    assert float(loss(*tensors).detach().mean()) > 10 * near + 1e-3


@every_loss
def test_a_shift_of_all_logits(kind: Kind) -> None:
    logits = [i for i, read in enumerate(kind.entry.reads) if read.endswith("logits")]
    if not logits:
        pytest.skip("reads no logits")
    tensors = draw(kind)
    loss = loss_of(kind, tensors)
    for i in logits:
        shifted = [
            x + torch.arange(1.0, N + 1, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1)) if i == j else x for j, x in enumerate(tensors)
        ]
        same = torch.allclose(loss(*shifted), loss(*tensors), rtol=1e-10, atol=1e-10)
        assert same == kind.entry.shift_invariant


DETACHED = {
    "wsld": "its weights are taken as constants, by definition; the reference cases hold their gradient",
    "mutual": "what teaches is a constant, by definition; test_students_learn_from_each_other holds the gradient",
    "kdcl": "what teaches is a constant, by definition; test_students_learn_from_the_best holds the gradient",
}


@every_loss
def test_gradient_is_the_derivative(kind: Kind) -> None:
    if kind.entry.name in DETACHED:
        pytest.skip(DETACHED[kind.entry.name])
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
        own_teacher = kind.entry.exits and read == "student.logits"  # the last layer teaches the earlier ones
        if read.startswith("student") and not own_teacher:
            assert x.grad is not None
            assert float(x.grad.abs().max()) > 0
        if read.startswith("teacher") or own_teacher:
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


INF = float("inf")
CORNERS = {  # logits of student and teacher; the label is class 0
    "one sample": ([[1.0, 2.0, 0.5]], [[0.0, 3.0, 1.0]]),
    "two classes": ([[1.0, 2.0], [3.0, 1.0]], [[0.0, 3.0], [1.0, 1.0]]),
    "both sure": ([[2000.0, 0.0, 1.0], [0.0, 2000.0, 1.0]], [[2000.0, 1.0, 0.0], [2000.0, 0.0, 1.0]]),
    "sure of another": ([[0.0, 2000.0, 1.0], [0.0, 300.0, 1.0]], [[2000.0, 1.0, 0.0], [0.0, 0.0, 2000.0]]),
    "masked on both sides": ([[1.0, 2.0, -INF], [0.0, 1.0, -INF]], [[2.0, 1.0, -INF], [1.0, 1.0, -INF]]),
    "the label alone": ([[1.0, -INF, -INF], [0.0, 1.0, 2.0]], [[2.0, -INF, -INF], [1.0, 1.0, 0.0]]),
    "a class that the teacher excludes": ([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]], [[2.0, -INF, 0.0], [1.0, 0.0, -INF]]),
    "even": ([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]]),
    "huge": ([[1e15, 1.0, 0.0], [-1e15, 0.0, 1e15]], [[1e15, 0.0, 1.0], [0.0, -1e15, 1e15]]),
}
INFINITE = {(name, "a class that the teacher excludes") for name in ("rkl", "mse_logits", "mutual")}
OF_LOGITS = [e for e in LOSSES.values() if "student.logits" in e.reads and not e.exits]


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("entry", OF_LOGITS, ids=lambda e: e.name)
def test_corners_of_logits_are_finite(entry: LossEntry, corner: str) -> None:
    variants: list[dict[str, Any]] = (
        [{"label_smoothing": 0.0}] if entry.name == "cross_entropy" else [{}]
    )  # smoothing would ask for a masked class
    variants += [{"standardize": True}] * ("standardize" in entry.parameters)
    for dtype, changed in itertools.product((torch.float32, torch.float64), variants):
        student, teacher = (torch.tensor(x, dtype=dtype) for x in CORNERS[corner])
        given = {
            "student.logits": student.requires_grad_(),
            "teacher.logits": teacher,
            "peers.logits": teacher[:, None],
            "average.logits": teacher,
            "labels": torch.zeros(len(student), dtype=torch.int64),
        }
        values_of = built(entry, None, {**entry.example}) if entry.learned else partial(entry.function, **{**entry.example, **changed})
        values = values_of(*(given[read] for read in entry.reads))
        if (entry.name, corner) in INFINITE:  # truly so: the value says it
            assert torch.isinf(values).any()
            continue
        assert torch.isfinite(values).all(), values
        (gradient,) = torch.autograd.grad(values.sum(), student)
        assert torch.isfinite(gradient).all(), gradient
        assert (gradient[torch.isneginf(student)] == 0).all()


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("name", ["ofa_exits", "byot"])
def test_an_exit_is_taught_by_any_logits(name: str, corner: str) -> None:
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor(CORNERS[corner][1], dtype=dtype)
        torch.manual_seed(0)
        features = torch.randn(len(logits), 6, dtype=dtype, requires_grad=True)
        loss = LOSSES[name].function(tuple(features.shape), logits.shape[1], student="a").to(dtype)
        values = loss(features, torch.ones(len(logits), 6), logits, torch.zeros(len(logits), dtype=torch.int64))
        assert torch.isfinite(values).all()
        for gradient in torch.autograd.grad(values.sum(), [features, *loss.parameters()]):
            assert torch.isfinite(gradient).all()


def test_what_teaches_without_a_teacher_is_known_where_recipes_are_read() -> None:
    from limbeck import _recipe_check

    assert set(_recipe_check.SELF_TAUGHT) == {entry.name for entry in LOSSES.values() if entry.self_taught}


def test_the_average_moves_behind_each_step() -> None:
    """Warmed up as the authors do, batch statistics too; counts are taken over, and a step that was none moves nothing."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    loss = MeanTeacher(Peer(-1, student), decay=0.7)
    loss.follow(student)
    assert loss.train().average.training is False
    kept = {name: value.numpy().copy() for name, value in student.state_dict().items()}
    for step in range(1, 6):
        loss.stepped(keep=False)
        with torch.no_grad():
            for value in student.state_dict().values():
                value += 1 if not value.is_floating_point() else torch.randn(value.shape)
        loss.stepped()
        a = min(1 - 1 / (step + 1), 0.7)
        for name, value in student.state_dict().items():
            now = value.numpy()
            kept[name] = a * kept[name] + (1 - a) * now if value.is_floating_point() else now.copy()
            np.testing.assert_allclose(loss.average.state_dict()[name], kept[name], rtol=1e-7)
    assert not any(p.requires_grad for p in loss.parameters())
    x, z = torch.randn(N, C), torch.randn(N, C)
    np.testing.assert_allclose(loss(x, z), ((softmax(x.numpy()) - softmax(z.numpy())) ** 2).sum(1) / C, rtol=1e-5)
    torch.testing.assert_close(MeanTeacher(cost="kl", temperature=3.0)(x, z), kd(x, z, temperature=3.0))


def test_tied_weights_are_averaged_once() -> None:
    student = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    student[1].weight = student[0].weight
    loss = MeanTeacher(Peer(-1, student), decay=0.9)
    loss.follow(student)
    before = student[0].weight.detach().clone()
    with torch.no_grad():
        student[0].weight += 1
    loss.stepped()
    torch.testing.assert_close(loss.average[0].weight, before + 0.5)  # type: ignore[index]


def test_students_learn_from_each_other() -> None:
    """Equation 8 in NumPy, value; and gradient: of each student's own part, with what the others say held still."""
    rng = np.random.default_rng(7)
    z, y = rng.normal(size=(N, 3, C)), rng.integers(0, C, N)
    p = softmax(z)
    want = []
    for q, label in zip(p, y, strict=True):
        taught = sum((q[other] * np.log(q[other] / q[own])).sum() for own in range(3) for other in range(3) if own != other)
        want.append(-np.log(q[1, label]) - np.log(q[2, label]) + taught / 2)
    x = torch.tensor(z, requires_grad=True)
    values = Mutual([])(x[:, 0], x[:, 1:], torch.tensor(y))
    np.testing.assert_allclose(values.detach(), want, rtol=1e-11)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    chosen = np.eye(C)[y]
    for own in range(3):
        others = [k for k in range(3) if k != own]
        expected = sum(p[:, own] - p[:, k] for k in others) / 2 + (p[:, own] - chosen if own else 0)
        np.testing.assert_allclose(gradient[:, own], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ensemble", ["min_logit", "naive"])
def test_students_learn_from_the_best(ensemble: str) -> None:
    rng = np.random.default_rng(8)
    z, y, t = 3 * rng.normal(size=(N, 3, C)), rng.integers(0, C, N), 2.0
    best = []
    for row, label in zip(z, y, strict=True):
        right = [-np.log(softmax(own)[label]) for own in row]
        best.append(np.min([own - own[label] for own in row], axis=0) if ensemble == "min_logit" else row[int(np.argmin(right))])
    p, q, own = softmax(np.stack(best) / t), softmax(z / t), softmax(z)
    supervised = sum(-np.log(own[np.arange(N), k, y]) for k in (1, 2))
    want = supervised + t**2 * sum((p * np.log(p / q[:, k])).sum(-1) for k in range(3))
    x = torch.tensor(z, requires_grad=True)
    values = Kdcl([], ensemble=ensemble)(x[:, 0], x[:, 1:], torch.tensor(y))  # type: ignore[arg-type]
    np.testing.assert_allclose(values.detach(), want, rtol=1e-10)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    for k in range(3):
        expected = t * (q[:, k] - p) + (own[:, k] - np.eye(C)[y] if k else 0)
        np.testing.assert_allclose(gradient[:, k], expected, rtol=1e-9, atol=1e-12)


def test_ofa_is_the_authors_form() -> None:
    rng = np.random.default_rng(3)
    s, t, y = rng.normal(size=(N, C)), 4 * rng.normal(size=(N, C)), rng.integers(0, C, N)
    for gamma, temperature in ((1.0, 1.0), (1.5, 1.0), (1.4, 2.0)):
        want = []
        for a, b, label in zip(s, t, y, strict=True):
            p, q = softmax(b / temperature), softmax(a / temperature)
            prod = np.array([(p[c] + (c == label)) ** gamma - (c == label) for c in range(C)])
            want.append(-(prod * np.log(q)).sum())
        got = ofa(torch.tensor(s), torch.tensor(t), torch.tensor(y), gamma=gamma, temperature=temperature)
        np.testing.assert_allclose(got, want, rtol=1e-11)
        spread = 0.1 / C + 0.9 * np.eye(C)[y]  # smoothed labels: the authors take the largest
        np.testing.assert_allclose(ofa(torch.tensor(s), torch.tensor(t), torch.tensor(spread), gamma=gamma, temperature=temperature), want)
    torch.testing.assert_close(ofa(torch.tensor(s), torch.tensor(t), torch.tensor(y)), soft_cross_entropy(torch.tensor(s), torch.tensor(t)))


@pytest.mark.parametrize("shape", [(6,), (3, 4, 4), (3, 20, 16), (5, 6)], ids=str)
def test_an_exit_is_the_loss_of_its_logits(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(N, *shape, generator=g, dtype=torch.float64)
    mask = (torch.arange(shape[0]) < torch.randint(1, shape[0] + 1, (N, 1), generator=g)).long()
    teacher, labels = torch.randn(N, C, generator=g, dtype=torch.float64), torch.randint(C, (N,), generator=g)
    both = [LOSSES[name].function((N, *shape), C, student="a").double() for name in ("ofa_exits", "byot")]
    for loss in both:
        own = loss.exit(x, mask)
        assert own.shape == (N, C)
        if len(shape) == 3:
            halvings = sum(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in loss.modules())
            assert halvings == {4: 0, 16: 2}[min(shape[1:])]  # 16 -> 8 -> 4
        if len(shape) == 2:  # what stands at padding says nothing
            torch.testing.assert_close(loss.exit(x.masked_fill(mask[..., None] == 0, 7.0), mask), own)
            normed = nn.functional.layer_norm(x, (6,))
            mean = torch.stack([row[:n].mean(0) for row, n in zip(normed, mask.sum(1), strict=True)])
            torch.testing.assert_close(own, loss.exit.head(mean))
    torch.testing.assert_close(both[0](x, mask, teacher, labels), ofa(both[0].exit(x, mask), teacher, labels))
    own = both[1].exit(x, mask)
    want = 0.5 * nn.functional.cross_entropy(own, labels, reduction="none") + 0.5 * kd(own, teacher, temperature=3.0)
    torch.testing.assert_close(both[1](x, mask, teacher, labels), want)


def test_several_exits_are_added_and_each_has_its_own() -> None:
    shapes = {"a": (N, 6), "b": (N, 3, 8, 8)}
    term = Term.model_validate({"loss": "ofa_exits", "student": ["a", "b"]})
    objective = Objective.build([term], classes=[str(c) for c in range(C)], label_counts=[1] * C, shapes_student=shapes)
    features = {name: torch.randn(shape) for name, shape in shapes.items()}
    teacher, labels = torch.randn(N, C), torch.randint(C, (N,))
    batch = Batch(np.zeros((N, 2), np.uint64), 0, {"x": torch.zeros(N, 1)}, None, labels, torch.ones(N, dtype=torch.bool))
    loss, _ = objective(Outputs(torch.zeros(N, C), features), Signal(teacher), batch, progress=0.0, counts=objective.counts(batch))
    exits: Any = objective.terms[0].loss  # type: ignore[union-attr]
    want = sum(ofa(one.exit(x, torch.ones(N, 6)), teacher, labels).mean() for one, x in zip(exits, features.values(), strict=True))
    torch.testing.assert_close(loss, want)
    assert objective.student_needs.features == ("a", "b")
    assert objective.teacher_needs.features == ()
    with pytest.raises(UsageError, match="byot cannot make logits of a"):
        Objective.build(
            [Term.model_validate({"loss": "byot", "student": "a"})], classes=["x"], label_counts=[1], shapes_student={"a": (N,)}
        )


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
def test_models_beside_the_student_see_views_of_their_own_where_that_was_published(kind: Kind) -> None:
    name = next((read for read in ("peers.logits", "average.logits") if read in kind.entry.reads), None)
    assert kind.entry.own_views == (kind.entry.name in ("kdcl", "mean_teacher"))
    if name is None:
        pytest.skip("learns from no model beside the student")
    place, key = kind.entry.reads.index(name), name.partition(".")[0]
    tensors = draw(kind)
    further = [draw(kind, seed=seed)[place] for seed in (1, 2)]
    seen = torch.stack([further[0][:, 0], further[1][:, 1]], dim=1) if key == "peers" else further[0]
    objective, outputs = in_objective(kind, tensors)
    batch = batch_for(kind, tensors, torch.ones(N, dtype=torch.bool))
    alone = [*tensors[:place], seen if kind.entry.own_views else tensors[place], *tensors[place + 1 :]]
    want, _ = objective(*outputs(batch, alone), batch_for(kind, alone, batch.mask), progress=0.0, counts={kind.entry.name: N})
    batch = replace(batch, others=tuple({key: x} for x in further))
    got, _ = objective(*outputs(batch, tensors), batch, progress=0.0, counts={kind.entry.name: N})
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_two_losses_take_views_of_their_own_each() -> None:
    kinds = [Kind(LOSSES[name], "classes") for name in ("kdcl", "mean_teacher")]
    drawn = [draw(kind) for kind in kinds]
    student, labels = drawn[0][0], drawn[0][2]
    peers, average = drawn[0][1], drawn[1][1]
    terms = [Term.model_validate({"loss": kind.entry.name}) for kind in kinds]
    made: Any = {"peers": [Peer(0), Peer(1)], "student": Peer(-1)}
    objective = Objective.build(terms, classes=[str(c) for c in range(C)], label_counts=[1] * C, **made)
    batch = batch_for(kinds[0], drawn[0], torch.ones(N, dtype=torch.bool))
    batch = replace(batch, student={}, others=({"peers": peers}, {"peers": peers}, {"average": average}))
    _, found = objective(Outputs(student, {}), None, batch, progress=0.0, counts={"kdcl": N, "mean_teacher": N})
    want = {"kdcl": kinds[0].entry.function([])(student, peers, labels), "mean_teacher": kinds[1].entry.function()(student, average)}
    for name, values in want.items():
        assert float(found[name]) == pytest.approx(float(values.mean()))


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


@pytest.mark.parametrize("standardize", [False, True])
def test_dkd_is_the_formula(standardize: bool) -> None:
    rng = np.random.default_rng(3)
    s, t = rng.normal(size=(2, N, C)) * 3
    labels, temperature, alpha, beta = rng.integers(C, size=N), 3.0, 0.7, 5.0
    want = []
    for a, b, y in zip(s, t, labels, strict=True):
        if standardize:
            a, b = ((x - x.mean()) / (1e-7 + x.std(ddof=1)) for x in (a, b))
        q, p = softmax(a, temperature), softmax(b, temperature)
        tckd = p[y] * np.log(p[y] / q[y]) + (1 - p[y]) * np.log((1 - p[y]) / (1 - q[y]))
        others = [c for c in range(C) if c != y]
        qn, pn = q[others] / q[others].sum(), p[others] / p[others].sum()
        want.append(temperature**2 * (alpha * tckd + beta * (pn * np.log(pn / qn)).sum()))
    values = dkd(
        torch.tensor(s), torch.tensor(t), torch.tensor(labels), alpha=alpha, beta=beta, temperature=temperature, standardize=standardize
    )
    np.testing.assert_allclose(values, want, rtol=1e-11)


def test_dkd_is_kd_where_its_weights_are_those_of_kd() -> None:
    tensors = draw(next(kind for kind in KINDS if kind.entry.name == "dkd"))
    sure = torch.softmax(tensors[1] / 4.0, -1).gather(-1, tensors[2][:, None])[:, 0]
    parts = [dkd(*tensors, alpha=a, beta=b, temperature=4.0) for a, b in ((1, 0), (0, 1))]
    torch.testing.assert_close(parts[0] + (1 - sure) * parts[1], kd(tensors[0], tensors[1], temperature=4.0), rtol=1e-11, atol=1e-12)


def test_the_ranking_of_the_others_does_not_see_the_label() -> None:
    student, teacher, labels = draw(next(kind for kind in KINDS if kind.entry.name == "dkd"))
    want = dkd(student, teacher, labels, alpha=0.0)
    label = torch.nn.functional.one_hot(labels, C) > 0
    for far in (1e4, -1e4):  # the authors' mask of -1000 fails here
        torch.testing.assert_close(dkd(student.masked_fill(label, far), teacher.masked_fill(label, far), labels, alpha=0.0), want)


def test_nkd_and_wsld_are_their_formulas() -> None:
    rng = np.random.default_rng(4)
    s, t = rng.normal(size=(2, N, C)) * 3
    labels, temperature = rng.integers(C, size=N), 2.5
    want_nkd, want_wsld = [], []
    for a, b, y in zip(s, t, labels, strict=True):
        q, p, q1, p1 = softmax(a, temperature), softmax(b, temperature), softmax(a), softmax(b)
        others = [c for c in range(C) if c != y]
        rest = (p[others] / p[others].sum() * np.log(q[others] / q[others].sum())).sum()
        want_nkd.append(-p1[y] * np.log(q1[y]) - 0.8 * temperature**2 * rest)
        weight = 1 - np.exp(-np.log(q1[y]) / (np.log(p1[y]) - 1e-7))
        want_wsld.append(-(temperature**2) * weight * (p * np.log(q)).sum())
    tensors = torch.tensor(s), torch.tensor(t), torch.tensor(labels)
    np.testing.assert_allclose(nkd(*tensors, gamma=0.8, temperature=temperature), want_nkd, rtol=1e-11)
    np.testing.assert_allclose(wsld(*tensors, temperature=temperature), want_wsld, rtol=1e-11)


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.99])
def test_divergences_are_their_formulas(beta: float) -> None:
    rng = np.random.default_rng(5)
    s, t = rng.normal(size=(2, N, C)) * 3
    q, p = softmax(s, 1.7), softmax(t, 1.7)
    m = beta * p + (1 - beta) * q
    student, teacher = torch.tensor(s), torch.tensor(t)
    want = beta * (p * np.log(p / m)).sum(-1) + (1 - beta) * (q * np.log(q / m)).sum(-1)
    np.testing.assert_allclose(jsd(student, teacher, beta=beta, temperature=1.7), want, rtol=1e-10)
    np.testing.assert_allclose(fkl(student, teacher, temperature=1.7), (p * np.log(p / q)).sum(-1), rtol=1e-11)
    np.testing.assert_allclose(rkl(student, teacher, temperature=1.7), (q * np.log(q / p)).sum(-1), rtol=1e-11)
    np.testing.assert_allclose(soft_cross_entropy(student, teacher, temperature=1.7), -(p * np.log(q)).sum(-1), rtol=1e-11)
    np.testing.assert_allclose(hard(student, teacher), -np.log(softmax(s))[np.arange(N), t.argmax(-1)], rtol=1e-11)
    np.testing.assert_allclose(mse_logits(student, teacher), ((s - t) ** 2).mean(-1), rtol=1e-12)
    np.testing.assert_allclose(mse_logits(student, teacher, form="paper"), ((s - t) ** 2).sum(-1), rtol=1e-12)
    q, p = 1 / (1 + np.exp(-s / 1.7)), 1 / (1 + np.exp(-t / 1.7))
    want = 1.7**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(-1)
    np.testing.assert_allclose(kd_sigmoid(student, teacher, temperature=1.7), want, rtol=1e-10)


def test_dist_is_the_formula() -> None:
    rng = np.random.default_rng(6)
    s, t = rng.normal(size=(2, N, C)) * 3
    q, p = softmax(s, 2.0), softmax(t, 2.0)
    inter = [1 - np.corrcoef(q[i], p[i])[0, 1] for i in range(N)]
    intra = [1 - np.corrcoef(q[:, c], p[:, c])[0, 1] for c in range(C)]
    values = dist(torch.tensor(s), torch.tensor(t), beta=0.5, gamma=3.0, temperature=2.0)
    np.testing.assert_allclose(values, 4 * (0.5 * np.array(inter) + 3 * np.mean(intra)), rtol=1e-5)  # the authors' 1e-8 is left out here


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


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "said"),
    [
        ("attention_transfer", (4, 6), (4, 3, 2, 2), "maps"),
        ("similarity_preserving", (4, 7, 6), (4, 6), "a sample"),
        ("cosine", (4, 3, 2, 2), (4, 3, 2, 2), "(B, D)"),
        ("vid", (4, 6), (4, 6), "maps"),
        ("ofd", (4, 3, 4, 4), (4, 3, 2, 2), "height"),
        ("correlation", (4, 7, 6), (4, 6), "a sample"),
    ],
)
def test_features_that_do_not_fit_are_refused(loss: str, student: tuple[int, ...], teacher: tuple[int, ...], said: str) -> None:
    term = Term.model_validate({"loss": loss, "student": "deep.one", "teacher": "other"})
    with pytest.raises(UsageError) as error:
        Objective.build([term], classes=["a"], label_counts=[1], shapes_student={"deep.one": student}, shapes_teacher={"other": teacher})
    (problem,) = error.value.problems
    assert problem.where == "objective.0.student"
    assert all(word in problem.message for word in ("deep.one", "other", f"B, {student[1]}"))
    assert said in problem.hint


def smooth_l1(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)


def test_rkd_is_a_loop_over_pairs_and_triplets() -> None:
    rng = np.random.default_rng(7)
    s, t = rng.normal(size=(N, 6)) * rng.uniform(0.1, 9, size=(N, 1)), rng.normal(size=(N, 4))
    distances, angles = [], []
    for x in (s, t):
        d = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])
        distances.append(d / d[d > 0].mean())
        cosines = np.zeros((N, N, N))
        for i, j, k in itertools.product(range(N), repeat=3):
            if i not in (j, k):
                a, b = x[j] - x[i], x[k] - x[i]
                cosines[i, j, k] = a @ b / np.sqrt((a @ a) * (b @ b))
        angles.append(cosines)
    student, teacher = torch.tensor(s), torch.tensor(t)
    np.testing.assert_allclose(rkd_distance(student, teacher), smooth_l1(distances[0] - distances[1]).mean(1), rtol=1e-11)
    np.testing.assert_allclose(rkd_angle(student, teacher), smooth_l1(angles[0] - angles[1]).mean((1, 2)), rtol=1e-11)


def test_relations_are_their_formulas() -> None:
    rng = np.random.default_rng(8)
    s, t = rng.normal(size=(N, 3, 2, 2)), rng.normal(size=(N, 5))
    student, teacher = torch.tensor(s), torch.tensor(t)
    flat = [s.reshape(N, -1), t]
    grams = [x @ x.T for x in flat]
    rows = [g / np.linalg.norm(g, axis=1, keepdims=True) for g in grams]
    np.testing.assert_allclose(similarity_preserving(student, teacher).mean(), ((rows[0] - rows[1]) ** 2).sum() / N**2, rtol=1e-11)
    lengths = [np.linalg.norm(x, axis=1) for x in flat]
    cosines = [g / np.outer(n, n) for g, n in zip(grams, lengths, strict=True)]
    near = [(c + 1) / 2 / ((c + 1) / 2).sum(1, keepdims=True) for c in cosines]
    want = (near[1] * np.log(near[1] / near[0])).mean()
    np.testing.assert_allclose(pkt(student, teacher).mean(), want, rtol=1e-4)  # the authors' two 1e-7 are left out here
    kernels = [sum(np.exp(-1.0) * 1.0**p / math.factorial(p) * c**p for p in range(4)) for c in cosines]
    want = ((kernels[0] - kernels[1]) ** 2).sum() / N**2
    np.testing.assert_allclose(correlation_rbf(student, teacher, gamma=0.5, degree=3).mean(), want, rtol=1e-11)
    a, b = (x - x.mean(0) for x in flat)
    want = 1 - np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    np.testing.assert_allclose(cka(student, teacher), [want] * N, rtol=1e-11)


def test_correlation_is_the_mean_over_neighbours_of_the_embedded() -> None:
    rng = np.random.default_rng(9)
    s, t = rng.normal(size=(N, 6)), rng.normal(size=(N, 4))
    module = Correlation(s.shape, t.shape, student="a", teacher="b", embed=3).double()
    w_s, b_s, w_t, b_t = (p.detach().numpy() for p in module.parameters())
    apart = np.abs(s @ w_s.T + b_s - t @ w_t.T - b_t)
    want = np.mean([(apart[i] * apart[i + 1]).sum() for i in range(N - 1)])
    np.testing.assert_allclose(module(torch.tensor(s), torch.tensor(t)).mean().detach(), want, rtol=1e-11)


@pytest.mark.parametrize("channels", [(3, 5), (4, 6), (9, 4), (9, 12)])  # fewer than the four places, as many, more
def test_nst_is_its_formula_whatever_is_fewer_channels_or_places(channels: tuple[int, int]) -> None:
    """Value and gradient, for the student's maps averaged to the teacher's size."""
    rng = np.random.default_rng(11)
    s, t = rng.normal(size=(N, channels[0], 4, 4)), rng.normal(size=(N, channels[1], 2, 2))

    def formula(x: np.ndarray) -> np.ndarray:
        sets = [each.reshape(N, each.shape[1], -1) for each in (x.reshape(N, -1, 2, 2, 2, 2).mean((3, 5)), t)]
        sets = [each / np.linalg.norm(each, axis=2, keepdims=True) for each in sets]
        kernel = [[(np.einsum("nap,nbp->nab", a, b) ** 2).mean((1, 2)) for b in sets] for a in sets]
        return kernel[0][0] + kernel[1][1] - 2 * kernel[0][1]

    student = torch.tensor(s, requires_grad=True)
    values = nst(student, torch.tensor(t))
    np.testing.assert_allclose(values.detach(), formula(s), rtol=1e-9)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    direction = rng.normal(size=s.shape)
    slope = (formula(s + 1e-5 * direction) - formula(s - 1e-5 * direction)).sum() / 2e-5
    assert float((gradient.numpy() * direction).sum()) == pytest.approx(slope, rel=1e-6)


def test_maps_are_their_formulas() -> None:
    rng = np.random.default_rng(10)
    s, t = rng.normal(size=(N, 3, 4, 4)), rng.normal(size=(N, 5, 2, 2))
    student, teacher = torch.tensor(s), torch.tensor(t)
    small = s.reshape(N, 3, 2, 2, 2, 2).mean((3, 5))
    looks = [(np.abs(x) ** 3).sum(1).reshape(N, -1) for x in (small, t)]
    looks = [q / np.linalg.norm(q, axis=1, keepdims=True) for q in looks]
    np.testing.assert_allclose(attention_transfer(student, teacher, p=3), ((looks[0] - looks[1]) ** 2).mean(1), rtol=1e-11)
    want = np.linalg.norm(looks[0] - looks[1], axis=1)
    np.testing.assert_allclose(attention_transfer(student, teacher, p=3, form="paper"), want, rtol=1e-11)

    same = rng.normal(size=(N, 5, 2, 2))
    margin = np.array([t[:, c][t[:, c] < 0].mean() for c in range(5)])[None, :, None, None]
    target = np.maximum(t, margin)
    want = (np.where((same > target) | (target > 0), (same - target) ** 2, 0)).sum((1, 2, 3))
    ofd = Ofd((N, 5, 2, 2), (N, 5, 2, 2), student="a", teacher="b", projector="none")
    np.testing.assert_allclose(ofd(torch.tensor(same), teacher), want, rtol=1e-11)


def test_vid_begins_at_its_variance_and_is_a_likelihood() -> None:
    vid = Vid((N, 3, 4, 4), (N, 5, 2, 2), student="a", teacher="b", variance=2.0).double()
    s, t = torch.randn(N, 3, 4, 4, dtype=torch.float64), torch.randn(N, 5, 2, 2, dtype=torch.float64)
    mean = vid.regressor(torch.nn.functional.adaptive_avg_pool2d(s, 2))
    want = -torch.distributions.Normal(mean, math.sqrt(2.0)).log_prob(t).flatten(1).mean(1) - math.log(2 * math.pi) / 2
    torch.testing.assert_close(vid(s, t), want, rtol=1e-6, atol=1e-6)


def test_cosine_is_the_cosine() -> None:
    s, t = torch.randn(N, 3, 4, dtype=torch.float64), torch.randn(N, 3, 4, dtype=torch.float64)
    module = Cosine(tuple(s.shape), tuple(t.shape), student="a", teacher="b")
    torch.testing.assert_close(module(s, t), 1 - torch.nn.functional.cosine_similarity(s, t, dim=-1).mean(1))


def test_patient_is_the_first_token_alone() -> None:
    rng = np.random.default_rng(11)
    s, t = rng.normal(size=(2, N, 3, 4))
    first = [x[:, 0] / np.linalg.norm(x[:, 0], axis=1, keepdims=True) for x in (s, t)]
    student, teacher = torch.tensor(s, requires_grad=True), torch.tensor(t)
    values = patient(student, teacher)
    np.testing.assert_allclose(values.detach(), ((first[0] - first[1]) ** 2).mean(1), rtol=1e-11)
    np.testing.assert_allclose(patient(student, teacher, normalize=False).detach(), ((s - t)[:, 0] ** 2).mean(1), rtol=1e-11)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert (gradient[:, 1:] == 0).all()


def test_a_loss_of_whole_sequences_counts_samples() -> None:
    term = Term.model_validate({"loss": "patient", "student": "a", "teacher": "b"})
    shapes = {"shapes_student": {"a": (4, 3, 6)}, "shapes_teacher": {"b": (4, 3, 6)}}
    objective = Objective.build([term], classes=["x"], label_counts=[1], **shapes)
    words = {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]])}
    mask = torch.tensor([True, True, False, True])
    batch = Batch(np.zeros((4, 2), np.uint64), 0, words, None, torch.full((4,), -1), mask)
    s, t = torch.randn(2, 4, 3, 6)
    assert objective.counts(batch) == {"patient": 3}
    got, _ = objective(Outputs(torch.zeros(4, 2), {"a": s}), Signal(None, {"b": t}), batch, progress=0.0, counts={"patient": 3})
    torch.testing.assert_close(got, patient(s[mask], t[mask]).mean())


def by_hand(q: np.ndarray, k: np.ndarray, heads: int) -> np.ndarray:
    """(heads, T, T) scores of one text."""
    width = q.shape[-1] // heads
    return np.stack([q[:, h * width :][:, :width] @ k[:, h * width :][:, :width].T / np.sqrt(width) for h in range(heads)])


def test_losses_of_attention_are_loops_over_texts_and_heads() -> None:
    rng = np.random.default_rng(12)
    s, t, lengths = rng.normal(size=(N, 5, 36)), rng.normal(size=(N, 5, 24)), rng.integers(1, 6, size=N)
    want: dict[str, list[float]] = {"tinybert": [], "v1": [], "v2": []}
    for a, b, n in zip(s, t, lengths, strict=True):
        (qs, ks, vs), (qt, kt, vt) = (np.split(x[:n], 3, axis=-1) for x in (a, b))

        def apart(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], heads: int) -> float:
            q, p = softmax(by_hand(*one, heads)), softmax(by_hand(*other, heads))
            return float((p * np.log(p / q)).sum(-1).mean())

        want["tinybert"].append(((by_hand(qs, ks, 4) - by_hand(qt, kt, 4)) ** 2).mean())
        want["v1"].append(apart((qs, ks), (qt, kt), 4) + apart((vs, vs), (vt, vt), 4))
        want["v2"].append(sum(apart((x, x), (y, y), 2) for x, y in ((qs, qt), (ks, kt), (vs, vt))))
    mask = torch.tensor(np.arange(5) < lengths[:, None]).long()
    given = torch.tensor(s), torch.tensor(t), mask
    np.testing.assert_allclose(tinybert_attention(*given, heads=4), want["tinybert"], rtol=1e-11)
    np.testing.assert_allclose(minilm(*given, heads=4), want["v1"], rtol=1e-11)
    np.testing.assert_allclose(minilm_v2(*given, heads=2), want["v2"], rtol=1e-11)
    # what stands at padding says nothing, and changes nothing
    poison = [x.masked_fill(mask[:, :, None] == 0, 1e3).requires_grad_() for x in given[:2]]
    for loss in (tinybert_attention, minilm, minilm_v2):
        values = loss(*poison, mask, heads=2)
        torch.testing.assert_close(values, loss(*given, heads=2))
        (gradient,) = torch.autograd.grad(values.sum(), poison[0])
        assert (gradient[mask == 0] == 0).all()
        assert torch.isfinite(loss(*poison, mask * 0, heads=2)).all()
    # without padding the authors' code is the paper's formula
    ones = torch.ones(N, 5)
    scores = [split_heads(q, 4) @ split_heads(k, 4).mT / (q.shape[-1] / 4) ** 0.5 for q, k, _ in (x.chunk(3, -1) for x in given[:2])]
    torch.testing.assert_close(tinybert_attention(*given[:2], ones, heads=4), tinybert_scores(*scores))
    with pytest.raises(ValueError, match="5 heads"):
        minilm(*given, heads=5)


LAYERED = [e for e in LOSSES.values() if e.layers in ("mean", "sum") and not e.exits]


@pytest.mark.parametrize("entry", LAYERED, ids=lambda e: e.name)
def test_several_pairs_of_layers_are_their_mean_or_sum(entry: LossEntry) -> None:
    kind = next(k for k in KINDS if k.entry is entry)
    given = [draw(kind, seed=i) for i in range(3)]
    ends = f":{entry.part}" if entry.part else ""
    names = {"student": ["a", "b", "c"], "teacher": ["x", "y", "x"]}
    given[2][1] = given[0][1]  # a layer of the teacher for two of the student
    shapes = {
        f"shapes_{side}": {f"{n}{ends}": tuple(x[at].shape) for n, x in zip(names[side], given, strict=True)}
        for at, side in enumerate(names)
    }
    term = Term.model_validate({"loss": entry.name, **example(entry), **names})
    objective = Objective.build([term], classes=["k"], label_counts=[1], **shapes).double()  # type: ignore[arg-type]
    student = {f"{n}{ends}": x[0].requires_grad_() for n, x in zip(names["student"], given, strict=True)}
    teacher = {f"{n}{ends}": x[1] for n, x in zip(names["teacher"], given, strict=True)}
    batch = batch_for(kind, given[0], torch.ones(N, dtype=torch.bool))
    counts = objective.counts(batch)
    loss, _ = objective(Outputs(torch.zeros(N, C, dtype=torch.float64), student), Signal(None, teacher), batch, progress=0.0, counts=counts)
    learned = list(objective.terms[0].loss) if entry.learned else [loss_of(kind, given[0])] * 3  # type: ignore[arg-type]
    parts = [one(x[0], x[1], *given[0][2:]).mean() for one, x in zip(learned, given, strict=True)]
    assert len({round(float(p.detach()), 9) for p in parts}) == 3
    want = torch.stack(parts).sum() / (3 if entry.layers == "mean" else 1)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-14)
    got, wanted = (torch.autograd.grad(x, list(student.values())) for x in (loss, want))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def one(kind: Kind, corner: str, tensors: list[Tensor]) -> list[Tensor]:
    """Features in a corner: a single sample, two equal ones, a zero one, none that differ, huge ones."""
    student, teacher = (x.clone() for x in tensors[:2])
    if corner == "one sample":
        return [student[:1], teacher[:1]]
    if corner == "two equal":
        student[1] = student[0]
    elif corner == "two equal of the teacher":
        teacher[1] = teacher[0]
    elif corner == "zero":
        student[2] = 0
        teacher[3] = 0
    elif corner == "all zero":
        student.zero_()
    elif corner == "all zero of the teacher":
        teacher.zero_()
    elif corner == "all equal":
        student[:], teacher[:] = student[0].clone(), teacher[0].clone()
    return [student, teacher] if corner != "huge" else [1e6 * student, 1e6 * teacher]


CORNERS_OF_FEATURES = (
    "one sample",
    "two equal",
    "two equal of the teacher",
    "zero",
    "all zero",
    "all zero of the teacher",
    "all equal",
    "huge",
)


@pytest.mark.parametrize("corner", CORNERS_OF_FEATURES)
@pytest.mark.parametrize("kind", [k for k in KINDS if "student.features" in k.entry.reads], ids=str)
def test_corners_of_features_are_finite_and_bounded(kind: Kind, corner: str) -> None:
    for dtype in (torch.float32, torch.float64):
        drawn = draw(kind, dtype)
        student, teacher = one(kind, corner, drawn)
        loss = loss_of(kind, [student, teacher])
        values = loss(student.requires_grad_(), teacher, *(x[: len(student)] for x in drawn[2:]))
        assert values.shape == (len(student),)
        assert torch.isfinite(values).all()
        given = [student, *(loss.parameters() if isinstance(loss, nn.Module) else [])]
        for gradient in torch.autograd.grad(values.mean(), given):
            assert torch.isfinite(gradient).all()
            # two batch normalisations of what is constant; published code: up to 1e12
            limit = 1e6 if kind.entry.name == "review" else 1e4
            assert corner == "huge" or float(gradient.abs().max()) < limit


def test_review_is_the_formula() -> None:
    """Three levels, the last one a vector, sizes of student and teacher apart: the authors' order of convolution, fusion and resizing, in NumPy."""
    rng = np.random.default_rng(5)
    ours = [(3, 8, 8), (4, 4, 4), (6,)]
    theirs = [(5, 8, 8), (6, 2, 2), (7,)]
    s, t = ([rng.normal(size=(N, *shape)) for shape in shapes] for shapes in (ours, theirs))
    names = {side: [f"{side}{i}" for i in range(3)] for side in ("student", "teacher")}
    shapes = {
        f"shapes_{side}": {n: x.shape for n, x in zip(names[side], given, strict=True)} for side, given in (("student", s), ("teacher", t))
    }
    term = Term.model_validate({"loss": "review", "width": 2, **names})
    objective = Objective.build([term], classes=["k"], label_counts=[1], **shapes).double()
    review: Any = objective.terms[0].loss  # type: ignore[union-attr]

    def conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        size = weight.shape[2]
        padded = np.pad(x, ((0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
        found = np.einsum("nchwij,ocij->nohw", windows, weight)
        return found if bias is None else found + bias[:, None, None]

    def normed(pair: nn.Sequential, x: np.ndarray) -> np.ndarray:
        x = conv(x, pair[0].weight.detach().numpy())
        mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-5)

    def resized(x: np.ndarray, size: int) -> np.ndarray:
        at = (np.arange(size) * x.shape[2]) // size
        return x[:, :, at][:, :, :, at]

    def pooled(x: np.ndarray, size: int) -> np.ndarray:
        step = x.shape[2] // size
        return x.reshape(*x.shape[:2], size, step, size, step).mean((3, 5))

    def level(a: np.ndarray, b: np.ndarray) -> float:
        total, weights, weight = ((a - b) ** 2).mean(), 1.0, 1.0
        for size in (4, 2, 1):
            if size < a.shape[2]:
                weight /= 2
                total, weights = total + weight * ((pooled(a, size) - pooled(b, size)) ** 2).mean(), weights + weight
        return float(total / weights)

    as_maps = [[x if x.ndim == 4 else x[:, :, None, None] for x in given] for given in (s, t)]
    want, deeper = 0.0, None
    for i in (2, 1, 0):
        x = normed(review.first[i], as_maps[0][i])
        if deeper is not None:
            y = resized(deeper, x.shape[2])
            weigh = review.weigh[i]
            z = 1 / (1 + np.exp(-conv(np.concatenate([x, y], 1), weigh.weight.detach().numpy(), weigh.bias.detach().numpy())))
            x = x * z[:, :1] + y * z[:, 1:]
        x = deeper = resized(x, as_maps[1][i].shape[2])
        want += level(normed(review.then[i], x), as_maps[1][i])

    student = {n: torch.from_numpy(x).requires_grad_() for n, x in zip(names["student"], s, strict=True)}
    teacher = {n: torch.from_numpy(x) for n, x in zip(names["teacher"], t, strict=True)}
    batch = Batch(np.zeros((N, 2), np.uint64), 0, {"x": torch.zeros(N, 1)}, None, torch.full((N,), -1), torch.ones(N, dtype=torch.bool))
    counts = objective.counts(batch)
    loss, _ = objective(Outputs(torch.zeros(N, 1, dtype=torch.float64), student), Signal(None, teacher), batch, progress=0.0, counts=counts)
    assert loss.item() == pytest.approx(want, rel=1e-10)
    for gradient in torch.autograd.grad(loss, list(student.values())):
        assert float(gradient.abs().max()) > 0


def test_review_refuses_what_is_no_square_map() -> None:
    shapes = {"shapes_student": {"a": (2, 3, 4, 6)}, "shapes_teacher": {"b": (2, 3, 4, 4)}}
    with pytest.raises(UsageError, match=r"review cannot compare \(B, 3, 4, 6\).*square maps"):
        Objective.build([Term(loss="review", student="a", teacher="b")], classes=["k"], label_counts=[1], **shapes)  # type: ignore[arg-type]


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
