"""Declaration of a task: a data set's fields, turned into conversations."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dph.errors import UserError

Doc = Mapping[str, Any]
Label = int | float | None
Messages = list[dict[str, str]]  # a conversation, as ``dph.chat`` takes it

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


def number(key: str) -> Callable[[Doc], Label]:
    """Return a function that reads a label: a number, or text that spells an integer.

    An absent, empty or negative label is hidden (None). Raises UserError for anything else.
    """

    def read(doc: Doc) -> Label:
        value = doc.get(key)
        if value is None or value == "":
            return None
        if isinstance(value, str) and value.strip().removeprefix("-").isdecimal():
            value = int(value)
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(f"{key}: expected a number, got {value!r}")
        return None if value < 0 else value

    return read


def lettered(texts: Iterable[str], letters: Iterable[str] = "ABCDEFGHIJ") -> list[str]:
    """Return ``A. first``, ``B. second``, ...: the form of choices in a question and as answers."""
    return [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=False)]


def listed(texts: Iterable[str], letters: Iterable[str] = "ABCDEFGHIJ") -> str:
    """Return the block of a question that lists its choices, one per line."""
    return "Choices:\n" + "\n".join(lettered(texts, letters)) + "\n\nAnswer:"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One data set: its source, fields, prompt and answers.

    A task with ``options`` is a choice: all options are scored, and ``label`` is the index of the right one (a float is
    rounded). Any other task has ``right`` answers, and some have ``wrong`` ones.
    """

    name: str
    hub: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: SPLITS)  # our name -> the hub's
    evaluated: str = "validation"  # the split that the paper reports
    metric: str | None = None  # accuracy, f1 (with accuracy), matthews, pearson_spearman; None: not a choice
    fields: tuple[str, ...]  # required in every document; the label may be absent
    system: str | Callable[[Doc], str] = INSTRUCTION
    # A format string over the fields, or a function, which may return a whole dialogue: user, assistant, ..., user.
    prompt: str | Callable[[Doc], str | list[str]]
    options: tuple[str, ...] | Callable[[Doc], Sequence[str]] | None = None
    label: Callable[[Doc], Label] | None = None
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
        self._check(doc)
        if self.options is None:
            return self._conversations(doc, self.right(doc))
        choices, gold = self.labelled(doc)
        return [] if gold is None else [choices[round(gold)]]

    def distractors(self, doc: Doc) -> list[Messages]:
        """Conversations that end in a wrong answer; none if the label is hidden or the task has no wrong answers."""
        self._check(doc)
        if self.options is None:
            return self._conversations(doc, self.wrong(doc) if self.wrong else [])
        choices, gold = self.labelled(doc)
        return [] if gold is None else [choice for i, choice in enumerate(choices) if i != round(gold)]

    def choices(self, doc: Doc) -> list[Messages]:
        """Conversations that end in each option, in the order of the labels; none if the task is not a choice."""
        self._check(doc)
        if self.options is None:
            return []
        return self._conversations(doc, self.options(doc) if callable(self.options) else self.options)

    def gold(self, doc: Doc) -> Label:
        """Reference: the index of the right choice or a score; None if it is hidden or the task is not a choice."""
        self._check(doc)
        try:
            return self.label(doc) if self.label else None
        except ValueError as error:
            raise UserError(f"task {self.name}: {error}") from error

    def _check(self, doc: Doc) -> None:
        if absent := [name for name in self.fields if name not in doc]:
            raise UserError(
                f"task {self.name}: expected the fields {', '.join(self.fields)}, "
                f"got a record with {', '.join(doc)} (no {', '.join(absent)})"
            )

    def labelled(self, doc: Doc) -> tuple[list[Messages], Label]:
        """Return choices and reference (None if hidden). Raises UserError for a reference that is no choice."""
        choices, gold = self.choices(doc), self.gold(doc)
        if gold is None:
            return choices, None
        if not 0 <= round(gold) < len(choices) or not (self.metric == "pearson_spearman" or gold == round(gold)):
            raise UserError(f"task {self.name}: expected one of the labels 0 to {len(choices) - 1}, got {gold}")
        return choices, gold

    def _conversations(self, doc: Doc, answers: Iterable[str]) -> list[Messages]:
        system = self.system(doc) if callable(self.system) else self.system
        prompt = self.prompt(doc) if callable(self.prompt) else self.prompt.format_map(doc)
        dialogue = [prompt] if isinstance(prompt, str) else prompt
        context = [{"role": "system", "content": system}]
        for i, text in enumerate(dialogue):
            context.append({"role": ("user", "assistant")[i % 2], "content": text})
        return [[*context, {"role": "assistant", "content": answer}] for answer in answers]
