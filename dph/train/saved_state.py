"""Checks of a checkpoint's JSON state: a file made by hand is an error that names the key, not a wrong run."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dph.errors import UserError, shown
from dph.losses import IGNORED

LARGEST = 2**62  # of a count: no run takes as many records or tokens


def count(value: Any) -> bool:
    """Whether the value is a whole number from 0."""
    return type(value) is int and 0 <= value < LARGEST


def number(value: Any) -> bool:
    """Whether the value is a number, of any kind."""
    return type(value) in (int, float)


def amount(value: Any) -> bool:
    """Whether the value is a finite number from 0."""
    return number(value) and 0 <= value < math.inf


def _list_of(fits: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(fits, value))


def _numbers_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(number, value.values()))


def _best(value: Any) -> bool:
    if value is None:
        return True
    known = isinstance(value, dict) and value.keys() >= {"step", "figure", "value"}
    return known and count(value["step"]) and isinstance(value["figure"], str) and number(value["value"])


def _fingerprints(value: Any) -> bool:
    parts = {"sources": list, "sizes": list, "tokenizer": str, "model": str, "held_out": dict, "evaluation": list}
    known = isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in parts.items())
    return known and _list_of(count, len(value["sources"]))(value["sizes"])


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _section(value: Any) -> bool:
    return isinstance(value, dict)


def check(state: Mapping[str, Any], path: Path, metrics: int, vocabulary: int) -> None:
    """Raise UserError, which begins with ``path`` and the key, for a value that no run saves.

    Args:
        state: JSON state of a checkpoint.
        path: its file.
        metrics: number of metrics of a step, whose sums the state holds.
        vocabulary: number of tokens.
    """

    def require(section: Mapping[str, Any], prefix: str, key: str, fits: Callable[[Any], bool], kind: str) -> None:
        value = section[key]
        if not fits(value):
            raise UserError(f"{path}: {prefix}{key}: expected {kind}, got {shown(value)}")

    for key in ("optimiser", "data", "window", "generators"):
        require(state, "", key, _section, "a section with keys")
    guard = lambda value: _list_of(number, 4)(value) and amount(value[0]) and amount(value[3])  # noqa: E731
    require(state, "", "guard", guard, "4 numbers, the first and the last from 0")
    require(state, "", "forget", count, "a step")
    require(state, "", "evaluation", _numbers_by_name, "numbers by name")
    require(state, "", "best", _best, "null, or step, figure and value")
    if "evaluation_due" in state:
        require(state, "", "evaluation_due", _boolean, "true or false")
    if "fingerprints" in state:
        require(state, "", "fingerprints", _fingerprints, "digests of sources, tokenizer, model and held-out records")
    window = _Section(state["window"], path, "window")
    sums = _list_of(lambda value: value is None or number(value), metrics)
    require(window, "window.", "sums", sums, f"{metrics} numbers or null")
    for key in ("steps", "tokens", "all_tokens", "skipped"):
        require(window, "window.", key, count, "a whole number from 0")
    for key in ("seconds", "flops"):
        require(window, "window.", key, amount, "a finite number from 0")
    data = _Section(state["data"], path, "data")
    require(data, "data.", "records", _section, "a section with keys")
    records = _Section(data["records"], path, "data.records")
    require(records, "data.records.", "position", count, "a whole number from 0")
    sources = records.get("sources", [data["records"]])
    if not _list_of(_section)(sources):
        raise UserError(f"{path}: data.records.sources: expected a list of sections, got {shown(sources)}")
    for index, source in enumerate(sources):
        prefix = f"data.records.sources.{index}"
        for key in ("position", "size"):
            require(_Section(source, path, prefix), prefix + ".", key, count, "a whole number from 0")
    if sum(source["position"] for source in sources) != records["position"]:
        raise UserError(
            f"{path}: data.records.position: expected the sum of its sources' positions, got {records['position']}"
        )
    for key, others in (("tokens", ()), ("targets", (IGNORED,))):
        if key in data:
            fits = lambda token, others=others: type(token) is int and (0 <= token < vocabulary or token in others)  # noqa: E731
            require(data, "data.", key, _list_of(_list_of(fits)), f"lists of tokens below {vocabulary}")
    if "targets" in data and list(map(len, data["tokens"])) != list(map(len, data["targets"])):
        raise UserError(f"{path}: data.targets: expected as many as data.tokens, got other numbers")
    if "refused" in data:
        fits = lambda value: isinstance(value, dict) and all(map(count, value.values()))  # noqa: E731
        require(data, "data.", "refused", fits, "counts by reason")


class _Section(dict):
    """Section of a state, whose missing keys raise UserError with the file and the whole key."""

    def __init__(self, values: Mapping[str, Any], path: Path, key: str) -> None:
        super().__init__(values)
        self.path, self.key = path, key

    def __missing__(self, name: str) -> Any:
        raise UserError(f"{self.path}: {self.key}.{name}: expected a value, got nothing")


def resize(records: dict[str, Any], now: Mapping[str, Any]) -> None:
    """Give a sampler's saved state the sizes of the sources that a forced resume continues with; positions stay."""
    pairs = [(records, now)]
    if "sources" in records:
        pairs = list(zip(records["sources"], now["sources"], strict=False))
    for saved, current in pairs:
        saved["size"] = current["size"]
