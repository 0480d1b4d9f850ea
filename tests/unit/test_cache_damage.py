"""Nothing in a cache is believed: every byte, every length and every place of a file counts, and what is damaged is named and mended."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from caching import answers, contents, make_cache, some_keys
from limbeck.cache import FIGURES, CacheDamaged, Reader, listing, read_figures, read_manifest, remove, seal, verify
from limbeck.cache import _fill as filling
from limbeck.cache import _manage as managing
from limbeck.errors import UsageError
from limbeck.run import write_atomic

KEYS = some_keys(16)
COPY = "manifest.copy.json"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three parts of two views, and figures."""
    monkeypatch.setattr(filling, "_PART_BLOCKS", 2)
    made, _ = make_cache(tmp_path / "cache", KEYS)
    make_cache(tmp_path / "cache", KEYS[:5], views=2)
    write_atomic(made / FIGURES, seal({"of": made.name, "figures": {"latency_ms": None, "bytes": 12}}))
    assert verify(made)[0].problems == []
    assert len(read_manifest(made).parts) == 3
    return made


def raised(folder: Path) -> CacheDamaged | None:
    """What opening says; without damage the rows are right."""
    try:
        reader = Reader(folder)
    except CacheDamaged as damaged:
        return damaged
    parts, rows = reader.locate(KEYS, 0)
    assert np.array_equal(reader.gather("logits", parts, rows), answers(KEYS, 0, 3).astype(np.float16))
    return None


def refused(folder: Path, name: str) -> bool:
    """Whether the file is named: when the cache is opened, or, where a file is not needed for it, by ``verify``."""
    if name == FIGURES:
        try:
            read_figures(folder)
        except CacheDamaged as damaged:
            return str(folder / name) in str(damaged)
        return False
    if name == COPY:
        assert raised(folder) is None
        return any(str(folder / name) in text for text in verify(folder)[0].problems)
    damaged = raised(folder)
    return damaged is not None and damaged.exit_code == 2 and str(folder / name) in str(damaged) and "limbeck cache verify" in str(damaged)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def mend(folder: Path, before: dict[str, bytes]) -> None:
    """``verify --repair`` and asking again give the bytes that there were, but for figures, which are measured."""
    assert any(one.mended for one in verify(folder.parent, repair=True))
    if folder.exists():
        assert verify(folder)[0].problems == []
    make_cache(folder.parent, KEYS)
    make_cache(folder.parent, KEYS[:5], views=2)
    assert {k: v for k, v in contents(folder).items() if k != FIGURES} == {k: v for k, v in before.items() if k != FIGURES}


@pytest.mark.parametrize("mask", [0x01, 0x80])
def test_every_byte_counts(folder: Path, mask: int) -> None:
    """Each byte of each file is changed, one at a time."""
    for name in names(folder):
        path = folder / name
        raw = bytearray(path.read_bytes())
        for at in range(len(raw)):
            raw[at] ^= mask
            path.write_bytes(raw)
            assert refused(folder, name), (name, at)
            raw[at] ^= mask
        path.write_bytes(raw)
    assert raised(folder) is None


def test_every_length_counts(folder: Path) -> None:
    """Each file is cut to every length, and made longer by one byte."""
    for name in names(folder):
        path = folder / name
        raw = path.read_bytes()
        for length in range(len(raw)):
            path.write_bytes(raw[:length])
            assert refused(folder, name), (name, length)
        path.write_bytes(raw + b"\n")
        assert refused(folder, name), name
        path.write_bytes(raw)
    assert raised(folder) is None


@pytest.mark.parametrize("how", ["a byte", "cut short", "empty", "gone"])
def test_what_is_damaged_is_mended(folder: Path, how: str) -> None:
    before = contents(folder)
    for name in [*names(folder), "both manifests"]:
        for file in ["manifest.json", COPY] if name == "both manifests" else [name]:
            path, raw = folder / file, bytearray(before[file])
            raw[len(raw) // 2] ^= 4
            match how:
                case "a byte":
                    path.write_bytes(raw)
                case "cut short":
                    path.write_bytes(raw[:-7])
                case "empty":
                    path.write_bytes(b"")
                case "gone":
                    path.unlink()
        if how == "gone" and name == FIGURES:  # nothing has to be there
            assert verify(folder)[0].problems == []
        else:
            mend(folder, before)
        write_atomic(folder / FIGURES, before[FIGURES])


def swap(folder: Path) -> str:
    a, b = sorted(folder.glob("v00000-*.arrow"))
    one, other = a.read_bytes(), b.read_bytes()
    assert len(one) == len(other), "their sizes must not tell"
    a.write_bytes(other)
    b.write_bytes(one)
    return a.name


def another_view(folder: Path) -> str:
    a, b = sorted(folder.glob("*.arrow"))[0], sorted(folder.glob("v00001-*.arrow"))[0]
    b.write_bytes(a.read_bytes())
    return b.name


def foreign_part(folder: Path) -> str:
    other, _ = make_cache(folder.parent.parent / "other", KEYS, name="b")
    part = sorted(other.glob("*.arrow"))[0]
    assert (folder / part.name).exists()
    raw = bytearray(part.read_bytes())
    raw[-200] ^= 1  # answers of another teacher to the same samples
    (folder / part.name).write_bytes(raw)
    return part.name


def foreign_manifest(folder: Path) -> str:
    other, _ = make_cache(folder.parent.parent / "other", KEYS, name="b")
    shutil.copy(other / "manifest.json", folder / "manifest.json")
    return "manifest.json"


def older_manifest(folder: Path) -> str:
    """Whole, of this directory, and not the newest: its parts are there and right, and others are not known."""
    other, _ = make_cache(folder.parent.parent / "other", KEYS)
    shutil.copy(other / "manifest.json", folder / "manifest.json")
    return COPY


def foreign_figures(folder: Path) -> str:
    write_atomic(folder / FIGURES, seal({"of": "0" * 24, "figures": {"bytes": 1}}))
    return FIGURES


def another_format(folder: Path) -> str:
    write_atomic(
        folder / "manifest.json", seal({"format": 1, "identity": {"teacher": 1}, "made": {}, "about": {}, "columns": [], "parts": []})
    )
    return "manifest.json"


@pytest.mark.parametrize("wrong", [swap, another_view, foreign_part, foreign_manifest, older_manifest, foreign_figures, another_format])
def test_whole_files_in_the_wrong_place(folder: Path, wrong: Callable[[Path], str]) -> None:
    before = contents(folder)
    name = wrong(folder)
    assert refused(folder, name)
    assert any(str(folder / name) in text for text in verify(folder)[0].problems)
    mend(folder, before)


def test_files_that_do_not_belong_are_named_and_removed(folder: Path) -> None:
    """But what a process is writing just now is left alone, as a plan names it."""
    before = contents(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "v00009-0000000000000000.arrow").write_bytes(b"ARROW1")
    (folder / "deep").mkdir()
    problems = verify(folder)[0].problems
    assert all(any(name in text for text in problems) for name in ("notes.txt", "v00009", "deep"))
    mend(folder, before)
    plan = filling._make_plan(1, KEYS, read_manifest(folder))
    write_atomic(folder / f"plan-{plan.name}", filling.save({"keys": plan.keys}, {"plan": f"{plan.view},{plan.rows_of_part}"}))
    part = plan.parts[-1][0]
    assert not (folder / part).exists()
    (folder / f".{part}.tmp").write_bytes(b"half")
    (folder / part).write_bytes(b"half")
    assert verify(folder)[0].problems == []


def test_a_part_that_is_committed_while_another_process_repairs_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It came after the manifest had been read, and is not in what was read."""
    (folder / "notes.txt").write_text("mine")
    later, plain, times = some_keys(6, 5), managing._readable, []

    def readable(path: Path) -> None:
        if not times:
            times.append(1)
            make_cache(folder.parent, later)
        plain(path)

    monkeypatch.setattr(managing, "_readable", readable)
    [found] = verify(folder, repair=True)
    assert times
    assert any("notes.txt was removed" in text for text in found.mended)
    assert not any(".arrow" in text for text in found.mended), "nor is it said to have been removed"
    reader = Reader(folder)
    assert reader.has(later, 0).all()
    assert reader.has(KEYS, 0).all()
    assert verify(folder)[0].problems == []


def test_a_plan_that_is_damaged_is_named_and_removed(folder: Path) -> None:
    (folder / "plan-0123456789abcdef").write_bytes(b"nothing")
    assert "plan-0123456789abcdef" in verify(folder)[0].problems[0]
    assert verify(folder, repair=True)[0].mended
    assert verify(folder)[0].problems == []
    assert not list(folder.glob("plan-*"))


def test_without_any_manifest_nothing_is_believed(folder: Path) -> None:
    for name in ("manifest.json", COPY):
        (folder / name).unlink()
    assert "is missing" in listing(folder.parent)[0]["damaged"]
    with pytest.raises(CacheDamaged, match="parts beside where it was"):
        make_cache(folder.parent, KEYS)
    assert "was removed" in verify(folder.parent, repair=True)[0].mended[0]
    assert not folder.exists()


def test_removing(folder: Path) -> None:
    other, _ = make_cache(folder.parent, KEYS[:3], name="b")
    third, _ = make_cache(folder.parent, KEYS[:3], name="c")
    with pytest.raises(UsageError, match="fits none"):
        remove(folder.parent, [folder.name, "nothing"])
    assert folder.exists()
    assert remove(folder.parent, [folder.name[:9], folder.name]) == [folder]
    (third / "manifest.json").write_text("{")
    assert remove(folder.parent, [third.name]) == [third]
    assert [row["name"] for row in listing(folder.parent)] == [other.name]
