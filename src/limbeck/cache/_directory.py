"""Which directory holds the answers that a run wants: by what the teacher is, how it sees the data, and what is stored."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck._recipe_paths import home_path
from limbeck.cache._manifest import (
    MANIFEST,
    CacheDamaged,
    Column,
    Manifest,
    differing,
    key_of,
    locked,
    read_manifest,
    write_manifest,
)
from limbeck.errors import Problem, UsageError

__all__ = ["Place", "create", "default_root", "directories", "nearest_other", "recall", "refuse_orphans"]


def default_root() -> Path:
    """Where caches are kept when no path is named: ``$LIMBECK_CACHE``, or ``limbeck/teachers`` in the user's cache folder."""
    named = os.environ.get("LIMBECK_CACHE")
    if named:
        return home_path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "limbeck" / "teachers"


@dataclass(frozen=True)
class Place:
    """What a directory is for, but the teacher itself. views: augmentation, or ``test`` for a split that is only evaluated."""

    views: dict[str, Any]
    stored: dict[str, Any]

    def identity(self, teacher: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
        return {"teacher": dict(teacher), "preprocessing": dict(preprocessing), "views": self.views, "stored": self.stored}

    def fits(self, manifest: Manifest) -> bool:
        return bool(manifest.identity["views"] == self.views and manifest.identity["stored"] == self.stored)


def directories(root: Path) -> Iterator[tuple[Path, Manifest | UsageError]]:
    """Every cache directory under ``root``, or ``root`` itself where it is one; the error where it is damaged, or of another format."""
    if (root / MANIFEST).exists():
        folders = [root]
    else:
        folders = sorted(p.parent for p in root.glob(f"*/{MANIFEST}")) if root.is_dir() else []
    for folder in folders:
        try:
            yield folder, read_manifest(folder)
        except UsageError as unread:
            yield folder, unread


def recall(root: Path, place: Place, sources: Mapping[str, Any]) -> tuple[Path, Manifest] | None:
    """The directory that was filled by a teacher made from the same sources, so that the teacher need not be loaded to be known."""
    for folder, manifest in directories(root):
        if isinstance(manifest, Manifest) and place.fits(manifest) and manifest.about.get("sources") == sources:
            return folder, manifest
    return None


def nearest_other(root: Path, identity: Mapping[str, Any], model: str) -> tuple[Path, list[str]] | None:
    """Of the directories for the same weights, or a teacher of the same name, the one that differs least, and in what: why it is of no use."""
    best: tuple[Path, list[str]] | None = None
    for folder, manifest in directories(root):
        if not isinstance(manifest, Manifest) or manifest.identity["views"].get("purpose") != identity["views"].get("purpose"):
            continue
        if manifest.about["model"] != model and manifest.identity["teacher"]["weights_sha256"] != identity["teacher"]["weights_sha256"]:
            continue
        lines = differing(manifest.identity, identity)
        if lines and (best is None or len(lines) < len(best[1])):
            best = folder, lines
    return best


def refuse_orphans(folder: Path) -> None:
    """Raises: CacheDamaged where there are parts and no manifest."""
    if not (folder / MANIFEST).exists() and any(folder.glob("*.arrow")):
        raise CacheDamaged(folder / MANIFEST, "is missing, and there are parts beside where it was.")


def create(
    root: Path, identity: dict[str, Any], made: dict[str, Any], about: dict[str, Any], columns: tuple[Column, ...]
) -> tuple[Path, Manifest]:
    """The directory of an identity, made where there is none; how it was begun to be filled is adopted.

    Raises: CacheDamaged; UsageError where ``root`` cannot be written.
    """
    folder = root / key_of(identity)
    refuse_orphans(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(Problem("teacher_cache.path", f"{root} cannot be written: {e.strerror}.", "Name a folder that can.")) from e
    with locked(folder / ".lock"):
        if not (folder / MANIFEST).exists():
            refuse_orphans(folder)
            write_manifest(folder, Manifest(identity, made, about, columns))
        manifest = read_manifest(folder)
        if manifest.about.get("sources") is None and about.get("sources") is not None:
            # it was filled by a teacher that had just been trained, or was an object; from now on it is known by its files, and so by the names
            # that these give to its classes: who is recognised by them is told the rest of what stands beside them
            manifest = replace(manifest, about=about)
            write_manifest(folder, manifest)
    if manifest.columns != columns:
        there, here = (", ".join(f"{c.name} {c.dtype}{list(c.shape)}" for c in cs) for cs in (manifest.columns, columns))
        raise UsageError(Problem("teacher_cache", f"{folder} holds {there}, and the teacher gives {here}.", "Name another path."))
    return folder, manifest
