"""Who a teacher is: what changes its answers changes its identity, and where its files lie, or what it saw last, does not."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.models import architecture_sha256
from limbeck.models._identity import _stands_alone
from running import ROOT

SOURCE = """
import helpers
import torch
from torch import nn

SCALE = 1.0


def outer(x):
    return inner(x)


def inner(x):
    return x * SCALE


def unused(x):
    return x + 1


class Base(nn.Module):
    def forward(self, x):
        self.seen = x
        return outer(helpers.twice(self.body(x)))


class Net(Base):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.register_buffer("shift", torch.zeros(2), persistent=False)
"""
HELPERS = "def twice(x):\n    return 2 * x\n"


def net(folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str] | None = None) -> Any:
    """The module of a file that was written and imported as a person's file is."""
    folder.mkdir(parents=True)
    source, helpers = SOURCE, HELPERS
    for old, new in (changes or {}).items():
        assert old in source + helpers
        source, helpers = source.replace(old, new), helpers.replace(old, new)
    for name, text in (("net.py", source), ("helpers.py", helpers)):
        (folder / name).write_text(text, encoding="utf-8")
    from limbeck.models._python import find_callable

    monkeypatch.delitem(sys.modules, "helpers", raising=False)
    made, _ = find_callable("net.py:Net", folder, "teacher")
    module = made()
    torch.nn.init.zeros_(module.body.weight)
    return module


def test_the_place_of_its_files_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (architecture_sha256(net(tmp_path / name, monkeypatch)) for name in ("a", "b/c"))
    assert one == other


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("outer(helpers.twice(self.body(x)))", "outer(helpers.twice(self.body(x))) + 1", True),
        ("return inner(x)", "return inner(x) + 1", True),
        ("return x * SCALE", "return x / SCALE", True),
        ("SCALE = 1.0", "SCALE = 1.5", True),
        ("return 2 * x", "return 3 * x", True),
        ("return x + 1", "return x + 2", False),
        ("SCALE = 1.0", "SCALE = 1.0  # as published", False),
    ],
    ids=["its base class", "a function", "a function's function", "a constant", "a neighbouring file", "what nobody calls", "a comment"],
)
def test_its_source_counts(tmp_path: Path, old: str, new: str, counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = architecture_sha256(net(tmp_path / "a", monkeypatch))
    assert (architecture_sha256(net(tmp_path / "b", monkeypatch, {old: new})) != before) == counts


def set_buffer(module: Any) -> None:
    module.shift += 1


SETTINGS: dict[str, tuple[Callable[[Any], None], bool]] = {
    "a number": (lambda m: setattr(m, "depth", 3), True),
    "a private number": (lambda m: setattr(m, "_depth", 3), True),
    "a list of names": (lambda m: setattr(m, "order", ["a", "b"]), True),
    "a mapping": (lambda m: setattr(m, "table", {"a": (1, 2)}), True),
    "a function": (lambda m: setattr(m, "act", nn.functional.gelu), True),
    "a partial function": (lambda m: setattr(m, "act", partial(nn.functional.gelu, approximate="tanh")), True),
    "a number type": (lambda m: setattr(m, "kind", torch.float16), True),
    "a layer's own setting": (lambda m: setattr(m.body, "eps", 1e-3), True),
    "a buffer that no state has": (set_buffer, True),
    "whether it trains": (lambda m: m.train(), False),
    "what a forward pass left": (lambda m: m(torch.ones(3, 2)), False),
    "what a library's part keeps of a forward pass": (lambda m: setattr(m.body, "seen", {"last": torch.ones(3)}), False),
    "its weights": (lambda m: torch.nn.init.ones_(m.body.weight), False),
}


class Holder:
    """An object of a person's own class."""

    def __init__(self, value: Any) -> None:
        self.value = value


SAME_BUT: dict[str, tuple[Any, Any]] = {
    "an array": (np.arange(3.0), np.arange(3.0) + 1),
    "an array's type": (np.zeros(2, np.int32), np.zeros(2, np.float32)),
    "an array's shape": (np.zeros((2, 3)), np.zeros((3, 2))),
    "a plain tensor": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
    "a tensor's type": (torch.zeros(2, dtype=torch.int32), torch.zeros(2)),
    "a NumPy number": (np.float32(2), np.float32(3)),
    "a number beside a tensor": ({"t": torch.ones(2), "scale": 2.0}, {"t": torch.ones(2), "scale": 3.0}),
    "a number beside what cannot be told": ([object(), 2.0], [object(), 3.0]),
    "a tensor beside a number": ({"t": torch.ones(2), "scale": 2.0}, {"t": torch.zeros(2), "scale": 2.0}),
    "what lies six deep": ([[[[[[2.0]]]]]], [[[[[[3.0]]]]]]),
    "an own object's NumPy number": (Holder(np.float32(2)), Holder(np.float32(3))),
}


@pytest.mark.parametrize("name", SAME_BUT)
def test_settings_that_hold_values_are_told_apart(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, found = net(tmp_path / "a", monkeypatch), []
    for value in (*SAME_BUT[name], copy.deepcopy(SAME_BUT[name][0])):
        module.setting = value
        found.append(architecture_sha256(module))
    assert found[0] == found[2] != found[1]


def test_a_path_or_another_object_in_a_setting_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the place of the teacher's own folder, which may be moved."""
    module, found = net(tmp_path / "a", monkeypatch), set()
    for place in (tmp_path / "a", tmp_path / "b"):
        module.place, module.places = place, {"own": [place, 1.0]}
        found.add(architecture_sha256(module))
    assert len(found) == 1


@pytest.mark.parametrize("where", ["a constant", "a setting"])
def test_each_object_of_a_graph_that_leads_back_is_looked_at_once(where: str) -> None:
    looks = 0

    class Node:
        __slots__ = ("children", "parent")

        def __init__(self, parent: Any) -> None:
            self.parent, self.children = parent, [Node(self) for _ in range(16)] if parent is None else []

        @property
        def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
            nonlocal looks
            looks += 1
            if looks > 1000:
                raise RuntimeError("looked at again and again")
            return {"parent": self.parent, "children": self.children}

    tree = Node(None)
    space: dict[str, Any] = {"nn": nn, "__name__": "typed", "TREE": tree if where == "a constant" else None}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return x * len(TREE.children)\n", space)
    module = space["Typed"]()
    if where == "a setting":
        module.tree = tree
    architecture_sha256(module)
    assert 17 <= looks <= 4 * 17


@pytest.mark.parametrize("name", SETTINGS)
def test_its_settings_count(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights have a hash of their own, and are not in this one."""
    change, counts = SETTINGS[name]
    module = net(tmp_path / "a", monkeypatch).eval()
    before = architecture_sha256(module)
    assert architecture_sha256(module) == before
    change(module)
    assert (architecture_sha256(module) != before) == counts


def test_functions_in_a_setting_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, found = net(tmp_path / "a", monkeypatch), set()
    for act in (nn.functional.relu, nn.functional.gelu, torch.tanh, partial(nn.functional.gelu, approximate="tanh"), nn.ReLU):
        module.act = act
        found.add(architecture_sha256(module))
    assert len(found) == 5


def test_what_cannot_be_read_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that was typed in has no source; a setting may hold anything, itself included."""
    space: dict[str, Any] = {"nn": nn, "__name__": "typed"}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return x\n", space)
    module = space["Typed"]()
    module.loop = [module]
    module.own = {"loop": []}
    module.own["loop"].append(module.own)
    assert architecture_sha256(module) == architecture_sha256(module)
    assert importlib.util.find_spec("typed") is None


# --- what a person's module keeps in tables ---

TABLES = """
import functools

import torch
from torch import nn


def double(x):
    return x * 2


class Half:
    def __call__(self, x):
        return x / 2


def times(factor):
    return lambda x: x * factor


def traced(function):
    @functools.wraps(function)
    def wrapper(x):
        return function(x) + 1

    return wrapper


@traced
def wrapped(x):
    return x


@functools.cache
def kept(x):
    return 5 * x


class Slots:
    __slots__ = ("x",)


FOUR = 4
FIVE = 5


def scaled(x, by=FIVE):
    return x * by


# each on its own line, or the source of the one lambda would be that of them all
ACTS = {"double": double, "half": Half, "object": Half(), "slots": Slots()}
ACTS["thrice"] = lambda x: x * 3
ACTS["more"] = [times(FOUR), scaled]
NAMES = {"a", "b", "c", "d", "e"}
SHIFT = torch.tensor([1.0, 2.0])


class Tree:
    def __init__(self, parent, depth):
        self.parent = parent
        self.number = 8 + depth
        self.children = [Tree(self, depth - 1) for _ in range(2 if depth else 0)]
        self.nearby = {self, parent, "a", "b", ("c", self.number)}


TREE = Tree(None, 3)


class Tables(nn.Module):
    own = {"scaled": times(6)}

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.table = {"double": double, 1: "a"}
        self.method = self.other

    def other(self, x):
        return x

    def forward(self, x):
        y = ACTS["thrice"](self.body(x)) + SHIFT + kept(1) * len(NAMES) + TREE.number
        return self.own["scaled"](wrapped(y))
"""

PRINT = """
import sys
from pathlib import Path

import torch

from limbeck.models import architecture_sha256
from limbeck.models._python import find_callable

module = find_callable("tables.py:Tables", Path(sys.argv[1]), "teacher")[0]()
print(architecture_sha256(module))
"""


def tables(folder: Path, old: str = "", new: str = "") -> str:
    folder.mkdir()
    assert old in TABLES
    (folder / "tables.py").write_text(TABLES.replace(old, new), encoding="utf-8")
    from limbeck.models._python import find_callable

    return architecture_sha256(find_callable("tables.py:Tables", folder, "teacher")[0]())


def test_tables_of_functions_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Neither an address nor the order of a set, which a process draws anew, is part of who a teacher is."""
    found = {tables(tmp_path / "a")}
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, "-c", PRINT, str(tmp_path / "a")]
        found.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip())
    assert len(found) == 1


def test_of_tables_neither_the_place_of_the_file_nor_a_comment_counts(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    found = {tables(tmp_path / "a"), tables(tmp_path / "deep/b"), tables(tmp_path / "c", "FIVE = 5", "FIVE = 5  # of nothing")}
    assert len(found) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return x * 2", "return x * 7"),
        ("return x / 2", "return x / 7"),
        ("lambda x: x * 3", "lambda x: x * 7"),
        ("FOUR = 4", "FOUR = 7"),
        ("FIVE = 5", "FIVE = 7"),
        ('"double": double, "half"', '"double": times(2), "half"'),
        ('"double": double, "half": Half', '"double": Half, "half": double'),
        ("function(x) + 1", "function(x) + 7"),
        ("return 5 * x", "return 7 * x"),
        ('"d", "e"}', '"d", "f"}'),
        ("tensor([1.0, 2.0])", "tensor([1.0, 7.0])"),
        ('own = {"scaled": times(6)}', 'own = {"scaled": times(7)}'),
        ("return lambda x: x * factor", "return lambda x: x * factor * 7"),
        ('"double": double, 1: "a"', '"double": double, "1": "a"'),
        ("self.number = 8 + depth", "self.number = 8 + 2 * depth"),
        ("Tree(self, depth - 1) for", "Tree(self if depth > 1 else parent, depth - 1) for"),
        ("self.method = self.other", "self.method = self.forward"),
    ],
)
def test_tables_of_other_functions_are_another_teacher(tmp_path: Path, old: str, new: str) -> None:
    assert tables(tmp_path / "a") != tables(tmp_path / "b", old, new)


def test_functions_without_source_are_told_apart() -> None:
    found = set()
    for factor in (2, 3):
        space: dict[str, Any] = {"nn": nn, "__name__": "typed"}
        exec(f"class Typed(nn.Module):\n    def forward(self, x):\n        return x * {factor}\n", space)
        found.add(architecture_sha256(space["Typed"]()))
    assert len(found) == 2


IMPORTS: dict[str, tuple[str, bool]] = {
    "libraries": ("import math, torch\nfrom torch import nn\nimport torch.nn.functional as F\nfrom numpy import pi", True),
    "a neighbour": ("from blocks import Block", False),
    "a neighbour inside a function": ("def f():\n    import blocks", False),
    "a neighbouring package": ("import package.inner", False),
    "a neighbour with a library's name": ("import numpy", False),
    "a relative import": ("from . import blocks", False),
    "what is not there": ("import nothing_of_that_name", False),
    "a name made at run time": ("import importlib\nblocks = importlib.import_module('bl' + 'ocks')", False),
    "a builtin": ("blocks = __import__('blocks')", False),
    "code made at run time": ("exec(open('blocks.py').read())", False),
    "another path": ("import sys\nsys.path.append('..')\nimport torch", False),
    "torch's own words": ("import torch\nmodel = torch.compile(torch.nn.Linear(1, 1)).eval()", True),
    "no Python": ("import (", False),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_what_a_saved_file_may_import_to_be_known_by_itself(tmp_path: Path, name: str) -> None:
    """Its neighbours lie in the folder that it came from, beside which there is only the copy of the file."""
    text, alone = IMPORTS[name]
    home, saved = tmp_path / "home", tmp_path / "saved"
    for folder in (home / "package", saved):
        folder.mkdir(parents=True)
    for file in ["blocks.py", "package/inner.py", *(["numpy.py"] if "library's" in name else [])]:
        (home / file).write_text("")
    (saved / "own.py").write_text(text)
    assert _stands_alone({"file": "own.py", "imports_from": str(home)}, saved) == alone
    assert not _stands_alone({"file": None, "module": "own", "imports_from": None}, saved)
