"""Raw access to samples by row. A source knows no labels, no ids of other rows and no models; it travels to loader workers by pickle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from limbeck.data.decoded import Decoded
from limbeck.data.ids import Ids, array_id, bytes_id, from_digests
from limbeck.errors import LimbeckError
from limbeck.pixels import Undecodable, decode, to_array

__all__ = [
    "ArrayImages",
    "DatasetSamples",
    "EncodedImages",
    "FileImages",
    "ImageList",
    "Joined",
    "Kind",
    "Raw",
    "Rows",
    "Source",
    "Tensors",
    "Texts",
]

Kind = Literal["image", "text", "tensor"]
Rows = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
Text = tuple[str, str | None]
Raw = Pixels | list[Pixels] | list[Text] | npt.NDArray[Any]
"""Images: uint8 ``(B, H, W, Ch)`` where all have one size, else a list of ``(H, W, Ch)``. Text: a list of ``(text, pair or None)``.
Tensors: a float array ``(B, ...)``."""


@runtime_checkable
class Source(Protocol):
    """Samples by row."""

    @property
    def kind(self) -> Kind: ...

    @property
    def in_memory(self) -> bool:
        """False where reading a row costs a disk access or a decoding."""
        ...

    def __len__(self) -> int: ...

    def read(self, rows: Rows) -> Raw:
        """The samples of ``rows``, in that order."""
        ...


def stacked(images: list[Pixels]) -> Pixels | list[Pixels]:
    """One array where all sizes agree, else the list."""
    return np.stack(images) if images and all(i.shape == images[0].shape for i in images) else images


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images of one size in memory: ``pixels`` (N, H, W, Ch) uint8."""

    pixels: Pixels
    kind: Literal["image"] = "image"
    in_memory: bool = True

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, rows: Rows) -> Raw:
        return self.pixels[rows]


@dataclass(frozen=True, eq=False)
class ImageList:
    """Images of several sizes in memory, each (H, W, Ch) uint8 with the same number of channels."""

    images: Sequence[Pixels]
    kind: Literal["image"] = "image"
    in_memory: bool = True

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: Rows) -> Raw:
        return stacked([self.images[int(r)] for r in rows])


@dataclass(frozen=True, eq=False)
class FileImages:
    """Image files. A file's bytes are compared with the id that it had when the run started, whenever it is decoded: once a visit, or once
    for all where ``decoded`` keeps what came out.

    ``index`` is the file that remembers ids by size and time; it is forgotten when one of its ids turns out to be wrong.
    """

    root: Path
    names: Sequence[str]
    ids: Ids
    channels: int
    index: Path | None = None
    decoded: Decoded | None = None
    kind: Literal["image"] = "image"
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def _content(self, row: int) -> bytes:
        path = self.root / self.names[row]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise LimbeckError(f"{path} could not be read: {error.strerror or error}. It was there when the run started.") from None
        if not np.array_equal(from_digests([bytes_id(content)])[0], self.ids[row]):
            if self.index is not None:
                self.index.unlink(missing_ok=True)
            raise LimbeckError(f"{path} changed: it is not the file that was indexed. Leave the data alone during a run, and start again.")
        return content

    def read(self, rows: Rows) -> Raw:
        return stacked([self._image(int(r)) for r in rows])

    def _image(self, row: int) -> Pixels:
        if self.decoded is None:
            return self._decode(row, None)
        kept = self.decoded.read(row, self.ids[row])
        if kept is None:
            kept = self._decode(row, None)
            self.decoded.write(row, self.ids[row], kept)
        return kept

    def preview(self, row: int, draft: int) -> Pixels:
        """One image, possibly decoded smaller, with sides of at least ``draft`` pixels."""
        return self._decode(row, draft)

    def _decode(self, row: int, draft: int | None) -> Pixels:
        try:
            return decode(self._content(row), self.channels, draft)
        except Undecodable as error:
            raise LimbeckError(f"{self.root / self.names[row]} cannot be decoded: {error}.") from None


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Encoded images inside a column of a table (Arrow or ``datasets``) whose rows are ``{"bytes": ..., "path": ...}`` or plain bytes."""

    column: Any
    channels: int
    base: Path
    kind: Literal["image"] = "image"
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.column)

    def content(self, row: int) -> bytes:
        """The encoded bytes of one row."""
        cell = self.column[row]
        cell = cell.as_py() if hasattr(cell, "as_py") else cell
        if isinstance(cell, dict):
            stored = cell.get("bytes")
            return bytes(stored) if stored is not None else (self.base / str(cell["path"])).read_bytes()
        return bytes(cell)

    def read(self, rows: Rows) -> Raw:
        return stacked([self.preview(int(r), None) for r in rows])

    def preview(self, row: int, draft: int | None) -> Pixels:
        """One image, possibly decoded smaller."""
        try:
            return decode(self.content(row), self.channels, draft)
        except Undecodable as error:
            raise LimbeckError(f"The image in row {row} cannot be decoded: {error}.") from None


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts, or pairs of texts, in memory."""

    texts: Sequence[str]
    pairs: Sequence[str | None] | None = None
    kind: Literal["text"] = "text"
    in_memory: bool = True

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, rows: Rows) -> Raw:
        pairs = self.pairs
        return [(self.texts[int(r)], None if pairs is None else pairs[int(r)]) for r in rows]


@dataclass(frozen=True, eq=False)
class Tensors:
    """Float arrays in memory, taken as they are: ``values`` (N, ...)."""

    values: npt.NDArray[Any]
    kind: Literal["tensor"] = "tensor"
    in_memory: bool = True

    def __len__(self) -> int:
        return len(self.values)

    def read(self, rows: Rows) -> Raw:
        return self.values[rows]


@dataclass(frozen=True, eq=False)
class DatasetSamples:
    """A map-style ``Dataset`` that is too large to keep: each visit reads it again and compares the content with the id."""

    dataset: Any
    kind: Kind
    ids: Ids
    channels: int
    labelled: bool
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def _sample(self, row: int) -> npt.NDArray[Any]:
        item = self.dataset[row]
        sample = as_array(item[0] if self.labelled or isinstance(item, tuple) else item)
        narrow = sample.dtype == np.uint8 and sample.shape[2] == 1 and self.channels > 1
        kept = np.repeat(sample, self.channels, axis=2) if narrow else sample
        if not np.array_equal(from_digests([array_id(sample)])[0], self.ids[row]):
            raise LimbeckError(f"The dataset gave another sample at index {row} than before: give it without random transforms.")
        return kept

    def read(self, rows: Rows) -> Raw:
        samples = [self._sample(int(r)) for r in rows]
        return np.stack(samples) if self.kind == "tensor" else stacked(samples)


@dataclass(frozen=True, eq=False)
class Joined:
    """Sources of one kind, one after the other."""

    sources: tuple[Source, ...]
    starts: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", np.cumsum([0, *(len(s) for s in self.sources)]).astype(np.int64))

    @property
    def kind(self) -> Kind:
        return self.sources[0].kind

    @property
    def in_memory(self) -> bool:
        return all(s.in_memory for s in self.sources)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, row: int) -> tuple[Source, int]:
        """The source that holds ``row``, and its row there."""
        which = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.sources[which], row - int(self.starts[which])

    def read(self, rows: Rows) -> Raw:
        which = np.searchsorted(self.starts, rows, side="right") - 1
        if len(rows) and (which == which[0]).all():
            return self.sources[int(which[0])].read(rows - self.starts[which[0]])
        parts: list[Any] = [None] * len(rows)
        for number in np.unique(which):
            places = np.flatnonzero(which == number)
            for place, sample in zip(places, self.sources[int(number)].read(rows[places] - self.starts[number]), strict=True):
                parts[int(place)] = sample
        if self.kind == "image":
            return stacked(parts)
        return np.stack(parts) if self.kind == "tensor" else parts


def as_array(sample: Any) -> npt.NDArray[Any]:
    """One sample of a ``Dataset`` as an array: images (Pillow, uint8 tensors or arrays) as (H, W, Ch) uint8, the rest as floats.

    Raises:
        TypeError: neither an image nor floats; the message says what it is.
    """
    import torch

    if hasattr(sample, "getexif") and hasattr(sample, "convert"):
        return to_array(sample)
    if isinstance(sample, torch.Tensor):
        tensor = sample.detach().cpu()
        sample = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    array: npt.NDArray[Any] = np.asarray(sample)
    if array.dtype == np.uint8:
        pixels: Pixels = channels_last(array[None])[0]
        return pixels
    if array.dtype.kind == "f":
        return array
    raise TypeError(f"{type(sample).__name__} of {array.dtype}")


def channels_last(images: npt.NDArray[Any]) -> Pixels:
    """``(N, H, W, Ch)`` from uint8 images in NHWC, NCHW or NHW order.

    The channel axis is the one with 1 or 3 entries, else the one with 2 to 16, the last axis first.

    Raises:
        ValueError: no axis can be the channels; the message says what is expected.
    """
    if images.ndim == 3:
        return images[..., None]
    if images.ndim == 4:
        for sizes in ((1, 3), range(2, 17)):
            if images.shape[3] in sizes:
                return images
            if images.shape[1] in sizes:
                return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    raise ValueError(f"uint8 of shape {images.shape} is no image: (N, H, W, channels), (N, channels, H, W) or (N, H, W) is expected")
