"""Exported files answer as the student does, or they do not exist."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.errors import DiskFull, ParityFailed, Stopped, UsageError
from limbeck.export import FORMATS, ExportFailed, export_model, onnx, pt2, torchscript
from limbeck.export._job import Job, brief, prepare
from limbeck.export.parity import compare
from limbeck.models import Model, state_hash
from limbeck.types import ImagePreprocessing, TensorPreprocessing, TextPreprocessing

onnxruntime = pytest.importorskip("onnxruntime")

CLASSES = ("cat", "dög", "owl", "yak")
ALL = ("onnx", "torchscript", "pt2")


class Cnn(nn.Module):
    """Batch normalisation with lived-in statistics, and a pooling whose cells overlap (7 pixels to 3)."""

    def __init__(self, cells: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)
        self.pool, self.drop, self.head = nn.AdaptiveAvgPool2d(cells), nn.Dropout(0.5), nn.Linear(6 * cells**2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.pool(self.norm(self.conv(x)).relu()).flatten(1)))


class Rows(nn.Module):
    """Under a tracer ``int`` makes the batch size that it sees a constant; torch.export keeps it free."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.reshape(int(x.shape[0]), -1))


def lived_in(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for tensor in module.parameters():
        tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)
    for tensor in module.buffers():
        if tensor.is_floating_point():
            tensor += torch.rand(tensor.shape, generator=generator)
    return module


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster of the ONNX exporters, for tests that are about something else."""
    traced = dict(onnx.writers())["trace"]
    monkeypatch.setattr(onnx, "writers", lambda: (("trace", traced),))


def of_image(module: nn.Module, size: int = 15, channels: int = 3) -> tuple[Model, dict[str, Tensor]]:
    preparation = ImagePreprocessing(channels, (0.4, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels])
    x = torch.randn(17, channels, size, size, generator=torch.Generator().manual_seed(0))
    return Model(lived_in(module), {}, "module", preparation, None, 4), {"image": x}


def of_tensor(module: nn.Module) -> tuple[Model, dict[str, Tensor]]:
    x = torch.randn(17, 2, 3, generator=torch.Generator().manual_seed(0))
    return Model(lived_in(module), {}, "module", TensorPreprocessing((2, 3)), None, 4), {"x": x}


def of_text(attention: str = "sdpa", tokenizer: Path | str = "nowhere") -> tuple[Model, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32,
        num_labels=4, attn_implementation=attention,
    )  # fmt: skip
    module = lived_in(transformers.BertForSequenceClassification(config))
    names = ("input_ids", "token_type_ids", "attention_mask")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 13, (17,), generator=generator)
    mask = (torch.arange(12)[None] < lengths[:, None]).long()
    ids = torch.randint(5, 40, (17, 12), generator=generator) * mask
    inputs = {"attention_mask": mask, "input_ids": ids, "token_type_ids": torch.zeros_like(ids)}  # in another order than the tokenizer's
    return Model(module, {}, "hf", TextPreprocessing(str(tokenizer), 24, names, "0"), None, 4), inputs


def timm_vit() -> tuple[Model, dict[str, Tensor]]:
    timm = pytest.importorskip("timm")
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 4}
    return of_image(timm.create_model("vit_tiny_patch16_224", **shape), 16)


def torchvision_mobilenet() -> tuple[Model, dict[str, Tensor]]:
    models = pytest.importorskip("torchvision.models.mobilenetv3")
    block = models.InvertedResidualConfig(16, 3, 24, 16, True, "HS", 2, 1, 1)
    return of_image(models.MobileNetV3([block], 32, num_classes=4), 16)


MODELS: dict[str, Callable[[], tuple[Model, dict[str, Tensor]]]] = {
    "cnn": lambda: of_image(Cnn()),
    "vit": timm_vit,
    "mobilenet": torchvision_mobilenet,
    "bert": of_text,
    "encoder": lambda: of_tensor(
        nn.Sequential(nn.TransformerEncoderLayer(3, 1, 8, batch_first=True), nn.Flatten(), nn.Linear(6, 4)),
    ),
}


def export(model: Model, inputs: dict[str, Tensor], folder: Path, *formats: str) -> dict[str, dict[str, Any]]:
    return export_model(model, list(formats), folder / "export", inputs=inputs, classes=CLASSES, task="image-classification")


def exactly(model: Model, inputs: dict[str, Tensor]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return model.module.eval() and model(inputs).double().numpy()


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("name", ["cnn", "vit", "bert"])
def test_every_file_answers_as_the_student_at_sizes_never_seen(name: str, tmp_path: Path) -> None:
    model, inputs = MODELS[name]()
    records = export(model, inputs, tmp_path, *ALL)
    folder = tmp_path / "export"
    runs = {"onnx": session(folder / "model.onnx"), "torchscript": torch.jit.load(str(folder / "model.torchscript.pt"))}
    runs["pt2"] = torch.export.load(str(folder / "model.pt2")).module()
    order = model.preprocessing.inputs if isinstance(model.preprocessing, TextPreprocessing) else tuple(inputs)
    assert [i.name for i in runs["onnx"].get_inputs()] == list(order)
    for batch, length in ((1, 12), (1, 3), (5, 7), (11, 9)):
        part = {
            k: v[4 : 4 + batch, :length] if isinstance(model.preprocessing, TextPreprocessing) else v[4 : 4 + batch]
            for k, v in inputs.items()
        }
        wanted = exactly(model, part)
        got = runs["onnx"].run(["logits"], {k: v.numpy() for k, v in part.items()})[0]
        assert np.abs(got - wanted).max() <= 1e-4 * max(1, np.abs(wanted).max())
        for form in ("torchscript", "pt2"):
            with torch.no_grad():
                got = runs[form](*(part[k] for k in order)).numpy()
            assert got.shape == wanted.shape
            assert np.abs(got - wanted).max() <= 1e-4 * max(1, np.abs(wanted).max())
    for form, record in records.items():
        path = tmp_path / record["file"]
        assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert record["bytes"] == path.stat().st_size
        assert record["agreement"] == 1.0
        assert record["max_abs_diff"] <= record["tolerance"]
        assert record["tolerance"] == pytest.approx(1e-4 * max(1, record["largest_logit"]))
        assert {1, 3, 17} <= set(record["batch_sizes"])
        assert 0 < record["latency_ms"]["p50"] <= record["latency_ms"]["p95"]
        assert json.loads(path.with_name(f"{path.name}.json").read_text()) == record
        assert path.name == FORMATS[form].FILE
    assert records["onnx"]["opset"] >= 17
    assert names_in(folder) == sorted([*(f"{FORMATS[f].FILE}" for f in ALL), *(f"{FORMATS[f].FILE}.json" for f in ALL)])


@pytest.mark.parametrize("name", ["bert", "mobilenet", "encoder"])
def test_the_second_onnx_exporter_would_do_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = onnx.writers()[1]
    if name == "encoder" and chosen[0] == "dynamo":
        pytest.skip("torch.onnx.export(dynamo=True) before 2.9 cannot write nn.TransformerEncoderLayer; it is only the fallback there")
    monkeypatch.setattr(onnx, "writers", lambda: (chosen,))
    model, inputs = MODELS[name]()
    record = export(model, inputs, tmp_path, "onnx")["onnx"]
    assert record["exporter"] == chosen[0]
    dims = {i.name: i.shape for i in session(tmp_path / "export/model.onnx").get_inputs()}
    assert all(shape[0] == "batch" for shape in dims.values())
    if name == "bert":
        assert all(shape == ["batch", "length"] for shape in dims.values())


@pytest.mark.parametrize("name", ["mobilenet", "encoder", "eager"])
def test_more_models_in_pytorchs_own_forms(name: str, tmp_path: Path) -> None:
    model, inputs = MODELS[name]() if name in MODELS else of_text("eager")
    formats = ("torchscript",) if name == "eager" else ("torchscript", "pt2")
    assert export(model, inputs, tmp_path, *formats).keys() == set(formats)


def test_the_student_stays_exactly_as_it_was(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(found))
    torch.set_num_threads(2)
    model, inputs = of_image(Cnn().to(memory_format=torch.channels_last))
    module = model.module
    module.train()
    module.get_submodule("norm").eval()
    module.get_submodule("head").requires_grad_(False)
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    tensors = {n: (id(t), t.data_ptr(), t.stride(), t.dtype, t.requires_grad) for n, t in module.state_dict(keep_vars=True).items()}
    modes = [m.training for m in module.modules()]
    before, stream = state_hash(module), torch.get_rng_state()
    hooks = dict(module._forward_hooks)
    export(model, inputs, tmp_path, *ALL)
    assert state_hash(module) == before
    assert [m.training for m in module.modules()] == modes
    assert {n: (id(t), t.data_ptr(), t.stride(), t.dtype, t.requires_grad) for n, t in module.state_dict(keep_vars=True).items()} == tensors
    assert dict(module._forward_hooks) == hooks
    assert model.module is module
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_leave_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = of_image(Cnn())
    model.module.to(dtype)
    export(model, inputs, tmp_path, "torchscript")
    loaded = torch.jit.load(str(tmp_path / "export/model.torchscript.pt"))
    assert {t.dtype for t in loaded.parameters()} == {torch.float32}
    assert {t.dtype for t in model.module.parameters()} == {dtype}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_student_on_a_gpu(tmp_path: Path) -> None:
    model, inputs = of_image(Cnn())
    model.module.cuda()
    export(model, inputs, tmp_path, *ALL)
    assert {t.device.type for t in model.module.parameters()} == {"cuda"}


# --- broken exports are refused


def spoiled(form: Any, spoil: Callable[[Job], None]) -> Callable[[], tuple[tuple[str, Callable[[Job, Path], None]], ...]]:
    real = form.writers()

    def broken(write: Callable[[Job, Path], None]) -> Callable[[Job, Path], None]:
        def attempt(job: Job, path: Path) -> None:
            spoil(job)
            write(job, path)

        return attempt

    return lambda: tuple((name, broken(write)) for name, write in real)


def perturb(job: Job) -> None:
    with torch.no_grad():
        next(iter(job.module.parameters())).add_(0.01)


def leave_training(job: Job) -> None:
    job.module.train()


@pytest.mark.parametrize(
    ("form", "spoil"),  # ONNX Runtime never drops anything: a Dropout that is left on is harmless there
    [("onnx", perturb), ("torchscript", perturb), ("pt2", perturb), ("torchscript", leave_training), ("pt2", leave_training)],
)
def test_a_spoiled_export_is_refused_with_the_figures(
    form: str, spoil: Callable[[Job], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FORMATS[form], "writers", spoiled(FORMATS[form], spoil))
    model, inputs = of_tensor(nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4)))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / FORMATS[form].FILE).write_text("of another student")
    with pytest.raises(ParityFailed) as failure:
        export(model, inputs, tmp_path, form)
    assert failure.value.exit_code == 3
    for word in ("max_abs_diff", "tolerance", "agreement", "largest logit"):
        assert word in str(failure.value)
    assert names_in(tmp_path / "export") == []


def test_a_batch_size_in_the_graph_is_refused_and_the_tracers_warning_told(tmp_path: Path) -> None:
    model, inputs = of_tensor(Rows())
    with pytest.raises(ParityFailed, match=r"(?s)does not run on x \(1, 2, 3\).*integer"):
        export(model, inputs, tmp_path, "torchscript")
    assert names_in(tmp_path / "export") == []


def test_the_other_exporter_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = dict(onnx.writers())
    monkeypatch.setattr(onnx, "writers", lambda: (("trace", by_name["trace"]), ("dynamo", by_name["dynamo"])))
    model, inputs = of_tensor(Rows())
    record = export(model, inputs, tmp_path, "onnx")["onnx"]
    assert record["exporter"] == "dynamo"
    assert [t["exporter"] for t in record["tried"]] == ["trace"]
    wanted = exactly(model, inputs)
    (got,) = session(tmp_path / "export/model.onnx").run(None, {"x": inputs["x"].numpy()})
    assert np.abs(got - wanted).max() < 1e-4


def test_one_failure_does_not_lose_the_other_formats(tmp_path: Path) -> None:
    model, inputs = of_tensor(Rows())
    with pytest.raises(ParityFailed):
        export(model, inputs, tmp_path, "torchscript", "pt2")
    assert names_in(tmp_path / "export") == ["model.pt2", "model.pt2.json"]


class Moody(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x.flatten(1)[:, :4], 0.5, training=True)


def test_a_student_that_is_random_in_eval_mode_is_named(tmp_path: Path) -> None:
    model, inputs = of_tensor(Moody())
    with pytest.raises(Stopped, match="dropout that ignores eval mode"):
        export(model, inputs, tmp_path, "torchscript")


def test_what_the_exporter_said_is_in_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(job: Job, path: Path) -> None:
        try:
            raise ValueError("\x1b[31ma very particular\n complaint\x1b[0m")
        except ValueError as error:
            raise RuntimeError("something else " * 100) from error

    monkeypatch.setattr(pt2, "writers", lambda: (("export", write),))
    model, inputs = of_tensor(Rows())
    with pytest.raises(ExportFailed, match=r"written as pt2: a very particular complaint\.$"):
        export(model, inputs, tmp_path, "pt2")
    assert names_in(tmp_path / "export") == []


def test_nothing_is_said_to_the_user(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = dict(onnx.writers())
    monkeypatch.setattr(onnx, "writers", lambda: (("trace", by_name["trace"]), ("dynamo", by_name["dynamo"])))
    model, inputs = of_image(Cnn())  # the tracer has no such pooling, and fails with noise
    record = export(model, inputs, tmp_path, "onnx", "pt2")["onnx"]
    assert record["tried"][0]["exporter"] == "trace"
    out, err = capfd.readouterr()
    assert out + err == ""


def test_a_student_that_cannot_be_copied_is_told(tmp_path: Path) -> None:
    import threading

    model, inputs = of_tensor(Rows())
    model.module.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ExportFailed, match="no locks"):
        export(model, inputs, tmp_path, "pt2")


def test_unknown_formats_are_named_together(tmp_path: Path) -> None:
    model, inputs = of_tensor(Rows())
    with pytest.raises(UsageError) as failure:
        export(model, inputs, tmp_path, "onx", "pt2", "tflite")
    assert [p.message.split("'")[1] for p in failure.value.problems] == ["onx", "tflite"]
    assert "'onnx'" in failure.value.problems[0].hint
    assert names_in(tmp_path) == []


def test_a_missing_package_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else real(name, *a))
    model, inputs = of_tensor(Rows())
    with pytest.raises(UsageError, match=r"limbeck\[export\]"):
        export(model, inputs, tmp_path, "onnx")


# --- the rule itself


def judged(wanted: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> Any:
    rows = torch.zeros(len(wanted), 1)
    job = Job(None, ("x",), (rows,), ({0: "batch"},), ((rows,),), (rows,), {})  # type: ignore[arg-type]
    return compare(lambda case: got, job, [wanted])


def test_the_tolerance_grows_with_the_largest_logit() -> None:
    wanted = np.array([[0.0, -50.0], [3.0, 1.0]])
    assert judged(wanted, wanted + 0.0049).passed
    assert not judged(wanted, wanted + 0.0051).passed
    small = np.array([[0.1, 0.0]])
    assert judged(small, small + 0.9e-4).passed
    assert not judged(small, small + 1.1e-4).passed


def test_a_tie_counts_as_agreed_and_a_real_flip_does_not() -> None:
    tie, flip = np.array([[1.0, 1.00015, 0.0]]), np.array([[1.0, 1.00025, 0.0]])
    assert judged(tie, tie[:, ::-1] * [[0, 1, 1]] + [[1.0002, 0, 0]]).agreement == 1.0
    assert judged(flip, np.array([[1.0003, 1.0, 0.0]])).agreement == 0.0


@pytest.mark.parametrize(
    "bad", [np.array([[np.nan, 1.0]]), np.array([[np.inf, 1.0]]), np.array([[1.0]]), np.array([[1.0, 2.0], [1.0, 2.0]])]
)
def test_nan_infinity_and_other_shapes_fail(bad: np.ndarray[Any, Any]) -> None:
    parity = judged(np.array([[1.0, 2.0]]), bad)
    assert not parity.passed
    assert parity.max_abs_diff == np.inf


def test_equal_infinities_pass() -> None:
    masked = np.array([[1.0, -np.inf]])
    assert judged(masked, masked).passed


def test_the_cases_avoid_what_is_traced() -> None:
    for model, inputs in (of_text(), of_tensor(Rows())):
        job = prepare(model, inputs, classes=CLASSES, task="t")
        assert len(job.example[0]) == 2
        assert {1, 3, 17} <= {len(c[0]) for c in job.cases}
        assert 2 not in {len(c[0]) for c in job.cases}
    job = prepare(*of_text(), classes=CLASSES, task="t")
    lengths = {c[0].shape[1] for c in job.cases}
    assert job.example[0].shape[1] not in lengths | {2}
    assert min(lengths) < job.example[0].shape[1] < max(lengths)
    assert any(bool(c[2].all()) for c in job.cases)
    assert any(not bool(c[2].all()) for c in job.cases)


def test_few_samples_are_enough(tmp_path: Path) -> None:
    model, inputs = of_image(Cnn())
    record = export(model, {"image": inputs["image"][:1]}, tmp_path, "torchscript")["torchscript"]
    assert {1, 3} < set(record["batch_sizes"])


def test_brief_is_one_short_sentence() -> None:
    assert brief(ValueError("a\n\n b")) == "a b."
    assert len(brief("x" * 10_000)) < 410
    assert brief(KeyError()) == "KeyError."


# --- what travels in the file


CONSUMER = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
how, classes = json.loads(facts["preprocessing"]), json.loads(facts["classes"])
pixels = np.load(sys.argv[2])                                    # (N, H, W, C) uint8
assert pixels.shape[1:] == (how["height"], how["width"], how["channels"])
x = ((pixels / 255.0 - how["mean"]) / how["std"]).astype(np.float32).transpose(0, 3, 1, 2)
(logits,) = session.run(["logits"], {session.get_inputs()[0].name: np.ascontiguousarray(x)})
assert "torch" not in sys.modules and "limbeck" not in sys.modules
print(json.dumps([facts["task"], [classes[i] for i in logits.argmax(-1)]]))
"""


@pytest.mark.usefixtures("quick")
def test_numpy_and_onnxruntime_are_enough_to_use_the_file(tmp_path: Path) -> None:
    model, inputs = of_image(Cnn(1))
    export(model, inputs, tmp_path, "onnx")
    draw = np.random.default_rng(0)
    pixels = (draw.random((40, 15, 15, 3)) * draw.random((40, 1, 1, 3)) ** 2 * 255).astype(np.uint8)  # of many colours
    np.save(tmp_path / "pixels.npy", pixels)
    run = [sys.executable, "-c", CONSUMER, str(tmp_path / "export/model.onnx"), str(tmp_path / "pixels.npy")]
    told = json.loads(subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)
    how = model.preprocessing
    assert isinstance(how, ImagePreprocessing)
    x = torch.tensor(pixels).double() / 255
    x = ((x - torch.tensor(how.mean).double()) / torch.tensor(how.std).double()).float().permute(0, 3, 1, 2).contiguous()
    labels = [CLASSES[i] for i in exactly(model, {"image": x}).argmax(-1)]
    assert told == ["image-classification", labels]
    assert len(set(labels)) > 1, "a test that would pass with a constant answer"


@pytest.mark.usefixtures("quick")
def test_text_files_bring_their_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    made.enable_padding(length=20)
    made.save(str(tmp_path / "tokenizer.json"))
    model, inputs = of_text(tokenizer=tmp_path)
    export(model, inputs, tmp_path, "onnx")
    file = session(tmp_path / "export/model.onnx")
    facts = file.get_modelmeta().custom_metadata_map
    assert str(tmp_path) not in json.dumps(facts), "a path of this machine is of no use elsewhere"
    reader = tokenizers.Tokenizer.from_str(facts["tokenizer"])
    for text in ("a b c", "q", " ".join("abcdefghij" * 5)):
        found = reader.encode(text)
        assert len(found.ids) == min(len(text.split()) + 2, 24)
        given = {"input_ids": found.ids, "token_type_ids": found.type_ids, "attention_mask": found.attention_mask}
        (logits,) = file.run(None, {k: np.array([v]) for k, v in given.items()})
        wanted = exactly(model, {k: torch.tensor([v]) for k, v in given.items()})
        assert np.abs(logits - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())


@pytest.mark.usefixtures("quick")
def test_the_same_facts_travel_in_all_three(tmp_path: Path) -> None:
    model, inputs = of_image(Cnn(1))
    export(model, inputs, tmp_path, *ALL)
    folder = tmp_path / "export"
    facts = session(folder / "model.onnx").get_modelmeta().custom_metadata_map
    assert facts.keys() == {"limbeck", "task", "classes", "preprocessing", "inputs", "outputs"}
    assert json.loads(facts["inputs"]) == [{"name": "image", "dtype": "float32", "shape": ["batch", 3, 15, 15]}]
    for load in (
        lambda f: torch.jit.load(str(folder / torchscript.FILE), _extra_files=f),
        lambda f: torch.export.load(str(folder / pt2.FILE), extra_files=f),
    ):
        extra: dict[str, Any] = dict.fromkeys((f"{k}.json" for k in facts), "")
        load(extra)
        assert {k.removesuffix(".json"): v.decode() if isinstance(v, bytes) else v for k, v in extra.items()} == facts


@pytest.mark.usefixtures("quick")
def test_no_test_sample_is_in_a_file(tmp_path: Path) -> None:
    model, inputs = of_tensor(nn.Sequential(nn.Flatten(), nn.Linear(6, 4)))
    records = export(model, inputs, tmp_path, *ALL)
    for record in records.values():
        assert inputs["x"][:2].numpy().tobytes() not in (tmp_path / record["file"]).read_bytes()


@pytest.mark.usefixtures("quick")
def test_weights_too_large_for_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "SINGLE_FILE_LIMIT", 0)
    model, inputs = of_tensor(nn.Sequential(nn.Flatten(), nn.Linear(6, 400), nn.Linear(400, 4)))
    record = export(model, inputs, tmp_path, "onnx")["onnx"]
    folder = (tmp_path / "export").rename(tmp_path / "elsewhere")
    assert names_in(folder) == ["model.onnx", "model.onnx.data", "model.onnx.json"]
    assert record["bytes"] == sum((folder / n).stat().st_size for n in ("model.onnx", "model.onnx.data"))
    (got,) = session(folder / "model.onnx").run(None, {"x": inputs["x"].numpy()})
    assert np.abs(got - exactly(model, inputs)).max() < 1e-3


@pytest.mark.parametrize("form", ["torchscript", "pt2"])
def test_a_full_disk_is_a_sentence_and_no_crash(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own file writer ends the whole process there; so it must not be given the file's name."""
    model, inputs = of_image(Cnn())

    def full(self: Path, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskFull, match=r"The disk is full: writing \S+model\.\S+ failed\. [\d,]+ bytes were to be written"):
        export(model, inputs, tmp_path, form)
    assert list((tmp_path / "export").iterdir()) == []
