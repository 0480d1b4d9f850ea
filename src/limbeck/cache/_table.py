"""Teachers that are only numbers: logits that were computed elsewhere, in a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from limbeck.data import Data, groups, rows_of
from limbeck.data.tables import read_parquet
from limbeck.errors import Problem, UsageError, nearest
from limbeck.run import file_sha256
from limbeck.teacher import Asking, Coming
from limbeck.types import Batch, Needs, Signal

__all__ = ["TableTeacher", "write_ids"]

Keys = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]
WHERE = "teacher.model"
_PIECE = 1 << 14  # rows that are looked at at once


class TableTeacher:
    """Answers from a file, one row of logits a sample.

    ``.npy``: ``(N, C)`` floats, row i for row i of the training data as it is given (before validation is split off), classes in the data's order.
    ``.parquet``: a column ``logits`` (lists of C floats) and a column ``id`` (32 hex digits, as ``limbeck label --ids`` writes them) or ``row`` (the
    training data's row; where both are there, the id decides); its metadata may name the ``classes``, a JSON list in the order of the logits. By
    ``id`` it may cover test samples too.

    Every training sample has to be covered by numbers, of which -inf may be some, and equal samples by equal numbers. ``test``: ``(N, C)`` of the
    test split, None where the file does not cover it.
    """

    def __init__(self, path: Path, data: Data, device: torch.device) -> None:
        self.path, self.device, self.hits = path, device, 0
        self.classes: tuple[str, ...] | None = None
        self.class_ids: tuple[str, ...] | None = None
        self.notes: list[str] = []
        table, of_train, of_test = self._read(data)
        self._logits, self._rows = table, of_train
        self.num_classes = int(table.shape[1])
        self.sha256 = file_sha256(path)
        self.identity: dict[str, Any] = {"file_sha256": self.sha256}
        self._check(data)
        train = data.train.ids
        self._order = np.lexsort((train[:, 1], train[:, 0]))
        self._high = np.ascontiguousarray(train[self._order, 0])
        self._ids = train
        self._same_logits(train, table, of_train)
        self.columns: Int64 | None = None
        self.test = None if of_test is None else table[of_test].astype(np.float64)

    def _read(self, data: Data) -> tuple[npt.NDArray[Any], Int64, Int64 | None]:
        if self.path.suffix not in (".npy", ".parquet"):
            raise self._wrong(f"got {self.path.name}; a .npy or a .parquet file is wanted.")
        return self._npy(data) if self.path.suffix == ".npy" else self._parquet(data)

    def _wrong(self, text: str, hint: str = "") -> UsageError:
        return UsageError(Problem(WHERE, text, hint))

    def _npy(self, data: Data) -> tuple[npt.NDArray[Any], Int64, None]:
        try:
            table = np.lib.format.open_memmap(self.path, mode="r")  # never a pickle, and nothing but .npy
        except Exception as e:  # NumPy parses the header as Python text, and lets through what that raises
            raise self._wrong(f"{self.path} cannot be read as .npy: {_said(e)}") from None
        count = len(data.train.source)
        if table.ndim != 2 or table.dtype.kind != "f" or len(table) != count or not table.shape[1]:
            wanted = f"floats of ({count}, classes) are wanted, one row for each row of the training data"
            text = f"{self.path} holds {table.dtype} of {table.shape}; {wanted}."
            raise self._wrong(text, "Rows in another order go into a .parquet file with a column id or row.")
        return table, data.train.rows, None

    def _parquet(self, data: Data) -> tuple[npt.NDArray[Any], Int64, Int64 | None]:
        import pyarrow as pa

        try:
            table = read_parquet(self.path)
        except (pa.ArrowException, OSError, ValueError) as e:
            raise self._wrong(f"{self.path} cannot be read as Parquet: {_said(e)}") from None
        names = table.column_names
        key = "id" if "id" in names else "row"
        if "logits" not in names or key not in names:
            text = f"{self.path} has the columns {', '.join(names) or 'none'}; logits, and id or row, are wanted."
            raise self._wrong(text, nearest("logits", names))
        twice = [name for name in ("logits", key) if names.count(name) > 1]
        if twice:
            raise self._wrong(f"{self.path} has more than one column {twice[0]}.")
        if not table.num_rows:
            raise self._wrong(f"{self.path} has no rows.")
        logits = self._lists(table.column("logits"))
        self._named(table.schema.metadata, logits.shape[1])
        if key == "id":
            keys = self._keys(table.column("id"))
            test = self._match(keys, logits, data.test.ids)
            return logits, self._match(keys, logits, data.train.ids), None if (test < 0).any() else test
        given = table.column("row")
        if not pa.types.is_integer(given.type) or given.null_count:
            what = f"{given.null_count:,} nulls" if given.null_count else str(given.type)
            raise self._wrong(f"{self.path}: the column row has {what}; whole numbers are wanted in every row.")
        rows = np.asarray(given.to_numpy(), dtype=np.int64)
        place = np.full(len(data.train.source), -1, dtype=np.int64)
        inside = (rows >= 0) & (rows < len(place))
        if not inside.all() or len(np.unique(rows)) != len(rows):
            raise self._wrong(f"{self.path}: the column row has numbers twice, or beyond the {len(place):,} rows of the training data.")
        place[rows] = np.arange(len(rows))
        return logits, place[data.train.rows], None

    def _lists(self, column: Any) -> npt.NDArray[Any]:
        """``(N, C)`` of a column of lists."""
        import pyarrow as pa

        kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        if not any(is_kind(column.type) for is_kind in kinds) or not pa.types.is_floating(column.type.value_type):
            raise self._wrong(f"{self.path}: the column logits has {column.type}; lists of floats are wanted.")
        widths = np.unique(np.concatenate([c.value_lengths().to_numpy(zero_copy_only=False) for c in column.chunks]))
        if column.null_count or len(widths) != 1 or not widths[0] or any(c.flatten().null_count for c in column.chunks):
            raise self._wrong(f"{self.path}: every row of logits must have the same number of values, at least one, and none may be null.")
        flat = np.concatenate([c.flatten().to_numpy(zero_copy_only=False) for c in column.chunks])
        return flat.reshape(len(column), int(widths[0]))

    def _named(self, metadata: dict[bytes, bytes] | None, width: int) -> None:
        """The classes that the file names."""
        given = (metadata or {}).get(b"classes")
        if given is None:
            return
        try:
            found = json.loads(given)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or not all(isinstance(c, str | int) for c in found):
            raise self._wrong(f"{self.path}: the metadata classes is {given[:60]!r}; a JSON list of names is wanted.")
        if len(found) != width:
            raise self._wrong(f"{self.path}: the metadata classes has {len(found)} names, and each row has {width} logits.")
        self.classes = tuple(str(c) for c in found)

    def _keys(self, column: Any) -> Keys:
        import pyarrow as pa

        text = f"{self.path}: the column id does not have 32 hexadecimal digits in every row"
        hint = "`limbeck label RECIPE --ids FILE.csv` writes the ids."
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
            raise self._wrong(f"{text}, but {column.type}.", hint)
        ids = column.to_pylist()
        bad = next((row for row, i in enumerate(ids) if i is None or re.fullmatch("[0-9a-fA-F]{32}", i) is None), None)
        if bad is not None:
            raise self._wrong(f"{text}: row {bad} has {ids[bad]!r}.", hint)
        return np.frombuffer(bytes.fromhex("".join(ids)), dtype=">u8").astype(np.uint64).reshape(len(ids), 2)

    def _match(self, keys: Keys, logits: npt.NDArray[Any], wanted: Keys) -> Int64:
        """The file's row of each wanted id, -1 where there is none; the same id twice must say the same."""
        self._same_logits(keys, logits, np.arange(len(keys)))
        return rows_of(wanted, keys)

    def _same_logits(self, ids: Keys, logits: npt.NDArray[Any], rows: Int64) -> None:
        """Of the samples ``ids``, whose answers stand in ``rows``: those that are there twice have one answer."""
        first, group = groups(ids)
        for again in np.flatnonzero(first[group] != np.arange(len(ids))).tolist():
            one, other = int(rows[first[group[again]]]), int(rows[again])
            if one != other and not np.array_equal(logits[one], logits[other], equal_nan=True):
                high, low = ids[again].tolist()
                text = f"{self.path}: the id {high:016x}{low:016x} stands in rows {one} and {other} with other logits."
                raise self._wrong(text, "Equal samples are one sample, whose answer must be one.")

    def choose(self, columns: Int64 | None) -> None:
        """Give these columns from now on, which are the classes of the data in their order; None: all, as they stand.

        Raises: UsageError where a sample has no finite number among them.
        """
        self.columns = columns
        if columns is None:
            return
        for start in range(0, len(self._rows), _PIECE):
            rows = self._rows[start : start + _PIECE]
            bad = np.flatnonzero(~np.isfinite(np.asarray(self._logits[rows])[:, columns]).any(axis=1))
            if len(bad):
                high, low = self._ids[start + bad[0]].tolist()
                text = f"{self.path} has no finite number for any class of the data for the sample {high:016x}{low:016x} (its row {rows[bad[0]]})."
                raise self._wrong(text)

    def _check(self, data: Data) -> None:
        absent = np.flatnonzero(self._rows < 0)
        if len(absent):
            shown = ", ".join(f"{h:016x}{low:016x}" for h, low in data.train.ids[absent[:3]].tolist())
            text = f"{self.path} has no logits for {len(absent):,} of {len(self._rows):,} training samples (the first: {shown})."
            raise UsageError(Problem(WHERE, text, "`limbeck label RECIPE --ids FILE.csv` writes the id of every sample."))
        for start in range(0, len(self._rows), _PIECE):
            rows = self._rows[start : start + _PIECE]
            piece = np.asarray(self._logits[rows])
            finite = np.isfinite(piece)
            bad = np.flatnonzero(~(finite | (piece == -np.inf)).all(axis=1) | ~finite.any(axis=1))  # of a row of -inf nothing can be told
            if len(bad):
                high, low = data.train.ids[start + bad[0]].tolist()
                raise UsageError(
                    Problem(WHERE, f"{self.path} has NaN or infinity for the sample {high:016x}{low:016x} (its row {rows[bad[0]]}).")
                )

    def ahead(self, coming: Coming, asked: Asking) -> Coming:
        return coming

    def __call__(self, batch: Batch, needs: Needs) -> Signal:
        at = np.searchsorted(self._high, batch.ids[:, 0])
        found = self._order[np.minimum(at, len(self._order) - 1)]
        for i in np.flatnonzero((self._ids[found] != batch.ids).any(axis=1)).tolist():  # equal first words
            found[i] = int(np.flatnonzero((self._ids == batch.ids[i]).all(axis=1))[0])
        logits = np.asarray(self._logits[self._rows[found]], dtype=np.float64 if self._logits.dtype == np.float64 else np.float32)
        self.hits += len(batch)
        if self.columns is not None:
            logits = logits[:, self.columns]
        return Signal(torch.from_numpy(np.ascontiguousarray(logits)).to(self.device))


def _said(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def write_ids(data: Data, file: Path) -> int:
    """``split,row,id,label`` of every sample, as CSV: what logits computed elsewhere are keyed by. Returns the number of samples."""
    import csv

    count = 0
    with open(file, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["split", "row", "id", "label"])
        for split in (data.train, data.valid, data.test):
            for row, (high, low), label in zip(split.rows.tolist(), split.ids.tolist(), split.labels.tolist(), strict=True):
                writer.writerow([split.name, row, f"{high:016x}{low:016x}", data.classes[label] if label >= 0 else ""])
                count += 1
    return count
