"""torchvision and timm students: sizes, channels, heads, layers, and files that their own library reads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.errors import UsageError
from limbeck.models import build_model, describe, load_saved, resize_head, save_model, state_hash, wrap_module
from limbeck.models._heads import find_head
from limbeck.types import TensorPreprocessing
from models_support import NAMES, floats, images, spec

SMALL = ["torchvision:shufflenet_v2_x0_5", "torchvision:mnasnet0_5", "timm:mobilenetv3_small_050", "timm:test_vit"]


def build(
    name: str,
    data: object,
    *,
    role: str = "student",
    seed: int = 0,
    base: Path = Path(),
    new_head: bool = False,
    weights: str | None = None,
    **options: object,
):  # type: ignore[no-untyped-def]
    return build_model(spec(name, weights, **options), role=role, data=data, seed=seed, base=base, new_head=new_head)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SMALL)
def test_saved_and_read_back_without_a_network(name: str, tmp_path: Path) -> None:
    model = build(name, images())
    save_model(model, tmp_path / "student", NAMES)
    again = load_saved(tmp_path)
    x = torch.randn(2, model.preprocessing.channels, model.preprocessing.height, model.preprocessing.width)
    assert torch.equal(model({"image": x}), again({"image": x}))
    assert model({"image": x}).shape == (2, 4)
    assert again.preprocessing == model.preprocessing
    assert again.classes == NAMES
    assert again.weights_sha256 == model.weights_sha256 == state_hash(model.module)


def test_readme_lines_for_timm(tmp_path: Path) -> None:
    model = build("timm:test_vit", images(size=(64, 64), channels=1), patch_size=8)
    save_model(model, tmp_path / "student", NAMES)
    import timm
    from safetensors.torch import load_model

    about = json.loads((tmp_path / "student/model.json").read_text())
    alone = timm.create_model(about["build"]["name"], num_classes=about["num_classes"], **about["build"]["arguments"])
    load_model(alone, tmp_path / "student/model.safetensors")
    x = torch.randn(2, 1, 64, 64)
    assert torch.equal(alone.eval()(x), model({"image": x}))


def test_readme_lines_for_torchvision(tmp_path: Path) -> None:
    model = build("torchvision:shufflenet_v2_x0_5", images())
    save_model(model, tmp_path / "student", NAMES)
    import torchvision
    from safetensors.torch import load_model

    about = json.loads((tmp_path / "student/model.json").read_text())
    alone = torchvision.models.get_model(about["build"]["name"], num_classes=about["num_classes"], **about["build"]["arguments"])
    load_model(alone, tmp_path / "student/model.safetensors")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(alone.eval()(x), model({"image": x}))


def test_initial_weights_are_a_function_of_seed_and_role() -> None:
    torch.manual_seed(1)
    first = build("timm:mobilenetv3_small_050", images())
    torch.manual_seed(2)
    build("timm:test_vit", images(size=(160, 160)), role="teacher", weights="scratch", new_head=True)
    before = torch.get_rng_state()
    second = build("timm:mobilenetv3_small_050", images())
    assert torch.equal(torch.get_rng_state(), before)
    assert first.weights_sha256 == second.weights_sha256
    assert build("timm:mobilenetv3_small_050", images(), seed=1).weights_sha256 != first.weights_sha256


def test_sizes_and_channels() -> None:
    grey = images(size=(28, 28), channels=1)
    model = build("torchvision:shufflenet_v2_x0_5", grey)
    assert (model.preprocessing.channels, model.preprocessing.height, model.preprocessing.mean) == (3, 28, (0.5, 0.5, 0.5))
    assert build("timm:mobilenetv3_small_050", grey).preprocessing.channels == 1
    varying = build("timm:mobilenetv3_small_050", images(size=None)).preprocessing
    assert (varying.height, varying.width, varying.resize_shorter) == (224, 224, 256)
    assert build("timm:mobilenetv3_small_050", images(), resolution=[48, 40]).preprocessing.width == 40
    with pytest.raises(UsageError, match="resolution"):
        build("timm:mobilenetv3_small_050", images(), resolution="big")
    with pytest.raises(UsageError, match="3 channels and the data has 4"):
        build("torchvision:shufflenet_v2_x0_5", SimpleNamespace(**{**vars(images()), "channels": 4}))


def test_too_small_images_are_enlarged_and_that_is_said() -> None:
    model = build("torchvision:squeezenet1_1", images(size=(8, 8), channels=1))
    assert model.preprocessing.height == 224
    assert any("enlarged to 224 x 224" in note for note in model.notes)


def test_float_arrays_go_to_image_models_as_they_are() -> None:
    model = build("timm:mobilenetv3_small_050", floats((2, 16, 16)))
    assert model.preprocessing == TensorPreprocessing((2, 16, 16))
    assert model({"x": torch.zeros(3, 2, 16, 16)}).shape == (3, 4)
    with pytest.raises(UsageError, match="reads images"):
        build("timm:mobilenetv3_small_050", floats((6,)))


def test_layers_keep_the_weights_of_the_named_ones(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    whole = timm.create_model("test_vit", num_classes=4, depth=5)
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    model = build("timm:test_vit", images(size=(160, 160)), base=tmp_path, weights="w.safetensors", depth=5, layers=[1, 4])
    assert len(model.module.blocks) == 2
    for new, old in ((0, 1), (1, 4)):
        for a, b in zip(model.module.blocks[new].parameters(), whole.blocks[old].parameters(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(model.module.patch_embed.proj.weight, whole.patch_embed.proj.weight)
    assert torch.equal(model.module.head.weight, whole.head.weight)
    save_model(model, tmp_path / "student", NAMES)
    assert load_saved(tmp_path).weights_sha256 == model.weights_sha256
    for layers, said in (
        ([5], "out of range"),
        ([0, 0], "twice"),
        ([], "list of layer"),
        ("0,1", "list of layer"),
        ([True], "list of layer"),
    ):
        with pytest.raises(UsageError, match=said):
            build("timm:test_vit", images(size=(160, 160)), depth=5, layers=layers)
    with pytest.raises(UsageError, match=r"layers_of.*Did you mean 'blocks'"):
        build("timm:test_vit", images(size=(160, 160)), layers=[0], layers_of="block")


def test_a_run_as_student_and_teacher(tmp_path: Path) -> None:
    model = build("timm:mobilenetv3_small_050", images())
    save_model(model, tmp_path / "run/student", NAMES)
    teacher = build("run:run", images(), role="teacher", base=tmp_path)
    assert teacher.weights_sha256 == model.weights_sha256
    assert build("run", images(), role="teacher", base=tmp_path).weights_sha256 == model.weights_sha256
    other = images(classes=("x", "y", "z"))
    with pytest.raises(UsageError, match=r"teacher: \{train: \{epochs: 3\}\}"):
        build("run:run", other, role="teacher", base=tmp_path)
    retrained = build("run:run", other, role="teacher", base=tmp_path, new_head=True)
    assert retrained.num_classes == 3
    assert retrained.classes == ("x", "y", "z")
    student = build("run:run", other, base=tmp_path)
    same = {k: v for k, v in student.module.state_dict().items() if not k.startswith("classifier")}
    assert all(torch.equal(v, model.module.state_dict()[k]) for k, v in same.items())
    with pytest.raises(UsageError, match="as it was saved"):
        build("run:run", images(), base=tmp_path, drop_rate=0.1)
    with pytest.raises(UsageError, match="trained on image data"):
        build("run:run", floats(), base=tmp_path)


@pytest.mark.parametrize("change", ["model.safetensors", "missing", "json", "weights"])
def test_what_changed_on_disk_is_refused(change: str, tmp_path: Path) -> None:
    save_model(build("timm:mobilenetv3_small_050", images()), tmp_path / "student", NAMES)
    file, about = tmp_path / "student/model.safetensors", tmp_path / "student/model.json"
    match change:
        case "model.safetensors":
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        case "missing":
            file.unlink()
        case "json":
            about.write_text("{")
        case "weights":
            about.write_text(json.dumps(json.loads(about.read_text()) | {"weights_sha256": "0"}))
    with pytest.raises(UsageError, match=r"differs|is missing|not JSON"):
        load_saved(tmp_path)


def test_saving_twice_gives_the_same_bytes_and_replaces(tmp_path: Path) -> None:
    model = build("timm:mobilenetv3_small_050", images())
    save_model(model, tmp_path / "a", NAMES)
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    save_model(model, tmp_path / "a", NAMES)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_channels_last_weights_are_the_same_weights(tmp_path: Path) -> None:
    model = build("timm:mobilenetv3_small_050", images())
    model.module.to(memory_format=torch.channels_last)
    assert state_hash(model.module) == model.weights_sha256
    save_model(model, tmp_path / "s", NAMES)
    assert load_saved(tmp_path / "s").weights_sha256 == model.weights_sha256


def test_the_hash_sees_names_dtypes_shapes_and_values_and_not_a_look() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    before = state_hash(net)
    net(torch.randn(5, 3))
    assert state_hash(net) == before
    assert state_hash(net.double()) != before
    net.float()
    with torch.no_grad():
        net[0].weight[0, 0] += 1e-6
    assert state_hash(net) != before
    net.train()(torch.randn(5, 3))
    assert state_hash(nn.Sequential(nn.Linear(1, 2, bias=False))) != state_hash(nn.Sequential(nn.Linear(2, 1, bias=False)))


def test_the_hash_does_not_depend_on_the_order_of_declaration() -> None:
    first, second = nn.Module(), nn.Module()
    a, b = nn.Linear(2, 3), nn.Linear(3, 2)
    first.a, first.b = a, b
    second.b, second.a = b, a
    assert state_hash(first) == state_hash(second)


class Counting(nn.Module):
    """Writes to a buffer in every forward pass, and fails where it is not in eval mode or a gradient could flow."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.head(x)


def test_a_look_is_in_eval_mode_and_leaves_buffers() -> None:
    net = Counting().train()
    model = wrap_module(net, role="student", data=floats())
    describe(model, {"x": torch.zeros(2, 6)})
    assert net.training
    assert float(net.calls) == 0
    with pytest.raises(UsageError, match="cannot read"):
        wrap_module(net, role="student", data=floats((5,)))
    assert net.training
    assert float(net.calls) == 0


def test_describe_counts_by_hand_and_leaves_everything() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 5))
    net.train()
    net[1].eval()
    data = images(size=(8, 8), classes=("a", "b", "c", "d", "e"))
    model = wrap_module(net, role="student", data=data)
    before, modes = state_hash(net), [m.training for m in net.modules()]
    inputs = {"image": torch.randn(7, 3, 8, 8)}
    state = torch.get_rng_state()
    found = describe(model, inputs)
    assert found["parameters"] == 3 * 4 * 9 + 8 + 256 * 5 + 5
    assert found["bytes"] == 4 * found["parameters"] + 4 * 8 + 8  # and the statistics, and the int64 counter
    assert found["flops"] == 2 * (64 * 4 * 27) + 2 * 256 * 5
    assert state_hash(net) == before
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_flops_of_attention_are_counted() -> None:
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(48, 4))
    model = wrap_module(net, role="student", data=floats((6, 8)))
    matrices = 2 * 6 * (8 * 24 + 8 * 8 + 8 * 16 + 16 * 8) + 2 * 48 * 4
    assert describe(model, {"x": torch.randn(3, 6, 8)})["flops"] == matrices + 2 * 2 * (2 * 6 * 6 * 4)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "squeezenet1_1",
        "densenet121",
        "mobilenet_v3_small",
        "vit_b_16",
        "swin_t",
        "convnext_tiny",
        "googlenet",
        "vgg11",
        "inception_v3",
    ],
)
def test_heads_of_torchvision(name: str) -> None:
    import torchvision

    extra = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        net = torchvision.models.get_model(name, num_classes=11, **extra)
    path = find_head(net)
    assert path is not None
    layer = net.get_submodule(path)
    assert (layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels) == 11


def test_a_new_head_is_a_function_of_the_seed() -> None:
    def headed(seed: int) -> nn.Linear:
        net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 5, bias=False)).double()
        body = net[0].weight.detach().clone()
        resize_head(net, 7, seed)
        assert torch.equal(net[0].weight, body)
        assert isinstance(net[1], nn.Linear)
        return net[1]

    assert torch.equal(headed(0).weight, headed(0).weight)
    assert not torch.equal(headed(0).weight, headed(1).weight)
    assert headed(0).weight.shape == (7, 8)
    assert headed(0).bias is None
    assert headed(0).weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("torchvision:resnet19", {}, "Did you mean 'resnet18'"),
        ("timm:resnet10tt", {}, "Did you mean 'resnet10t'"),
        ("timm:test_vit.nonsense", {}, "no weights 'test_vit.nonsense'"),
        ("torchvison:resnet18", {}, "Did you mean 'torchvision'"),
        ("onnx:model.onnx", {}, "not built yet"),
        ("torchvision:", {}, "names no model"),
        ("timm:test_vit", {"drop_rat": 0.1}, "does not build"),
        ("torchvision:resnet18", {"widthh": 2}, "does not build"),
        ("timm:test_vit", {"max_length": 3}, "does nothing for image data"),
        ("timm:test_vit", {"layers_of": "blocks"}, "without options.layers"),
        ("./nowhere", {}, "does not exist"),
        ("run:nowhere", {}, "does not exist"),
        ("hf:./nowhere", {}, "does not exist"),
        (" ", {}, "empty"),
    ],
)
def test_wrong_names_are_sentences(name: str, options: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        build(name, images(), base=tmp_path, **options)


def test_wrong_weights_are_sentences(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "w.pth").write_bytes(b"x")
    (tmp_path / "bad.safetensors").write_bytes(b"xxxxxxxxxxxxxxxx")
    save_file({"other": torch.zeros(3)}, tmp_path / "other.safetensors")
    cases = {"w.pth": "limbeck convert w.pth w.safetensors", "bad.safetensors": "cannot be read", "gone.safetensors": "does not exist"}
    for weights, said in {**cases, "other.safetensors": "missing", "pretrain": "not a .safetensors"}.items():
        with pytest.raises(UsageError, match=said):
            build("timm:mobilenetv3_small_050", images(), base=tmp_path, weights=weights)
    with pytest.raises(UsageError, match="no trained classification head"):
        build("timm:mobilenetv3_small_050", images(), role="teacher", weights="scratch")


def test_weights_of_a_wrapped_module_and_of_another_number_of_classes(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    net = timm.create_model("mobilenetv3_small_050", num_classes=9)
    save_file({f"module.{k}": v for k, v in net.state_dict().items()}, tmp_path / "w.safetensors")
    nine = images(classes=tuple("abcdefghi"))
    teacher = build("timm:mobilenetv3_small_050", nine, role="teacher", base=tmp_path, weights="w.safetensors")
    assert teacher.weights_sha256 == state_hash(net)
    assert any("output i of the teacher" in note for note in teacher.notes)
    with pytest.raises(UsageError, match="9 outputs and the data has 4"):
        build("timm:mobilenetv3_small_050", images(), role="teacher", base=tmp_path, weights="w.safetensors")
    assert build("timm:mobilenetv3_small_050", images(), base=tmp_path, weights="w.safetensors").num_classes == 4


def test_shared_weights_are_saved_once_and_read_by_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_model

    def net() -> nn.Sequential:
        made = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))
        made[1].weight = made[0].weight
        return made

    model = wrap_module(net(), role="student", data=floats())
    save_model(model, tmp_path / "s", NAMES)
    fresh = net()
    load_model(fresh, tmp_path / "s/model.safetensors")
    x = np.ones((2, 6), dtype=np.float32)
    assert torch.equal(fresh(torch.from_numpy(x)), model.module(torch.from_numpy(x)))
    with pytest.raises(UsageError, match="Python call") as caught:
        load_saved(tmp_path / "s")
    assert "load_model" in str(caught.value)
