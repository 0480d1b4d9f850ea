"""Image folders: one folder a class under ``train/``, ``test/`` or ``val/``, and optional ``unlabelled/``."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from limbeck.data.decoded import Decoded
from limbeck.data.ids import bytes_id, from_digests
from limbeck.data.labels import Labels
from limbeck.data.sources import FileImages
from limbeck.data.splits import SKIPPED, Part, Role
from limbeck.errors import Problem, listed
from limbeck.pixels import EXTENSIONS, MAX_BYTES, Undecodable, inspect

__all__ = ["read_folder"]

_SPLITS: dict[str, Role] = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test",
    "val": "valid", "valid": "valid", "validation": "valid",
    "unlabelled": "unlabelled", "unlabeled": "unlabelled",
}  # fmt: skip


_NAMED = 1000  # bad files that one message names


@dataclass(frozen=True)
class _Entry:
    """What the index remembers of a file: its size and time, then its digest and how it decodes."""

    size: int
    mtime_ns: int
    digest: str
    height: int
    width: int
    channels: int


def read_folder(
    root: Path, role: Role | None, corrupt: Literal["fail", "skip"], notes: list[str], problems: list[Problem]
) -> tuple[dict[Role, Part], tuple[str, ...] | None]:
    """The splits of an image folder and its class names (sorted folder names of the training split).

    A folder without ``train/`` is one split of class folders. ``val/`` alone is the test split. ``role``: a further folder for that split.
    """
    if not os.path.isdir(root):
        problems.append(
            Problem(str(root), "there is no such folder." if not os.path.exists(root) else "it is a file; a folder is expected.")
        )
        return {}, None
    found: dict[Role, Path] = {}
    if role is None:
        for child in sorted(root.iterdir()):
            known = _SPLITS.get(child.name.lower())
            if known is not None and child.is_dir():
                if known in found:
                    problems.append(Problem(str(root), f"both {found[known].name}/ and {child.name}/ hold the {known} split."))
                found[known] = child
        if "train" not in found:
            if found:
                there = listed([p.name + "/" for p in found.values()])
                problems.append(Problem(str(root), f"there is no train/ folder; there are {there}."))
                return {}, None
            found = {"train": root}
        elif "valid" in found and "test" not in found:
            found["test"] = found.pop("valid")
    else:
        found = {role: root}
    # an empty class folder is a class that somebody forgot to fill
    classes = tuple(p.name for p in _folders(found["train"])) if "train" in found else None
    listing = {split: _listing(path, split == "unlabelled", corrupt, notes, problems) for split, path in found.items()}
    if problems:
        return {}, classes
    index = _index_path(root)
    names = [str((found[s] / n).relative_to(root).as_posix()) for s, files in listing.items() for n, _ in files]
    entries, bad = _inspect_all(root, names, index)
    if bad:
        shown = [f"{name} ({why})" for name, why in bad]
        if corrupt == "fail":
            problems += [Problem(str(root / name), f"cannot be read as an image: {why}.") for name, why in bad[:_NAMED]]
            shown_of = f"{len(bad):,} files cannot be read as images{f' ({_NAMED} are named)' if len(bad) > _NAMED else ''}."
            problems.append(Problem("data.corrupt", shown_of, "Repair or remove them, or leave them out with data.corrupt: skip."))
            return {}, classes
        notes.append(f"{len(bad):,} files that cannot be read as images were skipped (all in {SKIPPED}): {listed(shown, 20)}.")
    channels = max((e.channels for e in entries.values()), default=3)
    parts: dict[Role, Part] = {}
    for split, files in listing.items():
        prefix = found[split].relative_to(root).as_posix()
        kept = [(n if prefix == "." else f"{prefix}/{n}", c) for n, c in files]
        whys = dict(bad)
        skipped = tuple((str(root / n), whys[n]) for n, _ in kept if n in whys)
        kept = [(n, c) for n, c in kept if n in entries]
        part = _part(root, found[split], kept, entries, channels, index, split == "unlabelled")
        parts[split] = replace(part, skipped=skipped)
    return parts, classes


def _part(
    root: Path, folder: Path, files: list[tuple[str, str]], entries: dict[str, _Entry], channels: int, index: Path, unlabelled: bool
) -> Part:
    ids = from_digests(bytes.fromhex(entries[n].digest) for n, _ in files)
    labels = None
    if not unlabelled:
        values = np.empty(len(files), dtype=object)
        values[:] = [c for _, c in files]
        labels = Labels(str(folder), values)
    sizes = {(entries[n].height, entries[n].width) for n, _ in files}
    size = sizes.pop() if len(sizes) == 1 else None
    decoded = Decoded(_home(), folder, ids, size, channels) if size is not None else None
    source = FileImages(root, [n for n, _ in files], ids, channels, index, decoded)
    return Part(str(folder), source, ids, labels, size=size, channels=channels)


def _hidden(name: str) -> bool:
    return name.startswith((".", "__")) or name in ("Thumbs.db", "desktop.ini")


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not _hidden(p.name))


def _listing(
    path: Path, unlabelled: bool, corrupt: Literal["fail", "skip"], notes: list[str], problems: list[Problem]
) -> list[tuple[str, str]]:
    """``(name relative to path, class)`` of every image under ``path``."""
    files: list[tuple[str, str]] = []
    strange: list[str] = []
    tops = [path] if unlabelled else _folders(path)
    for top in tops:
        for folder, inner, names in os.walk(top):
            inner[:] = sorted(d for d in inner if not _hidden(d))
            for name in sorted(n for n in names if not _hidden(n)):
                relative = (Path(folder) / name).relative_to(path).as_posix()
                if Path(name).suffix.lower() in EXTENSIONS:
                    files.append((relative, top.name))
                else:
                    strange.append(relative)
    if not unlabelled:
        loose = [p.name for p in sorted(path.iterdir()) if p.is_file() and p.suffix.lower() in EXTENSIONS and not _hidden(p.name)]
        if not tops:
            hint = "The images lie in it directly." if loose else ""
            problems.append(Problem(str(path), "there are no class folders in it; one folder a class is expected.", hint))
            return []
        if loose:
            problems.append(Problem(str(path), f"{len(loose):,} images lie outside the class folders: {listed(loose, 5)}."))
        for top in tops:
            if not any(label == top.name for _, label in files):
                problems.append(Problem(str(top), "there is no image in this class folder.", "Add samples, or remove the folder."))
    if not files and unlabelled:
        problems.append(Problem(str(path), "there is no image in it."))
    if strange:
        if corrupt == "fail":
            message = f"{len(strange):,} files are no images, by their names: {listed(strange, 5)}."
            problems.append(Problem(str(path), message, "Remove them, or leave them out with data.corrupt: skip."))
        else:
            notes.append(f"{len(strange):,} files in {path} are no images, by their names, and were skipped: {listed(strange, 20)}.")
    return files


def _home() -> Path:
    home = os.environ.get("LIMBECK_HOME")
    return Path(home) if home else Path.home() / ".cache" / "limbeck"


def _index_path(root: Path) -> Path:
    return _home() / "index" / f"{xxhash.xxh3_128_hexdigest(str(root.resolve()).encode())}.json"


def _read_index(path: Path) -> dict[str, _Entry]:
    try:
        stored = json.loads(path.read_text("utf-8"))
        return {str(n): _Entry(int(e[0]), int(e[1]), str(e[2]), int(e[3]), int(e[4]), int(e[5])) for n, e in stored["files"].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return {}  # an index is a convenience: what cannot be read is made again


def _write_index(path: Path, root: Path, entries: dict[str, _Entry]) -> None:
    # a file that was written just now can change again within the clock's resolution, so it is looked at again next time
    settled = time.time_ns() - 2_000_000_000
    files = {n: [e.size, e.mtime_ns, e.digest, e.height, e.width, e.channels] for n, e in entries.items() if e.mtime_ns < settled}
    from limbeck.run import write_atomic

    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"root": str(root.resolve()), "files": files}))


def _inspect_all(root: Path, names: Sequence[str], index: Path) -> tuple[dict[str, _Entry], list[tuple[str, str]]]:
    """What every file is, by the index where size and time agree and by reading and decoding it once where not; and the bad ones."""
    known = _read_index(index)

    def look(name: str) -> _Entry | str:
        path = root / name
        try:
            status = path.stat()
            old = known.get(name)
            if old is not None and (old.size, old.mtime_ns) == (status.st_size, status.st_mtime_ns):
                return old
            if status.st_size > MAX_BYTES:
                return f"it has {status.st_size:,} bytes, and an image has at most {MAX_BYTES:,}"
            content = path.read_bytes()
            height, width, channels = inspect(content)
        except OSError as error:
            return error.strerror or str(error)
        except Undecodable as error:
            return str(error)
        return _Entry(status.st_size, status.st_mtime_ns, bytes_id(content).hex(), height, width, channels)

    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        results = list(pool.map(look, names))
    entries = {n: r for n, r in zip(names, results, strict=True) if isinstance(r, _Entry)}
    if any(known.get(n) != e for n, e in entries.items()):
        _write_index(index, root, {**known, **entries})
    return entries, [(n, r) for n, r in zip(names, results, strict=True) if isinstance(r, str)]
