"""Rows on disk: found by key, read as they were written, each byte checked before it is used; many files, plans and processes."""

from __future__ import annotations

import errno
import os
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from caching import ABOUT, MADE, Said, answers, contents, identity_of, make_cache, some_keys
from limbeck.cache import CacheDamaged, Reader, Request, Stored, create, default_root, fill, missing, read_manifest, row_bytes, tidy
from limbeck.cache import _fill as filling
from limbeck.cache import _store as store
from limbeck.cache._manifest import Column, locked
from limbeck.cache._store import write_part
from limbeck.data import rows_of
from limbeck.errors import DiskFull, UsageError


def stored_as(keys: Any) -> list[tuple[int, int]]:
    """What the store keeps of keys: 72 bits."""
    return [(int(a), int(b) >> 56) for a, b in keys]


def check_against_dict(reader: Reader, filled: dict[int, Any], asked: Any, classes: int) -> None:
    """Every key under every view, there or not, beside a plain dict."""
    for view, keys in filled.items():
        expected = dict(zip(stored_as(keys), answers(keys, view, classes).astype(np.float16), strict=True))
        parts, rows = reader.locate(asked, view)
        there = np.array([key in expected for key in stored_as(asked)])
        assert np.array_equal(parts >= 0, there)
        assert np.array_equal(reader.has(asked, view), there)
        found = reader.gather("logits", parts[there], rows[there])
        assert np.array_equal(found, np.stack([expected[key] for key, t in zip(stored_as(asked), there, strict=True) if t]))


@pytest.fixture(params=["an index in memory", "part by part"])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which rows are found: at once, and in directories of very many rows."""
    if request.param == "part by part":
        monkeypatch.setattr(store, "_INDEXED", 0)


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("together", [1, 2, 9, 50], ids=lambda n: f"{n} of one first word")
@pytest.mark.parametrize("blocks", [1, 3])
def test_rows_are_those_of_a_dict(tmp_path: Path, together: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random keys, some of them equal in their first word and on both sides of a part's end; some missing; asked in any order, some twice."""
    monkeypatch.setattr(filling, "_PART_BLOCKS", blocks)
    keys, others = some_keys(100, 1, together), some_keys(50, 2)
    others[:20, 0] = keys[:20, 0]  # the same first words, and another second one
    others[:20, 1] |= np.uint64(0xFF << 56)
    folder, asked = make_cache(tmp_path, keys, views=2)
    assert asked == 200
    wanted = np.concatenate([keys, others, keys[:7]])[np.random.default_rng(0).permutation(157)]
    reader = Reader(folder)
    check_against_dict(reader, {0: keys, 1: keys}, wanted, 3)
    assert not reader.has(wanted, 2).any()
    parts, rows = reader.locate(keys[:0], 0)
    assert len(parts) == len(rows) == 0


@pytest.mark.usefixtures("search")
def test_rows_of_several_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data grow: each pass asks for what is new alone, and all of it is found, wherever its ids lie among the others."""
    monkeypatch.setattr(filling, "_PART_BLOCKS", 2)
    keys = some_keys(90, 3, together=3)
    parts_of_view = []
    for count in (30, 31, 60, 61, 90):
        folder, asked = make_cache(tmp_path, keys[np.sort(np.random.default_rng(count).permutation(count))], views=1)
        parts_of_view.append(len(read_manifest(folder).parts))
        check_against_dict(Reader(folder), {0: keys[:count]}, keys, 3)
    assert parts_of_view == sorted(set(parts_of_view))
    assert asked == 29
    assert read_manifest(folder).rows == 90


def test_samples_of_the_same_content_are_asked_once(tmp_path: Path) -> None:
    keys = some_keys(20)
    folder, asked = make_cache(tmp_path, np.concatenate([keys, keys[:5]]))
    assert asked == 20
    assert len(missing(Reader(folder), Request(0, keys))) == 0
    assert len(missing(Reader(folder), Request(1, keys))) == 20
    assert len(missing(None, Request(0, np.concatenate([keys, keys])))) == 20


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("classes", [3, 700, 40_000], ids=["many rows a tile", "a row in two tiles", "a row in many tiles"])
def test_large_directories_are_checked_as_they_are_read(tmp_path: Path, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read when it is opened; every row is right; pages are given back; damage is seen when its tile is first wanted, by name."""
    keys = some_keys(40, 5)
    monkeypatch.setattr(store, "_tile_size", lambda size: 64 if classes == 3 else 1024)
    folder, _ = make_cache(tmp_path, keys, stored=Stored(classes))
    monkeypatch.setattr(store, "_SMALL", 0)
    monkeypatch.setattr(store, "_TOUCHED", 1000)
    opened = []
    monkeypatch.setattr(store, "_Map", _counted(store._Map, opened))
    released = []
    monkeypatch.setattr(store._Map, "release", lambda self, plain=store._Map.release: (released.append(1), plain(self)))
    reader = Reader(folder)
    assert opened == []
    for _ in range(2):
        check_against_dict(reader, {0: keys}, keys, classes)
    assert released or classes == 40_000  # rows as wide as that are read, not mapped
    # the last row's last value
    entry = read_manifest(folder).parts[-1]
    path = folder / entry.name
    raw = bytearray(path.read_bytes())
    raw[entry.offsets["logits"] + 2 * classes * entry.rows - 1] ^= 0x80
    path.write_bytes(raw)
    late = Reader(folder)
    parts, where = late.locate(keys, 0)
    last = (parts == parts.max()) & (where == entry.rows - 1)
    with pytest.raises(CacheDamaged, match=path.name):
        late.gather("logits", parts[last], where[last])
    first = (parts == parts.max()) & (where == 0)  # other tiles are whole
    assert len(late.gather("logits", parts[first], where[first])) == 1
    with pytest.raises(CacheDamaged, match=path.name):
        late.check_all()


def _counted(plain: type[Any], opened: list[int]) -> type[Any]:
    class Counted(plain):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            opened.append(1)
            super().__init__(*arguments)

    return Counted


@pytest.mark.usefixtures("search")
def test_ids_are_checked_before_a_row_is_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged id must not make a row look missing."""
    monkeypatch.setattr(store, "_SMALL", 0)
    keys = some_keys(30)
    folder, _ = make_cache(tmp_path, keys)
    entry = read_manifest(folder).parts[0]
    raw = bytearray((folder / entry.name).read_bytes())
    raw[entry.offsets["id_more"] + 3] ^= 1
    (folder / entry.name).write_bytes(raw)
    with pytest.raises(CacheDamaged, match=entry.name):
        Reader(folder).locate(keys, 0)


@pytest.mark.parametrize("classes", [100, 1000])
def test_a_directory_takes_little_more_than_its_values(tmp_path: Path, classes: int) -> None:
    """At 20,000 rows at most 1.05 times two bytes a class, with everything that lies in the directory."""
    keys = some_keys(20_000)
    folder, _ = make_cache(tmp_path, keys, stored=Stored(classes), made={"block": 256})
    total = sum(p.stat().st_size for p in folder.rglob("*"))
    assert total <= 1.05 * 2 * classes * len(keys)
    assert row_bytes(Stored(classes).columns) == 2 * classes + 9


def test_any_arrow_tool_can_open_a_part(tmp_path: Path) -> None:
    keys = some_keys(10)
    features = {"body": (2, 3), "pooled": (4,)}
    stored = Stored(3, features)
    values = {
        "logits": answers(keys, 0, 3).astype(np.float16),
        **{f"features/{k}": np.arange(10 * np.prod(v)).reshape(10, *v).astype(np.float16) for k, v in features.items()},
    }
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    write_part(tmp_path, "part.arrow", 0, keys[order], {k: v[order] for k, v in values.items()}, stored.columns)
    table = pa.ipc.open_file(tmp_path / "part.arrow").read_all()
    assert table.column_names == ["id", "id_more", *(c.name for c in stored.columns)]
    for name, value in values.items():
        found = np.array(table[name].combine_chunks().flatten()).reshape(value.shape)
        assert np.array_equal(found, value[order])
    assert np.array_equal(table["id"].to_numpy(), keys[order, 0])


# --- who fills, and how many


def test_a_plan_that_was_begun_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill between two parts the rest is asked for in the same blocks, also by a process whose data have grown meanwhile."""
    monkeypatch.setattr(filling, "_PART_BLOCKS", 2)
    keys = some_keys(50)
    whole, _ = make_cache(tmp_path / "whole", keys)
    stored = Stored(3)
    folder, _ = create(tmp_path / "killed", identity_of(), MADE, {"model": "none", "num_classes": 3} | {}, stored.columns)
    begun = 0

    def leave() -> None:
        nonlocal begun
        begun += 1
        if begun == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(folder, [Request(0, keys)], Said(keys, stored), between=leave)
    assert len(read_manifest(folder).parts) == 3
    assert len(list(folder.glob("plan-*"))) == 1
    grown = np.concatenate([some_keys(9, 7), keys])[np.random.default_rng(1).permutation(59)]
    said = Said(grown, stored)
    fill(folder, [Request(0, grown)], said)
    assert said.rows == 59 - 24
    assert list(folder.glob("plan-*")) == []
    check_against_dict(Reader(folder), {0: grown}, grown, 3)
    kept = contents(folder)
    for name, raw in contents(whole).items():
        assert not name.endswith(".arrow") or kept[name] == raw


def test_a_plan_of_other_data_is_left_to_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not all rows of a plan cannot follow it; it asks for its own, and every row is right for both."""
    monkeypatch.setattr(filling, "_PART_BLOCKS", 1)
    keys = some_keys(40)
    stored = Stored(3)
    folder, _ = create(tmp_path, identity_of(), MADE, {"model": "none", "num_classes": 3}, stored.columns)
    parts = iter(range(100))

    def leave() -> None:
        if next(parts) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(folder, [Request(0, keys[:30])], Said(keys[:30], stored), between=leave)
    fill(folder, [Request(0, keys[10:])], Said(keys[10:], stored))
    check_against_dict(Reader(folder), {0: keys[10:]}, keys[10:], 3)
    fill(folder, [Request(0, keys)], Said(keys, stored))
    check_against_dict(Reader(folder), {0: keys}, keys, 3)
    assert list(folder.glob("plan-*")) == []


def test_a_damaged_plan_is_nobodys(tmp_path: Path) -> None:
    """Its rows are planned again."""
    keys = some_keys(12)
    stored = Stored(3)
    folder, _ = create(tmp_path, identity_of(), MADE, {"model": "none", "num_classes": 3}, stored.columns)
    with pytest.raises(KeyboardInterrupt):
        fill(folder, [Request(0, keys)], Said(keys, stored), between=_interrupt)
    [plan] = folder.glob("plan-*")
    raw = bytearray(plan.read_bytes())
    raw[-1] ^= 1
    plan.write_bytes(raw)
    fill(folder, [Request(0, keys)], Said(keys, stored))
    check_against_dict(Reader(folder), {0: keys}, keys, 3)
    assert list(folder.glob("plan-*")) == []


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_two_processes_with_different_data_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for processes, which lock files as these do; a part is written by one of them."""
    monkeypatch.setattr(filling, "_PART_BLOCKS", 1)
    keys = some_keys(120, together=2)
    stored = Stored(3)
    folder, _ = create(tmp_path, identity_of(), MADE, {"model": "none", "num_classes": 3}, stored.columns)
    failed: list[BaseException] = []

    def work(mine: Any) -> None:
        class Slow(Said):
            def __call__(self, blocks: list[Any], view: int) -> Any:
                time.sleep(0.002)
                yield from super().__call__(blocks, view)

        try:
            fill(folder, [Request(view, mine) for view in range(2)], Slow(mine, stored))
        except BaseException as error:
            failed.append(error)

    shares = [keys[:80], keys[40:], keys[::2], keys]
    threads = [threading.Thread(target=work, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failed == []
    check_against_dict(Reader(folder), {0: keys, 1: keys}, keys, 3)
    assert {p.name for p in folder.iterdir() if not p.name.endswith(".arrow")} == {"manifest.json", "manifest.copy.json", ".lock"}


def test_how_a_directory_was_begun_is_adopted(tmp_path: Path) -> None:
    stored = Stored(3)
    _, first = create(tmp_path, identity_of(), MADE, {"model": "none"}, stored.columns)
    _, second = create(tmp_path, identity_of(), {**MADE, "block": 99}, {"model": "other"}, stored.columns)
    assert second == first
    with pytest.raises(UsageError, match=r"logits float16\[3\].*logits float16\[4\]"):
        create(tmp_path, identity_of(), MADE, {"model": "none"}, Stored(4).columns)


def test_what_killed_processes_leave_is_put_away(tmp_path: Path) -> None:
    keys = some_keys(12)
    folder, _ = make_cache(tmp_path, keys)
    before = contents(folder)
    (folder / ".manifest.json.77.tmp").write_text("half")
    (folder / ".manifest.copy.json.77.tmp").write_text("half")
    (folder / ".plan-0.77.tmp").write_text("half")
    (folder / ".figures.json.77.tmp").write_text("half")
    (folder / ".v00000-0.arrow.tmp").write_text("half")
    (folder / "manifest.copy.json").write_text("older")
    (folder / ".locks").mkdir()
    (folder / ".locks/v").touch()
    tidy(folder)
    assert contents(folder) == before
    assert not (folder / ".locks").exists()


def test_of_plans_only_the_fulfilled_are_put_away(tmp_path: Path) -> None:
    """A process that dies between its last part's commit and the end of its plan leaves one that nobody would follow: nothing is missing."""
    keys, others = some_keys(12), some_keys(5, 9)
    folder, _ = make_cache(tmp_path, keys)
    before = contents(folder)

    def plan(of: Any) -> Path:
        ordered = of[missing(None, Request(0, of))]
        made = filling._make_plan(0, ordered, read_manifest(folder))
        path = folder / f"plan-{made.name}"
        path.write_bytes(filling.save({"keys": made.keys}, {"plan": f"{made.view},{made.rows_of_part}"}))
        return path

    done, at_work = plan(keys), plan(others)
    (folder / ".locks").mkdir()
    tidy(folder)
    assert not done.exists()
    assert at_work.exists()
    assert (folder / ".locks").exists()  # of what is still written
    at_work.unlink()
    tidy(folder)
    assert contents(folder) == before
    assert not (folder / ".locks").exists()


def test_a_finished_directory_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = make_cache(tmp_path, some_keys(12))
    (folder / ".lock").unlink()
    monkeypatch.setattr(filling, "locked", None)
    tidy(folder)
    assert not (folder / ".lock").exists()


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = some_keys(12)
    stored = Stored(3)
    folder, _ = create(tmp_path, identity_of(), MADE, {"model": "none", "num_classes": 3}, stored.columns)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
        m.setattr(store.os, "fsync", full)
        with pytest.raises(DiskFull, match="The disk is full"):
            write_part(folder, "v.arrow", 0, keys, {"logits": answers(keys, 0, 3)}, stored.columns)
    assert not list(folder.glob("*v.arrow*"))


def test_a_lock_is_held_by_one_and_outlives_nobody(tmp_path: Path) -> None:
    file = tmp_path / "deep/lock"
    with locked(file) as mine:
        assert mine
        with locked(file, wait=False) as other:
            assert not other
    with locked(file, wait=False) as again:
        assert again


def test_a_lock_whose_folder_is_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has no more use for the folder of locks and removes it between its making and the opening of a file in it."""
    file, plain, times = tmp_path / "locks/a", os.open, []

    def open_late(path: Any, *arguments: Any, **more: Any) -> int:
        if Path(path) == file and not times:
            times.append(1)
            file.parent.rmdir()
        return plain(path, *arguments, **more)

    monkeypatch.setattr(os, "open", open_late)
    with locked(file) as mine:
        assert mine
    assert times


def test_where_caches_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("LIMBECK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_root() == tmp_path / "x/limbeck/teachers"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_root() == Path.home() / ".cache/limbeck/teachers"


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        create(tmp_path / "file", identity_of(), MADE, {}, (Column("logits", "float16", (3,)),))


@pytest.mark.parametrize("together", [1, 7])
def test_rows_of_a_plan_are_those_of_a_dict(together: int) -> None:
    """Keys that agree in their first word, keys that stand twice, and keys that are not there; the first row counts."""
    rng = np.random.default_rng(4)
    keys = some_keys(200, 1, together)
    keys = np.concatenate([keys, keys[:50]])[rng.permutation(250)]
    others = some_keys(30, 2)
    others[:20, 0] = keys[:20, 0]
    others[-1] = np.iinfo(np.uint64).max
    wanted = np.concatenate([keys, others])[rng.permutation(280)]
    place: dict[tuple[int, int], int] = {}
    for row, (high, low) in enumerate(keys.tolist()):
        place.setdefault((high, low), row)
    assert rows_of(wanted, keys).tolist() == [place.get((a, b), -1) for a, b in wanted.tolist()]
    assert rows_of(keys[:0], keys).tolist() == []
    assert rows_of(keys[:2], keys[:0]).tolist() == [-1, -1]


def test_a_plan_of_many_rows_takes_little_memory() -> None:
    """A mapping of tuples would take 200 bytes a key, and a set of them as much again."""
    keys = some_keys(100_000)
    tracemalloc.start()
    try:
        rows_of(keys[::-1], keys)
        assert tracemalloc.get_traced_memory()[1] < 120 * len(keys)
    finally:
        tracemalloc.stop()


def test_rows_that_were_taken_out_meanwhile(tmp_path: Path) -> None:
    """They were there when it was counted, and are not when they are read: never a row of another sample."""
    keys = some_keys(12)
    folder, _ = make_cache(tmp_path, keys[:9])
    reader = Reader(folder)
    parts, rows = reader.locate(keys, 0)
    assert (parts < 0).sum() == 3
    with pytest.raises(CacheDamaged, match="lacks rows that were there"):
        reader.gather("logits", parts, rows)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("wait", [True, False])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, wait: bool) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("limbeck.cache._manifest.fcntl.flock", flock)
    with pytest.raises(UsageError, match="on a file system without locks"), locked(tmp_path / "lock", wait=wait):
        pytest.fail("nothing may be written")
    with pytest.raises(UsageError, match=str(tmp_path)):
        make_cache(tmp_path, some_keys(4))
    assert not list(tmp_path.rglob("*.json"))


def test_who_adopts_a_directory_brings_its_own_names(tmp_path: Path) -> None:
    """Filled by an object: from now on it is known by files, and these name the classes; a later object changes nothing."""
    columns = Stored(3).columns
    of_object = {**ABOUT, "classes": ["a", "b", "c"]}
    of_files = {**ABOUT, "model": "files", "sources": {"kind": "hf"}, "classes": ["c", "a", "b"], "class_ids": ["n3", "n1", "n2"]}
    create(tmp_path, identity_of(), MADE, of_object, columns)
    assert create(tmp_path, identity_of(), MADE, of_files, columns)[1].about == of_files
    for later in (of_object, {**of_files, "sources": {"kind": "run"}, "classes": None}):
        assert create(tmp_path, identity_of(), MADE, later, columns)[1].about == of_files
