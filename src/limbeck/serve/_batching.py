"""Requests that come together run together: one batch at a time for each model, and a queue that ends."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.serve._model import Arrays, Refused, ServedModel

__all__ = ["Answer", "Batcher", "Busy"]


INLINE = 0.002
"""Seconds: a batch that is expected to take less runs where it is; the way to a thread and back would cost it more than it holds up others."""

ALONE = 0.010
"""Seconds: the same for a request that comes alone: who asks this model after it would wait anyway, and others wait that long at most."""


class Busy(Exception):
    """The queue is full, or a request waited too long in it; come again in ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Answer:
    """logits: ``(B, C)`` of one request. queue_ms, model_ms: how long it waited and its batch ran. batch: rows of that batch."""

    logits: npt.NDArray[Any]
    queue_ms: float
    model_ms: float
    batch: int


@dataclass(eq=False)
class _Waiting:
    arrays: Arrays
    rows: int
    key: tuple[Any, ...]
    answer: asyncio.Future[Answer]
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Runs a model for many requests.

    A request that comes alone runs at once. While a batch runs, others gather; after a batch of several, the next one waits for as many rows
    again, ``window`` seconds at most. Inputs of other shapes make batches of their own, but texts are padded to one length. A request that the
    model refuses is answered alone: the others of its batch run again without it. ``seen`` is told the rows and seconds of every batch.
    """

    def __init__(self, model: ServedModel, *, max_batch: int, window: float, queue: int, timeout: float) -> None:
        self.model, self.max_batch, self.window, self.queue, self.timeout = model, max_batch, window, queue, timeout
        self.seen: Callable[[int, float], None] | None = None
        self._waiting: deque[_Waiting] = deque()
        self._rows = 0
        self._last = 1  # rows of the batch before
        self._pace = 0.0  # seconds a row, a running mean
        self._cost = 0.0  # seconds an element of the first input, likewise: texts are not all as long
        self._came = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return self._rows

    async def __call__(self, arrays: Arrays, padded: bool = False) -> Answer:
        """The logits of one request. arrays: ``{name: (B, ...)}``. padded: the server may pad it with others (texts that it tokenised).

        Raises: Busy, Refused.
        """
        rows = len(next(iter(arrays.values())))
        if self._rows + rows > self.queue:
            raise Busy(f"the queue is full: {self._rows} rows wait, and at most {self.queue} may.", self._retry_after())
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())
        key = (*((name, value.dtype.str, () if padded else value.shape[1:]) for name, value in arrays.items()), padded)
        item = _Waiting(arrays, rows, key, asyncio.get_running_loop().create_future())
        self._waiting.append(item)
        self._rows += rows
        self._came.set()
        try:
            async with asyncio.timeout(self.timeout):
                return await item.answer
        except TimeoutError:
            raise Busy(f"the model did not answer within {self.timeout:g} seconds.", self._retry_after()) from None

    async def close(self) -> None:
        """Stop working; what waits is given up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _retry_after(self) -> int:
        return max(1, min(60, round(self._rows * self._pace + 0.5)))

    async def _work(self) -> None:
        while True:
            if not self._waiting:
                self._came.clear()
                await self._came.wait()
            await self._gather()
            batch = self._take()
            if batch:
                await self._answer(batch)

    async def _gather(self) -> None:
        """Wait for as many rows as the last batch had, until the first has waited for the window."""
        wanted = min(self._last, self.max_batch)
        while self._waiting and self._rows < wanted:
            left = self._waiting[0].since + self.window - time.perf_counter()
            if left <= 0:
                return
            self._came.clear()
            try:
                async with asyncio.timeout(left):
                    await self._came.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        """The first request, and those that may share its batch, in their order."""
        batch: list[_Waiting] = []
        rest: deque[_Waiting] = deque()
        rows = 0
        for item in self._waiting:
            if item.answer.done():  # nobody waits for it any more
                self._rows -= item.rows
            elif not batch or (item.key == batch[0].key and rows + item.rows <= self.max_batch):
                batch.append(item)
                rows += item.rows
                self._rows -= item.rows
            else:
                rest.append(item)
        self._waiting = rest
        self._last = max(rows, 1)
        return batch

    async def _answer(self, batch: list[_Waiting], again: bool = False) -> None:
        """again: the batch was refused, and each of its requests is asked about by itself, with others behind it."""
        start = time.perf_counter()
        try:
            logits = await self._run(batch, INLINE if again or len(batch) > 1 or self._waiting else ALONE)
        except Refused as error:
            if len(batch) == 1:
                _settle(batch[0], error)
            else:
                for item in batch:
                    await self._answer([item], again=True)
                    await asyncio.sleep(0)  # what runs here lets others in between
            return
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a bug, which each of them must hear of and which must not end the others
            for item in batch:
                _settle(item, error)
            return
        seconds = time.perf_counter() - start
        rows = sum(item.rows for item in batch)
        self._pace = seconds / rows if not self._pace else 0.9 * self._pace + 0.1 * seconds / rows
        cost = seconds / _size(batch)
        self._cost = cost if not self._cost else 0.9 * self._cost + 0.1 * cost
        if self.seen is not None:
            self.seen(rows, seconds)
        at = 0
        for item in batch:
            if not item.answer.done():
                item.answer.set_result(Answer(logits[at : at + item.rows], (start - item.since) * 1000, seconds * 1000, rows))
            at += item.rows

    async def _run(self, batch: list[_Waiting], inline: float) -> npt.NDArray[Any]:
        """inline: seconds; what is expected to take less runs in the event loop."""

        def work() -> npt.NDArray[Any]:
            parts = [item.arrays for item in batch]
            if len(parts) > 1 and not batch[0].key[-1]:
                arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            else:
                arrays = self.model.stack(parts)
            return self.model.run(arrays)

        if 0 < _size(batch) * self._cost < inline:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _size(batch: list[_Waiting]) -> int:
    """Elements of the first input, padding included."""
    parts = [next(iter(item.arrays.values())) for item in batch]
    return max(1, sum(map(len, parts)) * max(part.size // max(1, len(part)) for part in parts))


def _settle(item: _Waiting, error: Exception) -> None:
    if not item.answer.done():
        item.answer.set_exception(error)
