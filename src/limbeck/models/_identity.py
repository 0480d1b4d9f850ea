"""Who a model is: what it computes with, hashed; and what can be told of a named one without loading it."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from limbeck.models._names import parse_name
from limbeck.models._saved import read_about
from limbeck.run import file_sha256
from limbeck.types import ImagePreprocessing, Preprocessing

if TYPE_CHECKING:
    from limbeck.data import Data
    from limbeck.recipe import ModelSpec

__all__ = ["architecture_sha256", "normalised_by_data", "preprocessing_identity", "sources"]

_LIBRARIES = {"torch", "torchvision", "timm", "transformers", "builtins"}
_CONFIG_ASIDE = {"_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "id2label", "label2id", "architectures"}
_READ = {".json", ".safetensors", ".txt", ".model"}


def architecture_sha256(module: nn.Module) -> str:
    """What a module does with its weights: the class of every part, its plain settings (numbers, words), the source of classes that are no
    library's, and a Hugging Face configuration without names. Weights are not in it."""
    digest = hashlib.sha256()
    seen: set[type] = set()
    for name, part in module.named_modules():
        kind = type(part)
        digest.update(f"{name}\x1f{kind.__module__}.{kind.__qualname__}\x1f{json.dumps(_settings(part), sort_keys=True)}\x1e".encode())
        if kind not in seen and kind.__module__.partition(".")[0] not in _LIBRARIES:
            digest.update(_source(kind).encode())
        seen.add(kind)
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        plain = {k: v for k, v in config.to_dict().items() if k not in _CONFIG_ASIDE}
        digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _settings(part: nn.Module) -> dict[str, Any]:
    plain = (int, float, str, bool, type(None))
    found: dict[str, Any] = {}
    for name, value in vars(part).items():
        if name.startswith("_") or name == "training" or isinstance(value, Tensor):
            continue
        if isinstance(value, plain):
            found[name] = value
        elif isinstance(value, tuple | list) and all(isinstance(v, plain) for v in value):
            found[name] = list(value)
    return found


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed in, or made at run time
        return ""


def preprocessing_identity(preprocessing: Preprocessing) -> dict[str, Any]:
    """Everything about a preparation that changes what a model sees; a tokenizer by the hash of its files, wherever they lie."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(preprocessing).items() if k != "tokenizer"}


def normalised_by_data(preprocessing: Preprocessing, data: Data) -> bool:
    """Whether its mean and deviation are the training data's, for want of published ones: they then move a little with every sample."""
    if not isinstance(preprocessing, ImagePreprocessing):
        return False
    count = len(preprocessing.mean)
    mean, std = (tuple(map(float, v)) * (count if len(v) == 1 else 1) for v in (data.mean, data.std))
    return preprocessing.mean == mean and preprocessing.std == tuple(s if s > 0 else 1.0 for s in std)


def sources(spec: ModelSpec, *, data: Data, base: Path, max_length: int) -> tuple[dict[str, Any], tuple[str, ...] | None, list[str]] | None:
    """What a named teacher is made from, without loading it: (facts, its classes, notes); None where it has to be loaded to be known.

    facts: hashes of all files, options, and what of the data decides how it is prepared. A run's own record of its weights is believed where
    the weights are gone, and a note says so; where they are there they must match it. Raises UsageError.
    """
    name = parse_name(spec.model, base, "teacher.model")
    asks: dict[str, Any] = {"kind": data.kind, "image_size": data.image_size, "channels": data.channels, "shape": list(data.shape)}
    if data.kind == "text":
        asks = {"kind": "text", "max_length": max_length}
    elif data.kind == "image" and name.kind != "run":
        asks |= {"mean": list(data.mean), "std": list(data.std)}
    if asks.get("image_size") is not None:
        asks["image_size"] = list(asks["image_size"])
    facts: dict[str, Any] = {"kind": name.kind, "options": dict(spec.options), "asks": asks}
    try:
        json.dumps(facts)
    except TypeError:
        return None
    if name.kind == "run" and name.path is not None and spec.weights is None:
        about, folder = read_about(name.path, "teacher.model", weights_may_be_gone=True)
        facts["record"] = {k: about[k] for k in ("kind", "num_classes", "dtype", "weights_sha256")}
        facts["record"]["build"] = {k: v for k, v in about["build"].items() if k not in ("imports_from", "module")}
        kept = {**about["preprocessing"]}
        kept.pop("tokenizer", None)
        facts["record"]["preprocessing"] = kept
        facts["files"] = {f: h for f, h in about["files"].items() if f != "model.safetensors"}
        notes = []
        if not (folder / "model.safetensors").is_file():
            notes.append(
                f"The teacher's weights in {folder} are gone; its record of them ({about['weights_sha256'][:12]}) says who it was."
            )
        return facts, tuple(about["classes"]) or None, notes
    if name.kind == "hf" and name.path is not None and spec.weights is None:
        files = [p for p in sorted(name.path.iterdir()) if p.is_file() and p.suffix in _READ]
        if "tokenizer" in spec.options:
            return None
        facts["files"] = {p.name: file_sha256(p) for p in files}
        return facts, None, []
    weights = None if spec.weights in (None, "pretrained", "scratch") else base / str(spec.weights)
    if name.kind in ("torchvision", "timm") and weights is not None and weights.is_file():
        facts |= {"name": name.target, "files": {"weights": file_sha256(weights)}}
        return facts, None, []
    return None
