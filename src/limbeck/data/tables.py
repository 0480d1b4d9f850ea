"""Tables: CSV, JSON Lines and Parquet files, or folders of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.data.arrays import may_unfold_to
from limbeck.data.ids import bytes_id, from_digests, text_ids
from limbeck.data.labels import Labels, from_array, from_column
from limbeck.data.sources import EncodedImages, Texts
from limbeck.data.splits import SKIPPED, Part, Role
from limbeck.errors import Problem, listed, nearest
from limbeck.pixels import Undecodable, inspect

if TYPE_CHECKING:
    import pyarrow as pa

    from limbeck.recipe import DataSpec

__all__ = ["SUFFIXES", "part_from_table", "read_parquet", "read_tables", "split_of"]

SUFFIXES = {"csv": (".csv", ".tsv"), "jsonl": (".jsonl", ".ndjson", ".json"), "parquet": (".parquet", ".pq")}

_COLUMNS = 10_000  # of a CSV file: each takes kilobytes, however little is in it
_DEPTH = 500

_SPLIT_NAMES: dict[str, Role] = {
    "train": "train", "training": "train",
    "test": "test",
    "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "unlabelled": "unlabelled", "unlabeled": "unlabelled", "unsupervised": "unlabelled",
}  # fmt: skip


def split_of(name: str) -> Role | None:
    """The split that a file or hub split is named after, e.g. ``train-00000-of-00002``, or None."""
    return _SPLIT_NAMES.get(re.split(r"[^a-z]", name.lower())[0])


def read_tables(
    form: str, path: Path, role: Role | None, spec: DataSpec, task: str, notes: list[str], problems: list[Problem]
) -> tuple[dict[Role, Part], tuple[str, ...] | None]:
    """The splits of a table file or folder, and the class names where its metadata has them.

    In a folder, files or sub-folders named after splits (``train-0.parquet``, ``test/``) are those splits; otherwise all are one split.
    """
    if not os.path.exists(path):
        problems.append(Problem(str(path), "there is no such file.", nearest(path.name, _neighbours(path))))
        return {}, None
    files = [path]
    if path.is_dir():
        seen = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES[form] and not p.name.startswith((".", "_")))
        files = sorted(p for p in seen if p.is_file())
        if not files:
            problems.append(Problem(str(path), f"there is no file ending in {' or '.join(SUFFIXES[form])} in this folder."))
            return {}, None
    grouped: dict[Role, list[Path]] = {}
    named = {f: _split_of_file(f, path) for f in files} if path.is_dir() and role is None else {}
    if any(v == "train" for v in named.values()):
        for file, split in named.items():
            if split is None:
                problems.append(Problem(str(file), "its name says no split, and other files' names do (train, test, valid, unlabelled)."))
            else:
                grouped.setdefault(split, []).append(file)
    else:
        grouped = {role or "train": files}
    parts: dict[Role, Part] = {}
    classes: tuple[str, ...] | None = None
    for split, members in grouped.items():
        tables = [t for t in (_read(form, f, spec, problems) for f in members) if t is not None]
        if len(tables) < len(members):
            continue
        where = str(members[0] if len(members) == 1 else path)
        table = _concatenate(tables, where, problems)
        if table is None:
            continue
        classes = classes or _stored_classes(table, spec.label)
        part = part_from_table(table, where, split, spec, task, notes, problems, first_row=2 if form == "csv" else 1)
        if part is not None:
            parts[split] = part
    return parts, classes


def _neighbours(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir()] if os.path.isdir(path.parent) else []


def _split_of_file(file: Path, root: Path) -> Role | None:
    for name in (file.stem, *(p.name for p in file.relative_to(root).parents)):
        found = split_of(name)
        if found is not None:
            return found
    return None


def _read(form: str, path: Path, spec: DataSpec, problems: list[Problem]) -> pa.Table | None:
    import pyarrow as pa

    readers: dict[str, Callable[[Path, DataSpec], pa.Table]] = {"csv": _read_csv, "jsonl": _read_jsonl, "parquet": _read_parquet}
    try:
        return readers[form](path, spec)
    except (pa.ArrowException, OSError, ValueError) as error:
        text = str(error).strip().splitlines()
        problems.append(Problem(str(path), f"cannot be read as {form}: {text[0] if text else type(error).__name__}."))
        return None


def _read_csv(path: Path, spec: DataSpec) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True)
    wanted = [c for c in (spec.text, spec.text_pair or "text_pair", spec.label) if c]
    convert = csv.ConvertOptions(column_types={c: pa.string() for c in wanted}, strings_can_be_null=False)
    with open(path, "rb") as f:
        columns = 1 + f.readline(64 << 20).count(parse.delimiter.encode())
    if columns > _COLUMNS:
        raise ValueError(f"its first line has {columns:,} columns, and at most {_COLUMNS:,} are read")
    # one block: a quoted field may be longer than the default block of 1 MiB
    block = max(1 << 20, min(path.stat().st_size + 1, (1 << 31) - 1))
    return csv.read_csv(path, csv.ReadOptions(block_size=block), parse, convert)


def _read_jsonl(path: Path, spec: DataSpec) -> pa.Table:
    from pyarrow import json as arrow_json

    _check_depth(path)
    block = max(1 << 20, min(path.stat().st_size + 1, (1 << 31) - 1))
    return arrow_json.read_json(path, arrow_json.ReadOptions(block_size=block))


def _check_depth(path: Path) -> None:
    """Refuse JSON nested so deep that Arrow's reader, which goes down by one call a level, would end the process.

    Raises: ValueError.
    """
    with open(path, "rb") as f:
        for number, row in enumerate(f, start=1):
            if row.count(b"[") + row.count(b"{") > _DEPTH:  # or a text with many brackets
                try:
                    json.loads(row)
                except RecursionError:
                    raise ValueError(f"line {number:,} is nested too deep") from None


def _read_parquet(path: Path, spec: DataSpec) -> pa.Table:
    return read_parquet(path)


def read_parquet(path: Path) -> pa.Table:
    """A Parquet file, piece by piece: a few bytes may say that one value stands in any number of rows.

    Raises:
        pa.ArrowException, OSError: it cannot be read.
        ValueError: it takes more memory than a file of its size may.
    """
    import pyarrow as pa
    from pyarrow import parquet

    most, taken, batches = may_unfold_to(path.stat().st_size), 0, []
    with parquet.ParquetFile(path) as file:
        for read in file.iter_batches(batch_size=1 << 14):
            # a dictionary counts once here, and for every row when its texts are wanted
            columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in read.columns]
            batch = pa.record_batch(columns, names=read.schema.names)
            taken += batch.nbytes
            if taken > most:
                raise ValueError(f"its {path.stat().st_size:,} bytes unfold to more than {most:,}")
            batches.append(batch)
        table = pa.Table.from_batches(batches) if batches else file.schema_arrow.empty_table()
        return table.replace_schema_metadata(file.schema_arrow.metadata)


def _concatenate(tables: list[pa.Table], where: str, problems: list[Problem]) -> pa.Table | None:
    import pyarrow as pa

    try:
        return tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        problems.append(Problem(where, f"the files have different columns or types: {str(error).splitlines()[0]}."))
        return None


def _stored_classes(table: pa.Table, label: str) -> tuple[str, ...] | None:
    """ClassLabel names that the ``datasets`` library left in the schema."""
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label].get("names")
        return tuple(str(n) for n in names) if names else None
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def part_from_table(
    table: pa.Table, where: str, role: Role, spec: DataSpec, task: str, notes: list[str], problems: list[Problem], *, first_row: int = 1
) -> Part | None:
    """One split from a table: texts (and pairs) or encoded images, with labels unless it is unlabelled. Problems are added."""
    columns = table.column_names
    image = _image_column(table, spec) if task.startswith("image") else None
    wanted = [] if image else [spec.text]
    wanted += [spec.text_pair] if spec.text_pair else []
    wanted += [spec.label] if role != "unlabelled" else []
    missing = [c for c in wanted if c not in columns]
    for column in missing:
        key = {spec.text: "data.text", spec.label: "data.label"}.get(column, "data.text_pair")
        message = f"there is no column '{column}' ({key}); there are {listed(columns)}."
        problems.append(Problem(where, message, nearest(column, columns)))
    doubled = sorted({c for c in wanted if columns.count(c) > 1})
    if doubled:
        problems.append(Problem(where, f"column {listed(doubled)} occurs twice."))
    if missing or doubled:
        return None
    labels = None
    if role != "unlabelled":
        labels = _labels(table.column(spec.label), f"{where}: {spec.label}", problems, first_row)
        if labels is None:
            return None
    if image:
        return _image_part(table.column(image), where, labels, spec, notes, problems)
    return _text_part(table, where, labels, spec, notes, problems, first_row)


def _labels(column: Any, where: str, problems: list[Problem], first_row: int) -> Labels | None:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_integer(kind) and not column.null_count:
        read = from_array(column.to_numpy(), where, problems)
        return None if read is None else Labels(where, read.values, as_values=True)
    return from_column(column.to_pylist(), where, problems, first_row=first_row)


def _strings(table: pa.Table, name: str, where: str, problems: list[Problem]) -> list[str | None] | None:
    import pyarrow as pa

    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_null(column.type)):
        problems.append(Problem(where, f"column '{name}' holds {column.type}; text is expected."))
        return None
    values: list[str | None] = column.to_pylist()
    return values


def _text_part(
    table: pa.Table, where: str, labels: Labels | None, spec: DataSpec, notes: list[str], problems: list[Problem], first_row: int
) -> Part | None:
    pair_name = spec.text_pair or ("text_pair" if "text_pair" in table.column_names else None)
    texts = _strings(table, spec.text, where, problems)
    pairs = _strings(table, pair_name, where, problems) if pair_name else None
    if texts is None or (pair_name and pairs is None):
        return None
    skipped: tuple[tuple[str, str], ...] = ()
    present = np.array([t is not None and (pairs is None or pairs[i] is not None) for i, t in enumerate(texts)], dtype=bool)
    if not present.all():
        rows = listed([str(r + first_row) for r in np.flatnonzero(~present)[:5].tolist()])
        message = f"{int((~present).sum()):,} rows have no text (rows {rows})."
        if spec.corrupt == "fail":
            problems.append(Problem(where, message, "Fill them, or leave them out with data.corrupt: skip."))
            return None
        notes.append(f"{where}: {message} They were skipped (all in {SKIPPED}).")
        skipped = tuple((f"{where}: row {row + first_row}", "it has no text") for row in np.flatnonzero(~present).tolist())
        kept = np.flatnonzero(present).tolist()
        texts = [texts[i] for i in kept]
        pairs = None if pairs is None else [pairs[i] for i in kept]
        labels = None if labels is None else Labels(labels.where, labels.values[present], labels.as_values)
    whole = [t or "" for t in texts]
    empty = sum(not t.strip() for t in whole)
    if empty:
        notes.append(f"{where}: {empty:,} of {len(whole):,} rows have an empty text.")
    return Part(where, Texts(whole, pairs), text_ids(whole, pairs), labels, skipped=skipped)


def _image_column(table: pa.Table, spec: DataSpec) -> str | None:
    import pyarrow as pa

    def encoded(kind: Any) -> bool:
        struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        return bool(struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    found = [f.name for f in table.schema if encoded(f.type)]
    return next((n for n in (spec.text, "image", "img", *found) if n in found), None)


def _image_part(column: Any, where: str, labels: Labels | None, spec: DataSpec, notes: list[str], problems: list[Problem]) -> Part | None:
    source = EncodedImages(column, 3, Path(where).parent)
    digests, sizes, kept = [], [], []
    skipped: list[tuple[str, str]] = []
    channels = 1
    for row in range(len(source)):
        try:
            content = source.content(row)
            height, width, depth = inspect(content)
        except (Undecodable, OSError, TypeError, KeyError) as error:
            skipped.append((f"{where}: row {row}", str(error)))
            continue
        digests.append(bytes_id(content))
        sizes.append((height, width))
        kept.append(row)
        channels = max(channels, depth)
    if skipped:
        bad = [f"{sample.removeprefix(f'{where}: ')} ({why})" for sample, why in skipped]
        if spec.corrupt == "fail":
            message = f"{len(bad):,} images cannot be read: {listed(bad, 1000)}."
            problems.append(Problem(where, message, "Remove them, or leave them out with data.corrupt: skip."))
            return None
        notes.append(f"{where}: {len(bad):,} images that cannot be read were skipped (all in {SKIPPED}): {listed(bad, 20)}.")
        column = column.take(np.array(kept, dtype=np.int64))
        labels = None if labels is None else Labels(labels.where, labels.values[kept], labels.as_values)
    size = sizes[0] if len(set(sizes)) == 1 else None
    source = EncodedImages(column, channels, Path(where).parent)
    return Part(where, source, from_digests(digests), labels, size=size, channels=channels, skipped=tuple(skipped))
