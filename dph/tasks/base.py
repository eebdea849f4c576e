"""What a task is: one data set's fields, turned into conversations."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dph.chat import Message
from dph.data.sources import Kept, read_hub, read_jsonl
from dph.errors import UserError

Doc = Mapping[str, Any]
Label = int | float | None

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
    """Read a label that is a number, or text that spells a whole one; absent, empty or negative ones are hidden (None).

    Raises UserError where it is anything else.
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
    """``A. first``, ``B. second``, ... as the choices are listed in a question and given as answers."""
    return [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=False)]


def listed(texts: Iterable[str], letters: Iterable[str] = "ABCDEFGHIJ") -> str:
    """The block of a question that lists its choices, one per line."""
    return "Choices:\n" + "\n".join(lettered(texts, letters)) + "\n\nAnswer:"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One data set: where it lives, its fields, its prompt, its answers.

    A task with ``options`` is a choice: all options are scored, ``label`` says which is right (a float is rounded).
    Any other gives its ``right`` answers and, where there are some, its ``wrong`` ones.
    """

    name: str
    hub: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: SPLITS)  # our name -> the hub's
    evaluated: str = "validation"  # the split that the paper reports
    metric: str | None = None  # accuracy, f1 (with accuracy), matthews, pearson_spearman; None: not a choice
    fields: tuple[str, ...]  # that a record must have; the label may be absent
    system: str | Callable[[Doc], str] = INSTRUCTION
    # A format string over the fields, or a function, which may return a whole dialogue: user, assistant, ..., user.
    prompt: str | Callable[[Doc], str | list[str]]
    options: tuple[str, ...] | Callable[[Doc], Sequence[str]] | None = None
    label: Callable[[Doc], Label] | None = None
    right: Callable[[Doc], Sequence[str]] | None = None
    wrong: Callable[[Doc], Sequence[str]] | None = None
    keep: Callable[[Doc], bool] | None = None  # records that fail it are left out
    example: Doc  # one record, for people and for tests

    @property
    def paired(self) -> bool:
        """Whether right answers come with wrong ones, so that preference pairs can be made."""
        return self.options is not None or self.wrong is not None

    def targets(self, doc: Doc) -> list[list[Message]]:
        """Conversations that end in a right answer; none where the label is hidden."""
        self._check(doc)
        if self.options is None:
            return self._conversations(doc, self.right(doc))
        choices, gold = self.labelled(doc)
        return [] if gold is None else [choices[round(gold)]]

    def distractors(self, doc: Doc) -> list[list[Message]]:
        """Conversations that end in a wrong answer; none where the label is hidden or the task has no wrong answers."""
        self._check(doc)
        if self.options is None:
            return self._conversations(doc, self.wrong(doc) if self.wrong else [])
        choices, gold = self.labelled(doc)
        return [] if gold is None else [choice for i, choice in enumerate(choices) if i != round(gold)]

    def choices(self, doc: Doc) -> list[list[Message]]:
        """Conversations that end in each option, in the order of the labels; none where the task is not a choice."""
        self._check(doc)
        if self.options is None:
            return []
        return self._conversations(doc, self.options(doc) if callable(self.options) else self.options)

    def gold(self, doc: Doc) -> Label:
        """The reference: the right choice's index, a score, or None where it is hidden or the task is not a choice."""
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

    def labelled(self, doc: Doc) -> tuple[list[list[Message]], Label]:
        """The choices and the reference, where it is known. Raises UserError where the reference is none of them."""
        choices, gold = self.choices(doc), self.gold(doc)
        if gold is None:
            return choices, None
        if not 0 <= round(gold) < len(choices) or not (self.metric == "pearson_spearman" or gold == round(gold)):
            raise UserError(f"task {self.name}: expected one of the labels 0 to {len(choices) - 1}, got {gold}")
        return choices, gold

    def _conversations(self, doc: Doc, answers: Iterable[str]) -> list[list[Message]]:
        system = self.system(doc) if callable(self.system) else self.system
        prompt = self.prompt(doc) if callable(self.prompt) else self.prompt.format_map(doc)
        dialogue = [prompt] if isinstance(prompt, str) else prompt
        asked = [{"role": "system", "content": system}] + [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(dialogue)
        ]
        return [[*asked, {"role": "assistant", "content": answer}] for answer in answers]

    def documents(self, split: str, directory: str | Path | None = None) -> Sequence[Doc]:
        """The records of a split: from ``directory/<task>/<split>.jsonl``, or from the hub where none is given.

        Raises UserError where the split is unknown, the file is missing or malformed, or the hub cannot be read.
        """
        if split not in self.splits:
            raise UserError(f"task {self.name}: expected split {', '.join(self.splits)}, got {split!r}")
        if directory is not None:
            docs = list(read_jsonl(Path(directory) / self.name / f"{split}.jsonl"))
        else:
            docs = read_hub(self.hub, self.config, self.splits[split])
        return docs if self.keep is None else Kept(docs, self.keep)
