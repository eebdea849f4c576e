"""Files of rows: JSON lines, JSON, CSV, TSV, parquet and arrow, compressed or not.

A file is what its first bytes say, else what its suffix says, else JSON lines. Only uncompressed JSON lines are read
from the disk row by row; the rows of any other file are held in memory.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import logging
import lzma
import os
import zlib
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from dph.data.json_lines import (
    DIGEST,
    JsonLines,
    NotJson,
    StoredLines,
    naming,
    open_regular,
    strict,
)
from dph.errors import UserError, shown_names

INSTALL = "pip install 'dph[data]'"
TEXT = (".txt",)
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
MAGIC = {
    b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow stream", b"\x1f\x8b": "gzip",
    b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip",
    b"%PDF": "PDF", b"SQLite format 3": "SQLite", b"\x89HDF": "HDF5", b"\x93NUMPY": "NumPy", b"\x80\x04": "pickle",
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
TAR, HEAD = 257, 262  # place of "ustar" in an archive, and bytes that tell the kind of a file
TABLES = ("parquet", "arrow", "arrow stream")
DECOMPRESS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}
# Given the beginning of places in error messages, returns the function that is called with the number that completes
# the place of each row, and its fields.
Visit = Callable[[str], Callable[[int, Mapping[str, Any]], None]]

log = logging.getLogger(__name__)


def report(message: str) -> None:
    """Log a line about what is read, on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        log.warning("%s", message)


def report_ignored(source: str | Path, ignored: Collection[str]) -> None:
    """Log the fields of a source that no record depends on, if there are some."""
    if ignored:
        report(f"{source}: ignored fields: {shown_names(sorted(ignored))}")


class Documents(Sequence):
    """Rows, and their places for error messages.

    Args:
        rows: documents, all of which are used if ``indices`` is None.
        digest: fingerprint of the rows.
        place: beginning of every place, which a number follows.
        numbers: of the places, such as lines of a file, or their ends; None for the indices of the rows.
        indices: of the rows that are used.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        digest: str,
        place: str,
        numbers: Sequence[int | str] | None = None,
        indices: array | None = None,
    ) -> None:
        self._rows, self._digest, self._place, self._numbers, self._indices = rows, digest, place, numbers, indices

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._rows if self._indices is None else self._indices)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return one document."""
        return self._rows[index if self._indices is None else self._indices[index]]

    def visited(self, index: int) -> Mapping[str, Any]:
        """Return one document, as ``JsonLines`` does."""
        return self[index]

    def location(self, index: int) -> str:
        """Return FILE:LINE of a document, or the task, split and number of a record of the hub."""
        return f"{self._place}{index if self._numbers is None else self._numbers[index]}"

    def fingerprint(self) -> str:
        """Return a digest of all documents, also of those that the task leaves out."""
        return self._digest


# Files


def is_text(path: Path) -> bool:
    """Return whether a file is plain text by its name."""
    return suffix_of(path) in TEXT


def open_rows(path: Path, keep_open: bool = True, visit: Visit | None = None) -> JsonLines | Documents:
    """Return the rows of a file.

    Args:
        path: a regular file.
        keep_open: see ``JsonLines``.
        visit: makes the function that is called with each row.

    Raises UserError if the file is of a kind that is not read, or needs a package that is not installed, and for a
    malformed row: in JSON lines without ``visit`` when it is read, else now.
    """
    kind = _kind(path)
    if kind in TABLES:
        return with_digest(_read_table(path, kind), f"{path}: row ", visit)
    suffix = suffix_of(path)
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, "\t" if suffix == ".tsv" else ",", visit)
    if suffix == ".json" and _first_character(path) == b"[":
        return with_digest(_read_json(path), f"{path}: item ", visit)
    visit_line = None if visit is None else visit(f"{path}:")
    try:
        if kind is not None:
            return StoredLines(path, _read_bytes(path), visit_line)
        return JsonLines(path, keep_open, visit_line)
    except UserError as error:
        if suffix == ".json" and ": not JSON: " in str(error):
            raise UserError(f"{error}; expected an array of objects, or one object a line") from None
        raise


def read_text(path: str | Path) -> str:
    """Return the content of a UTF-8 text file, which may be compressed.

    Raises UserError if it is missing, not UTF-8 or of another kind.
    """
    path = Path(path)
    with naming(path):
        path.stat()
    if path.is_file():
        _kind(path)
    content = _read_bytes(path)
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None


def not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    """Return the error of a file that is not UTF-8, with the line and the byte in it."""
    before = error.object[: error.start]
    line, byte = before.count(b"\n") + 1, len(before) - (before.rfind(b"\n") + 1)
    return UserError(f"{path}:{line}: not UTF-8 at byte {byte}")


def suffix_of(path: Path) -> str:
    """Return the suffix of a file in lower case, of its decompressed content if it is compressed."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def _named(kind: str) -> str:
    """Return a kind of file with its article."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} file"


def _magic(head: bytes) -> str | None:
    """Return the kind of a file by its first bytes; None for text."""
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind
    return "tar" if head[TAR:].startswith(b"ustar") else None


def _kind(path: Path) -> str | None:
    """Return the kind of a file by its first bytes, None for text. Raises UserError for a kind that is not read."""
    has_other_suffix = suffix_of(path) in (*ROWS[1:], *TEXT)
    with naming(path), open_regular(path, "a file" if has_other_suffix else "a JSONL file") as file:
        kind = _magic(file.read(HEAD))
    if kind in (None, "zstd", *TABLES, *DECOMPRESS):
        return kind
    raise UserError(
        f"{path}: expected {', '.join((*ROWS, *TEXT))}, or one with {', '.join(COMPRESSED)}, got {_named(kind)}"
    )


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading its decompressed bytes."""
    with naming(path), path.open("rb") as file:
        kind = _magic(file.read(HEAD))
        file.seek(0)
        try:
            if kind == "zstd":
                yield require_package("pyarrow", path, "a zstd file").input_stream(str(path), compression="zstd")
            else:
                yield DECOMPRESS[kind](file) if kind in DECOMPRESS else file
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: {_named(kind)} that cannot be decompressed: {error}") from None


def _read_bytes(path: Path) -> bytes:
    """Return the decompressed content of a file. Raises UserError if that is a table or another compressed file."""
    with _open(path) as file:
        content = file.read()
    kind = _magic(content[:HEAD])
    if kind is not None:
        raise UserError(f"{path}: expected compressed text, got {_named(kind)} in it")
    return content


def _first_character(path: Path) -> bytes:
    """Return the first byte of a file's content that is neither a space nor of a byte order mark."""
    with _open(path) as file:
        while chunk := file.read(2**16):
            if text := chunk.removeprefix(b"\xef\xbb\xbf").strip():
                return text[:1]
    return b""


def require_package(name: str, path: Path, what: str) -> Any:
    """Return a package that is needed by ``what``. Raises UserError with the command that installs it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise UserError(f"{path}: {what}, which needs the package {package}: {INSTALL}") from None


# Rows in memory


def with_digest(
    rows: Sequence[Mapping[str, Any]], place: str, visit: Visit | None, numbers: array | None = None
) -> Documents:
    """Return rows with their places and the digest of their contents, after a visit to each."""
    digest = blake2b(digest_size=DIGEST)
    visit_row = None if visit is None else visit(place)
    for i, fields in enumerate(rows):
        digest.update(repr(fields).encode(errors="surrogatepass"))
        if visit_row is not None:
            visit_row(i if numbers is None else numbers[i], fields)
    return Documents(rows, digest.hexdigest(), place, numbers)


def _read_json(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON array."""
    content = _read_bytes(path)
    try:
        rows = strict(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise UserError(f"{where}: not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except NotJson as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    except RecursionError:
        raise UserError(
            f"{path}: expected a JSON array of objects, got one that is nested too deeply to read"
        ) from None
    except ValueError:  # of int()
        raise UserError(f"{path}: expected numbers of at most 4300 digits, got an integer of more") from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: item {i}: expected a JSON object, got {type(row).__name__}")
    return rows


def _read_csv(path: Path, delimiter: str, visit: Visit | None) -> Documents:
    """Return the rows of a table in text, whose first line has the names of the fields; all values are texts."""
    csv.field_size_limit(2**31 - 1)  # of all csv readers of the process; a longer text is no field
    rows, numbers = [], array("q")
    content = _read_bytes(path)
    try:
        text = content.decode("utf-8-sig")
        header = text.partition("\n")[0]
        if delimiter not in header and ";" in header:  # as spreadsheets write it if the decimal point is a comma
            delimiter = ";"
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = next(reader, [])
        if len(set(names)) != len(names):
            raise UserError(f"{path}:1: expected names that differ, got {shown_names(names)}")
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(names):
                raise UserError(f"{path}:{line}: expected {len(names)} cells, got {len(cells)}")
            if cells:
                rows.append(dict(zip(names, cells, strict=True)))
                numbers.append(line)
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from None
    return with_digest(rows, f"{path}:", visit, numbers)


class TableRows(Sequence):
    """Rows of a pyarrow table, made when they are read."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        """Number of rows."""
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row; null is None."""
        return self._table.slice(range(len(self))[index], 1).to_pylist()[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over all rows, a thousand converted at once."""
        for batch in self._table.to_batches(1024):
            yield from batch.to_pylist()


def _read_table(path: Path, kind: str) -> TableRows:
    """Return the rows of a parquet or arrow file, read whole: a mapped file that is cut off kills the process."""
    pyarrow = require_package("pyarrow", path, _named(kind))
    try:
        if kind == "parquet":
            parquet = require_package("pyarrow.parquet", path, _named(kind))
            with parquet.ParquetFile(path) as file:
                table = file.read()
        else:
            with pyarrow.OSFile(str(path)) as file:
                open_table = pyarrow.ipc.open_file if kind == "arrow" else pyarrow.ipc.open_stream
                table = open_table(file).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: {_named(kind)} that cannot be read: {' '.join(str(error).split())}") from None
    if len(set(table.column_names)) != len(table.column_names):
        raise UserError(f"{path}: expected names of columns that differ, got {shown_names(table.column_names)}")
    return TableRows(table)
