"""Declaration of a task: a data set's fields, turned into conversations."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dph.errors import UserError, check_text, shown, shown_names

Doc = Mapping[str, Any]
Label = int | float | None
Messages = list[dict[str, str]]  # a conversation, as ``dph.chat`` takes it
# Check of a field's value, given its name: raises UserError that begins with the name.
Kind = Callable[[Any, str], None]
LETTERS = "ABCDEFGHIJ"

INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
INSTRUCTION_OPTIONS = INSTRUCTION.removesuffix(".") + " using the provided answer options."
CHOOSE = (
    "Below is a question, paired with multiple choices. Respond with the choice that correctly answers the question."
)
CHOOSE_IN_CONTEXT = CHOOSE.replace("with multiple", "with a background context and multiple")

SPLITS = {"train": "train", "validation": "validation", "test": "test"}
TRAIN = {"train": "train"}
TRAIN_VALIDATION = {"train": "train", "validation": "validation"}
HELD_OUT = {"validation": "validation", "test": "test"}


# Kinds of fields


def text(value: Any, name: str) -> None:
    """Check a text."""
    if type(value) is not str or not value.isascii():  # ASCII text, the common case, has no lone surrogate
        check_text(value, name)


def text_or_null(value: Any, name: str) -> None:
    """Check a text that may be missing from a record."""
    if value is not None:
        text(value, name)


def one_of(*words: str) -> Kind:
    """Return the check of a text that is one of ``words``."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, str) or value not in words:
            raise UserError(f"{name}: expected {' or '.join(words)}, got {shown(value)}")

    return check


def texts(minimum: int = 1, maximum: int | None = None) -> Kind:
    """Return the check of a list of texts with a range of lengths."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise UserError(f"{name}: expected a list of texts, got {shown(value)}")
        if len(value) < minimum:
            raise UserError(f"{name}: expected at least {minimum} text, got none")
        if maximum is not None and len(value) > maximum:
            raise UserError(f"{name}: expected at most {maximum} texts, got {len(value)}")
        for i, item in enumerate(value):
            if type(item) is not str or not item.isascii():
                text(item, f"{name}[{i}]")

    return check


def object_of(**kinds: Kind) -> Kind:
    """Return the check of an object with fields of these kinds, and possibly others."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, Mapping):
            raise UserError(f"{name}: expected an object with {' and '.join(kinds)}, got {shown(value)}")
        for key, kind in kinds.items():
            if key not in value:
                raise UserError(f"{name}: expected an object with {' and '.join(kinds)}, got one without {key}")
            kind(value[key], f"{name}.{key}")

    return check


def fields_of(*names: str, **kinds: Kind) -> dict[str, Kind]:
    """Return a task's fields: ``names`` are texts."""
    return {**dict.fromkeys(names, text), **kinds}


# References


@dataclass(frozen=True)
class Reference:
    """The field of the right answer and the function that reads it: an index from 0, or a score; None if hidden.

    The function raises UserError for a value of the wrong type.
    """

    key: str
    read: Callable[[Doc], Label]
    first: int = 0  # the first option's number in the data


def number(key: str, first: int = 0) -> Reference:
    """Return a reference that is a number, or text that spells an integer; the first option has the number ``first``.

    An absent, empty or negative label is hidden (None).
    """

    def read(doc: Doc) -> Label:
        value = doc.get(key)
        if value is None or value == "":
            return None
        if isinstance(value, str) and len(value) < 20 and value.strip().removeprefix("-").isdecimal():
            value = int(value)
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not abs(value) < math.inf:
            raise UserError(f"{key}: expected a number, got {shown(value)}")
        return None if value < 0 else value - first

    return Reference(key, read, first)


def letter(key: str, labels: Callable[[Doc], Sequence[str]]) -> Reference:
    """Return a reference that is one of ``labels`` of the document. An absent or empty one is hidden (None)."""

    def read(doc: Doc) -> Label:
        value = doc.get(key)
        if value is None or value == "":
            return None
        known = list(labels(doc))
        if not isinstance(value, str) or value not in known:
            raise UserError(f"{key}: expected one of {shown_names(known)}, got {shown(value)}")
        return known.index(value)

    return Reference(key, read)


def number_or_letter(key: str, options: str) -> Reference:
    """Return a reference that is a number from 0, or the letter of one of the field ``options``."""
    by_number = number(key)
    by_letter = letter(key, lambda doc: LETTERS[: len(doc[options])])

    def read(doc: Doc) -> Label:
        value = doc.get(key)
        is_letter = isinstance(value, str) and value.isalpha()
        return by_letter.read(doc) if is_letter else by_number.read(doc)

    return Reference(key, read)


def lettered(texts: Iterable[str], letters: Iterable[str] = LETTERS) -> list[str]:
    """Return ``A. first``, ``B. second``, ...: the form of choices in a question and as answers."""
    return [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=False)]


def listed(texts: Iterable[str], letters: Iterable[str] = LETTERS) -> str:
    """Return the block of a question that lists its choices, one per line."""
    return "Choices:\n" + "\n".join(lettered(texts, letters)) + "\n\nAnswer:"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One data set: its source, fields, prompt and answers.

    A task with ``options`` is a choice: all options are scored, and ``label`` is the index of the right one (a float is
    rounded). Any other task has ``right`` answers, and some have ``wrong`` ones.
    """

    name: str
    file: Path | None = None  # of the user: a file or folder of rows, in place of the hub
    definition: str = ""  # of the user: digest of the YAML file that describes the task
    hub: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: SPLITS)  # our name -> the hub's
    evaluated: str = "validation"  # the split that the paper reports
    metric: str | None = None  # accuracy, f1 (with accuracy), matthews, pearson_spearman; None: not a choice
    read: frozenset[str] = frozenset()  # of the user: all fields that the task reads; others are reported
    fields: Mapping[str, Kind]  # required in every document; the label may be absent
    rule: Callable[[Doc], None] | None = None  # raises UserError for fields that contradict each other
    system: str | Callable[[Doc], str] = INSTRUCTION
    # A format string over the fields, or a function, which may return a whole dialogue: user, assistant, ..., user.
    prompt: str | Callable[[Doc], str | list[str]]
    options: tuple[str, ...] | Callable[[Doc], Sequence[str]] | None = None
    label: Reference | None = None
    right: Callable[[Doc], Sequence[str]] | None = None
    wrong: Callable[[Doc], Sequence[str]] | None = None
    keep: Callable[[Doc], bool] | None = None  # documents for which it is false are left out
    example: Doc  # one document, for readers and tests

    @property
    def paired(self) -> bool:
        """Whether the task has wrong answers too, so that it gives preference pairs."""
        return self.options is not None or self.wrong is not None

    def targets(self, doc: Doc) -> list[Messages]:
        """Conversations that end in a right answer; none if the label is hidden."""
        return self.answers(doc, with_wrong=False)[0]

    def distractors(self, doc: Doc) -> list[Messages]:
        """Conversations that end in a wrong answer; none if the label is hidden or the task has no wrong answers."""
        return self.answers(doc)[1]

    def answers(self, doc: Doc, with_wrong: bool = True) -> tuple[list[Messages], list[Messages]]:
        """Return ``targets`` and ``distractors``, or no distractors, from one check of the document."""
        if self.options is None:
            self.check(doc)
            wrong = self.wrong(doc) if with_wrong and self.wrong else []
            return self._conversations(doc, self.right(doc)), self._conversations(doc, wrong)
        choices, gold = self.labelled(doc)
        if gold is None:
            return [], []
        right = round(gold)
        return [choices[right]], choices[:right] + choices[right + 1 :]

    def choices(self, doc: Doc) -> list[Messages]:
        """Conversations that end in each option, in the order of the labels; none if the task is not a choice."""
        self._check_fields(doc)
        return self._conversations(doc, self._options(doc))

    def question(self, doc: Doc) -> Messages:
        """Messages before an answer."""
        self._check_fields(doc)
        return self._conversations(doc, [""])[0][:-1]

    def gold(self, doc: Doc) -> Label:
        """Reference: the index of the right choice or a score; None if it is hidden or the task is not a choice."""
        return self.check(doc)

    def labelled(self, doc: Doc) -> tuple[list[Messages], Label]:
        """Return choices and reference (None if hidden)."""
        gold = self.check(doc)
        return self._conversations(doc, self._options(doc)), gold

    def check(self, doc: Doc) -> Label:
        """Check every field and return the reference.

        Raises UserError, which names the task and the field, for a missing field, a value of the wrong type, fields
        that contradict each other, and a reference that is none of the choices.
        """
        self._check_fields(doc)
        if self.label is None:
            return None
        try:
            gold = self.label.read(doc)
        except UserError as error:
            raise UserError(f"task {self.name}: {error}") from None
        if gold is None:
            return None
        count = len(self._options(doc))
        whole = self.metric == "pearson_spearman" or gold == round(gold)
        if not 0 <= round(gold) < count or not whole:
            key, first = self.label.key, self.label.first
            raise UserError(
                f"task {self.name}: {key}: expected one of the labels {first} to {first + count - 1}, "
                f"got {shown(doc[key])}"
            )
        return gold

    def _check_fields(self, doc: Doc) -> None:
        if not isinstance(doc, Mapping):
            raise UserError(f"task {self.name}: expected a record with fields, got {shown(doc)}")
        if absent := [name for name in self.fields if name not in doc]:
            raise UserError(
                f"task {self.name}: expected the fields {', '.join(self.fields)}, "
                f"got a record with {shown_names(doc)} (no {', '.join(absent)})"
            )
        try:
            for name, kind in self.fields.items():
                kind(doc[name], name)
            if self.rule is not None:
                self.rule(doc)
        except UserError as error:
            raise UserError(f"task {self.name}: {error}") from None

    def _options(self, doc: Doc) -> Sequence[str]:
        """Return the answers of a choice; none if the task is not a choice."""
        return self.options(doc) if callable(self.options) else self.options or ()

    def _conversations(self, doc: Doc, answers: Iterable[str]) -> list[Messages]:
        system = self.system(doc) if callable(self.system) else self.system
        prompt = self.prompt(doc) if callable(self.prompt) else self.prompt.format_map(doc)
        dialogue = [prompt] if isinstance(prompt, str) else prompt
        context = [{"role": "system", "content": system}]
        for i, text in enumerate(dialogue):
            context.append({"role": ("user", "assistant")[i % 2], "content": text})
        return [[*context, {"role": "assistant", "content": answer}] for answer in answers]
