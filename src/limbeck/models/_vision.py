"""torchvision and timm: modules by name, and how they want images."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from limbeck.errors import LimbeckError, Problem, UsageError, missing_extra, nearest
from limbeck.types import ImagePreprocessing

__all__ = ["Made", "create_timm", "create_torchvision", "timm_names", "torchvision_names"]

Size = tuple[int, int]


@dataclass
class Made:
    """A module with what its library publishes about it; ``arguments`` rebuild it (without weights, without a network)."""

    module: nn.Module
    arguments: dict[str, Any]
    published: ImagePreprocessing | None = None  # of the weights that were loaded
    classes: tuple[str, ...] | None = None
    class_ids: tuple[str, ...] | None = None
    default_size: Size = (224, 224)
    built_size: Size | None = None  # the only size that the module reads, where that is not the one asked for
    notes: list[str] = field(default_factory=list)
    name: str = ""  # what the library calls it offline, where that is not what was given


def torchvision() -> Any:
    """The package, or the sentence about its absence."""
    try:
        return importlib.import_module("torchvision")
    except ImportError as e:
        raise missing_extra("torchvision", "vision", "A torchvision: model") from e


def timm() -> Any:
    """The package, or the sentence about its absence."""
    try:
        return importlib.import_module("timm")
    except ImportError as e:
        raise missing_extra("timm", "vision", "A timm: model") from e


@functools.cache
def torchvision_names() -> tuple[str, ...]:
    """The classifiers that torchvision has."""
    vision = torchvision()
    return tuple(vision.models.list_models(module=vision.models))


@functools.cache
def timm_names() -> tuple[str, ...]:
    """The models that timm has, without and with the tags of their weights."""
    library = timm()
    return tuple(dict.fromkeys([*library.list_models(), *library.list_pretrained()]))


def create_torchvision(
    name: str, *, num_classes: int | None, pretrained: bool, size: Size | None, options: dict[str, Any], where: str
) -> Made:
    """A torchvision classifier. num_classes None: as published (1,000). size: (H, W) for models that are built for one size."""
    vision = torchvision()
    if name not in torchvision_names():
        raise UsageError(Problem(where, f"torchvision has no classifier '{name}'.", nearest(name, torchvision_names())))
    arguments = dict(options)
    if name in ("googlenet", "inception_v3"):
        arguments.setdefault("aux_logits", False)  # the auxiliary heads would take no part in any loss here
        if not pretrained:
            arguments.setdefault("init_weights", True)
    if size is not None and not pretrained:
        if name.startswith("vit_") and "image_size" not in arguments:
            patch = int(arguments.get("patch_size", name.rpartition("_")[2]))
            arguments["image_size"] = -(-max(size) // patch) * patch
        if name.startswith("maxvit") and "input_size" not in arguments:
            arguments["input_size"] = list(size)
    weights = vision.models.get_model_weights(name).DEFAULT if pretrained else None
    given = dict(arguments) if num_classes is None else {**arguments, "num_classes": num_classes}
    with _building("torchvision", name, where, options, pretrained):
        module = vision.models.get_model(name, weights=weights, **given)
    default = 299 if name == "inception_v3" else 224
    made = Made(module, arguments, default_size=(default, default))
    if "image_size" in arguments:
        made.built_size = (arguments["image_size"], arguments["image_size"])
    if weights is not None:
        if name in ("googlenet", "inception_v3"):
            arguments["transform_input"] = bool(module.transform_input)
            arguments["init_weights"] = False
        made.published = _torchvision_preprocessing(weights.transforms())
        categories = tuple(weights.meta.get("categories", ()))
        if len(categories) == 1000:
            made.classes, made.class_ids = categories, _wordnet_ids()
    return made


def _torchvision_preprocessing(transform: Any) -> ImagePreprocessing:
    crop, resize = int(transform.crop_size[0]), int(transform.resize_size[0])
    mode = _interpolation(str(getattr(transform.interpolation, "value", "bilinear")))
    return ImagePreprocessing(3, tuple(transform.mean), tuple(transform.std), crop, crop, resize, mode)


def create_timm(
    name: str, *, num_classes: int | None, pretrained: bool, channels: int, size: Size | None, options: dict[str, Any], where: str
) -> Made:
    """A timm model. num_classes None: as published. size: (H, W) for models that are built for one size."""
    library = timm()
    hosted = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not hosted and name not in timm_names() and name.partition(".")[0] not in timm_names():
        raise UsageError(Problem(where, f"timm has no model '{name}'.", nearest(name, timm_names())))
    if not hosted and "." in name and name not in timm_names():
        tags = [n for n in timm_names() if n.startswith(name.partition(".")[0] + ".")]
        raise UsageError(Problem(where, f"timm has no weights '{name}'.", nearest(name, tags)))
    if pretrained and not hosted and not library.models.is_model_pretrained(name):
        hint = "Give your own with weights: FILE.safetensors, or weights: scratch."
        raise UsageError(Problem(f"{where}.weights", f"timm publishes no weights for '{name}'.", hint))
    arguments = dict(options)
    if channels != 3:
        arguments.setdefault("in_chans", channels)
    if not hosted and size is not None and "img_size" not in arguments:
        published = library.get_pretrained_cfg(name)
        if published is not None and published.fixed_input_size and tuple(published.input_size[1:]) != size:
            arguments["img_size"] = list(size)
    given = dict(arguments) if num_classes is None else {**arguments, "num_classes": num_classes}
    if "img_size" in given and isinstance(given["img_size"], list):
        given["img_size"] = tuple(given["img_size"])
    with _building("timm", name, where, options, pretrained):
        module = library.create_model(name, pretrained=pretrained, **given)
    settings = library.data.resolve_model_data_config(module)
    if hosted:
        _, _, extra = library.models.load_model_config_from_hf(name.partition(":")[2]) if name.startswith("hf") else (None, None, {})
        arguments = {**(extra or {}), **arguments}
    height, width = settings["input_size"][1:]
    made = Made(module, arguments, default_size=(height, width))
    if hosted:
        made.name = str(module.pretrained_cfg["architecture"])
    if pretrained:
        shorter = int(min(height, width) / settings["crop_pct"]) if settings.get("crop_mode", "center") == "center" else None
        mean, std = tuple(settings["mean"]), tuple(settings["std"])
        made.published = ImagePreprocessing(len(mean), mean, std, height, width, shorter, _interpolation(settings["interpolation"]))
        made.classes, made.class_ids = _timm_classes(module)
    return made


def _timm_classes(module: nn.Module) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    published = getattr(module, "pretrained_cfg", None) or {}
    names = published.get("label_names")
    if names:
        return tuple(names), None
    if published.get("num_classes") == 1000 and getattr(module, "num_classes", None) == 1000:
        return _imagenet_names(), _wordnet_ids()
    return None, None


@functools.cache
def _imagenet_names() -> tuple[str, ...] | None:
    try:
        from torchvision.models._meta import _IMAGENET_CATEGORIES

        return tuple(_IMAGENET_CATEGORIES)
    except ImportError:
        return None


@functools.cache
def _wordnet_ids() -> tuple[str, ...] | None:
    try:
        from timm.data import ImageNetInfo

        return tuple(ImageNetInfo().label_names())
    except ImportError:
        return None


def _interpolation(name: str) -> Literal["bilinear", "bicubic", "nearest"]:
    return "bilinear" if name == "bilinear" else "nearest" if name.startswith("nearest") else "bicubic"


class _building:
    """Turn what a library raises while it builds or downloads a named model into a sentence."""

    def __init__(self, library: str, name: str, where: str, options: dict[str, Any], pretrained: bool) -> None:
        self.library, self.name, self.where, self.options, self.pretrained = library, name, where, options, pretrained

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, LimbeckError):
            return
        said = " ".join(str(error).split())[:300]
        if self.options and isinstance(error, TypeError | ValueError | AssertionError | KeyError | AttributeError):
            shown = ", ".join(f"{k}: {v!r}" for k, v in self.options.items())
            hint = nearest(_named(said), self.allowed())
            raise UsageError(
                Problem(f"{self.where}.options", f"{self.library} does not build '{self.name}' with {{{shown}}}: {said}", hint)
            ) from error
        if self.pretrained:
            hint = "Fetch them once on a machine with a network, or give weights: FILE.safetensors."
            raise UsageError(
                Problem(
                    f"{self.where}.weights",
                    f"the weights that {self.library} publishes for '{self.name}' could not be loaded: {said}.",
                    hint,
                )
            ) from error

    def allowed(self) -> Iterable[str]:
        return (
            "dropout",
            "drop_rate",
            "drop_path_rate",
            "global_pool",
            "patch_size",
            "depth",
            "embed_dim",
            "num_heads",
            "width_mult",
            "norm_layer",
            "image_size",
            "img_size",
        )


def _named(said: str) -> str:
    """The argument that a TypeError complains about."""
    return said.split("'")[1] if said.count("'") >= 2 else said
