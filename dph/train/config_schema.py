"""Typed configuration from YAML: files, overrides, and errors that name the key.

``build(Recipe, values)`` makes frozen dataclasses from plain dictionaries. An unknown key or a value of the wrong type
is a :class:`UserError` with the dotted key, what was expected and what came.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from dph.errors import UserError

UNIONS = (types.UnionType, typing.Union)  # of classes, and of what typing makes (Literal)


class _Loader(yaml.SafeLoader):
    """YAML with the floats that people write: 1e-4 is a number here, and text in YAML 1.1."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file."""
    values = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, got {type(values).__name__}")
    return values


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: expected YAML: {' '.join(str(error).split())}") from None


def merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``values`` over ``base``, key by key; lists are replaced whole."""
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def override(values: dict[str, Any], text: str) -> None:
    """Apply ``key.sub=value``; a number as key counts in a list."""
    key, equals, value_text = text.partition("=")
    if not equals or not key:
        raise UserError(f"override: expected key.sub=value, got {text!r}")
    *path, last = key.split(".")
    place: Any = values
    for part in path:
        place = _step(place, part, key)
    value = _parse(value_text, key)
    place[_index(place, last, key) if isinstance(place, list) else last] = value


def _step(place: dict | list, part: str, key: str) -> Any:
    """One key further down; a section that is not there yet is made."""
    if isinstance(place, dict) and place.get(part) is None:
        place[part] = {}
    found = place[_index(place, part, key) if isinstance(place, list) else part]
    if not isinstance(found, dict | list):
        raise UserError(f"{key}: expected a section or a list at {part}, got {found!r}")
    return found


def _index(place: list, part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise UserError(f"{key}: expected a number below {len(place)}, got {part!r}")
    return int(part)


class _UnknownKey(Exception):
    """Raised deep down, answered where all keys are known."""


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of the dataclass ``cls``, checked key by key."""
    try:
        return _build(cls, values, "")
    except _UnknownKey as error:
        raise UserError(f"{error}: unknown key; {_hint(str(error), cls)}") from None


def _build(cls: type, values: Any, where: str) -> Any:
    """An instance of ``cls``, which stands at the dotted key ``where``."""
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if isinstance(values, str) and len(required) == 1 and where:
        values = {required[0]: values}  # a bare text stands for the one field that is needed
    if not isinstance(values, Mapping):
        raise UserError(f"{where or 'recipe'}: expected a section with keys, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise _UnknownKey(_join(where, str(key)))
    for key in required:
        if key not in values:
            raise UserError(f"{_join(where, key)}: expected {_name(hints[key])}, got nothing")
    return cls(**{key: _convert(hints[key], value, _join(where, key)) for key, value in values.items()})


def _convert(kind: Any, value: Any, key: str) -> Any:
    """``value`` as ``kind``; UserError naming the key, what was expected and what came."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:  # X | None
        return None if value is None else _convert(args[0], value, key)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, key)
    if origin is tuple and isinstance(value, list | tuple) and (args[1] is Ellipsis or len(value) == len(args)):
        return tuple(_convert(args[0], item, f"{key}.{i}") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return value
    if origin is Literal and value in args and isinstance(value, str):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    names = origin is tuple and args[0] is not float  # of which one may be given in a list's place
    wanted = f"a list, such as [{value}]" if names and isinstance(value, str) else _name(kind)
    raise UserError(f"{key}: expected {wanted}, got {value!r}")


def _name(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin in UNIONS:
        return f"{_name(args[0])} or null"
    if origin is tuple:
        return f"a list of {_name(args[0])}" if args[1] is Ellipsis else f"a list of {len(args)} numbers"
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
    return names.get(kind, "a section with keys")


def _hint(key: str, cls: type) -> str:
    """The known key that is nearest to ``key``: one of the same name elsewhere, or one spelt alike."""
    known = list(_keys(cls, ""))
    key = re.sub(r"\.\d+\b", "", key)  # places in lists have no part in names
    same_name = [other for other in known if other.split(".")[-1] == key.split(".")[-1]]
    nearest = same_name or difflib.get_close_matches(key, known, 1, 0.6)
    return f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(k for k in known if '.' not in k)}"


def _keys(kind: Any, where: str) -> Iterator[str]:
    """Every dotted key below ``kind``."""
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    if where:
        yield where
    if dataclasses.is_dataclass(kind):
        for name, hint in typing.get_type_hints(kind).items():
            yield from _keys(hint, _join(where, name))


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def plain(value: Any) -> Any:
    """Tuples to lists, all the way down."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
