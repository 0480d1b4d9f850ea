"""Serving and predicting: the training's own numbers, the protocol's rules, and limits that hold. No torch in what is served."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.data import BatchBuilder, Split, evaluation_requests
from limbeck.data.ids import text_ids
from limbeck.data.load import load_data
from limbeck.data.sources import Texts
from limbeck.errors import UsageError
from limbeck.export import export_model, onnx
from limbeck.models import Model, build_model, wrap_module
from limbeck.recipe import DataSpec
from limbeck.run import write_json
from limbeck.types import ImagePreprocessing
from models_support import floats, spec, text_folder
from running import ROOT, digest, limbeck, read

pytest.importorskip("onnxruntime")
fastapi = pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httptools")

from starlette.testclient import TestClient  # noqa: E402

from limbeck.serve import Refused, Settings, answers, open_model, softmax  # noqa: E402
from limbeck.serve._app import Served, make_app  # noqa: E402
from limbeck.serve._batching import Batcher, Busy  # noqa: E402

HOW = ImagePreprocessing(3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), height=12, width=12, resize_shorter=14, interpolation="bicubic")
NAMES = ("cat", "dög")


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 5, 3, stride=2), nn.Linear(5 * 25, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu().flatten(1))


def as_run(model: Model, inputs: dict[str, torch.Tensor], folder: Path, task: str) -> Path:
    """What a run leaves of its student for serving."""
    folder.mkdir()
    written = onnx.writers
    onnx.writers = lambda: (("trace", dict(written())["trace"]),)  # the faster exporter
    try:
        records = export_model(model, ["onnx"], folder / "export", inputs=inputs, classes=NAMES, task=task)
    finally:
        onnx.writers = written
    write_json(folder / "metrics.json", {"task": task, "export": records})
    (folder / "recipe.yaml").write_text("{}")
    return folder


def photo(path: Path, number: int, size: tuple[int, int], mode: str = "RGB", **save: Any) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(array).convert(mode).save(path, **save)
    return path


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    torch.manual_seed(0)
    model = Model(Cnn(), {}, "module", HOW, None, 2)
    return as_run(model, {"image": torch.randn(17, 3, 12, 12)}, tmp_path_factory.mktemp("i") / "run", "image-classification"), model


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    base = tmp_path_factory.mktemp("t")
    text_folder(base / "bert", layers=1)
    lines = [f"w{i} w{j},{NAMES[j % 2]}" for i in range(5) for j in range(8)]
    (base / "d.csv").write_text("\n".join(["text,label", *lines]))
    data = load_data(DataSpec(source="csv:d.csv"), "text-classification", base)
    model = build_model(spec("hf:bert"), role="student", data=data, seed=0, base=base)
    for p in model.module.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(4, 20, (17, 9))
    mask = (torch.arange(9)[None] < torch.arange(17)[:, None] % 7 + 3).long()
    inputs = {"input_ids": ids * mask, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}
    return as_run(model, inputs, base / "run", "text-classification"), model


def client(*served: Served, key: str = "", **settings: Any) -> TestClient:
    return TestClient(make_app(served, Settings(access_log=False, **settings), key or None), raise_server_exceptions=True)


@pytest.fixture
def web(image_run: tuple[Path, Model], text_run: tuple[Path, Model]) -> Iterator[TestClient]:
    """Pictures in two versions, and texts."""
    picture = open_model(image_run[0], 1)
    with client(Served("pics", "2", picture), Served("pics", "10", picture), Served("texts", "1", open_model(text_run[0], 1))) as started:
        yield started


def student(model: Model, inputs: Any) -> np.ndarray[Any, Any]:
    model.module.eval()
    with torch.no_grad():
        return model(inputs).double().numpy()


def tolerance(run: Path) -> float:
    return float(read(run / "export/model.onnx.json")["tolerance"])


# ---- without torch


def test_what_serves_and_predicts_imports_no_torch(image_run: tuple[Path, Model], tmp_path: Path) -> None:
    picture = photo(tmp_path / "a.png", 1, (20, 15))
    code = (
        "import sys\nclass Never:\n    def find_spec(self, name, path=None, target=None):\n"
        "        assert name.partition('.')[0] not in ('torch', 'transformers', 'torchvision', 'pyarrow'), name\n"
        "sys.meta_path.insert(0, Never())\nimport limbeck.serve\n"
        "assert not {'fastapi', 'pydantic', 'onnxruntime'} & set(sys.modules)\nimport limbeck.serve._process\n"
        "from limbeck.cli import main\nmain(sys.argv[1:])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", str(image_run[0]), str(picture)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["label"] in NAMES


# ---- the training's numbers


def test_an_image_file_gives_the_logits_that_the_student_gives_it(image_run: tuple[Path, Model], tmp_path: Path) -> None:
    """The student's own side goes through the data's source, batches and torch."""
    from PIL import Image

    run, model = image_run
    turned = Image.Exif()
    turned[0x0112] = 6
    for split in ("train", "test"):
        for number, size in enumerate(((20, 15), (12, 31), (12, 12), (9, 40))):
            photo(tmp_path / f"d/{split}/cat/{number}.png", number, size)
            photo(tmp_path / f"d/{split}/dög/{number}.jpg", 10 + number, size)
        photo(tmp_path / f"d/{split}/cat/grey.png", 20, (20, 15), "L")
        photo(tmp_path / f"d/{split}/cat/alpha.png", 21, (20, 15), "RGBA")
        photo(tmp_path / f"d/{split}/cat/palette.gif", 22, (20, 15), "P")
        photo(tmp_path / f"d/{split}/cat/turned.jpg", 23, (20, 15), exif=turned)
    data = load_data(DataSpec(source="imagefolder:d"), "image-classification", tmp_path)
    builder = BatchBuilder(data.test, student=HOW, num_classes=2)
    left = [row for request in evaluation_requests(data.test, 5) for row in student(model, builder(request).student)]
    served, files = open_model(run, 1), list((tmp_path / "d/test").rglob("*.*"))
    assert len(files) == len(left) == 12
    for file in files:  # the split has them in an order of its own: each is found, and once
        logits = served.run(served.from_image(file.read_bytes()))[0]
        distances = [np.abs(logits - row).max() for row in left]
        assert min(distances) <= tolerance(run), file
        left.pop(int(np.argmin(distances)))


@pytest.mark.parametrize("pairs", [False, True])
def test_a_text_gives_the_logits_that_the_student_gives_it(pairs: bool, text_run: tuple[Path, Model]) -> None:
    run, model = text_run
    served = open_model(run, 1)
    texts = ["a w1 w2", "w3", "", "a " * 40, "nowhere  seen, w1!"]
    second = ["w1", "w2 " * 30, "", "a", "w5 w6"] if pairs else None
    split = Split("test", Texts(texts, second), np.arange(5), text_ids(texts, second), np.zeros(5, np.int64))
    builder = BatchBuilder(split, student=model.preprocessing, num_classes=2)
    wanted = student(model, builder(evaluation_requests(split, 5)[0]).student)
    parts = [served.from_text(*both) for both in zip(texts, second or [None] * 5, strict=True)]
    np.testing.assert_allclose(served.run(served.stack(parts)), wanted, atol=tolerance(run), rtol=0)
    for one, row in zip(parts, wanted, strict=True):
        np.testing.assert_allclose(served.run(one)[0], row, atol=tolerance(run), rtol=0)


# ---- only what the run recorded


def copied(run: Path, to: Path) -> Path:
    import shutil

    shutil.copytree(run, to)
    return to


def test_a_file_that_the_run_did_not_record_is_not_loaded(image_run: tuple[Path, Model], tmp_path: Path) -> None:
    raw = (image_run[0] / "export/model.onnx").read_bytes()
    spoilt = copied(image_run[0], tmp_path / "spoilt")
    (spoilt / "export/model.onnx").write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    with pytest.raises(UsageError, match=r"is not the file that the run recorded: its sha256 is"):
        open_model(spoilt)
    beside = copied(image_run[0], tmp_path / "beside")
    (beside / "export/model.onnx.data").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"model\.onnx\.data: is not recorded"):
        open_model(beside)
    other = copied(image_run[0], tmp_path / "other")
    record = read(other / "export/model.onnx.json")
    write_json(other / "export/model.onnx.json", {**record, "files": {"model.onnx": "0" * 64}})
    with pytest.raises(UsageError, match="records another file"):
        open_model(other)
    gone = copied(image_run[0], tmp_path / "gone")
    (gone / "export/model.onnx").unlink()
    with pytest.raises(UsageError, match="is not there"):
        open_model(gone)
    for export, text in (
        ({}, "has no ONNX file"),
        ({"onnx": {"file": "x"}}, "records no sha256"),
        ({"onnx": {"sha256": 3}}, "records no sha256"),
    ):
        write_json(gone / "metrics.json", {"export": export})
        with pytest.raises(UsageError, match=text):
            open_model(gone)
    with pytest.raises(UsageError, match="neither a finished run"):
        open_model(tmp_path)


def test_an_older_record_has_the_hash_of_the_one_file(image_run: tuple[Path, Model], tmp_path: Path) -> None:
    old = copied(image_run[0], tmp_path / "old")
    record = read(old / "export/model.onnx.json")
    assert record.pop("files") == {"model.onnx": digest(old / "export/model.onnx")}
    write_json(old / "export/model.onnx.json", record)
    write_json(old / "metrics.json", {"export": {"onnx": record}})
    assert open_model(old).classes == NAMES


# ---- the protocol


def tensor(values: Any, **more: Any) -> dict[str, Any]:
    array = np.asarray(values, dtype=np.float32)
    return {"name": "image", "shape": list(array.shape), "datatype": "FP32", "data": array.ravel().tolist(), **more}


def test_metadata_versions_and_the_index(web: TestClient) -> None:
    assert web.get("/v2").json()["extensions"] == ["binary_tensor_data", "model_repository"]
    assert web.get("/v2/health/live").json() == {"live": True}
    assert web.get("/v2/health/ready").status_code == 200
    about = web.get("/v2/models/pics").json()
    assert about["versions"] == ["2", "10"]  # as numbers
    assert about["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 12, 12]}]
    assert about["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 2]}]
    rows = web.post("/v2/repository/index").json()
    assert [(r["name"], r["version"], r["state"]) for r in rows] == [
        ("pics", "2", "READY"),
        ("pics", "10", "READY"),
        ("texts", "1", "READY"),
    ]
    assert web.post("/v2/models/pics/infer", json={"inputs": [tensor(np.zeros((1, 3, 12, 12)))]}).json()["model_version"] == "10"
    assert web.get("/v2/models/pics/versions/2/ready").status_code == 200
    assert web.get("/v2/models/pics/versions/3").status_code == 404
    assert "there are pics, texts" in web.get("/v2/models/nobody").json()["error"]


def test_json_and_bytes_give_the_files_own_answer(web: TestClient, image_run: tuple[Path, Model]) -> None:
    import onnxruntime

    x = np.random.default_rng(0).normal(size=(3, 3, 12, 12)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(image_run[0] / "export/model.onnx"), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(["logits"], {"image": x})
    for one in (tensor(x), {**tensor(x), "data": x.tolist()}):
        answer = web.post("/v2/models/pics/versions/2/infer", json={"id": "mine", "inputs": [one]}).json()
        assert answer["id"] == "mine"
        [output] = answer["outputs"]
        np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), wanted, atol=1e-5)
    head = {"inputs": [{"name": "image", "shape": [3, 3, 12, 12], "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}]}
    for asked in ({"parameters": {"binary_data_output": True}}, {"outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}):
        text = json.dumps({**head, **asked}).encode()
        answer = web.post("/v2/models/pics/infer", content=text + x.tobytes(), headers={"Inference-Header-Content-Length": str(len(text))})
        cut = int(answer.headers["inference-header-content-length"])
        assert json.loads(answer.content[:cut])["outputs"][0]["parameters"] == {"binary_data_size": 24}
        np.testing.assert_allclose(np.frombuffer(answer.content[cut:], "<f4").reshape(3, 2), wanted, atol=1e-5)


ZEROS = np.zeros((1, 3, 12, 12))
WRONG: list[tuple[Any, int, str]] = [
    (b"{", 400, "not JSON"),
    (b"\xff", 400, "not JSON"),
    (b"[" * 100_000, 400, "nested too deep"),
    (b"[]", 400, "must be a JSON object"),
    (b'{"inputs": [NaN]}', 400, "NaN is no JSON"),
    (b"1" * 5000, 400, ""),
    ({}, 400, "'inputs' must be"),
    ({"inputs": []}, 400, "'inputs' must be"),
    ({"inputs": [tensor(ZEROS, name="imge")]}, 400, "the model has the inputs image"),
    ({"inputs": [tensor(ZEROS), tensor(ZEROS)]}, 400, "the model has the inputs image"),
    ({"inputs": [tensor(ZEROS, datatype="INT64")]}, 400, "datatype FP32"),
    ({"inputs": [tensor(ZEROS, shape=[1, 3, 12, True])]}, 400, "'shape' must be"),
    ({"inputs": [tensor(ZEROS, shape=[1, 3, 12])]}, 400, "has the shape"),
    ({"inputs": [tensor(ZEROS, shape=[1, 3, 11, 12])]}, 400, "has the shape"),
    ({"inputs": [tensor(ZEROS, shape=[2, 3, 12, 12])]}, 400, "has 432 values"),
    ({"inputs": [tensor(ZEROS, data=[[1], [1, 2]])]}, 400, "flat or nested evenly"),
    ({"inputs": [tensor(ZEROS, data=["a"] * 432)]}, 400, "numbers alone"),
    ({"inputs": [tensor(ZEROS, data=[None] * 432)]}, 400, "numbers alone"),
    ({"inputs": [tensor(ZEROS, data=[10**400] * 432)]}, 400, ""),
    ({"inputs": [tensor(ZEROS, data=[1e300] * 432)]}, 400, "NaN or infinite"),
    ({"inputs": [tensor(ZEROS, data=3)]}, 400, "neither 'data'"),
    ({"inputs": [tensor(ZEROS, parameters={"shared_memory_region": "x"})]}, 400, "shared memory"),
    ({"inputs": [tensor(ZEROS, parameters={"binary_data_size": 4})]}, 400, "both 'data'"),
    ({"inputs": [tensor(ZEROS)], "outputs": [{"name": "labels"}]}, 400, "has the output logits"),
    ({"inputs": [tensor(ZEROS)], "outputs": [{"name": "logits", "parameters": {"classification": 2}}]}, 400, "not offered"),
    ({"inputs": [tensor(ZEROS)], "id": 3}, 400, "'id'"),
    ({"inputs": [tensor(ZEROS + 1e5)]}, 400, "not prepared"),
    ({"inputs": [tensor(np.zeros((33, 3, 12, 12)))]}, 400, "1 to 32 rows"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_cannot_be_read_is_a_sentence(number: int, web: TestClient) -> None:
    body, status, text = WRONG[number]
    answer = web.post("/v2/models/pics/infer", content=body if isinstance(body, bytes) else json.dumps(body).encode())
    assert answer.status_code == status, answer.text
    assert text in answer.json()["error"]


@pytest.mark.parametrize("length", ["x", "-1", "999999", "1" * 40, ""])
def test_a_wrong_header_length_is_refused(length: str, web: TestClient) -> None:
    answer = web.post("/v2/models/pics/infer", content=b"{}", headers={"Inference-Header-Content-Length": length})
    assert answer.status_code == 400


def test_tokens_that_the_model_cannot_take_are_the_senders_error(web: TestClient) -> None:
    def tokens(ids: list[int]) -> dict[str, Any]:
        names = ("input_ids", "token_type_ids", "attention_mask")
        values = (ids, [0] * len(ids), [1] * len(ids))
        return {"inputs": [{"name": n, "shape": [1, len(ids)], "datatype": "INT64", "data": v} for n, v in zip(names, values, strict=True)]}

    assert web.post("/v2/models/texts/infer", json=tokens([2, 5, 3])).status_code == 200
    assert web.post("/v2/models/texts/infer", json=tokens([2.0, 5, 3])).status_code == 200  # type: ignore[list-item]
    for wrong in ([2, 999_999, 3], [2, -1, 3], [2.5, 5, 3]):
        answer = web.post("/v2/models/texts/infer", json=tokens(wrong))  # type: ignore[arg-type]
        assert answer.status_code == 400, wrong
    assert "at most" in web.post("/v2/models/texts/infer", json=tokens([5] * 40)).json()["error"]
    assert web.post("/v2/models/texts/infer", json=tokens([2, 2**63, 3])).status_code == 400


# ---- /predict


def test_texts_and_image_files_get_probabilities(
    web: TestClient, image_run: tuple[Path, Model], text_run: tuple[Path, Model], tmp_path: Path
) -> None:
    picture = photo(tmp_path / "a.png", 3, (40, 30)).read_bytes()
    served = open_model(image_run[0], 1)
    wanted = dict(zip(NAMES, softmax(served.run(served.from_image(picture)))[0], strict=True))
    for sent in (
        {"content": picture, "headers": {"content-type": "image/png"}},
        {"content": picture, "headers": {"content-type": "application/octet-stream"}},
        {"files": {"file": ("a.png", picture, "image/png")}},
    ):
        answer = web.post("/predict?model=pics&version=2", **sent)
        assert answer.status_code == 200, answer.text
        [result] = answer.json()["results"]
        for row in result["probabilities"]:
            assert row["probability"] == pytest.approx(wanted[row["label"]], abs=1e-6)
        assert result["label"] == max(wanted, key=lambda k: wanted[k])
        assert answer.json()["time_ms"]["total"] > 0
    reader = open_model(text_run[0], 1)
    texts = ["a w1", "w2 w3 w1 w2", "a"]
    found = web.post("/predict?model=texts&top=1", json={"texts": texts}).json()["results"]
    for text, row in zip(texts, found, strict=True):
        assert row["probability"] == pytest.approx(softmax(reader.run(reader.from_text(text)))[0].max(), abs=1e-5)
        assert len(row["probabilities"]) == 1


@pytest.mark.parametrize(
    ("where", "sent", "status", "text"),
    [
        ("", {"json": {"text": "a"}}, 400, "several models are served"),
        ("?model=texts&tp=1", {"json": {"text": "a"}}, 400, "'tp' is no parameter"),
        ("?model=texts&top=-1", {"json": {"text": "a"}}, 400, "whole number"),
        ("?model=texts&version=7", {"json": {"text": "a"}}, 404, "no version '7'"),
        ("?model=texts", {"json": {"txt": "a"}}, 400, "'txt' is no key"),
        ("?model=texts", {"json": {"text": 3}}, 400, "must be a string"),
        ("?model=texts", {"json": {"text": "a", "text_pair": None}}, 400, "must be a string"),
        ("?model=texts", {"json": {"text": "a", "texts": ["a"]}}, 400, "either"),
        ("?model=texts", {"json": {"texts": []}}, 400, "list of texts"),
        ("?model=texts", {"json": {"texts": ["a"] * 33}}, 400, "at most 32"),
        ("?model=texts", {"json": {"text": "a" * 30_000}}, 400, "at most 20,000 characters"),
        ("?model=texts", {"content": b'{"text": "\\ud800"}', "headers": {"content-type": "application/json"}}, 400, "cannot be read"),
        ("?model=texts", {"content": b"x", "headers": {"content-type": "image/png"}}, 415, "takes texts"),
        ("?model=texts", {"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "content type"),
        ("?model=pics", {"json": {"text": "a"}}, 415, "takes images"),
        ("?model=pics", {"content": b"GIF89a nothing", "headers": {"content-type": "image/gif"}}, 400, "cannot be read"),
        ("?model=pics", {"content": b"", "headers": {"content-type": "image/gif"}}, 400, "cannot be read"),
        ("?model=pics", {"data": {"file": "x"}, "files": {"a": b""}}, 400, "files alone"),
        ("?model=pics", {"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "form cannot be read"),
        ("?model=pics", {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, "form"),
        ("?model=pics", {"content": b"x", "headers": {"content-encoding": "gzip"}}, 415, "compressed"),
    ],
)
def test_what_predict_cannot_take_is_a_sentence(web: TestClient, where: str, sent: dict[str, Any], status: int, text: str) -> None:
    answer = web.post(f"/predict{where}", **sent)
    assert answer.status_code == status, answer.text
    assert text in answer.json()["error"]


# ---- limits, key, watching


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    image_run: tuple[Path, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = photo(tmp_path / "a.png", 3, (40, 30)).read_bytes()
    monkeypatch.setattr("limbeck.pixels.to_array", lambda *_: pytest.fail("it was decoded"))
    with client(Served("pics", "1", open_model(image_run[0], 1)), max_pixels=1199) as web:
        answer = web.post("/predict", content=picture, headers={"content-type": "image/png"})
    assert answer.status_code == 413
    assert "at most 1,199" in answer.json()["error"]


def ask(app: Any, headers: list[tuple[bytes, bytes]], messages: list[dict[str, Any]], path: str = "/predict") -> tuple[int, int]:
    """The status of an answer, and how many messages of the body were read for it."""
    read_, sent = [0], []

    async def receive() -> dict[str, Any]:
        if read_[0] == len(messages):
            await asyncio.sleep(60)
        read_[0] += 1
        return messages[read_[0] - 1]

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "root_path": "",
    }
    scope |= {"http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], read_[0]


def test_bodies_that_are_too_long_or_too_slow_are_refused(image_run: tuple[Path, Model]) -> None:
    app = make_app([Served("pics", "1", open_model(image_run[0], 1))], Settings(access_log=False, max_body=1000, body_timeout=0.2))
    part = {"type": "http.request", "body": b"x" * 400, "more_body": True}
    assert ask(app, [(b"content-length", b"1001")], [part]) == (413, 0)  # nothing of it was read
    assert ask(app, [(b"content-length", b"9" * 50)], [part]) == (413, 0)
    assert ask(app, [(b"content-length", b"-1")], [part]) == (413, 0)
    assert ask(app, [], [part] * 9) == (413, 3)  # of unknown length: no more than it takes
    assert ask(app, [], [part, part])[0] == 408


def test_a_key_is_asked_of_every_route_but_probes_and_pages(image_run: tuple[Path, Model]) -> None:
    with client(Served("pics", "1", open_model(image_run[0], 1)), key="secret") as web:
        for path in ("/v2/health/live", "/v2/health/ready", "/"):
            assert web.get(path).status_code == 200
        for path in ("/v2", "/models", "/metrics", "/v2/models/pics", "/nowhere"):
            assert web.get(path).status_code == 401
            assert web.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
        assert web.get("/v2", headers={"authorization": "Bearer secret"}).status_code == 200
        assert web.get("/v2", headers={"x-api-key": "secret"}).status_code == 200
        assert web.post("/predict", content=b"x" * 10).headers["connection"] == "close"


def test_metrics_and_the_access_log_say_what_happened(
    image_run: tuple[Path, Model], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = photo(tmp_path / "a.png", 3, (40, 30)).read_bytes()
    app = make_app([Served("pics", "1", open_model(image_run[0], 1))], Settings())
    with TestClient(app) as web:
        web.post("/predict", content=picture, headers={"content-type": "image/png"})
        web.post("/predict", content=b"x" * 10, headers={"content-encoding": "gzip"})
        text = web.get("/metrics").text
    assert 'limbeck_requests_total{method="POST",route="/predict",status="200"} 1.0' in text
    assert 'limbeck_refused_total{limit="encoding"} 1.0' in text
    assert 'limbeck_batch_rows_count{model="pics",version="1"} 1.0' in text
    first, second, _ = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (first["status"], first["model"], first["batch"], first["bytes_in"]) == (200, "pics", 1, len(picture))
    assert (second["status"], second["refused"]) == (415, "encoding")


def test_the_document_names_the_models_and_their_tensors(web: TestClient) -> None:
    found = web.get("/openapi.json").json()
    assert "/v2/models/pics/versions/10/infer" in found["paths"]
    assert found["paths"]["/v2/models/{name}"]["get"]["parameters"][0]["schema"]["enum"] == ["pics", "texts"]
    operation = found["paths"]["/v2/models/pics/infer"]["post"]
    asked = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]["inputs"]["prefixItems"][0]
    assert asked["properties"]["shape"] == {"const": [1, 3, 12, 12]}
    assert {"400", "404", "413", "503"} <= set(operation["responses"])
    assert web.get("/docs").status_code == 200


def test_a_server_that_stops_says_so(image_run: tuple[Path, Model]) -> None:
    app = make_app([Served("pics", "1", open_model(image_run[0], 1))], Settings(access_log=False))
    with TestClient(app) as web:
        app.draining = True
        assert web.get("/v2/health/ready").status_code == 503
        assert web.get("/v2/health/live").status_code == 200
        answer = web.post("/v2/models/pics/infer", json={"inputs": [tensor(ZEROS)]})
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")


# ---- batches


class Slow:
    """Stands in for a model: sums rows, keeps what it was given, and waits to be let go."""

    pads, kind = False, "tensor"

    def __init__(self) -> None:
        self.batches: list[np.ndarray[Any, Any]] = []
        self.go = threading.Event()

    def run(self, arrays: dict[str, Any]) -> Any:
        self.batches.append(arrays["x"])
        self.go.wait(30)
        if (arrays["x"] < 0).any():
            raise Refused("negative")
        return arrays["x"].sum(axis=1, keepdims=True)

    def stack(self, parts: Any) -> Any:
        return parts[0] if len(parts) == 1 else {"x": np.concatenate([p["x"] for p in parts])}


def rows(*values: float) -> dict[str, Any]:
    return {"x": np.array([[v, 1.0] for v in values])}


async def gathered(batcher: Any, model: Slow, *inputs: dict[str, Any]) -> list[Any]:
    """The first runs alone; the others come while it does."""
    first = asyncio.create_task(batcher(inputs[0]))
    while not model.batches:
        await asyncio.sleep(0.001)
    others = [asyncio.create_task(batcher(one)) for one in inputs[1:]]
    await asyncio.sleep(0.01)
    model.go.set()
    found = await asyncio.gather(first, *others, return_exceptions=True)
    await batcher.close()
    return list(found)


def made(model: Slow, **settings: Any) -> Any:
    return Batcher(model, **{"max_batch": 4, "window": 0.0, "queue": 8, "timeout": 30.0, **settings})  # type: ignore[arg-type]


def test_what_comes_while_a_batch_runs_runs_together_and_each_gets_its_own() -> None:
    model = Slow()
    found = asyncio.run(gathered(made(model), model, rows(1), rows(2), rows(3, 4), rows(5), rows(6)))
    assert [len(b) for b in model.batches] == [1, 4, 1]
    assert [answer.logits.ravel().tolist() for answer in found] == [[2], [3], [4, 5], [6], [7]]
    assert [answer.batch for answer in found] == [1, 4, 4, 4, 1]


@pytest.mark.parametrize(("pace", "alone", "together"), [(0.001, True, True), (0.004, True, False), (0.02, False, False)])
def test_a_request_alone_runs_in_the_loop_for_longer_than_several_do(pace: float, alone: bool, together: bool) -> None:
    """The way to a thread and back costs more than it holds up. pace: seconds that a row is expected to take."""
    where: list[bool] = []

    class Asked(Slow):
        def run(self, arrays: dict[str, Any]) -> Any:
            where.append(threading.current_thread() is threading.main_thread())
            return super().run(arrays)

    async def ask() -> None:
        model = Asked()
        model.go.set()
        batcher = made(model)
        await batcher(rows(0))  # how long a row takes is not known yet: in the thread
        batcher._cost = pace / 2  # a row has two elements
        await batcher(rows(1))
        batcher._cost = pace / 4
        await asyncio.gather(batcher(rows(2)), batcher(rows(3)))
        await batcher.close()

    asyncio.run(ask())
    assert where == [False, alone, together]


def test_what_is_asked_again_after_a_refusal_does_not_hold_the_loop_up() -> None:
    """One bad request among many would otherwise have each of them run there, one behind the other. Longer inputs are expected to take longer."""
    where: list[bool] = []

    class Asked(Slow):
        def run(self, arrays: dict[str, Any]) -> Any:
            where.append(threading.current_thread() is threading.main_thread())
            return super().run(arrays)

    async def ask(*inputs: dict[str, Any]) -> None:
        model = Asked()
        model.go.set()
        batcher = made(model)
        batcher._cost = 0.005 / 2  # a row has two elements
        await asyncio.gather(*map(batcher, inputs), return_exceptions=True)
        await batcher.close()

    asyncio.run(ask(rows(1), rows(-9), rows(2)))
    assert where == [False] * 4
    where.clear()
    asyncio.run(ask(rows(1)))
    asyncio.run(ask({"x": np.ones((1, 9))}))
    assert where == [True, False]


def test_shapes_that_differ_do_not_share_a_batch() -> None:
    model = Slow()
    wide = {"x": np.ones((1, 5))}
    found = asyncio.run(gathered(made(model), model, rows(1), rows(2), wide, rows(3)))
    assert [b.shape for b in model.batches] == [(1, 2), (2, 2), (1, 5)]
    assert [answer.logits.ravel().tolist() for answer in found] == [[2], [3], [5], [4]]


def test_a_request_that_the_model_refuses_does_not_spoil_the_others() -> None:
    model = Slow()
    found = asyncio.run(gathered(made(model), model, rows(1), rows(2), rows(-9), rows(3)))
    assert isinstance(found[2], Refused)
    assert [found[i].logits.item() for i in (0, 1, 3)] == [2, 3, 4]


def test_a_full_queue_and_a_long_wait_are_told() -> None:
    model = Slow()
    found = asyncio.run(gathered(made(model, queue=4), model, rows(1), rows(2, 3), rows(4, 5), rows(6)))
    assert isinstance(found[3], Busy)
    assert found[3].retry_after >= 1
    assert [type(f).__name__ for f in found[:3]] == ["Answer"] * 3
    model = Slow()

    async def late() -> list[Any]:
        batcher = made(model, timeout=0.05)
        answers = await asyncio.gather(batcher(rows(1)), batcher(rows(2)), return_exceptions=True)
        model.go.set()
        await batcher.close()
        return list(answers)

    assert [type(f).__name__ for f in asyncio.run(late())] == ["Busy", "Busy"]


def test_a_full_queue_is_503_with_retry_after(image_run: tuple[Path, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    with client(Served("pics", "1", open_model(image_run[0], 1)), queue=1) as web:
        answer = web.post("/v2/models/pics/infer", json={"inputs": [tensor(np.zeros((2, 3, 12, 12)))]})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1


# ---- limbeck predict, and the command line of serve


def predicted(*arguments: Any, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert limbeck("predict", *arguments) == code
    return capsys.readouterr().out


def test_predict_answers_files_folders_and_lists(image_run: tuple[Path, Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(5):
        photo(tmp_path / f"d/{i % 2}/{i}.png", i, (20 + i, 15))
    (tmp_path / "d/notes.txt").write_text("x")
    (tmp_path / "d/0/broken.jpg").write_bytes(b"nothing")
    out = predicted(image_run[0], tmp_path / "d", tmp_path / "d/1/1.png", "--batch-size", 2, "--top", 0, capsys=capsys, code=3)
    found = [json.loads(line) for line in out.splitlines()]
    assert [Path(row["input"]).name for row in found] == ["0.png", "2.png", "4.png", "broken.jpg", "1.png", "3.png", "1.png"]
    assert "cannot be read" in found[3]["error"]
    served = open_model(image_run[0])
    for row in found:
        if "error" not in row:
            wanted = softmax(served.run(served.from_image(Path(row["input"]).read_bytes())))[0]
            assert [row["probabilities"][name] for name in NAMES] == pytest.approx(list(wanted), abs=1e-6)
            assert row["label"] == NAMES[int(wanted.argmax())]


def test_predict_answers_tables_and_standard_input(
    text_run: tuple[Path, Model], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.csv").write_text('id,text\n1,a w1\n2,"w2\nw3"\n3,\n', encoding="utf-8-sig")
    (tmp_path / "d.txt").write_text("a w1\nw2 w3\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a w1\n\nw2\n"))
    out = predicted(text_run[0], tmp_path / "d.csv", "-", tmp_path / "d.txt", "--format", "csv", capsys=capsys)
    found = list(csv.DictReader(io.StringIO(out)))
    assert [(Path(r["input"]).name, r["row"]) for r in found] == [
        ("d.csv", "1"), ("d.csv", "2"), ("d.csv", "3"), ("-", "1"), ("-", "2"), ("-", "3"), ("d.txt", "1"), ("d.txt", "2"),
    ]  # fmt: skip
    assert found[0]["label"] == found[3]["label"] == found[6]["label"]
    assert float(found[0]["probability"]) == pytest.approx(float(found[3]["probability"]), abs=1e-6)


def test_float_arrays_come_in_npy_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = wrap_module(nn.Sequential(nn.Linear(6, 2)), role="student", data=floats(classes=NAMES))
    run = as_run(model, {"x": torch.randn(17, 6)}, tmp_path / "run", "image-classification")
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    found = list(answers(open_model(run), [str(tmp_path / "x.npy")], stdin=io.StringIO()))
    wanted = softmax(student(model, {"x": torch.from_numpy(x)}))
    assert [row["probability"] for row in found] == pytest.approx(list(wanted.max(axis=1)), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("RUN", "nowhere.png"), "nowhere.png: no such file"),
        (("RUN", "EMPTY"), "has no image file"),
        (("RUN", "a.png", "--format", "json"), "Did you mean 'jsonl'?"),
        (("RUN", "a.png", "--format", "csv", "--top", "2"), "has no effect"),
        (("RUN", "a.png", "--top", "x"), "--top: got 'x'"),
        (("TEXT", "a.png"), "is an image, and the model takes texts"),
        (("TEXT", "d.csv"), "has no column 'text'; it has words"),
        (("EMPTY", "a.png"), "is not a run"),
    ],
)
def test_mistakes_of_predict(
    arguments: tuple[str, ...],
    text: str,
    image_run: tuple[Path, Model],
    text_run: tuple[Path, Model],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    photo(tmp_path / "a.png", 1, (9, 9))
    (tmp_path / "d.csv").write_text("words\na\n")
    places = {"RUN": str(image_run[0]), "TEXT": str(text_run[0])}
    assert limbeck("predict", *(places.get(a, a) for a in arguments)) == 2
    said = capsys.readouterr()
    assert text in said.err
    assert not said.out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("RUN", "--port", "x"), "--port: got 'x'"),
        (("RUN", "--batch-window", "-1"), "--batch-window: got '-1'"),
        (("RUN", "--queue", "4"), "a full batch could never wait"),
        (("RUN", "RUN"), "another model is 'run', version 1"),
        (("a b=RUN",), "cannot stand in an address"),
        (("a@x=RUN",), "the version 'x' is not a whole number"),
        (("nowhere",), "no such folder: 'nowhere'"),
        (("RUN", "--read-timeout", "0"), "no request comes in no time"),
    ],
)
def test_mistakes_of_serve(
    arguments: tuple[str, ...], text: str, image_run: tuple[Path, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    assert limbeck("serve", *(a.replace("RUN", str(image_run[0])) for a in arguments)) == 2
    assert text in capsys.readouterr().err


class TestStopBeforeServing:
    """SIGTERM may come when a process is about to serve and uvicorn does not listen to signals yet."""

    def told(self, monkeypatch: pytest.MonkeyPatch, when: str) -> list[bool]:
        from limbeck.serve import _process

        ran: list[bool] = []

        def run(server: Any, sockets: Any) -> None:
            if when == "at the start":
                signal.raise_signal(signal.SIGTERM)
            ran.append(server.should_exit)

        monkeypatch.setattr(_process, "make_app", lambda served, settings: None)
        monkeypatch.setattr(_process._Server, "run", run)
        with _process._ended_quietly() as told:
            if when == "before":
                signal.raise_signal(signal.SIGTERM)
            _process._run([], Settings(), None, told)  # type: ignore[arg-type]
        return ran

    def test_before_there_is_a_server(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.told(monkeypatch, "before") == []

    def test_before_the_server_listens_to_signals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.told(monkeypatch, "at the start") == [True]

    def test_without_a_signal_it_serves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.told(monkeypatch, "never") == [False]
