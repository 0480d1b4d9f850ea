"""Samples as people see them: thumbnails and sentences for the report, and the list of those that were left out."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np

from limbeck.data.splits import Data, Split, preview
from limbeck.pixels import png

__all__ = ["skipped_csv", "text_of", "thumbnail"]


def skipped_csv(data: Data) -> str:
    """``sample,why`` of every bad sample that was left out of the data, as CSV."""
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows([("sample", "why"), *data.skipped])
    return written.getvalue()


def thumbnail(split: Split, index: int, size: int = 64) -> bytes:
    """Sample ``index`` of a split as PNG, its longer side ``size`` pixels.

    Images, and float arrays that look like one: (channels, H, W) or (H, W), scaled from their least to their largest value.

    Raises:
        ValueError: the sample is no picture.
    """
    if split.source.kind == "image":
        return png(preview(split.source, int(split.rows[index]), max(size, 16)), size)
    if split.source.kind == "text":
        raise ValueError("a text has no thumbnail")
    raw: Any = split.read([index])
    values = np.asarray(raw[0], dtype=np.float64)
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or not (values.shape[0] <= 4 or values.shape[2] <= 4):
        raise ValueError(f"a float array of shape {raw[0].shape} has no thumbnail")
    if values.shape[0] <= 4:
        values = values.transpose(1, 2, 0)
    low, high = values.min(), values.max()
    scaled = np.rint((values - low) / max(high - low, 1e-12) * 255.0).astype(np.uint8)
    return png(scaled, size)


def text_of(split: Split, index: int) -> str:
    """Sample ``index`` as text: its text, a pair with a line between, or the shape and first values of a float array."""
    raw: Any = split.read([index])
    if split.source.kind == "text":
        text, pair = raw[0]
        return str(text) if pair is None else f"{text}\n{pair}"
    values = np.asarray(raw[0]).reshape(-1)
    shown = ", ".join(f"{v:.4g}" for v in values[:8].tolist())
    return f"{split.source.kind} {tuple(np.shape(raw[0]))}: {shown}{', ...' if len(values) > 8 else ''}"
