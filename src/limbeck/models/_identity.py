"""Who a model is: what it computes with, hashed; and what can be told of a named one without loading it."""

from __future__ import annotations

import ast
import dis
import hashlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable
from enum import Enum
from functools import partial
from importlib.machinery import all_suffixes
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.models._model import state_hash
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
_MODULE = frozenset(vars(nn.Module()))
_FROM_FILE = re.compile(r"^limbeck_user_(.+)_[0-9a-f]{16}$")
_RUNS_MORE = {"importlib", "imp", "runpy", "pkgutil", "__import__", "exec", "eval", "compile"}
_PLACE = re.compile(r" at 0x[0-9a-fA-F]+|\blimbeck_user_|(?<=\w)_[0-9a-f]{16}(?=\.)")
_DEPTH = 12  # to which people nest
_LEFT_OUT = {"left out": True}
_READ = {".json", ".safetensors", ".txt", ".model"}


def architecture_sha256(module: nn.Module) -> str:
    """What a module does with its weights: the class of every part, its plain settings (numbers, words, functions; tensors and arrays
    of a person's own class), buffers that no state has, the
    source of what is no library's and of everything that it calls by name, and a Hugging Face configuration without names. Weights and the place
    of files are not in it."""
    digest = hashlib.sha256()
    source = _Source()
    for name, part in module.named_modules():
        kind = type(part)
        settings = json.dumps(_settings(part, source), sort_keys=True)
        digest.update(f"{name}\x1f{_home(kind)}.{kind.__qualname__}\x1f{settings}\x1e".encode())
        source.add(kind)
        for key in sorted(part._non_persistent_buffers_set):
            value = part._buffers.get(key)
            if value is not None:
                raw = value.detach().to("cpu").contiguous().reshape(-1)
                digest.update(f"{key}\x1f{raw.dtype}\x1f{tuple(value.shape)}\x1e".encode())
                digest.update(raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    digest.update(source.text().encode())
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        plain = {k: v for k, v in config.to_dict().items() if k not in _CONFIG_ASIDE}
        digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _settings(part: nn.Module, source: _Source) -> dict[str, Any]:
    """Of a person's own class the private ones too, and tensors and arrays, but none that its ``forward`` puts there: they are of what it saw last.
    Of a library's class only what is public, and nothing that holds a tensor, for the same reason."""
    own = not _is_library(type(part).__module__)
    code = getattr(type(part).forward, "__code__", None)
    left = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"} if own and code is not None else set()
    found: dict[str, Any] = {}
    for name, value in vars(part).items():
        if name == "training" or name in _MODULE or name in _CONFIG_ASIDE or (name.startswith("_") and not own):
            continue
        try:
            told = _plain(value, source, _values_only if own and name not in left else _no_setting)
        except TypeError:
            continue
        if told != [_LEFT_OUT]:
            found[name] = told
    return found


def _no_setting(value: Any) -> Any:
    raise TypeError


def _values_only(value: Any) -> Any:
    """What is said of a person's setting that is neither plain nor holds others: the values of arrays, nothing of other objects and of paths, which
    may be places of this machine."""
    return _array(value) or _LEFT_OUT


def _array(value: Any) -> list[Any] | None:
    """Type, shape and a hash of the values of a tensor or array; None of anything else, and where there are no values to read."""
    kind = f"{_home(type(value))}.{type(value).__qualname__}"
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_quantized:
        return [kind, str(value.dtype), list(value.shape), state_hash(_Held(value))]
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return [kind, str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    return None


def _plain(value: Any, source: _Source, other: Callable[[Any], Any]) -> list[Any]:
    """JSON of a value and of what it holds, the same in every process: functions and classes by name, their source goes into ``source``.

    The first entry is the value; those after it are the containers and objects that it leads to, in the order in which they are first met, each
    once: wherever else they are met stands their number. So what leads back to itself ends, and the work grows with the number of objects. The
    nearest come first, so that how deep a thing lies does not depend on the way to it. other: what is said of everything else.
    """
    numbers: dict[int, int] = {}
    met: list[tuple[Any, list[Any], int]] = []  # the objects too: what is kept alive gives its address to nothing else

    def told(value: Any, depth: int) -> Any:
        leaf = _leaf(value, source)
        if leaf is not _LEFT_OUT:
            return leaf
        if id(value) in numbers:
            return {"number": numbers[id(value)]}
        inside = _inside(value, source) if depth < _DEPTH else None
        if inside is None:
            return other(value)
        if isinstance(value, tuple) and all(_is_word(v) for v in value):
            return inside  # Python may keep equal ones as one object, or not
        number = numbers[id(value)] = len(numbers)
        met.append((value, inside, depth + 1))
        return {"number": number}

    found = [told(value, 0)]
    for _, inside, depth in met:  # grows meanwhile
        found.append([told(v, depth) for v in inside])
    return found


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _leaf(value: Any, source: _Source) -> Any:
    """JSON of what holds nothing else; _LEFT_OUT of everything else."""
    if _is_word(value):
        return value
    if isinstance(value, torch.dtype | torch.device | Enum):
        return str(value)
    if isinstance(value, np.generic):
        return _array(value) or _LEFT_OUT
    if isinstance(value, MethodType):
        source.add(value.__func__)
        return [f"{_home(value)}.{value.__qualname__}", f"{_home(type(value.__self__))}.{type(value.__self__).__qualname__}"]
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        source.add(value)
        return f"{_home(value)}.{value.__qualname__}"
    return _LEFT_OUT


def _inside(value: Any, source: _Source) -> list[Any] | None:
    """What a container, a partial function or a person's object holds, after what it is; None of everything else."""
    if isinstance(value, tuple | list):
        return ["list", *value]
    if isinstance(value, set | frozenset):
        return ["set", *sorted(value, key=lambda v: _at_first_sight(v, source))]
    if isinstance(value, dict):
        return ["dict", *(v for pair in value.items() for v in pair)]
    if isinstance(value, partial):
        return ["partial", value.func, value.args, value.keywords]
    if not isinstance(value, Tensor | nn.Module) and not _is_library(type(value).__module__) and hasattr(value, "__dict__"):
        return [f"{_home(type(value))}.{type(value).__qualname__}", *(v for pair in vars(value).items() for v in pair)]
    return None


def _at_first_sight(value: Any, source: _Source) -> str:
    """By which the elements of a set are put in order, as it has none of its own: what can be told without going deep."""
    leaf = _leaf(value, source)
    if leaf is _LEFT_OUT:
        leaf = [_leaf(v, source) for v in _inside(value, source) or ()]
    return json.dumps([type(value).__qualname__, leaf])


def _home(thing: Any) -> str:
    """The module of a class or function, without the mark of where its file lies."""
    return _FROM_FILE.sub(r"\1", str(thing.__module__))


def _is_library(module: str | None) -> bool:
    top = (module or "").partition(".")[0]
    return top in _LIBRARIES or (top in sys.stdlib_module_names and top != "__main__")


class _Source:
    """The source of classes and functions that are no library's, and of what they name: a helper function is part of what a model does."""

    def __init__(self) -> None:
        self._found: set[tuple[str, str, str]] = set()
        self._seen: dict[int, Any] = {}  # by address; what is kept alive gives its address to nothing else

    def text(self) -> str:
        return "\x1e".join(f"{home}.{name}\x1f{source}" for home, name, source in sorted(self._found))

    def add(self, thing: Any) -> None:
        """thing: a class or a function; of the same name there may be several."""
        if _is_library(str(getattr(thing, "__module__", ""))) or id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        functions = self._functions(thing)
        for part in [thing] if isinstance(thing, type) else functions:
            text = _text(part)
            self._found.add((_home(thing), str(getattr(thing, "__qualname__", "")), text))
            if not text:  # a class that was typed in, or made at run time
                for function in functions:
                    self.add(function)
        if isinstance(thing, type):
            for base in thing.__mro__[1:]:
                self.add(base)
            for name, value in vars(thing).items():
                if isinstance(value, dict | list | tuple | set | frozenset) and not name.startswith("__"):
                    self._value(_home(thing), f"{thing.__qualname__}.{name} =", value)
        for function in functions:
            self._named(function)

    @staticmethod
    def _functions(thing: Any) -> list[FunctionType]:
        """Those of a person: a function and what it wraps, or all of a class."""
        open_ = [v for v in vars(thing).values() if not isinstance(v, type)] if isinstance(thing, type) else [thing]
        found: list[FunctionType] = []
        while open_:
            value = open_.pop(0)
            open_ += [v for v in (getattr(value, a, None) for a in ("fget", "fset", "__func__", "__wrapped__")) if v is not None]
            if isinstance(value, FunctionType) and not _is_library(value.__globals__.get("__name__")):
                found.append(value)
        return list({id(f): f for f in found}.values())

    def _named(self, function: FunctionType) -> None:
        home = _FROM_FILE.sub(r"\1", str(function.__globals__.get("__name__")))
        for name in sorted(_names(function.__code__)):
            value = function.__globals__.get(name)
            if isinstance(value, FunctionType | type):
                if not _is_installed(value.__module__):
                    self.add(value)
            elif isinstance(value, ModuleType):
                self._module(value)
            elif value is not None:
                self._value(home, f"{name} =", value)
        held = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]  # an empty one has no contents
        if held or function.__defaults__ or function.__kwdefaults__:
            self._value(home, f"{function.__qualname__} with", [held, function.__defaults__, function.__kwdefaults__])

    def _value(self, home: str, name: str, value: Any) -> None:
        """What a name stands for."""
        self._found.add((home, name, json.dumps(_plain(value, self, self._described))))

    def _module(self, module: ModuleType) -> None:
        file = getattr(module, "__file__", None)
        if file is not None and not _is_installed(module.__name__) and Path(file).is_file():
            self._found.add((_FROM_FILE.sub(r"\1", module.__name__), "", file_sha256(Path(file))))

    def _described(self, value: Any) -> Any:
        """What can be said of anything: the values of arrays, else what it says of itself, without where it or its file lies."""
        kind = f"{_home(type(value))}.{type(value).__qualname__}"
        if isinstance(value, ModuleType):
            self._module(value)
            return _FROM_FILE.sub(r"\1", value.__name__)
        array = _array(value)
        if array is not None:
            return array
        if hasattr(value, "__wrapped__"):  # as functools.cache leaves a function
            self.add(value)
        weights = state_hash(value) if isinstance(value, nn.Module) else ""
        try:
            said = "" if isinstance(value, dict | list | tuple | set | frozenset) else repr(value)
        except Exception:  # a person's own repr may want what is not there yet
            said = ""
        return [kind, weights, _PLACE.sub("", said)]


class _Held(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach())


def _text(thing: Any) -> str:
    """The source of a class or function; of a function that has none what it was compiled to, and nothing of such a class."""
    try:
        return inspect.getsource(thing if isinstance(thing, type) else thing.__code__)
    except (OSError, TypeError, SyntaxError):
        return "" if isinstance(thing, type) else _compiled(thing.__code__)


def _compiled(code: CodeType) -> str:
    constants = [
        _compiled(c) if isinstance(c, CodeType) else repr(sorted(map(repr, c)) if isinstance(c, frozenset) else c) for c in code.co_consts
    ]
    return f"{code.co_code.hex()} {constants} {code.co_names} {code.co_varnames}"


def _names(code: CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return found


def _is_installed(module: str | None) -> bool:
    """Whether a module came with Python or was installed, so that its version says what it does."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return _is_library(module) or "site-packages" in file or "dist-packages" in file


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


def _stands_alone(build: dict[str, Any], folder: Path) -> bool:
    """Whether the file beside a saved model is all of its source that is not installed: it imports libraries alone, and nothing by a name that is
    made at run time."""
    if not build.get("file"):
        return False
    nearby = [folder, *([Path(build["imports_from"])] if build.get("imports_from") else [])]
    try:
        tree = ast.parse((folder / build["file"]).read_bytes())
    except (SyntaxError, ValueError):
        return False
    wanted: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            wanted.add(node.module if node.module and not node.level else "")
        elif isinstance(node, ast.Name):
            wanted |= {node.id} & _RUNS_MORE
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
            return False
    return all(_is_installed_name(name.partition(".")[0], nearby) for name in wanted)


def _is_installed_name(top: str, nearby: list[Path]) -> bool:
    """Whether importing this name gives what was installed, and no neighbour of the same name. top: empty for a neighbour."""
    if not top or top in _RUNS_MORE:
        return False
    if any((place / top).is_dir() or any((place / f"{top}{s}").exists() for s in all_suffixes()) for place in nearby):
        return False
    if top in _LIBRARIES or top in sys.stdlib_module_names:
        return True
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    places = [] if spec is None else [p for p in (spec.origin, *(spec.submodule_search_locations or ())) if p]
    return bool(places) and all("site-packages" in p or "dist-packages" in p for p in places)


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
        if about["kind"] == "python" and not _stands_alone(about["build"], folder):
            return None  # some of its source lies in a module somewhere, and may have changed
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
