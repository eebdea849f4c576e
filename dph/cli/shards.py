"""Results as a directory of JSON-lines files, ``part-00000-of-00016.jsonl`` and so on, each written by one worker.

A file has its name when it is complete; complete ones are not written again. The hidden file ``.command.json``
describes the command: no other command goes on with the directory.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from dph.cli import common, described
from dph.data import atomic
from dph.errors import UserError, add_note, shown_names

if TYPE_CHECKING:
    from dph.cli.results import Job

COMMAND = ".command.json"
TRIES = 4  # of one shard


class Shard(NamedTuple):
    """A file of the directory, and its records from ``start`` to ``stop``."""

    name: str
    start: int
    stop: int


def split(sizes: Sequence[int], count: int) -> list[Shard]:
    """Return ``count`` shards of whole batches, or one of each batch if there are fewer.

    Args:
        sizes: number of records of each batch.
    """
    count = min(count, len(sizes))
    bounds = list(accumulate(sizes, initial=0))
    ends = [bounds[len(sizes) * i // count] for i in range(count + 1)]
    return [Shard(f"part-{i:05}-of-{count:05}.jsonl", ends[i], ends[i + 1]) for i in range(count)]


def write(open_job: Callable[[], Job], path: Path, start: int, stop: int) -> None:
    """Write the lines of a shard's records to ``path``, unless the file is there.

    Raises RuntimeError if TRIES processes have been killed while they did: each has left a temporary file.
    """
    if path.exists():
        return
    killed = [file for file in path.parent.glob(f".{path.stem}*") if atomic.is_temporary(file)]
    if len(killed) >= TRIES:
        raise RuntimeError(
            f"{path}: expected a worker that completes it, got {len(killed)} that were killed (out of memory?)"
        )
    with atomic.atomic_file(path) as file:
        for lines in open_job().lines(start, stop):
            file.write("".join(f"{common.json_line(line)}\n" for line in lines).encode())


class Shards:
    """Directory of the results of a command, used as a context.

    Args:
        directory: value of ``--output``.
        about: JSON on which the results depend.
        shards: all files that the directory will have.
        resume: go on with the results of an interrupted command, if there are any.

    Raises UserError, on entry, for a directory with anything else in it, with results of another command or, without
    ``resume``, with any, and if another process uses it.
    """

    def __init__(self, directory: str, about: Mapping[str, Any], shards: Sequence[Shard], resume: bool) -> None:
        self.directory, self._about = Path(directory), {**about, "shards": len(shards)}
        self._shards, self._resume = shards, resume
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Shards:
        """Make the directory, or check the one that is there."""
        with self._stack:
            is_new = not self.directory.exists()
            if is_new:
                self.directory.mkdir()
            path = self.directory / COMMAND
            if not path.exists():
                if names := [file.name for file in self.directory.iterdir()]:
                    raise UserError(
                        f"--output: expected a new or empty directory, or one of an interrupted command, got "
                        f"{self.directory} with {shown_names(sorted(names))}"
                    )
                atomic.write_text(path, f"{common.json_line(self._about)}\n")
            file = self._stack.enter_context(path.open("rb"))
            described.lock(file, self.directory)
            saved = described.parse(file.readline())
            if "command" not in saved:
                raise UserError(f"{path}: expected the description of a command, got another file")
            if self._has_results() and not self._resume:
                raise UserError(
                    f"{self.directory}: results of a command are there: continue it with --resume, or delete the "
                    "directory"
                )
            if self._has_results():
                described.check_same(saved, self._about, self.directory)
            else:
                atomic.write_text(path, f"{common.json_line(self._about)}\n")
            self._delete_temporary()
            self._stack = self._stack.pop_all()
        return self

    def _has_results(self) -> bool:
        return any(self.directory.glob("part-*.jsonl"))

    def _delete_temporary(self) -> None:
        """Delete what killed workers have left."""
        for path in self.directory.iterdir():
            if atomic.is_temporary(path):
                path.unlink(missing_ok=True)

    def missing(self) -> list[Shard]:
        """Return the shards that have not been written."""
        return [shard for shard in self._shards if not (self.directory / shard.name).exists()]

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of all shards, in the order of the records."""
        for shard in self._shards:
            with (self.directory / shard.name).open("rb") as file:
                yield from map(json.loads, file)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete temporary files; a directory without results goes, too."""
        with self._stack:
            self._delete_temporary()
            if error is not None and self._has_results():
                add_note(error, f"the results so far are in {self.directory}: --resume continues")
            elif error is not None:
                (self.directory / COMMAND).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    os.rmdir(self.directory)
