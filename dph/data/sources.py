"""Sources of records: JSONL and text files, and hub data sets, as sequences that worker processes can unpickle."""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

from dph.chat import Encoded
from dph.data.formats import EXPECTED_FIELDS, Record, Text, parse_record
from dph.data.sampler import read
from dph.errors import UserError, shown

# Longest text of a record, in characters; longer ones are split. A stream takes whole records: a corpus in one record
# would be read by every stream at once, and every checkpoint would hold the rest of it.
MAX_TEXT = 2**16
DIGEST = 16  # bytes of a fingerprint
FINGERPRINTED = 256  # records in memory that their fingerprint depends on


class JsonLines(Sequence):
    """Objects of a JSONL file, parsed when they are read; memory holds offset, number and checksum of each line.

    A line that is read later must be what it was when the file was opened, also for the processes that unpickle this
    object; another program may append lines, which are not read. Lines are read by system calls, since a mapped file
    that another program truncates kills the process. A file that is deleted or replaced under its name stays readable
    for the process that has it open.

    Args:
        path: a regular file.
        keep_open: False opens the file for every line, for folders of more files than a process may hold open.
        visit: called with the number, from 1, and the object of each line while the file is read for the first time.

    Raises UserError if ``path`` is not a regular file, and for a malformed line when it is parsed.
    """

    def __init__(
        self,
        path: str | Path,
        keep_open: bool = True,
        visit: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> None:
        self.path, self._keep_open = Path(path), keep_open
        self._offsets, self._line_numbers, self._checksums = array("q"), array("q"), array("I")
        offset = 0
        with _naming(self.path), _open_regular(self.path) as file:
            for number, line in enumerate(file, 1):
                if data := line.rstrip():
                    self._offsets.append(offset)
                    self._line_numbers.append(number)
                    self._checksums.append(crc32(data))
                    if visit is not None:
                        visit(number, self._parse(data, len(self) - 1, _strict))
                offset += len(line)
            self._descriptor = os.dup(file.fileno()) if keep_open else None
        if keep_open:
            weakref.finalize(self, os.close, self._descriptor)
        self._offsets.append(offset)  # the end of the last line

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes but the open file, for another process."""
        return {key: value for key, value in self.__dict__.items() if key != "_descriptor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the file in this process. Raises UserError if it is gone."""
        self.__dict__.update(state)
        self._descriptor = None
        if self._keep_open:
            with _naming(self.path):
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        """Number of lines that are not blank."""
        return len(self._line_numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the object of one line."""
        index = range(len(self))[index]
        return self._parse(self._read(index), index, _strict)

    def visited(self, index: int) -> dict[str, Any]:
        """Return the object of one line that has been visited before; ``index`` is at least 0."""
        line = self._read(index)
        try:
            return _decode(line.decode() if self._offsets[index] else line.decode("utf-8-sig"))
        except RecursionError:  # called from deeper down than when it was visited
            return self._parse(line, index, _decode)

    def location(self, index: int) -> str:
        """Return FILE:LINE of an object, for error messages."""
        return f"{self.path}:{self._line_numbers[index]}"

    def fingerprint(self) -> str:
        """Return a digest of the checksums of all lines, the ends of lines and blank lines aside."""
        return blake2b(self._checksums.tobytes(), digest_size=DIGEST).hexdigest()

    def _read(self, index: int) -> bytes:
        """Return the bytes of one line. Raises UserError if they are not what they were."""
        start = self._offsets[index]
        size = self._offsets[index + 1] - start  # with the blank lines that follow
        try:
            if self._descriptor is None:
                with self.path.open("rb", buffering=0) as file:
                    data = read_at(file.fileno(), size, start)
            else:
                data = os.pread(self._descriptor, size, start)
                if len(data) < size:
                    data += read_at(self._descriptor, size - len(data), start + len(data))
        except OSError as error:
            raise UserError(f"{self.location(index)}: {error.strerror or error}") from None
        line = data.rstrip()
        if crc32(line) != self._checksums[index]:
            got = "other bytes" if len(data) == size else "a shorter file"
            raise UserError(
                f"{self.location(index)}: the file changed during the run: expected the line as it was at the start, "
                f"got {got}"
            )
        return line

    def _parse(self, line: bytes, index: int, decode: Callable[[str], Any]) -> dict[str, Any]:
        """Return the JSON object in ``line``; a byte order mark may begin the file."""
        try:
            fields = decode(line.decode() if self._offsets[index] else line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 at byte {error.start}"
        except json.JSONDecodeError as error:
            reason = f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        except _NotJson as error:
            reason = f"not JSON: {error}"
        except RecursionError:
            reason = "expected a JSON object, got one that is nested too deeply to read"
        except ValueError:  # of int()
            reason = "expected numbers of at most 4300 digits, got an integer of more"
        else:
            if isinstance(fields, dict):
                return fields
            reason = f"expected a JSON object, got {type(fields).__name__}"
        raise UserError(f"{self.location(index)}: {reason}")


def read_at(descriptor: int, size: int, start: int) -> bytes:
    """Return ``size`` bytes of a file, fewer if it ends before; one system call reads at most 2 GiB."""
    parts = []
    while size:
        part = os.pread(descriptor, size, start)
        if not part:
            break
        parts.append(part)
        size, start = size - len(part), start + len(part)
    return b"".join(parts)


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file. Raises UserError for anything else."""
    if not path.is_file():
        got = "nothing there"
        if path.is_dir():
            got = "a folder there"
        elif path.exists():  # a pipe can be read only once
            got = "something that is not a regular file (a pipe or device)"
        raise UserError(f"{path}: expected a JSONL file, got {got}")
    return path.open("rb")


@contextlib.contextmanager
def _naming(place: str | Path) -> Iterator[None]:
    """Turn errors of the operating system into UserError that begins with ``place``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place}: {error.strerror or error}") from None


class _NotJson(ValueError):
    """Something that Python's parser accepts but JSON does not, or that would be dropped silently."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises _NotJson for a key that is there twice: all but the last would be dropped."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise _NotJson(f"the key {shown(key)} is there twice")
            seen.add(key)
    return fields


def _refuse_constant(name: str) -> Any:
    """Raise _NotJson for NaN, Infinity and -Infinity."""
    raise _NotJson(f"{name} is no JSON number")


_strict = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant).decode
_decode = json.JSONDecoder().decode  # twice as fast, for what the strict one has accepted


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
        before = error.object[: error.start]
        line, byte = before.count(b"\n") + 1, len(before) - (before.rfind(b"\n") + 1)
        raise UserError(f"{path}:{line}: not UTF-8 at byte {byte}") from None


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

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a short digest of the content that the records are made from, whatever its path and dates."""


def fingerprint(records: Sequence[Any]) -> str:
    """Return a short digest of the content of records: of a source, or of any sequence in memory.

    A sequence of the user's may have a method ``fingerprint`` of its own, for example if reading a record is slow.
    That of a list or tuple depends on all records, that of another sequence on its length and on at most
    ``FINGERPRINTED`` records, the first and last among them; a record that is of no kind of ``dph.data.formats`` counts
    only by its type.
    """
    own = getattr(records, "fingerprint", None)
    if callable(own):
        return own()
    size = len(records)
    digest = blake2b(f"{size} records".encode(), digest_size=DIGEST)
    sampled = size if isinstance(records, list | tuple) else min(size, FINGERPRINTED)
    for i in range(sampled):
        record = records[i * (size - 1) // max(sampled - 1, 1)]
        known = record is None or isinstance(record, Record | Encoded | tuple)
        digest.update((repr(record) if known else type(record).__qualname__).encode(errors="surrogatepass"))
    return digest.hexdigest()


def combined_fingerprint(*parts: object) -> str:
    """Return the fingerprint of something that is made of ``parts``."""
    return blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=DIGEST).hexdigest()


class JsonlRecords(Records):
    """Records of a JSONL file; a text longer than ``MAX_TEXT`` characters is several records.

    Every line is checked at once: a malformed line is an error now rather than hours into training.
    """

    def __init__(self, path: str | Path, kind: str, text_field: str, keep_open: bool = True) -> None:
        self._kind, self._text_field = kind, text_field
        self._pieces: dict[int, list[Text]] = {}  # of lines with a long text
        records_per_line = array("q")

        def check_line(number: int, fields: dict[str, Any]) -> None:
            record = parse_record(fields, kind, f"{path}:{number}", text_field)
            if isinstance(record, Text) and len(record.text) > MAX_TEXT:
                self._pieces[len(records_per_line)] = split_text(record.text)
            records_per_line.append(len(self._pieces.get(len(records_per_line), "1")))

        self._lines = JsonLines(path, keep_open, check_line)
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
        return parse_record(self._lines.visited(line), self._kind, self._lines.location(line), self._text_field)

    def fingerprint(self) -> str:
        """Return a digest of the file."""
        return self._lines.fingerprint()


class TextRecords(Records):
    """Records of a text file, held in memory. Raises UserError unless ``kind`` is "text"."""

    def __init__(self, path: str | Path, kind: str) -> None:
        if kind != "text":
            raise UserError(f"{path}: expected a {kind}: {EXPECTED_FIELDS[kind]}; got plain text")
        text = read_text(path)
        self._digest = blake2b(text.encode(), digest_size=DIGEST).hexdigest()
        self._pieces = split_text(text)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._pieces)

    def __getitem__(self, index: int) -> Text:
        """Return one record."""
        return self._pieces[index]

    def fingerprint(self) -> str:
        """Return a digest of the text."""
        return self._digest


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

    def fingerprint(self) -> str:
        """Return a digest of the data set's name, split and size, and of its own fingerprint."""
        return combined_fingerprint(self._name, rows_fingerprint(self._rows))


def rows_fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a digest of the size and the own fingerprint of a hub data set."""
    return combined_fingerprint(len(rows), getattr(rows, "_fingerprint", None))


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

    def fingerprint(self) -> str:
        """Return a digest of all parts in their order."""
        return combined_fingerprint(*map(fingerprint, self._parts))


class Selected(Records):
    """The records of a sequence with the given indices."""

    def __init__(self, records: Sequence[Record], indices: array) -> None:
        self._records, self._indices = records, indices

    def __len__(self) -> int:
        """Number of records."""
        return len(self._indices)

    def __getitem__(self, index: int) -> Record | None:
        """Return one record."""
        return self.at_visit(index, 0)

    def at_visit(self, index: int, visit: int) -> Record | None:
        """Return one record at a visit."""
        return read(self._records, self._indices[index], visit)

    def fingerprint(self) -> str:
        """Return a digest of the whole sequence and of the indices."""
        return combined_fingerprint(fingerprint(self._records), self._indices.tobytes())


class Limited(Records):
    """The first ``limit`` records of a sequence."""

    def __init__(self, records: Sequence[Record], limit: int) -> None:
        self._records, self._size = records, min(limit, len(records))

    def __len__(self) -> int:
        """Number of records."""
        return self._size

    def __getitem__(self, index: int) -> Record | None:
        """Return one record."""
        return self.at_visit(index, 0)

    def at_visit(self, index: int, visit: int) -> Record | None:
        """Return one record at a visit."""
        return read(self._records, range(self._size)[index], visit)

    def fingerprint(self) -> str:
        """Return a digest of the whole sequence and the number of its records that are used."""
        return combined_fingerprint(fingerprint(self._records), self._size)
