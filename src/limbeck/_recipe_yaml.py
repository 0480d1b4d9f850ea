"""YAML as people mean it: no duplicate keys, ``1e-3`` is a number, ``no`` is a word, and nothing is executed or unfolded without end."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from limbeck.errors import Problem, UsageError

MAX_BYTES = 1_000_000
MAX_ALIASES = 16
MAX_DEPTH = 40

_BOOL = "tag:yaml.org,2002:bool"
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_NULL = "tag:yaml.org,2002:null"
_MERGE = "tag:yaml.org,2002:merge"
# The core schema of YAML 1.2; PyYAML's own resolvers are those of 1.1, where `no` is False, `1e-3` text and `1:30` the number 90.
_RESOLVERS: tuple[tuple[str, str, str], ...] = (
    (_NULL, r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    (_BOOL, r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    (_INT, r"^[-+]?[0-9]+$", "-+0123456789"),
    (_FLOAT, r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+.0123456789"),
    (_MERGE, r"^<<$", "<"),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first in _RESOLVERS:
        for letter in first:
            table.setdefault("" if letter == "\0" else letter, []).append((tag, re.compile(pattern)))
    return table


class _Refused(yaml.MarkedYAMLError):
    """Something that YAML allows and a recipe does not."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._aliases = 0
        self._depth = 0
        self._open: set[str] = set()

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        if type(event) is yaml.AliasEvent:
            self._aliases += 1
            if self._aliases > MAX_ALIASES:
                raise _Refused(problem=f"more than {MAX_ALIASES} aliases (*name)", problem_mark=mark)
            if event.anchor in self._open:
                raise _Refused(problem=f"the alias *{event.anchor} stands inside what it names", problem_mark=mark)
            return super().compose_node(parent, index)
        if getattr(event, "tag", None) is not None:
            raise _Refused(problem=f"tags such as {event.tag!r} are not allowed in a recipe", problem_mark=mark)
        anchor = event.anchor
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Refused(problem=f"nested more than {MAX_DEPTH} levels deep", problem_mark=mark)
        if anchor:
            self._open.add(anchor)
        node = super().compose_node(parent, index)
        self._open.discard(anchor)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            self._refuse_duplicates(node)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_map(self, node: Any) -> Any:
        # The inherited method fills the mapping later, past the duplicates that flattening `<<` would bring in rightly.
        self._refuse_duplicates(node)
        yield from super().construct_yaml_map(node)

    def _refuse_duplicates(self, node: yaml.MappingNode) -> None:
        seen: dict[str, int] = {}
        if getattr(node, "checked", False):
            return
        node.checked = True  # type: ignore[attr-defined]
        for key, _ in node.value:
            mark = key.start_mark
            if key.tag == _MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused(problem="a key must be a word", problem_mark=mark)
            if key.tag in (_INT, _FLOAT, _BOOL, _NULL):
                raise _Refused(problem=f"a key must be a word, got {key.value or 'nothing'!r}", problem_mark=mark)
            if key.value in seen:
                raise _Refused(problem=f"the key '{key.value}' is given twice (first in line {seen[key.value]})", problem_mark=mark)
            seen[key.value] = mark.line + 1


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_yaml_map)


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)))


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor(_INT, _int)
_Loader.add_constructor(_FLOAT, _float)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


for _tag, _pattern, _first in _RESOLVERS:
    if _tag != _MERGE:
        _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), ["" if c == "\0" else c for c in _first])


def parse(text: str) -> Any:
    """The value of one YAML document; raises yaml.YAMLError, and ValueError for numbers beyond what Python reads."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def why(error: Exception) -> tuple[int | None, str]:
    """The line (from 1) and the sentence of what :func:`parse` raised."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line + 1 if mark is not None else None
    if isinstance(error, _Refused):
        return line, f"{error.problem}."
    parts = [getattr(error, "problem", None) or str(error).splitlines()[0], getattr(error, "context", None)]
    return line, f"this is not YAML: {', '.join(p for p in parts if p)}."


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file ``path``.

    Duplicate keys, tags and more than a few aliases are refused; ``1e-3`` is a float, ``yes``, ``no``, ``on`` and ``off`` are text, as are
    dates. Raises :class:`UsageError` with the line for whatever is wrong with the file.
    """
    name = str(path)
    try:
        if os.path.isdir(path):
            raise UsageError(Problem(name, "is a folder, expected a recipe file (YAML)."))
        with open(path, "rb") as f:
            raw = f.read(MAX_BYTES + 1)  # a device has no end
    except FileNotFoundError:
        raise UsageError(Problem(name, "no such file.", _neighbour(path))) from None
    except OSError as error:
        raise UsageError(Problem(name, f"cannot be read: {error.strerror or error}.")) from None
    if len(raw) > MAX_BYTES:
        raise UsageError(Problem(name, f"has more than {MAX_BYTES:,} bytes, which no recipe has."))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(Problem(name, f"is not a text file in UTF-8 (byte {error.start}).")) from None
    try:
        data = parse(text)
    except (yaml.YAMLError, ValueError) as error:
        line, sentence = why(error)
        raise UsageError(Problem(name if line is None else f"{name}, line {line}", sentence)) from None
    if data is None:
        raise UsageError(Problem(name, "is empty.", "`limbeck recipes` lists recipes to start from."))
    if not isinstance(data, dict):
        raise UsageError(Problem(name, f"holds {kind_of(data)}, expected a mapping of keys such as student: and data:."))
    return data


def dump(data: dict[str, Any]) -> str:
    """YAML of plain values, keys in the given order; :func:`parse` gives equal values back."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=100))


def kind_of(value: Any) -> str:
    """``a list``, ``a mapping``, ``a number`` ... for sentences."""
    if isinstance(value, bool):
        return "true or false"
    kinds = ((dict, "a mapping"), (list, "a list"), (str, "text"), (int, "a number"), (float, "a number"))
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


def _neighbour(path: Path) -> str:
    """The nearest file name in the folder where ``path`` should have been."""
    from limbeck.errors import nearest

    folder = path.parent
    try:
        names = [p.name for p in folder.iterdir()] if os.path.isdir(folder) else []
    except OSError:
        names = []
    return nearest(path.name, names[:2000])
