"""Batches where they are used, by a background thread, or by worker processes; the same bytes in every case."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from limbeck._machine import SHARED_ENOUGH, processors, shared_memory
from limbeck.data.batches import Request
from limbeck.data.splits import Split
from limbeck.errors import LimbeckError, Problem, UsageError
from limbeck.recipe import Augment
from limbeck.types import Batch

__all__ = ["choose_workers", "shared_memory_for", "stream"]

Build = Callable[[Request], Batch]

_AHEAD = 3  # batches that the background thread may be ahead
_QUICK = 200e-6  # seconds: waking a thread and taking turns with it cost about 100 microseconds a batch
_READY = 2  # batches that each loader process makes ahead
_TRIED = 3  # batches: the first ones also pay for what is made once


def stream(
    builder: Build,
    requests: Iterable[Request],
    *,
    workers: int,
    pin_memory: bool = False,
    ranks: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[Request, Batch]]:
    """``(request, batch)`` in the order of ``requests``, prepared ahead of time.

    workers 0: one background thread of this process, or none where batches are so quickly made (rows of float arrays, tokens) that the
    thread would cost more; above 0: that many processes. Closing the generator, an exception and Ctrl-C stop them. ``pin_memory`` is for
    transfers to a CUDA device.

    Processes hand the tensors of a batch over in shared memory. Where that is too small for so many, ``say`` is told, and it goes on with as many
    as it holds, which changes no batch. ranks: of this machine, which share it.
    """
    if workers > 0:
        requests = iter(requests)
        first = next(requests, None)
        if first is None:
            return
        requests = chain([first], requests)
        workers = _fitting(builder, first, workers, ranks, say)
    if workers == 0:
        yield from _local(builder, requests, pin_memory)
    else:
        yield from _processes(builder, requests, workers, pin_memory)


def _fitting(builder: Build, request: Request, workers: int, ranks: int, say: Callable[[str], None]) -> int:
    """How many processes the shared memory holds the batches of; a process that finds it full is killed by the kernel (SIGBUS)."""
    found = shared_memory()
    if found is None:
        return workers
    few = replace(request, rows=request.rows[:2])
    size = _shared_bytes(builder(few)) * -(-len(request.rows) // len(few.rows))
    fitting, sentence = shared_memory_for(workers, size, found[1] // ranks)
    if sentence:
        say(sentence)
    return fitting


def shared_memory_for(workers: int, size: int, free: int) -> tuple[int, str]:
    """How many processes can hand batches of ``size`` bytes over through ``free`` bytes of shared memory, and a sentence where not all can.

    Each has as many batches ready as a DataLoader asks for, and the step has one and the next.

    >>> shared_memory_for(4, 1_000_000, 8_000_000)[0], shared_memory_for(4, 1_000_000, 10_000_000)
    (3, (4, ''))
    """
    fitting = min(workers, max(0, (free // max(1, size) - 2) // _READY))
    if fitting == workers:
        return workers, ""
    need, kept = (_READY * workers + 2) * size, f"{fitting} of them" if fitting else "a background thread in their place"
    return fitting, (
        f"/dev/shm has {free / 2**20:,.0f} MiB free, and {workers} loader processes (train.workers) need {need / 2**20:,.0f} MiB for their batches: "
        f"going on with {kept}. Give it more: docker run --shm-size=8g; in Kubernetes, a volume `emptyDir: {{medium: Memory}}` at /dev/shm."
    )


def _shared_bytes(batch: Batch) -> int:
    """Of its tensors; the rest goes through a pipe."""
    inputs = [batch.student, *batch.others]
    if batch.teacher is not None and batch.teacher is not batch.student:
        inputs.append(batch.teacher)
    tensors = [*(v for given in inputs for v in given.values()), batch.labels, batch.mask]
    return sum(t.numel() * t.element_size() for t in tensors)


def _local(builder: Build, requests: Iterable[Request], pin_memory: bool) -> Iterator[tuple[Request, Batch]]:
    def build(request: Request) -> Batch:
        batch = builder(request)
        return batch.pin_memory() if pin_memory else batch

    left = iter(requests)
    for request in islice(left, _TRIED):
        began = time.perf_counter()
        batch = build(request)
        seconds = time.perf_counter() - began
        yield request, batch
        if seconds < _QUICK:
            for following in left:
                yield following, build(following)
            return
        if seconds > 10 * _QUICK:
            break
    yield from _threaded(build, left)


def _threaded(build: Build, requests: Iterable[Request]) -> Iterator[tuple[Request, Batch]]:
    ready: queue.Queue[tuple[Request, Batch] | BaseException | None] = queue.Queue(maxsize=_AHEAD)
    stopped = threading.Event()

    def put(item: tuple[Request, Batch] | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for request in requests:
                if not put((request, build(request))):
                    return
            put(None)
        except BaseException as error:  # it is raised again where the batches are consumed
            put(error)

    thread = threading.Thread(target=work, name="limbeck-batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


class _Built(Dataset[Any]):
    """Requests in, batches out, inside a worker."""

    def __init__(self, builder: Build) -> None:
        self._builder = builder

    def __getitem__(self, request: Request) -> tuple[Request, Batch] | LimbeckError:
        try:
            return request, self._builder(request)
        except LimbeckError as error:
            return error  # a sentence, which a DataLoader would wrap in a worker's traceback


def _same(item: Any) -> Any:
    return item


def _start_worker(alive: Connection, _: int) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with, args=(alive,), name="limbeck-alive", daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):  # a signal to the whole group is the main process's to handle
        signal.signal(number, signal.SIG_IGN)


def _leave_with(alive: Connection) -> None:
    """End this worker when the main process is gone, however it went: its end of the pipe closes then.

    A worker's parent is the fork server, which outlives a main process that is killed for as long as there are workers.
    """
    with contextlib.suppress(EOFError, OSError):
        alive.recv_bytes()
    os._exit(0)


def _start_fork_server() -> None:
    """Start it with SIGTERM blocked, which it keeps: its end would be the workers' end. Here the signal only waits for a moment."""
    resource_tracker.ensure_running()  # first, for it unblocks signals after its own start
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _processes(builder: Build, requests: Iterable[Request], workers: int, pin_memory: bool) -> Iterator[tuple[Request, Batch]]:
    # a process that has run OpenMP work must not fork, and importing torch once in the fork server saves seconds a worker
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["limbeck.data.loader"])
    _start_fork_server()
    sampler: Any = requests
    alive, held = context.Pipe(duplex=False)
    loader: DataLoader[Any] = DataLoader(
        _Built(builder),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=_READY,
        collate_fn=_same,
        pin_memory=pin_memory,
        worker_init_fn=partial(_start_worker, alive),
        multiprocessing_context=context,
    )
    before = {p.pid for p in multiprocessing.active_children()}
    batches = iter(loader)
    processes = [p for p in multiprocessing.active_children() if p.pid not in before]
    alive.close()  # the workers have it
    try:
        for item in batches:
            if isinstance(item, LimbeckError):
                raise item
            yield item
    finally:
        del batches  # stops the workers
        held.close()
        for process in processes:
            if process.is_alive():  # one that hangs
                process.kill()
                process.join()


def _unguarded_script() -> str | None:
    """The running script, if starting processes would run it again from its first line."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if file is None or getattr(main, "__spec__", None) is not None:
        return None
    try:
        text = Path(file).read_text("utf-8", "replace")
    except OSError:
        return str(file)  # a program from standard input, which no other process can read
    return None if "__main__" in text or not file.endswith(".py") else str(file)


def choose_workers(setting: int | Literal["auto"], split: Split, augment: Augment | None, ranks: int = 1) -> tuple[int, str]:
    """How many loader processes each rank has, and why, for the record. ranks: on this machine, which share its processors.

    Raises:
        UsageError: processes are asked for by a script that they would run again.
    """
    script = _unguarded_script()
    guard = 'has no `if __name__ == "__main__":`, so every worker process would run it again'
    if setting != "auto":
        if setting > 0 and script is not None:
            raise UsageError(Problem("train.workers", f"{script} {guard}.", "Put the call under that line, or set train.workers: 0."))
        return setting, "as set by train.workers"
    if split.source.in_memory:
        return 0, "the data is in memory: a background thread prepares batches"
    if len(split) < 256:
        return 0, f"{len(split)} samples are fewer than worth starting processes for"
    if script is not None:
        return 0, f"{script} {guard}"
    cpus = processors()
    there = shared_memory()
    if there is not None and there[1] < SHARED_ENOUGH:
        return 0, f"/dev/shm has only {there[1] >> 20} MiB free for batches of worker processes (docker: --shm-size=8g)"
    shared = f" for {ranks} ranks" if ranks > 1 else ""
    return min(8, max(1, cpus // ranks - 1)), f"samples are decoded when they are read, and there are {cpus} CPUs{shared}"
