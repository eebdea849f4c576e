"""Where records lie: JSONL files and hub data sets, indexable and sized, with a place to name in errors."""

from __future__ import annotations

import json
import mmap
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dph.errors import UserError


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one per line; blank lines are skipped.

    Raises UserError where there is no such file, and with FILE:LINE where a line is not a JSON object.
    """
    return iter(JsonLines(path))


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 text file. Raises UserError where there is none, or it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def _other(path: Path) -> str:
    """What stands at ``path`` in a file's place; a pipe can be read once only, and lines are read when asked for."""
    if not path.exists():
        return "nothing there"
    return "a folder there" if path.is_dir() else "something that is not a regular file (a pipe or device)"


def _mapped(file: BinaryIO) -> mmap.mmap | bytes:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


class JsonLines(Sequence):
    """The objects of a JSONL file, parsed when asked for: only the lines' places are kept in memory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: expected a JSONL file, got {_other(self.path)}")
        self._starts, self._lines = array("q"), array("q")
        with self.path.open("rb") as file:
            self._bytes = _mapped(file)
            start = 0
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    self._starts.append(start)
                    self._lines.append(number)
                start += len(line)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: all but the mapped file, which it maps anew."""
        return {key: value for key, value in self.__dict__.items() if key != "_bytes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the file."""
        self.__dict__.update(state)
        with self.path.open("rb") as file:
            self._bytes = _mapped(file)

    def __len__(self) -> int:
        """How many lines are not blank."""
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The object of one line."""
        start = self._starts[index]
        end = self._bytes.find(b"\n", start)
        try:
            record = json.loads(self._bytes[start : end if end >= 0 else len(self._bytes)])
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.where(index)}: not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            ) from None
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(index)}: not UTF-8 at byte {error.start}") from None
        if not isinstance(record, dict):
            raise UserError(f"{self.where(index)}: expected a JSON object, got {type(record).__name__}")
        return record

    def where(self, index: int) -> str:
        """FILE:LINE of a record."""
        return f"{self.path}:{self._lines[index]}"


class Kept(Sequence):
    """The records of ``source`` that ``keep`` is true of."""

    def __init__(self, source: Sequence[Mapping[str, Any]], keep: Callable[[Mapping[str, Any]], bool]) -> None:
        self._source = source
        self._indices = array("q", (i for i, record in enumerate(source) if keep(record)))

    def __len__(self) -> int:
        """How many were kept."""
        return len(self._indices)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """One of the kept."""
        return self._source[self._indices[index]]


def read_hub(name: str, config: str | None, split: str) -> Sequence[Mapping[str, Any]]:
    """A split of a Hugging Face data set, downloaded on first use. Raises UserError with what is missing."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"hub data set {name}: needs the datasets package: pip install -e '.[data]'") from None
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # network, names, splits, formats: whatever it is, the data cannot be read
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"hub data set {name}{f' ({config})' if config else ''}, split {split}: {reason}") from error
