"""Typed configuration: options with help and ranges, and errors that name the key.

An option is one field of a frozen dataclass: type, default, help, range, and whether it may change on resume.

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Batch:
        size: int = option(128, "sequences or pairs per step", minimum=1)

``build(Recipe, values)`` builds such dataclasses from plain dictionaries. An unknown key or a value of the wrong type
is a :class:`UserError` with the dotted key, the expected type and the value.
"""

import contextlib
import dataclasses
import difflib
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml

from dph.errors import UserError, printable, shown

REQUIRED = dataclasses.MISSING
UNIONS = (types.UnionType, typing.Union)  # X | None of a class, and of a Literal


# Options


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    below: float = math.inf,
    maximum: tuple[int, str] | None = None,
    resume: bool = False,
) -> Any:
    """Field of a section.

    Args:
        default: value if the key is missing; ``REQUIRED`` for none.
        help: description for users (:func:`describe`).
        minimum: least value (for a list, of each item); None for no range.
        below: exclusive upper bound of the range.
        maximum: the largest value that makes sense, and the reason.
        resume: whether a resumed run may change it.
    """
    metadata = {"help": help, "minimum": minimum, "below": below, "maximum": maximum, "resume": resume}
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type, *, resume: bool = False) -> Any:
    """Field that holds a section of options; its help is the docstring of ``cls``.

    With ``resume`` a resumed run may change all of its options.
    """
    return dataclasses.field(default_factory=cls, metadata={"help": cls.__doc__, "resume": resume})


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise UserError if a value in the section ``config``, or in one below it, is outside the range of its option."""
    for field in dataclasses.fields(config):
        key, value = _join(prefix, field.name), getattr(config, field.name)
        items = [(key, value)]
        if isinstance(value, tuple):
            items = [(f"{key}.{index}", item) for index, item in enumerate(value)]
        minimum, below = field.metadata.get("minimum"), field.metadata.get("below")
        maximum = field.metadata.get("maximum")
        for item_key, item in items:
            if dataclasses.is_dataclass(item):
                check_ranges(item, item_key)
            elif isinstance(item, str):  # a word that stands for a number
                continue
            elif minimum is not None and item is not None and not minimum <= item < below:
                raise UserError(f"{item_key}: expected {minimum} <= {field.name} < {below}, got {item}")
            elif maximum is not None and item is not None and item > maximum[0]:
                raise UserError(f"{item_key}: expected at most {maximum[0]} ({maximum[1]}), got {item}")


def may_change_on_resume(cls: type, prefix: str = "") -> frozenset[str]:
    """Return the dotted keys of the options, and of whole sections, that a resumed run may change."""
    keys: set[str] = set()
    for field in dataclasses.fields(cls):
        key = _join(prefix, field.name)
        if field.metadata["resume"]:
            keys.add(key)
        elif dataclasses.is_dataclass(field.default_factory):
            keys |= may_change_on_resume(field.default_factory, key)
    return frozenset(keys)


def describe(cls: type, prefix: str = "") -> str:
    """Return a text with key, type, default, range and help of every option below ``cls``."""
    blocks = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, kind = _join(prefix, field.name), hints[field.name]
        help_text = textwrap.fill(field.metadata["help"], 100, initial_indent="    ", subsequent_indent="    ")
        if dataclasses.is_dataclass(kind):
            resume = " may change on resume" if field.metadata["resume"] else ""
            blocks += [f"{key}:{resume}\n{help_text}", describe(kind, key)]
            continue
        item_kind = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
        notes = ["a list of sections" if dataclasses.is_dataclass(item_kind) else _name(kind)]
        minimum, below = field.metadata["minimum"], field.metadata["below"]
        if minimum is not None:
            notes.append(f"at least {minimum}" if below == math.inf else f"at least {minimum}, below {below}")
        if field.metadata["maximum"] is not None:
            notes.append(f"at most {field.metadata['maximum'][0]}")
        notes.append("required" if field.default is REQUIRED else f"default {_yaml_text(field.default)}")
        if field.metadata["resume"]:
            notes.append("may change on resume")
        blocks.append(f"{key}: {'; '.join(notes)}\n{help_text}")
        if dataclasses.is_dataclass(item_kind):
            blocks.append(describe(item_kind, f"{key}.N"))
    return "\n".join(blocks)


def _yaml_text(value: Any) -> str:
    """Return a default as in YAML, on one line."""
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(plain(value), default_flow_style=True).removesuffix("\n").removesuffix("\n...")


# Plain values to dataclasses and back


class _UnknownKey(Exception):
    """Unknown dotted key; :func:`build` adds a hint from all known keys."""


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """Return an instance of the dataclass ``cls``, with the types of all values checked."""
    try:
        return _build(cls, values, "")
    except _UnknownKey as error:
        key = str(error)
        raise UserError(f"{printable(key[:100], keep='')}: unknown key; {_hint(key[:100], cls)}") from None


def _build(cls: type, values: Any, prefix: str) -> Any:
    """Return an instance of ``cls``, the section at the dotted key ``prefix``."""
    fields = dataclasses.fields(cls)
    required = [field.name for field in fields if field.default is field.default_factory is REQUIRED]
    if isinstance(values, str) and len(required) == 1 and prefix:
        values = {required[0]: values}  # a bare text is short for the one required option
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix or 'recipe'}: expected a section with keys, got {shown(values)}")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise _UnknownKey(_join(prefix, str(name)))
    for name in required:
        if name not in values:
            raise UserError(f"{_join(prefix, name)}: expected {_name(hints[name])}, got nothing")
    return cls(**{name: _convert(hints[name], value, _join(prefix, name)) for name, value in values.items()})


def _convert(kind: Any, value: Any, key: str) -> Any:
    """Return ``value`` as the type ``kind``; UserError with the key, the expected type and the value."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:  # X | None, several types, or several | None
        if value is None and types.NoneType in args:
            return None
        alternatives = [alternative for alternative in args if alternative is not types.NoneType]
        if len(alternatives) == 1:
            return _convert(alternatives[0], value, key)
        for alternative in alternatives:
            with contextlib.suppress(UserError):
                return _convert(alternative, value, key)
        raise UserError(f"{key}: expected {_name(kind)}, got {shown(value)}")
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, key)
    if origin is tuple and isinstance(value, list | tuple) and (args[1] is Ellipsis or len(value) == len(args)):
        return tuple(_convert(args[0], item, f"{key}.{i}") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return value
    if origin is Literal and value in args and isinstance(value, str):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{key}: expected a number below 1e308, got {shown(value)}") from None
    if kind is int and type(value) is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{key}: expected a whole number of at most 64 bits, got {shown(value)}")
    if kind in (int, str, bool) and type(value) is kind:
        return value
    is_text_for_list = origin is tuple and args[0] is not float and isinstance(value, str)
    expected = _name(kind)
    if is_text_for_list:
        expected = f"a list, such as [{value}]" if len(value) < 40 and value.isprintable() else "a list"
    raise UserError(f"{key}: expected {expected}, got {shown(value)}")


def _name(kind: Any) -> str:
    """Return the name of a type in messages."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(args) if len(args) > 1 else args[0]
    if origin in UNIONS:
        *others, last = ["null" if kind is types.NoneType else _name(kind) for kind in args]
        return f"{', '.join(others)} or {last}"
    if origin is tuple:
        return f"a list of {_name(args[0])}" if args[1] is Ellipsis else f"a list of {len(args)} numbers"
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
    return names.get(kind, "a section with keys")


def _hint(key: str, cls: type) -> str:
    """Return a hint with the nearest known key: the same name in another section, or a similar spelling."""
    known = list(_keys(cls, ""))
    key = re.sub(r"\.\d+\b", "", key)  # known keys have no list indices
    name = key.split(".")[-1]
    same_name = [other for other in known if other.split(".")[-1] == name]
    nearest = same_name or difflib.get_close_matches(key, known, 1, 0.6)
    if nearest:
        return f"did you mean {nearest[0]}?"
    return f"known: {', '.join(other for other in known if '.' not in other)}"


def _keys(kind: Any, prefix: str) -> Iterator[str]:
    """Yield ``prefix`` and every dotted key below it; ``kind`` is its type."""
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    if prefix:
        yield prefix
    if dataclasses.is_dataclass(kind):
        for name, hint in typing.get_type_hints(kind).items():
            yield from _keys(hint, _join(prefix, name))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def plain(value: Any) -> Any:
    """Return ``value`` with all tuples, at any depth, as lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def model_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a ``ModelConfig`` that the network is made of, without those of ``LATER`` at their default.

    So neither fingerprints nor names of caches change for the models of earlier versions.
    """
    fields = {}
    defaults = {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    for name, parameter in inspect.signature(type(config)).parameters.items():
        if name not in ("max_position_embeddings", "released", "family", "family_fields", "kwargs"):
            value = getattr(config, name)
            if name not in LATER or value != defaults.get(name, parameter.default):
                fields[name] = value
    return fields


# Fields of ModelConfig that the first version lacked.
LATER = (
    "num_key_value_heads", "head_dim", "qk_norm", "norm", "qkv_bias", "out_bias", "ffn_bias", "embedding_projection",
    "rotary_scaling", "reward_layer", "reward_standardised", "reward_members", "task_head_forms",
)  # fmt: skip
