"""Sources of records: files, and hub data sets, as sequences that worker processes can unpickle."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.chat import Encoded
from dph.data.files import INSTALL, read_text
from dph.data.formats import (
    EXPECTED_FIELDS,
    Conversation,
    Record,
    Records,
    Text,
    parse_record,
    split_text,
)
from dph.data.json_lines import DIGEST, combined_fingerprint
from dph.data.labels import Labelled
from dph.data.rendered import refuse
from dph.data.sampler import evenly_spaced, read
from dph.errors import UserError

if TYPE_CHECKING:
    from dph.data.row_format import RowFormat

LOCAL_FILES = "or give a task's local files, DIR/TASK/SPLIT.jsonl (--directory DIR, data.directory)"
FINGERPRINTED = 256  # records in memory that their fingerprint depends on


def read_hub(name: str, config: str | None, split: str) -> Sequence[Mapping[str, Any]]:
    """Return a split of a Hugging Face data set, downloaded on first use. Raises UserError if it cannot be read."""
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError:
        raise UserError(f"hub data set {name}: needs the package datasets: {INSTALL}, {LOCAL_FILES}") from None
    what = f"hub data set {name}{f' ({config})' if config else ''}, split {split}"
    was_offline = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    reachable = any(was_offline) or _is_reachable(constants.ENDPOINT)
    try:
        if not reachable:  # the cache is read at once; otherwise each file is asked for six times
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of the network, names, splits or formats: the data cannot be read in any case
        reason = " ".join(str(error).split()) or type(error).__name__
        if not reachable:
            reason = f"{constants.ENDPOINT} cannot be reached and the data is not in the cache: connect, {LOCAL_FILES}"
        raise UserError(f"{what}: {reason}") from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = was_offline


def _is_reachable(url: str) -> bool:
    """Return whether the host of ``url`` takes a connection within a second; through a proxy that is not tried."""
    parts = urllib.parse.urlsplit(url)
    if urllib.request.getproxies().get(parts.scheme):
        return True
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        socket.create_connection((parts.hostname, port), timeout=1.0).close()
    except OSError:
        return False
    return True


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
    for i in evenly_spaced(size, size if isinstance(records, list | tuple) else FINGERPRINTED):
        record = records[i]
        known = record is None or isinstance(record, Record | Encoded | tuple)
        digest.update((repr(record) if known else type(record).__qualname__).encode(errors="surrogatepass"))
    return digest.hexdigest()


def location(records: Sequence[Any], index: int) -> str:
    """Return FILE:LINE of a record or the like, for messages; its index among records in memory."""
    own = getattr(records, "location", None)
    return f"record {index}" if own is None else own(index)


def prompt_key(record: Record) -> str:
    """Return a text that is the same for records with the same prompt; a plain text is its own."""
    if isinstance(record, Text):
        return record.text
    if isinstance(record, Conversation):
        conversation = record.messages
    else:
        conversation = record.answers[0] if isinstance(record, Labelled) else record.chosen
    contents: list[tuple[Any, ...]] = []
    for message in conversation[:-1]:
        calls = (message["tool_calls"],) if "tool_calls" in message else ()
        contents.append((message["role"], message["content"], *calls))
    return repr(contents)


class TextRecords(Records):
    """Records of a text file, held in memory. Raises UserError unless ``kind`` is "text"."""

    def __init__(self, path: str | Path, kind: str) -> None:
        if kind != "text":
            raise UserError(f"{path}: expected a {kind}: {EXPECTED_FIELDS[kind]}; got plain text")
        text = read_text(path)
        refuse(text, str(path))
        self._digest = blake2b(text.encode(), digest_size=DIGEST).hexdigest()
        self._path, self._pieces = str(path), split_text(text)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._pieces)

    def __getitem__(self, index: int) -> Text:
        """Return one record."""
        return self._pieces[index]

    def location(self, index: int) -> str:
        """Return the path of the file."""
        return self._path

    def fingerprint(self) -> str:
        """Return a digest of the text."""
        return self._digest


class HubRecords(Records):
    """Records of a hub data set, ``name`` being NAME or NAME:CONFIG.

    Rows are parsed when they are read, since a data set of the hub may have any size; the first one and, with a
    filter, all are checked at once.
    """

    def __init__(self, name: str, split: str, row_format: RowFormat) -> None:
        path, _, config = name.partition(":")
        self._rows, self._indices = read_hub(path, config or None, split), None
        self._name, self._format = f"hub:{name}, {split}", row_format
        if row_format.filter:
            self._indices = array("q")
            for i, fields in enumerate(self._rows):
                if row_format.accepts(fields):
                    self._parse(fields, i)
                    self._indices.append(i)
        elif len(self._rows):
            self._parse(self._rows[0], 0)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._rows if self._indices is None else self._indices)

    def __getitem__(self, index: int) -> Record:
        """Return one record."""
        row = self._row(index)
        return self._parse(self._rows[row], row)

    def location(self, index: int) -> str:
        """Return name, split and number of a row."""
        return f"{self._name} record {self._row(index)}"

    def _row(self, index: int) -> int:
        index = range(len(self))[index]
        return index if self._indices is None else self._indices[index]

    def _parse(self, fields: Mapping[str, Any], row: int) -> Record:
        return parse_record(
            fields, self._format.kind, f"{self._name} record {row}", *self._format.options, self._format.ignored
        )

    def fingerprint(self) -> str:
        """Return a digest of the data set's name, split and size, of its own fingerprint, and of the options."""
        return self._format.fingerprint(combined_fingerprint(self._name, rows_fingerprint(self._rows)))


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
        part, own = self._place(index)
        return part[own]

    def location(self, index: int) -> str:
        """Return the place of a record."""
        return location(*self._place(index))

    def _place(self, index: int) -> tuple[Sequence[Record], int]:
        """Return the part with a record, and its index there, counted from the part's end."""
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        return self._parts[number], index - self._ends[number]

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

    def location(self, index: int) -> str:
        """Return the place of a record."""
        return location(self._records, self._indices[index])

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

    def location(self, index: int) -> str:
        """Return the place of a record."""
        return location(self._records, range(self._size)[index])

    def fingerprint(self) -> str:
        """Return a digest of the whole sequence and the number of its records that are used."""
        return combined_fingerprint(fingerprint(self._records), self._size)
