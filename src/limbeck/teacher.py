"""The Teacher protocol, and the teacher that is asked in the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.data import Request
from limbeck.engine import Engine
from limbeck.errors import LimbeckError
from limbeck.models import Capture, Model, logits_of, state_hash
from limbeck.types import Batch, Needs, Signal

__all__ = ["Asking", "Coming", "LiveTeacher", "Meter", "Teacher"]

Coming = Iterator[tuple[Request, Batch]]
"""The batches of a fit's steps, in order."""

Asking = Callable[[Request], tuple[Needs | None, Sequence[tuple[int, int]]]]
"""What a step asks its teacher for (None: it does not ask), and the bounds of the microbatches that it asks about."""


class Teacher(Protocol):
    """Whatever can say, for a batch, what a student should learn from.

    ``identity`` says which weights and which preparation of inputs it answers with. A loop takes its batches from ``ahead``, so that a teacher that
    sits elsewhere sees the next one while the student trains on the present one, and then asks about every microbatch in order, in the steps that
    ask at all (``asked`` knows). One that is asked where the loop runs gives the batches back as they come.
    """

    identity: dict[str, Any]

    def __call__(self, batch: Batch, needs: Needs) -> Signal: ...

    def ahead(self, coming: Coming, asked: Asking) -> Coming: ...


class Meter:
    """Counts the samples of every forward pass of some modules, for whatever purpose, and the seconds that teaching took.

    ``seconds`` is None on CUDA, where a call returns before its work is done.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.items = 0
        self.seconds: float | None = 0.0
        self._handles = [module.register_forward_hook(self._count) for module in modules]

    def _count(self, module: nn.Module, arguments: Any, outputs: Any) -> None:
        self.items += len(logits_of(outputs))

    def add(self, seconds: float, device: torch.device) -> None:
        self.seconds = None if device.type == "cuda" or self.seconds is None else self.seconds + seconds

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class LiveTeacher:
    """A model that is only looked at: in eval mode, without gradient, no buffer of it changes.

    columns: ``(C,)`` int64, the teacher's output for each class of the data (a class-order mismatch found by label names), or None.
    """

    def __init__(
        self, model: Model, engine: Engine, columns: np.ndarray[Any, np.dtype[np.int64]] | None = None, meter: Meter | None = None
    ) -> None:
        self.model = model
        self.meter = meter or Meter(model.module)
        self.engine = engine
        self.identity: dict[str, Any] = {
            "weights_sha256": model.weights_sha256,
            "spec": model.spec,
            "preprocessing": vars(model.preprocessing),
        }
        engine.place(model.module)
        self._modules = list(model.module.modules())
        self._columns = None if columns is None else torch.from_numpy(columns).to(engine.device)
        self._before = state_hash(model.module)

    def __call__(self, batch: Batch, needs: Needs) -> Signal:
        """batch: already on the student's device; its teacher inputs are brought into this teacher's precision and layout."""
        assert batch.teacher is not None, "the batch was built without teacher inputs"
        start = time.perf_counter()
        if any(module.training for module in self._modules):
            self.model.module.eval()
        inputs = self._own(batch)
        with torch.no_grad(), self.engine.autocast(), Capture(self.model.module, needs.features) as capture:
            logits = self.model(inputs)
            features = dict(capture.features)
        if self._columns is not None:
            logits = logits.index_select(-1, self._columns)
        self.meter.add(time.perf_counter() - start, self.engine.device)
        return Signal(logits, features)

    def ahead(self, coming: Coming, asked: Asking) -> Coming:
        return coming

    def in_data_order(self, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """``(N, C)`` raw outputs of the model in the class order of the data."""
        return logits if self._columns is None else logits[:, self._columns.cpu().numpy()]

    @contextmanager
    def placed(self, engine: Engine) -> Iterator[None]:
        """The model in another precision or layout for a while, e.g. to be evaluated."""
        engine.place(self.model.module)
        try:
            yield
        finally:
            self.engine.place(self.model.module)

    def check_untouched(self) -> None:
        """A teacher whose weights or buffers changed while it taught makes every figure of the run worthless."""
        if state_hash(self.model.module) != self._before:
            raise LimbeckError(
                f"The teacher {self.model.spec.get('model')} changed while it was only to be looked at: one of its buffers or weights is modified "
                "by its forward pass in eval mode. Its outputs depend on what it saw before, so it cannot teach reproducibly."
            )

    def _own(self, batch: Batch) -> dict[str, Tensor]:
        # Always a copy: a model may write into its input (a normalisation in place), and the student reads the same tensors.
        return {name: self.engine.copied(value) for name, value in (batch.teacher or {}).items()}
