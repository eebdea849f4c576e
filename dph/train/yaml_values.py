"""Values of recipes and overrides from YAML, without its surprises.

Numbers are decimal: ``010`` is 10, ``1e-4`` is a number, and ``0x10``, ``1_000`` and ``1:30`` are text. Booleans are
true and false only, so that ``on`` and ``no`` are text, as dates are. Keys are text, and none may occur twice. Tags of
other types are refused, as are aliases (``*name``) that contain themselves or repeat too much.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dph.errors import UserError, printable, shown

MAX_CHARACTERS = 2**17  # of a text; the parser reads 100,000 or more a second
MAX_VALUES = 100_000  # after aliases are replaced by what they name
MAX_DEPTH = 50  # sections and lists in each other
TOO_DEEP = f"expected at most {MAX_DEPTH} sections and lists in each other, got more"

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_CONSTANTS = {"": None, "~": None, ".nan": math.nan, ".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf}
for _word, _constant in (("null", None), ("true", True), ("false", False)):
    _CONSTANTS |= dict.fromkeys((_word, _word.title(), _word.upper()), _constant)


class _Composer(yaml.SafeLoader):
    """YAML parser whose scalars have the tags "str" and, if they are plain, "value"; "merge" is the plain key <<."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}
    depth = 0  # of the current node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node and those in it. Raises _Refused for too many in each other."""
        if self.depth > MAX_DEPTH:
            raise _Refused(self.peek_event(), TOO_DEEP)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Composer.add_implicit_resolver(f"{_TAG}merge", re.compile("<<$"), ["<"])
_Composer.add_implicit_resolver(f"{_TAG}value", re.compile("", re.DOTALL), None)


def parse(text: str, name: str, numbered: bool = True) -> Any:
    """Return the value of a YAML text: dictionaries with text as keys, lists, text, numbers, booleans and None.

    Raises UserError that begins with ``name``, the file or key that the text comes from, and with the line if
    ``numbered``.
    """

    def refuse(line: int, reason: str) -> UserError:
        return UserError(f"{name}:{line + 1}: {reason}" if numbered else f"{name}: {reason}")

    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{name}: expected at most {MAX_CHARACTERS} characters of YAML, got {len(text)}")
    try:
        root = _Composer(text).get_single_node()
        return None if root is None else _Values().value(root)
    except _Refused as error:
        raise refuse(error.line, error.reason) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        raise refuse(line, f"expected YAML: the character {shown(chr(error.character))} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = printable(" ".join(filter(None, (error.context, error.problem))), keep="")[:200]
        raise refuse(mark.line if mark else 0, f"expected YAML: {problem}") from None
    except (ValueError, OverflowError) as error:  # of escapes and directives with numbers out of range
        raise UserError(f"{name}: expected YAML: {printable(str(error), keep='')[:200]}") from None


class _Refused(Exception):
    """A node that is valid YAML but not accepted; ``line`` counts from 0."""

    def __init__(self, node: yaml.Node | yaml.Event, reason: str) -> None:
        super().__init__(reason)
        self.line, self.reason = node.start_mark.line, reason


class _Values:
    """Conversion of one document; every alias gives a value of its own."""

    def __init__(self) -> None:
        self._count = 0
        self._open: list[yaml.Node] = []  # the nodes around the current one

    def value(self, node: yaml.Node) -> Any:
        """Return the value of a node. Raises _Refused."""
        self._count += 1
        if self._count > MAX_VALUES:
            raise _Refused(node, f"expected at most {MAX_VALUES} values with the aliases replaced, got more")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if any(outer is node for outer in self._open):
            raise _Refused(node, "expected no alias within what it names, got one that repeats without end")
        if len(self._open) == MAX_DEPTH:
            raise _Refused(node, TOO_DEEP)
        expected = "seq" if isinstance(node, yaml.SequenceNode) else "map"
        if node.tag != _TAG + expected:
            raise _refused_tag(node)
        self._open.append(node)
        if expected == "map":
            value: Any = self._mapping(node)
        else:
            value = [self.value(item) for item in node.value]
        self._open.pop()
        return value

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        """Return a section; its own keys go before those that it merges."""
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _Refused(key_node, "expected text as a key, got a list or a section")
            if key_node.tag == f"{_TAG}merge":
                for section in self._sections(value_node):
                    merged = section | merged
                continue
            if key_node.tag not in (f"{_TAG}str", f"{_TAG}value"):
                raise _refused_tag(key_node)
            key = key_node.value
            if key in lines:
                raise _Refused(key_node, f"the key {shown(key)} is there twice, first in line {lines[key] + 1}")
            lines[key] = key_node.start_mark.line
            values[key] = self.value(value_node)
        return merged | values

    def _sections(self, node: yaml.Node) -> Iterator[dict[str, Any]]:
        """Yield the sections that a merge key names: one, or a list of them."""
        value = self.value(node)
        for section in value if isinstance(value, list) else [value]:
            if not isinstance(section, dict):
                raise _Refused(node, f"expected a section to merge (<<), got {shown(section)}")
            yield section


def _scalar(node: yaml.ScalarNode) -> Any:
    """Return text, a number, a boolean or None."""
    text, tag = node.value, node.tag.removeprefix(_TAG)
    if tag in ("str", "merge"):
        return text
    if tag not in ("value", "null", "bool", "int", "float"):
        raise _refused_tag(node)
    value = _plain(node)
    accepted = {"null": (type(None),), "bool": (bool,), "int": (int,), "float": (int, float)}
    if tag != "value" and type(value) not in accepted[tag]:
        raise _Refused(node, f"expected YAML: {shown(text)} is not of its tag !!{tag}")
    return float(value) if tag == "float" else value


def _plain(node: yaml.ScalarNode) -> Any:
    """Return what a plain scalar means."""
    text = node.value
    if text.lower() in (".nan", ".inf", "+.inf", "-.inf"):
        text = text.lower()
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        if len(text) > 400:
            raise _Refused(node, f"expected a number of at most 400 digits, got one of {len(text)}")
        return int(text)
    if not _FLOAT.fullmatch(text):
        return text
    if math.isinf(float(text)):
        raise _Refused(node, f"expected a number below 1e308 or .inf, got {shown(text)}")
    return float(text)


def _refused_tag(node: yaml.Node) -> _Refused:
    """Return the error of a tag that names a type which recipes do not have."""
    tag = node.tag.replace(_TAG, "!!", 1)
    return _Refused(node, f"expected no tag but !!str and those of numbers, got {printable(tag, keep='')[:80]}")


# Files and overrides


def read(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file. Raises UserError, with the line, if it is not such a file."""
    try:
        with path.open("rb") as file:
            content = file.read(4 * MAX_CHARACTERS + 1)
        if len(content) > 4 * MAX_CHARACTERS:
            raise UserError(f"{path}: expected at most {MAX_CHARACTERS} characters of YAML, got more")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 at byte {error.start}") from None
    values = parse(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, got {type(values).__name__}")
    return values


def merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` updated with ``values``, section by section; lists are replaced as a whole."""
    merged = dict(base)
    for key, value in values.items():
        both_sections = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both_sections else value
    return merged


def override(values: dict[str, Any], text: str) -> None:
    """Apply one ``key.sub=value`` to ``values`` in place; a number as key is an index of a list."""
    key, equals, value_text = text.partition("=")
    if not equals or not key:
        raise UserError(f"override: expected key.sub=value, got {shown(text)}")
    if printable(key, keep="") != key or len(key) > 200:
        raise UserError(f"override: expected a key of at most 200 printable characters, got {shown(key)}")
    *parents, last = key.split(".")
    container: Any = values
    for name in parents:
        if isinstance(container, dict) and container.get(name) is None:
            container[name] = {}
        container = container[_index(container, name, key) if isinstance(container, list) else name]
        if not isinstance(container, dict | list):
            raise UserError(f"{key}: expected a section or a list at {name}, got {shown(container)}")
    value = parse(value_text, key, numbered=False)
    container[_index(container, last, key) if isinstance(container, list) else last] = value


def _index(items: list, name: str, key: str) -> int:
    """Return ``name``, a part of ``key``, as an index of ``items``."""
    if not name.isdecimal() or len(name) > 9 or int(name) >= len(items):
        raise UserError(f"{key}: expected a number below {len(items)}, got {name!r}")
    return int(name)
