"""Data given from Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from limbeck.data import Data, data_from_python, text_of, thumbnail
from limbeck.data import python as python_module
from limbeck.errors import LimbeckError, UsageError

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(40) % 4


class Samples(Dataset[Any]):
    classes = ("a", "b", "c", "d")

    def __init__(self, form: str = "pil") -> None:
        self.form = form

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Any:
        from PIL import Image

        x: Any = IMAGES[i]
        y: Any = int(LABELS[i])
        if self.form == "pil":
            x = Image.fromarray(x)
        elif self.form == "chw":
            x, y = torch.from_numpy(x).permute(2, 0, 1), torch.tensor(y)
        elif self.form == "float":
            x = torch.from_numpy(x).permute(2, 0, 1).double() / 255
        elif self.form == "text":
            x = f"text {i}"
        elif self.form == "pair":
            x = (f"text {i}", f"pair {i}")
        elif self.form == "random":
            x = x + np.random.randint(0, 9, x.shape).astype(np.uint8)
        elif self.form == "dict":
            return {"x": x, "y": y}
        elif self.form == "sizes":
            x = x[: 3 + i % 3]
        elif self.form == "bare":
            return x
        return x, y


def make(task: str = "image-classification", **keys: Any) -> Data:
    return data_from_python(task=task, **{"test": keys.get("train"), "valid": keys.get("train"), **keys})


@pytest.mark.parametrize("form", ["pil", "chw", "kept", "array", "tensor", "TensorDataset", "list", "reread"])
def test_the_same_images_in_any_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: Any = {
        "array": (IMAGES, LABELS),
        "tensor": (torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()), torch.from_numpy(LABELS)),
        "TensorDataset": TensorDataset(torch.from_numpy(IMAGES), torch.from_numpy(LABELS)),
        "list": [(x, int(y)) for x, y in zip(IMAGES, LABELS, strict=True)],
    }.get(form) or Samples("chw" if form == "chw" else "pil")
    if form == "reread":
        monkeypatch.setattr(python_module, "KEEP_BYTES", 500)
    data, wanted = make(train=given), make(train=(IMAGES, LABELS))
    assert data.train.source.in_memory == (form != "reread")
    assert np.array_equal(np.asarray(data.train.read(np.arange(40))), IMAGES)
    assert np.array_equal(data.train.ids, wanted.train.ids)
    assert np.array_equal(data.train.labels, LABELS)
    assert data.classes == (tuple("abcd") if isinstance(given, Samples) else tuple("0123"))
    assert (data.kind, data.image_size, data.channels) == ("image", (6, 5), 3)
    assert data.mean == pytest.approx(tuple(IMAGES.reshape(-1, 3).mean(0) / 255), abs=1e-12)
    assert data.std == pytest.approx(tuple(IMAGES.reshape(-1, 3).std(0) / 255), abs=1e-12)


def test_a_dataset_that_changes_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_module, "KEEP_BYTES", 500)
    dataset = Samples()
    data = make(train=dataset)
    dataset.form = "random"
    with pytest.raises(LimbeckError, match="another sample at index"):
        data.train.read([3])


def test_floats_keep_their_precision() -> None:
    for dtype in (torch.float32, torch.float64, torch.float16):
        x = torch.randn(20, 4, dtype=dtype)
        data = make(train=(x, torch.arange(20) % 2))
        assert np.array_equal(np.asarray(data.train.read(np.arange(20))), x.numpy())
        assert np.asarray(data.train.read([0])).dtype == x.numpy().dtype
        assert data.shape == (4,)
    assert np.asarray(make(train=Samples("float")).train.read([0])).dtype == np.float64
    assert np.asarray(make(train=(torch.randn(20, 4).bfloat16(), torch.arange(20) % 2)).train.read([0])).dtype == np.float32


def test_texts_and_pairs() -> None:
    texts = [f"text {i}" for i in range(40)]
    names = [Samples.classes[i] for i in LABELS]
    wanted = make("text-classification", train=(texts, names))
    assert wanted.classes == Samples.classes
    for given in (Samples("text"), (np.array(texts), LABELS), (tuple(texts), LABELS.tolist())):
        data = make("text-classification", train=given)
        assert data.train.read([7]) == [("text 7", None)]
        assert np.array_equal(data.train.ids, wanted.train.ids)
    data = make("text-classification", train=Samples("pair"), unlabelled=[("a", "b"), ("c", "d")])
    assert data.train.read([7, 41]) == [("text 7", "pair 7"), ("c", "d")]
    assert text_of(data.train, 7) == "text 7\npair 7"
    table = pytest.importorskip("pandas").DataFrame({"text": texts, "label": names})
    assert np.array_equal(make("text-classification", train=table).train.ids, wanted.train.ids)


@pytest.mark.parametrize("given", [IMAGES[:6], torch.from_numpy(IMAGES[:6]), [*IMAGES[:6]], Samples("bare"), Samples("pil")])
def test_unlabelled_samples_join_the_training_split(given: Any) -> None:
    data = make(train=(255 - IMAGES, LABELS), unlabelled=given)
    assert (data.train.labels[40:] == -1).all()
    assert np.array_equal(np.asarray(data.train.read([41, 3])), np.stack([IMAGES[1], 255 - IMAGES[3]]))
    assert len(data.train) == 40 + len(given)


BAD: dict[str, tuple[Any, str]] = {
    "random": (Samples("random"), "another sample each time"),
    "dict": (Samples("dict"), "gives a dict"),
    "bare": (Samples("bare"), "(x, y) is expected"),
    "no labels": (IMAGES, "labels are missing"),
    "lengths": ((IMAGES, LABELS[:9]), "they must be as many"),
    "number": (5, "neither a pair (x, y) nor a dataset"),
    "loader": (torch.utils.data.DataLoader(Samples()), "Give its dataset"),
    "empty": ([], "empty"),
    "integers": ((IMAGES.astype(int), LABELS), "astype('uint8')"),
    "mixed": ((["a", 5, "b"], [0, 1, 0]), "others are texts"),
    "half pairs": (([("a", "b"), "c"], [0, 1]), "others are pairs"),
    "nothing": (([object()] * 3, [0, 1, 0]), "neither an image"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_objects_get_a_sentence(name: str) -> None:
    given, message = BAD[name]
    with pytest.raises(UsageError) as e:
        data_from_python(task="image-classification", train=given)
    assert message in str(e.value)


def test_class_names_given_by_hand() -> None:
    data = make(train=(IMAGES, LABELS), classes=["w", "x", "y", "z"])
    assert (data.classes, data.classes_known) == (("w", "x", "y", "z"), True)
    with pytest.raises(UsageError, match="no training sample is of class v"):
        make(train=(IMAGES, LABELS), classes=["w", "x", "y", "z", "v"])
    with pytest.raises(UsageError, match="out of range"):
        make(train=(IMAGES, LABELS), classes=["w", "x"])


def test_thumbnails_are_png_of_the_sample() -> None:
    import io

    from PIL import Image

    data = make(train=(IMAGES, LABELS))
    with Image.open(io.BytesIO(thumbnail(data.train, 3, 60))) as picture:
        assert picture.size == (50, 60)
        assert np.array_equal(np.asarray(picture)[::10, ::10], IMAGES[3])
    varied = make(train=Samples("sizes"))
    assert varied.image_size is None
    with Image.open(io.BytesIO(thumbnail(varied.train, 1))) as picture:
        assert max(picture.size) == 64
    floats = make(train=Samples("float"))
    with Image.open(io.BytesIO(thumbnail(floats.train, 0))) as picture:
        assert picture.format == "PNG"
    with pytest.raises(ValueError, match="no thumbnail"):
        thumbnail(make(train=(np.zeros((9, 5), np.float32), np.arange(9) % 3)).train, 0)
