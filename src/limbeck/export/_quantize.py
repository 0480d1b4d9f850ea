"""A float32 ONNX file in fewer bits, as small as its accuracy allows: which nodes stay in float is found by trying.

``quantize`` begins with everything quantised. Where that costs more accuracy than is allowed, the nodes that cost most alone are left in float,
in doubling numbers, until it fits. What does not fit, or saves no byte, is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.errors import Stopped
from limbeck.export._job import brief, quiet
from limbeck.export._methods import Feeds, Method, method_for, prepared

__all__ = ["SCHEMES", "Asked", "Quantised", "Refused", "quantize"]

SCHEMES = ("int8", "int8-static", "int8-dynamic", "fp16")
"""``int8`` chooses between static and dynamic by the operators of the graph."""

Floats = npt.NDArray[np.float64]
Asked = Callable[[Path], Floats]
"""A file -> its logits ``(N, C)`` on the samples that decide."""


class Refused(Stopped):
    """A file in fewer bits that would lose too much accuracy, or save nothing. Exit code 3."""


@dataclass(frozen=True)
class Quantised:
    """What came out, and how.

    method: ``static``, ``dynamic`` or ``fp16``; why: a sentence. candidates: how many nodes could be changed; left: the names of those that were not.
    tries: ``left`` (how many), ``accuracy`` (0 to 1), ``drop`` (points, 100 times the difference of two accuracies) and ``bytes`` of every try, or
    ``error``.
    agreement: the share of deciding samples with the float32 file's answer; max_abs_diff: of any logit to the float32 file's.
    """

    method: str
    why: str
    candidates: int
    left: tuple[str, ...]
    tries: tuple[dict[str, Any], ...]
    agreement: float
    max_abs_diff: float
    drop: float


def quantize(
    path: Path,
    out: Path,
    scheme: str,
    *,
    calibration: Sequence[Feeds],
    asked: Asked,
    labels: npt.NDArray[Any],
    max_drop: float,
    work: Path,
    split: str = "validation",
    progress: Callable[[str], None] = lambda text: None,
) -> Quantised:
    """Write ``path`` in fewer bits as ``out``, its metadata kept.

    path: a float32 ONNX file, whole (no weights beside it), with the output ``logits``. scheme: one of :data:`SCHEMES`. calibration: batches of
    training samples, at least one. asked, labels: the samples that decide, ``labels`` ``(N,)``. max_drop: in points. work: an empty folder that is
    used up. split: what the deciding samples are called in messages.

    Raises: Refused, and ``out`` is not there, where no try is within ``max_drop`` or smaller than ``path``, or nothing can be quantised.
    """
    exact = asked(path)
    right = _right(exact, labels)
    with quiet():
        try:
            prepared(path, work / "prepared.onnx")
            method, why = method_for(scheme, work / "prepared.onnx", calibration, work)
        except Exception as error:  # ONNX Runtime's tools fail in many ways on graphs that they do not know
            raise Refused(f"{scheme}: ONNX Runtime's tools cannot read the graph: {brief(error)}") from error
    if not method.candidates:
        kinds = ", ".join(sorted(_kinds(path)))
        raise Refused(f"{scheme}: the student has nothing that {_called(method)} changes; its operators are {kinds}.")
    tries: list[dict[str, Any]] = []
    failure = saved_nothing = ""
    for left in _choices(method, progress):
        progress(f"{scheme}: {len(method.candidates) - len(left)} of {len(method.candidates)} nodes")
        candidate = work / "try.onnx"
        try:
            with quiet():
                method.write(left, candidate)
                _keep_metadata(path, candidate)
                answers = asked(candidate)
        except Exception as error:
            failure = brief(error)
            tries.append({"left": len(left), "accuracy": None, "drop": None, "bytes": None, "error": failure})
            continue
        broken = bool((np.isnan(answers) & ~np.isnan(exact)).any())
        drop = 100.0 * (right - _right(answers, labels)) / len(labels)
        size = candidate.stat().st_size
        tries.append({"left": len(left), "accuracy": _right(answers, labels) / len(labels), "drop": drop, "bytes": size})
        if size >= path.stat().st_size:
            saved_nothing = f"the file would have {size:,} bytes, and the float32 file has {path.stat().st_size:,}"
            break  # with more nodes in float it would be larger still
        if drop <= max_drop + 1e-9 and not broken:
            shutil.move(candidate, out)
            agreement, largest = float((answers.argmax(-1) == exact.argmax(-1)).mean()), _largest_difference(exact, answers)
            return Quantised(method.name, why, len(method.candidates), tuple(sorted(left)), tuple(tries), agreement, largest, drop)
    if all(t["drop"] is None for t in tries):
        raise Refused(f"{scheme}: ONNX Runtime cannot write or run it: {failure}")
    if saved_nothing and len(tries) == 1:
        raise Refused(f"{scheme}: nothing is saved: {saved_nothing}. The student is too small for it.")
    more = f" With {tries[-1]['left']} of {len(method.candidates)} left nothing would be saved." if saved_nothing else ""
    seen = ", ".join(f"{t['drop']:.2f} points with {t['left']}" for t in tries if t["drop"] is not None)
    raise Refused(
        f"{scheme}: no file was kept: the accuracy would fall by more than {max_drop:g} points. Seen on {split}: {seen} of "
        f"{len(method.candidates)} nodes left in float.{more} A larger --max-drop allows more."
    )


def _choices(method: Method, progress: Callable[[str], None]) -> Iterable[frozenset[str]]:
    """What to leave in float, in turn: what cannot be changed, then 1, 2, 4 ... more, the most costly ones first; never all."""
    yield method.unfit
    progress(f"looking for the nodes of {len(method.candidates)} that cost most")
    with quiet():
        ranked = [name for name in method.ranked() if name not in method.unfit]
    count = 1
    while count < len(ranked):
        yield method.unfit | frozenset(ranked[:count])
        if count < len(ranked) - 1 < 2 * count:
            yield method.unfit | frozenset(ranked[:-1])
        count *= 2


def _called(method: Method) -> str:
    return {"static": "static quantisation", "dynamic": "dynamic quantisation", "fp16": "half precision"}[method.name]


def _kinds(path: Path) -> set[str]:
    import onnx

    return {node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node}


def _keep_metadata(source: Path, target: Path) -> None:
    """Task, classes, preprocessing and tokenizer travel on; what the tools wrote about themselves does not."""
    import onnx

    facts = {p.key: p.value for p in onnx.load(str(source), load_external_data=False).metadata_props}
    model = onnx.load(str(target))
    del model.metadata_props[:], model.graph.value_info[:]
    onnx.helper.set_model_props(model, facts)
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    onnx.save(model, str(target))
    onnx.checker.check_model(str(target))


def _right(answers: Floats, labels: npt.NDArray[Any]) -> int:
    """How many samples are answered correctly; one without a single number is not."""
    return int(((answers.argmax(-1) == labels) & ~np.isnan(answers).any(-1)).sum())


def _largest_difference(a: Floats, b: Floats) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.where(a == b, 0.0, np.abs(a - b)).max(initial=0.0))
