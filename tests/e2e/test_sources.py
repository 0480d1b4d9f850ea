"""Every kind of data and model through the command line; figures are checked against NumPy, PIL or transformers alone."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from models_support import image_folder, text_folder
from running import arrays, limbeck, lines, make_folder, pictures, read, recipe, run, steps, weights

WORDS = ("w1", "w5", "w9")
ANIMALS = ("bird", "cat", "dog")
ALL = ["onnx", "torchscript", "pt2"]
STILL: dict[str, Any] = {"epochs": 1, "lr": 1e-30, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0}
"""Training that moves no weight: what is logged belongs to the initial student."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path / "home"))
    return make_folder(tmp_path)


def nll_and_accuracy(logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> tuple[float, float]:
    z = logits.astype(np.float64)
    z = z - z.max(1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    return float(-log_p[np.arange(len(labels)), labels].mean()), float((z.argmax(1) == labels).mean())


def check(row: dict[str, Any], logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
    nll, accuracy = nll_and_accuracy(logits, labels)
    assert row["metrics"]["nll"] == pytest.approx(nll, rel=1e-4, abs=1e-5)
    assert row["metrics"]["accuracy"] == pytest.approx(accuracy)


def kd(student: np.ndarray[Any, Any], teacher: np.ndarray[Any, Any], temperature: float) -> float:
    """T^2 times the mean over rows of KL(teacher_T || student_T)."""

    def log_softmax(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        z = z.astype(np.float64) / temperature
        z = z - z.max(1, keepdims=True)
        found: np.ndarray[Any, Any] = z - np.log(np.exp(z).sum(1, keepdims=True))
        return found

    p, q = log_softmax(teacher), log_softmax(student)
    return float(temperature**2 * (np.exp(p) * (p - q)).sum(1).mean())


def check_exports(metrics: dict[str, Any], folder: Path, formats: list[str] = ALL) -> None:
    assert list(metrics["export"]) == formats
    for row in metrics["export"].values():
        assert row["agreement"] == 1.0
        assert (folder / row["file"]).stat().st_size == row["bytes"] > 0


# --- arrays ---


def plain_logits(folder: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``plain`` of nets.py in NumPy: x is (N, ...) prepared."""
    w = {k: v.astype(np.float64) for k, v in load_file(folder / "model.safetensors").items()}
    hidden = np.tanh(x.reshape(len(x), -1).astype(np.float64) @ w["1.weight"].T + w["1.bias"])
    out: np.ndarray[Any, Any] = hidden @ w["3.weight"].T + w["3.bias"]
    return out


def test_layouts_of_arrays_are_one_and_the_same_picture(here: Path) -> None:
    """NHWC, NCHW and NHW; uint8 becomes [0, 1] and is normalised by the training split; floats are taken as they are."""
    data = arrays()
    grey = {k: v for k, v in data.items() if k.endswith("_x")}
    labels = {k: v for k, v in data.items() if k.endswith("_y")}
    colour = {k: np.stack([v, 255 - v, v // 2], axis=-1) for k, v in grey.items()}
    forms = {
        "nhwc": (colour, 192),
        "nchw": ({k: v.transpose(0, 3, 1, 2) for k, v in colour.items()}, 192),
        "nhw": (grey, 64),
        "nhw1": ({k: v[..., None] for k, v in grey.items()}, 64),
        "floats": ({k: v.astype(np.float32)[:, None] / 100 for k, v in grey.items()}, 64),
        "vectors": ({k: v.astype(np.float32).reshape(len(v), -1) / 100 for k, v in grey.items()}, 64),
    }
    for name, (x, size) in forms.items():
        np.savez(here / f"{name}.npz", **x, **labels)
        model = {"model": "python:nets.py:plain", "options": {"size": size}}
        file = recipe(here, teacher=model, student=model, data={"source": f"npz:{name}.npz"})
        metrics = run("distill", file, "--seed", "1", out=here / name)
        test = x["test_x"]
        if name == "nchw":
            test = test.transpose(0, 2, 3, 1)
        if test.dtype == np.uint8:
            train = (x["train_x"].transpose(0, 2, 3, 1) if name == "nchw" else x["train_x"]) / 255.0
            axes = tuple(range(3))
            test = (test / 255.0 - train.mean(axes)) / train.std(axes)
        if test.ndim == 4 and name != "floats":
            test = test.transpose(0, 3, 1, 2)
        check(metrics["models"]["student"], plain_logits(here / name / "student", test), labels["test_y"])
    assert weights(here / "nhwc/student") == weights(here / "nchw/student")
    assert weights(here / "nhw/student") == weights(here / "nhw1/student")
    assert weights(here / "floats/student") == weights(here / "vectors/student")
    assert weights(here / "nhw/student") != weights(here / "floats/student")


def test_digits_with_few_labels(here: Path) -> None:
    """Rows without a label are for kd only; the baseline has the labelled ones for as many steps of the same size."""
    file = recipe(
        here,
        data={"source": "digits", "train_limit": 100, "labelled_limit": 20},
        teacher={"model": "python:nets.py:teacher"},
        export=["onnx"],
    )
    metrics = run("distill", file, out=here / "run")
    assert metrics["data"]["train"] == 100
    assert metrics["data"]["labelled"] == 20
    assert steps(here / "run", "student") == steps(here / "run", "baseline") == list(range(1, 15))
    sizes = [line["terms"] for line in lines(here / "run", "baseline") if "loss" in line]
    assert all(set(terms) == {"cross_entropy"} for terms in sizes)
    assert metrics["models"]["student"]["parameters"] == metrics["models"]["baseline"]["parameters"]
    check_exports(metrics, here / "run", ["onnx"])
    assert read(here / "run/student/model.json")["classes"] == [str(i) for i in range(10)]


def test_unlabelled_rows_of_their_own_file_and_of_the_same(here: Path) -> None:
    x, _ = pictures(30, 9)
    data = arrays()
    np.savez(here / "more.npz", unlabelled_x=x, **data)
    metrics = run("distill", recipe(here, data={"source": "npz:more.npz"}), out=here / "more")
    assert (metrics["data"]["train"], metrics["data"]["labelled"]) == (78, 48)
    assert steps(here / "more", "student") == steps(here / "more", "baseline") == list(range(1, 11))
    assert metrics["cost"]["teacher_items"] >= 2 * 78 + 18
    # a training without a teacher has no use for them, whatever the file holds
    alone = run("train", recipe(here, teacher=None, data={"source": "npz:more.npz"}), out=here / "alone")
    assert alone["cost"]["steps"] == 6


# --- objectives and training ---


def test_hints_schedules_and_what_the_log_says(here: Path) -> None:
    objective = [
        {"loss": "kd", "weight": {"start": 1.0, "end": 0.0, "until": 0.5}, "temperature": {"start": 4.0, "end": 1.0, "shape": "cosine"}},
        {"loss": "cross_entropy", "weight": 0.5, "label_smoothing": 0.1},
        {"loss": "hint", "weight": 0.2, "student": "body", "teacher": "norm"},
    ]
    train = {"epochs": 4, "optimizer": "sgd", "momentum": 0.5, "schedule": "one_cycle", "warmup": 0.25}
    metrics = run("distill", recipe(here, objective=objective, train=train, export=["onnx"]), out=here / "run")
    rows = [line for line in lines(here / "run", "student") if "loss" in line]
    assert [row["weights"]["kd"] for row in rows] == pytest.approx([max(0.0, 1 - 2 * i / 12) for i in range(12)])
    assert all(set(row["terms"]) == {"kd", "cross_entropy", "hint"} for row in rows)
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row["weights"][name] * row["terms"][name] for name in row["terms"]), rel=1e-5)
    assert max(row["lr"] for row in rows) == rows[2]["lr"]
    names = set(weights(here / "run/student"))
    assert names == set(weights(here / "run/baseline")), "the projection stays behind"
    assert {n.split(".")[0] for n in names} == {"body", "norm", "head"}
    check_exports(metrics, here / "run", ["onnx"])


def test_the_best_epoch_is_what_a_shorter_training_ends_in(here: Path) -> None:
    """Labels of validation drawn by lot make an early epoch the best; with a constant rate its weights are those of a run that ends there."""
    data = arrays()
    data["valid_y"] = np.random.default_rng(0).integers(0, 3, len(data["valid_y"]))
    np.savez(here / "lots.npz", **data)
    how = {"schedule": "constant", "warmup": 0.0, "lr": 0.1}
    own: dict[str, Any] = {
        "data": {"source": "npz:lots.npz"},
        "teacher_cache": {"mode": "off"},
    }  # one epoch alone would use no answer twice
    best = run("distill", recipe(here, train={**how, "epochs": 6, "select": "best"}, **own), out=here / "best")
    valid = [line["valid"]["accuracy"] for line in lines(here / "best", "student") if "valid" in line]
    assert len(valid) == 6
    epoch = valid.index(max(valid))
    assert epoch < 5
    assert best["validation"]["accuracy"] == max(valid)
    assert steps(here / "best", "student") == steps(here / "best", "baseline"), "early stopping shortens nothing"
    run("distill", recipe(here, train={**how, "epochs": epoch + 1}, **own), out=here / "short")
    assert weights(here / "best/student") == weights(here / "short/student")


def test_the_average_is_what_is_saved_and_the_training_does_not_see_it(here: Path) -> None:
    run("distill", recipe(here, train={"ema": 0.99}), out=here / "ema")
    run("distill", recipe(here), out=here / "raw")
    loss = [[line["loss"] for line in lines(here / name, "student") if "loss" in line] for name in ("ema", "raw")]
    assert loss[0] == loss[1]
    averaged, raw = (load_file(here / name / "student/model.safetensors") for name in ("ema", "raw"))
    for name in ("body.weight", "norm.running_mean", "norm.running_var"):
        assert not np.array_equal(averaged[name], raw[name]), name
    assert averaged["norm.num_batches_tracked"] == raw["norm.num_batches_tracked"] == 6


# --- files of images ---


def photos(root: Path, counts: dict[str, int], unlabelled: int = 0) -> Path:
    """PNG and JPEG files of many sizes; the colour is the class."""
    from PIL import Image

    rng = np.random.default_rng(4)

    def one(path: Path, kind: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (int(rng.integers(24, 48)), int(rng.integers(24, 48)), 3)
        pixels = rng.integers(0, 90, size, dtype=np.uint8)
        pixels[..., kind] += 120
        Image.fromarray(pixels).save(path)

    for split, count in counts.items():
        for i in range(count):
            one(root / split / ANIMALS[i % 3] / f"{i}.{('png', 'jpg')[i % 2]}", i % 3)
    for i in range(unlabelled):
        one(root / "unlabelled" / f"{i}.png", i % 3)
    return root


def test_folders_of_images_with_timm_at_two_resolutions(here: Path) -> None:
    photos(here / "photos", {"train": 24, "val": 12, "test": 12}, unlabelled=6)
    common = {"data": {"source": "imagefolder:photos", "augment": "standard"}, "train": {"epochs": 2, "batch_size": 12, "lr": 0.01}}
    teacher = recipe(here, teacher=None, student={"model": "timm:test_resnet", "options": {"resolution": 40}}, **common)
    first = run("train", teacher, out=here / "teacher")
    student = {"model": "timm:test_efficientnet", "options": {"resolution": 32}}
    found: dict[int, dict[str, Any]] = {}
    for workers in (0, 2):
        changed = {**common, "train": {**common["train"], "workers": workers}}
        file = recipe(here, teacher={"model": "run:teacher"}, student=student, export=ALL if workers == 0 else [], **changed)
        found[workers] = run("distill", file, out=here / f"run-{workers}")
    assert weights(here / "run-0/student") == weights(here / "run-2/student")
    assert weights(here / "run-0/baseline") == weights(here / "run-2/baseline")
    for metrics in found.values():
        assert metrics["models"]["teacher"]["metrics"] == pytest.approx(first["models"]["student"]["metrics"])
        assert metrics["data"]["labelled"] == 24
        assert metrics["data"]["train"] == 30
    check_exports(found[0], here / "run-0")
    about = read(here / "run-0/student/model.json")
    assert about["classes"] == list(ANIMALS)
    assert about["preprocessing"]["height"] == 32
    assert read(here / "teacher/student/model.json")["preprocessing"]["height"] == 40
    report = (here / "run-0/report.html").read_text()
    assert all(name in report for name in ANIMALS)


def test_a_published_normalisation_beside_the_datas_own(here: Path) -> None:
    """A ViT with mean 0.5 and its classes in another order teaches a torchvision network that is normalised by the data."""
    import torch
    from transformers import ViTForImageClassification

    folder = image_folder(
        here / "vit", ("cat", "ant", "bee"), image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": 16, "width": 16}, do_normalize=True,
        do_rescale=True, do_resize=True, rescale_factor=1 / 255,
    )  # fmt: skip
    loud(here / "vit")
    names, data = np.array(["ant", "bee", "cat"]), {}
    for split, (count, seed) in {"train": (24, 0), "valid": (9, 1), "test": (15, 2)}.items():
        x, y = pictures(count, seed, size=32)
        data |= {f"{split}_x": np.stack([x, x // 2, 255 - x], axis=-1), f"{split}_y": names[y]}
    np.savez(here / "colour.npz", **data)
    file = recipe(
        here,
        teacher={"model": "hf:vit"},
        student={"model": "torchvision:squeezenet1_1"},
        data={"source": "npz:colour.npz"},
        train={"batch_size": 12},
        export=ALL,
    )
    metrics = run("distill", file, out=here / "run")
    vit = ViTForImageClassification.from_pretrained(folder).eval()
    from PIL import Image

    def by_vit(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        small = np.stack([np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)) for image in images])
        with torch.no_grad():
            logits: np.ndarray[Any, Any] = vit(torch.from_numpy((small / 255.0 - 0.5) / 0.5).permute(0, 3, 1, 2).float()).logits.numpy()
        return logits[:, [1, 2, 0]]

    logits = by_vit(data["test_x"])
    labels = np.searchsorted(names, data["test_y"])
    nll, _ = nll_and_accuracy(logits, labels)
    assert metrics["models"]["teacher"]["metrics"]["nll"] == pytest.approx(nll, rel=1e-3)
    assert any("another order" in note for note in metrics["notes"])
    wrong, _ = nll_and_accuracy(logits[:, [2, 0, 1]], labels)
    assert abs(wrong - nll) > 0.005 * nll, "the test could not see a wrong order"
    check_exports(metrics, here / "run")
    # in the loop too: with one batch of all rows and a rate that moves nothing, the logged kd is that of the initial student
    plain = {"model": "python:nets.py:plain", "options": {"size": 3 * 32 * 32}}
    file = recipe(
        here, "still.yaml", teacher={"model": "hf:vit"}, student=plain, data={"source": "npz:colour.npz"}, train={**STILL, "batch_size": 24}
    )
    run("distill", file, "--temp", "2", "--no-baseline", out=here / "still")
    x = data["train_x"] / 255.0
    mine = plain_logits(here / "still/student", ((x - x.mean((0, 1, 2))) / x.std((0, 1, 2))).transpose(0, 3, 1, 2))
    [row] = [line for line in lines(here / "still", "student") if "loss" in line]
    assert row["terms"]["kd"] == pytest.approx(kd(mine, by_vit(data["train_x"]), 2.0), rel=1e-3)
    mean = read(here / "run/student/model.json")["preprocessing"]["mean"]
    assert mean == pytest.approx(list((data["train_x"] / 255.0).mean((0, 1, 2))), abs=1e-4)


# --- texts ---


def sentences(path: Path, count: int, seed: int, pair: bool = False, label: bool = True) -> list[dict[str, str]]:
    """A table of word salad; one word of three gives the class away."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        words = [f"w{n}" for n in rng.choice([0, 2, 3, 4, 6, 7, 8, 10, 11], rng.integers(1, 7))]
        words.insert(int(rng.integers(0, len(words) + 1)), WORDS[i % 3])
        row = {"text": " ".join(words)}
        if pair:
            row["text_pair"] = " ".join(f"w{n}" for n in rng.integers(0, 12, rng.integers(1, 5)))
        if label:
            row["label"] = ANIMALS[i % 3]
        rows.append(row)
    header = list(rows[0])
    path.write_text("\n".join([",".join(header), *(",".join(row[h] for h in header) for row in rows)]) + "\n")
    return rows


def other_tokenizer(folder: Path) -> None:
    """The same words under other ids."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    moved = sorted((name for name in vocabulary if name.startswith("w")), key=vocabulary.__getitem__)
    vocabulary |= dict(zip(moved, [vocabulary[name] for name in reversed(moved)], strict=True))
    path.write_text(json.dumps(tokenizer))


def loud(folder: Path) -> None:
    """Untrained weights of a size that makes answers differ from row to row."""
    from safetensors.numpy import save_file

    scale = {"classifier.weight": 100.0, "embeddings.weight": 20.0}
    state = load_file(folder / "model.safetensors")
    louder = {k: v * next((x for name, x in scale.items() if k.endswith(name)), 1.0) for k, v in state.items()}
    save_file({k: v.astype(state[k].dtype) for k, v in louder.items()}, folder / "model.safetensors")


def without_dropout(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: 0.0 if "dropout" in k and v is not None else v for k, v in config.items()}))


def by_transformers(folder: Path, rows: list[dict[str, str]]) -> np.ndarray[Any, Any]:
    """(N, 3) logits in the order of ANIMALS, one text at a time, by transformers alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    columns = [model.config.label2id[name] for name in ANIMALS]
    takes = inspect.signature(model.forward).parameters
    found = []
    with torch.no_grad():
        for row in rows:
            given = tokenizer(row["text"], row.get("text_pair"), return_tensors="pt", truncation=True, max_length=16, padding=False)
            found.append(model(**{k: v for k, v in given.items() if k in takes}).logits[0].numpy())
    return np.stack(found)[:, columns]


def truth(rows: list[dict[str, str]]) -> np.ndarray[Any, Any]:
    return np.array([ANIMALS.index(row["label"]) for row in rows])


@pytest.mark.parametrize("pair", [False, True])
def test_texts_with_two_tokenizers_and_classes_in_two_orders(here: Path, pair: bool) -> None:
    text_folder(here / "big", "bert", layers=3, classes=("dog", "bird", "cat"))
    other_tokenizer(here / "big")
    loud(here / "big")
    text_folder(here / "small", "distilbert", layers=1, body_only=not pair)
    if pair:
        without_dropout(here / "small")
    train = sentences(here / "train.csv", 30, 0, pair)
    test = sentences(here / "test.csv", 15, 1, pair)
    sentences(here / "valid.csv", 9, 2, pair)
    file = recipe(
        here,
        teacher={"model": "hf:big"},
        student={"model": "hf:small"},
        data={"source": "csv:train.csv", "test": "test.csv", "valid": "valid.csv", "max_length": 16},
        train={**STILL, "batch_size": 30} if pair else {"batch_size": 8, "lr": 0.01},
        export=ALL if pair else ["onnx"],
    )
    metrics = run("distill", file, out=here / "run")
    check(metrics["models"]["teacher"], by_transformers(here / "big", test), truth(test))
    check(metrics["models"]["student"], by_transformers(here / "run/student", test), truth(test))
    check(metrics["models"]["baseline"], by_transformers(here / "run/baseline", test), truth(test))
    check_exports(metrics, here / "run", ALL if pair else ["onnx"])
    if pair:  # in the loop, too, each model has its own tokens
        [row] = [line for line in lines(here / "run", "student") if "loss" in line]
        expected = kd(by_transformers(here / "run/student", train), by_transformers(here / "big", train), 4.0)
        assert row["terms"]["kd"] == pytest.approx(expected, rel=1e-4)
    a, b = (read(here / name / "tokenizer.json")["model"]["vocab"] for name in ("big", "run/student"))
    assert a != b
    assert any("another order" in note for note in metrics["notes"])
    report = (here / "run/report.html").read_text()
    assert all(name in report for name in ANIMALS)


def test_a_hint_on_tokens_is_refused_where_the_tokenizers_differ(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two vocabularies give masks of the same shape; only the tokenizers' files tell that the tokens are others."""
    text_folder(here / "big", "bert", layers=2, classes=ANIMALS)
    text_folder(here / "small", "bert", layers=1, body_only=True)
    other_tokenizer(here / "big")
    sentences(here / "train.csv", 24, 0)
    hint = {"loss": "hint", "weight": 0.1, "student": "bert.encoder.layer.0", "teacher": "bert.encoder.layer.1"}
    objective = [{"loss": "kd", "weight": 0.5, "temperature": 2.0}, {"loss": "cross_entropy", "weight": 0.5}, hint]
    file = recipe(
        here,
        teacher={"model": "hf:big"},
        student={"model": "hf:small"},
        data={"source": "csv:train.csv", "test": "train.csv", "max_length": 16},
        objective=objective,
    )
    assert limbeck("distill", file, "--out", here / "run") == 2
    assert "the two models have different tokenizers" in capsys.readouterr().err
    assert not (here / "run").exists()


def test_a_student_of_chosen_layers_with_a_hint_and_unlabelled_texts(here: Path) -> None:
    text_folder(here / "big", "bert", layers=3, classes=ANIMALS)
    loud(here / "big")
    sentences(here / "train.csv", 24, 0)
    test = sentences(here / "test.csv", 12, 1)
    sentences(here / "more.csv", 16, 3, label=False)
    objective = [
        {"loss": "kd", "weight": 0.5, "temperature": 2.0},
        {"loss": "cross_entropy", "weight": 0.5},
        {"loss": "hint", "weight": 0.1, "student": "bert.encoder.layer.1", "teacher": "bert.encoder.layer.2", "projector": "none"},
    ]
    file = recipe(
        here,
        teacher={"model": "hf:big"},
        student={"model": "hf:big", "options": {"layers": [0, 2]}},
        data={"source": "csv:train.csv", "test": "test.csv", "unlabelled": "more.csv", "max_length": 16},
        objective=objective,
        train={**STILL, "epochs": 2, "batch_size": 8},
    )
    metrics = run("distill", file, out=here / "run")
    student, teacher = (load_file(here / name / "model.safetensors") for name in ("run/student", "big"))
    for name in ("attention.self.query.weight", "output.dense.weight"):
        for mine, its in ((0, 0), (1, 2)):
            np.testing.assert_array_equal(student[f"bert.encoder.layer.{mine}.{name}"], teacher[f"bert.encoder.layer.{its}.{name}"])
    assert "bert.encoder.layer.2.output.dense.weight" not in student
    assert metrics["data"]["train"] - metrics["data"]["labelled"] == 16
    assert steps(here / "run", "student") == steps(here / "run", "baseline")
    check(metrics["models"]["student"], by_transformers(here / "run/student", test), truth(test))


def test_a_teacher_with_another_head_is_trained_first_or_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_folder(here / "big", "bert", layers=2, classes=("x", "y"))
    text_folder(here / "small", "bert", layers=1, body_only=True)
    sentences(here / "train.csv", 30, 0)
    test = sentences(here / "test.csv", 15, 1)
    given = [
        "--teacher",
        "hf:big",
        "--student",
        "hf:small",
        "--data",
        "csv:train.csv",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--lr",
        "0.01",
    ]
    given += ["--set", "data.test=test.csv", "--set", "data.max_length=16", "--set", "train.precision=float32", "--set", "export=[]"]
    assert limbeck("distill", *given, "--out", here / "refused") == 2
    said = capsys.readouterr().err
    assert "bird" in said
    assert "Fine-tune" in said
    assert not (here / "refused").exists()
    metrics = run("distill", *given, "--fit-teacher", out=here / "run")
    assert "trained first" in capsys.readouterr().err
    assert len(lines(here / "run", "teacher")) > 0
    check(metrics["models"]["teacher"], by_transformers(here / "run/teacher", test), truth(test))
    # the same by recipe, for longer; and one that fits is left alone by --fit-teacher
    longer = run("distill", *given, "--set", "teacher.train={epochs: 3, lr: 0.02}", out=here / "longer")
    assert len(steps(here / "longer", "teacher")) or lines(here / "longer", "teacher")[-1]["epoch"] == 2
    assert longer["models"]["teacher"]["metrics"] != metrics["models"]["teacher"]["metrics"]
    again = [a if a != "hf:big" else "hf:run/teacher" for a in given]
    fitting = run("distill", *again, "--fit-teacher", out=here / "fitting")
    assert fitting["models"]["teacher"]["metrics"] == pytest.approx(metrics["models"]["teacher"]["metrics"])
    assert not (here / "fitting/teacher").exists()
