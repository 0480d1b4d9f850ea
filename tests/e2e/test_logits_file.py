"""Teachers that are only numbers: logits that were computed elsewhere."""

from __future__ import annotations

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


def _wrong(here: Path, what: str) -> str:
    data = data_of(here)
    said, ids = answers(data)["train"], hexadecimal(data.train.ids)
    match what:
        case "too few rows":
            np.save(here / "wrong.npy", said[:-1])
        case "integers":
            np.save(here / "wrong.npy", said.astype(int))
        case "a pickle":
            np.save(here / "wrong.npy", np.array([{"a": 1}] * 48, dtype=object), allow_pickle=True)
        case "other classes":
            np.save(here / "wrong.npy", np.concatenate([said, said], axis=1))
        case "a NaN":
            said[7, 1] = np.nan
            np.save(here / "wrong.npy", said)
        case "a sample missing":
            parquet(here / "wrong.parquet", {"id": ids[1:]}, said[1:])
        case "no key":
            parquet(here / "wrong.parquet", {"name": ids}, said)
        case "short ids":
            parquet(here / "wrong.parquet", {"id": [i[:8] for i in ids]}, said)
        case "two answers":
            parquet(here / "wrong.parquet", {"id": [*ids, ids[0]]}, np.concatenate([said, said[:1] + 1]))
        case "a row twice":
            parquet(here / "wrong.parquet", {"row": [0, *range(47)]}, said)
        case "uneven":
            pq.write_table(pa.table({"id": ids, "logits": [[0.0]] * 47 + [[0.0, 1.0]]}), here / "wrong.parquet")
        case "no file":
            return "gone.npy"
        case "another kind":
            (here / "wrong.csv").write_text("x")
            return "wrong.csv"
    return "wrong.npy" if (here / "wrong.npy").exists() else "wrong.parquet"


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("too few rows", "(47, 3)"),
        ("integers", "int64"),
        ("a pickle", "cannot be read as .npy"),
        ("other classes", "6 outputs and the data has 3 classes"),
        ("a NaN", "NaN or infinity for the sample"),
        ("a sample missing", "no logits for 1 of 48"),
        ("no key", "logits, and id or row, are wanted"),
        ("short ids", "32 hexadecimal digits"),
        ("two answers", "with other logits"),
        ("a row twice", "numbers twice"),
        ("uneven", "the same number of values"),
        ("no file", "no such file"),
        ("another kind", "a .npy or a .parquet file"),
    ],
)
def test_a_file_that_cannot_teach_is_refused_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], what: str, told: str
) -> None:
    file = _wrong(here, what)
    assert limbeck("distill", recipe(here, teacher={"model": f"logits:{file}"}), "--out", here / "run") == 2
    said = capsys.readouterr().err
    assert told in said, said
    assert "Traceback" not in said
    assert not (here / "run").exists()


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
