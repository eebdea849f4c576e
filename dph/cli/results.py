"""Results of long commands: a file that grows batch by batch and can be continued, and progress on stderr.

While a command runs, its results are in ``NAME.partial`` next to the output ``NAME``: a line of JSON that describes the
command, then one for each record. The file is kept if the command is interrupted, so that ``--resume`` continues it. At
the end the lines of the records replace ``NAME``. Records are judged in the batches of an uninterrupted run, because
another batch would round differently: both give the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from dph.cli import common, described
from dph.data import atomic
from dph.errors import UserError, add_note, printable

if TYPE_CHECKING:
    from dph.chat import Encoded
    from dph.model.judging import Judged, JudgingModel

LINE_EVERY = 60.0  # seconds between lines of progress if stderr is not a terminal


def add_output(parser: argparse.ArgumentParser, content: str) -> None:
    """Add the options of a file for results; ``content`` describes it."""
    parser.add_argument("--output", metavar="FILE", help=f"write {content} to a JSONL file, which grows batch by batch")
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted command, whose results are in FILE.partial"
    )


class Results:
    """File of results of a command, used as a context that ends with the complete file.

    A pipe or device is written directly and cannot be resumed.

    Args:
        path: value of ``--output``; None writes nothing.
        about: JSON on which the results depend. A command is only resumed with the same.
        resume: continue the results of an interrupted command, if there are any.

    Raises UserError if there are results of another command, or if they were to be replaced without ``--resume``.
    """

    def __init__(self, path: str | None, about: Mapping[str, Any], resume: bool) -> None:
        self._path, self._about, self._resume = path, about, resume
        self._stack = contextlib.ExitStack()
        self._file: BinaryIO | None = None
        self._partial: Path | None = None
        self._has_results = False
        if path is not None and (target := atomic.replaceable(path)) is not None:
            self._partial = target.with_name(f"{target.name}.partial")
        elif resume:
            raise UserError(f"--resume: expected --output with a regular file, got {path or 'none'}")

    def __enter__(self) -> Results:
        """Open the file; results that are there have to be those of this command."""
        if self._path is None:
            return self
        if self._partial is None:
            self._file = self._stack.enter_context(atomic.atomic_file(self._path))
            return self
        with atomic.naming(self._path, self._partial), self._stack:
            descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            # Without a buffer: its content, which a full disk refused, would be written again when the file is closed.
            self._file = self._stack.enter_context(os.fdopen(descriptor, "r+b", buffering=0))
            described.lock(self._file, self._partial)
            self._begin()
            self._stack = self._stack.pop_all()
        return self

    def _begin(self) -> None:
        """Check the description of results that are there, or write one."""
        with self._partial.open("rb") as file:
            first = file.readline()
            self._has_results = file.readline().endswith(b"\n")
        saved = described.parse(first)
        if first and "command" not in saved:
            raise UserError(f"{self._partial}: expected results of an interrupted command, got another file")
        if self._has_results and not self._resume:
            raise UserError(
                f"{self._partial}: results of an interrupted command are there: continue it with --resume, or delete "
                "the file"
            )
        if self._has_results:
            described.check_same(saved, self._about, self._partial)
        else:
            self._file.truncate(0)
            try:
                self._write(common.json_line(self._about))
            except BaseException:
                self._partial.unlink(missing_ok=True)
                raise

    def keep(self, sizes: Sequence[int]) -> int:
        """Return how many records an interrupted command has completed, in whole batches; the file ends after them.

        Args:
            sizes: number of records of each batch of the whole command.
        """
        if self._partial is None:
            return 0
        count = 0
        with self._partial.open("rb") as file:
            end = len(file.readline())
            for size in sizes:
                batch = [len(line) for line in islice(file, size) if line.endswith(b"\n")]
                if len(batch) < size:
                    break
                count, end = count + size, end + sum(batch)
        self._file.truncate(end)
        self._file.seek(end)
        return count

    def saved(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield the lines of the first ``count`` records."""
        if count:
            with self._partial.open("rb") as file:
                yield from map(described.parse, islice(file, 1, count + 1))

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write the results of a batch."""
        if self._file is not None:
            with atomic.naming(self._path, self._partial):
                self._write(*map(common.json_line, lines))
                self._has_results = True

    def _write(self, *lines: str) -> None:
        data = memoryview("".join(f"{line}\n" for line in lines).encode())
        while data:
            data = data[self._file.write(data) :]
        self._file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Replace the output by the complete results, or keep what there is for ``--resume``."""
        if self._partial is None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if error is None:
                with self._partial.open("rb") as results, atomic.atomic_file(self._path) as file:
                    results.readline()
                    shutil.copyfileobj(results, file)
                self._partial.unlink()
            elif self._has_results:
                add_note(error, f"the results so far are in {self._partial}: --resume continues")
            else:
                self._partial.unlink(missing_ok=True)


def about_model(model: JudgingModel, tokenizer: Any, heads: Sequence[str]) -> dict[str, Any]:
    """Return what results depend on of a model: digests of weights and tokenizer, names of heads, device and dtype."""
    from dph.model.head_file import backbone_digest
    from dph.train.fingerprints import of_config, of_tokenizer

    return {
        "model": backbone_digest(model),
        "configuration": of_config(model.config),
        "tokenizer": of_tokenizer(tokenizer),
        "heads": list(heads),
        "device": model.device.type,
        "dtype": str(model.dtype),
    }


@dataclass(frozen=True)
class Job:
    """Records of a command, and the lines of the output that are made from them.

    Attributes:
        name: of the command.
        total: number of records.
        sizes: returns the number of records of each batch. Only whole batches are resumed, or given to a worker.
        lines: yields the lines from one record to another (start, stop), both at bounds of batches; those of several
            records at a time.
        about: JSON on which the lines depend.
    """

    name: str
    total: int
    sizes: Callable[[], Sequence[int]]
    lines: Callable[[int, int], Iterator[list[dict[str, Any]]]]
    about: Mapping[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def written(
    job: Job, path: str | None = None, resume: bool = False, quiet: bool = False
) -> Iterator[Iterator[dict[str, Any]]]:
    """Iterator over the lines of a job, those that an interrupted command has completed first.

    A line is written to ``path`` before it is yielded; other arguments as those of :class:`Results` and
    :class:`Progress`.
    """
    with Results(path, job.about, resume) as output, Progress(job.name, job.total, quiet) as progress:
        yield _written(job, output, progress)


def _written(job: Job, output: Results, progress: Progress) -> Iterator[dict[str, Any]]:
    done = output.keep(job.sizes())
    progress.begin(done)
    yield from output.saved(done)
    for lines in job.lines(done, job.total):
        output.add(lines)
        progress.advance(len(lines))
        yield from lines


def judging(
    name: str,
    total: int,
    model: JudgingModel,
    groups: Callable[[int], Iterator[Sequence[Encoded]]],
    line: Callable[[int, Judged], dict[str, Any]],
    place: Callable[[int], str],
    about: Mapping[str, Any] | None = None,
) -> Job:
    """Return the job that judges all records.

    All of them are encoded for the sizes of the batches, so that one that cannot be, or that is longer than the model's
    context, is an error before the first is judged.

    Args:
        name, total, about: see :class:`Job`.
        groups: returns the encoded alternatives of the records from an index on.
        line: returns a record's line of the output, given its index.
        place: returns the name of a record, given its index, for errors.
    """
    from dph.data.packing import batches
    from dph.model.judging import MAX_TOKENS

    context = getattr(model.backbone, "context", None) or model.config.max_position_embeddings

    def fitting() -> Iterator[Sequence[Encoded]]:
        for i, group in enumerate(groups(0)):
            longest = max(map(len, group))
            if context is not None and longest > context:
                raise UserError(f"{place(i)}: expected at most {context} tokens, the model's context, got {longest}")
            yield group

    def sizes() -> list[int]:
        return [len(batch) for batch in batches(fitting(), MAX_TOKENS)]

    def lines(start: int, stop: int) -> Iterator[list[dict[str, Any]]]:
        for batch in model.judge_batches(islice(groups(start), stop - start), MAX_TOKENS):
            yield [line(start + i, judged) for i, judged in enumerate(batch)]
            start += len(batch)

    return Job(name, total, sizes, lines, {} if about is None else about)


class Progress:
    """Records completed on stderr: a bar on a terminal, otherwise a line a minute.

    Args:
        name: of the command.
        total: number of records.
        quiet: print nothing.
    """

    def __init__(self, name: str, total: int, quiet: bool = False) -> None:
        self._name, self._total, self._done = name, total, 0
        self._begun = self._shown = time.monotonic()
        self._before = 0  # records of an interrupted command
        self._quiet, self._bar = quiet, None
        if not quiet and sys.stderr.isatty():
            from dph.train.progress import Bar

            self._bar = Bar(name, total, 0)

    def begin(self, count: int) -> None:
        """Count records that an interrupted command has completed; the first other one begins."""
        self._before, self._begun = count, time.monotonic()
        self.advance(count)

    def advance(self, count: int) -> None:
        """Count records."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if self._quiet:
            return
        if now - self._shown >= LINE_EVERY and self._done > self._before:
            self._shown = now
            per_second = (self._done - self._before) / (now - self._begun)
            minutes, seconds = divmod(round((self._total - self._done) / per_second), 60)
            left = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
            line = f"{self._name}: {self._done:,} of {self._total:,} records, {per_second:.3g} a second, {left}"
            print(printable(line), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        """Return itself."""
        return self

    def close(self) -> None:
        """Leave the bar on the terminal."""
        if self._bar is not None:
            self._bar.close()

    def __exit__(self, *_: object) -> None:
        """See :meth:`close`."""
        self.close()
