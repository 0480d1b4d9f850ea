"""Every data source, its class names, and the sentences for what is wrong with it."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.data import Data, Split, load_data, skipped_csv
from limbeck.errors import LimbeckError, UsageError
from limbeck.pixels import Undecodable, decode
from limbeck.recipe import DataSpec

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path_factory.mktemp("home")))


def load(source: str, base: Path, task: str = "image-classification", **keys: Any) -> Data:
    return load_data(DataSpec(source=source, **keys), task, base)


def pixels(count: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, *(shape or (6, 5, 3))), dtype=np.uint8)


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path / "d.npz", **arrays)
    return "npz:d.npz"


def problems(call: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as e:
        call()
    assert all(p.message for p in e.value.problems)
    return str(e.value)


def test_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    data = load("digits", tmp_path)
    bundled = pytest.importorskip("sklearn.datasets").load_digits()
    assert data.classes == tuple("0123456789")
    assert (data.image_size, data.channels, data.kind) == ((8, 8), 1, "image")
    assert len(data.train) + len(data.valid) + len(data.test) == 1797
    for split in (data.train, data.valid, data.test):
        assert np.array_equal(np.asarray(split.read([0, 5]))[..., 0], np.rint(bundled.images[split.rows[[0, 5]]] * 255 / 16))
        assert np.array_equal(split.labels, bundled.target[split.rows])
    x = np.asarray(data.train.read(np.arange(len(data.train)))) / 255
    assert data.mean[0] == pytest.approx(x.mean(), abs=1e-12)
    assert data.std[0] == pytest.approx(x.std(), abs=1e-12)
    assert load("digits", tmp_path).fingerprint == data.fingerprint
    assert load("digits", tmp_path, seed=1).fingerprint != data.fingerprint


@pytest.mark.parametrize(("layout", "channels"), [("NHWC", 3), ("NCHW", 3), ("NHW", 1), ("NHW1", 1), ("N1HW", 1)])
def test_npz_layouts_are_the_same_images(tmp_path: Path, layout: str, channels: int) -> None:
    x = pixels(40, 6, 5, channels)
    given = {"NCHW": x.transpose(0, 3, 1, 2), "N1HW": x.transpose(0, 3, 1, 2), "NHW": x[..., 0]}.get(layout, x)
    y = np.arange(40) % 4
    data = load(npz(tmp_path, train_x=given, train_y=y, test_x=given[:8], test_y=y[:8], classes=np.array(list("wxyz"))), tmp_path)
    assert data.classes == ("w", "x", "y", "z")
    assert data.classes_known
    assert (data.channels, data.image_size) == (channels, (6, 5))
    assert np.array_equal(np.asarray(data.test.read(np.arange(8))), x[:8])
    from limbeck.data.ids import array_ids

    assert np.array_equal(data.test.ids, array_ids(x[:8]))
    assert any("same content as a row of the test split" in n for n in data.notes)


def test_npz_floats_strings_valid_and_unlabelled(tmp_path: Path) -> None:
    x = RNG.normal(size=(60, 7))
    y = np.array(["b", "a", "c"])[np.arange(60) % 3]
    source = npz(
        tmp_path, train_x=x[:30], train_y=y[:30], valid_x=x[30:40], valid_y=y[30:40], test_x=x[40:50], test_y=y[40:50], unlabelled_x=x[50:]
    )
    data = load(source, tmp_path)
    assert data.classes == ("a", "b", "c")
    assert data.shape == (7,)
    assert (len(data.train), len(data.valid), len(data.test)) == (40, 10, 10)
    assert (data.train.labels[30:] == -1).all()
    assert np.array_equal(np.asarray(data.train.read(np.arange(40))), np.concatenate([x[:30], x[50:]]))
    assert np.asarray(data.train.read([0])).dtype == np.float64
    assert (data.mean, data.image_size, data.channels) == ((), None, 0)


BAD_NPZ: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"train_y": np.arange(20) % 2 - 1}, "negative label"),
    "gap": ({"train_y": np.array([0, 2] * 10)}, "no training sample has label 1"),
    "from one": ({"train_y": np.arange(20) % 2 + 1}, "subtract 1"),
    "floats": ({"train_y": (np.arange(20) % 2).astype(float)}, "astype"),
    "nan": ({"train_y": np.full(20, np.nan)}, "NaN"),
    "one hot": ({"train_y": np.eye(2)[np.arange(20) % 2]}, "argmax"),
    "lengths": ({"train_y": np.arange(19) % 2}, "20 samples"),
    "one class": ({"train_y": np.zeros(20, int)}, "at least two classes"),
    "misspelt": ({"test_X": pixels(4), "test_y": np.arange(4) % 2}, "'test_x'"),
    "no test labels": ({"test_x": pixels(4)}, "no array 'test_y'"),
    "unseen": ({"test_x": pixels(4), "test_y": np.array([0, 1, 2, 0])}, "out of range"),
    "empty test": ({"test_x": pixels(0), "test_y": np.zeros(0, int)}, "test split is empty"),
    "objects": ({"train_y": np.array([0, "a"] * 10, dtype=object)}, "Python objects"),
    "other size of classes": ({"classes": np.array(["a", "b", "c"])}, "no training sample is of class c"),
    "classes doubled": ({"classes": np.array(["a", "a"])}, "given twice"),
    "integers": ({"train_x": pixels(20).astype(np.int64)}, "astype('uint8')"),
    "flat bytes": ({"train_x": pixels(20, 30)}, "is no image"),
    "nan samples": ({"train_x": np.full((20, 3), np.nan)}, "NaN or infinite"),
    "channels differ": ({"test_x": pixels(4, 6, 5, 1), "test_y": np.arange(4) % 2}, "different numbers of channels"),
    "kinds differ": ({"test_x": RNG.normal(size=(4, 3)), "test_y": np.arange(4) % 2}, "same kind"),
}


@pytest.mark.parametrize("name", BAD_NPZ)
def test_wrong_arrays_get_a_sentence(tmp_path: Path, name: str) -> None:
    arrays, message = BAD_NPZ[name]
    source = npz(tmp_path, **{"train_x": pixels(20), "train_y": np.arange(20) % 2, **arrays})
    assert message in problems(lambda: load(source, tmp_path))


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    source = npz(tmp_path, train_x=pixels(20), train_y=np.arange(20) % 2, test_x=pixels(4), test_y=np.zeros(3, int), valid_x=pixels(2))
    text = problems(lambda: load(source, tmp_path))
    assert "4 samples" in text
    assert "valid_y" in text


def test_unknown_sources_and_missing_files(tmp_path: Path) -> None:
    assert "Did you mean 'npz'?" in problems(lambda: load("npx:a.npz", tmp_path))
    assert "Did you mean 'digits'?" in problems(lambda: load("digit", tmp_path))
    npz(tmp_path, train_x=pixels(3))
    assert "Did you mean 'd.npz'?" in problems(lambda: load("npz:e.npz", tmp_path))
    assert "no such folder" in problems(lambda: load("imagefolder:nowhere", tmp_path))
    assert "no such file" in problems(lambda: load("csv:nowhere.csv", tmp_path, "text-classification"))
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    assert "cannot be read" in problems(lambda: load("npz:broken.npz", tmp_path))


# ---- tables


def write(path: Path, text: str | bytes) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def text_data(name: str, base: Path, **keys: Any) -> Data:
    return load(name, base, "text-classification", **keys)


def rows_of(*splits: Split) -> list[tuple[str, str | None, int]]:
    """(text, pair, label) of splits of one source, in the order of the file."""
    found: dict[int, tuple[str, str | None, int]] = {}
    for split in splits:
        for row, (text, pair), label in zip(split.rows, split.read(np.arange(len(split))), split.labels, strict=True):
            found[int(row)] = (text, pair, int(label))
    return [found[r] for r in sorted(found)]


def test_csv_with_bom_quotes_newlines_and_empty_text(tmp_path: Path) -> None:
    rows = ["good", '"said ""no"", then\nleft"', "", "null", "NA"] * 4
    labels = ["pos", "neg", "pos", "neg", "pos"] * 4
    write(
        tmp_path / "a.csv",
        b"\xef\xbb\xbf" + "".join(["text,label\r\n"] + [f"{t},{y}\r\n" for t, y in zip(rows, labels, strict=True)]).encode(),
    )
    write(tmp_path / "t.csv", "label,text\npos,x\nneg,y\n")
    data = text_data("csv:a.csv", tmp_path, test="t.csv")
    assert data.classes == ("neg", "pos")
    whole = rows_of(data.train, data.valid)
    assert [t for t, _, _ in whole] == ["good", 'said "no", then\nleft', "", "null", "NA"] * 4
    assert [y for _, _, y in whole] == [1, 0, 1, 0, 1] * 4
    assert data.test.read([0]) == [("x", None)]
    assert any("4 of 20 rows have an empty text" in n for n in data.notes)


def test_numeric_labels_of_tables(tmp_path: Path) -> None:
    write(tmp_path / "z.csv", "text,label\n" + "".join(f"t{i},{i % 3}\n" for i in range(12)))
    data = text_data("csv:z.csv", tmp_path)
    assert (data.classes, data.classes_known) == (("0", "1", "2"), False)
    write(tmp_path / "stars.csv", "text,label\n" + "".join(f"t{i},{i % 5 + 6}\n" for i in range(20)))
    data = text_data("csv:stars.csv", tmp_path)
    assert data.classes == ("6", "7", "8", "9", "10")  # in the order of numbers, not of letters
    write(tmp_path / "half.csv", "text,label\na,0.5\nb,1.0\n")
    assert "fractional" in problems(lambda: text_data("csv:half.csv", tmp_path))
    write(tmp_path / "gone.csv", "text,label\na,0\nb,\nc,1\n")
    assert "1 row (row 3) have no label" in problems(lambda: text_data("csv:gone.csv", tmp_path))


def test_jsonl_pairs_and_parquet_agree(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"text": f"a{i}", "text_pair": f"b{i}", "label": ["no", "yes"][i % 2]} for i in range(20)]
    write(tmp_path / "d.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "p").mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p" / "train-0.parquet")
    parquet.write_table(pa.Table.from_pylist(rows[:4]), tmp_path / "p" / "test-0.parquet")
    first, second = text_data("jsonl:d.jsonl", tmp_path), text_data("parquet:p", tmp_path)
    whole = [(f"a{i}", f"b{i}", i % 2) for i in range(20)]
    assert rows_of(first.train, first.valid, first.test) == whole
    assert rows_of(second.train, second.valid) == whole
    assert len(second.test) == 4
    ids = dict(zip(second.train.rows.tolist(), second.train.ids.tolist(), strict=True))
    assert all(ids[r] == i.tolist() for r, i in zip(first.train.rows, first.train.ids, strict=True) if r in ids)


def test_wrong_tables_get_a_sentence(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "txt,lable\n" + "".join(f"a{i},{i % 2}\n" for i in range(9)))
    text = problems(lambda: text_data("csv:a.csv", tmp_path))
    assert "'text'" in text
    assert "Did you mean 'lable'?" in text
    write(tmp_path / "b.csv", "text,label\na,1,2\n")
    assert "cannot be read as csv" in problems(lambda: text_data("csv:b.csv", tmp_path))
    write(tmp_path / "c.csv", "")
    assert "cannot be read as csv" in problems(lambda: text_data("csv:c.csv", tmp_path))
    write(tmp_path / "d.csv", "text,label\n")
    assert "empty" in problems(lambda: text_data("csv:d.csv", tmp_path))
    write(tmp_path / "e.csv", b"text,label\n\xff\xfe,1\n")
    assert "cannot be read as csv" in problems(lambda: text_data("csv:e.csv", tmp_path))
    rows = [{"text": None if i == 1 else f"t{i}", "label": i % 2} for i in range(12)]
    write(tmp_path / "f.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    assert "no text (rows 2)" in problems(lambda: text_data("jsonl:f.jsonl", tmp_path))
    assert any("no text" in n for n in text_data("jsonl:f.jsonl", tmp_path, corrupt="skip", test_fraction=0.3).notes)
    assert "Did you mean 'text-classification'?" in problems(lambda: load("jsonl:f.jsonl", tmp_path, corrupt="skip"))
    write(tmp_path / "g.csv", "text,label\n" + "".join(f"a{i},{'xy'[i % 2]}\n" for i in range(9)))
    write(tmp_path / "h.csv", "text,label\nq,z\n")
    assert "not among the classes: z" in problems(lambda: text_data("csv:g.csv", tmp_path, test="h.csv"))
    assert "has no effect" in problems(lambda: text_data("csv:g.csv", tmp_path, test="g.csv", test_fraction=0.3))


def test_class_names_that_the_datasets_library_stored(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["zero", "a"])})
    table = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(20)], "label": [i % 2 for i in range(20)]}, features=features)
    hidden = datasets.Dataset.from_dict({"text": ["u", "v"], "label": [-1, -1]}, features=features)
    table.to_parquet(str(tmp_path / "d.parquet"))
    assert text_data("parquet:d.parquet", tmp_path).classes == ("zero", "a")
    datasets.DatasetDict({"train": table, "validation": table, "test": hidden}).save_to_disk(str(tmp_path / "hub"))
    data = text_data("hf:hub", tmp_path)
    assert data.classes == ("zero", "a")
    assert len(data.test) == 20
    assert any("has no labels" in n for n in data.notes)


# ---- image folders


def picture(path: Path, number: int, size: tuple[int, int] = (9, 7), mode: str = "RGB", **save: Any) -> np.ndarray:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(array).convert(mode)
    image.save(path, **save)
    return np.asarray(image.convert("RGB"))


def folder(base: Path, count: int = 6) -> dict[str, np.ndarray]:
    made = {}
    for split, start in (("train", 0), ("val", 100)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(count):
                path = f"{split}/{name}/{i}.png"
                made[path] = picture(base / path, start + 10 * c + i)
    return made


def test_image_folders(tmp_path: Path) -> None:
    made = folder(tmp_path / "pets")
    picture(tmp_path / "pets/unlabelled/deep/u.jpg", 77)
    write(tmp_path / "pets/train/cat/.DS_Store", "x")
    data = load("imagefolder:pets", tmp_path, valid_fraction=0.2)
    assert data.classes == ("cat", "dog")
    assert data.image_size == (7, 9)
    assert len(data.test) == 12
    assert (len(data.train), len(data.valid)) == (12 - 2 + 1, 2)
    assert (data.train.labels == -1).sum() == 1
    read = np.asarray(data.test.read(np.arange(12)))
    names = [f"val/{c}/{i}.png" for c in ("cat", "dog") for i in range(6)]
    assert all(np.array_equal(image, made[n]) for image, n in zip(read, names, strict=True))


def test_corrupt_files_are_named_or_skipped(tmp_path: Path) -> None:
    folder(tmp_path)
    write(tmp_path / "train/cat/bad.jpg", "no image")
    picture(tmp_path / "train/dog/cut.jpg", 5, (90, 70))
    whole = (tmp_path / "train/dog/cut.jpg").read_bytes()
    write(tmp_path / "train/dog/cut.jpg", whole[: len(whole) // 2])
    text = problems(lambda: load("imagefolder:.", tmp_path))
    assert "bad.jpg" in text
    assert "cut.jpg" in text
    assert "data.corrupt: skip" in text
    data = load("imagefolder:.", tmp_path, corrupt="skip")
    [note] = [n for n in data.notes if "skipped" in n]
    assert "2 files" in note
    assert "bad.jpg" in note
    assert "cut.jpg" in note
    assert len(data.train) + len(data.valid) == 12
    write(tmp_path / "train/dog/readme.txt", "hello")
    assert "readme.txt" in problems(lambda: load("imagefolder:.", tmp_path))


def test_what_was_skipped_is_listed_whole(tmp_path: Path) -> None:
    folder(tmp_path)
    for i in range(30):
        write(tmp_path / f"train/cat/bad{i:02d}.jpg", "no image")
    text = problems(lambda: load("imagefolder:.", tmp_path))
    assert all(f"bad{i:02d}.jpg" in text for i in range(30))
    data = load("imagefolder:.", tmp_path, corrupt="skip")
    assert [Path(sample).name for sample, _ in data.skipped] == [f"bad{i:02d}.jpg" for i in range(30)]
    assert skipped_csv(data).splitlines()[:2] == ["sample,why", f"{tmp_path}/train/cat/bad00.jpg,it is not an image that can be read"]
    assert len(skipped_csv(data).splitlines()) == 31


def test_an_image_without_measure_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path)
    monkeypatch.setattr("limbeck.pixels.MAX_PIXELS", 8 * 9)
    picture(tmp_path / "train/cat/large.png", 3, (8, 10))
    picture(tmp_path / "train/cat/just.png", 4, (8, 9))
    text = problems(lambda: load("imagefolder:.", tmp_path))
    assert "large.png" in text
    assert "8 x 10 pixels, and at most 72 are decoded" in text
    assert "just.png" not in text
    with pytest.raises(Undecodable, match="at most 72"):
        decode((tmp_path / "train/cat/large.png").read_bytes(), 3)


def test_no_other_program_is_asked_to_read_an_image(tmp_path: Path) -> None:
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    folder(tmp_path)
    write(tmp_path / "train/cat/page.jpg", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 7\n%%EndComments\nshowpage\n")
    assert "page.jpg: cannot be read as an image: it is not an image that can be read" in problems(lambda: load("imagefolder:.", tmp_path))


def test_arrays_that_would_fill_the_memory_are_not_read(tmp_path: Path) -> None:
    def member(shape: str, body: bytes = b"") -> bytes:
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
        text += " " * (53 - len(text) % 64) + "\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + body

    for name, raw, said in (
        ("says", member("(1000000000000, 8, 8)"), "takes 64,000,000,000,000 bytes, and has 0"),
        ("less", member("(-1, 8, 8)"), "says that it is uint8"),
        ("cut", member("(9, 8, 8)", bytes(500)), "takes 576 bytes, and has 500"),
        ("bomb", member("(300000, 32, 32)", bytes(300_000 << 10)), "that unfold to 307,"),
    ):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train_x.npy", raw)
        assert said in problems(lambda name=name: load(f"npz:{name}.npz", tmp_path))  # type: ignore[misc]


def test_wrong_folders_get_a_sentence(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "train/bird").mkdir()
    assert "no image in this class folder" in problems(lambda: load("imagefolder:.", tmp_path))
    picture(tmp_path / "val/bird/0.png", 50)
    picture(tmp_path / "train/bird/0.png", 51)
    picture(tmp_path / "val/fox/0.png", 52)
    assert "not among the classes: fox" in problems(lambda: load("imagefolder:.", tmp_path))
    picture(tmp_path / "train/loose.png", 53)
    assert "outside the class folders" in problems(lambda: load("imagefolder:.", tmp_path))


def test_the_index_spares_reading_and_a_changed_file_is_found_when_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path)
    for path in tmp_path.rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    first = load("imagefolder:.", tmp_path)
    monkeypatch.setattr("limbeck.data.folders.inspect", lambda content: pytest.fail("a known file was read again"))
    again = load("imagefolder:.", tmp_path)
    assert again.fingerprint == first.fingerprint
    monkeypatch.undo()
    victim = tmp_path / "val/cat/0.png"
    size = victim.stat().st_size
    write(victim, bytes(size))  # same size, same time
    os.utime(victim, (1e9, 1e9))
    with pytest.raises(LimbeckError, match=r"cat/0\.png changed"):
        again.test.read(np.arange(12))


def never(*_: object) -> None:
    pytest.fail("an image was decoded again")


def test_an_image_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path)
    source = load("imagefolder:.", tmp_path).train.source
    rows = np.arange(len(source))
    first = source.read(rows)
    again = load("imagefolder:.", tmp_path).train.source
    monkeypatch.setattr("limbeck.data.sources.decode", never)
    assert np.array_equal(source.read(rows[::-1]), first[::-1])
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(rows), first), "a worker reads what the others have decoded"
    assert np.array_equal(again.read(rows), first)


def test_a_changed_image_is_another_image(tmp_path: Path) -> None:
    folder(tmp_path)
    before = load("imagefolder:.", tmp_path).train.source
    old = before.read(np.arange(len(before)))
    changed = picture(tmp_path / "train/cat/0.png", 999)
    os.utime(tmp_path / "train/cat/0.png", (1e9, 1e9))
    after = load("imagefolder:.", tmp_path).train.source
    new = after.read(np.arange(len(after)))
    now = {tuple(i): image.tobytes() for i, image in zip(after.ids.tolist(), new, strict=True)}
    then = {tuple(i): image.tobytes() for i, image in zip(before.ids.tolist(), old, strict=True)}
    assert all(now[i] == then[i] for i in now if i in then)
    assert [now[i] for i in now if i not in then] == [changed.tobytes()]
    here = after.decoded.path
    assert [p.name for p in here.parent.iterdir()] == [here.name], "what was kept of the old content is gone"


def test_what_is_damaged_is_decoded_again(tmp_path: Path) -> None:
    folder(tmp_path)
    source = load("imagefolder:.", tmp_path).train.source
    rows = np.arange(len(source))
    first = source.read(rows)
    path = source.decoded.path
    whole = path.read_bytes()
    slot = len(whole) // len(rows)
    for place in (0, 20, slot - 1, slot, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        fresh = pickle.loads(pickle.dumps(source))
        assert np.array_equal(fresh.read(rows), first)
        assert path.read_bytes() == whole, "and mended"
    path.write_bytes(whole[slot : 2 * slot] + whole[:slot] + whole[2 * slot :])  # each whole, in the other's place
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(rows), first)
    path.write_bytes(whole[: slot + 7])
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(rows), first)
    assert path.read_bytes() == whole


def test_decoded_images_take_no_more_than_their_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "a")
    folder(tmp_path / "b")
    a, b = (load("imagefolder:.", tmp_path / name).train.source for name in "ab")
    rows = np.arange(len(a))
    first = a.read(rows)
    monkeypatch.setattr("limbeck.data.decoded.BUDGET", a.decoded.path.stat().st_size * 3 // 2)
    assert np.array_equal(b.read(rows), first)
    assert not b.decoded.path.exists(), "another's that is in use stays"
    os.utime(a.decoded.path, (1e9, 1e9))
    assert np.array_equal(pickle.loads(pickle.dumps(b)).read(rows), first)
    assert [p.name for p in b.decoded.path.parent.iterdir()] == [b.decoded.path.name]


def test_nothing_is_kept_where_that_is_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path / "file"))
    source = load("imagefolder:.", tmp_path).train.source
    assert len(source.read(np.arange(3))) == 3
    picture(tmp_path / "train/dog/other.png", 5, (31, 7))
    assert load("imagefolder:.", tmp_path).train.source.decoded is None, "images of several sizes"


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "GIF", "exif"])
def test_modes_of_images_become_upright_rgb_or_grey(tmp_path: Path, mode: str) -> None:
    from PIL import Image

    from limbeck.pixels import decode, inspect

    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    image = Image.fromarray(grey)
    path = tmp_path / "image.png"
    wanted = np.repeat(grey[..., None], 3, axis=2)
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 256 + 9).save(path)
    elif mode == "GIF":
        path = tmp_path / "image.gif"
        image.save(path, save_all=True, append_images=[Image.fromarray(255 - grey)], loop=0)
    elif mode == "CMYK":
        path = tmp_path / "image.tif"
        image.convert("RGB").convert("CMYK").save(path)
        with Image.open(path) as opened:
            assert opened.mode == "CMYK"
    elif mode == "exif":
        path = tmp_path / "image.tif"
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned a quarter clockwise
        image.save(path, exif=exif)
        wanted = np.rot90(wanted, -1)
    elif mode == "1":
        image.point(lambda v: 255 if v > 100 else 0).convert("1").save(path)
        wanted = np.where(wanted > 100, 255, 0)
    else:
        (image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)).save(path)
    content = path.read_bytes()
    got = decode(content, 3)
    assert got.dtype == np.uint8
    assert inspect(content)[:2] == got.shape[:2]
    assert np.abs(got.astype(int) - wanted).max() <= 1
    assert decode(content, inspect(content)[2]).shape[2] == inspect(content)[2]


def test_parquet_with_encoded_images(tmp_path: Path) -> None:
    import io

    import pyarrow as pa
    from PIL import Image
    from pyarrow import parquet

    x = pixels(20, 5, 4, 3)
    rows = []
    for i, array in enumerate(x):
        out = io.BytesIO()
        Image.fromarray(array).save(out, "PNG")
        rows.append({"image": {"bytes": out.getvalue(), "path": None}, "label": i % 2})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "i.parquet")
    data = load("parquet:i.parquet", tmp_path)
    assert data.image_size == (5, 4)
    assert np.array_equal(np.asarray(data.train.read(np.arange(len(data.train)))), x[data.train.rows])
