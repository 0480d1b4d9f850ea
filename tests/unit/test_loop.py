"""The loop: it divides once, only looks at the teacher, resumes exactly, and stops at the step that goes wrong."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.data import Plan, cuts
from limbeck.engine import Engine
from limbeck.errors import Interrupted, NonFinite
from limbeck.loop import Average, learning_rate
from limbeck.models import state_hash, wrap_module
from limbeck.objective import Objective
from limbeck.recipe import Term
from limbeck.teacher import LiveTeacher
from support import KD_MIX, Big, Small, made, run_fit, settings, state_bytes, tensors, toy_data

HINT = Term(loss="hint", weight=1.0, student="body", teacher="norm")
SHAPES: dict[str, Any] = {"shapes_student": {"body": (2, 5)}, "shapes_teacher": {"norm": (2, 16)}}


class StopAfter:
    """Asks to leave after ``count`` steps, as a signal would."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def last_line(folder: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line][-1]


def test_the_articles_loop_written_plainly_gives_the_same_weights(tmp_path: Path) -> None:
    data = toy_data(80)
    student, trained = run_fit(
        tmp_path,
        data=data,
        train=settings(epochs=2, optimizer="adam", lr=1e-4, weight_decay=0.0, schedule="constant", warmup=0.0, clip_norm=None),
    )
    x, y = tensors(80)
    plain, teacher = made(Small, "student"), made(Big, "teacher").eval()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-4)
    temperature, alpha = 6.0, 0.7
    plan = Plan(data.train, seed=3, data_seed=0, epochs=2, batch_size=8, views=None, lengths=None, drop_single=False)
    plain.train()
    for step in range(20):
        rows = data.train.rows[plan.request(step).rows]
        optimizer.zero_grad()
        with torch.no_grad():
            soft = torch.softmax(teacher(x[rows]) / temperature, dim=1)
        logits = plain(x[rows])
        kd = nn.KLDivLoss(reduction="batchmean")(torch.log_softmax(logits / temperature, dim=1), soft) * temperature**2
        (alpha * kd + (1 - alpha) * nn.CrossEntropyLoss()(logits, y[rows])).backward()
        optimizer.step()
    assert trained.steps == 20
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(student.module.state_dict()[name], value, rtol=0, atol=1e-9)
        assert not torch.equal(value, made(Small, "student").state_dict()[name]), "nothing was learned"


def test_a_plain_loop_with_schedule_clipping_and_weight_decay_gives_the_same_weights(tmp_path: Path) -> None:
    """As above, with everything that changes a step; and the average of its weights, by its formula."""
    data = toy_data(80)
    train = settings(
        optimizer="sgd", lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.1, schedule="linear", warmup=0.2, clip_norm=0.05, ema=0.9
    )
    student, trained = run_fit(tmp_path, data=data, train=train)
    x, y = tensors(80)
    plain, teacher = made(Small, "student"), made(Big, "teacher").eval()
    matrices, vectors = ([p for p in plain.parameters() if (p.ndim > 1) == decayed] for decayed in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.3, momentum=0.9, nesterov=True)
    plan = Plan(data.train, seed=3, data_seed=0, epochs=3, batch_size=8, views=None, lengths=None, drop_single=False)
    average = {name: value.clone() for name, value in plain.state_dict().items()}
    clipped = 0
    for step in range(30):
        rows = data.train.rows[plan.request(step).rows]
        for group in optimizer.param_groups:
            group["lr"] = 0.3 * ((step + 1) / 7 if step < 6 else 1 - (step - 6) / 24)
        optimizer.zero_grad()
        with torch.no_grad():
            soft = torch.softmax(teacher(x[rows]) / 6, dim=1)
        logits = plain(x[rows])
        kd = nn.KLDivLoss(reduction="batchmean")(torch.log_softmax(logits / 6, dim=1), soft) * 36
        (0.7 * kd + 0.3 * nn.CrossEntropyLoss()(logits, y[rows])).backward()
        clipped += int(nn.utils.clip_grad_norm_(plain.parameters(), 0.05) > 0.05)
        optimizer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * value for name, value in plain.state_dict().items()}
    assert trained.steps == 30
    assert clipped > 10
    for name, value in average.items():
        torch.testing.assert_close(student.module.state_dict()[name], value, rtol=0, atol=1e-9)


def test_the_average_is_what_is_validated_and_the_best_epoch_what_is_left(tmp_path: Path) -> None:
    data = toy_data(80)
    student = wrap_module(made(Small, "student", dropout=0.3), role="student", data=data)
    raw: list[dict[str, bytes]] = []  # after every step
    validated: list[dict[str, bytes]] = []
    modes: list[bool] = []
    accuracies = iter([0.2, 0.9, 0.5])
    student.module.body.register_forward_pre_hook(lambda module, _: modes.append(module.training))

    def validate() -> dict[str, float]:
        validated.append(state_bytes(student.module))
        student.module.eval()  # as an evaluation leaves it
        return {"accuracy": next(accuracies), "nll": 0.0}

    def after_step() -> bool:
        raw.append(state_bytes(student.module))
        return False

    _, trained = run_fit(tmp_path, data=data, student=student, train=settings(ema=0.9, select="best"), validate=validate, stop=after_step)
    assert len(modes) == 30
    assert all(modes), "the student was left in eval mode"
    assert trained.selected_epoch == 1
    assert state_bytes(student.module) == validated[1]
    assert len({v["head.weight"] for v in validated}) == 3
    assert not any(v["head.weight"] in {r["head.weight"] for r in raw} for v in validated)


def test_dropout_is_a_function_of_seed_step_and_microbatch(tmp_path: Path) -> None:
    data = toy_data(80)

    def drawn(name: str, seed: int, **changes: Any) -> list[float]:
        found: list[float] = []
        student = wrap_module(made(Small, "student"), role="student", data=data)
        student.module.body.register_forward_pre_hook(lambda *_: found.append(float(torch.rand(1))))
        run_fit(tmp_path / name, data=data, student=student, train=settings(accumulate=2, **changes), seed=seed)
        return found

    first = drawn("first", 3)
    assert len(set(first)) == 60
    torch.rand(7)  # whatever the global generator did before
    assert drawn("again", 3) == first
    assert not set(drawn("other", 4)) & set(first)
    assert drawn("others", 3, optimizer="sgd", lr=0.5) == first


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_the_cut_into_microbatches_changes_nothing(tmp_path: Path, accumulate: int) -> None:
    data = toy_data(30, unlabelled=13)  # 43 rows: the last batch is uneven, and labelled rows fall unevenly into the parts
    train = settings(batch_size=16, optimizer="sgd", momentum=0.9, clip_norm=None)
    whole, _ = run_fit(tmp_path / "1", data=data, train=train)
    cut, _ = run_fit(tmp_path / "n", data=data, train=train.model_copy(update={"accumulate": accumulate}))
    for name, value in whole.module.state_dict().items():
        torch.testing.assert_close(cut.module.state_dict()[name], value, rtol=1e-10, atol=1e-12)
    assert last_line(tmp_path / "1")["loss"] == pytest.approx(last_line(tmp_path / "n")["loss"], rel=1e-9)


def test_microbatches_are_nearly_equal_and_never_empty() -> None:
    for count in range(1, 40):
        for accumulate in (1, 2, 3, 4, 8):
            bounds = cuts(count, accumulate)
            assert [i for start, stop in bounds for i in range(start, stop)] == list(range(count))
            assert len(bounds) <= accumulate
            assert all(stop > start for start, stop in bounds)


def test_the_teacher_is_only_looked_at(tmp_path: Path) -> None:
    data = toy_data()
    module = made(Big, "teacher").train()
    teacher = LiveTeacher(wrap_module(module, role="teacher", data=data), Engine(torch.device("cpu"), "float64"))
    before = state_hash(module)
    run_fit(tmp_path, data=data, teacher=teacher)
    assert state_hash(module) == before
    assert all(p.grad is None for p in module.parameters())
    assert teacher.meter.items == 30 * 3
    teacher.check_untouched()


def test_a_teacher_that_changes_is_found() -> None:
    data = toy_data()
    module = made(Big, "teacher")
    teacher = LiveTeacher(wrap_module(module, role="teacher", data=data), Engine(torch.device("cpu"), "float64"))
    module.norm.running_mean += 1
    with pytest.raises(Exception, match="changed while it was only to be looked at"):
        teacher.check_untouched()


@pytest.mark.parametrize("features", ["plain", "dropout, EMA, accumulation, best epoch, projection"])
def test_a_stop_at_every_step_ends_in_the_same_bytes(tmp_path: Path, features: str) -> None:
    data = toy_data(80)
    rich = features != "plain"
    changes: dict[str, Any] = {"accumulate": 2, "ema": 0.9, "select": "best"} if rich else {}
    train = settings(**changes)  # 80 rows / 8 x 3 epochs = 30 steps
    accuracies = iter(range(1000))

    def go(folder: Path, stop: Any = lambda: False) -> tuple[dict[str, bytes], Any]:
        student = wrap_module(made(Small, "student", dropout=0.3 if rich else 0.0), role="student", data=data)
        objective = Objective.build(
            [*KD_MIX, *([HINT] if rich else [])], classes=data.classes, label_counts=np.bincount(data.train.labels), **SHAPES
        )
        validate = (lambda: {"accuracy": float(next(accuracies) % 2), "nll": 0.0}) if rich else None
        model, trained = run_fit(folder, data=data, student=student, objective=objective, train=train, stop=stop, validate=validate)
        return state_bytes(model.module), trained

    expected, whole = go(tmp_path / "whole")
    assert whole.steps == 30
    for step in range(1, 31):
        accuracies = iter(range(1000))
        folder = tmp_path / f"stopped-{step}"
        with pytest.raises(Interrupted):
            go(folder, StopAfter(step - 1))
        found, trained = go(folder)
        assert trained.resumed_from == [step]
        assert found == expected, f"stopped after step {step}"
        steps = [line["step"] for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in line]
        assert steps == list(range(1, 31)), f"the log of the run stopped after step {step}"


@pytest.mark.parametrize("killed_at", [2, 6])
def test_a_killed_run_leaves_no_step_twice_in_the_log(tmp_path: Path, killed_at: int) -> None:
    """Killed between two checkpoints (one every 4 steps), and before the first: what was logged since is forgotten, and only that."""
    left = iter(range(killed_at, -1, -1))

    def kill() -> bool:
        if next(left) == 1:
            raise KeyboardInterrupt
        return False

    whole, _ = run_fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_fit(tmp_path / "killed", stop=kill)
    with open(tmp_path / "killed" / "log.jsonl", "a") as log:
        log.write('{"role": "student", "st')  # cut off in the middle of a line
    found, trained = run_fit(tmp_path / "killed")
    assert trained.resumed_from == ([4] if killed_at > 4 else [])
    assert state_bytes(found.module) == state_bytes(whole.module)
    lines = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))


def test_workers_change_nothing(tmp_path: Path) -> None:
    none, _ = run_fit(tmp_path / "0", workers=0)
    two, _ = run_fit(tmp_path / "2", workers=2)
    assert state_bytes(none.module) == state_bytes(two.module)


def test_the_global_generator_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run_fit(tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture(params=["looked at at once", "looked at a step later"])
def looking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As on a CPU, and as on CUDA, where reading a value would make the device wait."""
    if "later" in request.param:
        monkeypatch.setattr(Engine, "asynchronous", True)
    return str(request.param)


@pytest.mark.usefixtures("looking")
def test_nan_in_the_teacher_stops_at_that_step_and_names_it(tmp_path: Path) -> None:
    data = toy_data(80)
    teacher = LiveTeacher(wrap_module(made(Big, "teacher"), role="teacher", data=data), Engine(torch.device("cpu"), "float64"))
    good = state_bytes(made(Small, "student"))
    calls = iter(range(100))
    real = teacher.model.module.forward

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        logits = real(x)
        if next(calls) == 5:
            logits[2, 1] = math.nan
        return logits

    teacher.model.module.forward = poisoned  # type: ignore[method-assign]
    with pytest.raises(NonFinite, match=r"Step 6 of the student: the term kd .* the teacher's logits .* sample [0-9a-f]{32}"):
        run_fit(tmp_path, data=data, teacher=teacher)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    student = wrap_module(made(Small, "student"), role="student", data=data)
    assert state_bytes(student.module) == good


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> torch.Tensor:
        return gradient[0] * math.inf


class Exploding(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(_BadGradient.apply(self.body(x)))


@pytest.mark.usefixtures("looking")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_infinite_gradient_stops_before_the_weights_are_touched(tmp_path: Path, optimizer: str) -> None:
    data = toy_data()
    module = made(Exploding, "student")
    before = state_bytes(module)
    with pytest.raises(NonFinite, match=r"Step 1 of the student: the loss is finite but the gradient of body.weight"):
        run_fit(
            tmp_path,
            data=data,
            student=wrap_module(module, role="student", data=data),
            train=settings(optimizer=optimizer, clip_norm=None, log_every=100),
        )
    assert state_bytes(module) == before


@pytest.mark.usefixtures("looking")
@pytest.mark.parametrize("steps", [5, 7])  # between two checkpoints, and at the step of one
@pytest.mark.parametrize("bad", ["the teacher's logits", "an infinite loss with a finite gradient"])
def test_the_weights_are_those_before_the_bad_step(tmp_path: Path, steps: int, bad: str) -> None:
    """Nothing of the bad step, and nothing of the one after it, where that has begun before somebody looked."""
    data = toy_data(80)

    def go(folder: Path, poisoned: int | None, stop: Any = lambda: False) -> dict[str, bytes]:
        student = wrap_module(made(Small, "student"), role="student", data=data)
        teacher = LiveTeacher(wrap_module(made(Big, "teacher"), role="teacher", data=data), Engine(torch.device("cpu"), "float64"))
        poison(teacher.model.module if "teacher" in bad else student.module, poisoned, math.nan if "teacher" in bad else -math.inf)
        with pytest.raises(Interrupted if poisoned is None else NonFinite) as error:
            run_fit(
                folder, data=data, student=student, teacher=teacher, train=settings(log_every=100, clip_norm=0.5, accumulate=2), stop=stop
            )
        if poisoned is not None:
            assert str(error.value).startswith(f"Step {steps + 1} of the student: the term kd")
            # a logit of -inf is a masked class, and no mistake by itself: then all of the microbatch are named
            assert len(re.findall("[0-9a-f]{32}", str(error.value))) == (1 if "teacher" in bad else 4)
        return state_bytes(student.module)

    expected = go(tmp_path / "good", None, StopAfter(steps - 1))
    assert go(tmp_path / "bad", 2 * steps + 1) == expected
    assert [p.name for p in (tmp_path / "bad" / "checkpoints").iterdir()] == ["step-00000004"]


def poison(module: nn.Module, call: int | None, value: float) -> None:
    """Put a value into one of the logits at one call, beside the graph."""
    calls, real = iter(range(1000)), module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = real(x)
        if next(calls) == call:
            logits = logits.clone()
            logits.data[1, 2] = value
        return logits

    module.forward = forward  # type: ignore[method-assign]


def test_looking_later_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = settings(accumulate=2, ema=0.9, clip_norm=0.1, log_every=3)
    at_once, _ = run_fit(tmp_path / "now", train=train)
    monkeypatch.setattr(Engine, "asynchronous", True)
    later, _ = run_fit(tmp_path / "later", train=train)
    assert state_bytes(at_once.module) == state_bytes(later.module)


class Overflowing(Small):
    """Its gradient overflows where the loss is scaled by more than ``limit``."""

    limit = 2.0**10

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(_Overflow.apply(self.body(x), self.limit))


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, limit: float) -> torch.Tensor:
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        scaled = gradient[0].abs().sum()
        return torch.where(scaled > ctx.limit, math.inf, gradient[0]), None


@pytest.mark.usefixtures("looking")
def test_a_scaled_loss_is_tried_with_half_the_scale_until_there_is_none(tmp_path: Path) -> None:
    """fp16, by its gradient scaler: steps whose gradient overflows are left out; a gradient that always does stops the run."""
    data = toy_data(80, dtype=torch.float32)

    def go(name: str, limit: float) -> tuple[nn.Module, nn.Module]:
        module, before = (made(Overflowing, "student", dtype=torch.float32) for _ in range(2))
        module.limit = limit
        teacher = LiveTeacher(
            wrap_module(made(Big, "teacher", dtype=torch.float32), role="teacher", data=data), Engine(torch.device("cpu"))
        )
        student = wrap_module(module, role="student", data=data)
        run_fit(tmp_path / name, data=data, student=student, teacher=teacher, train=settings(precision="fp16", log_every=100, epochs=4))
        return module, before

    module, before = go("some", 2.0**10)
    assert all(bool(v.isfinite().all()) for v in module.state_dict().values())
    assert state_bytes(module) != state_bytes(before)
    with pytest.raises(NonFinite, match=r"Step 17 of the student: the loss is finite but the gradient of body.weight"):
        go("all", 0.0)


def test_a_hint_trains_its_projection_and_leaves_no_hook(tmp_path: Path) -> None:
    data = toy_data()
    objective = Objective.build([*KD_MIX, HINT], classes=data.classes, label_counts=[1] * 4, **SHAPES)
    before = {n: p.detach().clone() for n, p in objective.named_parameters()}
    assert before
    student, _ = run_fit(tmp_path, data=data, objective=objective)
    assert all(not torch.equal(before[n].double(), p.detach()) for n, p in objective.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.module.modules())


def test_learning_rates_follow_their_formulas() -> None:
    base = settings(lr=1.0, warmup=0.0)
    for schedule, at in [
        ("constant", lambda t: 1.0),
        ("linear", lambda t: 1 - t),
        ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
    ]:
        s = base.model_copy(update={"schedule": schedule})
        assert [learning_rate(s, i, 10) for i in range(10)] == pytest.approx([at(i / 10) for i in range(10)])
    warm = base.model_copy(update={"schedule": "constant", "warmup": 0.4})
    assert [learning_rate(warm, i, 10) for i in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_one_cycle_is_torchs() -> None:
    s = settings(lr=0.5, warmup=0.3, schedule="one_cycle")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=101, pct_start=0.3, cycle_momentum=False)
    found, expected = [], []
    for step in range(100):
        found.append(learning_rate(s, step, 101))
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert found == pytest.approx(expected, rel=1e-9)


def test_step_is_torchs() -> None:
    s = settings(lr=0.5, warmup=0.0, schedule="step", milestones=[0.625, 0.75, 0.875], decay=0.2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [150, 180, 210], gamma=0.2)
    found, expected = [], []
    for step in range(240):
        found.append(learning_rate(s, step, 240))
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert len(set(expected)) == 4
    assert found == pytest.approx(expected, rel=1e-12)
    warm = s.model_copy(update={"warmup": 0.1})
    assert [learning_rate(warm, step, 240) for step in (0, 23, 24, 150)] == pytest.approx([0.02, 0.48, 0.5, 0.1])


def test_the_average_covers_batch_statistics() -> None:
    module = made(Big, "x")
    average = Average(module, 0.5)
    start = module.norm.running_mean.clone()
    module.norm.running_mean += 1.0
    for _ in range(3):
        average.update(10_000)
    np.testing.assert_allclose(average.values["norm.running_mean"], (start + 1 - 0.5**3).numpy(), rtol=1e-12)


def test_no_decay_on_vectors() -> None:
    from limbeck.optimizer import decay_groups

    decayed, free = decay_groups([made(Big, "x")], 0.1)
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in free["params"])
