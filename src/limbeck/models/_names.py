"""From what a person writes to a model's kind and name: existing folder, short name, hub id."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from limbeck._recipe_paths import home_path
from limbeck.errors import Problem, UsageError, listed, nearest
from limbeck.models import cifar

__all__ = ["SHORT_NAMES", "Name", "known_models", "parse_name"]

PREFIXES = ("torchvision", "timm", "cifar", "hf", "python", "run", "onnx", "logits")

SHORT_NAMES: dict[str, tuple[str, str, str]] = {
    "bert-base": ("hf:google-bert/bert-base-uncased", "text encoder, 110M", "a solid default teacher, or a student of bert-large"),
    "bert-large": ("hf:google-bert/bert-large-uncased", "text encoder, 335M", "a strong teacher for English text"),
    "distilbert": ("hf:distilbert/distilbert-base-uncased", "text encoder, 66M", "half of bert-base; a student that starts well"),
    "roberta-base": ("hf:FacebookAI/roberta-base", "text encoder, 125M", "usually a little better than bert-base"),
    "roberta-large": ("hf:FacebookAI/roberta-large", "text encoder, 355M", "one of the best teachers for English classification"),
    "modernbert-base": ("hf:answerdotai/ModernBERT-base", "text encoder, 149M", "long inputs (8,192 tokens), recent training data"),
    "modernbert-large": ("hf:answerdotai/ModernBERT-large", "text encoder, 395M", "a strong teacher for long English texts"),
    "minilm": (
        "hf:sentence-transformers/all-MiniLM-L6-v2",
        "text encoder, 23M",
        "a small student for CPUs; cut it further with options.layers",
    ),
    "resnet18": ("torchvision:resnet18", "convolutional network, 12M", "the everyday student for photos"),
    "resnet34": ("torchvision:resnet34", "convolutional network, 22M", "a larger student, or a light teacher"),
    "resnet50": ("torchvision:resnet50", "convolutional network, 26M", "the everyday teacher for photos"),
    "resnet101": ("torchvision:resnet101", "convolutional network, 45M", "a stronger teacher"),
    "resnet152": ("torchvision:resnet152", "convolutional network, 60M", "the strongest plain ResNet teacher"),
    "mobilenetv2": ("torchvision:mobilenet_v2", "convolutional network, 3.5M", "a student for phones"),
    "mobilenetv3": ("torchvision:mobilenet_v3_large", "convolutional network, 5.5M", "a student for phones, better than v2"),
    "mobilenetv3-small": ("torchvision:mobilenet_v3_small", "convolutional network, 2.5M", "the smallest of the usual phone students"),
    "efficientnet-b0": ("torchvision:efficientnet_b0", "convolutional network, 5.3M", "accurate for its size; slower than its FLOPs say"),
    "convnext-tiny": ("torchvision:convnext_tiny", "convolutional network, 29M", "a modern teacher of medium size"),
    "vit-tiny": ("timm:vit_tiny_patch16_224", "vision transformer, 5.7M", "a transformer student; set options.patch_size for small images"),
    "vit-small": ("timm:vit_small_patch16_224", "vision transformer, 22M", "a transformer student or a light teacher"),
    "vit-base": ("timm:vit_base_patch16_224", "vision transformer, 86M", "a strong transformer teacher"),
}
"""Short name -> (full name, what it is, when to use it)."""


@dataclass(frozen=True)
class Name:
    """A model's kind and what follows the colon. ``given`` is what the person wrote; ``path`` is set for folders that exist."""

    kind: Literal["torchvision", "timm", "hf", "python", "run"]
    target: str
    given: str
    path: Path | None = None


def known_models() -> Iterator[tuple[str, str, str]]:
    """Rows for ``limbeck models``: name, what it is, when to use it."""
    for name, (full, what, when) in SHORT_NAMES.items():
        yield name, f"{what} ({full})", when
    yield "torchvision:NAME", "any classifier of torchvision.models", "its name as torchvision writes it, e.g. torchvision:regnet_y_400mf"
    yield "timm:NAME", "any classifier of timm", "its name as timm writes it, e.g. timm:convnext_atto"
    yield "cifar:NAME", "the papers' networks for 32 x 32 images", f"to compare with published figures: {', '.join(cifar.__all__)}"
    yield "hf:FOLDER_OR_HUB_ID", "a Hugging Face sequence or image classifier, or an encoder to make one of", "safetensors weights only"
    yield "python:FILE_OR_MODULE:CALLABLE", "your own function or class that returns an nn.Module", "anything else"
    yield "logits:FILE", "a teacher's answers that were computed elsewhere (.npy or .parquet)", "the teacher itself is out of reach"
    yield "run:DIR", "the student of an earlier run", "a teacher trained by `limbeck train`, or a student to go on with"


def parse_name(given: str, base: Path, where: str) -> Name:
    """Decide what a model's name means: a prefix, else an existing folder, else a short name, else a hub id."""
    text = given.strip()
    if not text:
        raise UsageError(Problem(where, "the model's name is empty.", "See `limbeck models` for what there is."))
    folder = _folder(text, base)
    prefix, colon, target = text.partition(":")
    if folder is None and colon:
        return _prefixed(prefix, target, given, base, where)
    if folder is not None:
        return Name(_kind_of_folder(folder, where), str(folder), given, folder)
    if text.lower() in SHORT_NAMES:
        full = SHORT_NAMES[text.lower()][0]
        kind, _, target = full.partition(":")
        return _prefixed(kind, target, given, base, where)
    if _looks_like_path(text):
        raise UsageError(Problem(where, f"the folder '{text}' does not exist (looked in {base}).", nearest(text, SHORT_NAMES)))
    return Name("hf", text, given)


def _prefixed(prefix: str, target: str, given: str, base: Path, where: str) -> Name:
    match prefix:
        case _ if not target and prefix in PREFIXES:
            raise UsageError(
                Problem(where, f"'{given}' names no model after '{prefix}:'.", "See `limbeck models` for how each kind is written.")
            )
        case "torchvision" | "timm" | "python":
            return Name(prefix, target, given)
        case "cifar":
            if target not in cifar.__all__:
                raise UsageError(
                    Problem(
                        where, f"there is no '{given}'; after cifar: comes {listed(cifar.__all__, 40)}.", nearest(target, cifar.__all__)
                    )
                )
            return Name("python", f"{cifar.__file__}:{target}", given)
        case "hf":
            folder = _folder(target, base)
            if folder is None and _looks_like_path(target):
                raise UsageError(Problem(where, f"the folder '{target}' does not exist (looked in {base})."))
            return Name("hf", str(folder) if folder else target, given, folder)
        case "run":
            folder = _folder(target, base)
            if folder is None:
                raise UsageError(Problem(where, f"the run '{target}' does not exist (looked in {base})."))
            return Name("run", str(folder), given, folder)
        case "onnx":
            raise UsageError(Problem(where, "onnx: teachers are not built yet.", "Name the model that the file was exported from instead."))
        case "logits":
            raise UsageError(Problem(where, f"'{given}' holds answers, not a model.", "It can only be a teacher."))
        case _:
            allowed = ", ".join(f"{p}:" for p in PREFIXES if p != "onnx")
            raise UsageError(
                Problem(where, f"'{given}' starts with '{prefix}:', which is no kind of model ({allowed}).", nearest(prefix, PREFIXES))
            )


def _folder(text: str, base: Path) -> Path | None:
    path = base / home_path(text)
    return path.resolve() if os.path.isdir(path) else None


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or text.endswith("/")


def _kind_of_folder(folder: Path, where: str) -> Literal["run", "hf"]:
    if (folder / "model.json").is_file() or (folder / "student" / "model.json").is_file():
        return "run"
    if (folder / "config.json").is_file():
        return "hf"
    raise UsageError(
        Problem(
            where,
            f"the folder {folder} is neither a run (no model.json, no student/model.json) nor a Hugging Face model (no config.json).",
            "A file with a function that returns your model is written python:FILE.py:FUNCTION.",
        )
    )
