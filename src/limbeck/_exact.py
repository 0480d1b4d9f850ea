"""The same bits from the same run on CUDA: PyTorch's deterministic kernels, for as long as a command works."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.utils.deterministic

from limbeck.errors import Stopped

__all__ = ["exact"]

_KEY = "train.deterministic"
_NONE = re.compile(r"(\S.*?) does not have a deterministic implementation")
_ATTENTION = re.compile(r"(\S[\w ]*?) [Aa]ttention defaults to a non-deterministic algorithm")
_CUBLAS = re.compile(r"this operation is not deterministic because it uses CuBLAS")
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def exact(devices: Iterable[torch.device], wanted: bool | Literal["auto"], say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Inside, two runs of the same work on one CUDA device end in the same bits, as far as ``wanted`` and PyTorch go.

    auto: the kernels that do so wherever PyTorch has them; ``say`` is told once of each operation that has none, and of attention, which PyTorch
    then leaves unordered. True: such an operation ends the run, and attention takes its slower, ordered form. False: nothing is asked for. Where
    none of the devices is CUDA nothing is changed: on a CPU the kernels that training takes are ordered anyway. A program that has itself asked
    PyTorch for deterministic algorithms without exception keeps them.

    These are settings of the whole process, so one run at a time may be inside. They are put back at the end, but for CUBLAS_WORKSPACE_CONFIG in
    the environment, which cuBLAS reads when it is first asked.

    Raises: Stopped with True, at an operation that has no such kernel.
    """
    if wanted is False or all(device.type != "cuda" for device in devices):
        yield
        return
    os.environ.setdefault(_WORKSPACE, ":4096:8")  # cuBLAS adds up in a fixed order only in workspaces of its own
    cudnn, memory = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    before = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    enabled, lenient = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    always = torch.is_warn_always_enabled()
    cudnn.deterministic, cudnn.benchmark = True, False
    memory.fill_uninitialized_memory = False  # nothing here reads what was never written
    torch.use_deterministic_algorithms(True, warn_only=wanted == "auto" and (lenient or not enabled))
    torch.set_warn_always(True)  # of attention PyTorch warns once in a process, and this may not be its first run
    try:
        with _told(say):
            yield
    except RuntimeError as error:
        found = _sentence(str(error))
        if found is None:
            raise
        raise Stopped(f"{found} {_KEY} is true, so the run ends here; go on with --resume and {_KEY}=auto, or with false.") from error
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=lenient)
        torch.set_warn_always(always)
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = before


def _sentence(message: str) -> str | None:
    """What PyTorch says of an operation that it cannot order, or was not asked to, in our words; None if it speaks of something else."""
    if found := _NONE.search(message):
        return f"{found[1]} has no deterministic kernel here: two runs of this recipe can differ in the last bits."
    if found := _ATTENTION.search(message):
        return f"{found[1]} attention adds up in any order on CUDA: two runs of this recipe can differ in the last bits."
    if _CUBLAS.search(message):
        return f"cuBLAS was asked before {_WORKSPACE}=:4096:8 stood in the environment, and may add up in any order."
    return None


@contextmanager
def _told(say: Callable[[str], None]) -> Iterator[None]:
    """PyTorch's warnings of such operations as sentences, each once; every other warning as it would be."""
    told: set[str] = set()
    with warnings.catch_warnings():
        for one in (_NONE, _ATTENTION, _CUBLAS):  # whatever else is ignored; they come from inside torch
            warnings.filterwarnings("always", f"(?s:.*){one.pattern}")
        real = warnings.showwarning

        def show(message: Any, *where: Any, **more: Any) -> None:
            text = _sentence(str(message))
            if text is None:
                real(message, *where, **more)
            elif text not in told:
                told.add(text)
                say(f"{text} {_KEY}: true refuses what cannot be ordered.")

        warnings.showwarning = show
        yield
