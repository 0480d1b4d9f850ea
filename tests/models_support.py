"""Tiny models and stand-ins for data, made on the spot, for the tests of ``limbeck.models``."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from limbeck.recipe import ModelSpec

NAMES = ("bird", "cat", "dog", "eel")


def images(size: tuple[int, int] | None = (32, 32), channels: int = 3, classes: tuple[str, ...] = NAMES, known: bool = True) -> Any:
    return _data(
        "image", classes, known, image_size=size, channels=channels, mean=(0.5, 0.4, 0.3)[:channels], std=(0.2, 0.2, 0.1)[:channels]
    )


def floats(shape: tuple[int, ...] = (6,), classes: tuple[str, ...] = NAMES, known: bool = True) -> Any:
    return _data("tensor", classes, known, shape=shape)


def texts(classes: tuple[str, ...] = NAMES, known: bool = True) -> Any:
    return _data("text", classes, known)


def _data(kind: str, classes: tuple[str, ...], known: bool, **more: Any) -> Any:
    empty: dict[str, Any] = {"image_size": None, "channels": 0, "shape": (), "mean": (), "std": (), "notes": ()}
    return SimpleNamespace(**{**empty, **more, "kind": kind, "classes": classes, "classes_known": known})


def spec(model: str, weights: str | None = None, **options: Any) -> ModelSpec:
    return ModelSpec(model=model, weights=weights, options=options)


def tokenizer_in(folder: Path, words: int = 20) -> None:
    """A word-level tokenizer with BERT's special tokens, padding switched on as in some published files."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *(f"w{i}" for i in range(words - 6))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=16,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)


def text_config(family: str, layers: int = 3, **more: Any) -> Any:
    import transformers as t

    common: dict[str, Any] = {"vocab_size": 20, "pad_token_id": 0}
    match family:
        case "bert":
            return t.BertConfig(
                hidden_size=8,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=12,
                max_position_embeddings=16,
                **common,
                **more,
            )
        case "distilbert":
            return t.DistilBertConfig(dim=8, n_layers=layers, n_heads=2, hidden_dim=12, max_position_embeddings=16, **common, **more)
        case "roberta":
            return t.RobertaConfig(
                hidden_size=8,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=12,
                max_position_embeddings=13,
                **common,
                **more,
            )
        case "modernbert":
            return t.ModernBertConfig(
                hidden_size=8,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=12,
                max_position_embeddings=16,
                local_attention=4,
                bos_token_id=2,
                eos_token_id=3,
                cls_token_id=2,
                sep_token_id=3,
                **common,
                **more,
            )
    raise AssertionError(family)


def text_folder(
    folder: Path, family: str = "bert", layers: int = 3, classes: tuple[str, ...] | None = None, body_only: bool = False
) -> Path:
    """A Hugging Face folder of a tiny classifier (or, ``body_only``, of its encoder), with a tokenizer."""
    import transformers as t

    config = text_config(family, layers)
    if classes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
    torch.manual_seed(layers)
    make = t.AutoModel if body_only else t.AutoModelForSequenceClassification
    make.from_config(config).save_pretrained(folder)
    tokenizer_in(folder)
    return folder


def image_folder(folder: Path, classes: tuple[str, ...] = NAMES, **processor: Any) -> Path:
    """A Hugging Face folder of a tiny ViT with its ``preprocessor_config.json``."""
    import transformers as t

    config = t.ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=16, patch_size=8)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}
    torch.manual_seed(0)
    t.ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder
