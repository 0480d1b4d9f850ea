"""How much memory a process may still take, and how much a piece of work holds at most."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from limbeck import _machine

__all__ = ["available", "largest"]


def available(device: torch.device, processes: int = 1) -> int:
    """Bytes that may still be taken on a device. processes: those of this run on this machine, which share a CPU's memory equally.

    CUDA: what the driver has free, and what the allocator holds and does not use. CPU: what the machine and the control groups leave; where
    the system does not say, all memory of the machine.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    found = _machine.memory()
    left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if found is None else found.left
    return left // processes


@contextmanager
def largest(device: torch.device) -> Iterator[Callable[[], int]]:
    """``peak()``: the most bytes of tensors that were held at one time of those that were made inside the block.

    CUDA: by the allocator's own count. Elsewhere by looking at the result of every operation, in the forward and in the backward pass; what a kernel
    takes for itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: max(0, torch.cuda.max_memory_allocated(device) - before)
        return
    with _Live() as live:
        yield lambda: live.peak


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, until they are gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            self._see(given, 0)
        made = func(*args, **kwargs)
        for tensor in tree_leaves(made):
            self._see(tensor, None)
        self.peak = max(self.peak, self.now)
        return made

    def _see(self, tensor: Any, size: int | None) -> None:
        """size: 0 for what was there before."""
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        if id(storage) not in self._known:
            size = storage.nbytes() if size is None else size
            self._known[id(storage)] = weakref.ref(storage, partial(self._gone, id(storage), size))
            self.now += size

    def _gone(self, at: int, size: int, _: Any) -> None:
        self._known.pop(at, None)
        self.now -= size
