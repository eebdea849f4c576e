"""JSON Lines files, indexed by line and checked when they are opened, and the strict JSON decoder."""

from __future__ import annotations

import contextlib
import io
import json
import os
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

from dph.errors import UserError, shown

DIGEST = 16  # bytes of a fingerprint


def combined_fingerprint(*parts: object) -> str:
    """Return the fingerprint of something that is made of ``parts``."""
    return blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=DIGEST).hexdigest()


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
        with naming(self.path), open_regular(self.path) as file:
            self._index(file, visit)
            self._descriptor = os.dup(file.fileno()) if keep_open else None
        if keep_open:
            weakref.finalize(self, os.close, self._descriptor)

    def _index(self, file: BinaryIO, visit: Callable[[int, dict[str, Any]], None] | None) -> None:
        """Read all lines and store where they are."""
        self._offsets, self._line_numbers, self._checksums = array("q"), array("q"), array("I")
        offset = 0
        for number, line in enumerate(file, 1):
            if data := line.rstrip():
                self._offsets.append(offset)
                self._line_numbers.append(number)
                self._checksums.append(crc32(data))
                if visit is not None:
                    visit(number, self._parse(data, len(self) - 1, strict))
            offset += len(line)
        self._offsets.append(offset)  # the end of the last line

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes but the open file, for another process."""
        return {key: value for key, value in self.__dict__.items() if key != "_descriptor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the file in this process. Raises UserError if it is gone."""
        self.__dict__.update(state)
        self._descriptor = None
        if self._keep_open:
            with naming(self.path):
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        """Number of lines that are not blank."""
        return len(self._line_numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the object of one line."""
        index = range(len(self))[index]
        return self._parse(self._read(index), index, strict)

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
        except NotJson as error:
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


class StoredLines(JsonLines):
    """Objects of JSON lines that are held in memory: those of a compressed file, whose lines cannot be found again.

    Args:
        path: of the file, for error messages.
        content: its decompressed bytes.
        visit: see ``JsonLines``.
    """

    def __init__(self, path: Path, content: bytes, visit: Callable[[int, dict[str, Any]], None] | None = None) -> None:
        self.path, self._keep_open, self._descriptor, self._content = path, False, None, content
        self._index(io.BytesIO(content), visit)

    def _read(self, index: int) -> bytes:
        """Return the bytes of one line."""
        return self._content[self._offsets[index] : self._offsets[index + 1]].rstrip()


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


def open_regular(path: Path, expected: str = "a JSONL file") -> BinaryIO:
    """Open a regular file. Raises UserError for anything else."""
    if not path.is_file():
        got = "nothing there"
        if path.is_dir():
            got = "a folder there"
        elif path.exists():  # a pipe can be read only once
            got = "something that is not a regular file (a pipe or device)"
        raise UserError(f"{path}: expected {expected}, got {got}")
    return path.open("rb")


@contextlib.contextmanager
def naming(place: str | Path) -> Iterator[None]:
    """Turn errors of the operating system into UserError that begins with ``place``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place}: {error.strerror or error}") from None


class NotJson(ValueError):
    """Something that Python's parser accepts but JSON does not, or that would be dropped silently."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises NotJson for a key that is there twice: all but the last would be dropped."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise NotJson(f"the key {shown(key)} is there twice")
            seen.add(key)
    return fields


def _refuse_constant(name: str) -> Any:
    """Raise NotJson for NaN, Infinity and -Infinity."""
    raise NotJson(f"{name} is no JSON number")


strict = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant).decode
_decode = json.JSONDecoder().decode  # twice as fast, for what the strict one has accepted


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Iterate over the objects of a JSONL file; blank lines are skipped. Raises UserError as ``JsonLines``."""
    return iter(JsonLines(path))
