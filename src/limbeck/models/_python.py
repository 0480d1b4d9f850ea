"""``python:FILE_OR_MODULE:CALLABLE``: a person's own function or class that returns an ``nn.Module``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from limbeck._recipe_paths import home_path
from limbeck.errors import Problem, UsageError, listed, nearest
from limbeck.randomness import forked

__all__ = ["call_factory", "find_callable", "make_module"]


def find_callable(target: str, base: Path, where: str, neighbours: Path | None = None) -> tuple[Callable[..., Any], Path | None]:
    """The callable that ``FILE_OR_MODULE:CALLABLE`` names, and the file it is in (None for modules without one).

    neighbours: a further folder that a file may import from, where the file is a copy.
    """
    place, colon, attribute = target.rpartition(":")
    if not colon or not place or not attribute:
        raise UsageError(Problem(where, f"'python:{target}' should read python:FILE.py:CALLABLE or python:MODULE:CALLABLE."))
    is_file = place.endswith(".py") or "/" in place or "\\" in place
    module, file = _from_file(base / home_path(place), where, neighbours) if is_file else _from_name(place, base, where)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [n for n, v in vars(found).items() if callable(v) and not n.startswith("_")]
            what = listed(public, 8) or "none"
            raise UsageError(Problem(where, f"{place} has no '{attribute}'; its callables are: {what}.", nearest(part, public)))
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(
            Problem(where, f"'{attribute}' in {place} is {type(found).__name__}, not a function or class that returns a model.")
        )
    return found, file


def _from_file(path: Path, where: str, neighbours: Path | None) -> tuple[Any, Path]:
    if not os.path.isfile(path):
        near = nearest(path.name, [p.name for p in path.parent.glob("*.py")]) if os.path.isdir(path.parent) else ""
        raise UsageError(Problem(where, f"the file {path} does not exist.", near))
    path = path.resolve()
    key = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]
    name = f"limbeck_user_{path.stem}_{key}"
    if name in sys.modules:
        return sys.modules[name], path
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(Problem(where, f"{path} is not a Python file."))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling to workers look classes up there
    try:
        with _importable(neighbours or path.parent), _importable(path.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        raise UsageError(Problem(where, f"running {path} failed: {_said(e)}")) from e
    return module, path


def _from_name(name: str, base: Path, where: str) -> tuple[Any, Path | None]:
    try:
        with _importable(base):
            module = importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name and (name == e.name or name.startswith(f"{e.name}.")):
            hint = f"For a file, write python:{name}.py:CALLABLE." if os.path.isfile(base / f"{name}.py") else ""
            raise UsageError(Problem(where, f"there is no Python module '{name}' here.", hint)) from e
        raise UsageError(Problem(where, f"importing {name} failed: {_said(e)}")) from e
    except (Exception, SystemExit) as e:
        raise UsageError(Problem(where, f"importing {name} failed: {_said(e)}")) from e
    file = getattr(module, "__file__", None)
    return module, Path(file) if file else None


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a person's file import its neighbours."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def call_factory(
    factory: Callable[..., Any], *, num_classes: int, options: dict[str, Any], where: str, seed: int, role: str
) -> tuple[nn.Module, dict[str, Any]]:
    """Call the factory with the options, and ``num_classes`` if it takes that; the module and the arguments that were passed.

    Its initial weights are a function of ``(seed, role)``.
    """
    arguments = dict(options)
    name = getattr(factory, "__name__", type(factory).__name__)
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        parameters = signature.parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "num_classes" in parameters and "num_classes" not in arguments:
            arguments["num_classes"] = num_classes
        unknown = [] if anything else [key for key in arguments if key not in parameters]
        if unknown:
            takes = ", ".join(parameters) or "nothing"
            raise UsageError(
                [
                    Problem(f"{where}.options.{key}", f"{name} takes no '{key}' (it takes: {takes}).", nearest(key, parameters))
                    for key in unknown
                ]
            )
        needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        absent = [key for key in needed if key not in arguments]
        if absent:
            hint = f"options: {{{', '.join(f'{key}: ...' for key in absent)}}}"
            raise UsageError(Problem(f"{where}.options", f"{name} needs {listed(absent)}.", f"Give it with {hint}."))
    return make_module(factory, arguments, f"{where}.model", seed, role), arguments


def make_module(factory: Callable[..., Any], arguments: dict[str, Any], where: str, seed: int, role: str) -> nn.Module:
    """The module that a person's callable returns, or a sentence about what happened instead."""
    name = getattr(factory, "__name__", type(factory).__name__)
    try:
        with forked(seed, role):
            module = factory(**arguments)
    except Exception as e:
        raise UsageError(Problem(where, f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())}) failed: {_said(e)}")) from e
    if not isinstance(module, nn.Module):
        raise UsageError(Problem(where, f"{name} returned {type(module).__name__}; an nn.Module is wanted."))
    return module


def _said(error: BaseException) -> str:
    """The error and the last line of the person's own code that it came from."""
    trace, line = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith("<") and "importlib" not in file and Path(file).parent != Path(__file__).parent:
            line = f" ({Path(file).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{line}"
