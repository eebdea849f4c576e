"""Labels in the fields of a row.

| fields of a row | answers | labels |
|---|---|---|
| prompt, chosen, rejected | 2 | the first is better; with ``margin``, by that much |
| the same, ``rejected`` a list of n | 1 + n | the first is better than each other one, with weight 1 / n |
| prompt, completion, ``label`` | 1 | good (true, 1) or bad (false, 0) |
| prompt, completion, ``labels`` {head: label} | 1 | the same for each head by itself; null is no label |
| messages, ``label`` or ``labels`` | 1 | the same for the last answer |
| prompt, completions, ``scores`` | n | of each two the higher is better, by the difference; m pairs weigh 1 / m each |
| the same, ``scores`` {head: scores} | n | the same for each head by itself |

So the labels of a record that compares answers weigh as much as those of one pair, for each head that they name. Labels
and lists of completions may be JSON text, as in CSV.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

from dph.data.labels import Label
from dph.errors import UserError, shown

LABEL_FIELDS = frozenset(("label", "labels", "scores", "margin"))
# Field of the answers -> all fields that the record is made from.
USED_FIELDS = {
    "rejected": ("prompt", "system", "chosen", "rejected", "margin"),
    "completion": ("prompt", "system", "completion", "label", "labels"),
    "messages": ("system", "messages", "label", "labels"),
    "completions": ("prompt", "system", "completions", "scores"),
}


def find_labels(fields: Mapping[str, Any], where: str) -> tuple[str, list[Any], tuple[Label, ...]] | None:
    """Return the field of the answers in a row, the answers, and their labels; None if it has none or is a plain pair.

    With chosen and rejected the field is "rejected", and its answers follow the chosen one.

    Raises UserError that begins with ``where`` for a malformed label.
    """
    rejected, margin = fields.get("rejected"), _value(fields, "margin")
    if fields.get("chosen") is not None and rejected is not None:
        several = isinstance(rejected, list) and len(rejected) > 0 and not isinstance(rejected[0], Mapping)
        if not several and not margin:
            return None
        answers = rejected if several else [rejected]
        margin = 0.0 if margin is None else _number(margin, f"{where}: margin")
        count = len(answers)
        return "rejected", answers, tuple(Label(0, 1 + i, None, 1 / count, margin) for i in range(count))
    for name in ("completion", "messages"):
        if fields.get(name) is not None and (labels := _single_labels(fields, where)) is not None:
            return name, [fields[name]], labels
    if fields.get("completions") is not None and (scores := _value(fields, "scores")) is not None:
        completions = _value(fields, "completions")
        return "completions", completions, _score_labels(completions, scores, where)
    return None


def check_good(fields: Mapping[str, Any], where: str) -> None:
    """Raise UserError if a label marks the answer of a row as bad, for any head: it is not to be learnt as text.

    The ``label`` of a completion is good or bad; that of messages may also be another program's, such as a class.
    """
    label, labels = _value(fields, "label"), _value(fields, "labels")
    by_head = labels if isinstance(labels, Mapping) else {}
    for name, value in [("label", label), *((f"labels.{head}", value) for head, value in by_head.items())]:
        is_flag = isinstance(value, bool | int) and value in (0, 1)
        is_bad = not value if is_flag else name == "label" and fields.get("completion") is not None
        if value is not None and is_bad:
            raise UserError(
                f"{where}: {name}: expected true for an answer to learn (a filter of the source, as {{label: true}}, "
                f"leaves other rows out), got {shown(value)}"
            )


def _value(fields: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field, also of its JSON text, which may be spelled as in Python; empty text is None."""
    value = fields.get(name)
    if not isinstance(value, str):
        return value
    words = {"": None, "true": True, "false": False}
    word = value.strip().lower()
    if word in words:
        return words[word]
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _single_labels(fields: Mapping[str, Any], where: str) -> tuple[Label, ...] | None:
    """Return the labels on the completion of a row; None if it has none."""
    label, labels = _value(fields, "label"), _value(fields, "labels")
    if label is not None and labels is not None:
        raise UserError(f"{where}: expected either label or labels, got both")
    if label is not None:
        return (_single_label(label, None, f"{where}: label"),)
    if labels is None:
        return None
    found = []
    for head, value in _by_head(labels, f"{where}: labels", "true, false, 0 or 1"):
        found.append(_single_label(value, head, f"{where}: labels.{head}"))
    return tuple(found)


def _single_label(value: Any, head: str | None, where: str) -> Label:
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise UserError(f"{where}: expected true, false, 0 or 1, got {shown(value)}")
    return Label(0, None, head) if value else Label(None, 0, head)


def _score_labels(completions: Any, scores: Any, where: str) -> tuple[Label, ...]:
    """Return the pairs of completions with different scores."""
    if not isinstance(completions, list) or len(completions) < 2:
        raise UserError(f"{where}: completions: expected a list of at least two answers, got {shown(completions)}")
    by_head: list[tuple[str | None, Any]] = [(None, scores)]
    if isinstance(scores, Mapping):
        by_head = list(_by_head(scores, f"{where}: scores", "a list of numbers"))
    labels = []
    for head, values in by_head:
        place = f"{where}: scores" + ("" if head is None else f".{head}")
        if not isinstance(values, list) or len(values) != len(completions):
            raise UserError(
                f"{place}: expected {len(completions)} numbers, one for each completion, got {shown(values)}"
            )
        numbers = [_number(value, f"{place}.{i}") for i, value in enumerate(values)]
        ranked = []
        for i, j in itertools.permutations(range(len(numbers)), 2):
            if numbers[i] > numbers[j]:
                ranked.append((i, j, numbers[i] - numbers[j]))
        labels += [Label(i, j, head, 1 / len(ranked), margin) for i, j, margin in ranked]
    return tuple(labels)


def _by_head(values: Any, where: str, expected: str) -> list[tuple[str, Any]]:
    """Return the values of each head in a row, without null."""
    if not isinstance(values, Mapping) or all(value is None for value in values.values()):
        raise UserError(f"{where}: expected {expected} by the name of a head, got {shown(values)}")
    return [(head, value) for head, value in values.items() if value is not None]


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: expected a finite number, got {shown(value)}")
    return float(value)
