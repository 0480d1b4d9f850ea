"""Queries, keys and values as captured, held to the attention that the models themselves compute; layers that are paired by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.errors import UsageError
from limbeck.losses.transformers import split_heads
from limbeck.models import Capture, Model, build_model, exit_layers, pair_layers, validate_paths, wrap_module
from models_support import floats, images, spec, text_config, text_folder, texts


def scores(captured: Tensor, heads: int) -> Tensor:
    """(B, heads, T, T) attention scores before the softmax."""
    q, k, _ = captured.chunk(3, -1)
    return split_heads(q, heads) @ split_heads(k, heads).mT / (q.shape[-1] / heads) ** 0.5


TEXTS = {"bert": "bert.encoder.layer.{}", "roberta": "roberta.encoder.layer.{}", "distilbert": "distilbert.transformer.layer.{}"}


@pytest.mark.parametrize("family", TEXTS)
def test_attention_of_texts_is_computed_again_from_what_is_captured(family: str) -> None:
    """The judge is the model's own attention, computed without fusion; what is captured comes from the fused one."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(text_config(family, layers=2), attn_implementation="sdpa").eval()
    tokens = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    given = {"input_ids": tokens, "attention_mask": (tokens != 0).long()}
    paths = [f"{TEXTS[family].format(i)}:q,k,v" for i in range(2)]
    with Capture(model, paths) as capture:
        model(**given)
    assert not any(m._forward_hooks for m in model.modules())
    model.set_attn_implementation("eager")
    wanted = model(**given, output_attentions=True).attentions
    for path, want in zip(paths, wanted, strict=True):
        assert capture.features[path].shape == (2, 4, 24)
        padded = given["attention_mask"][:, None, None, :] == 0
        torch.testing.assert_close(scores(capture.features[path], 2).masked_fill(padded, -torch.inf).softmax(-1), want)


def test_attention_of_images_is_computed_again_from_what_is_captured() -> None:
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, num_heads=2, depth=2).eval()
    with Capture(vit, ["blocks.1:q,k,v", "blocks.1.norm1", "blocks.1.attn"]) as capture:
        vit(torch.randn(2, 3, 32, 32))
    both = capture.features["blocks.1:q,k,v"]
    mixed = scores(both, 2).softmax(-1) @ split_heads(both.chunk(3, -1)[2], 2)
    torch.testing.assert_close(vit.blocks[1].attn.proj(mixed.transpose(1, 2).flatten(2)), capture.features["blocks.1.attn"])

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 16, "patch_size": 8}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).eval()
    (name, attention) = next((n, m) for n, m in model.named_modules() if hasattr(m, "o_proj"))
    with Capture(model, [f"{name}:q,k,v", name]) as capture:
        model(torch.randn(2, 3, 16, 16))
    both = capture.features[f"{name}:q,k,v"]
    mixed = scores(both, 2).softmax(-1) @ split_heads(both.chunk(3, -1)[2], 2)
    torch.testing.assert_close(attention.o_proj(mixed.transpose(1, 2).flatten(2)), capture.features[name])


class Attention(nn.Module):
    def __init__(self, *names: str, width: int = 8, narrow: int = 8, **parts: Any) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(8, narrow if name in ("key", "value") else width))
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Rotary(Attention):
    def forward(self, x: Tensor, position_embeddings: Tensor | None = None) -> Tensor:
        return x


QUERIES = ("query", "key", "value")
REFUSED: dict[str, tuple[nn.Module, str, str]] = {
    "nothing": (nn.Linear(2, 2), "0", "no attention"),
    "torch's own": (nn.MultiheadAttention(8, 2), "0", "no attention"),
    "two of them": (nn.Sequential(Attention(*QUERIES), Attention(*QUERIES)), "0", "2 attentions"),
    "shared heads": (Attention(*QUERIES, narrow=4), "0", "shares keys"),
    "normalised": (Attention("qkv", q_norm=nn.LayerNorm(4), k_norm=nn.Identity()), "0", "normalises"),
    "turned": (Rotary(*QUERIES), "0", "positions"),
    "relative": (Attention("qkv", relative_position_bias_table=nn.Parameter(torch.zeros(2))), "0", "positions"),
    "causal": (Attention(*QUERIES, is_causal=True), "0", "causal"),
    "no such layer": (Attention(*QUERIES), "1", "'1:q,k,v' is not a layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_is_more_than_queries_and_keys_is_refused(name: str) -> None:
    layer, path, said = REFUSED[name]
    with pytest.raises(UsageError) as error:
        validate_paths(nn.Sequential(layer), [f"{path}:q,k,v"], "objective (student layer)")
    (problem,) = error.value.problems
    assert problem.where == "objective (student layer)"
    assert said in problem.message
    validate_paths(nn.Sequential(Attention(*QUERIES)), ["0:q,k,v"], "")


def pictures(name: str, folder: Path, **options: Any) -> Model:
    return build_model(spec(name, "scratch", **options), role="student", data=images((32, 32)), seed=0, base=folder)


def test_stages_of_convolutional_networks_are_paired_from_the_last(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    small, deep = pictures("torchvision:resnet18", tmp_path), pictures("torchvision:resnet34", tmp_path)
    before = [b.clone() for b in small.module.buffers()]
    assert pair_layers(small, deep) == [(f"layer{i}", f"layer{i}") for i in range(1, 5)]
    assert all(torch.equal(a, b) for a, b in zip(before, small.module.buffers(), strict=True))
    assert not any(m._forward_hooks for m in small.module.modules())
    own = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    plain = wrap_module(nn.Sequential(*own, nn.Linear(4, 4)), role="student", data=images((32, 32)))
    assert pair_layers(plain, deep) == [("1", "layer3"), ("3", "layer4")]


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        # a bottleneck's, an inverted residual's first convolution has the size of the stage before
        ("torchvision:resnet50", ["layer1", "layer2", "layer3", "layer4"]),
        ("torchvision:mobilenet_v2", ["features.1", "features.3", "features.6", "features.13", "features"]),
        # gates pool to 1 x 1 within a block, and the classifier behind
        ("torchvision:efficientnet_b0", ["features.1", "features.2", "features.3", "features.5", "features"]),
        ("torchvision:mobilenet_v3_small", ["features.0", "features.1", "features.3", "features.8", "features"]),
        # a stage begins with what shrinks it; maps of (B, H, W, channels) within are no sizes
        ("torchvision:convnext_tiny", ["features.1", "features.3", "features.5", "features"]),
        ("torchvision:densenet121", ["features.denseblock1", "features.denseblock2", "features.denseblock3", "features"]),
        ("timm:convnext_atto", ["stages.0", "stages.1", "stages.2", "stages"]),
        ("timm:edgenext_xx_small", ["stages.0", "stages.1", "stages.2", "stages"]),
        ("timm:regnetx_002", ["stem", "s1", "s2", "s3", "s4"]),
        # attention within stages makes no transformer
        ("timm:mobilevit_xxs", ["stages.0", "stages.1", "stages.2", "stages.3", "final_conv"]),
        ("timm:mobilevitv2_050", ["stages.0", "stages.1", "stages.2", "stages.3", "stages"]),
        ("cifar:wrn_16_2", ["block1", "block2", "block3"]),
    ],
)
def test_stages_end_where_the_next_one_shrinks(name: str, ends: list[str], tmp_path: Path) -> None:
    pytest.importorskip(name.partition(":")[0] if "cifar" not in name else "torch")
    given = spec(name) if name.startswith("cifar") else spec(name, "scratch")
    model = build_model(given, role="student", data=images((64, 64)), seed=0, base=tmp_path)
    assert exit_layers(model) == ends
    assert not any(m._forward_hooks for m in model.module.modules())


def test_layers_of_transformers_are_spaced_evenly(tmp_path: Path) -> None:
    small, deep = (
        build_model(spec(f"hf:{text_folder(tmp_path / str(n), family, layers=n)}"), role="student", data=texts(), seed=0, base=tmp_path)
        for n, family in ((2, "distilbert"), (6, "bert"))
    )
    assert pair_layers(small, deep) == [
        ("distilbert.transformer.layer.0", "bert.encoder.layer.2"),
        ("distilbert.transformer.layer.1", "bert.encoder.layer.5"),
    ]
    other = wrap_module(nn.Sequential(nn.Linear(6, 4)), role="student", data=floats())
    with pytest.raises(UsageError, match="the student is neither and the teacher is a transformer"):
        pair_layers(other, deep)


def test_exits_are_on_stages_and_on_evenly_spaced_layers() -> None:
    pytest.importorskip("torchvision")
    data = images()
    cnn = build_model(spec("torchvision:resnet18"), role="student", data=data, seed=0, base=Path())
    assert exit_layers(cnn) == ["layer1", "layer2", "layer3", "layer4"]
    timm = pytest.importorskip("timm")
    vit = wrap_module(
        timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, num_heads=2, depth=8, num_classes=4), role="student", data=data
    )
    assert exit_layers(vit) == ["blocks.1", "blocks.3", "blocks.5", "blocks.7"]
    plain = wrap_module(nn.Linear(6, 4), role="student", data=floats())
    with pytest.raises(UsageError, match="the student is neither"):
        exit_layers(plain)
