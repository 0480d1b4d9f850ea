"""A person's own modules: callables in files, objects from Python, label maps, captured features."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.errors import UsageError
from limbeck.models import (
    Capture,
    Model,
    build_model,
    class_map,
    load_saved,
    logits_of,
    probe_shapes,
    save_model,
    state_hash,
    validate_paths,
    wrap_module,
)
from limbeck.types import TensorPreprocessing
from models_support import NAMES, floats, images, spec, texts, tokenizer_in

FROZEN = """
from torch import nn

def net():
    return nn.Linear(6, 4).requires_grad_(False)

class Cut(nn.Module):
    def forward(self, x):
        return x[:, :4]

def empty():
    return Cut()
"""

NET = """
import torch
from torch import nn
from neighbour import WIDTH

class Net(nn.Sequential):
    def __init__(self, num_classes, width=WIDTH, depth=1):
        super().__init__(nn.Flatten(), nn.LazyLinear(width) if width < 0 else nn.Linear(6, width), nn.Linear(width, num_classes))

def fixed():
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 9))

def anything(**options):
    return Net(4, **options)

def broken(num_classes):
    return {}["gone"]

def text():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 4)
        def forward(self, input_ids, attention_mask):
            return (self.table(input_ids) * attention_mask[..., None]).sum(1)
    return Bag()

def none():
    return None

NUMBER = 3
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    return tmp_path


def build(name: str, data: Any, base: Path, *, role: Any = "student", seed: int = 0, weights: str | None = None, **options: Any) -> Model:
    return build_model(spec(name, weights, **options), role=role, data=data, seed=seed, base=base)


def test_a_file_and_a_callable(here: Path) -> None:
    model = build("python:net.py:Net", floats(), here, width=7)
    assert model({"x": torch.zeros(2, 6)}).shape == (2, 4)
    torch.manual_seed(9)
    assert build("python:net.py:Net", floats(), here, width=7).weights_sha256 == model.weights_sha256
    assert build("python:net.py:Net", floats(), here, width=7, seed=1).weights_sha256 != model.weights_sha256
    assert build("python:net.py:anything", floats(), here, width=3).num_classes == 4
    (here / "net.py").write_text("raise SystemExit")  # what was run is what is saved
    save_model(model, here / "run/student", NAMES)
    assert (here / "run/student/net.py").read_text() == NET
    again = build("run:run", floats(), here, role="teacher")
    assert again.weights_sha256 == model.weights_sha256
    assert again.classes == NAMES


def test_code_that_changed_in_a_saved_folder_is_not_run(here: Path) -> None:
    save_model(build("python:net.py:Net", floats(), here), here / "student", NAMES)
    (here / "student/net.py").write_text(NET + "\nraise SystemExit('this ran')\n")
    with pytest.raises(UsageError, match=r"net\.py is not the file that was saved"):
        load_saved(here / "student")


def test_a_callable_without_num_classes(here: Path) -> None:
    student = build("python:net.py:fixed", floats(), here)
    assert student.num_classes == 4
    assert any("new head" in note for note in student.notes)
    with pytest.raises(UsageError, match="9 outputs and the data has 4"):
        build("python:net.py:fixed", floats(), here, role="teacher")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("python:nett.py:Net", {}, "Did you mean 'net.py'"),
        ("python:net.py:Nett", {}, "Did you mean 'Net'"),
        ("python:net.py:NUMBER", {}, "not a function or class"),
        ("python:net.py:none", {}, "returned NoneType"),
        ("python:net.py:broken", {}, r"KeyError.*line 17"),
        ("python:net.py:Net", {"widht": 3}, "Did you mean 'width'"),
        ("python:net.py", {}, "should read python:"),
        ("python:no.such.module:f", {}, "no Python module"),
        ("python:net:Nett", {}, "Did you mean 'Net'"),
        ("python:net.py:Net", {"width": "wide"}, "failed: TypeError"),
    ],
)
def test_mistakes_with_callables_are_sentences(name: str, options: dict[str, Any], said: str, here: Path) -> None:
    with pytest.raises(UsageError, match=said):
        build(name, floats(), here, **options)


def test_a_model_of_ones_own_on_text(here: Path) -> None:
    with pytest.raises(UsageError, match="tokenizer: FOLDER"):
        build("python:net.py:text", texts(), here)
    tokenizer_in(here / "tok")
    model = build("python:net.py:text", texts(), here, tokenizer="tok")
    assert model.preprocessing.inputs == ("input_ids", "attention_mask")  # type: ignore[union-attr]
    save_model(model, here / "s", NAMES)
    assert (here / "s/tokenizer.json").is_file()


def test_float64_modules_stay_float64(here: Path) -> None:
    model = build("python:net.py:fixed", floats(), here)
    model.module.double()
    save_model(model, here / "s", NAMES)
    again = load_saved(here / "s")
    assert again.module[0].weight.dtype == torch.float64  # type: ignore[index]
    assert again.weights_sha256 == state_hash(model.module)


def test_objects_from_python_are_used_as_they_are() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double().train()
    before = state_hash(net)
    model = wrap_module(net, role="teacher", data=floats(), classes=("eel", "dog", "cat", "bird"))
    assert model.module is net
    assert net.training
    assert state_hash(net) == before
    assert class_map(model, floats()).tolist() == [3, 2, 1, 0]  # type: ignore[union-attr]
    for wrong, said in (
        (nn.Linear(6, 3), "3 outputs and the data has 4"),
        (nn.Linear(5, 4), "cannot read inputs of this data"),
        (nn.Unflatten(1, (2, 3)), r"answered 2 samples"),
        (object(), "an nn.Module is wanted"),
    ):
        with pytest.raises(UsageError, match=said):
            wrap_module(wrong, role="student", data=floats())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="3 class names were given for 4 outputs"):
        wrap_module(net, role="student", data=floats(), classes=("a", "b", "c"))
    with pytest.raises(UsageError, match="preprocessing is for tensor data"):
        wrap_module(net, role="student", data=images(), preprocessing=TensorPreprocessing((6,)))


def test_what_counts_as_logits() -> None:
    x = torch.randn(2, 3)
    pair = namedtuple("pair", ["logits", "aux"])
    for output in (x, (x, None), [x], {"logits": x}, SimpleNamespace(logits=x), pair(x, torch.zeros(1))):
        assert logits_of(output) is x
    with pytest.raises(UsageError, match="returned NoneType"):
        logits_of(None)


def named(classes: tuple[str, ...] | None, count: int | None = None, ids: tuple[str, ...] | None = None) -> Model:
    size = count or len(classes or ())
    return Model(nn.Identity(), {}, "module", TensorPreprocessing((1,)), classes, size, class_ids=ids)


def test_label_maps() -> None:
    data = floats(classes=("cat", "hot dog", "eel"))
    assert class_map(named(("cat", "hot dog", "eel")), data) is None
    mapped = class_map(named(("EEL", " Cat", "Hot_Dog")), data)
    assert mapped is not None
    assert mapped.tolist() == [1, 2, 0]
    more = named(("fox", "eel", "cat", "hot dog"))
    assert class_map(more, data).tolist() == [2, 3, 1]  # type: ignore[union-attr]
    assert any("left out" in note for note in more.notes)
    for unknown in (None, ("LABEL_0", "LABEL_1", "label_2"), ("0", "1", "2")):
        model = named(unknown, 3)
        assert class_map(model, data) is None
        assert any("output i" in note for note in model.notes)
    assert class_map(named(("x", "y", "z")), floats(classes=("0", "1", "2"), known=False)) is None
    assert class_map(named(("2", "0", "1")), floats(classes=("0", "1", "2"), known=True)) is None
    assert class_map(named(("x", "y", "z"), ids=("n3", "n1", "n2")), floats(classes=("n1", "n2", "n3"))).tolist() == [1, 2, 0]  # type: ignore[union-attr]
    for wrong, said in (
        (named(("cat", "hot dog", "eels")), r"do not include.*: eel\. Did you mean 'eels'"),
        (named(None, 4), "4 outputs and the data has 3"),
        (named(("cat", "hot dog", "eel", "Cat")), "more than one class"),
    ):
        with pytest.raises(UsageError, match=said):
            class_map(wrong, data)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.pair = Pair()
        self.unused = nn.Linear(1, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(self.first(x))["b"])


class Pair(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": x + 1, "b": x * 2}


def test_capture_keeps_features_and_leaves_nothing_behind() -> None:
    net = Branches()
    x = torch.randn(3, 6)
    with Capture(net, ["first", "pair", "pair:b"]) as capture:
        net(x)
    features = capture.features
    assert torch.equal(features["first"], net.first(x))
    assert torch.equal(features["pair"], features["first"] + 1)
    assert torch.equal(features["pair:b"], features["first"] * 2)
    features["pair:b"].sum().backward()
    assert net.first.weight.grad is not None
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(ZeroDivisionError), Capture(net, ["first"]):
        raise ZeroDivisionError
    assert not net.first._forward_hooks
    with pytest.raises(UsageError, match="no tensor at 'c'"), Capture(net, ["pair:c"]):
        net(x)


class Residual(nn.Module):
    """What comes after ``norm`` works in place: the sum first, then the ReLU, as in every ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.body(x))
        out += x
        return self.head(self.relu(out))


@pytest.mark.parametrize("gradient", [True, False])
def test_a_feature_is_what_its_layer_gave_whatever_works_in_place_after_it(gradient: bool) -> None:
    net, x = Residual(), torch.randn(5, 6)
    with torch.set_grad_enabled(gradient), Capture(net, ["norm", "relu"]) as capture:
        logits = net(x)
    clean = Residual()
    clean.load_state_dict({name: value for name, value in net.state_dict().items() if "running" not in name}, strict=False)
    given = clean.norm(clean.body(x))
    assert torch.equal(capture.features["norm"], given)
    assert torch.equal(capture.features["relu"], (given + x).relu())
    if gradient:
        (capture.features["norm"].pow(3).sum() + logits.sum()).backward()
        (given.pow(3).sum() + clean.head((given + x).relu()).sum()).backward()
        for (name, p), q in zip(net.named_parameters(), clean.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_what_was_captured_is_not_the_layers_own_memory() -> None:
    images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity()).to(memory_format=torch.channels_last)
    with Capture(images, ["0"]) as capture:
        out = images(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last))
    assert capture.features["0"].is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        before = capture.features["0"].clone()
        out.zero_()
    assert torch.equal(capture.features["0"], before)


@pytest.mark.parametrize("named", [True, False])
def test_a_student_that_has_nothing_to_train_is_refused(here: Path, named: bool) -> None:
    (here / "frozen.py").write_text(FROZEN)
    student = "requires_grad"
    if named:
        with pytest.raises(UsageError, match=student):
            build("python:frozen.py:net", floats(), here)
        with pytest.raises(UsageError, match="no parameters"):
            build("python:frozen.py:empty", floats(), here)
        assert build("python:frozen.py:net", floats(), here, role="teacher").num_classes == 4
        with pytest.raises(UsageError, match=r"^teacher.*requires_grad"):
            build_model(spec("python:frozen.py:net"), role="teacher", data=floats(), seed=0, base=here, new_head=True)
    else:
        net = nn.Linear(6, 4).requires_grad_(False)
        with pytest.raises(UsageError, match=student):
            wrap_module(net, role="student", data=floats())
        assert wrap_module(net, role="teacher", data=floats()).num_classes == 4


def test_state_that_is_no_tensor_is_not_saved_and_the_student_says_so() -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"calls": 3}

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError

    model = wrap_module(Counting(6, 4), role="student", data=floats())
    assert any("get_extra_state" in note for note in model.notes)
    assert not wrap_module(nn.Linear(6, 4), role="student", data=floats()).notes


def test_paths_are_judged_all_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        validate_paths(Branches(), ["first", "frist", "zzz"], "objective.2.student")
    assert len(caught.value.problems) == 2
    assert "Did you mean 'first'?" in str(caught.value)
    assert "outermost layers are: first, pair, unused, head" in str(caught.value)


def test_shapes_of_features_without_a_trace() -> None:
    net = Branches().train()
    model = wrap_module(net, role="student", data=floats())
    before = state_hash(net)
    assert probe_shapes(model, {"x": torch.zeros(3, 6)}, ["first", "pair:b"]) == {"first": (3, 5), "pair:b": (3, 5)}
    assert net.training
    assert state_hash(net) == before
    with pytest.raises(UsageError, match="not called"):
        probe_shapes(model, {"x": torch.zeros(3, 6)}, ["unused"])
