"""Few-shot prompts: answered records of a task in front of its question, as earlier turns of the conversation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dph.chat import Message
from dph.data.dataset import task_documents
from dph.data.sampler import draw
from dph.errors import UserError
from dph.tasks import Task

SPLITS = ("fewshot", "train")  # the first that a task has
SUBJECT = "subject"  # field of MMLU; a question has demonstrations of its own subject


class Demonstrations:
    """The same ``shots`` records in front of every question, or of every question of a subject.

    They are drawn by ``seed`` from the split for few-shot prompts (MMLU's development split), else from the training
    split; of a subject with no more records than that, all are taken in their order. A question that is among them,
    as in a file of the user that has no other split, has another record in its place.

    Raises UserError if there are too few records.
    """

    def __init__(self, task: Task, shots: int, directory: str | Path | None, seed: int = 0) -> None:
        self._task, self._shots, self._digest = task, shots, ""
        self._groups: dict[Any, list[tuple[Mapping[str, Any], list[Message]]]] = {}  # records and their turns
        self._split = next((name for name in SPLITS if name in task.splits), None)
        self._by_subject = self._split == SPLITS[0]
        if not shots:
            return
        if self._split is None:
            raise UserError(f"--shots: expected tasks with a training split, got {task.name}")
        try:
            documents = task_documents(task, self._split, directory)
        except UserError as error:
            raise UserError(f"--shots: {error}") from error
        self._digest = documents.fingerprint()
        groups: dict[Any, list[int]] = {}
        for i in range(len(documents)):
            groups.setdefault(self._group(documents[i]), []).append(i)
        for group, indices in groups.items():
            if len(indices) > shots:
                indices = sorted(indices, key=lambda i: draw(2**32, seed, "shots", task.name, i))[: shots + 1]
                indices = [*sorted(indices[:shots]), indices[shots]]
            self._check_count(len(indices), group)
            self._groups[group] = []
            for i in indices:
                answered = task.targets(documents[i])
                if not answered:
                    raise UserError(f"--shots: {documents.location(i)}: expected a label, got none")
                turns = [message for message in answered[0] if message["role"] != "system"]
                self._groups[group].append((documents[i], turns))

    def before(self, document: Mapping[str, Any], conversations: Sequence[list[Message]]) -> list[list[Message]]:
        """Return the conversations of a record with the demonstrations after their system message."""
        if not self._shots:
            return list(conversations)
        group = self._group(document)
        if group not in self._groups:
            raise UserError(f"--shots: expected demonstrations of {SUBJECT} {group}, got none")
        others = [turns for shown, turns in self._groups[group] if shown != document]
        self._check_count(len(others), group, " besides the question")
        turns = list(itertools.chain.from_iterable(others[: self._shots]))
        found = []
        for conversation in conversations:
            first = int(conversation[0]["role"] == "system")
            found.append([*conversation[:first], *turns, *conversation[first:]])
        return found

    def fingerprint(self) -> str:
        """Return a digest of the records that are drawn from; empty without demonstrations."""
        return self._digest

    def _check_count(self, count: int, group: Any, besides: str = "") -> None:
        if count < self._shots:
            where = f"{self._task.name}, {self._split}" + (f", {SUBJECT} {group}" if self._by_subject else "")
            raise UserError(f"--shots: expected at least {self._shots} records in {where}{besides}, got {count}")

    def _group(self, document: Mapping[str, Any]) -> Any:
        return document.get(SUBJECT) if self._by_subject else None
