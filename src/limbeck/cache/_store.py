"""Parts on disk: Arrow IPC files of fixed stride, memory-mapped; every byte that is read has been checked."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from limbeck.cache._manifest import CacheDamaged, Column, Manifest, PartEntry, read_manifest
from limbeck.run import disk_errors, sync_folder

__all__ = ["ID_BYTES", "Reader", "row_bytes", "write_part"]

Keys = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]

ID_BYTES = 9
"""Of a row's 128-bit key its first 72 bits are stored: two of a million samples share them with a probability of 1e-10, and at 100 classes
16 bytes would be 8 % of a row."""

_SMALL = 64 << 20  # bytes: a directory up to this size is checked whole when it is opened
_TOUCHED = 128 << 20  # bytes mapped at most, after which their pages are given back
_AROUND = 256 << 10  # what the system may map around a row that is touched
_WIDE = 8 << 10  # bytes: rows from here on are read, not mapped
_INDEXED = 1 << 20  # rows: a directory up to this size has its ids in memory, 17 bytes each
_INDEXED_PARTS = 64  # of a view: opening all of more would take longer than a few searches
_TILES = 1024  # checksums a part, at most


def row_bytes(columns: Sequence[Column]) -> int:
    """What one row takes."""
    return ID_BYTES + sum(int(np.prod(c.shape, dtype=np.int64)) * np.dtype(c.dtype).itemsize for c in columns)


def _tile_size(size: int) -> int:
    tile = 1 << 16
    while size > tile * _TILES:
        tile *= 2
    return tile


def _checksums(data: memoryview, tile: int) -> str:
    return "".join(xxhash.xxh3_64_hexdigest(data[start : start + tile]) for start in range(0, len(data), tile))


def write_part(
    folder: Path, name: str, view: int, keys: Keys, values: Mapping[str, npt.NDArray[Any]], columns: Sequence[Column]
) -> PartEntry:
    """Write one part under its final name; the caller enters it into the manifest.

    keys: ``(N, 2)``, in order. values: ``(N, *shape)`` of each column. The temporary name is fixed, so that whoever writes this part again after a
    kill takes its place; the caller holds the part's lock.
    """
    arrays = [_arrow(keys[:, 0]), _arrow((keys[:, 1] >> np.uint64(56)).astype(np.uint8))]
    fields = [pa.field("id", pa.uint64(), nullable=False), pa.field("id_more", pa.uint8(), nullable=False)]
    for column in columns:
        flat = np.ascontiguousarray(values[column.name], dtype=column.dtype).reshape(-1)
        inner, width = _arrow(flat), int(np.prod(column.shape, dtype=np.int64))
        arrays.append(pa.FixedSizeListArray.from_arrays(inner, width) if column.shape else inner)
        kind = pa.list_(pa.field("item", inner.type, nullable=False), width) if column.shape else inner.type
        fields.append(pa.field(column.name, kind, nullable=False))
    schema = pa.schema(fields)
    arrays = [a if a.type == f.type else a.cast(f.type) for a, f in zip(arrays, fields, strict=True)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    written = sink.getvalue()
    data = memoryview(written)
    path, temporary = folder / name, folder / f".{name}.tmp"
    with disk_errors(path, len(data)):
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
            sync_folder(folder)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    tile = _tile_size(len(data))
    first, last = (f"{int(keys[at, 0]):016x}" for at in (0, -1))
    return PartEntry(name, view, len(keys), first, last, len(data), tile, _checksums(data, tile), _offsets(written))


def _arrow(values: npt.NDArray[Any]) -> pa.Array:
    """``(N,)`` as an Arrow array, without ``pa.array``: that imports pandas, where it is installed, for a second to ask whether this is its own."""
    held = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(held.dtype), len(held), [None, pa.py_buffer(held)])


def _offsets(file: pa.Buffer) -> dict[str, int]:
    """The byte at which the values of each column begin."""
    batch = pa.ipc.open_file(file).get_batch(0)
    found = {}
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        inner = array.values if pa.types.is_fixed_size_list(array.type) else array
        found[name] = inner.buffers()[1].address - file.address
    return found


class _Map:
    """One part, mapped at its first use."""

    def __init__(self, folder: Path, entry: PartEntry, columns: Sequence[Column]) -> None:
        self.path, self.entry = folder / entry.name, entry
        with open(self.path, "rb") as f:
            self.map, self.inode = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), os.fstat(f.fileno()).st_ino
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a row would map the 2 MB around it
            with contextlib.suppress(OSError):
                self.map.madvise(mmap.MADV_NOHUGEPAGE)
        self.bytes = memoryview(self.map)
        if len(self.bytes) != entry.size:
            raise CacheDamaged(self.path, f"has {len(self.bytes):,} bytes, and {entry.size:,} were written.")
        self.checked = np.zeros(-(-entry.size // entry.tile), dtype=bool)
        self.columns = {c.name: self._column(c) for c in (Column("id", "uint64", ()), Column("id_more", "uint8", ()), *columns)}
        self._ids_checked = self.whole = False  # whole: every tile was checked

    def _column(self, column: Column) -> npt.NDArray[Any]:
        count = self.entry.rows * int(np.prod(column.shape, dtype=np.int64))
        flat = np.frombuffer(self.map, dtype=column.dtype, count=count, offset=self.entry.offsets[column.name])
        return flat.reshape(self.entry.rows, *column.shape)

    def check(self, tiles: npt.NDArray[Any]) -> int:
        """Compare tiles with their checksums, each once; returns the bytes that were looked at."""
        open_ = tiles[~self.checked[tiles]].tolist()
        if not open_:
            return 0
        with open(self.path, "rb", buffering=0) as f:  # read, not mapped: a tile is looked at once, and is much around a row
            if os.fstat(f.fileno()).st_ino != self.inode:
                raise CacheDamaged(self.path, "was replaced while it was being read.")
            for tile in open_:
                start = tile * self.entry.tile
                piece = os.pread(f.fileno(), self.entry.tile, start)
                if xxhash.xxh3_64_hexdigest(piece) != self.entry.checksums[16 * tile : 16 * tile + 16]:
                    raise CacheDamaged(self.path, f"is damaged: bytes {start:,} to {start + len(piece) - 1:,} do not match their checksum.")
                self.checked[tile] = True
        return 0

    def check_all(self) -> int:
        looked = self.check(np.arange(len(self.checked)))
        self.whole = True
        return looked

    def check_ids(self) -> int:
        """All ids of the part."""
        looked = 0
        for name in ("id", "id_more"):
            start, width = self.entry.offsets[name], self.columns[name].nbytes
            looked += self.check(np.arange(start // self.entry.tile, (start + max(width, 1) - 1) // self.entry.tile + 1))
        self._ids_checked = True
        return looked

    def find(self, keys: Keys) -> tuple[Int64, int]:
        """``(N,)`` the row of each key, -1 where it is not there; and the bytes that were looked at."""
        looked = 0 if self._ids_checked else self.check_ids()
        high, more = self.columns["id"], self.columns["id_more"]
        wanted, tail = np.ascontiguousarray(keys[:, 0]), (keys[:, 1] >> np.uint64(56)).astype(np.uint8)
        rows = np.searchsorted(high, wanted).astype(np.int64)
        last = self.entry.rows - 1
        at = np.minimum(rows, last)
        hit = (high[at] == wanted) & (more[at] == tail)
        # ids that agree in their first word: walk on while they do
        doubtful = np.flatnonzero(~hit & (high[at] == wanted))
        for i in doubtful.tolist():
            row = int(at[i])
            while row < last and high[row] == wanted[i] and more[row] != tail[i]:
                row += 1
            at[i], hit[i] = row, high[row] == wanted[i] and more[row] == tail[i]
        return np.where(hit, at, -1), looked

    def take(self, name: str, rows: Int64, out: npt.NDArray[Any]) -> int:
        """Fill ``out``, ``(N, *shape)``, with rows of one column, whose bytes are checked before they are used; returns the bytes touched."""
        values = self.columns[name]
        looked = 0 if self.whole else self._check_rows(name, rows)
        stride = values.nbytes // max(1, len(values))
        if stride >= _WIDE:
            with open(self.path, "rb", buffering=0) as f:
                if os.fstat(f.fileno()).st_ino != self.inode:
                    raise CacheDamaged(self.path, "was replaced while it was being read.")
                for row, place in zip(rows.tolist(), out, strict=True):
                    if os.preadv(f.fileno(), [place.reshape(-1).view(np.uint8)], self.entry.offsets[name] + row * stride) != stride:
                        raise CacheDamaged(self.path, "was cut off while it was being read.")
            return 0
        values.take(rows, axis=0, out=out, mode="clip")  # the rows are its own; this mode alone writes without a buffer
        return looked + max(out.nbytes, _AROUND * len(rows))

    def _check_rows(self, name: str, rows: Int64) -> int:
        values = self.columns[name]
        stride = values.nbytes // max(1, len(values))
        begin = self.entry.offsets[name] + rows * stride
        first, final = begin // self.entry.tile, (begin + max(stride, 1) - 1) // self.entry.tile
        looked = 0
        if not (self.checked[first].all() and self.checked[final].all()) or stride > self.entry.tile:
            tiles = [np.arange(a, b + 1) for a, b in zip(first.tolist(), final.tolist(), strict=True)]
            looked = self.check(np.unique(np.concatenate(tiles)))
            self.whole = bool(self.checked.all())
        return looked

    def release(self) -> None:
        """Give the pages back; the file stays in the system's cache. Memory of a process then does not grow with what it has read."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class _Run:
    """Parts of one view that lie one after the other in id order."""

    firsts: npt.NDArray[np.uint64]
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class _Index:
    """Every row of one view of a directory that is not large, in id order: one search finds a whole batch."""

    high: npt.NDArray[np.uint64]
    more: npt.NDArray[np.uint8]
    parts: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]


class Reader:
    """The rows of one cache directory, as its manifest had them when it was opened.

    A small directory is checked whole at once; of a large one each tile is checked before its first use, so that opening takes as long for
    10 GB as for one. Raises: CacheDamaged.
    """

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        self.folder = folder
        self.manifest = manifest or read_manifest(folder)
        self._maps: dict[int, _Map] = {}
        self._touched = 0
        self._indexed: dict[int, _Index] = {}
        self._runs: dict[int, list[_Run]] = {}
        for entry in self.manifest.parts:
            self._present(folder / entry.name, entry)
        for view in sorted({entry.view for entry in self.manifest.parts}):
            self._runs[view] = self._in_order([n for n, entry in enumerate(self.manifest.parts) if entry.view == view])
        if self.manifest.size <= _SMALL:
            self.check_all()

    def _in_order(self, numbers: list[int]) -> list[_Run]:
        """The parts of a view as few runs: parts of one pass do not overlap, those of a later pass lie between their rows."""
        ends: list[int] = []
        members: list[list[int]] = []
        ranges = [(int(self.manifest.parts[n].first, 16), int(self.manifest.parts[n].last, 16), n) for n in numbers]
        for first, last, number in sorted(ranges):
            place = next((i for i, end in enumerate(ends) if end <= first), len(ends))
            if place == len(ends):
                ends.append(last)
                members.append([number])
            else:
                ends[place] = last
                members[place].append(number)
        firsts = [np.array([int(self.manifest.parts[n].first, 16) for n in run], dtype=np.uint64) for run in members]
        return [_Run(f, tuple(run)) for f, run in zip(firsts, members, strict=True)]

    @staticmethod
    def _present(path: Path, entry: PartEntry) -> None:
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise CacheDamaged(path, "is missing.") from None
        if size != entry.size:
            raise CacheDamaged(path, f"has {size:,} bytes, and {entry.size:,} were written.")

    def _map(self, number: int) -> _Map:
        if number not in self._maps:
            self._maps[number] = _Map(self.folder, self.manifest.parts[number], self.manifest.columns)
        return self._maps[number]

    def _touch(self, count: int) -> None:
        self._touched += count
        if self._touched > _TOUCHED and self.manifest.size > _TOUCHED:
            for part in self._maps.values():
                part.release()
            self._touched = 0

    def check_all(self) -> None:
        for number in range(len(self.manifest.parts)):
            self._touch(self._map(number).check_all())

    def locate(self, keys: Keys, view: int) -> tuple[Int64, Int64]:
        """``(part, row)`` of each key under a view, ``(N,)`` each; part -1 where there is none."""
        if view in self._runs and self.manifest.rows <= _INDEXED and sum(len(run.numbers) for run in self._runs[view]) <= _INDEXED_PARTS:
            return self._look_up(keys, view)
        parts, rows = np.full(len(keys), -1, dtype=np.int64), np.full(len(keys), -1, dtype=np.int64)
        for run in self._runs.get(view, ()):
            open_ = np.flatnonzero(parts < 0)
            if not len(open_):
                break
            # a part begins at its first id; ids that agree in the first word may lie on both sides of a boundary
            place = np.searchsorted(run.firsts, keys[open_, 0], side="right") - 1
            for p in np.unique(place[place >= 0]).tolist():
                mine = open_[place == p]
                for before in range(p, -1, -1):
                    found, looked = self._map(run.numbers[before]).find(keys[mine])
                    self._touch(looked)
                    self._map(run.numbers[before]).release()  # a search maps far more than it reads
                    hit = found >= 0
                    parts[mine[hit]], rows[mine[hit]] = run.numbers[before], found[hit]
                    mine = mine[~hit]
                    mine = mine[keys[mine, 0] == run.firsts[before]]
                    if not len(mine):
                        break
        return parts, rows

    def _look_up(self, keys: Keys, view: int) -> tuple[Int64, Int64]:
        index = self._indexed.get(view) or self._build_index(view)
        wanted, tail = np.ascontiguousarray(keys[:, 0]), (keys[:, 1] >> np.uint64(56)).astype(np.uint8)
        at = np.minimum(np.searchsorted(index.high, wanted), len(index.high) - 1)
        hit = (index.high[at] == wanted) & (index.more[at] == tail)
        for i in np.flatnonzero(~hit & (index.high[at] == wanted)).tolist():  # ids that agree in their first word
            last = int(np.searchsorted(index.high, wanted[i], side="right"))
            same = np.flatnonzero(index.more[at[i] : last] == tail[i])
            if len(same):
                at[i], hit[i] = at[i] + same[0], True
        return np.where(hit, index.parts[at], -1).astype(np.int64), np.where(hit, index.rows[at], -1).astype(np.int64)

    def _build_index(self, view: int) -> _Index:
        numbers = sorted(n for run in self._runs[view] for n in run.numbers)
        maps = [self._map(n) for n in numbers]
        self._touch(sum(part.check_ids() for part in maps))
        high, more = (np.concatenate([part.columns[name] for part in maps]) for name in ("id", "id_more"))
        for part in maps:
            part.release()
        counts = [part.entry.rows for part in maps]
        parts, rows = np.repeat(np.array(numbers, np.int32), counts), np.concatenate([np.arange(c, dtype=np.int32) for c in counts])
        order = np.lexsort((parts, more, high))
        self._indexed[view] = _Index(high[order], more[order], parts[order], rows[order])
        return self._indexed[view]

    def gather(self, name: str, parts: Int64, rows: Int64) -> npt.NDArray[Any]:
        """``(N, *shape)`` of one column at the places that :meth:`locate` gave."""
        if (parts < 0).any():  # or it would be a row of the last part
            raise CacheDamaged(self.folder / "manifest.json", "lacks rows that were there: they were taken out meanwhile.")
        column = next(c for c in self.manifest.columns if c.name == name)
        order = np.argsort(parts, kind="stable")
        parts, rows = parts[order], rows[order]
        cuts = [0, *(np.flatnonzero(parts[1:] != parts[:-1]) + 1).tolist(), len(parts)]
        out = np.empty((len(rows), *column.shape), dtype=column.dtype)
        touched = 0
        for start, stop in itertools.pairwise(cuts):
            if stop > start:
                touched += self._map(int(parts[start])).take(name, rows[start:stop], out[start:stop])
        self._touch(touched)
        if len(cuts) == 2:  # one part, in the order asked for
            return out
        placed = np.empty_like(out)
        placed[order] = out
        return placed

    def has(self, keys: Keys, view: int) -> npt.NDArray[np.bool_]:
        """``(N,)`` bool: which keys are there."""
        return self.locate(keys, view)[0] >= 0
