"""What is kept, whether it is whole, and how to be rid of it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from limbeck.cache._directory import directories
from limbeck.cache._fill import read_plan
from limbeck.cache._manifest import COPY, FIGURES, MANIFEST, CacheDamaged, Manifest, locked, read_figures, read_manifest, write_manifest
from limbeck.cache._store import Reader
from limbeck.errors import Problem, UsageError
from limbeck.run import write_atomic

__all__ = ["Verified", "listing", "remove", "verify"]

_OWN = {MANIFEST, COPY, FIGURES, ".lock", ".locks"}


def listing(root: Path) -> list[dict[str, Any]]:
    """One row a directory under ``root``: what it holds; ``damaged`` where its manifest cannot be read."""
    rows: list[dict[str, Any]] = []
    for folder, manifest in _all(root):
        if not isinstance(manifest, Manifest):
            rows.append({"name": folder.name, "folder": str(folder), "damaged": str(manifest)})
            continue
        views = {p.view for p in manifest.parts}
        kept = manifest.identity["stored"]
        rows.append(
            {
                "name": folder.name,
                "folder": str(folder),
                "teacher": manifest.about["model"],
                "for": manifest.identity["views"]["purpose"],
                "stores": [*(["logits"] if kept["logits"] else []), *kept["features"]],
                "codec": kept["codec"],
                "precision": manifest.made.get("precision"),
                "views": len(views),
                "rows": manifest.rows,
                "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
                "unfinished": len(list(folder.glob("plan-*"))),
            }
        )
    return rows


def _all(root: Path) -> list[tuple[Path, Manifest | UsageError]]:
    """As :func:`directories`, and those whose manifest is gone."""
    found: list[tuple[Path, Manifest | UsageError]] = list(directories(root))
    seen = {folder for folder, _ in found}
    for folder in [root, *sorted(p for p in root.iterdir() if p.is_dir())] if root.is_dir() else []:
        if folder not in seen and ((folder / COPY).exists() or any(folder.glob("v*-*.arrow"))):
            found.append((folder, CacheDamaged(folder / MANIFEST, "is missing.")))
    return found


@dataclass
class Verified:
    """What was found of one directory. problems: sentences that name the file; mended: what was done about them."""

    folder: Path
    rows: int = 0
    problems: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)


def verify(root: Path, *, repair: bool = False) -> list[Verified]:
    """Every byte of every file of every directory under ``root`` against its checksum, and no file too many.

    repair: what is damaged is taken out, so that its rows are asked for again; a manifest is restored from its copy. Raises: UsageError where there
    is no cache.
    """
    found = _all(root)
    if not found:
        raise UsageError(Problem("", f"there is no teacher cache in {root}."))
    return [_verify_one(folder, manifest, repair) for folder, manifest in found]


def _verify_one(folder: Path, manifest: Manifest | UsageError, repair: bool) -> Verified:
    result = Verified(folder)
    if isinstance(manifest, UsageError) and not isinstance(manifest, CacheDamaged):  # of another format: it may be whole
        result.problems.append(manifest.problems[0].message)
        return result
    if isinstance(manifest, CacheDamaged):
        result.problems.append(manifest.problems[0].message)
        manifest_ = _restored(folder, result, repair)
        if manifest_ is None:
            return result
        manifest = manifest_
    else:
        try:
            if read_manifest(folder, COPY) != manifest:
                result.problems.append(f"{folder / COPY} is not the copy of the manifest.")
        except UsageError as damaged:
            result.problems.append(damaged.problems[0].message)
        if repair and result.problems:
            with locked(folder / ".lock"):
                write_manifest(folder, read_manifest(folder))
            result.mended.append(f"{folder / COPY} was written again.")
    bad: list[str] = []
    for part in manifest.parts:
        one = Manifest(manifest.identity, manifest.made, manifest.about, manifest.columns, (part,))
        try:
            Reader(folder, one).check_all()
            _readable(folder / part.name)
            result.rows += part.rows
        except CacheDamaged as damaged:
            bad.append(part.name)
            result.problems.append(damaged.problems[0].message)
    if (folder / FIGURES).exists():
        try:
            read_figures(folder)
        except CacheDamaged as damaged:
            result.problems.append(damaged.problems[0].message)
            if repair:
                (folder / FIGURES).unlink()
                result.mended.append(f"{folder / FIGURES} was removed.")
    named = {p.name for p in manifest.parts}
    foreign = sorted(p for p in folder.iterdir() if p.name not in named and p.name not in _OWN and not _busy(folder, p))
    result.problems += [f"{p} is not in the manifest." for p in foreign]
    if repair and (bad or foreign):
        with locked(folder / ".lock"):
            now = read_manifest(folder)
            named = {p.name for p in now.parts}  # some may have been committed since
            foreign = [p for p in foreign if p.name not in named and not _busy(folder, p)]
            kept = tuple(p for p in now.parts if p.name not in bad)
            write_manifest(folder, Manifest(now.identity, now.made, now.about, now.columns, kept))
            for path in [*(folder / name for name in bad), *foreign]:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        result.mended += [f"{folder / name} was taken out; its rows are asked for again when they are wanted." for name in bad]
        result.mended += [f"{path} was removed." for path in foreign]
    return result


def _busy(folder: Path, path: Path) -> bool:
    """Whether somebody is writing this file now: a plan, a part that a plan names, or its temporary file."""
    if path.name.startswith("plan-"):
        return read_plan(path) is not None
    name = path.name.removeprefix(".").removesuffix(".tmp")
    plans = [read_plan(p) for p in folder.glob("plan-*")] if name.startswith("v") else []
    return any(name == part for plan in plans if plan is not None for part, _, _ in plan.parts)


def _readable(path: Path) -> None:
    try:
        with pa.OSFile(str(path), "rb") as file:
            pa.ipc.open_file(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise CacheDamaged(path, f"is no Arrow file: {error}.") from None


def _restored(folder: Path, result: Verified, repair: bool) -> Manifest | None:
    """The manifest from its copy; without one nothing in the folder can be believed."""
    try:
        copy = read_manifest(folder, COPY)
    except UsageError as damaged:
        result.problems.append(damaged.problems[0].message)
        if repair:
            shutil.rmtree(folder)
            result.mended.append(f"{folder} was removed: without a manifest nothing in it can be believed.")
        return None
    if repair:
        write_atomic(folder / MANIFEST, (folder / COPY).read_bytes())
        result.mended.append(f"{folder / MANIFEST} was restored from its copy.")
    return copy


def remove(root: Path, names: list[str]) -> list[Path]:
    """Remove the directories of these names (or unique beginnings of names) under ``root``.

    Raises: UsageError, and nothing is removed, where a name fits none or several.
    """
    there = {folder.name: folder for folder, _ in _all(root)}
    chosen: list[Path] = []
    problems: list[Problem] = []
    for name in names:
        fits = [folder for full, folder in there.items() if full.startswith(name)]
        if len(fits) == 1:
            chosen.append(fits[0])
        else:
            what = f"fits {len(fits)} directories: {', '.join(f.name for f in fits)}" if fits else f"fits none in {root}"
            problems.append(Problem(name, f"{what}.", "See `limbeck cache ls`."))
    if problems:
        raise UsageError(problems)
    for folder in dict.fromkeys(chosen):
        (folder / MANIFEST).unlink(missing_ok=True)  # first: a half-removed directory is none
        (folder / COPY).unlink(missing_ok=True)
        shutil.rmtree(folder)
    return list(dict.fromkeys(chosen))
