"""The processes of one run: a single one, or several that PyTorch's own launcher (torchrun) has started.

Every rank runs the same spine. What is decided by looking at files or by measuring is decided by the main rank and told to the others; what
is written is written by the main rank. So nothing has to be shared but the network: a folder that only the main rank can see will do.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from limbeck.errors import LimbeckError, Problem, Stopped, UsageError

__all__ = ["ALONE", "Elsewhere", "Ranks", "Seats", "joined", "launch", "leaving", "refuse_lost_folder", "restarted"]

TIMEOUT = 1800.0
"""Seconds that a rank waits for another; ``LIMBECK_RANK_TIMEOUT`` sets another number."""

_FAILED, _SAID, _LEFT = "failed", "said", "left"
# Of what the transports say of a rank that is gone or silent. Not every sentence names its transport: the first collective that waits in vain says
# that it timed out, and a later one on the same pair only that the pair was closed.
_LOST = ("gloo", "nccl", "process group", "pair closure", "timed out waiting", "closed by peer", "reset by peer", "broken pipe")
_CALL = 10.0  # seconds for one try to reach the main rank; signals are heard between two
_MEETING = 0.02  # seconds between two looks for the other ranks


class Elsewhere(LimbeckError):
    """Another rank has failed and says why; this one ends without a word, with the same exit code."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__("")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is. ``local_size``: how many of them are on this machine. Alone, nothing here talks to anybody.

    store: where ranks leave word for each other outside of the common steps; None where another program joined them.

    Where ranks of their own were given to a teacher (``joined(teachers=K)``), the students come first and the teachers last, and ``seats`` has
    those of this rank's kind as ranks among themselves. These talk over ``group`` (None: all processes), whose first has the number ``first``
    among all, and belong to ``world``.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    store: Any = field(default=None, compare=False, repr=False)
    group: Any = field(default=None, compare=False, repr=False)
    first: int = 0
    world: Ranks | None = field(default=None, compare=False, repr=False)
    seats: Seats | None = field(default=None, compare=False, repr=False)
    _gathering: list[Any] = field(default_factory=list, compare=False, repr=False)

    @property
    def main(self) -> bool:
        """Whether this rank decides, writes and speaks."""
        return self.rank == 0

    @property
    def teachers(self) -> int:
        """How many ranks were given to a teacher."""
        return 0 if self.seats is None else self.size - self.seats.students

    @property
    def teaching(self) -> bool:
        """Whether this rank is one of them."""
        return self.seats is not None and self.rank >= self.seats.students

    @property
    def own(self) -> Ranks:
        """Those that do the same work as this one: the students, or the teachers; all, where no rank was given to a teacher."""
        return self if self.seats is None else self.seats.own

    def sum(self, values: Sequence[int]) -> list[int]:
        """The sums of these numbers over all ranks, on the CPU."""
        if self.size == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(told, group=self.group)
        return [int(v) for v in told.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank; the same answer on all."""
        return self.sum([int(flag)])[0] > 0

    def anywhere(self, flag: bool) -> bool:
        """Whether it holds on some rank of the whole run, those that only teach included."""
        return (self.world or self).any(flag)

    def tell(self, value: Any) -> None:
        """What the main student rank has (a plain value), to the ranks that only teach, which take it by :meth:`heard`. All students call it."""
        if self.world is not None:
            self.world.told(lambda: value)

    def heard(self) -> Any:
        """On a rank that only teaches: what the students :meth:`tell`."""
        return (self.world or self).told(dict)

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all ranks of scalars, where they are; nothing waits for a device."""
        if self.size == 1:
            return list(tensors)
        joint = torch.stack([t.detach().double() for t in tensors])
        dist.all_reduce(joint, group=self.group)
        return [t.to(own.dtype) for t, own in zip(joint.unbind(), tensors, strict=True)]

    def gather(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], slice]:
        """``(N_r, ...)`` of this rank -> ``(N, ...)`` of all ranks, in their order, and where this rank's rows stand in them.

        Ranks may have different numbers of rows, none included; all of the tensors of one rank have the same. All ranks call it, and run backward
        through what came of it, equally often and in the same order. Backward adds up, for each row, the gradients of all ranks: where each rank's
        loss is its share of one sum, every rank gets the gradient of that sum.

        It talks in a group of its own, because DistributedDataParallel sums gradients in the same backward pass, in an order of its own.
        """
        count = len(tensors[0])
        if self.size == 1:
            return list(tensors), slice(0, count)
        if not self._gathering:
            assert self.group is None, "a group of some ranks is made by all of them at once: see _seated"
            self._gathering.append(_kept(dist.new_group(timeout=timedelta(seconds=_timeout()))))
        [group] = self._gathering
        counts = [0] * self.size
        counts[self.rank] = count
        counts = self.sum(counts)
        start = sum(counts[: self.rank])
        return [_Gathered.apply(x, group, counts, self.rank) for x in tensors], slice(start, start + count)

    def add(self, array: Any) -> None:
        """Sum a NumPy array over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(torch.from_numpy(array), group=self.group)

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives on the main rank (plain values, as JSON has them), on every rank. Alone, the very object."""
        return self.told(make)

    def told(self, make: Callable[[], Any], source: int = 0) -> Any:
        """The same of any rank."""
        if self.size == 1:
            return make()
        raw = json.dumps(make()).encode() if self.rank == source else b""
        return json.loads(self.broadcast_bytes(raw, source))

    def look(self) -> None:
        """Where every rank works for itself, for as long as it takes: leave if another one had to.

        Raises: Elsewhere with the exit code of the rank that failed first, or was stopped by a signal.
        """
        if self.store is not None and self.store.check([_FAILED]):
            raise Elsewhere(int(self.store.get(_FAILED).decode().split(",")[1]))

    def agree(self, facts: dict[str, Any]) -> None:
        """All ranks hold these facts (plain values by name), which machines with files of their own need not.

        Raises: UsageError on each rank that holds others than the main rank.
        """
        own = json.loads(json.dumps(facts))
        told = self.from_main(lambda: facts)
        wrong = [name for name in own if own[name] != told[name]]
        if wrong:
            text = "; ".join(f"{name} is {own[name]}, and the main rank has {told[name]}" for name in wrong)
            raise UsageError(
                Problem(
                    f"rank {os.environ.get('RANK', self.rank)} on {socket.gethostname()}",
                    f"{text}.",
                    "Every machine needs the same recipe, data and models.",
                )
            )

    def broadcast_bytes(self, raw: bytes, source: int = 0) -> bytes:
        """The bytes of one rank, by default of the main rank."""
        if self.size == 1:
            return raw
        length, owner = torch.tensor([len(raw)]), self.first + source
        dist.broadcast(length, owner, group=self.group)
        own = self.rank == source and len(raw) > 0
        told = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if own else torch.empty(int(length), dtype=torch.uint8)
        if len(told):
            dist.broadcast(told, owner, group=self.group)
        return told.numpy().tobytes()

    def broadcast(self, tensor: Tensor) -> None:
        """The main rank's values, into ``tensor`` on every rank."""
        if self.size > 1:
            dist.broadcast(tensor, self.first, group=self.group)

    def refuse_shared(self, device: torch.device) -> None:
        """Raises: UsageError where the ranks of this machine would have to share a CUDA device, which they cannot."""
        if self.size > 1 and device.type == "cuda" and "cuda:" not in dist.get_backend_config():
            count = torch.cuda.device_count()
            text = f"{self.local_size} processes of this machine would train on CUDA, and it has {count} device{'s' * (count != 1)}."
            raise UsageError(Problem("train.device", text, f"Start at most {count} on each machine, or set train.device: cpu."))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum([0])

    def told_by_main(self, error: LimbeckError) -> LimbeckError:
        """An error that all ranks have at once, which the main rank alone tells."""
        return error if self.main else Elsewhere(error.exit_code)

    def speaker(self, concerned: bool) -> bool:
        """Of the ranks that are concerned the first; the main rank where none is. All ranks ask at once."""
        if self.size == 1:
            return True
        flags = [0] * self.size
        flags[self.rank] = int(concerned)
        told = self.sum(flags)
        return self.rank == (told.index(1) if any(told) else 0)

    def replicated(self, module: nn.Module) -> nn.Module:
        """The module as PyTorch's DistributedDataParallel, whose gradients are the *sums* over the ranks.

        Each rank's loss is its share of the loss of the whole step (its items, divided by the count of all), so the shares are added. DDP by
        itself would divide by the number of ranks. The main rank's weights and buffers are given to all.
        """
        wrapped = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True, process_group=self.group)
        wrapped.register_comm_hook(self.group, _added)
        return wrapped


@dataclass(frozen=True)
class Seats:
    """How many ranks are students, the teachers coming after them; those of this rank's kind; and ``lane``, over which answers go from teachers to
    students and nothing else, so that a thread may wait there."""

    students: int
    own: Ranks
    lane: Any


ALONE = Ranks()


class _Gathered(torch.autograd.Function):
    """The rows of all ranks, which have ``counts`` of them; shorter ones are padded on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, counts: list[int], rank: int) -> Tensor:
        ctx.about = group, counts, rank
        most = max(counts)
        padded = x.new_zeros((most, *x.shape[1:]))
        padded[: len(x)] = x.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        if most:
            dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        group, counts, rank = ctx.about
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        if summed.numel():
            dist.all_reduce(summed, group=group)
        start = sum(counts[:rank])
        return summed[start : start + counts[rank]], None, None, None


def _added(group, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are texts
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def launched() -> bool:
    """Whether torchrun (or another launcher that sets its variables) has started this process as one of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")) and int(os.environ["WORLD_SIZE"]) > 1


def launch() -> str | None:
    """A name of this start of torchrun, the same after each of its restarts; None without it."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    # A run id may be used again, and in a container every launcher is process 1: when it began tells them apart.
    began = ""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{os.getppid()}/stat", encoding="utf-8", errors="replace") as f:
        began = f.read().rpartition(")")[2].split()[19]
    return f"{name}, {socket.gethostname()}, process {os.getppid()}, {began}"


def restarted(ranks: Ranks) -> bool:
    """Whether the launcher has started the processes of this run again after one was lost.

    Only the launcher on the machine of the lost process counts it as a restart, so all ranks are asked.
    """
    return ranks.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)


def refuse_lost_folder() -> None:
    """Raises: UsageError where processes that the launcher starts again could not find what the first ones began, for want of a name."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        text = "is needed with torchrun's --max-restarts: processes that are started again go on in the folder that was named."
        raise UsageError(Problem("--out", text, "Add --out DIR."))


_JOINED: list[Ranks] = []
_GROUPS: list[Any] = []


def _kept(group: Any) -> Any:
    """The group, which stays for as long as the process: PyTorch 2.6 lets go of one by waiting for its threads while it holds the interpreter's lock,
    and a thread that has just ended a step waits for that lock, to let go of the step's tensor. On a busy machine every second start of three ranks,
    one of them a teacher's, hung."""
    _GROUPS.append(group)
    return group


@contextmanager
def joined(teachers: int = 0) -> Iterator[Ranks]:
    """The ranks of this run, for the length of a ``with`` block: alone, or all that the launcher started. May be nested.

    teachers: so many of the launcher's first ranks teach and do nothing else; the next one is then the main rank. Where that cannot be (there are no
    more ranks than that), it is left to whoever reads the recipe to say so.

    An error on any rank ends all of them, with one message: who fails first says why, and the others leave with :class:`Elsewhere`. A rank that
    was lost, or that does not answer within the timeout, ends the others with a sentence and exit code 3.
    """
    if _JOINED:  # further up
        if 0 < teachers < _JOINED[0].size and _JOINED[0].teachers != teachers:
            _JOINED[0] = _seated(_JOINED[0], teachers)
        yield _JOINED[0]
        return
    if dist.is_available() and dist.is_initialized():  # by the program that calls Limbeck
        if "cpu:" not in dist.get_backend_config():
            text = f"the process group that is there ({dist.get_backend_config()}) cannot sum on the CPU, which counts of items need."
            raise UsageError(Problem("torch.distributed", text, 'Make it with init_process_group("cpu:gloo,cuda:nccl").'))
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return
    if not launched():
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=_timeout())
    common = _common_store(rank, size, timeout)
    store = PrefixStore(meet(common, rank, size, timeout.total_seconds()), common)
    backend, own = "cpu:gloo", own_device(torch.cuda.device_count() if torch.cuda.is_available() else 0, os.environ)
    if own is not None:
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=timeout)
    _kept(dist.group.WORLD)
    _JOINED.append(Ranks(rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), store))
    hearing = _Hearing(store) if rank and not _kept_by_launcher() else None
    try:
        if 0 < teachers < size:
            _JOINED[0] = _seated(_JOINED[0], teachers)
        yield _JOINED[0]
        if hearing is not None:
            hearing.end()
        _JOINED[0].barrier()
    except BaseException as error:
        raise _one_message(store, error, None if hearing is None else hearing.end()) from error
    finally:
        _JOINED.clear()
    dist.destroy_process_group()


def own_device(count: int, environment: Mapping[str, str]) -> int | None:
    """The CUDA device of this rank, where its machine has one for each of its ranks; None where it has not, and only the CPU can be shared.

    count: of the devices that this process sees. torchrun shows all of them to each rank. Other launchers may show each rank one of its own.
    """
    local, ranks = int(environment.get("LOCAL_RANK", "0")), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if count == 1 and "TORCHELASTIC_RUN_ID" not in environment:
        return 0
    return local if count >= ranks and local < count else None


def _common_store(rank: int, size: int, timeout: timedelta) -> Any:
    """The store at the address that the launcher gave: torchrun's own, else one that the main rank keeps. Nobody waits here for all the others,
    which :func:`meet` does: in there no signal would be heard."""
    if _kept_by_launcher():
        return next(rendezvous("env://", rank, size, timeout=timeout))[0]
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isdecimal() and int(port) < 2**16):
        raise UsageError(Problem("MASTER_PORT", f"got {port!r}, expected a number from 0 to 65535."))
    end = time.monotonic() + timeout.total_seconds()
    while True:
        left = max(0.1, end - time.monotonic())
        how: dict[str, Any] = {"timeout": timedelta(seconds=min(_CALL, left)), "wait_for_workers": False, "multi_tenant": rank == 0}
        try:
            store = TCPStore(host, int(port), size, rank == 0, **how)
        except (dist.DistError, RuntimeError) as e:
            said = str(e).splitlines()[0][:200]
            if rank == 0 and "listen" in str(e):
                text = f"the main rank cannot listen there ({said})."
                raise UsageError(Problem(f"MASTER_ADDR:MASTER_PORT {host}:{port}", text, "Name its own machine, and a free port.")) from e
            if time.monotonic() < end:
                continue
            text = f"The main rank was not found at {host}:{port} within {timeout.total_seconds():,.0f} s ({said}). Start it again."
            raise Stopped(text) from e
        store.set_timeout(timeout)
        return store


def leaving(code: int) -> None:
    """Word for the other ranks that this one ends now, with that exit code, so that they end with the same. For a signal's handler."""
    for ranks in _JOINED[:1]:
        with contextlib.suppress(Exception):
            ranks.store.compare_set(_FAILED, "", f"{os.environ['RANK']},{code}")
            _has_said(ranks.store, 5.0)


def _seated(ranks: Ranks, teachers: int) -> Ranks:
    """The same processes, numbered anew: students first, so that the main rank is one that trains, in every group that it is in; then teachers."""
    rank, size = int(os.environ["RANK"]), ranks.size
    number, students = (rank - teachers) % size, size - teachers
    timeout = timedelta(seconds=_timeout())
    backend = dist.get_backend_config()
    ranks.barrier()
    dist.destroy_process_group()
    dist.init_process_group(backend, store=PrefixStore(f"teachers-{teachers}", ranks.store), rank=number, world_size=size, timeout=timeout)
    _kept(dist.group.WORLD)
    # Every process makes every group, in one order: for each kind of ranks one for its steps, and one for what it gathers (see Ranks.gather).
    groups = [
        [_kept(dist.new_group(list(range(*bounds)), timeout=timeout)) for _ in range(2)] for bounds in ((0, students), (students, size))
    ]
    lane = _kept(dist.new_group(backend="gloo", timeout=timeout))
    first, count, (group, gathering) = (0, students, groups[0]) if number < students else (students, teachers, groups[1])
    world = Ranks(number, size, ranks.local_size, ranks.store)
    own = Ranks(number - first, count, ranks.local_size, ranks.store, group, first, world, _gathering=[gathering])
    return replace(world, seats=Seats(students, own, lane))


def meet(store: Any, rank: int, size: int, seconds: float) -> str:
    """Wait for all ranks of this start; returns a name that they share, and that no other start has.

    torchrun keeps one store over all restarts, in which the ranks before have left their addresses, and whether they failed. Its count of restarts is
    no name, because it differs between machines. So each rank writes a number of its own; the main rank names the set of numbers that it
    finds, anew when one changes; a name is good when every rank in it has answered, which one that is gone cannot.

    Raises: Stopped when not all are there within ``seconds``.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + seconds
    places = [f"limbeck/here/{r}" for r in range(size)]
    store.set(places[rank], own)
    name, named = "", list[str]()
    while time.monotonic() < end:
        if rank == 0 and store.check(places):
            here = [store.get(place).decode() for place in places]
            if here != named:
                name, named = f"limbeck/{uuid.uuid4().hex}", here
                store.set("limbeck/name", json.dumps([name, named]))
            if size == 1 or store.check([f"{name}/{r}" for r in range(1, size)]):
                store.set(f"{name}/0", "")
                return name
        elif rank > 0 and store.check(["limbeck/name"]):
            name, named = json.loads(store.get("limbeck/name"))
            if own in named:
                store.set(f"{name}/{rank}", "")
                if store.check([f"{name}/0"]):
                    return str(name)
        time.sleep(_MEETING)
    there = sum(store.check([place]) for place in places)
    raise Stopped(
        f"Not all of the {size} processes of this run came within {seconds:,.0f} s; {there} of them have been seen. Start it again."
    )


def _timeout() -> float:
    given = os.environ.get("LIMBECK_RANK_TIMEOUT", "")
    try:
        seconds = float(given) if given else TIMEOUT
        if seconds > 0:
            return seconds
    except ValueError:
        pass
    raise UsageError(Problem("LIMBECK_RANK_TIMEOUT", f"got {given!r}, expected a number of seconds above 0."))


def _kept_by_launcher() -> bool:
    """Whether the store lives in the launcher (torchrun's agent), and so outlives every rank; else it ends with the main rank."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class _Hearing:
    """Listens, beside whatever this rank does, for the main rank to fail: it takes the store with it, and a rank that waits for it in a common step
    notices that only when it is gone."""

    def __init__(self, store: Any) -> None:
        self._store, self._ended = store, threading.Event()
        self._code: int | None = None
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with contextlib.suppress(Exception):
            while not self._ended.wait(0.2):
                if self._store.check([_FAILED]):
                    self._code = int(self._store.get(_FAILED).decode().split(",")[1])
                    self._store.add(_LEFT, 1)
                    return

    def end(self) -> int | None:
        """The exit code of the rank that failed; None where none has been heard of."""
        self._ended.set()
        self._thread.join()
        return self._code


def _one_message(store: Any, error: BaseException, heard: int | None) -> BaseException:
    """The error, on the rank that failed first; on the others :class:`Elsewhere`, when the first one has had its say."""
    if _is_lost(error):
        error = Stopped(
            f"Another process of this run was lost, or did not answer for {_timeout():,.0f} s ({str(error).splitlines()[0][:200]}). "
            "What was committed is kept: run the same command again with --resume."
        )
    if heard is not None:
        return Elsewhere(heard)
    code = error.exit_code if isinstance(error, LimbeckError) else 1
    silent = isinstance(error, Elsewhere)
    with contextlib.suppress(Exception):  # a store that is gone too: everybody speaks for himself
        if not silent:
            first = store.compare_set(_FAILED, "", f"{os.environ['RANK']},{code}").decode()
            silent = first != f"{os.environ['RANK']},{code}"
            if silent:
                code = int(first.split(",")[1])
        if silent:
            store.wait([_SAID], timedelta(seconds=10))
            store.add(_LEFT, 1)
            atexit.register(_keep_open, store, 3.0)  # of several that are silent the others may not have looked yet
        else:
            atexit.register(_has_said, store)
    return Elsewhere(code) if silent else error


def _has_said(store: Any, seconds: float = 15.0) -> None:
    """At the end of the process that spoke. Where it is also the one that keeps the store (no torchrun does), the others read it first."""
    with contextlib.suppress(Exception):
        store.set(_SAID, "1")
        _keep_open(store, seconds)


def _keep_open(store: Any, seconds: float) -> None:
    """Where this process keeps the store (no torchrun does): until all but the one that spoke have left, or as long as that."""
    with contextlib.suppress(Exception):
        end = time.monotonic() + seconds if os.environ["RANK"] == "0" and not _kept_by_launcher() else 0.0
        while time.monotonic() < end and store.add(_LEFT, 0) < int(os.environ["WORLD_SIZE"]) - 1:
            time.sleep(0.02)


def _is_lost(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _LOST)
