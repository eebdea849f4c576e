"""Sources of records: JSONL and text files, and hub data sets, as sequences that worker processes can unpickle."""

from __future__ import annotations

import json
import mmap
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from dph.data.formats import EXPECTED_FIELDS, Record, Text, parse_record
from dph.errors import UserError

# Longest text of a record, in characters; longer ones are split. A stream takes whole records: a corpus in one record
# would be read by every stream at once, and every checkpoint would hold the rest of it.
MAX_TEXT = 2**16


class JsonLines(Sequence):
    """Objects of a JSONL file, parsed when they are read; memory holds only the offsets of the lines.

    Raises UserError if ``path`` is not a regular file, and for a malformed line when it is read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            got = "nothing there"
            if self.path.is_dir():
                got = "a folder there"
            elif self.path.exists():  # a pipe can be read only once
                got = "something that is not a regular file (a pipe or device)"
            raise UserError(f"{path}: expected a JSONL file, got {got}")
        self._offsets, self._line_numbers = array("q"), array("q")
        with self.path.open("rb") as file:
            self._bytes = _map_file(file)
            offset = 0
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    self._offsets.append(offset)
                    self._line_numbers.append(number)
                offset += len(line)

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes but the mapped file, for another process."""
        return {key: value for key, value in self.__dict__.items() if key != "_bytes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the file in this process."""
        self.__dict__.update(state)
        with self.path.open("rb") as file:
            self._bytes = _map_file(file)

    def __len__(self) -> int:
        """Number of lines that are not blank."""
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the object of one line."""
        start = self._offsets[index]
        end = self._bytes.find(b"\n", start)
        try:
            fields = json.loads(self._bytes[start : end if end >= 0 else len(self._bytes)])
        except json.JSONDecodeError as error:
            reason = f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            raise UserError(f"{self.location(index)}: {reason}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{self.location(index)}: not UTF-8 at byte {error.start}") from None
        if not isinstance(fields, dict):
            raise UserError(f"{self.location(index)}: expected a JSON object, got {type(fields).__name__}")
        return fields

    def location(self, index: int) -> str:
        """Return FILE:LINE of an object, for error messages."""
        return f"{self.path}:{self._line_numbers[index]}"


def _map_file(file: BinaryIO) -> mmap.mmap | bytes:
    """Map a file into memory; an empty one, which cannot be mapped, gives no bytes."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Iterate over the objects of a JSONL file; blank lines are skipped. Raises UserError as ``JsonLines``."""
    return iter(JsonLines(path))


def read_text(path: str | Path) -> str:
    """Return the content of a UTF-8 text file. Raises UserError if it is missing or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def read_hub(name: str, config: str | None, split: str) -> Sequence[Mapping[str, Any]]:
    """Return a split of a Hugging Face data set, downloaded on first use. Raises UserError if it cannot be read."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"hub data set {name}: needs the datasets package: pip install -e '.[data]'") from None
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of the network, names, splits or formats: the data cannot be read in any case
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"hub data set {name}{f' ({config})' if config else ''}, split {split}: {reason}") from error


class Records(Sequence):
    """Base class of sized and indexable sequences of records.

    Worker processes unpickle them, so that they hold plain attributes rather than closures.
    """

    def __iter__(self) -> Iterator[Record | None]:
        """Iterate over all records; an IndexError raised in making one does not end the iteration silently."""
        for index in range(len(self)):
            yield self[index]


class JsonlRecords(Records):
    """Records of a JSONL file; a text longer than ``MAX_TEXT`` characters is several records.

    Every line is checked at once: a malformed line is an error now rather than hours into training.
    """

    def __init__(self, path: str | Path, kind: str, text_field: str) -> None:
        self._lines, self._kind, self._text_field = JsonLines(path), kind, text_field
        self._pieces: dict[int, list[Text]] = {}  # of lines with a long text
        records_per_line = array("q")
        for line in range(len(self._lines)):
            record = parse_record(self._lines[line], kind, self._lines.location(line), text_field)
            if isinstance(record, Text) and len(record.text) > MAX_TEXT:
                self._pieces[line] = split_text(record.text)
            records_per_line.append(len(self._pieces.get(line, "1")))
        self._size = sum(records_per_line)
        self._ends = array("q", accumulate(records_per_line) if self._pieces else ())  # of each line's records

    def __len__(self) -> int:
        """Number of records."""
        return self._size

    def __getitem__(self, index: int) -> Record:
        """Return one record."""
        line = index = range(self._size)[index]
        if self._pieces:
            line = bisect_right(self._ends, index)
            if line in self._pieces:
                return self._pieces[line][index - self._ends[line]]  # counted from the end of its pieces
        return parse_record(self._lines[line], self._kind, self._lines.location(line), self._text_field)


def text_records(path: str | Path, kind: str) -> list[Text]:
    """Return a text file as records. Raises UserError unless ``kind`` is "text"."""
    if kind != "text":
        raise UserError(f"{path}: expected a {kind}: {EXPECTED_FIELDS[kind]}; got plain text")
    return split_text(read_text(path))


def split_text(text: str) -> list[Text]:
    """Split a text after lines, else after spaces, into the longest records of at most ``MAX_TEXT`` characters.

    Only the last record teaches the end of the document.
    """
    records, start = [], 0
    while len(text) - start > MAX_TEXT:
        limit = start + MAX_TEXT
        end = limit
        for separator in ("\n", " "):
            position = text.rfind(separator, start, limit)
            if position > start:
                end = position + 1
                break
        records.append(Text(text[start:end], continues=True))
        start = end
    return [*records, Text(text[start:])]


class HubRecords(Records):
    """Records of a hub data set, ``name`` being NAME or NAME:CONFIG."""

    def __init__(self, name: str, kind: str, split: str, text_field: str) -> None:
        path, _, config = name.partition(":")
        self._rows = read_hub(path, config or None, split)
        self._name, self._kind, self._text_field = f"hub:{name}, {split}", kind, text_field

    def __len__(self) -> int:
        """Number of records."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        """Return one record."""
        index = range(len(self))[index]
        return parse_record(self._rows[index], self._kind, f"{self._name} record {index}", self._text_field)


class Concatenated(Records):
    """Several sequences of records end to end."""

    def __init__(self, parts: Sequence[Sequence[Record]]) -> None:
        self._parts, self._ends = parts, list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        """Number of records."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record | None:
        """Return one record."""
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        return self._parts[number][index - self._ends[number]]  # counted from the end of the part


class Limited(Records):
    """The first ``limit`` records of a sequence."""

    def __init__(self, records: Sequence[Record], limit: int) -> None:
        self._records, self._size = records, min(limit, len(records))

    def __len__(self) -> int:
        """Number of records."""
        return self._size

    def __getitem__(self, index: int) -> Record | None:
        """Return one record."""
        return self._records[range(self._size)[index]]
