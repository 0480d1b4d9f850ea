"""Texts to tokens: once for every source and tokenizer, stored flat, padded to the longest of a batch."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limbeck.data.sources import Joined, Source
from limbeck.data.splits import Split
from limbeck.errors import LimbeckError, missing_extra
from limbeck.types import TextPreprocessing

__all__ = ["Tokens", "token_lengths", "tokens_of"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of every row of a source.

    offsets: ``(N + 1,)`` int64; row i has tokens ``offsets[i] .. offsets[i + 1] - 1`` of each of ``columns`` (flat int32; ``input_ids`` and
    what else the tokenizer gives and the model takes, but the mask, which follows from the lengths).
    """

    offsets: npt.NDArray[np.int64]
    columns: dict[str, npt.NDArray[np.int32]]
    inputs: tuple[str, ...]
    pad_token_id: int

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    def take(self, rows: npt.NDArray[np.int64]) -> Tokens:
        """The tokens of these rows alone, in that order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        at = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Tokens(offsets, {k: v[at] for k, v in self.columns.items()}, self.inputs, self.pad_token_id)

    def batch(self, rows: npt.NDArray[np.int64]) -> dict[str, Tensor]:
        """``{name: (B, T) int64}`` for these rows, padded on the right to the longest of them."""
        lengths = self.lengths[rows]
        longest = max(1, int(lengths.max(initial=1)))
        mask = np.arange(longest) < lengths[:, None]
        at = (self.offsets[rows][:, None] + np.arange(longest))[mask]
        out: dict[str, Tensor] = {}
        for name in self.inputs:
            if name == "attention_mask":
                out[name] = torch.from_numpy(mask.astype(np.int64))
                continue
            padded = np.full((len(rows), longest), self.pad_token_id if name == "input_ids" else 0, dtype=np.int64)
            padded[mask] = self.columns[name][at]
            out[name] = torch.from_numpy(padded)
        return out


_stored: weakref.WeakKeyDictionary[Source, dict[tuple[Any, ...], Tokens]] = weakref.WeakKeyDictionary()


def tokens_of(source: Source, preprocessing: TextPreprocessing) -> Tokens:
    """The tokens of a source, tokenised at the first call for this tokenizer, length and inputs."""
    key = (preprocessing.tokenizer_sha256, preprocessing.max_length, preprocessing.inputs, preprocessing.pad_token_id)
    kept = _stored.setdefault(source, {})
    if key not in kept:
        kept[key] = _joined(source, preprocessing) if isinstance(source, Joined) else _tokenise(source, preprocessing)
    return kept[key]


def token_lengths(split: Split, preprocessing: TextPreprocessing) -> npt.NDArray[np.int64]:
    """``(N,)`` tokens of each sample of a split, special tokens included, after cutting to ``max_length``."""
    return tokens_of(split.source, preprocessing).lengths[split.rows]


def _joined(source: Joined, preprocessing: TextPreprocessing) -> Tokens:
    parts = [tokens_of(s, preprocessing) for s in source.sources]
    lengths = np.concatenate([p.lengths for p in parts])
    columns = {k: np.concatenate([p.columns[k] for p in parts]) for k in parts[0].columns}
    return Tokens(_offsets(lengths), columns, preprocessing.inputs, preprocessing.pad_token_id)


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _tokenizer(preprocessing: TextPreprocessing) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise missing_extra("transformers", "text", "Tokenising text") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(preprocessing.tokenizer, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and plain Exception from its Rust part
        text = str(error).strip().splitlines()
        raise LimbeckError(f"The tokenizer in {preprocessing.tokenizer} cannot be loaded: {text[0] if text else error!r}") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # what tokenizer.json says by itself about padding and cutting is for somebody else's batches
        backend.no_padding()
        backend.no_truncation()
    return tokenizer


def _tokenise(source: Source, preprocessing: TextPreprocessing, block: int = 2000) -> Tokens:
    tokenizer = _tokenizer(preprocessing)
    names = [n for n in preprocessing.inputs if n != "attention_mask"]
    pieces: dict[str, list[npt.NDArray[np.int32]]] = {n: [] for n in names}
    lengths: list[int] = []
    for start in range(0, len(source), block):
        raw: Any = source.read(np.arange(start, min(start + block, len(source)), dtype=np.int64))
        texts = [t for t, _ in raw]
        pairs = None if all(p is None for _, p in raw) else [p or "" for _, p in raw]
        encoded = tokenizer(
            texts,
            pairs,
            padding=False,
            truncation=True,
            max_length=preprocessing.max_length,
            return_attention_mask=False,
            return_token_type_ids="token_type_ids" in names,
        )
        missing = [n for n in names if n not in encoded]
        if missing:
            raise LimbeckError(f"The tokenizer in {preprocessing.tokenizer} does not give {', '.join(missing)}, which the model takes.")
        lengths += [len(row) for row in encoded["input_ids"]]
        for name in names:
            pieces[name].append(np.concatenate([np.asarray(row, dtype=np.int32) for row in encoded[name]]))
    columns = {n: np.concatenate(p) if p else np.zeros(0, np.int32) for n, p in pieces.items()}
    return Tokens(_offsets(np.array(lengths, dtype=np.int64)), columns, preprocessing.inputs, preprocessing.pad_token_id)
