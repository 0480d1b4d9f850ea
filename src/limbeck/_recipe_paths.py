"""What names of models and data mean: their kind, the task that data suggest, and the local files among them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from limbeck.errors import Problem, listed, nearest

MODEL_KINDS = ("torchvision", "timm", "cifar", "hf", "python", "run", "onnx", "logits", "module")
"""Prefixes of model names; ``module:NAME`` stands for an ``nn.Module`` that was given from Python."""
SOURCE_KINDS = ("digits", "npz", "imagefolder", "csv", "jsonl", "parquet", "hf", "python")
"""Kinds of data sources; ``python`` stands for tensors or Datasets that were given from Python."""
FILE_SOURCES = ("npz", "imagefolder", "csv", "jsonl", "parquet")
IMAGE_SOURCES = ("digits", "npz", "imagefolder")
TEXT_SOURCES = ("csv", "jsonl", "parquet")
_SUFFIXES = {".npz": "npz", ".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
SOURCES_SENTENCE = "digits, npz:FILE, imagefolder:DIR, csv:FILE, jsonl:FILE, parquet:FILE_OR_DIR or hf:HUB_ID"


def split_name(name: str) -> tuple[str, str]:
    """``timm:resnet50`` -> ("timm", "resnet50"); ("", name) where there is no prefix. A drive letter is not a prefix."""
    head, colon, rest = name.partition(":")
    return (head, rest) if colon and len(head) > 1 and "/" not in head and "\\" not in head else ("", name)


def source_kind(source: Any) -> str:
    """One of SOURCE_KINDS, or an empty string."""
    if not isinstance(source, str):
        return ""
    head, _ = split_name(source)
    kind = head or source
    return kind if kind in SOURCE_KINDS else ""


def task_of(source: Any) -> str | None:
    """The task that a data source suggests, None where it could be either."""
    kind = source_kind(source)
    if kind in IMAGE_SOURCES:
        return "image-classification"
    return "text-classification" if kind in TEXT_SOURCES else None


def home_path(text: str) -> Path:
    """The path that a person wrote, with ``~`` for a home; where there is no such home it stays as it is, and is looked for under that name."""
    return Path(os.path.expanduser(text))


def complete_source(source: str, base: Path | None) -> str:
    """``reviews.csv`` -> ``csv:reviews.csv``, a folder with train/ -> ``imagefolder:``; unchanged where it has a prefix or nothing fits.

    Without a ``base`` only suffixes tell.
    """
    head, _ = split_name(source)
    if head or source in SOURCE_KINDS or not source:
        return source
    kind = _SUFFIXES.get(Path(source).suffix.lower())
    if kind:
        return f"{kind}:{source}"
    if base is None:
        return source
    folder = base / source
    if os.path.isdir(folder / "train"):
        return f"imagefolder:{source}"
    if os.path.isdir(folder) and any(folder.glob("*.parquet")):
        return f"parquet:{source}"
    return source


def check_source(source: Any, where: str) -> list[Problem]:
    """Problems with the form of ``data.source``."""
    if not isinstance(source, str) or not source:
        return []  # its type is judged by the schema
    head, rest = split_name(source)
    allowed = f"expected {SOURCES_SENTENCE}."
    if not head:
        if source in ("digits", "python"):
            return []
        if source in SOURCE_KINDS:
            return [Problem(where, f"got '{source}' without a name after it, {allowed}")]
        return [Problem(where, f"cannot tell what data '{source}' is, {allowed}", nearest(source, SOURCE_KINDS))]
    if head not in SOURCE_KINDS:
        close = nearest(head, [k for k in SOURCE_KINDS if k != "python"])
        return [Problem(where, f"got '{source}', {allowed}", close)]
    if head == "digits":
        return [Problem(where, f"got '{source}'; 'digits' takes no name after it.")]
    if not rest.strip():
        return [Problem(where, f"got '{source}' without a name after it, {allowed}")]
    return []


def check_model(name: Any, where: str, role: str) -> list[Problem]:
    """Problems with the form of a model's name; what it points to is judged when it is built."""
    if not isinstance(name, str) or not name:
        return []
    head, rest = split_name(name)
    if not head:
        return []
    public = [k for k in MODEL_KINDS if k != "module" and (k not in ("onnx", "logits") or role == "teacher")]
    if head not in MODEL_KINDS:
        allowed = listed([f"{k}:..." for k in public])
        hint = nearest(f"{head}:", [f"{k}:" for k in public])
        return [Problem(where, f"got '{name}', expected {allowed}, a folder, a short name (see `limbeck models`) or a hub id.", hint)]
    if head == "onnx":
        if role == "student":
            return [Problem(where, f"got '{name}'; an ONNX file cannot be trained (onnx: is for teachers).")]
        return [Problem(where, f"got '{name}'; teachers from ONNX files are not built yet.")]
    if not rest.strip():
        return [Problem(where, f"got '{name}' without a name after '{head}:'.")]
    if head == "logits":
        if role == "student":
            return [Problem(where, f"got '{name}', which holds a teacher's answers and cannot be trained.")]
        if Path(rest).suffix not in (".npy", ".parquet"):
            return [Problem(where, f"got '{name}', expected a .npy or a .parquet file after 'logits:'.")]
    if head == "python":
        target, colon, attribute = rest.rpartition(":")
        if not colon or not target or not attribute.isidentifier():
            return [Problem(where, f"got '{name}', expected python:FILE_OR_MODULE:CALLABLE, e.g. python:models.py:build.")]
    return []


def teachers_of(data: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The teachers of a recipe's mapping, each with where it stands: ``teacher``, or ``teacher.0`` ... of a list."""
    teacher = data.get("teacher")
    if isinstance(teacher, list):
        return [(f"teacher.{i}", one) for i, one in enumerate(teacher)]
    return [] if teacher is None else [("teacher", teacher)]


def students_of(data: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The student of a recipe's mapping and its peers, each with where it stands."""
    student = data.get("student")
    peers = student.get("peers") if isinstance(student, Mapping) else None
    return [("student", student), *((f"student.peers.{i}", one) for i, one in enumerate(peers if isinstance(peers, list) else []))]


def absolute_paths(data: dict[str, Any], base: Path, only: Collection[str] | None = None) -> dict[str, Any]:
    """``data`` (a recipe's mapping) with the local paths in it made absolute against ``base``; ``only`` limits it to those keys and all within."""
    result = copy.deepcopy(data)
    sections = [("data", result.get("data")), ("teacher_cache", result.get("teacher_cache"))]
    for where, holder in [*teachers_of(result), *students_of(result), *sections]:
        for name, rewrite in _REWRITES[where.partition(".")[0]].items():
            wanted = only is None or any(f"{where}.{name}".startswith(f"{key}.") or f"{where}.{name}" == key for key in only)
            if wanted and isinstance(holder, dict) and isinstance(holder.get(name), str):
                holder[name] = rewrite(holder[name], base)
    return result


def _absolute(path: str, base: Path) -> str:
    return str((base / home_path(path)).resolve()) if path else path


def _absolute_source(source: str, base: Path) -> str:
    head, rest = split_name(complete_source(source, base))
    if head in FILE_SOURCES or (head == "hf" and os.path.exists(base / rest)):
        return f"{head}:{_absolute(rest, base)}"
    return source


def _absolute_model(name: str, base: Path) -> str:
    head, rest = split_name(name)
    if head in ("run", "logits") or (head in ("hf", "onnx") and os.path.exists(base / rest)):
        return f"{head}:{_absolute(rest, base)}"
    if head == "python":
        target, _, attribute = rest.rpartition(":")
        return f"python:{_absolute(target, base)}:{attribute}" if _is_file_name(target) else name
    return _absolute(name, base) if not head and os.path.isdir(base / name) else name


def _absolute_further(name: str, base: Path) -> str:
    """``data.test`` and its like: a file of the source's kind, with or without the prefix."""
    head, rest = split_name(name)
    if head in FILE_SOURCES:
        return f"{head}:{_absolute(rest, base)}"
    return name if head else _absolute(name, base)


def _absolute_weights(name: str, base: Path) -> str:
    return name if name in ("pretrained", "scratch") else _absolute(name, base)


_OF_MODELS: dict[str, Callable[[str, Path], str]] = {"model": _absolute_model, "weights": _absolute_weights}
_REWRITES: dict[str, dict[str, Callable[[str, Path], str]]] = {
    "teacher": _OF_MODELS,
    "student": _OF_MODELS,
    "data": {"source": _absolute_source, **dict.fromkeys(("test", "valid", "unlabelled"), _absolute_further)},
    "teacher_cache": {"path": _absolute},
}


def _is_file_name(target: str) -> bool:
    return target.endswith(".py") or "/" in target or "\\" in target


def missing_files(data: dict[str, Any], base: Path) -> list[Problem]:
    """A problem for every file or folder that a recipe names and that is not there."""
    problems = []
    for role, spec in [*teachers_of(data), *students_of(data)]:
        if not isinstance(spec, dict):
            continue
        head, rest = split_name(spec["model"]) if isinstance(spec.get("model"), str) else ("", "")
        if head == "logits" and rest:
            problems += _missing(base, rest, f"{role}.model", folder=False)
        if head == "run" and rest:
            problems += _missing_run(base / home_path(rest), f"{role}.model")
        if head == "python":
            target = rest.rpartition(":")[0]
            problems += _missing(base, target, f"{role}.model", folder=False) if _is_file_name(target) else []
        weights = spec.get("weights")
        if isinstance(weights, str) and weights and weights not in ("pretrained", "scratch"):
            problems += _missing(base, weights, f"{role}.weights", folder=False) or _not_safetensors(weights, f"{role}.weights")
    source = data.get("data")
    for name in ("source", "test", "valid", "unlabelled"):
        value = source.get(name) if isinstance(source, dict) else None
        if isinstance(value, str) and value:
            head, rest = split_name(value)
            if head in FILE_SOURCES:
                folder = {"imagefolder": True, "parquet": None}.get(head, False)
                problems += _missing(base, rest, f"data.{name}", folder=folder) if rest.strip() else []
            elif not head and name != "source":
                problems += _missing(base, value, f"data.{name}", folder=None)
    return problems


def _missing(base: Path, name: str, where: str, *, folder: bool | None) -> list[Problem]:
    path = base / home_path(name)
    wanted = {True: "folder", False: "file", None: "file or folder"}[folder]
    try:
        found = path.exists()
        wrong = found and ((folder is True and not path.is_dir()) or (folder is False and path.is_dir()))
        if found and not wrong:
            return []
        if wrong:
            return [Problem(where, f"'{name}' is a {'file' if folder else 'folder'}, expected a {wanted}.")]
        beside = [p.name for p in path.parent.iterdir()][:2000] if path.parent.is_dir() else []
    except (OSError, ValueError) as error:
        return [Problem(where, f"'{name}' cannot be looked at: {error}.")]
    return [Problem(where, f"no such {wanted}: '{name}' (looked in {path.parent}).", nearest(path.name, beside))]


def _missing_run(path: Path, where: str) -> list[Problem]:
    if not os.path.isdir(path):
        return _missing(path.parent, path.name, where, folder=True)
    if (path / "student").is_dir() or (path / "model.json").is_file():
        return []
    return [Problem(where, f"'{path}' is not a finished run: it has no student/ and no model.json.")]


def _not_safetensors(name: str, where: str) -> list[Problem]:
    suffix = Path(name).suffix.lower()
    if suffix == ".safetensors":
        return []
    hint = f"Convert it: limbeck convert {name} {Path(name).stem}.safetensors" if suffix in (".pt", ".pth", ".bin", ".ckpt") else ""
    return [Problem(where, f"got '{name}', expected a .safetensors file or 'pretrained'.", hint)]


def from_python(data: dict[str, Any]) -> list[Problem]:
    """A problem for each name that stands for an object given from Python: a file or command line cannot hold one."""
    problems = []
    for where, holder in [*teachers_of(data), *students_of(data), ("data", data.get("data"))]:
        name = "source" if where == "data" else "model"
        value = holder.get(name) if isinstance(holder, dict) else None
        if isinstance(value, str) and (split_name(value)[0] == "module" or (where == "data" and source_kind(value) == "python")):
            text = f"'{value}' stands for an object that was given from Python, and can only be run again from Python."
            problems.append(Problem(f"{where}.{name}", text))
    return problems
