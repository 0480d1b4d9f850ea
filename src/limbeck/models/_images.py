"""How a model wants its inputs, decided from the data, the weights and ``options.resolution``; and inputs to try a model with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.errors import LimbeckError, Problem, UsageError
from limbeck.models._model import Model, untouched
from limbeck.types import ImagePreprocessing, Preprocessing, TensorPreprocessing

if TYPE_CHECKING:
    from limbeck.data import Data

__all__ = ["adapt_published", "from_data", "read_resolution", "refuse_channels", "sample_inputs", "try_model"]

Size = tuple[int, int]
LARGEST = 8192
"""Pixels of a side. A batch of two such images takes 1.5 GiB."""
CENTRE = 0.875
"""The share of the shorter side that a centre crop keeps at evaluation where nothing is published: 224 of 256."""


def read_resolution(value: Any, where: str) -> Size | None:
    """``options.resolution``: one number, or [height, width]."""
    if value is None:
        return None
    pair = (value, value) if type(value) is int else tuple(value) if isinstance(value, list | tuple) else ()
    if len(pair) != 2 or not all(type(v) is int and 0 < v <= LARGEST for v in pair):
        wanted = f"a size in pixels of at most {LARGEST:,} is wanted, such as 224 or [224, 224]"
        raise UsageError(Problem(f"{where}.options.resolution", f"{wanted}; got {value!r}."))
    return int(pair[0]), int(pair[1])


def refuse_channels(data: Data, channels: int, where: str, hint: str = "") -> None:
    """One channel is repeated for a model that wants more; nothing else can be made up."""
    if data.channels not in (1, channels):
        raise UsageError(
            Problem(where, f"it reads images of {channels} channel{'s' * (channels != 1)} and the data has {data.channels}.", hint)
        )


def from_data(data: Data, size: Size, channels: int) -> ImagePreprocessing:
    """The training split's mean and standard deviation, at ``size``."""
    mean, std = tuple(map(float, data.mean)), tuple(float(s) if s > 0 else 1.0 for s in data.std)
    if len(mean) == 1:
        mean, std = mean * channels, std * channels
    shorter = None if data.image_size is not None else round(min(size) / CENTRE)
    return ImagePreprocessing(channels, mean, std, size[0], size[1], shorter)


def adapt_published(published: ImagePreprocessing, data: Data, resolution: Size | None) -> ImagePreprocessing:
    """What is published for the weights, at another resolution if asked; square data is not cropped, so that no model misses its border."""
    height, width, shorter = published.height or 224, published.width or 224, published.resize_shorter
    if resolution is not None:
        if shorter is not None:
            shorter = round(min(resolution) * shorter / min(height, width))
        height, width = resolution
    if data.image_size is not None and data.image_size[0] * width == data.image_size[1] * height:
        shorter = None
    return replace(published, height=height, width=width, resize_shorter=shorter)


def sample_inputs(preprocessing: Preprocessing, dtype: torch.dtype, batch: int = 2) -> dict[str, Tensor]:
    """Made-up inputs of the right names, shapes and dtypes."""
    if isinstance(preprocessing, ImagePreprocessing):
        return {"image": torch.zeros(batch, preprocessing.channels, preprocessing.height or 224, preprocessing.width or 224, dtype=dtype)}
    if isinstance(preprocessing, TensorPreprocessing):
        return {"x": torch.zeros(batch, *preprocessing.shape, dtype=dtype)}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(preprocessing.tokenizer, trust_remote_code=False)
    tokens = tokenizer("a", truncation=True, max_length=preprocessing.max_length)
    length = min(len(tokens["input_ids"]), preprocessing.max_length) or 1
    filled = {name: list(tokens.get(name, []))[:length] or [0] * length for name in preprocessing.inputs}
    return {name: torch.tensor([values] * batch, dtype=torch.int64) for name, values in filled.items()}


def try_model(model: Model, where: str, batch: int = 2) -> int:
    """The number of classes that the model answers with, by one forward pass on made-up inputs that leaves it as it was.

    Raises ``UsageError`` where it cannot read such inputs, or does not answer with ``(B, C)`` logits.
    """
    floats = (p.dtype for p in model.module.parameters() if p.is_floating_point())
    inputs = sample_inputs(model.preprocessing, next(floats, torch.float32), batch)
    device = next((p.device for p in model.module.parameters()), torch.device("cpu"))
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
    try:
        with untouched(model.module):
            logits = model({name: value.to(device) for name, value in inputs.items()})
    except LimbeckError as e:
        raise UsageError(Problem(where, str(e))) from e
    except Exception as e:
        said = " ".join(str(e).split())[:300]
        hint = "options: {resolution: 224} gives it larger images." if "image" in inputs and model.kind != "module" else ""
        raise UsageError(Problem(where, f"the model cannot read inputs of this data ({shapes}): {type(e).__name__}: {said}", hint)) from e
    if logits.ndim != 2 or logits.shape[0] != batch or not logits.is_floating_point():
        raise UsageError(
            Problem(
                where,
                f"the model answered {batch} samples ({shapes}) with {tuple(logits.shape)}; logits ({batch}, classes) are wanted.",
            )
        )
    return int(logits.shape[1])
