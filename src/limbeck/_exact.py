"""The same bits from the same run on CUDA: PyTorch's deterministic kernels, for as long as a command works."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.utils.deterministic

from limbeck.errors import Problem, UsageError

__all__ = ["Deterministic", "exact"]

Deterministic = bool | Literal["auto"]

_KEY = "train.deterministic"
_NONE = re.compile(r"(\w+) does not have a deterministic implementation")
_ATTENTION = "Memory Efficient attention defaults to a non-deterministic algorithm"


@contextmanager
def exact(device: torch.device, wanted: Deterministic, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Inside, two runs of the same work on one CUDA device end in the same bits, as far as ``wanted`` and PyTorch go.

    auto: the kernels that do so wherever PyTorch has them; ``say`` is told once of each operation that has none. True: such an operation is
    refused, and memory-efficient attention takes its slower, ordered form. False: the fastest kernels. On a CPU nothing is changed, where the
    kernels that training takes are ordered anyway; nor where the program has asked PyTorch for deterministic algorithms itself.

    Raises: UsageError with True, at an operation that has no such kernel.
    """
    if device.type != "cuda" or wanted is False or torch.are_deterministic_algorithms_enabled():
        yield
        return
    # cuBLAS adds up in a fixed order only in workspaces of its own, which it takes when it is first asked
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn, memory = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    before = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    cudnn.deterministic, cudnn.benchmark = True, False
    memory.fill_uninitialized_memory = False  # nothing here reads what was never written
    torch.use_deterministic_algorithms(True, warn_only=wanted == "auto")
    try:
        with _told(say):
            yield
    except RuntimeError as error:
        found = _NONE.search(str(error))
        if found is None:
            raise
        text = f"is true, and PyTorch {torch.__version__} has no deterministic {found[1]} on CUDA."
        raise UsageError(
            Problem(_KEY, text, "Allowed: auto (this operation may then differ in the last bits from run to run), false.")
        ) from error
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = before


@contextmanager
def _told(say: Callable[[str], None]) -> Iterator[None]:
    """PyTorch's warnings of such operations as sentences, each once; every other warning as it would be."""
    told: set[str] = set()

    def sentence(message: str) -> str | None:
        found = _NONE.search(message)
        if found is not None:
            return (
                f"{found[1]} has no deterministic kernel on CUDA: two runs of this recipe can differ in the last bits "
                f"({_KEY}: true refuses such an operation)."
            )
        if _ATTENTION in message:
            return f"Attention with a mask adds up in any order on CUDA: two runs can differ in the last bits ({_KEY}: true orders it, slower)."
        return None

    with warnings.catch_warnings():
        for one in (_NONE.pattern, _ATTENTION):  # whatever else is ignored; they come from inside torch
            warnings.filterwarnings("always", f".*{one}")
        real = warnings.showwarning

        def show(message: Any, *where: Any, **more: Any) -> None:
            text = sentence(str(message))
            if text is None:
                real(message, *where, **more)
            elif text not in told:
                told.add(text)
                say(text)

        warnings.showwarning = show
        yield
