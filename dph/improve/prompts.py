"""Prompts of the improvement loop, and the lines of files that grow prompt by prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dph.chat import Message
from dph.data import atomic
from dph.data.sampler import draw
from dph.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer.

    Attributes:
        messages: of the conversation; the last one is not the assistant's.
        row: what a checker reads, such as the row of a file, with ``reference`` answers.
        place: name for error messages, such as FILE:LINE.
    """

    messages: list[Message]
    row: Mapping[str, Any]
    place: str

    @property
    def key(self) -> str:
        """Text that prompts of equal messages share."""
        return json.dumps(self.messages, sort_keys=True)


def split(prompts: Sequence[Prompt], share: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts to train on, and those of a ``share``, drawn by ``seed`` and prompt alone."""
    train, held_out = [], []
    for prompt in prompts:
        is_held_out = draw(2**32, seed, "held out", prompt.key) < share * 2**32
        (held_out if is_held_out else train).append(prompt)
    return train, held_out


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return a digest of the prompts and their rows, not of their places."""
    digest = blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(f"{prompt.key} {json.dumps(prompt.row, sort_keys=True, default=str)}\n".encode())
    return digest.hexdigest()


def grow(
    path: Path,
    prompts: Sequence[Prompt],
    size: int,
    make: Callable[[Sequence[Prompt]], Sequence[Mapping[str, Any]]],
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON lines, one for each prompt; those that are missing are made and written.

    The file grows as ``NAME.partial`` and gets its name when it is complete. A process that was killed has written
    whole batches, which are not made again.

    Args:
        path: of the file.
        prompts: of the lines.
        size: prompts of a batch.
        make: returns the lines of a batch.
        progress: called with the number of lines that are there, after each batch.

    Raises UserError if the file has more or fewer lines than prompts.
    """
    if not path.exists():
        partial = path.with_name(f"{path.name}.partial")
        with open(partial, "ab+") as file:
            done = _keep_batches(file, len(prompts), size)
            progress(done)
            while done < len(prompts):
                batch = prompts[done : done + size]
                lines = [json.dumps(line, allow_nan=False) + "\n" for line in make(batch)]
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
                done += len(batch)
                progress(done)
        partial.replace(path)
        atomic.sync(path.parent)
    lines = list(_lines(path))
    if len(lines) != len(prompts):
        raise UserError(f"{path}: expected {len(prompts)} lines, one for each prompt, got {len(lines)}")
    return lines


def _keep_batches(file: Any, total: int, size: int) -> int:
    """Cut a file after its last whole batch, and return its number of lines."""
    file.seek(0)
    ends, end = [0], 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        end += len(line)
        ends.append(end)
    done = min(len(ends) - 1, total)
    if done < total:
        done -= done % size
    file.truncate(ends[done])
    return done


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
