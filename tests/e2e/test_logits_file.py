"""Teachers that are only numbers: logits that were computed elsewhere."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limbeck.data import Data, load_data
from limbeck.recipe import DataSpec
from running import limbeck, make_folder, read, recipe, run, weights


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_folder(tmp_path)


def data_of(here: Path) -> Data:
    return load_data(DataSpec(source="npz:pictures.npz"), "image-classification", here)


def answers(data: Data, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Any logits, by split, as far from a model's as can be."""
    rng = np.random.default_rng(seed)
    return {s.name: rng.normal(size=(len(s), 3)).astype(np.float32) * 3 for s in (data.train, data.test)}


def hexadecimal(ids: np.ndarray[Any, Any]) -> list[str]:
    return [f"{high:016x}{low:016x}" for high, low in ids.tolist()]


def parquet(file: Path, columns: dict[str, Any], logits: np.ndarray[Any, Any], classes: str | None = None) -> Path:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), logits.shape[1])
    table = pa.table({**columns, "logits": lists})
    pq.write_table(table.replace_schema_metadata({"classes": classes} if classes else None), file)
    return file


def taught(here: Path, file: str, name: str, **changes: Any) -> dict[str, Any]:
    return run("distill", recipe(here, teacher={"model": f"logits:{file}"}, **changes), out=here / name)


def test_the_ways_to_write_the_same_answers_teach_the_same(here: Path) -> None:
    """.npy by row; .parquet by row, by id in any order, and with the classes in another order."""
    data = data_of(here)
    said = answers(data)
    by_row = np.empty_like(said["train"])
    by_row[data.train.rows] = said["train"]
    np.save(here / "rows.npy", by_row)
    shuffled = np.random.default_rng(1).permutation(len(by_row))
    parquet(here / "rows.parquet", {"row": shuffled}, by_row[shuffled])
    ids, both = hexadecimal(np.concatenate([data.train.ids, data.test.ids])), np.concatenate([said["train"], said["test"]])
    parquet(here / "ids.parquet", {"id": [ids[i] for i in np.argsort(ids)]}, both[np.argsort(ids)])
    trained = {name: taught(here, name, f"run-{name}") for name in ("rows.npy", "rows.parquet", "ids.parquet")}
    assert len({str(sorted(weights(here / f"run-{name}" / "student").items())) for name in trained}) == 1
    for name, metrics in trained.items():
        assert metrics["cost"]["teacher_items"] == 0
        assert metrics["cost"]["cache_hits"] == 2 * 48
        assert ("teacher" in metrics["models"]) == (name == "ids.parquet"), name
    teacher = trained["ids.parquet"]["models"]["teacher"]
    assert teacher["metrics"]["accuracy"] == np.mean(said["test"].argmax(1) == data.test.labels)
    assert teacher["from"] == str(here / "ids.parquet")
    assert teacher["latency_ms"] is None
    assert trained["rows.npy"]["gap_closed"] is None
    assert "accuracy is unknown" in trained["rows.npy"]["verdict"]
    assert (here / "run-rows.npy/report.html").is_file()


def test_what_a_file_says_is_what_the_loss_sees(here: Path) -> None:
    """With the answers of a real teacher in the file, the student ends as with that teacher, kept in 32 bits."""
    run("train", recipe(here, "teacher.yaml", teacher=None, student={"model": "python:nets.py:teacher"}), out=here / "teacher")
    cached = {"teacher_cache": {"path": "kept", "codec": "float32"}, "teacher": {"model": "run:teacher"}}
    run("distill", recipe(here, "cached.yaml", **cached), out=here / "cached")
    data, rows = data_of(here), {}
    for part in (here / "kept").glob("*/v*.arrow"):
        table = pa.ipc.open_file(pa.memory_map(str(part))).read_all()
        rows |= {(i, m): v for i, m, v in zip(*(table.column(n).to_pylist() for n in ("id", "id_more", "logits")), strict=True)}
    logits = np.array([rows[int(high), int(low) >> 56] for high, low in data.train.ids.tolist()], dtype=np.float32)
    parquet(here / "told.parquet", {"id": hexadecimal(data.train.ids)}, logits)
    taught(here, "told.parquet", "told")
    assert weights(here / "told/student") == weights(here / "cached/student")


def test_classes_named_in_another_order_are_mapped(here: Path) -> None:
    folder = here / "images"
    from PIL import Image

    data = data_of(here)
    for split, name in ((data.train, "train"), (data.test, "test")):
        for i, (label, image) in enumerate(zip(split.labels, split.read(np.arange(len(split))), strict=True)):
            place = folder / name / ("ant", "bee", "cat")[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(place / f"{i}.png")
    own = {"data": {"source": "imagefolder:images"}}
    found = load_data(DataSpec(source="imagefolder:images"), "image-classification", here)
    logits = np.random.default_rng(0).normal(size=(len(found.train), 3)).astype(np.float32)
    parquet(here / "named.parquet", {"id": hexadecimal(found.train.ids)}, logits, '["ant", "bee", "cat"]')
    parquet(here / "turned.parquet", {"id": hexadecimal(found.train.ids)}, logits[:, [2, 0, 1]], '["cat", "ant", "bee"]')
    for name in ("named", "turned"):
        taught(here, f"{name}.parquet", name, **own)
    assert weights(here / "named/student") == weights(here / "turned/student")


def test_ids_of_every_sample_can_be_had(here: Path) -> None:
    assert limbeck("label", recipe(here), "--ids", here / "ids.csv") == 0
    lines = (here / "ids.csv").read_text().splitlines()
    data = data_of(here)
    assert lines[0] == "split,row,id,label"
    assert [line.split(",")[2] for line in lines[1 : 1 + len(data.train)]] == hexadecimal(data.train.ids)
    assert len(lines) == 1 + 48 + 12 + 18


class Opened:
    """Says that it was, when a pickle of it is read."""

    def __reduce__(self) -> Any:
        return Path.write_text, (Path("opened"), "by a pickle")


def header(text: str) -> bytes:
    """A .npy file with this header and no data."""
    raw = text.encode()
    return b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw


NPY: dict[str, tuple[Any, str]] = {
    "too few rows": (lambda said: said[:-1], "(47, 3)"),
    "no rows": (lambda said: said[:0], "cannot be read as .npy|(0, 3)"),
    "no classes": (lambda said: said[:, :0], "cannot be read as .npy|(48, 0)"),
    "one dimension": (lambda said: said[:, 0], "float32 of (48,)"),
    "three dimensions": (lambda said: said[None], "(1, 48, 3)"),
    "integers": (lambda said: said.astype(int), "int64"),
    "complex numbers": (lambda said: said.astype(complex), "complex128"),
    "text": (lambda said: said.astype(str), "<U"),
    "named fields": (lambda said: np.zeros(48, dtype=[("a", float)]), "(48,)"),
    "objects": (lambda said: said.astype(object), "cannot be read as .npy"),
    "other classes": (lambda said: np.concatenate([said, said], axis=1), "6 outputs and the data has 3 classes"),
    "a NaN": (lambda said: np.where(np.arange(3) == 1, np.nan, said), "NaN or infinity for the sample"),
    "no finite number": (lambda said: np.where(np.arange(48)[:, None] == 4, -np.inf, said), "NaN or infinity for the sample"),
}
BYTES: dict[str, tuple[Any, str]] = {
    "an empty file": (lambda whole: b"", "cannot be read as .npy"),
    "a truncated magic": (lambda whole: whole[:4], "cannot be read as .npy"),
    "a truncated header": (lambda whole: whole[:40], "cannot be read as .npy"),
    "truncated data": (lambda whole: whole[:-8], "cannot be read as .npy"),
    "a plain pickle": (lambda whole: pickle.dumps(Opened()), "cannot be read as .npy"),
    "no version": (lambda whole: whole[:6] + b"\x09\x09" + whole[8:], "cannot be read as .npy"),
    "a header that is no mapping": (lambda whole: header("[1, 2]\n"), "cannot be read as .npy"),
    "a header that is no Python": (lambda whole: header("{'descr': (((\n"), "cannot be read as .npy"),
    "a header with a wrong type": (
        lambda whole: header("{'descr': 'zz', 'fortran_order': False, 'shape': (48, 3)}\n"),
        "cannot be read as .npy",
    ),
    "a header with a wrong shape": (lambda whole: header("{'descr': '<f4', 'fortran_order': False, 'shape': (-48, 3)}\n"), "wrong.npy"),
    "a huge shape": (
        lambda whole: header("{'descr': '<f4', 'fortran_order': False, 'shape': (48, 1" + 30 * "0" + ")}\n"),
        "cannot be read as .npy",
    ),
}


def floats(said: Any) -> Any:
    return pa.array(list(said), pa.list_(pa.float32()))


PARQUET: dict[str, tuple[Any, str]] = {
    "a sample missing": (lambda ids, said: {"id": ids[1:], "logits": floats(said[1:])}, "no logits for 1 of 48"),
    "no key": (lambda ids, said: {"name": ids, "logits": floats(said)}, "logits, and id or row, are wanted"),
    "no logits": (lambda ids, said: {"id": ids}, "logits, and id or row, are wanted"),
    "no rows": (lambda ids, said: {"id": pa.array([], pa.string()), "logits": floats(said[:0])}, "has no rows"),
    "short ids": (lambda ids, said: {"id": [i[:8] for i in ids], "logits": floats(said)}, "32 hexadecimal digits"),
    "ids that are long and short": (
        lambda ids, said: {"id": [ids[0] + ids[1][:2], ids[1][2:], *ids[2:]], "logits": floats(said)},
        "32 hexadecimal digits in every row: row 0",
    ),
    "ids with spaces": (lambda ids, said: {"id": [f"{i[:30]}  " for i in ids], "logits": floats(said)}, "32 hexadecimal digits"),
    "an id that is null": (lambda ids, said: {"id": [None, *ids[1:]], "logits": floats(said)}, "row 0 has None"),
    "ids that are numbers": (lambda ids, said: {"id": list(range(48)), "logits": floats(said)}, "but int64"),
    "ids that are bytes": (lambda ids, said: {"id": [i.encode() for i in ids], "logits": floats(said)}, "but binary"),
    "two answers": (lambda ids, said: {"id": [*ids, ids[0]], "logits": floats([*said, said[0] + 1])}, "with other logits"),
    "a row twice": (lambda ids, said: {"row": [0, *range(47)], "logits": floats(said)}, "numbers twice"),
    "a row beyond": (lambda ids, said: {"row": [*range(47), 48], "logits": floats(said)}, "numbers twice, or beyond"),
    "rows that are floats": (lambda ids, said: {"row": np.arange(48) + 0.5, "logits": floats(said)}, "the column row has double"),
    "rows that are text": (lambda ids, said: {"row": [str(i) for i in range(48)], "logits": floats(said)}, "the column row has string"),
    "a row that is null": (lambda ids, said: {"row": [None, *range(1, 48)], "logits": floats(said)}, "the column row has 1 nulls"),
    "uneven": (lambda ids, said: {"id": ids, "logits": floats([*said[:-1], said[0][:2]])}, "the same number of values"),
    "logits that are null": (lambda ids, said: {"id": ids, "logits": floats([None, *said[1:]])}, "none may be null"),
    "a logit that is null": (
        lambda ids, said: {"id": ids, "logits": pa.array([[None, 1.0, 2.0], *said[1:].tolist()], pa.list_(pa.float32()))},
        "none may be null",
    ),
    "logits that are no lists": (lambda ids, said: {"id": ids, "logits": said[:, 0]}, "the column logits has float; lists of floats"),
    "logits that are texts": (lambda ids, said: {"id": ids, "logits": said.astype(str).tolist()}, "lists of floats are wanted"),
    "logits that are whole numbers": (lambda ids, said: {"id": ids, "logits": said.astype(int).tolist()}, "lists of floats are wanted"),
    "lists of lists": (lambda ids, said: {"id": ids, "logits": [[row] for row in said.tolist()]}, "lists of floats are wanted"),
    "other classes": (lambda ids, said: {"id": ids, "logits": floats(np.concatenate([said, said], 1))}, "6 outputs and the data has 3"),
    "no classes": (lambda ids, said: {"id": ids, "logits": floats(said[:, :0])}, "at least one, and none may be null"),
}
CLASSES: dict[str, tuple[str, str]] = {
    "no JSON": ("ant, bee, cat", "a JSON list of names is wanted"),
    "no list": ('"ant"', "a JSON list of names is wanted"),
    "a mapping": ('{"ant": 0}', "a JSON list of names is wanted"),
    "lists": ('[["ant"], ["bee"], ["cat"]]', "a JSON list of names is wanted"),
    "of another length": ('["ant", "bee"]', "has 2 names, and each row has 3 logits"),
}
OTHERS: dict[str, str] = {
    "no file": "no such file",
    "another kind": "a .npy or a .parquet file",
    "a folder.npy": "is a folder, expected a file",
    "a folder.parquet": "is a folder, expected a file",
    "an archive": "cannot be read as .npy",
    "an empty Parquet file": "cannot be read as Parquet",
    "a truncated Parquet file": "cannot be read as Parquet",
    "a Parquet file that is none": "cannot be read as Parquet",
}


def _others(here: Path, what: str) -> str:
    data = data_of(here)
    said = answers(data)["train"]
    match what:
        case "no file":
            return "gone.npy"
        case "another kind":
            (here / "wrong.csv").write_text("x")
            return "wrong.csv"
        case "a folder.npy" | "a folder.parquet":
            (here / f"wrong{Path(what).suffix}").mkdir()
            return f"wrong{Path(what).suffix}"
        case "an archive":
            np.savez(here / "wrong.npz", said)
            (here / "wrong.npz").rename(here / "wrong.npy")
            return "wrong.npy"
    whole = parquet(here / "wrong.parquet", {"id": hexadecimal(data.train.ids)}, said).read_bytes()
    wrong = {"an empty Parquet file": b"", "a truncated Parquet file": whole[:-20], "a Parquet file that is none": b"PAR1" * 9}[what]
    (here / "wrong.parquet").write_bytes(wrong)
    return "wrong.parquet"


WRONG = [
    *(("npy", what) for what in NPY),
    *(("bytes", what) for what in BYTES),
    *(("parquet", what) for what in PARQUET),
    *(("classes", what) for what in CLASSES),
    *(("others", what) for what in OTHERS),
]


def _wrong(here: Path, kind: str, what: str) -> tuple[str, str]:
    """A file that cannot teach, and what is said of it."""
    data = data_of(here)
    said, ids = answers(data)["train"], hexadecimal(data.train.ids)
    match kind:
        case "npy":
            np.save(here / "wrong.npy", NPY[what][0](said), allow_pickle=True)
            return "wrong.npy", NPY[what][1]
        case "bytes":
            np.save(here / "wrong.npy", said)
            (here / "wrong.npy").write_bytes(BYTES[what][0]((here / "wrong.npy").read_bytes()))
            return "wrong.npy", BYTES[what][1]
        case "parquet":
            pq.write_table(pa.table(PARQUET[what][0](ids, said)), here / "wrong.parquet")
            return "wrong.parquet", PARQUET[what][1]
        case "classes":
            parquet(here / "wrong.parquet", {"id": ids}, said, CLASSES[what][0])
            return "wrong.parquet", CLASSES[what][1]
    return _others(here, what), OTHERS[what]


@pytest.mark.parametrize(("kind", "what"), WRONG)
def test_a_file_that_cannot_teach_is_refused_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], kind: str, what: str
) -> None:
    """With a sentence, and exit code 2; no pickle in it is opened."""
    file, told = _wrong(here, kind, what)
    assert limbeck("distill", recipe(here, teacher={"model": f"logits:{file}"}), "--out", here / "run") == 2
    said = capsys.readouterr().err
    assert any(text in said for text in told.split("|")), said
    assert file in said
    assert "Traceback" not in said
    assert not (here / "run").exists()
    assert not (here / "opened").exists()


@pytest.mark.parametrize("kind", ["float16", "float64", ">f4"])
def test_floats_of_any_size_teach(here: Path, kind: str) -> None:
    said = answers(data_of(here))["train"].astype(kind)
    np.save(here / "rows.npy", said)
    assert taught(here, "rows.npy", "npy")["cost"]["cache_hits"] == 2 * 48
    if kind != ">f4":  # Arrow has no such numbers
        parquet(here / "rows.parquet", {"row": np.arange(48)}, said)
        assert taught(here, "rows.parquet", "parquet")["cost"]["cache_hits"] == 2 * 48
        assert weights(here / "npy/student") == weights(here / "parquet/student")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": {"augment": {"crop": 1}}}, "data.augment"),
        ({"teacher": {"model": "logits:rows.npy", "precision": "bf16"}}, "teacher.precision"),
        ({"teacher_cache": {"views": 2}}, "teacher_cache"),
        ({"objective": [{"loss": "hint", "student": "body", "teacher": "body"}]}, "has logits alone"),
        ({"student": {"model": "logits:rows.npy"}}, "cannot be trained"),
    ],
)
def test_what_a_file_cannot_do_is_refused(here: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], told: str) -> None:
    np.save(here / "rows.npy", answers(data_of(here))["train"])
    assert limbeck("distill", recipe(here, **{"teacher": {"model": "logits:rows.npy"}, **changes}), "--out", here / "run") == 2
    assert told in capsys.readouterr().err


def test_a_resume_needs_the_same_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_of(here)
    np.save(here / "rows.npy", answers(data)["train"])
    metrics = taught(here, "rows.npy", "run")
    (here / "run/report.html").unlink()  # as if it had been killed before its last file
    np.save(here / "rows.npy", answers(data, 1)["train"])
    assert limbeck("distill", "--out", here / "run", "--resume") == 2
    assert "the teacher changed" in capsys.readouterr().err
    assert read(here / "run/metrics.json") == metrics


def test_equal_samples_have_one_answer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of a .npy file that are of one and the same picture."""
    with np.load(here / "pictures.npz") as file:
        arrays = dict(file)
    arrays["train_x"][7], arrays["train_y"][7] = arrays["train_x"][3], arrays["train_y"][3]
    np.savez(here / "pictures.npz", **arrays)
    said = np.random.default_rng(0).normal(size=(len(arrays["train_x"]), 3)).astype(np.float32)
    np.save(here / "rows.npy", said)
    assert limbeck("distill", recipe(here, teacher={"model": "logits:rows.npy"}), "--out", here / "run") == 2
    assert "stands in rows 3 and 7 with other logits" in capsys.readouterr().err
    said[7] = said[3]
    np.save(here / "rows.npy", said)
    assert taught(here, "rows.npy", "run")["cost"]["teacher_items"] == 0


def test_an_answer_says_something_of_the_classes_of_the_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """-inf for every class that the data has, and a number for one that it has not."""
    with np.load(here / "pictures.npz") as file:
        np.savez(here / "named.npz", **file, classes=np.array(["ant", "bee", "cat"]))
    data = data_of(here)
    said = np.concatenate([answers(data)["train"], np.zeros((len(data.train), 1), np.float32)], axis=1)
    said[5, :3] = -np.inf
    names, own = '["ant", "bee", "cat", "dog"]', {"data": {"source": "npz:named.npz"}}
    parquet(here / "four.parquet", {"row": data.train.rows}, said, names)
    assert limbeck("distill", recipe(here, teacher={"model": "logits:four.parquet"}, **own), "--out", here / "run") == 2
    told = capsys.readouterr().err
    assert "no finite number for any class of the data for the sample " + hexadecimal(data.train.ids[5:6])[0] in told
    said[5, 0] = 1.0
    parquet(here / "four.parquet", {"row": data.train.rows}, said, names)
    assert taught(here, "four.parquet", "run", **own)["cost"]["cache_hits"] == 2 * 48


def test_there_is_nothing_to_compare_with_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(here / "rows.npy", answers(data_of(here))["train"])
    asked = ("--verify-cache", "4", "--out", here / "run")
    assert limbeck("distill", recipe(here, teacher={"model": "logits:rows.npy"}), *asked) == 2
    assert "--verify-cache: has nothing to compare" in capsys.readouterr().err
    assert not (here / "run").exists()
