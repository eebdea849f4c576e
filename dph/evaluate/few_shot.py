"""Few-shot prompts: answered records of a task in front of its question, as earlier turns of the conversation."""

from __future__ import annotations

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
    split; of a subject with no more records than that, all are taken in their order.

    Raises UserError if there are too few records.
    """

    def __init__(self, task: Task, shots: int, directory: str | Path | None, seed: int = 0) -> None:
        self._turns: dict[Any, list[Message]] = {}
        split = next((name for name in SPLITS if name in task.splits), None)
        self._by_subject = split == SPLITS[0]
        if not shots:
            return
        if split is None:
            raise UserError(f"--shots: expected tasks with a training split, got {task.name}")
        documents = task_documents(task, split, directory)
        groups: dict[Any, list[int]] = {}
        for i in range(len(documents)):
            groups.setdefault(self._group(documents[i]), []).append(i)
        for group, indices in groups.items():
            if len(indices) > shots:
                chosen = set(sorted(indices, key=lambda i: draw(2**32, seed, "shots", task.name, i))[:shots])
                indices = [i for i in indices if i in chosen]
            if len(indices) < shots:
                where = f"{task.name}, {split}" + (f", {SUBJECT} {group}" if self._by_subject else "")
                raise UserError(f"--shots: expected at least {shots} records in {where}, got {len(indices)}")
            turns: list[Message] = []
            for i in indices:
                answered = task.targets(documents[i])
                if not answered:
                    raise UserError(f"--shots: {documents.location(i)}: expected a label, got none")
                turns += [message for message in answered[0] if message["role"] != "system"]
            self._turns[group] = turns

    def before(self, document: Mapping[str, Any], conversations: Sequence[list[Message]]) -> list[list[Message]]:
        """Return the conversations of a record with the demonstrations after their system message."""
        if not self._turns:
            return list(conversations)
        turns = self._turns.get(self._group(document))
        if turns is None:
            raise UserError(f"--shots: expected demonstrations of {SUBJECT} {self._group(document)}, got none")
        found = []
        for conversation in conversations:
            first = int(conversation[0]["role"] == "system")
            found.append([*conversation[:first], *turns, *conversation[first:]])
        return found

    def _group(self, document: Mapping[str, Any]) -> Any:
        return document.get(SUBJECT) if self._by_subject else None
