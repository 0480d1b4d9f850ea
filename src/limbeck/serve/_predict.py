"""``limbeck predict``: files, folders, tables and standard input through one exported student."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from limbeck.errors import Problem, UsageError, nearest
from limbeck.pixels import EXTENSIONS, MAX_BYTES
from limbeck.serve._model import Arrays, Refused, ServedModel, softmax

__all__ = ["answers"]

STDIN = "-"


@dataclass(frozen=True)
class _Sample:
    """One thing to answer. where: the file and, in a table, the row; what: a path, a text or a pair of texts, or an array."""

    where: dict[str, Any]
    what: Path | tuple[str, str | None] | np.ndarray[Any, Any]


def answers(model: ServedModel, inputs: Sequence[str], *, stdin: TextIO, batch_size: int = 32, top: int = 5) -> Iterator[dict[str, Any]]:
    """A mapping for every sample of ``inputs``, in their order.

    inputs: image files or folders for an image model; CSV files (columns ``text`` and, optionally, ``text_pair``) or text files (a text a line)
    for a text model; ``.npy`` files ``(N, ...)`` for one of float arrays; ``-``: standard input, a text (for images: a path) a line. top: how
    many classes are named with their probability (0: all).

    Each has ``input``, in a table ``row`` (from 1), ``label``, ``probability`` and ``probabilities``, or ``input`` and ``error``.

    Raises: UsageError, at the call and not while it goes, for inputs that are not there or not of the model's kind.
    """
    problems = [p for given in inputs for p in _problems(given, model)]
    if problems:
        raise UsageError(problems)
    return _answers(model, _samples(inputs, model, stdin), batch_size, top)


def _answers(model: ServedModel, samples: Iterable[_Sample], batch_size: int, top: int) -> Iterator[dict[str, Any]]:
    rows: list[tuple[_Sample, Arrays | str]] = []
    for sample in samples:
        try:
            rows.append((sample, _prepared(sample, model)))
        except Refused as error:
            rows.append((sample, str(error)))
        if len(rows) == batch_size:
            yield from _batch(model, rows, top)
            rows = []
    yield from _batch(model, rows, top)


def _batch(model: ServedModel, rows: list[tuple[_Sample, Arrays | str]], top: int) -> Iterator[dict[str, Any]]:
    good = [arrays for _, arrays in rows if not isinstance(arrays, str)]
    found: list[Any] = []
    if good:
        if model.kind == "text" and not model.pads:  # without a mask padding would change the answer
            found = [softmax(model.run(arrays))[0] for arrays in good]
        else:
            found = list(softmax(model.run(model.stack(good))))
    each = iter(found)
    for sample, arrays in rows:
        if isinstance(arrays, str):
            yield {**sample.where, "error": arrays}
            continue
        p = next(each)
        order = sorted(range(len(p)), key=lambda i: -p[i])[: top or None]
        named = {model.classes[i]: float(p[i]) for i in order}
        yield {**sample.where, "label": model.classes[order[0]], "probability": float(p[order[0]]), "probabilities": named}


def _prepared(sample: _Sample, model: ServedModel) -> Arrays:
    what = sample.what
    if isinstance(what, tuple):
        return model.from_text(*what)
    if isinstance(what, Path):
        try:
            if what.stat().st_size > MAX_BYTES:
                raise Refused(f"the file has more than {MAX_BYTES:,} bytes")
            return model.from_image(what.read_bytes())
        except OSError as error:
            raise Refused(f"the file cannot be read: {error.strerror}") from None
    port = model.inputs[0]
    if what.shape != port.shape[1:]:
        raise Refused(f"the array has the shape {what.shape}, and the model takes {port.shape[1:]}")
    return {port.name: what[None].astype(np.float32)}


def _problems(given: str, model: ServedModel) -> list[Problem]:
    if given == STDIN:
        return [Problem(given, "float arrays come in .npy files, not on standard input.")] if model.kind == "tensor" else []
    path = Path(given)
    if not os.path.exists(path):
        beside = [p.name for p in path.parent.iterdir()][:2000] if os.path.isdir(path.parent) else []
        hint = nearest(path.name, beside) or (
            "A text goes to standard input: echo ... | limbeck predict RUN -" if model.kind == "text" else ""
        )
        return [Problem(given, "no such file or folder.", hint)]
    suffix = path.suffix.lower()
    if model.kind == "image":
        if os.path.isdir(path) and not _images(path):
            return [Problem(given, "the folder has no image file in it.")]
        return []
    if os.path.isdir(path):
        return [Problem(given, "is a folder; name its files.")]
    if model.kind == "tensor":
        return [] if suffix == ".npy" else [Problem(given, "the model takes float arrays: an .npy file (N, ...).")]
    if suffix in EXTENSIONS:
        return [Problem(given, "is an image, and the model takes texts.")]
    if suffix == ".csv":
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
            names = next(csv.reader(f), [])
        if "text" not in names:
            return [Problem(given, f"has no column 'text'; it has {', '.join(names)[:200] or 'none'}.", nearest("text", names))]
    return []


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())


def _samples(inputs: Sequence[str], model: ServedModel, stdin: TextIO) -> Iterator[_Sample]:
    for given in inputs:
        path = Path(given)
        if given == STDIN:
            for i, line in enumerate(stdin, 1):
                text = line.rstrip("\r\n")
                if model.kind != "image":
                    yield _Sample({"input": STDIN, "row": i}, (text, None))
                elif text:
                    yield _Sample({"input": text}, Path(text))
        elif model.kind == "image":
            for file in _images(path) if path.is_dir() else [path]:
                yield _Sample({"input": str(file)}, file)
        elif model.kind == "tensor":
            try:
                array = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise UsageError(Problem(given, f"is no .npy file that can be read: {error}")) from None
            for i, row in enumerate(np.atleast_1d(array), 1):
                yield _Sample({"input": given, "row": i}, row)
        else:
            yield from _texts(path, given)


def _texts(path: Path, given: str) -> Iterator[_Sample]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(Problem(given, f"is not UTF-8 text ({error.reason} at byte {error.start}).")) from None
    if path.suffix.lower() != ".csv":
        for i, line in enumerate(text.splitlines(), 1):
            yield _Sample({"input": given, "row": i}, (line, None))
        return
    for i, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 1):
        yield _Sample({"input": given, "row": i}, (row.get("text") or "", row.get("text_pair")))
