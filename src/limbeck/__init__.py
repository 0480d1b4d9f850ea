"""Limbeck: knowledge distillation. Teacher in, deployable student out, with the proof of what the teacher bought."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Result", "__version__", "distill", "load", "train"]

if TYPE_CHECKING:
    from limbeck.api import Result, distill, load, train


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line answers --help without importing torch.
    if name in ("Result", "distill", "load", "train"):
        from limbeck import api

        return getattr(api, name)
    raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
