"""One teacher pass over what is missing, by any number of processes, with the same bytes for any number of them.

What is missing of a view, in id order, is cut into parts and the parts into blocks, once: the first process writes this down as a plan, and
every other one, now or after a kill, follows it. A block is what the teacher sees at once, so no answer depends on who asked.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from limbeck.cache._manifest import COPY, MANIFEST, Manifest, locked, read_manifest, write_manifest
from limbeck.cache._store import Reader, row_bytes, write_part
from limbeck.data import rows_of
from limbeck.run import is_left_over, write_atomic

__all__ = ["Ask", "Request", "fill", "missing", "read_plan", "tidy"]

Keys = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]

Ask = Callable[[list[Int64], int], Iterable[Mapping[str, npt.NDArray[Any]]]]
"""``(blocks, view) -> columns of each block``: the teacher's answers, encoded; a block is an array of indices into the split."""

_PART_BLOCKS = 16  # few enough to lose little at a kill and to share among processes
_PART_BYTES = 64 << 20
_MOST_PARTS = 256  # of one view: a longer pass has longer parts
_POLL = 0.05


@dataclass(frozen=True)
class Request:
    """Rows that are wanted under one view. keys: ``(N, 2)``, in the split's order. lengths: in tokens, or None. rows: ``(N,)``, where they stand in
    the split; None: they are all of it."""

    view: int
    keys: Keys
    lengths: npt.NDArray[Any] | None = None
    rows: Int64 | None = None

    def of(self, values: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
        """What belongs to each key, of values for the whole split."""
        return values if values is None or self.rows is None else values[self.rows]

    def places(self, chosen: Int64) -> Int64:
        """Rows of the split, from indices of keys."""
        return chosen if self.rows is None else self.rows[chosen]


def missing(reader: Reader | None, request: Request) -> Int64:
    """Indices of the keys that the cache lacks, each key once, in key order."""
    order: Int64 = np.lexsort((request.keys[:, 1], request.keys[:, 0])).astype(np.int64)
    if not len(order):
        return order
    ordered = request.keys[order]
    # what the store cannot tell apart is one sample to it
    short = np.stack([ordered[:, 0], ordered[:, 1] >> np.uint64(56)], axis=1)
    first = np.concatenate([[True], (short[1:] != short[:-1]).any(axis=1)])
    order = order[first]
    return order if reader is None else order[~reader.has(request.keys[order], request.view)]


@dataclass(frozen=True)
class _Plan:
    """keys: ``(N, 2)`` in order, of one view; ``bounds`` of its parts."""

    name: str
    view: int
    keys: Keys
    rows_of_part: int

    @property
    def parts(self) -> list[tuple[str, int, int]]:
        """A part is named by the rows in it, so that one that was lost is written again under the name that it had."""
        bounds = [(b, min(b + self.rows_of_part, len(self.keys))) for b in range(0, len(self.keys), self.rows_of_part)]
        return [(f"v{self.view:05d}-{_name(self.view, self.keys[a:b], self.rows_of_part)}.arrow", a, b) for a, b in bounds]


def fill(
    folder: Path,
    requests: list[Request],
    ask: Ask,
    *,
    tick: Callable[[int], None] = lambda rows: None,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Ask for every row of ``requests`` that ``folder`` lacks and commit it, part by part; returns when all of them are there.

    The folder has a manifest, which says how (block, threads). tick: called with the rows of each block; between: before each part, may raise
    to leave.
    """
    manifest = read_manifest(folder)
    with _threads(int(manifest.made["threads"])):
        for request in requests:
            for plan, rows in _plans(folder, request):
                _follow(folder, plan, rows, request, ask, int(manifest.made["block"]), tick, between)
    tidy(folder)


def _plans(folder: Path, request: Request) -> Iterator[tuple[_Plan, Int64]]:
    """Plans that others began and this process can follow, and the split's rows of their keys; where there are none, one for what is missing;
    until nothing is.

    A plan that is given back here is followed to its end, where its file goes, before the next one is looked for.
    """
    made: list[str] = []
    while True:
        with locked(folder / ".lock"):  # no part is committed, and no plan made, between looking and planning
            found = [p for p in map(read_plan, sorted(folder.glob("plan-*"))) if p is not None and p.view == request.view]
            plans = [(plan, rows) for plan, rows in ((p, rows_of(p.keys, request.keys)) for p in found) if (rows >= 0).all()]
            if not plans:
                manifest = read_manifest(folder)
                rows = missing(Reader(folder, manifest), request)
                if not len(rows):
                    return
                plan = _make_plan(request.view, request.keys[rows], manifest)
                made.append(plan.name)
                if made.count(plan.name) > 3:  # a repair meanwhile may take parts out, but not again and again
                    raise RuntimeError(f"{len(rows)} rows of {folder} are not found after they were written")
                write_atomic(folder / f"plan-{plan.name}", save({"keys": plan.keys}, {"plan": f"{plan.view},{plan.rows_of_part}"}))
                plans = [(plan, rows)]
        yield from plans


def _make_plan(view: int, keys: Keys, manifest: Manifest) -> _Plan:
    block = int(manifest.made["block"])
    blocks = max(_PART_BLOCKS, -(-len(keys) // (block * _MOST_PARTS)))
    blocks = max(1, min(blocks, _PART_BYTES // max(1, block * row_bytes(manifest.columns)))) if blocks == _PART_BLOCKS else blocks
    return _Plan(_name(view, keys, block * blocks), view, keys, block * blocks)


def _name(view: int, keys: Keys, rows_of_part: int) -> str:
    digest = xxhash.xxh3_64(np.ascontiguousarray(keys).tobytes())
    digest.update(f"{view},{rows_of_part}".encode())
    return digest.hexdigest()


def read_plan(path: Path) -> _Plan | None:
    """None where it is gone meanwhile, which says that it was fulfilled, or not what was written: then it is nobody's plan."""
    try:
        with safe_open(path, framework="np") as f:
            view, rows_of_part = (int(n) for n in f.metadata()["plan"].split(","))
            keys = f.get_tensor("keys")
        name = _name(view, keys, rows_of_part)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, FileNotFoundError):
        return None
    return _Plan(name, view, keys, rows_of_part) if path.name == f"plan-{name}" else None


def _follow(
    folder: Path, plan: _Plan, rows: Int64, request: Request, ask: Ask, block: int, tick: Callable[[int], None], between: Callable[[], None]
) -> None:
    locks = folder / ".locks"

    def write(name: str, start: int, stop: int) -> None:
        if any(p.name == name for p in read_manifest(folder).parts):
            return
        values = _answers(rows[start:stop], request, ask, block, tick)
        manifest = read_manifest(folder)
        entry = write_part(folder, name, plan.view, plan.keys[start:stop], values, manifest.columns)
        with locked(folder / ".lock"):
            write_manifest(folder, read_manifest(folder).with_part(entry))

    left = plan.parts
    while left:
        others = []
        for part in left:
            between()
            with locked(locks / part[0], wait=False) as mine:
                if mine:
                    write(*part)
                else:
                    others.append(part)
        if len(others) == len(left):
            time.sleep(_POLL)
        left = others
    with locked(folder / ".lock"):
        (folder / f"plan-{plan.name}").unlink(missing_ok=True)
        for name, _, _ in plan.parts:
            (locks / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: others are at work
            locks.rmdir()


def tidy(folder: Path) -> None:
    """Put away what processes that were killed left behind, so that a finished directory is the same whoever wrote it. What others are at work on
    stays. Where there is nothing to put away, nothing is written: the folder may be one that this process can only read."""
    if not _untidy(folder):
        return
    with locked(folder / ".lock"):  # under which all of these are written
        for path in _temporary(folder):
            path.unlink(missing_ok=True)
        if not (folder / MANIFEST).exists():
            return
        manifest = read_manifest(folder)
        if not _copied(folder):
            write_manifest(folder, manifest)
        there = {part.name for part in manifest.parts}
        for path in folder.glob("plan-*"):
            plan = read_plan(path)
            if plan is not None and there.issuperset(name for name, _, _ in plan.parts):
                path.unlink(missing_ok=True)  # who still follows it finds its parts written
        if any(folder.glob("plan-*")):
            return
        shutil.rmtree(folder / ".locks", ignore_errors=True)
        for path in folder.glob(".v*.arrow.tmp"):
            path.unlink(missing_ok=True)


def _untidy(folder: Path) -> bool:
    left = [*_temporary(folder), *folder.glob("plan-*"), *folder.glob(".locks"), *folder.glob(".v*.arrow.tmp")]
    return bool(left) or ((folder / MANIFEST).exists() and not _copied(folder))


def _temporary(folder: Path) -> list[Path]:
    return [p for name in (".manifest*", ".plan-*", ".figures*") for p in folder.glob(name) if is_left_over(p)]


def _copied(folder: Path) -> bool:
    copy = folder / COPY
    return copy.exists() and copy.read_bytes() == (folder / MANIFEST).read_bytes()


def _answers(rows: Int64, request: Request, ask: Ask, block: int, tick: Callable[[int], None]) -> dict[str, npt.NDArray[Any]]:
    """The columns of one part in its rows' order. Texts are asked for in blocks of similar length, which pads little."""
    by = np.arange(len(rows)) if request.lengths is None else np.argsort(request.lengths[rows], kind="stable")
    found: dict[str, npt.NDArray[Any]] = {}
    chosen_of = [by[start : start + block] for start in range(0, len(rows), block)]
    for chosen, columns in zip(chosen_of, ask([request.places(rows[chosen]) for chosen in chosen_of], request.view), strict=True):
        for name, values in columns.items():
            if name not in found:
                found[name] = np.empty((len(rows), *values.shape[1:]), dtype=values.dtype)
            found[name][chosen] = values
        tick(len(chosen))
    return found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sums are split by threads, so the number of them is part of how an answer was made."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
