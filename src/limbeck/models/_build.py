"""From a model's specification to a :class:`Model` that fits the data."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from limbeck._recipe_paths import home_path
from limbeck.errors import Problem, UsageError
from limbeck.models import _files, _hf, _images, _python, _tokens, _vision
from limbeck.models._heads import resize_head
from limbeck.models._labels import FINE_TUNE, class_map, fits
from limbeck.models._layers import Cut, cut_pretrained, cut_stack
from limbeck.models._model import Kind, Model, state_hash
from limbeck.models._names import Name, parse_name
from limbeck.models._saved import load_saved
from limbeck.randomness import forked
from limbeck.types import ImagePreprocessing, Preprocessing, TensorPreprocessing, TextPreprocessing

if TYPE_CHECKING:
    from limbeck.data import Data
    from limbeck.recipe import ModelSpec

__all__ = ["build_model", "wrap_module"]

Role = Literal["student", "teacher"]
_OWN = ("layers", "layers_of", "resolution", "max_length", "tokenizer")


@dataclass(frozen=True)
class _Wish:
    """What was asked for, taken apart: ``weights`` is a file, ``"named"`` or ``"scratch"``; ``options`` are the library's."""

    name: Name
    role: Role
    data: Data
    seed: int
    base: Path
    weights: Path | Literal["named", "scratch"]
    options: dict[str, Any]
    max_length: int
    own: dict[str, Any] = field(default_factory=dict)

    @property
    def model_key(self) -> str:
        return f"{self.role}.model"

    @property
    def resolution(self) -> tuple[int, int] | None:
        return _images.read_resolution(self.own.get("resolution"), self.role)

    @property
    def classes(self) -> int:
        return len(self.data.classes)


@dataclass
class _Built:
    """A model and the state of its head: ``trained`` (its weights come from somewhere), ``fitting`` (made for this data's classes)."""

    model: Model
    trained: bool
    fitting: bool = False


def build_model(spec: ModelSpec, *, role: Role, data: Data, seed: int, base: Path, new_head: bool = False, max_length: int = 128) -> Model:
    """Build the model that ``spec`` names, so that it reads ``data`` and answers in its classes.

    base: the folder that relative paths start from. new_head: also a teacher gets a new head where its own does not fit, because it will be
    fine-tuned. max_length: ``data.max_length``, in tokens. The module is on the CPU, in eval mode, in the dtype of its weights (float32 for
    what Limbeck loads).

    Raises ``UsageError`` for everything that does not exist, cannot be read, or does not fit.
    """
    wish = _wish(spec, role, data, seed, base, max_length)
    match wish.name.kind:
        case "torchvision" | "timm":
            built = _from_vision(wish)
        case "hf":
            built = _from_hf(wish)
        case "python":
            built = _from_python(wish)
        case "run":
            built = _from_run(wish)
    model = built.model
    model.spec = {"model": spec.model, "weights": spec.weights, "options": dict(spec.options)}
    model.module.eval()
    _fit_head(built, wish, new_head)
    if role == "student" or new_head:
        _check_trainable(model, role)
    model.weights_sha256 = state_hash(model.module)
    return model


def _wish(spec: ModelSpec, role: Role, data: Data, seed: int, base: Path, max_length: int) -> _Wish:
    name = parse_name(spec.model, base, f"{role}.model")
    own = {key: value for key, value in spec.options.items() if key in _OWN and value is not None}
    options = {key: value for key, value in spec.options.items() if key not in _OWN}
    unused = {"text": ("resolution",), "image": ("max_length", "tokenizer"), "tensor": ("resolution", "max_length", "tokenizer")}[data.kind]
    problems = [Problem(f"{role}.options.{key}", f"it does nothing for {data.kind} data.") for key in unused if key in own]
    if "layers_of" in own and "layers" not in own:
        problems.append(Problem(f"{role}.options.layers_of", "it does nothing without options.layers."))
    try:
        json.dumps(options)
    except (TypeError, ValueError):
        problems.append(
            Problem(f"{role}.options", "only numbers, text, lists and true or false can be options.", "Use a python: callable for more.")
        )
    if name.kind == "run" and options:
        problems += [Problem(f"{role}.options.{key}", "a run's student is built as it was saved.") for key in options]
    if name.kind in ("run", "python") and spec.weights in ("pretrained", "scratch"):
        what = "a run brings its own weights." if name.kind == "run" else "the callable decides about its weights itself."
        problems.append(Problem(f"{role}.weights", f"'{spec.weights}' says nothing here: {what}"))
    if name.kind == "run" and spec.weights not in (None, "pretrained", "scratch"):
        problems.append(Problem(f"{role}.weights", "a run brings its own weights."))
    if problems:
        raise UsageError(problems)
    weights: Path | Literal["named", "scratch"]
    if spec.weights in (None, "pretrained"):
        untrained = spec.weights is None and role == "student" and name.kind in ("torchvision", "timm")
        weights = "scratch" if untrained else "named"
    elif spec.weights == "scratch":
        weights = "scratch"
    else:
        weights = _files.find_weights(str(spec.weights), base, role)
    return _Wish(name, role, data, seed, base, weights, options, max_length, own)


def _fit_head(built: _Built, wish: _Wish, new_head: bool) -> None:
    """Give a student (or a teacher that will be fine-tuned) a head for the data's classes; refuse any other teacher that does not fit."""
    model, data = built.model, wish.data
    model.num_classes = _images.try_model(model, wish.model_key)
    if wish.role == "student" or new_head:
        if not (built.fitting and model.num_classes == wish.classes) and not (built.trained and fits(model, data)):
            resize_head(model.module, wish.classes, wish.seed)
            model.num_classes = _images.try_model(model, wish.model_key)
            if built.trained:
                model.notes.append(f"The {wish.role} has a new head for the {wish.classes} classes of the data.")
        if model.num_classes != wish.classes:
            raise UsageError(
                Problem(
                    wish.model_key,
                    f"it answers with {model.num_classes} outputs and the data has {wish.classes} classes.",
                    "Let the callable take num_classes.",
                )
            )
        model.classes, model.class_ids = tuple(data.classes), None
        return
    if not built.trained:
        raise UsageError(Problem(wish.model_key, f"'{wish.name.given}' has no trained classification head.", FINE_TUNE))
    class_map(model, data)


def _check_trainable(model: Model, role: Role) -> None:
    """Refuse what cannot be trained, and say what of it will not be saved. Layers without a shape yet (lazy ones) are made by now."""
    parameters = list(model.module.parameters())
    if not any(p.requires_grad for p in parameters):
        what = f"all of its {len(parameters)} parameters are frozen (requires_grad is False)" if parameters else "it has no parameters"
        raise UsageError(
            Problem(role, f"{what}, so there is nothing to train.", "Unfreeze some: module.requires_grad_()." if parameters else "")
        )
    if not all(isinstance(value, Tensor) for value in model.module.state_dict().values()):
        model.notes.append(f"The {role} keeps state that is no tensor (get_extra_state); it is no part of the saved weights.")


def _cut(module: nn.Module, wish: _Wish, cuts: list[Cut]) -> None:
    if "layers" in wish.own:
        cuts.append(cut_stack(module, wish.own["layers"], wish.own.get("layers_of"), wish.role))


def _from_vision(wish: _Wish) -> _Built:
    data, resolution = wish.data, wish.resolution
    if data.kind == "text":
        raise UsageError(Problem(wish.model_key, f"'{wish.name.given}' reads images, and the data is text."))
    if data.kind == "tensor" and len(data.shape) != 3:
        raise UsageError(
            Problem(wish.model_key, f"'{wish.name.given}' reads images (channels, height, width), and a sample has the shape {data.shape}.")
        )
    own_size = (data.shape[1], data.shape[2]) if data.kind == "tensor" else data.image_size
    if wish.weights == "named" or resolution is not None or own_size is None:
        return _vision_at(wish, resolution)
    try:
        return _vision_at(wish, own_size)
    except Exception as e:
        if data.kind == "tensor" or (isinstance(e, UsageError) and not any(p.where == wish.model_key for p in e.problems)):
            raise
        try:
            built = _vision_at(wish, None)
        except Exception:
            raise e from None
    assert isinstance(built.model.preprocessing, ImagePreprocessing)
    height, width = built.model.preprocessing.height, built.model.preprocessing.width
    built.model.notes.append(
        f"'{wish.name.given}' does not work on images of {own_size[0]} x {own_size[1]} pixels; they are enlarged to {height} x {width}."
    )
    return built


def _vision_at(wish: _Wish, size: tuple[int, int] | None) -> _Built:
    """size: (H, W) that the model is built for, or None for what it was published with."""
    data, pretrained = wish.data, wish.weights == "named"
    tensor = data.kind == "tensor"
    given = data.shape[0] if tensor else data.channels
    count = None if pretrained else wish.classes
    library = wish.name.kind
    if library == "torchvision":
        channels = 3
        hint = "timm models take any number of channels: timm:" + ("resnet18" if wish.role == "student" else "resnet50")
        if tensor and given != 3:
            raise UsageError(Problem(wish.model_key, f"torchvision's models read 3 channels and a sample has {given}.", hint))
        if not tensor:
            _images.refuse_channels(data, 3, wish.model_key, hint)
        if pretrained and size is not None and wish.name.target.startswith("vit_"):
            raise UsageError(
                Problem(f"{wish.role}.options.resolution", "torchvision's pretrained ViT reads one size; timm's can be resized.")
            )
        with forked(wish.seed, wish.role):
            made = _vision.create_torchvision(
                wish.name.target, num_classes=count, pretrained=pretrained, size=size, options=wish.options, where=wish.role
            )
    else:
        channels = 3 if pretrained and given == 1 and not tensor else given
        with forked(wish.seed, wish.role):
            made = _vision.create_timm(
                wish.name.target,
                num_classes=count,
                pretrained=pretrained,
                channels=channels,
                size=size,
                options=wish.options,
                where=wish.role,
            )
    trained = pretrained
    if isinstance(wish.weights, Path):
        trained = _files.load_weights(made.module, wish.weights, wish.role)
    cuts: list[Cut] = []
    _cut(made.module, wish, cuts)
    preprocessing: Preprocessing
    if tensor:
        preprocessing = TensorPreprocessing(tuple(data.shape))
    elif made.published is not None and made.published.channels == channels:
        preprocessing = _images.adapt_published(made.published, data, size)
    else:
        preprocessing = _images.from_data(data, made.built_size or size or made.default_size, channels)
        if trained and not pretrained:
            made.notes.append("Nothing is published for these weights, so images are normalised by the training data's mean and deviation.")
    build = {"name": made.name or wish.name.target, "arguments": made.arguments, "cuts": cuts}
    kind: Kind = library  # type: ignore[assignment]
    model = Model(made.module, {}, kind, preprocessing, made.classes, 0, "", made.notes, build, made.class_ids)
    model.module.eval()
    _images.try_model(model, wish.model_key)
    patches = getattr(getattr(made.module, "patch_embed", None), "num_patches", getattr(made.module, "seq_length", None))
    if isinstance(patches, int) and patches < 16:
        made.notes.append(
            f"'{wish.name.given}' cuts these images into only {patches} patches; options: {{patch_size: ...}} makes them smaller."
        )
    return _Built(model, trained, fitting=wish.weights == "scratch")


def _from_hf(wish: _Wish) -> _Built:
    data = wish.data
    loaded = _hf.create_hf(
        wish.name,
        data_kind=data.kind,
        scratch=wish.weights != "named",
        options=wish.options,
        where=wish.role,
        seed=wish.seed,
        role=wish.role,
    )
    module, trained, classes = loaded.module, loaded.trained_head, loaded.classes or None
    if isinstance(wish.weights, Path):
        trained, classes = _files.load_weights(module, wish.weights, wish.role), None
    cuts: list[Cut] = []
    if "layers" in wish.own:
        with _hf.quiet_transformers():
            module, cut = cut_pretrained(module, wish.own["layers"], wish.own.get("layers_of"), wish.role, wish.seed, wish.role)
        cuts.append(cut)
    preprocessing: Preprocessing
    if data.kind == "text":
        source = str(wish.own.get("tokenizer") or loaded.source)
        preprocessing, notes = _text(module, source, wish)
        loaded.notes += notes
    elif data.kind == "tensor":
        preprocessing = TensorPreprocessing(tuple(data.shape))
    else:
        channels = int(getattr(module.config, "num_channels", 3))
        _images.refuse_channels(data, channels, wish.model_key)
        published = _hf.image_preprocessing(wish.name, module) if wish.weights == "named" else None
        size = getattr(module.config, "image_size", None)
        size = tuple(size) if isinstance(size, list | tuple) else (size, size) if isinstance(size, int) else data.image_size or (224, 224)
        if published is None:
            preprocessing = _images.from_data(data, wish.resolution or size, channels)
            if wish.weights == "named":
                loaded.notes.append(
                    "The model has no preprocessor_config.json, so images are normalised by the training data's mean and deviation."
                )
        else:
            preprocessing = _images.adapt_published(published, data, wish.resolution)
    model = Model(module, {}, "hf", preprocessing, classes, 0, "", loaded.notes, {"cuts": cuts})
    return _Built(model, trained)


def _text(module: nn.Module, source: str, wish: _Wish) -> tuple[TextPreprocessing, list[str]]:
    path = wish.base / home_path(source)
    folder = path.resolve() if os.path.isdir(path) else None
    key = f"{wish.role}.options.tokenizer" if "tokenizer" in wish.own else wish.model_key
    tokenizer, stored = _tokens.read_tokenizer(str(folder) if folder else source, folder, key)
    return _tokens.text_preprocessing(module, tokenizer, stored, asked=wish.own.get("max_length"), wanted=wish.max_length, where=wish.role)


def _from_python(wish: _Wish) -> _Built:
    factory, file = _python.find_callable(wish.name.target, wish.base, wish.model_key)
    module, arguments = _python.call_factory(
        factory, num_classes=wish.classes, options=wish.options, where=wish.role, seed=wish.seed, role=wish.role
    )
    notes: list[str] = []
    if isinstance(wish.weights, Path):
        _files.load_weights(module, wish.weights, wish.role)
    elif wish.role == "teacher":
        notes.append("A python: teacher is taken with the weights that its callable gave it; at chance it teaches nothing.")
    cuts: list[Cut] = []
    _cut(module, wish, cuts)
    preprocessing: Preprocessing
    if wish.data.kind == "text":
        source = wish.own.get("tokenizer") or _home(module)
        if source is None:
            hint = "options: {tokenizer: FOLDER_OR_HUB_ID}"
            raise UsageError(Problem(f"{wish.role}.options.tokenizer", "a model of your own on text needs to know its tokenizer.", hint))
        preprocessing, more = _text(module, str(source), wish)
        notes += more
    elif wish.data.kind == "tensor":
        preprocessing = TensorPreprocessing(tuple(wish.data.shape))
    else:
        preprocessing = _images.from_data(wish.data, wish.resolution or wish.data.image_size or (224, 224), wish.data.channels)
    place, _, attribute = wish.name.target.rpartition(":")
    source_bytes = file.read_bytes() if file is not None else b""
    build = {
        "callable": attribute,
        "module": None if _is_file(place) else place,
        "file": file.name if file is not None and _is_file(place) else None,
        "source_text": source_bytes.decode("utf-8") if _is_file(place) else None,  # as it was run, whatever happens to the file later
        "imports_from": str(file.parent) if file is not None and _is_file(place) else None,  # for the file's neighbours
        "source_sha256": hashlib.sha256(source_bytes).hexdigest() if file is not None else None,
        "arguments": arguments,
        "cuts": cuts,
    }
    return _Built(Model(module, {}, "python", preprocessing, None, 0, "", notes, build), trained=True)


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or "\\" in place


def _home(module: nn.Module) -> str | None:
    """The folder or hub id that a Hugging Face module came from."""
    home = getattr(module, "name_or_path", None)
    return home if isinstance(home, str) and home else None


def _from_run(wish: _Wish) -> _Built:
    assert wish.name.path is not None
    model = load_saved(wish.name.path, where=wish.model_key)
    data, kind = wish.data, model.preprocessing.kind
    if kind != data.kind:
        raise UsageError(
            Problem(wish.model_key, f"the student of {wish.name.path} was trained on {kind} data, and this data is {data.kind}.")
        )
    preprocessing = model.preprocessing
    if isinstance(preprocessing, ImagePreprocessing):
        _images.refuse_channels(data, preprocessing.channels, wish.model_key)
        model.preprocessing = _images.adapt_published(preprocessing, data, wish.resolution)
    elif isinstance(preprocessing, TensorPreprocessing):
        if tuple(preprocessing.shape) != tuple(data.shape):
            raise UsageError(
                Problem(wish.model_key, f"it reads samples of the shape {preprocessing.shape}, and the data's are {tuple(data.shape)}.")
            )
    elif "tokenizer" in wish.own:
        raise UsageError(Problem(f"{wish.role}.options.tokenizer", "a run's student has its own tokenizer."))
    elif "max_length" in wish.own:
        limit = _tokens.max_positions(model.module)
        asked = wish.own["max_length"]
        if type(asked) is not int or asked < 2 or (limit is not None and asked > limit):
            raise UsageError(
                Problem(f"{wish.role}.options.max_length", f"a number of tokens from 2 to {limit or 'any'} is wanted; got {asked!r}.")
            )
        model.preprocessing = replace(preprocessing, max_length=asked)
    if "layers" in wish.own:
        cuts = model.build.setdefault("cuts", [])
        if model.kind == "hf":
            with _hf.quiet_transformers():
                model.module, cut = cut_pretrained(
                    model.module, wish.own["layers"], wish.own.get("layers_of"), wish.role, wish.seed, wish.role
                )
            cuts.append(cut)
        else:
            _cut(model.module, wish, cuts)
    return _Built(model, trained=True)


def wrap_module(
    module: nn.Module,
    *,
    role: Role,
    data: Data,
    preprocessing: Preprocessing | None = None,
    tokenizer: Any = None,
    classes: tuple[str, ...] | list[str] | None = None,
    max_length: int = 128,
) -> Model:
    """A person's own module as a :class:`Model`; the object itself is used, not a copy, and its head is never replaced.

    tokenizer: a fast tokenizer of transformers, or a folder or hub id of one, for text. classes: the names of the module's outputs, in
    order. preprocessing: where images are not to be normalised by the training data's mean and deviation (a timm module: by its published
    ones).
    """
    if not isinstance(module, nn.Module):
        raise UsageError(Problem(role, f"an nn.Module is wanted; got {type(module).__name__}."))
    notes: list[str] = []
    config = getattr(module, "config", None)
    is_hf = hasattr(module, "save_pretrained") and hasattr(config, "id2label")
    if preprocessing is None:
        preprocessing, notes = _preprocessing_of(module, role, data, tokenizer, max_length)
    if preprocessing.kind != data.kind:
        raise UsageError(Problem(role, f"its preprocessing is for {preprocessing.kind} data, and this data is {data.kind}."))
    if classes is None and is_hf and config is not None and config.id2label:
        classes = tuple(str(config.id2label[i]) for i in sorted(config.id2label))
    spec: dict[str, Any] = {"model": f"{type(module).__module__}.{type(module).__qualname__}", "weights": None, "options": {}}
    model = Model(module, spec, "hf" if is_hf else "module", preprocessing, tuple(classes) if classes else None, 0, "", notes)
    model.num_classes = _images.try_model(model, role)
    if model.classes is not None and len(model.classes) != model.num_classes:
        raise UsageError(Problem(role, f"{len(model.classes)} class names were given for {model.num_classes} outputs."))
    if role == "teacher":
        class_map(model, data)
    elif model.num_classes != len(data.classes):
        raise UsageError(Problem(role, f"the module has {model.num_classes} outputs and the data has {len(data.classes)} classes."))
    else:
        model.classes = tuple(data.classes)
        _check_trainable(model, role)
    model.weights_sha256 = state_hash(module)
    return model


def _preprocessing_of(module: nn.Module, role: Role, data: Data, tokenizer: Any, max_length: int) -> tuple[Preprocessing, list[str]]:
    if data.kind == "tensor":
        return TensorPreprocessing(tuple(data.shape)), []
    if data.kind == "text":
        source = tokenizer if tokenizer is not None else _home(module)
        if source is None:
            raise UsageError(
                Problem(role, "a module on text needs its tokenizer.", "Pass tokenizer=, a folder or a tokenizer of transformers.")
            )
        if isinstance(source, str | Path):
            path = home_path(str(source))
            folder = path.resolve() if os.path.isdir(path) else None
            source, stored = _tokens.read_tokenizer(str(folder or source), folder, role)
        else:
            stored = _tokens.store_tokenizer(source, role)
            source, _ = _tokens.read_tokenizer(str(stored), stored, role)
        return _tokens.text_preprocessing(module, source, stored, asked=None, wanted=max_length, where=role)
    published = getattr(module, "pretrained_cfg", None)
    prepared = _images.from_data(data, data.image_size or (224, 224), data.channels)
    if isinstance(published, dict) and len(published.get("mean", ())) == data.channels:
        prepared = replace(prepared, mean=tuple(published["mean"]), std=tuple(published["std"]))
        if data.image_size is None or published.get("fixed_input_size"):
            built_for = getattr(getattr(module, "patch_embed", None), "img_size", None) or published["input_size"][1:]
            prepared = replace(prepared, height=int(built_for[0]), width=int(built_for[1]))
    return prepared, []
