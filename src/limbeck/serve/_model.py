"""One exported student in ONNX Runtime: raw text or image bytes to arrays, arrays to logits."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.errors import Problem, UsageError, missing_extra
from limbeck.pixels import TooManyPixels, Undecodable, decode, fit, normalise, pillow
from limbeck.preprocessing import ImagePreprocessing
from limbeck.serve._folder import found

__all__ = ["Arrays", "Port", "Refused", "ServedModel", "open_model", "softmax"]

Arrays = dict[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float64]

_TYPES = {"tensor(float)": "FP32", "tensor(int64)": "INT64", "tensor(double)": "FP64", "tensor(float16)": "FP16", "tensor(int32)": "INT32"}
DTYPES: dict[str, type[np.generic]] = {"FP32": np.float32, "INT64": np.int64, "FP64": np.float64, "FP16": np.float16, "INT32": np.int32}
"""The protocol's names of the types that exports have."""


class Refused(Exception):
    """An input that is refused; status: the HTTP status that says so."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Port:
    """An input or output: its name, its type in the protocol's words, and its shape with -1 for what is free."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ServedModel:
    """A model that answers.

    kind: ``image``, ``text`` or ``tensor``. classes: names in the order of the logits. inputs, outputs: as the file declares them.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise missing_extra("onnxruntime", "serve", "Answering with an ONNX file") from None
        it = found(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        try:
            source = it.content if it.content is not None else str(it.path)
            self.session: Any = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of ONNX Runtime's own kinds
            raise UsageError(Problem(str(it.path), f"ONNX Runtime cannot load it: {_brief(error)}")) from None
        self.folder, self.sha256, self.bytes = folder, it.sha256, it.bytes
        self.inputs = tuple(_port(v, it.path) for v in self.session.get_inputs())
        self.outputs = tuple(_port(v, it.path) for v in self.session.get_outputs())
        facts: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        try:
            self.classes: tuple[str, ...] = tuple(str(name) for name in json.loads(facts["classes"]))
            how: dict[str, Any] = json.loads(facts["preprocessing"])
            self.kind: str = how["kind"]
            self.task: str = facts.get("task", it.task)
            self._image = _image_preprocessing(how) if self.kind == "image" else None
            self.max_length: int | None = int(how["max_length"]) if self.kind == "text" else None
            self._pad_id = int(how.get("pad_token_id", 0))
        except (KeyError, ValueError, TypeError) as error:
            text = f"its metadata do not say how it wants its inputs ({type(error).__name__}: {error})."
            raise UsageError(Problem(str(it.path), text, "Was it written by `limbeck export`?")) from None
        if "logits" not in [port.name for port in self.outputs]:
            raise UsageError(Problem(str(it.path), "it has no output 'logits'."))
        self.vocabulary: int | None = None
        self._tokenizer = _tokenizer(facts["tokenizer"], it.path) if self.kind == "text" and "tokenizer" in facts else None

        if self._tokenizer is not None:
            self.vocabulary = int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(channels, height, width) of an image model's input."""
        how = self._image
        return None if how is None or how.height is None or how.width is None else (how.channels, how.height, how.width)

    def warm(self) -> None:
        """What the first request would wait for: image formats are registered, the session gets its memory."""
        if self.kind == "image":
            pillow().init()
        zeros = {p.name: np.zeros([n if n > 0 else 1 for n in p.shape], DTYPES[p.datatype]) for p in self.inputs}
        with contextlib.suppress(Refused):
            self.run(zeros)

    def run(self, arrays: Arrays) -> npt.NDArray[Any]:
        """``(B, C)`` logits of prepared inputs. Raises: Refused, where ONNX Runtime refuses them."""
        try:
            (logits,) = self.session.run(["logits"], arrays)
        except Exception as error:
            raise Refused(f"the model cannot take these inputs: {_brief(error)}") from None
        return np.asarray(logits)

    def from_image(self, content: bytes, most: int | None = None) -> Arrays:
        """One encoded image as ``{name: (1, channels, H, W) float32}``, upright, resized and normalised as in training. Raises: Refused."""
        how = self._image
        if how is None:
            raise Refused(f"this model takes {self._wants()}, not an image", 415)
        try:
            pixels = decode(content, None, most=most)
        except TooManyPixels as error:
            raise Refused(f"the image is too large: {error}", 413) from None
        except Undecodable as error:
            raise Refused(f"the image cannot be read: {error}", 400) from None
        height, width = how.height or pixels.shape[0], how.width or pixels.shape[1]
        fitted = pixels
        if how.resize_shorter is not None or pixels.shape[:2] != (height, width):
            fitted = fit(pixels, height, width, how.resize_shorter, how.interpolation)
        try:
            return {self.inputs[0].name: normalise(fitted[None], how, np.float32)}
        except UsageError as error:
            raise Refused(str(error)) from None

    def from_text(self, text: str, pair: str | None = None) -> Arrays:
        """One text (or pair) as ``{name: (1, T) int64}``, cut as in training. Raises: Refused."""
        if self.kind != "text":
            raise Refused(f"this model takes {self._wants()}, not a text", 415)
        if self._tokenizer is None:
            raise Refused("this model brought no tokenizer; send its input tensors", 415)
        try:
            encoding = self._tokenizer.encode(text) if pair is None else self._tokenizer.encode(text, pair)
        except Exception as error:  # a lone surrogate, which is no Unicode text
            raise Refused(f"the text cannot be read: {_brief(error)}") from None
        columns = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids, "attention_mask": encoding.attention_mask}
        return {port.name: np.array([columns[port.name] or [self._pad_id]], dtype=np.int64) for port in self.inputs}

    @property
    def pads(self) -> bool:
        """Whether texts of several lengths may share a batch: a mask says what is padding."""
        return self.kind == "text" and "attention_mask" in [port.name for port in self.inputs]

    def stack(self, parts: Sequence[Arrays]) -> Arrays:
        """Several inputs as one batch, texts padded on the right to the longest of them as in training."""
        if len(parts) == 1:
            return parts[0]
        if not self.pads:
            return {port.name: np.concatenate([part[port.name] for part in parts]) for port in self.inputs}
        longest = max(part[self.inputs[0].name].shape[1] for part in parts)
        rows = sum(len(part[self.inputs[0].name]) for part in parts)
        batch: Arrays = {}
        for port in self.inputs:
            first = parts[0][port.name]
            batch[port.name] = np.full((rows, longest), self._pad_id if port.name == "input_ids" else 0, dtype=first.dtype)
            at = 0
            for part in parts:
                value = part[port.name]
                batch[port.name][at : at + len(value), : value.shape[1]] = value
                at += len(value)
        return batch

    def _wants(self) -> str:
        return {"image": "images", "text": "texts", "tensor": "float arrays"}.get(self.kind, self.kind)


def open_model(folder: Path, threads: int = 0) -> ServedModel:
    """The exported student of a run.

    Raises: UsageError, where the folder has none that can be believed or loaded.
    """
    return ServedModel(folder, threads)


def softmax(logits: npt.NDArray[Any]) -> Floats:
    """``(B, C)`` probabilities in float64."""
    x = logits.astype(np.float64)
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True), dtype=np.float64)


def _port(value: Any, path: Path) -> Port:
    if value.type not in _TYPES:
        raise UsageError(Problem(str(path), f"'{value.name}' has the type {value.type}, which no export of a student has."))
    return Port(value.name, _TYPES[value.type], tuple(n if isinstance(n, int) and n > 0 else -1 for n in value.shape))


def _image_preprocessing(how: Mapping[str, Any]) -> ImagePreprocessing:
    known = {**how, "mean": tuple(how["mean"]), "std": tuple(how["std"])}
    return ImagePreprocessing(**known)


def _tokenizer(text: str, path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise missing_extra("tokenizers", "serve", "Answering texts") from None
    try:
        return Tokenizer.from_str(text)
    except Exception as error:
        raise UsageError(Problem(str(path), f"the tokenizer in it cannot be read: {_brief(error)}")) from None


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300].rstrip() + " ..."
