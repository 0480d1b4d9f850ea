"""What a cache directory says about itself: whose answers it holds, how they are stored, and the checksums of every part."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.errors import Problem, UsageError
from limbeck.run import canonical, seal, unseal, write_atomic

__all__ = [
    "COPY",
    "FIGURES",
    "MANIFEST",
    "CacheDamaged",
    "Column",
    "Manifest",
    "PartEntry",
    "differing",
    "key_of",
    "locked",
    "read_figures",
    "read_manifest",
    "read_sealed",
    "seal",
    "write_manifest",
]

FORMAT = 1
MANIFEST = "manifest.json"
FIGURES = "figures.json"
COPY = "manifest.copy.json"
"""The same bytes again: a flipped bit in the manifest must not cost a whole pass of the teacher."""


class CacheDamaged(UsageError):
    """A file of a cache is not what was written."""

    def __init__(self, file: Path, what: str) -> None:
        folder = file.parent
        super().__init__(
            Problem("teacher_cache", f"{file} {what}", f"Nothing of it was used. Mend it: limbeck cache verify --repair {folder}")
        )


@dataclass(frozen=True)
class Column:
    """One thing that is stored of every row: ``dtype`` as NumPy names it, ``shape`` of one row."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PartEntry:
    """One Arrow file: rows of one view, in id order. ``first`` and ``last`` are the high words of its first and last id; ``checksums`` has 16
    hex digits (XXH3) for every ``tile`` bytes of the file; ``offsets`` says at which byte each column's values begin."""

    name: str
    view: int
    rows: int
    first: str
    last: str
    size: int
    tile: int
    checksums: str
    offsets: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """identity: teacher, preprocessing, views and what is stored, in full. made: precision, layout, rows of a block, threads of the teacher's
    pass, which every later writer adopts. about: the teacher's classes and where it came from."""

    identity: dict[str, Any]
    made: dict[str, Any]
    about: dict[str, Any]
    columns: tuple[Column, ...]
    parts: tuple[PartEntry, ...] = ()

    def with_part(self, part: PartEntry) -> Manifest:
        kept = [p for p in self.parts if p.name != part.name]
        return replace(self, parts=tuple(sorted([*kept, part], key=lambda p: p.name)))

    @property
    def rows(self) -> int:
        return sum(p.rows for p in self.parts)

    @property
    def size(self) -> int:
        return sum(p.size for p in self.parts)


def read_sealed(path: Path) -> Any:
    """The body of what :func:`limbeck.run.seal` wrote; every byte of the file counts.

    Raises: CacheDamaged.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CacheDamaged(path, "is missing.") from None
    try:
        return unseal(raw)
    except ValueError:
        raise CacheDamaged(path, "is damaged: it does not match its own hash.") from None


def read_figures(folder: Path) -> dict[str, Any]:
    """What was measured of the teacher of a directory. Raises: CacheDamaged, also where it is another directory's."""
    body = read_sealed(folder / FIGURES)
    if body.get("of") != folder.name:
        raise CacheDamaged(folder / FIGURES, "belongs to another directory.")
    return dict(body["figures"])


def key_of(identity: Mapping[str, Any]) -> str:
    """The name of the directory of an identity."""
    return hashlib.sha256(canonical(identity).encode()).hexdigest()[:24]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The manifest, then its copy; the caller holds the folder's lock."""
    text = seal({"format": FORMAT, **asdict(manifest)})
    write_atomic(folder / MANIFEST, text)
    write_atomic(folder / COPY, text)


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """Raises: CacheDamaged where the file is not what was written, or belongs to another directory; UsageError for another format."""
    body = read_sealed(folder / name)
    if body.get("format") != FORMAT:
        text = f"{folder / name} has format {body.get('format')}, and this version of Limbeck reads {FORMAT}."
        raise UsageError(
            Problem(
                "teacher_cache.path", text, "Update Limbeck (pip install -U limbeck), name another path, or remove it: limbeck cache rm."
            )
        )
    if key_of(body["identity"]) != folder.name:
        raise CacheDamaged(
            folder / name, "belongs to another directory: the identity in it is not the one that gave the directory its name."
        )
    columns = tuple(Column(c["name"], c["dtype"], tuple(c["shape"])) for c in body["columns"])
    return Manifest(body["identity"], body["made"], body["about"], columns, tuple(PartEntry(**p) for p in body["parts"]))


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """``preprocessing.mean: [0.1] -> [0.2]`` for every difference of two identities."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = [*a, *(k for k in b if k not in a)]
        return [line for k in keys for line in differing(a.get(k), b.get(k), f"{path}.{k}" if path else str(k))]
    return [] if a == b else [f"{path}: {_short(a)} there, {_short(b)} here"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and len(value) == 64:  # a hash
        return value[:12]
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock on ``file`` while the block runs; it is released when the process dies. Gives False where another holds it and ``wait`` is
    False. Raises: UsageError where the file system has no locks (ENOLCK, ENOTSUP, ENOSYS): two writers would undo one another's manifest."""
    descriptor = _opened(file)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        except OSError as e:
            text = f"{file.parent} is on a file system without locks ({e.strerror}), where two writers could disturb one another."
            hint = "Name a folder on another one ($LIMBECK_CACHE where no path is named), or mode: off."
            raise UsageError(Problem("teacher_cache.path", text, hint)) from e
        yield held
    finally:
        os.close(descriptor)


def _opened(file: Path) -> int:
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another process, which had no more use for the folder, removed it in between
            continue
