"""Where the teacher sits: beside the student, on another device, or on ranks of its own.

Wherever that is, it sees the batches that it would see beside the student, cut in the same way, so it answers with the same bits.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck.data import Request, stream
from limbeck.engine import Engine, check_precision
from limbeck.ensemble import Ensemble
from limbeck.errors import Interrupted, Problem, UsageError
from limbeck.loop import Feed, Recorder
from limbeck.ranks import Ranks
from limbeck.recipe import Recipe, Train
from limbeck.teacher import Asking, Coming, LiveTeacher, Teacher
from limbeck.types import Batch, Needs, Signal

__all__ = ["Ahead", "Here", "Seat", "asked_in_the_loop", "attend", "beside", "check_seat", "live_of", "lives_of", "seat_of", "served"]


@dataclass(frozen=True)
class Seat:
    """Where a teacher is asked. device: of one that this process holds. ahead: in a thread of its own, a batch ahead of the student. ranks: how many
    only teach. reason: for the record."""

    device: torch.device
    ahead: bool = False
    ranks: int = 0
    reason: str = "as set by teacher.placement"

    @property
    def placement(self) -> str:
        """As a recipe names it."""
        return f"ranks:{self.ranks}" if self.ranks else f"device:{self.device}" if self.ahead else "same"


def seat_of(recipe: Recipe, device: torch.device, ranks: Ranks, *, plan: bool = False) -> Seat:
    """Where the teacher of a recipe sits, for students that train on ``device``. plan: a run is only planned, by one process in the place of several.

    Raises: UsageError for a device that is not there or cannot do the precision asked for, and for ranks that there are not.
    """
    asked = recipe.teachers[0].placement if len(recipe.teachers) == 1 else "same"
    if asked == "same":
        return Seat(device)
    if asked == "auto":
        return _chosen(device, ranks)
    kind, _, name = asked.partition(":")
    if kind == "ranks":
        return Seat(device, ranks=int(name)) if plan else _ranks(int(name), device, ranks)
    try:
        there = torch.device(name)
        torch.empty(1, device=there)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        hint = "Allowed: same, auto, device:cpu, device:cuda:N, ranks:K."
        raise UsageError(Problem("teacher.placement", f"got {asked!r}, which cannot be used here ({reason}).", hint)) from e
    if there.index is not None and there.type == "cuda" and ranks.local_size > 1:
        text = f"got {asked!r}, on which the teachers of all {ranks.local_size} processes of this machine would sit."
        raise UsageError(Problem("teacher.placement", text, "Use same, ranks:K, or device:cuda, which is each process's own."))
    if name == "cuda":
        there = torch.device("cuda", torch.cuda.current_device())
    return Seat(there, ahead=True)


def _chosen(device: torch.device, ranks: Ranks) -> Seat:
    """``auto``: the last CUDA device that is not the student's, for one process that has several; beside the student otherwise."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if ranks.size > 1:
        return Seat(device, reason=f"{ranks.size} ranks have a device each")
    if device.type != "cuda" or count < 2:
        return Seat(device, reason=f"{count} CUDA device{'s' * (count != 1)} for one process that trains on {device}")
    last = max(i for i in range(count) if i != device.index)
    return Seat(torch.device("cuda", last), ahead=True, reason=f"one process has {count} CUDA devices, and trains on {device}")


def _ranks(teachers: int, device: torch.device, ranks: Ranks) -> Seat:
    where, asked = "teacher.placement", f"got 'ranks:{teachers}'"
    if ranks.size == 1:
        text = f"{asked}, and this is a single process."
        hint = f"Start it with torchrun --nproc-per-node {teachers + 1} or more, or use same or device:NAME."
        raise UsageError(Problem(where, text, hint))
    if teachers >= ranks.size:
        text = f"{asked}, and there are {ranks.size} ranks, so that none would be left to train; expected at most ranks:{ranks.size - 1}."
        raise UsageError(Problem(where, text, "Start more processes."))
    if ranks.teachers != teachers:
        text = f"{asked}, and the ranks were given out before: {ranks.teachers} teach, of {ranks.size}."
        hint = "It has to be the same for all runs of one start, which torchrun (or another launcher of processes) has to make."
        raise UsageError(Problem(where, text, hint))
    return Seat(device, ranks=teachers)


def check_seat(recipe: Recipe, seat: Seat) -> None:
    """Raises: UsageError where the device of the teacher cannot do the precision that it is asked in."""
    if len(recipe.teachers) != 1 or not seat.ahead:
        return
    [spec] = recipe.teachers
    try:
        check_precision(recipe.train.precision if spec.precision == "auto" else spec.precision, seat.device)
    except UsageError as e:
        text = f"is {seat.placement}: {e.problems[0].message}"
        raise UsageError(
            Problem("teacher.placement", text, "Give the teacher a precision of its own, e.g. teacher.precision: bf16.")
        ) from e


# A teacher that is asked ahead.


Cuts = Sequence[tuple[int, int]]
"""The bounds of the microbatches of a step."""

Ask = Callable[[Request, Batch, Needs, Cuts], list[Signal]]
"""The answers to the microbatches of one step, wherever they are: request, batch (on the CPU), needs, cuts."""


class Ahead:
    """A teacher that sits elsewhere: it is asked for the next batch while the student trains on the present one.

    ask: called in a thread of its own, one batch after the other. device: the student's. live: the teacher, where this process holds it.
    """

    def __init__(self, identity: dict[str, Any], ask: Ask, device: torch.device, live: LiveTeacher | None = None) -> None:
        self.identity, self.live = identity, live
        self._ask, self._device = ask, device
        self._present: Future[_Answers] | None = None
        self._left: deque[Signal] = deque()
        self._there = None if live is None else _stream(live.engine.device)
        self._here = self._there if live is not None and live.engine.device == device else _stream(device)

    def __call__(self, batch: Batch, needs: Needs) -> Signal:
        """The answer to the next microbatch."""
        if not self._left:
            assert self._present is not None, "a batch is taken from ahead() before its microbatches are asked about"
            answers = self._present.result()
            if answers.arrived is not None:  # on the device alone: the host does not wait
                now = torch.cuda.current_stream(self._device)
                now.wait_event(answers.arrived)
                for tensor in (t for signal in answers.signals for t in _tensors(signal)):
                    tensor.record_stream(now)
            self._left.extend(answers.signals)
        signal = self._left.popleft()
        given = next(iter(_tensors(signal)), None)
        assert given is None or len(given) == len(batch), "answers go with the batches in their order"
        return signal

    def ahead(self, coming: Coming, asked: Asking) -> Coming:
        if self._there is not None:  # whatever was done with its weights is done
            torch.cuda.synchronize(self._there.device)
        self._left.clear()
        tried = False
        with ThreadPoolExecutor(1, "limbeck-teacher", torch.set_num_threads, (torch.get_num_threads(),)) as pool:
            before: tuple[Request, Batch, Future[_Answers]] | None = None
            for request, batch in coming:
                needs, parts = asked(request)
                trial = needs is not None and not tried
                with _no_draws(self._there.device if self._there is not None else None) if trial else nullcontext():
                    future = pool.submit(self._answers, request, batch, needs, parts)
                    if trial:  # the student waits meanwhile
                        future.result()
                        tried = True
                if before is not None:
                    self._present = before[2]
                    yield before[:2]
                before = request, batch, future
            if before is not None:
                self._present = before[2]
                yield before[:2]

    def _answers(self, request: Request, batch: Batch, needs: Needs | None, parts: Cuts) -> _Answers:
        if needs is None:
            return _Answers([], None)
        with torch.cuda.stream(self._there) if self._there is not None else nullcontext():
            signals = self._ask(request, batch, needs, parts)
            if self._here is None:
                moved = [signal.to(self._device) for signal in signals]
                if self._there is not None:
                    self._there.synchronize()
                return _Answers(moved, None)
            # A stream of its own on the student's device: what is brought there would else wait for the student, and the student for it.
            with torch.cuda.stream(self._here):
                moved = [signal.to(self._device) for signal in signals]
                arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
                arrived.record(self._here)
            return _Answers(moved, arrived)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Answers:
    """arrived: when they are there, for a device that works behind."""

    signals: list[Signal]
    arrived: torch.cuda.Event | None


def _tensors(signal: Signal) -> list[Tensor]:
    return [*([] if signal.logits is None else [signal.logits]), *signal.features.values()]


@contextmanager
def _no_draws(device: torch.device | None) -> Iterator[None]:
    """Refuses a teacher that draws from the global generators (the CPU's, or its CUDA device's), at an answer during which nobody else does: in a
    thread it would take numbers from the student's dropout, whenever it happens to run, and on a rank of its own a resumed run would see others."""

    def states() -> list[Tensor]:
        on_cuda = [] if device is None or device.type != "cuda" else [torch.cuda.get_rng_state(device)]
        return [torch.get_rng_state(), *on_cuda]

    before = states()
    yield
    if not all(map(torch.equal, before, states())):
        text = "draws random numbers while it answers; away from the student they would be other ones in every run."
        raise UsageError(Problem("teacher", text, "Use teacher.placement: same."))


def beside(live: LiveTeacher, student: Engine) -> Ahead:
    """The teacher of this process on a device of its own."""

    def ask(request: Request, batch: Batch, needs: Needs, parts: Cuts) -> list[Signal]:
        return _answered(live, batch, needs, parts, student.dtype)

    return Ahead(live.identity, ask, student.device, live)


def _answered(live: LiveTeacher, batch: Batch, needs: Needs, parts: Cuts, dtype: torch.dtype) -> list[Signal]:
    """dtype: of the student's inputs, through which a teacher beside it would get its own."""
    whole = batch.to(torch.device("cpu"), dtype)
    return [live(whole.part(start, stop), needs) for start, stop in parts]


class Here:
    """A teacher that answers at once, for what is measured; wherever it is, its answers come to the student's device.

    early: whether the run will ask it a step ahead, so that the answers of two steps are held. shares: whether it then works in the memory in which
    the student trains, at the same time.
    """

    def __init__(self, live: LiveTeacher, device: torch.device, seat: Seat | None = None) -> None:
        self.live, self.identity = live, live.identity
        self.early = seat is not None and (seat.ahead or seat.ranks > 0)
        self.shares = seat is not None and seat.ahead and seat.device == device
        self._device = device

    def __call__(self, batch: Batch, needs: Needs) -> Signal:
        return self.live(batch, needs).to(self._device)

    def ahead(self, coming: Coming, asked: Asking) -> Coming:
        return coming


def live_of(teacher: Teacher | None) -> LiveTeacher | None:
    """The model of one teacher, where this process asks it in the loop."""
    if isinstance(teacher, LiveTeacher):
        return teacher
    return teacher.live if isinstance(teacher, Ahead | Here) else None


def lives_of(teacher: Teacher | None) -> list[LiveTeacher]:
    """The models that this process asks in the loop."""
    each = teacher.members if isinstance(teacher, Ensemble) else [teacher]
    return [live for live in map(live_of, each) if live is not None]


def asked_in_the_loop(teacher: Teacher | None) -> bool:
    """Whether a teacher, or one of several, is asked in every step, by this process or by another one."""
    each = teacher.members if isinstance(teacher, Ensemble) else [teacher]
    return any(isinstance(one, LiveTeacher | Ahead | Here) for one in each)


# A teacher on ranks of its own.


def _server(step: int, student: int, ranks: Ranks) -> int:
    """Which rank answers to a student's share of a step: they take turns, whatever their numbers are."""
    assert ranks.seats is not None
    students = ranks.seats.students
    return students + (step * students + student) % ranks.teachers


def served(ranks: Ranks, device: torch.device, identity: dict[str, Any]) -> Ahead:
    """On a student rank: the teacher of the ranks that :func:`attend`. Nothing is sent to them: they read the same plan.

    Answers go over gloo, through the memory of the hosts.
    """

    def ask(request: Request, batch: Batch, needs: Needs, parts: Cuts) -> list[Signal]:
        assert ranks.seats is not None
        return _receive(request.step, _server(request.step, ranks.rank, ranks), ranks.seats.lane)

    return Ahead(identity, ask, device)


def attend(
    teacher: LiveTeacher | None, feed: Feed, asked: Asking, settings: Train, dtype: torch.dtype, recorder: Recorder, ranks: Ranks
) -> None:
    """What a rank that only teaches does while the students :func:`limbeck.loop.fit`: it answers for the next step, and looks with them whether to
    leave.

    teacher: None where they learn without. feed: as theirs, with the teacher's inputs for the student's. asked: as theirs. dtype: of the student's
    inputs.

    A plan is a pure function of the step, and a batch of its rows, so no batch has to be sent: this rank makes those of every student for itself.
    Raises: Elsewhere where the students leave.
    """
    assert ranks.seats is not None
    students, lane, plan = ranks.seats.students, ranks.seats.lane, feed.plan
    start = int(ranks.heard())

    def mine() -> Iterator[Request]:
        for first, of in zip(plan.starts, plan.plans, strict=True):
            if asked(plan.request(first))[0] is None:  # so do all steps of a stage
                continue
            for step in range(max(start, first), first + of.total_steps):
                for student in range(students):
                    if _server(step, student, ranks) == ranks.rank:
                        yield plan.request(step).share(student, students)

    how: Any = {"workers": feed.workers, "pin_memory": feed.pin_memory, "ranks": ranks.local_size, "say": recorder.progress.say}
    coming = stream(feed.builder, mine(), **how)
    following: tuple[Request, Batch] | None = None
    under_way: list[_Sent] = []

    def answer(step: int) -> None:
        nonlocal following
        for student in range(students):
            if teacher is None or _server(step, student, ranks) != ranks.rank:
                continue
            following = following or next(coming, None)
            if following is None or following[0].step > step:  # this step does not ask
                return
            (request, batch), following = following, None
            needs, parts = asked(request)
            assert needs is not None
            with _no_draws(teacher.engine.device):
                signals = _answered(teacher, replace(batch, teacher=batch.student), needs, parts, dtype)
            under_way.extend(_send(signals, step, student, lane))

    answer(start)
    for step in range(start, plan.total_steps):
        taken, under_way = under_way, []
        answer(step + 1)
        leaving = ranks.any(recorder.stop())  # when the students are done with this step
        for sent in taken:
            sent.wait()
        if leaving or ((step + 1) % settings.checkpoint_every == 0 and step + 1 < plan.total_steps):
            recorder.committed()
        if leaving:
            for sent in under_way:
                sent.wait()
            raise ranks.told_by_main(Interrupted("Stopped by a signal."))


# On the way: one message a step and student, which says itself what is in it.


@dataclass(frozen=True)
class _Sent:
    """A message under way; its bytes are kept until it is there."""

    work: Any
    content: Tensor

    def wait(self) -> None:
        self.work.wait()


_ALIGNED = 16  # bytes, a multiple of every element's size


def _send(signals: list[Signal], step: int, rank: int, lane: Any) -> list[_Sent]:
    content, head = _pack(signals)
    sizes = torch.tensor([step, head, len(content)])
    return [_Sent(dist.isend(part, rank, group=lane), part) for part in (sizes, content)]


def _receive(step: int, rank: int, lane: Any) -> list[Signal]:
    sizes = torch.empty(3, dtype=torch.int64)
    dist.recv(sizes, rank, group=lane)
    of, head, length = sizes.tolist()
    assert of == step, f"answers for step {of} where those for step {step} are due"
    content = torch.empty(length, dtype=torch.uint8)
    dist.recv(content, rank, group=lane)
    return _unpack(content, head)


def _pack(signals: list[Signal]) -> tuple[Tensor, int]:
    """``(N,)`` uint8, what is in it as JSON and then every tensor's bytes; and the length of the JSON."""
    parts: list[Tensor] = []

    def told(tensor: Tensor) -> list[Any]:
        # as it lies in memory: a sum over other strides may round otherwise
        strides = tensor.stride()
        order = sorted(range(tensor.ndim), key=lambda i: -strides[i])
        laid = tensor.detach().permute(order).cpu().contiguous()
        raw = laid.flatten().view(torch.uint8)
        parts.append(torch.nn.functional.pad(raw, (0, -len(raw) % _ALIGNED)))
        return [str(tensor.dtype).removeprefix("torch."), list(laid.shape), order]

    about = [[None if s.logits is None else told(s.logits), {k: told(v) for k, v in s.features.items()}] for s in signals]
    text = json.dumps(about).encode()
    text = text.ljust(len(text) + -len(text) % _ALIGNED)
    return torch.cat([torch.frombuffer(bytearray(text), dtype=torch.uint8), *parts]), len(text)


def _unpack(content: Tensor, head: int) -> list[Signal]:
    at = head

    def tensor(told: list[Any]) -> Tensor:
        nonlocal at
        dtype, shape, order = getattr(torch, told[0]), told[1], told[2]
        length = torch.Size(shape).numel() * dtype.itemsize
        found = content[at : at + length].view(dtype).reshape(shape)
        at += length + -length % _ALIGNED
        return found.permute([order.index(i) for i in range(len(order))])

    signals = []
    for logits, features in json.loads(content[:head].numpy().tobytes()):
        own = None if logits is None else tensor(logits)
        signals.append(Signal(own, {path: tensor(told) for path, told in features.items()}))
    return signals
