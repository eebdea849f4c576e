"""Folders of files of rows, and those written by ``save_to_disk`` of the package datasets."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dph.data.files import (
    ROWS,
    TEXT,
    Documents,
    Visit,
    open_rows,
    report,
    require_package,
    suffix_of,
    with_digest,
)
from dph.data.json_lines import JsonLines, combined_fingerprint
from dph.errors import UserError, shown, shown_names

MAX_OPEN = 256  # files of a folder that stay open; a process may often have no more than 1024
# Files of a folder that are about its data, by their names in lower case: of texts without suffix, and any.
ABOUT = ("readme", "license", "licence", "notice", "copying", "changelog", "citation", "authors")
ABOUT_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def is_saved_dataset(path: Path) -> bool:
    """Return whether a folder was written by ``save_to_disk`` of the package datasets."""
    is_split = (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    return is_split or (path / "dataset_dict.json").is_file()


def open_saved_dataset(path: Path, split: str, visit: Visit | None = None) -> Documents:
    """Return the rows of a folder written by ``save_to_disk``; of several splits that with the given name.

    Raises UserError if the folder cannot be read or lacks the split.
    """
    datasets = require_package("datasets", path, "a folder of save_to_disk")
    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:  # of formats and versions: the folder cannot be read in any case
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: a folder of save_to_disk that cannot be read: {reason}") from error
    if isinstance(rows, Mapping):
        if split not in rows:
            raise UserError(f"{path}: split: expected one of {shown_names(rows)}, got {shown(split)}")
        rows = rows[split]
    return with_digest(rows, f"{path}: row ", visit)


class JoinedRows(Sequence):
    """Rows of several files, one after another.

    Args:
        parts: of each file.
    """

    def __init__(self, parts: Sequence[JsonLines | Documents]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1] if self._ends else 0

    def _place(self, index: int) -> tuple[JsonLines | Documents, int]:
        index = range(len(self))[index]
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return one row."""
        rows, own = self._place(index)
        return rows[own]

    def visited(self, index: int) -> Mapping[str, Any]:
        """Return one row, as ``JsonLines`` does."""
        rows, own = self._place(index)
        return rows.visited(own)

    def location(self, index: int) -> str:
        """Return FILE:LINE of a row."""
        rows, own = self._place(index)
        return rows.location(own)

    def fingerprint(self) -> str:
        """Return a digest of all rows."""
        return combined_fingerprint(*(part.fingerprint() for part in self._parts))


Rows = JsonLines | Documents | JoinedRows  # with len, [index], visited, location and fingerprint


def open_path(path: Path, visit: Visit | None = None, split: str = "train") -> Rows:
    """Return the rows of a file, or of all files of a folder; of a folder of ``save_to_disk`` those of a split.

    Raises UserError as :func:`open_rows`, and for a folder without files of rows.
    """
    if not path.is_dir():
        return open_rows(path, visit=visit)
    if is_saved_dataset(path):
        return open_saved_dataset(path, split, visit)
    paths = files_in(path, ROWS)
    if not paths:
        raise UserError(f"{path}: expected {', '.join(ROWS)} files in the folder, got none")
    return JoinedRows([open_rows(file, len(paths) <= MAX_OPEN, visit) for file in paths])


def files_in(folder: Path, suffixes: Sequence[str] = (*ROWS, *TEXT)) -> list[Path]:
    """Return the files with these suffixes below a folder, in the order of their names; log what is read and skipped.

    Hidden files and folders (``.git``, ``._a.jsonl``) are skipped, and files about the data (``LICENSE.txt``).
    """
    files, skipped = [], []
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            if name.startswith("."):
                skipped.append(Path(parent, name))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if name.startswith("."):
                continue
            is_about = suffix_of(path) in TEXT and name.split(".")[0].lower() in ABOUT
            is_about = is_about or name.lower() in ABOUT_FILES
            is_read = suffix_of(path) in suffixes and not is_about
            (files if is_read else skipped).append(path)
    message = f"{folder}: reads {len(files)} files"
    if files:
        message += f" ({_relative(files, folder)})"
    if skipped:
        message += f", skips {len(skipped)} ({_relative(skipped, folder)})"
    report(message)
    return sorted(files)


def _relative(paths: list[Path], folder: Path) -> str:
    return shown_names(path.relative_to(folder) for path in sorted(paths))
