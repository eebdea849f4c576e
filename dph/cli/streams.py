"""Standard streams of the command, safe to print to.

| stream | closed, on a full disk, or a pipe without a reader |
|---|---|
| stdin | empty |
| stdout | OSError with the file name "stdout", once; later output is dropped |
| stderr | the output is dropped: messages never end the work |

Characters that the terminal's encoding lacks are escaped, and so are control characters in messages of ``logging`` and
``warnings``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import sys
import warnings
from typing import TextIO

from dph.errors import printable

STDOUT = "stdout"
"""File name of the errors of stdout."""

# Only devices that fail: a stdout that was closed cannot be written, but what is written to stderr is just not seen.
_REPLACEMENTS = {0: os.O_RDONLY, 1: os.O_RDONLY, 2: os.O_RDWR}
_format_warning = warnings.formatwarning


class _Stdout(io.FileIO):
    """Descriptor of stdout; after its first error it drops its output, so that Python's flush at exit cannot fail."""

    failure: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes. Raises OSError with the file name "stdout"."""
        if self.failure is not None:
            return len(data)
        try:
            return _write(self, data)
        except OSError as error:
            error.filename, self.failure = STDOUT, error
            raise


class _Stderr(io.FileIO):
    """Descriptor of stderr; output that cannot be written is dropped."""

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes, or drop them."""
        try:
            return _write(self, data)
        except OSError:
            return len(data)


def _write(file: io.FileIO, data: bytes | memoryview) -> int:
    """Write bytes, waiting for the reader of a pipe that another program has made non-blocking."""
    while (written := io.FileIO.write(file, data)) is None:
        select.select([], [file], [])
    return written


class _Record(logging.LogRecord):
    """Log record without control characters; a message of dph is one line."""

    def getMessage(self) -> str:
        """Return the message."""
        return printable(super().getMessage(), keep="" if self.name.split(".")[0] == "dph" else "\n\t")


def _printable_warning(*args: object, **kwargs: object) -> str:
    return printable(_format_warning(*args, **kwargs))


def install() -> None:
    """Replace the process's standard streams, and the formats of logging and warnings.

    Streams that the caller has replaced, as tests do, are left alone.
    """
    for descriptor, mode in _REPLACEMENTS.items():
        _open_closed(descriptor, mode)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    if sys.stdout is sys.__stdout__:
        sys.stdout = sys.__stdout__ = _text(_Stdout(1, "w", closefd=False), sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = sys.__stderr__ = _text(_Stderr(2, "w", closefd=False), sys.stderr)
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _printable_warning


def _open_closed(descriptor: int, mode: int) -> None:
    """Open /dev/null in place of a closed descriptor: a data file must not get its number, or libraries write there."""
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, mode)  # gets the lowest number that is free


def _text(raw: io.FileIO, old: TextIO | None) -> TextIO:
    """Return a text stream that replaces ``old`` (None: it was closed at the start), with its encoding."""
    encoding, by_line = "utf-8", isinstance(raw, _Stderr)
    if old is not None:
        with contextlib.suppress(OSError, ValueError):
            old.flush()
        encoding, by_line = old.encoding, by_line or old.line_buffering or old.write_through
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=by_line
    )


def flush() -> None:
    """Flush stdout. Raises its error, also if a library has suppressed it."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Stdout) and raw.failure is not None:
        raise raw.failure
