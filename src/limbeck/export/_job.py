"""What every exporter is given: the student's forward pass as one module, examples to trace, and the facts that travel in the file."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning  # type: ignore[attr-defined, unused-ignore]

from limbeck.errors import Stopped
from limbeck.types import ImagePreprocessing, Inputs, Preprocessing, TextPreprocessing

if TYPE_CHECKING:
    from limbeck.models import Model

__all__ = ["Axes", "ExportFailed", "Job", "Positional", "brief", "case", "frozen_copy", "prepare", "quiet"]

Axes = Mapping[int, str]
"""The dynamic axes of one input: ``{0: "batch"}``, for text also ``{1: "length"}``."""

TRACE_BATCH = 2
PAD_ROWS = 16
TOKENIZER_LIMIT = 64 << 20


class ExportFailed(Stopped):
    """The exporters could not write the student at all. Exit code 3."""


class Positional(nn.Module):
    """The student as files want it: tensors in by position, ``(B, C)`` float32 logits out.

    Images and float arrays: one prepared tensor. Text: the tokenizer's inputs in the order of ``names``.
    """

    def __init__(self, model: Model, names: tuple[str, ...]) -> None:
        super().__init__()
        self.student = model.module
        self._model = model
        self._names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._model(dict(zip(self._names, inputs, strict=True))).float()


@dataclass(frozen=True)
class Job:
    """One student to be written.

    module: the frozen copy, in eval mode, float32 on the CPU. example: what is traced, one tensor for each of ``names``. axes: the dynamic
    axes of each input. cases: inputs that the parity check uses, at batch sizes (and lengths) that were not traced. single: one sample as a
    server would send it. metadata: strings that travel in the file.
    """

    module: Positional
    names: tuple[str, ...]
    example: tuple[Tensor, ...]
    axes: tuple[Axes, ...]
    cases: tuple[tuple[Tensor, ...], ...]
    single: tuple[Tensor, ...]
    metadata: Mapping[str, str]
    warned: list[str] = field(default_factory=list)

    @property
    def weight_bytes(self) -> int:
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        return sum(t.numel() * t.element_size() for t in tensors)


def prepare(model: Model, inputs: Inputs, *, classes: tuple[str, ...], task: str) -> Job:
    """Everything that the exporters share; ``model`` is only looked at.

    inputs: prepared samples on the CPU, at least one; few are repeated, so that several batch sizes can be tried.
    """
    preprocessing = model.preprocessing
    text = isinstance(preprocessing, TextPreprocessing)
    names = tuple(n for n in preprocessing.inputs if n in inputs) if isinstance(preprocessing, TextPreprocessing) else tuple(inputs)
    rows = {name: _enough_rows(_plain(inputs[name])) for name in names}
    frozen = copy.copy(model)
    frozen.module = frozen_copy(model.module)
    module = Positional(frozen, names)
    module.eval()
    axes: tuple[Axes, ...] = tuple({0: "batch", 1: "length"} if text else {0: "batch"} for _ in names)
    if isinstance(preprocessing, TextPreprocessing):
        example, cases, single = _text_cases(rows, preprocessing)
    else:
        example = case(rows, slice(0, TRACE_BATCH))
        cases = tuple(case(rows, part) for part in (slice(0, 1), slice(1, 2), slice(0, 3), slice(0, None)))
        single = cases[0]
    facts = _metadata(preprocessing, example, names, axes, classes=classes, task=task)
    return Job(module, names, example, axes, cases, single, facts)


def case(rows: Inputs, part: slice) -> tuple[Tensor, ...]:
    """Rows ``part`` of every input, each as memory of its own."""
    return tuple(value[part].clone() for value in rows.values())


def _plain(value: Tensor) -> Tensor:
    value = value.detach().to("cpu")
    return (value.float() if value.is_floating_point() else value).contiguous()


def _enough_rows(value: Tensor) -> Tensor:
    if len(value) == 0:
        raise ValueError("an export needs at least one prepared sample to be checked against")
    return value if len(value) >= 4 else value[torch.arange(PAD_ROWS) % len(value)]


def _text_cases(
    rows: Inputs, preprocessing: TextPreprocessing
) -> tuple[tuple[Tensor, ...], tuple[tuple[Tensor, ...], ...], tuple[Tensor, ...]]:
    """The traced example, and cases at other batch sizes and at shorter and longer sequences, padded and not."""
    width = next(iter(rows.values())).shape[1]
    longest = max(preprocessing.max_length, width)
    shorter, longer = max(2, width // 2), min(width + 5, longest)
    tried = {shorter, width, longer}
    # Not 2: a traced length that equals the traced batch size would let an exporter take the one for the other.
    free = [n for n in (width - 1, width - 2, width + 1, *range(3, longest)) if 3 <= n <= longest and n not in tried]
    traced = free[0] if free else width

    def at(length: int, part: slice) -> tuple[Tensor, ...]:
        return case({name: _cut(name, value[part], length, preprocessing) for name, value in rows.items()}, slice(0, None))

    def alone(row: int) -> tuple[Tensor, ...]:
        mask = rows.get("attention_mask")
        right_padded = mask is not None and bool(mask[row, 0])
        length = max(2, int(mask[row].sum())) if mask is not None and right_padded else width
        return at(length, slice(row, row + 1))

    cases = (alone(0), alone(1), at(width, slice(0, 1)), at(shorter, slice(0, 3)), at(longer, slice(1, 4)), at(width, slice(0, None)))
    return at(traced, slice(0, TRACE_BATCH)), cases, cases[0]


def _cut(name: str, value: Tensor, length: int, preprocessing: TextPreprocessing) -> Tensor:
    """Cut or pad ``(B, T)`` to ``(B, length)``."""
    if length <= value.shape[1]:
        return value[:, :length]
    filler = preprocessing.pad_token_id if name == "input_ids" else 0
    return nn.functional.pad(value, (0, length - value.shape[1]), value=filler)


def frozen_copy(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy in eval mode on the CPU, floating-point tensors in ``dtype``, channels-first; ``module`` is not touched.

    Tensors are copied one by one and shared ones stay shared, so that a student on a device is not held there twice.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        plain = [v for v in vars(part).values() if isinstance(v, Tensor)]
        for tensor in itertools.chain(part._parameters.values(), part._buffers.values(), plain):
            if tensor is None or id(tensor) in memo:
                continue
            value = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
            memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as error:
        raise ExportFailed(
            f"The student cannot be copied for export: {brief(error)} Its modules may hold tensors, numbers and other modules, "
            "but no locks, open files or generators."
        ) from error
    twin.eval()  # its result is not used: a user's own train() may give none
    return twin


def _metadata(
    preprocessing: Preprocessing,
    example: tuple[Tensor, ...],
    names: tuple[str, ...],
    axes: tuple[Axes, ...],
    *,
    classes: tuple[str, ...],
    task: str,
) -> dict[str, str]:
    """What a person with only the file needs: values are JSON, except ``limbeck`` and ``task``."""
    from limbeck import __version__

    if isinstance(preprocessing, ImagePreprocessing):  # the file has one size, also where the student took the data's own
        preprocessing = replace(preprocessing, height=int(example[0].shape[2]), width=int(example[0].shape[3]))
    described = {f.name: getattr(preprocessing, f.name) for f in fields(preprocessing)}
    facts: dict[str, str] = {}
    if isinstance(preprocessing, TextPreprocessing):
        folder = Path(str(described.pop("tokenizer")))  # a path on this machine says nothing on another one
        tokenizer = _tokenizer_json(folder, preprocessing.max_length)
        if tokenizer is not None:
            facts["tokenizer"] = tokenizer
    inputs = [
        {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": [axis.get(i, n) for i, n in enumerate(value.shape)]}
        for name, value, axis in zip(names, example, axes, strict=True)
    ]
    facts |= {
        "limbeck": __version__,
        "task": task,
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "preprocessing": json.dumps(described, ensure_ascii=False),
        "inputs": json.dumps(inputs),
        "outputs": json.dumps([{"name": "logits", "dtype": "float32", "shape": ["batch", len(classes)]}]),
    }
    return dict(sorted(facts.items()))


def _tokenizer_json(folder: Path, max_length: int) -> str | None:
    """The tokenizer itself, with the cut that the student was trained with and without padding: text in, inputs out."""
    path = folder / "tokenizer.json"
    if not path.is_file() or path.stat().st_size > TOKENIZER_LIMIT:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    direction = (content.get("truncation") or {}).get("direction", "Right")
    content["padding"] = None
    content["truncation"] = {"direction": direction, "max_length": max_length, "strategy": "LongestFirst", "stride": 0}
    return json.dumps(content, ensure_ascii=False)


@contextlib.contextmanager
def quiet(job: Job | None = None) -> Iterator[None]:
    """Keep the exporters' warnings, logs and prints from the user; what a tracer warned of is kept in ``job.warned``."""
    before = logging.root.manager.disable
    sink = io.StringIO()
    # The tracer's failures print the whole graph from C++, whatever `verbose` says.
    native_log = (
        patch.object(torch._C, "_jit_onnx_log", lambda *graph: None) if hasattr(torch._C, "_jit_onnx_log") else contextlib.nullcontext()
    )
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), native_log:
        warnings.simplefilter("always")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
            if job is not None:
                job.warned[:] = [brief(w.message) for w in caught if issubclass(w.category, TracerWarning)]


def brief(error: BaseException | Warning | str, limit: int = 400) -> str:
    """The first lines of the deepest stated cause, without terminal colours, ended by a full stop."""
    while isinstance(error, BaseException) and error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
    text = " ".join(text.split())
    text = text if len(text) <= limit else text[:limit].rstrip() + " ..."
    return text if text.endswith((".", "!", "?", "...")) else text + "."
