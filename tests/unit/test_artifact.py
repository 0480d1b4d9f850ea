"""An artifact: a folder that can be copied away, answers without Limbeck and PyTorch, says where it came from, and is whole or not there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from answering import answer, photos
from limbeck import _artifacts
from limbeck.again import export_run
from limbeck.errors import UsageError
from limbeck.export import Refused, onnx
from limbeck.export.triton import config, model_name
from limbeck.models import load_saved
from limbeck.run import unseal
from models_support import text_folder
from running import arrays, digest, left_over, limbeck, make_folder, read, recipe, run

onnxruntime = pytest.importorskip("onnxruntime")

from limbeck.serve import open_model, softmax  # noqa: E402

WIDE = """

def wide(num_classes=3):
    body = [nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 48, 3, padding=1, stride=2), nn.BatchNorm2d(48), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, num_classes))


def deep(num_classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, num_classes))
"""

KINDS = ("image", "text", "tensor")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """The faster of the ONNX exporters."""
    traced = dict(onnx.writers())["trace"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "writers", lambda: (("trace", traced),))
        yield


def make(kind: str, folder: Path) -> Path:
    """A trained run of each kind of data: pictures of 8 x 8, texts, float arrays."""
    make_folder(folder, 240)
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + WIDE)
    changes: dict[str, Any] = {
        "train": {"epochs": 2, "lr": 0.01},
        "teacher": None,
        "student": {"model": "python:nets.py:wide"},
        "baseline": False,
    }
    if kind == "tensor":
        np.savez(folder / "floats.npz", **{k: v / np.float32(255) if k.endswith("x") else v for k, v in arrays(240).items()})
        changes |= {"student": {"model": "python:nets.py:deep"}, "data": {"source": "npz:floats.npz"}}
    if kind == "text":
        text_folder(folder / "bert", layers=2)
        rows = [f"w{i} w{j} w{(i * j) % 14},{'odd' if j % 2 else 'even'}" for i in range(14) for j in range(14)]
        (folder / "d.csv").write_text("\n".join(["text,label", *rows]))
        changes |= {"student": {"model": "hf:bert"}, "data": {"source": "csv:d.csv"}, "task": "text-classification"}
    changes.pop("baseline")
    run("train", recipe(folder, **changes), out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(kind, tmp_path_factory.mktemp(kind) / "base") for kind in KINDS}


@pytest.fixture(scope="module")
def exported(runs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Of each kind a float32 artifact and, of pictures, one in 8 bits and a Triton repository."""
    found = {kind: export_run(path, ["onnx"], layouts=["folder"]) for kind, path in runs.items()}
    found["image"] |= export_run(runs["image"], ["onnx", "torchscript"], quantize="int8", max_drop=5, layouts=["triton"])
    return found


@pytest.fixture
def here(runs: dict[str, Path], exported: Any, tmp_path: Path) -> Callable[..., Path]:
    """An artifact, copied away."""

    def copied(kind: str = "image", key: str = "onnx-float32") -> Path:
        return Path(shutil.copytree(runs[kind] / "export" / key, tmp_path / f"{kind}-{key}"))

    return copied


def served(artifact: Path, prepared: Callable[[Any], Any]) -> dict[str, float]:
    model = open_model(artifact, 1)
    return dict(zip(model.classes, softmax(model.run(prepared(model)))[0], strict=True))


# ---- answers


def test_the_readme_answers_image_files_as_training_read_them(here: Callable[..., Path], tmp_path: Path) -> None:
    artifact = here()
    for photo in photos(tmp_path):
        assert answer(artifact, str(photo)) == pytest.approx(served(artifact, lambda m, p=photo: m.from_image(p.read_bytes())), abs=2e-5)


def test_the_readme_answers_texts_and_pairs(here: Callable[..., Path]) -> None:
    artifact = here("text")
    for texts in (["w1 w2"], [""], ["w1 " * 40], ["w1 w3", "w4"]):
        assert answer(artifact, *texts) == pytest.approx(served(artifact, lambda m, t=texts: m.from_text(*t)), abs=2e-5)


def test_the_readme_answers_arrays(here: Callable[..., Path], runs: dict[str, Path], tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((8, 8), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    student = load_saved(runs["tensor"])
    with torch.no_grad():
        wanted = student({"x": torch.from_numpy(x)[None]}).softmax(-1)[0]
    assert list(answer(here("tensor"), str(tmp_path / "x.npy")).values()) == pytest.approx(sorted(wanted.tolist(), reverse=True), abs=2e-5)


def test_the_shorter_side_and_the_middle(here: Callable[..., Path], tmp_path: Path) -> None:
    """The Python of the README against the code of training, with a resize that this run's student does not have."""
    import onnx as library

    from limbeck.export import write_artifact

    artifact, work = here(), tmp_path / "work"
    work.mkdir()
    model = library.load(str(artifact / "model.onnx"))
    facts = {p.key: p.value for p in model.metadata_props}
    facts["preprocessing"] = json.dumps({**json.loads(facts["preprocessing"]), "resize_shorter": 11, "interpolation": "bicubic"})
    library.helper.set_model_props(model, facts)
    library.save(model, str(work / "model.onnx"))
    write_artifact(work, tmp_path / "other", {k: v for k, v in manifest(artifact).items() if k not in ("artifact", "files")})
    for photo in photos(tmp_path):
        found = answer(tmp_path / "other", str(photo))
        assert found == pytest.approx(served(tmp_path / "other", lambda m, p=photo: m.from_image(p.read_bytes())), abs=2e-5)


def test_predict_and_the_server_take_an_artifact(here: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastapi")
    from starlette.testclient import TestClient

    from limbeck.serve import Settings
    from limbeck.serve._app import Served, make_app

    artifact, photo = here(key="onnx-int8"), photos(tmp_path)[0]
    assert limbeck("predict", artifact, photo) == 0
    line = json.loads(capsys.readouterr().out)
    alone = answer(artifact, str(photo))
    assert line["label"] == next(iter(alone))
    assert line["probabilities"] == pytest.approx(alone, abs=0.02)
    with TestClient(make_app([Served("m", "1", open_model(artifact, 1))], Settings(access_log=False), None)) as web:
        told = web.post("/predict", content=photo.read_bytes(), headers={"content-type": "image/png"}).json()
    assert told["results"][0]["label"] == line["label"]


# ---- what is written


def manifest(artifact: Path) -> dict[str, Any]:
    return dict(unseal((artifact / "manifest.json").read_bytes()))


def test_the_manifest_has_every_file_and_the_record_of_the_run(runs: dict[str, Path], exported: dict[str, Any]) -> None:
    for kind, key in (("image", "onnx-int8"), ("image", "onnx-float32"), ("text", "onnx-float32"), ("tensor", "onnx-float32")):
        folder = runs[kind] / "export" / key
        body, recorded = manifest(folder), read(runs[kind] / "metrics.json")["export"][key]
        assert body["files"] == {p.name: digest(p) for p in folder.iterdir() if p.name != "manifest.json"}
        assert ("tokenizer.json" in body["files"]) == (kind == "text")
        assert {"labels.json", "preprocess.json", "README.md"} <= body["files"].keys()
        assert body["sha256"] == digest(folder / "model.onnx")
        assert body["bytes"] == (folder / "model.onnx").stat().st_size
        assert body["source"]["weights_sha256"] == read(runs[kind] / "student/model.json")["weights_sha256"]
        assert body["versions"]["onnxruntime"] == onnxruntime.__version__
        assert body["latency_ms"]["p50"] > 0
        assert body["throughput"]["items_per_second"] > 0
        assert body["peak_rss_bytes"] is None or 10 << 20 < body["peak_rss_bytes"] < 4 << 30
        assert {**recorded, "file": "", "triton": ""} == {**body, "file": "", "triton": ""}
        assert recorded["file"] == f"export/{key}/model.onnx"
    assert not left_over(runs["image"])


def test_the_accuracy_is_that_of_the_file_on_the_test_split(runs: dict[str, Path], exported: dict[str, Any]) -> None:
    with np.load(runs["image"].parent / "pictures.npz") as data:
        x, y = data["test_x"], data["test_y"]
    for key in ("onnx-int8", "onnx-float32"):
        folder = runs["image"] / "export" / key
        how = read(folder / "preprocess.json")
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        prepared = ((x[:, None] / 255 - how["mean"][0]) / how["std"][0]).astype(np.float32)
        (logits,) = session.run(["logits"], {"image": prepared})
        found = exported["image"][key]["test"]
        assert found["items"] == len(y) == 18
        assert found["metrics"]["accuracy"] == pytest.approx((logits.argmax(1) == y).mean())


def test_files_for_pytorch_have_their_own_figures(runs: dict[str, Path], exported: dict[str, Any]) -> None:
    record = exported["image"]["torchscript"]
    student = read(runs["image"] / "metrics.json")["models"]["student"]
    assert record["test"]["metrics"]["accuracy"] == pytest.approx(student["metrics"]["accuracy"])
    assert record["runtime"] == "TorchScript"
    assert read(runs["image"] / "export/model.torchscript.pt.json") == record
    # torch itself is in this process
    onnx_peak = exported["image"]["onnx-float32"]["peak_rss_bytes"]
    assert record["peak_rss_bytes"] is None or record["peak_rss_bytes"] > onnx_peak


def test_the_decision_is_made_on_validation_and_told(exported: dict[str, Any]) -> None:
    how = exported["image"]["onnx-int8"]["quantization"]
    assert (how["decided_on"], how["decided_on_items"], how["method"]) == ("validation", 12, "static")
    assert how["calibration_items"] == 128
    assert exported["image"]["onnx-int8"]["about"].endswith(
        f"on 12 samples of validation, with the same answer on {100 * exported['image']['onnx-int8']['agreement']:.1f} % of them."
    )
    assert how["drop"] <= how["max_drop"] == 5
    assert how["float32"]["bytes"] > exported["image"]["onnx-int8"]["bytes"]


def test_without_validation_a_part_of_training_decides_and_is_not_calibrated_on(runs: dict[str, Path]) -> None:
    from dataclasses import replace

    from limbeck.again import _of

    _, data = _of(runs["image"])
    none = replace(data, valid=data.valid.take([]))
    found = _artifacts._deciding(none, 0)
    assert found.name == "a part of the training split"
    assert "no validation split" in found.note
    assert len(found.decide) == 48
    assert np.bincount(found.decide.labels).tolist() == [16, 16, 16]  # stratified
    assert not {i.tobytes() for i in found.decide.ids} & {i.tobytes() for i in found.calibrate.ids}
    unlabelled = replace(none, train=replace(none.train, labels=np.full(len(none.train), -1)))
    with pytest.raises(UsageError, match="neither validation samples nor labelled"):
        _artifacts._deciding(unlabelled, 0)


def test_what_is_refused_leaves_nothing_and_exits_with_3(
    runs: dict[str, Path], exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*given: Any, **more: Any) -> Any:
        given[1].write_bytes(b"half a file")
        raise Refused("int8: no file was kept: too bad.")

    monkeypatch.setattr(_artifacts, "quantize", refuse)
    path = Path(shutil.copytree(runs["image"].parent, tmp_path / "copy")) / "run"
    file = path / "recipe.yaml"
    file.write_text(file.read_text().replace(str(runs["image"].parent), str(path.parent)))
    before = {str(p.relative_to(path)): digest(p) for p in path.rglob("*") if p.is_file()}
    assert limbeck("export", path, "--quantize", "int8") == 3
    assert "no file was kept: too bad." in capsys.readouterr().err
    assert {str(p.relative_to(path)): digest(p) for p in path.rglob("*") if p.is_file()} == before
    shutil.rmtree(path / "export")
    assert limbeck("export", path, "--quantize", "int8-dynamic") == 3
    assert not (path / "export").exists()


# ---- what is believed


@pytest.mark.parametrize("name", ["model.onnx", "labels.json", "preprocess.json", "README.md", "manifest.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_an_artifact_that_is_not_as_it_was_written_is_not_loaded(here: Callable[..., Path], name: str, how: str) -> None:
    file = here("text") / name
    if how == "gone":
        file.unlink()
    else:
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    with pytest.raises(UsageError, match=re.escape(name)):
        open_model(file.parent)


def test_files_that_the_manifest_does_not_name_are_not_looked_at(here: Callable[..., Path]) -> None:
    artifact = here()
    (artifact / "model.onnx.data").write_bytes(b"x")
    (artifact / "notes.txt").write_text("mine")
    open_model(artifact)


def test_a_manifest_that_points_elsewhere_is_refused(here: Callable[..., Path]) -> None:
    from limbeck.run import seal

    artifact = here()
    body = manifest(artifact)
    body["files"]["../x"] = "0" * 64
    (artifact / "manifest.json").write_text(seal(body))
    with pytest.raises(UsageError, match="other folders"):
        open_model(artifact)


# ---- Triton


def tokens(text: str) -> Iterator[str]:
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[A-Za-z_][A-Za-z0-9_]*|-?\d+|[\[\]{}:,]|(\S)', text):
        assert token[1] is None, token[1]
        yield token[0]


def parsed(text: str) -> dict[str, Any]:
    """Protobuf's text format, as far as such a file needs it, read strictly."""
    stream = [*tokens(text), "}"]

    def value() -> Any:
        token = stream.pop(0)
        if token == "{":
            return message()
        if token == "[":
            found = []
            while stream[0] != "]":
                found.append(value())
                assert stream[0] in (",", "]")
                if stream[0] == ",":
                    stream.pop(0)
                    assert stream[0] != "]"
            stream.pop(0)
            return found
        assert re.fullmatch(r'".*"|-?\d+|[A-Z][A-Z0-9_]*', token), token
        return json.loads(token) if token[0] in '"-0123456789' else token

    def message() -> dict[str, Any]:
        found: dict[str, Any] = {}
        while stream[0] != "}":
            name = stream.pop(0)
            assert name not in found
            if stream[0] == ":":
                stream.pop(0)
            else:
                assert stream[0] in "{[", name  # a scalar needs its colon
            found[name] = value()
        stream.pop(0)
        return found

    found = message()
    assert not stream
    return found


def test_triton_gets_a_repository_of_the_same_file(runs: dict[str, Path], exported: dict[str, Any]) -> None:
    root = runs["image"] / "export" / "triton-int8"
    assert exported["image"]["onnx-int8"]["triton"] == "export/triton-int8"
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) == [
        "run/1/model.onnx",
        "run/config.pbtxt",
        "run/labels.txt",
    ]
    assert digest(root / "run/1/model.onnx") == digest(runs["image"] / "export/onnx-int8/model.onnx")
    written = parsed((root / "run/config.pbtxt").read_text())
    assert (written["name"], written["backend"]) == ("run", "onnxruntime")
    assert written["max_batch_size"] > 1
    assert written["dynamic_batching"] == {}
    session = onnxruntime.InferenceSession(str(root / "run/1/model.onnx"), providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
    for told, real in ((written["input"], session.get_inputs()), (written["output"], session.get_outputs())):
        assert [(t["name"], t["data_type"]) for t in told] == [(r.name, kinds[r.type]) for r in real]
        assert [t["dims"] for t in told] == [
            [n if isinstance(n, int) else -1 for n in r.shape[1:]] for r in real
        ]  # the batch is not among them
    assert (root / "run/labels.txt").read_text().splitlines() == read(runs["image"] / "export/onnx-int8/labels.json")


@pytest.mark.parametrize("kind", KINDS)
def test_tritons_own_schema_takes_the_configuration(exported: dict[str, Any], kind: str) -> None:
    """The message that the server reads, from Triton's client package, without its gRPC."""
    import importlib.util

    client = pytest.importorskip("tritonclient")
    text_format = pytest.importorskip("google.protobuf.text_format")
    path = Path(client.__file__).parent / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    if not path.is_file() or spec is None or spec.loader is None:
        pytest.skip("this tritonclient brings no model_config_pb2")
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    record = exported[kind]["onnx-float32"]
    found = text_format.Parse(config("m", record), schema.ModelConfig())
    assert [(t.name, list(t.dims)) for t in found.input] == [
        (t["name"], [n if isinstance(n, int) else -1 for n in t["shape"][1:]]) for t in record["inputs"]
    ]
    assert {t.data_type for t in found.input} == {schema.TYPE_INT64 if kind == "text" else schema.TYPE_FP32}
    assert found.output[0].label_filename == "labels.txt"
    assert found.max_batch_size == 32
    assert found.HasField("dynamic_batching")


def test_tritons_lengths_are_free_and_names_are_such_as_it_takes(exported: dict[str, Any]) -> None:
    found = parsed(config('a "b"', exported["text"]["onnx-float32"]))
    assert found["name"] == 'a "b"'
    assert [t["dims"] for t in found["input"]] == [[-1]] * 3
    assert [t["data_type"] for t in found["input"]] == ["TYPE_INT64"] * 3
    assert model_name("..") == "student"


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quantize", "int9"], "--quantize: got 'int9', expected one of int8, int8-static, int8-dynamic, fp16. Did you mean 'int8'?"),
        (["--quantize", "int8", "--max-drop", "x"], "--max-drop: got 'x', expected a number from 0 up."),
        (["--quantize", "int8", "--max-drop", "-1"], "--max-drop: got '-1', expected a number from 0 up."),
        (["--max-drop", "1"], "--max-drop: has no effect without --quantize."),
        (["--layout", "tritan"], "--layout: got 'tritan', expected one of folder, triton. Did you mean 'triton'?"),
        (["--format", "pt2", "--quantize", "int8"], "--quantize: is for ONNX, and --format has none."),
        (["--format", "onnx,pt3"], "--format: got 'pt3', expected one of onnx, torchscript, pt2. Did you mean 'pt2'?"),
    ],
)
def test_mistakes_are_sentences(runs: dict[str, Path], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert limbeck("export", runs["tensor"], *arguments) == 2
    assert said in capsys.readouterr().err


def test_a_missing_package_is_a_sentence(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "onnx" else real(name, *more))
    assert limbeck("export", runs["tensor"], "--quantize", "int8") == 2
    assert "'onnx', which is not installed" in capsys.readouterr().err


def test_a_student_beyond_one_file_is_refused(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnx, "SINGLE_FILE_LIMIT", 1000)
    assert limbeck("export", runs["tensor"], "--quantize", "int8") == 3
    assert "an artifact is one ONNX file, which ends at 2 GiB" in capsys.readouterr().err


def test_one_json_document(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert limbeck("export", runs["tensor"], "--quantize", "fp16", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["onnx-fp16"]["quantization"]["method"] == "fp16"
