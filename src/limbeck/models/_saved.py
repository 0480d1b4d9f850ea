"""The student alone: a folder that its own library loads without Limbeck, and that Limbeck reads back only if nothing in it changed."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.errors import LimbeckError, Problem, UsageError, missing_extra
from limbeck.models import _files, _hf, _python, _tokens, _vision
from limbeck.models._layers import cut_stack
from limbeck.models._model import Model, state_hash
from limbeck.run import commit_folder, disk_errors, file_sha256
from limbeck.types import ImagePreprocessing, Preprocessing, TensorPreprocessing, TextPreprocessing

__all__ = ["load_into", "load_saved", "read_about", "save_model"]

FORMAT = 1
_KINDS = {"image": ImagePreprocessing, "text": TextPreprocessing, "tensor": TensorPreprocessing}


def save_model(model: Model, folder: Path, classes: tuple[str, ...]) -> None:
    """Write the model alone into ``folder``, which appears complete or not at all (an older one is replaced).

    Hugging Face models in the layout of ``save_pretrained`` with their tokenizer and class names; others as ``model.safetensors`` with
    plain ``state_dict`` names. ``model.json`` beside it says how to build the module, how it wants its inputs, its classes, and the
    SHA-256 of every file. classes: the names of the outputs, in order. Raises ``DiskFull``.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors(folder):
            temporary.mkdir(parents=True)
            _write(model, temporary, classes)
        commit_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(model: Model, folder: Path, classes: tuple[str, ...]) -> None:
    preprocessing = dataclasses.asdict(model.preprocessing)
    if isinstance(model.preprocessing, TextPreprocessing):
        _tokens.copy_tokenizer(Path(model.preprocessing.tokenizer), folder)
        preprocessing["tokenizer"] = "."
    build = {key: value for key, value in model.build.items() if key != "source_text"}
    if model.kind == "hf":
        _save_pretrained(model, folder, classes)
        build["class"] = type(model.module).__name__
    else:
        _files.write_weights(model.module, folder / "model.safetensors")
    if model.build.get("file"):
        (folder / model.build["file"]).write_text(model.build["source_text"], encoding="utf-8", newline="")
    about = {
        "limbeck": importlib.metadata.version("limbeck") if _installed() else "unknown",
        "format": FORMAT,
        "kind": model.kind,
        "spec": model.spec,
        "build": build,
        "num_classes": model.num_classes,
        "classes": list(classes),
        "preprocessing": preprocessing,
        "dtype": _dtype(model.module),
        "weights_sha256": state_hash(model.module),
        "files": {path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / "model.json").write_text(json.dumps(about, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def _installed() -> bool:
    try:
        importlib.metadata.version("limbeck")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _dtype(module: nn.Module) -> str:
    floats = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return str(floats.pop()).removeprefix("torch.") if len(floats) == 1 else "float32"


def _save_pretrained(model: Model, folder: Path, classes: tuple[str, ...]) -> None:
    module: Any = model.module
    before = module.config.id2label, module.config.label2id
    module.config.id2label = dict(enumerate(classes))
    module.config.label2id = {name: i for i, name in enumerate(classes)}
    state = {name: value.detach().to("cpu").contiguous() for name, value in module.state_dict().items()}
    try:
        with _hf.quiet_transformers():
            module.save_pretrained(folder, state_dict=state, max_shard_size="1000GB")
    finally:
        module.config.id2label, module.config.label2id = before
    if isinstance(model.preprocessing, ImagePreprocessing):
        settings = _processor_settings(model.preprocessing)
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _processor_settings(p: ImagePreprocessing) -> dict[str, Any]:
    """``preprocessor_config.json`` for ``AutoImageProcessor``."""
    size = {"height": p.height, "width": p.width}
    settings: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": {"nearest": 0, "bilinear": 2, "bicubic": 3}[p.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }
    if p.resize_shorter is not None:
        settings |= {
            "size": {"shortest_edge": p.resize_shorter},
            "do_center_crop": True,
            "crop_size": size,
            "image_processor_type": "CLIPImageProcessor",
        }
    return settings


def load_saved(folder: Path, where: str = "") -> Model:
    """Read back what :func:`save_model` wrote: a run's directory (its ``student/``) or the folder with ``model.json`` itself.

    Needs no network. Raises ``UsageError`` where a file is missing or differs from its recorded SHA-256, where the weights do not fit, or
    where the module was a person's own object, which only they can build.
    """
    inner = folder / "student" if not (folder / "model.json").is_file() else folder
    about = _read(inner, where)
    _verify(inner, about, where)
    preprocessing = _preprocessing(inner, about["preprocessing"], where)
    build = dict(about["build"])
    notes: list[str] = []
    match about["kind"]:
        case "torchvision" | "timm" | "python":
            module = _rebuild(about, inner, build, notes, where)
            module.to(getattr(torch, about["dtype"]))
            _files.load_weights(module, inner / "model.safetensors", where or str(inner))
        case "hf":
            module = _pretrained(inner, about, where)
        case _:
            raise UsageError(
                Problem(
                    where,
                    f"the student in {inner} was an object given to the Python call ({about['spec'].get('model')}).",
                    f"Build it yourself and read its weights with safetensors.torch.load_model(module, '{inner / 'model.safetensors'}').",
                )
            )
    module.eval()
    if state_hash(module) != about["weights_sha256"]:
        raise UsageError(Problem(where, f"the weights read from {inner} are not those that were saved (their hash differs)."))
    classes = tuple(about["classes"]) or None
    return Model(
        module,
        {"model": f"run:{folder}"},
        about["kind"],
        preprocessing,
        classes,
        about["num_classes"],
        about["weights_sha256"],
        notes,
        build,
    )


def load_into(module: nn.Module, folder: Path, where: str = "") -> None:
    """Put the weights that :func:`save_model` wrote into a person's own module, as it was built by them. Raises as :func:`load_saved`."""
    about = _read(folder, where)
    _verify(folder, about, where)
    module.to(getattr(torch, about["dtype"]))
    _files.load_weights(module, folder / "model.safetensors", where or str(folder))
    if state_hash(module) != about["weights_sha256"]:
        raise UsageError(Problem(where, f"the weights read from {folder} are not those that were saved (their hash differs)."))


def read_about(folder: Path, where: str = "", *, weights_may_be_gone: bool = False) -> tuple[dict[str, Any], Path]:
    """``model.json`` of a saved model, every file that it records compared with its SHA-256, and the folder that they lie in.

    Raises as :func:`load_saved`; a missing weights file is let pass where the caller needs only the record.
    """
    inner = folder / "student" if not (folder / "model.json").is_file() else folder
    about = _read(inner, where)
    gone = weights_may_be_gone and not (inner / "model.safetensors").exists()
    recorded = {k: v for k, v in about["files"].items() if not (gone and k == "model.safetensors")}
    _verify(inner, {**about, "files": recorded}, where, weights=not gone)
    return about, inner


def _read(folder: Path, where: str) -> dict[str, Any]:
    path = folder / "model.json"
    if not path.is_file():
        raise UsageError(Problem(where, f"there is no saved model in {folder} (no model.json).", "Is the run finished?"))
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UsageError(Problem(where, f"{path} is not JSON: {e}.")) from e
    wanted = ("format", "kind", "spec", "build", "num_classes", "classes", "preprocessing", "dtype", "weights_sha256", "files")
    absent = [key for key in wanted if not isinstance(about, dict) or key not in about]
    if absent:
        raise UsageError(Problem(where, f"{path} does not describe a saved model (it lacks {', '.join(absent)})."))
    if about["format"] != FORMAT:
        raise UsageError(
            Problem(where, f"{path} has the format {about['format']}; this version of Limbeck reads {FORMAT}.", "pip install -U limbeck")
        )
    wrong = [key for key, right in _FORMS.items() if not right(about[key])]
    if wrong:
        raise UsageError(
            Problem(where, f"{path} does not describe a saved model (these say nothing that can be used: {', '.join(wrong)}).")
        )
    return dict(about)


_FORMS: dict[str, Callable[[Any], bool]] = {
    "kind": lambda v: isinstance(v, str),
    "spec": lambda v: isinstance(v, dict),
    "build": lambda v: isinstance(v, dict),
    "num_classes": lambda v: type(v) is int and v > 0,
    "classes": lambda v: isinstance(v, list) and all(isinstance(c, str) for c in v),
    "preprocessing": lambda v: isinstance(v, dict) and v.get("kind") in _KINDS,
    "dtype": lambda v: v in ("float32", "float64", "float16", "bfloat16"),
    "files": lambda v: isinstance(v, dict) and all(isinstance(digest, str) for digest in v.values()),
}
"""What the values in ``model.json`` are."""


def _verify(folder: Path, about: dict[str, Any], where: str, *, weights: bool = True) -> None:
    problems = []
    for name, recorded in about["files"].items():
        if Path(name).name != name:
            problems.append(Problem(where, f"{folder / 'model.json'} names a file outside its folder: {name}."))
        elif not (folder / name).is_file():
            problems.append(Problem(where, f"{folder / name} is missing."))
        elif file_sha256(folder / name) != recorded:
            problems.append(Problem(where, f"{folder / name} is not the file that was saved (its SHA-256 differs from model.json)."))
    if weights and about["kind"] != "module" and "model.safetensors" not in about["files"]:
        problems.append(Problem(where, f"{folder / 'model.json'} records no model.safetensors."))
    if problems:
        raise UsageError(problems)


def _preprocessing(folder: Path, saved: dict[str, Any], where: str) -> Preprocessing:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    if values["kind"] == "text":
        values["tokenizer"] = str(folder)
    try:
        made: Preprocessing = _KINDS[values["kind"]](**values)
    except TypeError as e:
        raise UsageError(Problem(where, f"{folder / 'model.json'} does not say how its model wants {values['kind']} inputs: {e}.")) from e
    return made


def _rebuild(about: dict[str, Any], folder: Path, build: dict[str, Any], notes: list[str], where: str) -> nn.Module:
    """The same architecture with fresh weights."""
    module: nn.Module
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in build["arguments"].items()}
    try:
        if about["kind"] == "torchvision":
            module = _vision.torchvision().models.get_model(build["name"], weights=None, num_classes=about["num_classes"], **arguments)
        elif about["kind"] == "timm":
            module = _vision.timm().create_model(build["name"], pretrained=False, num_classes=about["num_classes"], **arguments)
        else:
            module = _rebuild_python(folder, build, notes, where)
        for cut in build.get("cuts", ()):
            cut_stack(module, cut["layers"], cut["of"], where)
    except LimbeckError:
        raise
    except Exception as e:
        said = " ".join(str(e).split())[:300]
        raise UsageError(Problem(where, f"the model in {folder} could not be built by this version of {about['kind']}: {said}")) from e
    return module


def _rebuild_python(folder: Path, build: dict[str, Any], notes: list[str], where: str) -> nn.Module:
    place = build["file"] or build["module"]
    neighbours = build.get("imports_from")
    factory, file = _python.find_callable(f"{place}:{build['callable']}", folder, where, Path(neighbours) if neighbours else None)
    if build["file"]:
        build["source_text"] = (folder / build["file"]).read_text(encoding="utf-8")
    elif file is not None and hashlib.sha256(file.read_bytes()).hexdigest() != build["source_sha256"]:
        notes.append(f"The module {build['module']} has changed since its model was saved.")
    return _python.make_module(factory, build["arguments"], where, 0, "student")


def _pretrained(folder: Path, about: dict[str, Any], where: str) -> nn.Module:
    try:
        import transformers
    except ImportError as e:
        raise missing_extra("transformers", "text", "A Hugging Face model") from e
    kind = getattr(transformers, about["build"]["class"], None)
    if kind is None:
        raise UsageError(
            Problem(
                where,
                f"the student in {folder} is a {about['build']['class']}, which transformers does not have.",
                "Load it with its own class.",
            )
        )
    try:
        with _hf.quiet_transformers():
            module: nn.Module = kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, dtype=getattr(torch, about["dtype"])
            )
    except Exception as e:
        said = " ".join(str(e).split())[:300]
        raise UsageError(
            Problem(where, f"the model in {folder} could not be loaded by transformers {transformers.__version__}: {said}")
        ) from e
    return module
