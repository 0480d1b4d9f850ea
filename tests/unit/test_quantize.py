"""Fewer bits: as much as the accuracy allows, found by trying, or refused with the figures and nothing left."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.export import Quantised, Refused, _quantize, export_model, onnx, quantize
from limbeck.models import Model
from limbeck.types import ImagePreprocessing, TensorPreprocessing, TextPreprocessing

onnxruntime = pytest.importorskip("onnxruntime")

CLASSES = ("cat", "dög", "owl", "yak")
Inputs = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, and the faster of the ONNX exporters."""
    torch.manual_seed(0)
    traced = dict(onnx.writers())["trace"]
    monkeypatch.setattr(onnx, "writers", lambda: (("trace", traced),))


def of_image(module: nn.Module, size: int) -> tuple[Model, Inputs]:
    for tensor in module.buffers():
        if tensor.is_floating_point():
            tensor += torch.rand(tensor.shape)
    how = ImagePreprocessing(3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), height=size, width=size)
    return Model(module, {}, "module", how, None, 4), {"image": torch.randn(64, 3, size, size)}


def of_rows(module: nn.Module, x: Tensor) -> tuple[Model, Inputs]:
    return Model(module, {}, "module", TensorPreprocessing(tuple(x.shape[1:])), None, 4), {"x": x}


def cnn() -> tuple[Model, Inputs]:
    body = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()]
    return of_image(nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 4)), 15)


def vit() -> tuple[Model, Inputs]:
    timm = pytest.importorskip("timm")
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 4}
    return of_image(timm.create_model("vit_tiny_patch16_224", **shape), 16)


def bert() -> tuple[Model, Inputs]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, max_position_embeddings=32, num_labels=4
    )  # fmt: skip
    module = transformers.BertForSequenceClassification(config)
    for p in module.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    mask = (torch.arange(12)[None] < torch.randint(3, 13, (64,))[:, None]).long()
    ids = torch.randint(5, 60, (64, 12)) * mask
    names = ("input_ids", "token_type_ids", "attention_mask")
    inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}
    return Model(module, {}, "hf", TextPreprocessing("nowhere", 24, names, "0"), None, 4), inputs


def plain() -> tuple[Model, Inputs]:
    return of_rows(nn.Sequential(nn.Linear(20, 128), nn.Tanh(), nn.Linear(128, 4)), torch.randn(64, 20))


STUDENTS: dict[str, tuple[Callable[[], tuple[Model, Inputs]], str]] = {
    "cnn": (cnn, "static"),
    "vit": (vit, "dynamic"),
    "bert": (bert, "dynamic"),
    "plain": (plain, "static"),
}


def ask(path: Path, inputs: Inputs) -> np.ndarray[Any, Any]:
    """ONNX Runtime as anybody would use it."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {v.name: inputs[v.name].numpy() for v in session.get_inputs()}
    return np.asarray(session.run(["logits"], feeds)[0], dtype=np.float64)


class Made:
    """A student as a float32 file, and what decides about it: its own answers are the labels."""

    def __init__(self, model: Model, inputs: Inputs, folder: Path) -> None:
        self.inputs, self.folder = inputs, folder
        export_model(model, ["onnx"], folder / "export", inputs=inputs, classes=CLASSES, task="image-classification")
        self.path, self.out = folder / "export/model.onnx", folder / "small.onnx"
        self.exact = ask(self.path, inputs)
        self.labels = self.exact.argmax(-1)

    def quantize(self, scheme: str, max_drop: float = 5.0, **changes: Any) -> Quantised:
        work = self.folder / f"work-{len(list(self.folder.iterdir()))}"
        work.mkdir()
        names = list(self.inputs)
        batches = [{n: self.inputs[n][i : i + 16].numpy() for n in names} for i in range(0, len(self.labels), 16)]
        given: dict[str, Any] = {
            "calibration": batches,
            "asked": lambda file: ask(file, self.inputs),
            "labels": self.labels,
            "max_drop": max_drop,
        }
        return quantize(self.path, self.out, scheme, work=work, **{**given, **changes})


def operators(path: Path) -> list[str]:
    import onnx as library

    return [node.op_type for node in library.load(str(path)).graph.node]


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_in_eight_bits_is_smaller_and_answers_as_before(name: str, tmp_path: Path) -> None:
    build, method = STUDENTS[name]
    made = Made(*build(), tmp_path)
    found = made.quantize("int8")
    answers = ask(made.out, made.inputs)
    agreed = float((answers.argmax(-1) == made.labels).mean())
    assert found.method == method
    assert found.why.lower().startswith(method)
    assert found.agreement == agreed
    assert found.drop == pytest.approx(100 * (1 - agreed))
    assert found.drop <= 5
    assert found.max_abs_diff == pytest.approx(np.abs(answers - made.exact).max())
    assert 0 < found.max_abs_diff < 0.5 * np.abs(made.exact).max()
    assert made.out.stat().st_size < 0.8 * made.path.stat().st_size
    assert found.tries[-1]["bytes"] == made.out.stat().st_size
    marks = operators(made.out)
    assert {"static": "QuantizeLinear", "dynamic": "DynamicQuantizeLinear"}[method] in marks


@pytest.mark.parametrize("name", STUDENTS)
def test_half_precision_takes_and_gives_float32(name: str, tmp_path: Path) -> None:
    made = Made(*STUDENTS[name][0](), tmp_path)
    found = made.quantize("fp16", 0.0)
    session = onnxruntime.InferenceSession(str(made.out), providers=["CPUExecutionProvider"])
    assert "float16" not in str([v.type for v in (*session.get_inputs(), *session.get_outputs())])
    assert np.abs(ask(made.out, made.inputs) - made.exact).max() < 0.02 * np.abs(made.exact).max()
    assert found.agreement == 1.0
    assert made.out.stat().st_size < 0.8 * made.path.stat().st_size


@pytest.mark.parametrize("name", STUDENTS)
def test_half_precision_holds_where_it_is_really_computed_in_half(name: str, tmp_path: Path) -> None:
    """ONNX Runtime computes it in float32 on a CPU; onnx's own evaluator in NumPy's float16, as a GPU would in its."""
    import onnx as library
    from onnx.reference import ReferenceEvaluator

    made = Made(*STUDENTS[name][0](), tmp_path)
    made.quantize("fp16", 0.0)
    few = {n: v[:4].numpy() for n, v in made.inputs.items()}
    (answers,) = ReferenceEvaluator(library.load(str(made.out))).run(["logits"], few)
    assert answers.dtype == np.float32
    assert np.abs(answers - made.exact[:4]).max() < 0.02 * np.abs(made.exact).max()


def test_the_converter_leaves_the_search_path_alone(tmp_path: Path) -> None:
    made = Made(*plain(), tmp_path)  # some exporters import it, and then its folder is on the path already
    before = list(sys.path)
    for name in [n for n in sys.modules if n.startswith(("onnxruntime.transformers", "onnxruntime.quantization"))]:
        del sys.modules[name]
    made.quantize("fp16", 0.0)
    assert sys.path == before


def test_what_was_asked_for_by_name_is_done(tmp_path: Path) -> None:
    made = Made(*vit(), tmp_path)
    assert made.quantize("int8-static", 100).method == "static"
    assert "QuantizeLinear" in operators(made.out)
    assert made.quantize("int8-dynamic", 100).method == "dynamic"
    assert "DynamicQuantizeLinear" in operators(made.out)


def test_nothing_is_left_where_it_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(*bert(), tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for scheme in ("int8", "int8-static", "fp16"):
        made.quantize(scheme, 100)
    assert not list((tmp_path / "here").iterdir())


def test_what_the_file_says_of_itself_travels_on(tmp_path: Path) -> None:
    made = Made(*cnn(), tmp_path)
    made.quantize("int8")
    before, after = (
        onnxruntime.InferenceSession(str(p), providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map
        for p in (made.path, made.out)
    )
    assert after == before
    assert json.loads(after["classes"]) == list(CLASSES)


def test_weights_are_by_channel_and_leave_room_for_the_sums_of_older_processors(tmp_path: Path) -> None:
    """Two products of 8 bits each may overflow 16 bits; with weights of 7 bits they do not: 2 x 255 x 64 < 32,768."""
    import onnx as library

    made = Made(*cnn(), tmp_path)
    made.quantize("int8")
    graph = library.load(str(made.out)).graph
    weights = {t.name: library.numpy_helper.to_array(t) for t in graph.initializer}
    convolutions = [w for name, w in weights.items() if w.dtype == np.int8 and w.ndim == 4]
    assert len(convolutions) == 2
    assert all(np.abs(w.astype(int)).max() in (63, 64) for w in convolutions)
    assert all(np.abs(w.astype(int)).max(axis=(1, 2, 3)).min() >= 63 for w in convolutions)  # each channel has its own scale


class Spiky(nn.Module):
    """Between the second and the third layer one value of ten thousand stands beside what the answer is made of: 256 steps are too few there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spike, self.last = nn.Linear(20, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        with torch.no_grad():
            self.spike.weight[0], self.spike.bias[0] = 0, 1e4
            self.last.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.spike(self.first(x).tanh()))


def test_the_nodes_that_spoil_it_are_found_and_left_in_float(tmp_path: Path) -> None:
    made = Made(*of_rows(Spiky(), torch.randn(64, 20)), tmp_path)
    found = made.quantize("int8-static", 3)
    assert [t["left"] for t in found.tries] == [0, 1, 2]
    assert all(t["drop"] > 20 for t in found.tries[:2])
    assert found.candidates == 3
    assert sorted(name.split("/")[-2] for name in found.left) == ["last", "spike"]
    assert (ask(made.out, made.inputs).argmax(-1) == made.labels).mean() >= 0.97


class Large(nn.Module):
    """Squares beyond float16's range inside, small numbers outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(20, 256), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        large = (1000.0 * self.body(x)).square()
        return self.head((large / 1e6).sqrt())


def test_what_float16_cannot_hold_stays_in_float32_from_the_start(tmp_path: Path) -> None:
    import onnx as library

    made = Made(*of_rows(Large(), torch.randn(64, 20)), tmp_path)
    found = made.quantize("fp16", 5.0)  # rows between two classes may go over to the other
    assert found.tries[0]["left"]
    # every float16 value of the file, seen without any optimisation, is finite
    model = library.shape_inference.infer_shapes(library.load(str(made.out)))
    halves = [v for v in model.graph.value_info if v.type.tensor_type.elem_type == library.TensorProto.FLOAT16]
    assert halves
    model.graph.output.extend(halves)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run([v.name for v in halves], {"x": made.inputs["x"].numpy()})
    assert all(np.isfinite(v).all() for v in values)


def test_what_costs_too_much_is_refused_with_every_try_and_leaves_nothing(tmp_path: Path) -> None:
    made = Made(*cnn(), tmp_path)
    wrong = (made.labels + 1) % 4

    def asked(file: Path) -> np.ndarray[Any, Any]:
        return made.exact if file == made.path else np.eye(4)[wrong]

    with pytest.raises(
        Refused,
        match=r"more than 0\.5 points.*100\.00 points with 0, 100\.00 points with 1, .*With 3 of 4 left nothing would be saved.*--max-drop",
    ) as caught:
        made.quantize("int8", 0.5, asked=asked)
    assert caught.value.exit_code == 3
    assert not made.out.exists()


def test_a_student_too_small_to_save_anything_is_refused(tmp_path: Path) -> None:
    made = Made(*of_rows(nn.Linear(5, 4), torch.randn(64, 5)), tmp_path)
    with pytest.raises(Refused, match=r"nothing is saved: the file would have [\d,]+ bytes, and the float32 file"):
        made.quantize("int8")
    assert not made.out.exists()


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)[:, :4]


def test_a_student_without_anything_to_quantise_is_refused(tmp_path: Path) -> None:
    made = Made(*of_rows(Sums(), torch.randn(64, 20)), tmp_path)
    with pytest.raises(Refused, match=r"nothing that static quantisation changes; its operators are .*CumSum"):
        made.quantize("int8")
    with pytest.raises(Refused, match="nothing that dynamic quantisation changes"):
        made.quantize("int8-dynamic")


def test_a_number_that_is_none_is_not_taken_for_an_answer(tmp_path: Path) -> None:
    """NumPy's argmax of a row with NaN is the NaN's place, which might be right by chance."""
    made = Made(*cnn(), tmp_path)

    def asked(file: Path) -> np.ndarray[Any, Any]:
        answers = made.exact.copy()
        if file != made.path:
            answers[0, made.labels[0]] = np.nan
        return answers

    with pytest.raises(Refused, match=r"1\.56 points with 0"):
        made.quantize("int8", 50.0, asked=asked)


class Fake:
    """Ten nodes, of which those named cost points."""

    name = "static"
    candidates = tuple("abcdefghij")

    def __init__(self, cost: dict[str, float], unfit: Set[str] = frozenset()) -> None:
        self.cost, self.unfit, self.written, self.rankings = cost, frozenset(unfit), [], 0

    def write(self, left: Set[str], out: Path) -> None:
        import onnx as library

        self.written.append(left)
        node = library.helper.make_node("Identity", ["x"], ["logits"])
        values = [library.helper.make_tensor_value_info(n, library.TensorProto.FLOAT, ["batch", 4]) for n in ("x", "logits")]
        graph = library.helper.make_graph([node], "g", values[:1], values[1:])
        library.save(library.helper.make_model(graph, opset_imports=[library.helper.make_opsetid("", 17)]), str(out))

    def ranked(self) -> list[str]:
        self.rankings += 1
        return sorted(self.candidates, key=lambda n: -self.cost.get(n, 0))

    def points(self) -> float:
        return sum(cost for node, cost in self.cost.items() if node not in self.written[-1])


@pytest.mark.parametrize(
    ("cost", "unfit", "sizes"),
    [
        ({}, "", [0]),
        ({}, "j", [1]),
        ({"c": 9}, "", [0, 1]),
        ({"c": 9, "e": 8, "g": 7}, "", [0, 1, 2, 4]),
        ({"c": 9, "e": 8}, "ij", [2, 3, 4]),
        (dict.fromkeys("abcdefghi", 9), "", [0, 1, 2, 4, 8, 9]),
        (dict.fromkeys("abcdefghij", 9), "", None),
    ],
)
def test_the_most_costly_nodes_are_left_out_in_doubling_numbers(
    cost: dict[str, float], unfit: str, sizes: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(*cnn(), tmp_path)
    fake = Fake(cost, set(unfit))
    monkeypatch.setattr(_quantize, "method_for", lambda *given: (fake, "because"))

    def asked(file: Path) -> np.ndarray[Any, Any]:
        wrong = 0 if file == made.path else int(64 * min(fake.points(), 100) / 100)
        return np.eye(4)[np.where(np.arange(64) < wrong, (made.labels + 1) % 4, made.labels)]

    if sizes is None:
        with pytest.raises(Refused):
            made.quantize("int8", 0.5, asked=asked)
        assert all(len(left) < 10 for left in fake.written)  # all of them in float is the float32 file
    else:
        found = made.quantize("int8", 0.5, asked=asked)
        assert [t["left"] for t in found.tries] == sizes
        assert set(found.left) >= {n for n, points in cost.items() if points} | set(unfit)
    assert fake.rankings == (0 if sizes is not None and len(sizes) == 1 else 1)
