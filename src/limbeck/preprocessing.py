"""How a model wants its inputs, in three ways. Torch is not needed to read it: what serves a model has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ImagePreprocessing", "Preprocessing", "TensorPreprocessing", "TextPreprocessing"]


@dataclass(frozen=True)
class ImagePreprocessing:
    """How a model wants images: ``(x / 255 - mean) / std`` in channels-first order, at ``height x width``.

    ``height`` and ``width`` are None where the model takes the data's own size. ``resize_shorter`` is the shorter side before the centre
    crop at evaluation (None: resize straight to height x width). ``mean`` and ``std`` have one entry a channel, in units of [0, 1].
    """

    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    height: int | None = None
    width: int | None = None
    resize_shorter: int | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    kind: Literal["image"] = "image"


@dataclass(frozen=True)
class TextPreprocessing:
    """How a model wants text: its own tokenizer (a folder), cut at ``max_length`` tokens, padded dynamically.

    ``inputs`` are the names that the tokenizer gives and the model takes, in order. ``tokenizer_sha256`` is over the tokenizer's files.
    """

    tokenizer: str
    max_length: int
    inputs: tuple[str, ...]
    tokenizer_sha256: str
    pad_token_id: int = 0
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class TensorPreprocessing:
    """Float arrays are taken as they are."""

    shape: tuple[int, ...]
    kind: Literal["tensor"] = "tensor"


Preprocessing = ImagePreprocessing | TextPreprocessing | TensorPreprocessing
