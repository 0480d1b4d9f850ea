"""Tokenizers: a folder of files with a hash, and what of their output a model takes."""

from __future__ import annotations

import atexit
import hashlib
import inspect
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.errors import Problem, UsageError, missing_extra
from limbeck.types import TextPreprocessing

__all__ = [
    "TOKENIZER_FILES",
    "copy_tokenizer",
    "max_positions",
    "read_tokenizer",
    "store_tokenizer",
    "text_preprocessing",
    "tokenizer_hash",
]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "chat_template.jinja",
)
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


def read_tokenizer(source: str, folder: Path | None, where: str) -> tuple[Any, Path]:
    """The fast tokenizer of a folder or hub id, and a folder that holds it as ``tokenizer.json``.

    Raises ``UsageError`` where there is no tokenizer, or only a slow one.
    """
    try:
        from transformers import AutoTokenizer
        from transformers.utils import cached_file
    except ImportError as e:
        raise missing_extra("transformers", "text", "A text model") from e
    if folder is not None and not any((folder / name).is_file() for name in _VOCABULARIES):
        hint = "Save it there with tokenizer.save_pretrained(FOLDER), or name another with options: {tokenizer: FOLDER_OR_HUB_ID}."
        raise UsageError(Problem(where, f"the folder {folder} holds no tokenizer (no {', no '.join(_VOCABULARIES[:3])}).", hint))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as e:  # it raises almost anything for files that it cannot read
        said = " ".join(str(e).split())[:300]
        raise UsageError(Problem(where, f"the tokenizer of {source} could not be loaded: {said}")) from e
    if not getattr(tokenizer, "is_fast", False):
        message = f"{source} has only a slow tokenizer ({type(tokenizer).__name__}); a fast one (tokenizer.json) is needed."
        raise UsageError(Problem(where, message, "Convert it once with the library `tokenizers` and save tokenizer.json beside it."))
    if folder is None:
        cached = cached_file(
            source,
            "tokenizer.json",
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        folder = Path(cached).parent if cached else None
    if folder is None or not (folder / "tokenizer.json").is_file():
        return tokenizer, store_tokenizer(tokenizer, where)
    return tokenizer, folder


def store_tokenizer(tokenizer: Any, where: str) -> Path:
    """A folder for this process with the files of a tokenizer object (transformers' or tokenizers')."""
    if not hasattr(tokenizer, "save_pretrained") and hasattr(tokenizer, "to_str"):
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(Problem(where, f"a fast tokenizer of transformers is needed; got {type(tokenizer).__name__}."))
    folder = Path(tempfile.mkdtemp(prefix="limbeck-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 over the names and bytes of the tokenizer's files."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            digest.update(f"{name}\x1f{len(data)}\x1e".encode())
            digest.update(data)
    return digest.hexdigest()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files as they are, so that their hash stays."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def max_positions(module: nn.Module) -> int | None:
    """How many tokens a model takes at most, or None where nothing says so.

    Position embeddings with a padding index start counting behind it, as RoBERTa's do: 514 rows are 512 tokens.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "embed_positions", "wpe"):
            return layer.num_embeddings if layer.padding_idx is None else layer.num_embeddings - layer.padding_idx - 1
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def text_preprocessing(
    module: nn.Module, tokenizer: Any, folder: Path, *, asked: int | None, wanted: int, where: str
) -> tuple[TextPreprocessing, list[str]]:
    """How ``module`` wants text. asked: ``options.max_length``; wanted: ``data.max_length``, cut to what the model reads (with a note)."""
    notes: list[str] = []
    limits = [n for n in (max_positions(module), getattr(tokenizer, "model_max_length", None)) if isinstance(n, int) and 0 < n < 1_000_000]
    limit = min(limits, default=None)
    if asked is not None and (type(asked) is not int or asked < 2):
        raise UsageError(Problem(f"{where}.options.max_length", f"a whole number of tokens is wanted, at least 2; got {asked!r}."))
    if asked is not None and limit is not None and asked > limit:
        raise UsageError(Problem(f"{where}.options.max_length", f"{asked} tokens are more than the {limit} that this model reads."))
    length = asked if asked is not None else wanted
    if limit is not None and length > limit:
        notes.append(f"Texts are cut at {limit} tokens, the most this model reads (data.max_length is {length}).")
        length = limit
    vocabulary = getattr(getattr(module, "config", None), "vocab_size", None)
    if isinstance(vocabulary, int) and len(tokenizer) > vocabulary:
        raise UsageError(
            Problem(where, f"the tokenizer has {len(tokenizer)} tokens and the model {vocabulary}; they do not belong together.")
        )
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
        notes.append("The tokenizer has no padding token; its end-of-text token is used.")
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "num_labels") and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad  # decoder classifiers find the last token of a text by it
    names = tuple(tokenizer.model_input_names)
    parameters = inspect.signature(module.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or _is_pretrained(module):
        names = tuple(name for name in names if name in parameters)
    if "input_ids" not in names:
        taken = ", ".join(parameters) or "nothing"
        raise UsageError(
            Problem(where, f"{type(module).__name__}.forward does not take input_ids (it takes {taken}), so it is no text model.")
        )
    return TextPreprocessing(str(folder), length, names, tokenizer_hash(folder), int(pad)), notes


def _is_pretrained(module: nn.Module) -> bool:
    return any(c.__module__.startswith("transformers.") for c in type(module).__mro__)
