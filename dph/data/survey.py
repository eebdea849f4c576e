"""A look at data before training: contents of rows, rows that training would refuse, and suspicious ones.

Rows are read one after another. Held in memory are a few numbers for each, the places of the first problems, and a
sample of records for lengths in tokens.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dph.chat import Message
from dph.data import conversions
from dph.data.formats import (
    LABELLED,
    Conversation,
    Encoder,
    Preference,
    Record,
    Text,
    answer_form,
    parse_record,
    shown_fields,
)
from dph.data.labels import Labelled
from dph.data.overlap import digest
from dph.data.rows import SourceRows, open_source, text_options
from dph.data.sampler import draw
from dph.data.sources import prompt_key
from dph.errors import UserError

SAMPLE = 2000  # records whose tokens are counted
SHOWN = 20  # places of each kind of problem
QUANTILES = {"shortest": 0.0, "median": 0.5, "95 %": 0.95, "longest": 1.0}
# Kinds of what may be wrong in rows that training takes, with their explanations.
SUSPICIONS = {
    "duplicate": "the same record as an earlier one",
    "identical sides": "chosen and rejected are the same: left out of training",
    "different prompts": "chosen and rejected answer different prompts",
    "contradiction": "another pair prefers the other one of these two answers",
    "held out": "the prompt is among the held-out ones",
    "too long": "more tokens than a record may have (of the sample)",
}


@dataclass
class Survey:
    """Findings in the rows of some sources.

    Attributes:
        rows: number of rows.
        forms: rows by form: "preference", "labelled answers", "conversation", "text" or "refused".
        roles, turns: messages by role, and conversations by their number of messages.
        labels: rows by ``label``.
        ignored: fields with a value that no record depends on, and their number of rows.
        problems: of each reason without its place, number of rows and the first places.
        suspicions: keys of ``SUSPICIONS``, with number of rows and the first places.
        longer_chosen: pairs whose chosen answer is longer, shorter, or as long in characters as the rejected one.
        tokens: lengths of the sample in tokens, by quantile; None without a tokenizer.
        characters: lengths of all records in characters, by quantile.
    """

    rows: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    problems: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    suspicions: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    longer_chosen: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, int] | None = None
    characters: dict[str, int] | None = None

    @property
    def refused(self) -> int:
        """Number of rows that training would refuse."""
        return sum(count for count, _ in self.problems.values())


class Surveyor:
    """Reads sources into a :class:`Survey`.

    Args:
        tokenizer: for lengths in tokens; None for none.
        max_tokens: longest record that is not "too long".
        seed: of the sample.
    """

    def __init__(self, tokenizer: Any = None, max_tokens: int = 2048, seed: int = 0) -> None:
        self.survey = Survey()
        self._tokenizer, self._max_tokens, self._seed = tokenizer, max_tokens, seed
        self._sources: list[SourceRows] = []
        # Of each accepted row: its number, and 64-bit digests of the record and of its prompt. Of each pair: the number
        # of its row, and digests of its two orders.
        self._numbers, self._records, self._prompts = array("q"), array("Q"), array("Q")
        self._pairs, self._orders, self._reversed = array("q"), array("Q"), array("Q")
        self._unlike = array("q")  # numbers of the rows of pairs with two prompts
        self._lengths = array("q")
        self._sample: list[tuple[int, Record]] = []

    def read(self, spec: str | Path, **options: Any) -> Iterator[int]:
        """Read a source as ``dph.data.rows.open_source`` takes it; yield the number of rows so far.

        Raises UserError if it cannot be read at all.
        """
        rows, form = open_source(spec, **options), text_options(**options)
        self._sources.append(rows)
        for i in range(len(rows)):
            self._read_row(rows, i, form)
            self.survey.rows += 1
            yield self.survey.rows

    def finish(self, held_out: Iterable[tuple[str | Path, Mapping[str, Any]]] = ()) -> Survey:
        """Return the survey, after comparing all rows with each other and with the prompts of held-out sources.

        Args:
            held_out: sources and their options, as of ``read``.
        """
        survey = self.survey
        numbers, records = np.array(self._numbers), np.array(self._records)
        first = np.zeros(len(records), dtype=bool)
        first[np.unique(records, return_index=True)[1]] = True
        self._suspect("duplicate", numbers[~first])
        pairs, orders = np.array(self._pairs), np.array(self._orders)
        same = orders == np.array(self._reversed)
        self._suspect("identical sides", pairs[same])
        self._suspect("different prompts", np.array(self._unlike))
        contradicted = np.isin(np.array(self._reversed), orders) & ~same
        self._suspect("contradiction", pairs[contradicted])
        known = Surveyor()
        for spec, options in held_out:
            for _ in known.read(spec, **options):
                pass
        self._suspect("held out", numbers[np.isin(np.array(self._prompts), np.array(known._prompts))])
        survey.characters = _quantiles(np.array(self._lengths))
        if self._tokenizer is not None:
            survey.tokens = self._count_tokens()
        return survey

    def _read_row(self, rows: SourceRows, index: int, text_form: Mapping[str, Any]) -> None:
        """Count a row, or what is wrong with it."""
        survey, where = self.survey, rows.location(index)
        ignored: set[str] = set()
        try:
            fields = rows.fields(index)
            form, record = _record(fields, where, ignored, **text_form)
        except UserError as error:
            self._add(survey.problems, str(error).removeprefix(where).lstrip(": "), where)
            survey.forms["refused"] += 1
            return
        survey.forms[form] += 1
        survey.ignored.update(ignored)
        if fields.get("label") is not None:
            survey.labels[str(fields["label"]).lower()] += 1
        self._numbers.append(survey.rows)
        self._records.append(digest(_content(record)))
        self._prompts.append(digest(prompt_key(record)))
        self._lengths.append(_characters(record))
        if isinstance(record, Preference):
            chosen, rejected = (side[-1]["content"] for side in (record.chosen, record.rejected))
            before = [repr(side[:-1]) for side in (record.chosen, record.rejected)]
            self._pairs.append(survey.rows)
            if before[0] != before[1]:
                self._unlike.append(survey.rows)
            self._orders.append(digest(repr((before[0], chosen, before[1], rejected))))
            self._reversed.append(digest(repr((before[1], rejected, before[0], chosen))))
            order = (len(chosen) > len(rejected)) - (len(chosen) < len(rejected))
            survey.longer_chosen[("as long", "longer", "shorter")[order]] += 1
        if (messages := _messages(record)) is not None:
            survey.turns[len(messages)] += 1
            for message in messages:
                survey.roles[message["role"]] += 1
        self._keep(record)

    def _keep(self, record: Record) -> None:
        """Keep a record for the sample, in which each has the same chance to be."""
        count = len(self._numbers)
        if count <= SAMPLE:
            self._sample.append((self.survey.rows, record))
        elif (place := draw(count, self._seed, "sample", count)) < SAMPLE:
            self._sample[place] = (self.survey.rows, record)

    def _count_tokens(self) -> dict[str, int] | None:
        """Return quantiles of the sample's lengths in tokens; pairs have that of their longer side."""
        encoder, lengths, long = Encoder(self._tokenizer), [], []
        for number, record in self._sample:
            try:
                encoded = encoder(record)
            except UserError as error:  # of the tokenizer's chat template
                self._add(self.survey.problems, str(error), self.location(number))
                continue
            lengths.append(max(map(len, encoded)) if isinstance(encoded, tuple) else len(encoded))
            if lengths[-1] > self._max_tokens:
                long.append(number)
        self._suspect("too long", np.array(sorted(long), dtype=np.int64))
        return _quantiles(np.array(lengths))

    def location(self, number: int) -> str:
        """Return FILE:LINE of a row, by its number among all rows."""
        for rows in self._sources:
            if number < len(rows):
                return rows.location(number)
            number -= len(rows)
        raise IndexError(number)

    def _suspect(self, kind: str, numbers: np.ndarray) -> None:
        if len(numbers):
            self.survey.suspicions[kind] = len(numbers), [self.location(int(number)) for number in numbers[:SHOWN]]

    def _add(self, found: dict[str, tuple[int, list[str]]], reason: str, where: str) -> None:
        count, places = found.get(reason, (0, []))
        found[reason] = count + 1, places if count >= SHOWN else [*places, where]


def _record(
    fields: Mapping[str, Any], where: str, ignored: set[str], text_field: str, rendered: bool
) -> tuple[str, Record]:
    """Return the form of a row, and its record; a bad answer (``label: false``) counts as a conversation."""
    options: dict[str, Any] = {"text_field": text_field, "rendered": rendered, "ignored": ignored}
    own = conversions.own_fields(fields, where, with_tools=True)
    present = {name for name, value in own.items() if value is not None}
    if not present.isdisjoint(("labels", "scores", "completions")) or isinstance(own.get("rejected"), list):
        record = parse_record(fields, LABELLED, where, **options)
        return "labelled answers" if isinstance(record, Labelled) else "preference", record
    form = answer_form(own)
    if form is None and text_field not in present:
        raise UserError(
            f"{where}: expected {text_field}, messages, prompt and completion, or chosen and rejected, got "
            f"the fields {shown_fields(fields)}"
        )
    form = form or ("conversation" if rendered else "text")
    if form == "conversation" and "label" in present and fields["label"] in (False, True, 0, 1):
        fields = {name: value for name, value in fields.items() if name != "label"}
    return form, parse_record(fields, form, where, **options)


def _content(record: Record) -> str:
    """Return a record as one text."""
    if isinstance(record, Preference):
        return repr((record.chosen, record.rejected))
    if isinstance(record, Labelled):
        return repr((record.answers, record.labels))
    return repr(record.messages) if isinstance(record, Conversation) else record.text


def _messages(record: Record) -> list[Message] | None:
    """Return the conversation of a record, that of its first answer if it has several; None for a text."""
    if isinstance(record, Text):
        return None
    if isinstance(record, Labelled):
        return record.answers[0]
    return record.chosen if isinstance(record, Preference) else record.messages


def _characters(record: Record) -> int:
    messages = _messages(record)
    if messages is None:
        return len(record.text)
    return sum(len(message["content"]) for message in messages)


def _quantiles(lengths: np.ndarray) -> dict[str, int] | None:
    """Return the quantiles of ``QUANTILES``; None without lengths."""
    if not len(lengths):
        return None
    return {name: int(np.quantile(lengths, share, method="nearest")) for name, share in QUANTILES.items()}
