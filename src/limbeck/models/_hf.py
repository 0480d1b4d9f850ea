"""Hugging Face classifiers from a folder or the hub: safetensors only, no remote code."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from limbeck.errors import LimbeckError, Problem, UsageError, listed, missing_extra, nearest
from limbeck.models._heads import find_head
from limbeck.models._names import SHORT_NAMES, Name
from limbeck.randomness import forked
from limbeck.types import ImagePreprocessing

__all__ = ["Pretrained", "create_hf", "image_preprocessing", "quiet_transformers"]


@dataclass
class Pretrained:
    """A Hugging Face model as its weights are; ``trained_head`` is False where the head's weights are fresh."""

    module: Any
    source: str
    trained_head: bool
    classes: tuple[str, ...]
    notes: list[str] = field(default_factory=list)


def create_hf(name: Name, *, data_kind: str, scratch: bool, options: dict[str, Any], where: str, seed: int, role: str) -> Pretrained:
    """Load (or, ``scratch``, build from its configuration) a sequence or image classifier in float32.

    What the named weights lack (a head, a pooler) is drawn from ``(seed, "head")``; a model from scratch from ``(seed, role)``.
    """
    try:
        import transformers
    except ImportError as e:
        raise missing_extra("transformers", "text", "A Hugging Face model") from e
    source = name.target
    if name.path is not None:
        _check_folder(name.path, scratch, where)
    with quiet_transformers(), _sentences(name, where):
        config = _config(name, where)
    text = data_kind == "text"
    auto = transformers.AutoModelForSequenceClassification if text else transformers.AutoModelForImageClassification
    if type(config) not in auto._model_mapping:
        what = "a text" if text else "an image"
        raise UsageError(
            Problem(where, f"'{name.given}' is of the type '{config.model_type}', which has no form that is {what} classifier.")
        )
    _override(config, options, where)
    _check_sizes(config, where)
    classes = tuple(str(config.id2label[i]) for i in sorted(config.id2label)) if config.id2label else ()
    common: dict[str, Any] = {"config": config, "trust_remote_code": False, "dtype": torch.float32}
    if scratch:
        del common["config"]
        with quiet_transformers(), forked(seed, role):
            return Pretrained(auto.from_config(config, **common).eval(), source, False, classes)
    with quiet_transformers(), _sentences(name, where), forked(seed, "head"):
        module, info = auto.from_pretrained(
            source, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, local_files_only=_cached(name), **common
        )
    made = Pretrained(module, source, True, classes)
    _judge(made, info, name, where)
    return made


_MOST_LAYERS = 10_000
_MOST_ROWS = 100_000_000


def _check_sizes(config: Any, where: str) -> None:
    """Refuse numbers of layers and rows that no published model has: building them would not end, or take all memory."""
    problems = []
    for key, value in config.to_dict().items():
        most = _MOST_LAYERS if "layers" in key else _MOST_ROWS if key.endswith(("size", "embeddings", "labels", "dim")) else None
        if most is not None and isinstance(value, int) and value > most:
            problems.append(Problem(where, f"its configuration has {key}: {value:,}, and at most {most:,} are built."))
    if problems:
        raise UsageError(problems)


def _judge(made: Pretrained, info: dict[str, Any], name: Name, where: str) -> None:
    """Which weights were fresh: the head only, a few of the body (noted), or too many to call it the named model."""
    changed = {entry[0] if isinstance(entry, tuple) else str(entry) for entry in info.get("mismatched_keys", ())}
    fresh = changed | {str(key) for key in info.get("missing_keys", ())}
    head = find_head(made.module)
    made.trained_head = head is not None and f"{head}.weight" not in fresh
    prefix = f"{made.module.base_model_prefix}."
    body = [key for key in made.module.state_dict() if key.startswith(prefix)]
    fresh_body = sorted(key for key in fresh if key.startswith(prefix) and ".pooler." not in key)
    if body and 2 * len(fresh_body) > len(body):
        raise UsageError(
            Problem(
                where,
                f"the weights of '{name.given}' are not those of a {made.module.config.model_type} model: "
                f"{len(fresh_body)} of {len(body)} tensors are missing.",
            )
        )
    resized = sorted(key for key in changed if key.startswith(prefix))
    if resized:
        raise UsageError(
            Problem(
                f"{where}.options", f"these weights of '{name.given}' have another shape than the options ask for: {listed(resized, 4)}."
            )
        )
    if fresh_body:
        made.notes.append(f"{len(fresh_body)} tensors are not in the weights of '{name.given}' and start fresh: {listed(fresh_body, 4)}.")


def _check_folder(folder: Path, scratch: bool, where: str) -> None:
    if not (folder / "config.json").is_file():
        raise UsageError(Problem(where, f"the folder {folder} has no config.json, so it is no Hugging Face model."))
    if scratch or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(p.name for p in folder.glob("*.bin") if p.name != "training_args.bin") or sorted(p.name for p in folder.glob("*.pt*"))
    if pickled:
        command = f"limbeck convert {folder / pickled[0]} {folder / 'model.safetensors'}"
        raise UsageError(
            Problem(where, f"the folder {folder} has its weights only as {pickled[0]}, which may run code when it is read.", command)
        )
    raise UsageError(
        Problem(
            where,
            f"the folder {folder} has no weights (no .safetensors file).",
            "weights: scratch builds it untrained from its config.json.",
        )
    )


def _config(name: Name, where: str) -> Any:
    from transformers import AutoConfig

    if name.path is None and not _cached(name):
        _check_network(name, where)
    return AutoConfig.from_pretrained(name.target, trust_remote_code=False, local_files_only=_cached(name))


def _cached(name: Name) -> bool:
    """Whether the configuration and weights can be read without a network."""
    if name.path is not None:
        return True
    from huggingface_hub import try_to_load_from_cache

    weights = ("model.safetensors", "model.safetensors.index.json")
    try:
        found = isinstance(try_to_load_from_cache(name.target, "config.json"), str)
        return found and any(isinstance(try_to_load_from_cache(name.target, w), str) for w in weights)
    except ValueError:  # not a possible hub id; said so when it is asked for
        return False


def _check_network(name: Name, where: str) -> None:
    """The hub client waits half a minute before it gives up on a machine without a network."""
    from huggingface_hub import constants

    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    if not constants.HF_HUB_OFFLINE:
        host = constants.ENDPOINT.partition("://")[2].partition("/")[0]
        address, _, port = host.partition(":")
        try:
            socket.create_connection((address, int(port or (80 if constants.ENDPOINT.startswith("http:") else 443))), timeout=10).close()
            return
        except OSError:
            pass
    raise UsageError(
        Problem(
            where,
            f"'{name.given}' is no folder here, and the Hugging Face hub ({constants.ENDPOINT}) cannot be reached to look for it.",
            _near(name),
        )
    )


def _near(name: Name) -> str:
    from limbeck.models._vision import timm_names, torchvision_names

    hint = "" if name.given in SHORT_NAMES else nearest(name.given, SHORT_NAMES)
    if hint or "/" in name.given or name.given.startswith("hf:"):
        return hint or "Download it on a machine with a network and name the folder."
    for library, names in (("torchvision", torchvision_names), ("timm", timm_names)):
        try:
            if name.given in names():
                return f"Did you mean '{library}:{name.given}'?"
        except UsageError:
            continue
    return "Download it on a machine with a network and name the folder; `limbeck models` lists the names."


def _override(config: Any, options: dict[str, Any], where: str) -> None:
    known = [*config.to_dict(), *getattr(config, "attribute_map", {})]
    # what the object is made of, and what it does, are no settings
    unknown = [k for k in options if k.startswith("_") or (k not in known and (not hasattr(config, k) or callable(getattr(config, k))))]
    if unknown:
        raise UsageError(
            [
                Problem(f"{where}.options.{key}", f"'{key}' is no setting of a {config.model_type} model.", nearest(key, known))
                for key in unknown
            ]
        )
    for key, value in options.items():
        setattr(config, key, value)


@contextmanager
def _sentences(name: Name, where: str) -> Iterator[None]:
    """What transformers and the hub client raise for names, networks and files, as one sentence."""
    try:
        yield
    except LimbeckError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RecursionError, json.JSONDecodeError) as e:
        said = " ".join(str(e).split())[:300]
        raise UsageError(
            Problem(where, f"the Hugging Face model '{name.given}' could not be loaded: {said}", _near(name) if name.path is None else "")
        ) from e
    except Exception as e:
        if type(e).__module__.split(".")[0] in ("huggingface_hub", "httpx", "requests", "safetensors", "safetensors_rust"):
            said = " ".join(str(e).split())[:300]
            raise UsageError(
                Problem(
                    where, f"the Hugging Face model '{name.given}' could not be loaded: {said}", _near(name) if name.path is None else ""
                )
            ) from e
        raise


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Limbeck says itself what is fresh and what is not; the library's progress bars and load reports stay out of the way."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def image_preprocessing(name: Name, module: Any) -> ImagePreprocessing | None:
    """What ``preprocessor_config.json`` says, or None where there is none."""
    if name.path is not None:
        file = name.path / "preprocessor_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    else:
        from transformers.utils import cached_file

        found = cached_file(
            name.target,
            "preprocessor_config.json",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        settings = json.loads(Path(found).read_text(encoding="utf-8")) if found else None
    return None if settings is None else _from_settings(settings, int(getattr(module.config, "num_channels", 3)))


def _from_settings(settings: dict[str, Any], channels: int) -> ImagePreprocessing:
    height, width, shorter = _geometry(settings)
    factor = float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0
    normalises = settings.get("do_normalize", True)
    mean = settings.get("image_mean") or [0.5] * channels if normalises else [0.0] * channels
    std = settings.get("image_std") or [0.5] * channels if normalises else [1.0] * channels
    scale = 255.0 * factor  # (x * factor - mean) / std, written for x / 255
    modes: dict[int, Literal["bilinear", "bicubic", "nearest"]] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
    mode = modes.get(settings.get("resample", 2), "bicubic")
    same = abs(scale - 1) < 1e-6
    return ImagePreprocessing(
        channels,
        tuple(float(m) if same else float(m) / scale for m in mean),
        tuple(float(s) if same else float(s) / scale for s in std),
        height,
        width,
        shorter,
        mode,
    )


def _geometry(settings: dict[str, Any]) -> tuple[int, int, int | None]:
    """(height, width, shorter side before the centre crop)."""
    size = settings.get("size", 224)
    size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
    crop = settings.get("crop_size", 224)
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else dict(crop)
    if settings.get("do_center_crop"):
        return (
            int(crop["height"]),
            int(crop["width"]),
            int(size.get("shortest_edge") or min(size.get("height", 256), size.get("width", 256))),
        )
    if "shortest_edge" in size:  # ConvNeXt's processor crops to this size after resizing to size / crop_pct
        edge = int(size["shortest_edge"])
        return edge, edge, int(edge / settings["crop_pct"]) if settings.get("crop_pct") and edge < 384 else edge
    return int(size.get("height", 224)), int(size.get("width", 224)), None
