"""Where a teacher sits: what a recipe may ask for, what ``auto`` takes, and what goes over the wire between ranks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.engine import Engine
from limbeck.errors import UsageError
from limbeck.models import wrap_module
from limbeck.objective import Objective
from limbeck.placement import _pack, _server, _unpack, beside, seat_of
from limbeck.ranks import ALONE, Ranks, Seats
from limbeck.recipe import Recipe, Term
from limbeck.teacher import LiveTeacher
from limbeck.types import Signal
from support import KD_MIX, Big, Small, made, run_fit, settings, state_bytes, toy_data

CPU = torch.device("cpu")


def asking(placement: str) -> Recipe:
    return Recipe.model_validate(
        {
            "task": "image-classification",
            "teacher": {"model": "a", "placement": placement},
            "student": {"model": "b"},
            "data": {"source": "digits"},
            "objective": [{"loss": "kd"}],
        }
    )


def seated(number: int, students: int, teachers: int) -> Ranks:
    return Ranks(number, students + teachers, seats=Seats(students, ALONE, None))


class TestSeat:
    @pytest.mark.parametrize(
        ("count", "device", "ranks", "placement"),
        [
            (0, "cpu", ALONE, "same"),
            (1, "cuda:0", ALONE, "same"),
            (4, "cuda:0", ALONE, "device:cuda:3"),
            (4, "cuda:3", ALONE, "device:cuda:2"),
            (4, "cpu", ALONE, "same"),
            (4, "cuda:0", Ranks(0, 2), "same"),
        ],
    )
    def test_auto_takes_the_last_device_that_is_not_the_students(
        self, count: int, device: str, ranks: Ranks, placement: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        seat = seat_of(asking("auto"), torch.device(device), ranks)
        assert seat.placement == placement
        assert seat.ahead == (placement != "same")
        assert str(seat.device) == (placement.removeprefix("device:") if seat.ahead else device)

    def test_what_there_is_not_is_told(self) -> None:
        assert seat_of(asking("same"), CPU, ALONE).placement == "same"
        assert seat_of(asking("device:cpu"), CPU, ALONE).ahead
        assert seat_of(asking("ranks:2"), CPU, seated(0, 1, 2)).ranks == 2
        with pytest.raises(UsageError, match=r"this is a single process. Start it with torchrun --nproc-per-node 3"):
            seat_of(asking("ranks:2"), CPU, ALONE)
        with pytest.raises(UsageError, match="there are 2 ranks, so that none would be left to train; expected at most ranks:1"):
            seat_of(asking("ranks:2"), CPU, Ranks(0, 2))
        with pytest.raises(UsageError, match="the ranks were given out before: 1 teach, of 4"):
            seat_of(asking("ranks:2"), CPU, seated(0, 3, 1))

    @pytest.mark.parametrize(("students", "teachers"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 5)])
    def test_every_teacher_has_its_turn(self, students: int, teachers: int) -> None:
        """Over as many steps as there are teachers, each answers to the same number of shares."""
        ranks = seated(0, students, teachers)
        asked = [_server(step, student, ranks) for step in range(teachers) for student in range(students)]
        assert sorted(asked) == sorted(list(range(students, students + teachers)) * students)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_signal_arrives_as_it_was_sent(dtype: torch.dtype) -> None:
    """Bits, shapes and strides, of which the order of a sum depends."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    features = {
        "map": some(3, 4, 5, 2).to(memory_format=torch.channels_last),
        "turned": some(3, 7, 2).transpose(1, 2),
        "part": some(3, 8)[:, 1:6],
        "none": some(3, 0),
    }
    sent = [Signal(some(3, 5), features), Signal(None, {"row": some(2, 3)}), Signal(torch.tensor([[torch.nan, -torch.inf]]))]
    came = _unpack(*_pack(sent))
    for one, other in zip(sent, came, strict=True):
        assert (one.logits is None) == (other.logits is None)
        pairs = [(one.features[k], other.features[k]) for k in one.features]
        for a, b in [*pairs, *([(one.logits, other.logits)] if one.logits is not None and other.logits is not None else [])]:
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    assert came[0].features["map"].is_contiguous(memory_format=torch.channels_last)
    assert came[0].features["turned"].stride() == sent[0].features["turned"].stride()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_asked_ahead_it_answers_as_beside_the_student(tmp_path: Path, accumulate: int) -> None:
    """Steps of 8 of 30 rows; a second fit with the same teacher begins anew."""
    data, found = toy_data(), []
    engine = Engine(CPU, "float64")
    terms = [*KD_MIX, Term(loss="hint", weight=1.0, student="body", teacher="body", projector="linear")]
    shapes: dict[str, Any] = {"shapes_student": {"body": (1, 5)}, "shapes_teacher": {"body": (1, 16)}}
    live = LiveTeacher(wrap_module(made(Big, "teacher"), role="teacher", data=data), engine)
    for number, teacher in enumerate((live, beside(live, engine), beside(live, engine))):
        objective = Objective.build(terms, classes=data.classes, label_counts=np.bincount(data.train.labels), **shapes)
        before = live.meter.items
        student, _ = run_fit(tmp_path / str(number), data=data, teacher=teacher, objective=objective, train=settings(accumulate=accumulate))
        found.append((state_bytes(student.module), state_bytes(objective), live.meter.items - before))
    assert found[0] == found[1] == found[2]
    assert found[0][2] == 90


def test_the_next_batch_is_under_way_while_the_student_trains(tmp_path: Path) -> None:
    """The student's forward pass waits until the teacher has begun with the batch after its own. 4 steps an epoch, 3 epochs."""
    data, engine = toy_data(), Engine(CPU, "float64")
    live = LiveTeacher(wrap_module(made(Big, "teacher"), role="teacher", data=data), engine)
    student = wrap_module(made(Small, "student"), role="student", data=data)
    begun, trained = threading.Semaphore(0), 0
    live.model.module.register_forward_pre_hook(lambda module, given: begun.release())

    def wait(module: Any, given: Any) -> None:
        nonlocal trained
        for _ in range(2 if trained == 0 else trained < 11):
            assert begun.acquire(timeout=60), f"the batch after step {trained} is not under way"
        trained += 1

    student.module.register_forward_pre_hook(wait)
    run_fit(tmp_path, data=data, student=student, teacher=beside(live, engine))
    assert trained == 12
    assert live.meter.items == 90


def test_an_error_of_a_teacher_that_is_asked_ahead_comes_out_of_the_loop(tmp_path: Path) -> None:
    data, engine = toy_data(), Engine(CPU, "float64")
    live = LiveTeacher(wrap_module(made(Big, "teacher"), role="teacher", data=data), engine)
    calls = 0

    def broken(module: Any, given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ZeroDivisionError("the fourth batch")

    live.model.module.register_forward_pre_hook(broken)
    with pytest.raises(ZeroDivisionError, match="the fourth batch"):
        run_fit(tmp_path, data=data, teacher=beside(live, engine))
