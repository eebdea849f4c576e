"""Rows of a source as they are in the data, for commands that judge, answer or count them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dph import tasks
from dph.chat import Message
from dph.data import files, folders
from dph.data.conversions import check_columns, renamed
from dph.data.dataset import check_is_no_task, load, task_documents
from dph.data.formats import Preference, parse_prompt
from dph.data.json_lines import combined_fingerprint
from dph.data.row_format import RowFormat
from dph.data.sources import read_hub
from dph.errors import UserError, shown


class SourceRows(Sequence):
    """Rows of a source that its filter and limit use, with their own fields and with ours."""

    def __init__(
        self, rows: folders.Rows, row_format: RowFormat, indices: Sequence[int], limit: int | None, visited: bool
    ) -> None:
        self._rows, self._format, self._indices, self._limit = rows, row_format, indices, limit
        self._visited = visited

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._indices)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return one row as it is in the data."""
        index = self._indices[index]
        return self._rows.visited(index) if self._visited else self._rows[index]

    def fields(self, index: int) -> Mapping[str, Any]:
        """Return one row with the names of ``columns``. Raises UserError if it lacks one of them."""
        columns = self._format.options[1]
        return renamed(self[index], columns, self.location(index)) if columns else self[index]

    def location(self, index: int) -> str:
        """Return FILE:LINE of a row, or what names a record of the hub."""
        return self._rows.location(self._indices[index])

    def fingerprint(self) -> str:
        """Return a digest of all rows, and of the options that select and rename."""
        digest = self._format.fingerprint(self._rows.fingerprint())
        return digest if self._limit is None else combined_fingerprint(digest, self._limit)


def open_source(
    spec: str | Path,
    visit: files.Visit | None = None,
    *,
    split: str = "train",
    directory: str | None = None,
    limit: int | None = None,
    text_field: str = "text",
    columns: Mapping[str, str] | None = None,
    filter: Mapping[str, Any] | None = None,
    format: str | None = None,
    with_answers: bool = True,
    added: str | None = None,
) -> SourceRows:
    """Return the rows of a source as :func:`dph.data.dataset.load` takes it.

    Args:
        spec, split, directory, limit, text_field, columns, filter, format: see ``load``. A text file has no rows.
        visit: makes the function that is called with each row that is used, with the names of ``columns``.
        with_answers: a task with wrong answers gives rows with chosen and rejected, another one rows with messages.
            False: rows with the record, and its question as messages.
        added: field that the output of a command adds, which no row may have.

    Raises UserError if the source is missing, malformed or empty.
    """
    check_columns(columns or {})
    row_format, indices, count = RowFormat("row", text_field, columns, filter, format == "rendered"), array("q"), 0

    def visit_used(place: str) -> Callable[[int, Mapping[str, Any]], None]:
        visit_row = None if visit is None else visit(place)

        def take(number: int, fields: Mapping[str, Any]) -> None:
            nonlocal count
            if row_format.accepts(fields) and (limit is None or len(indices) < limit):
                indices.append(count)
                if added in fields:
                    raise UserError(
                        f"{place}{number}: {added}: expected no such field, which the output adds; --field NAME names "
                        "another"
                    )
                if visit_row is not None:
                    visit_row(number, renamed(fields, columns, f"{place}{number}") if columns else fields)
            count += 1

        return take

    has_visit = visit is not None or added is not None or bool(filter)
    visit_all = visit_used if has_visit else None
    origin, _, name = str(spec).partition(":")
    if origin == "task":
        for option, value in (("columns", columns), ("filter", filter), ("format", format)):
            if value:
                raise UserError(f"{option}: expected none for {spec}, whose fields are known, got {shown(value)}")
        taken = _answered(spec, split, directory) if with_answers else _questions(name, split, directory)
        rows: folders.Rows = files.with_digest(taken, f"{spec}: record ", visit_all)
    elif origin == "hub":
        hub_name, _, config = name.partition(":")
        rows = files.with_digest(read_hub(hub_name, config or None, split), f"hub:{name}, {split} record ", visit_all)
    else:
        path = Path(spec)
        check_is_no_task(path)
        if files.is_text(path):
            raise UserError(f"{path}: expected rows with fields, got plain text")
        rows = folders.open_path(path, visit_all, split)
    used: Sequence[int] = indices if has_visit else range(len(rows))[:limit]
    if not used:
        fitting = f" that fits the filter {shown(dict(filter))}" if filter else ""
        raise UserError(f"{spec}: expected at least one record{fitting}, got none")
    return SourceRows(rows, row_format, used, limit, has_visit)


def open_prompts(
    spec: str | Path, ignored: set[str] | None = None, **options: Any
) -> tuple[SourceRows, list[list[Message]]]:
    """Return the rows of a source, and the conversation to answer of each: its ``prompt`` or ``messages``.

    Args:
        spec, options: see :func:`open_source`.
        ignored: see :func:`dph.data.formats.parse_prompt`.
    """
    prompts: list[list[Message]] = []
    rendered = text_options(**options)["rendered"]

    def visit(place: str) -> Callable[[int, Mapping[str, Any]], None]:
        return lambda number, row: prompts.append(parse_prompt(row, f"{place}{number}", rendered, ignored))

    return open_source(spec, visit, with_answers=False, **options), prompts


def text_options(text_field: str = "text", format: str | None = None, **_: Any) -> dict[str, Any]:
    """Return the options of a source that ``parse_record`` takes for its ``fields``."""
    return {"text_field": text_field, "rendered": format == "rendered"}


def _answered(spec: str | Path, split: str, directory: str | None) -> list[dict[str, Any]]:
    """Return the records of a task with our fields; those without a wrong answer to a pair are left out."""
    is_pair = tasks.load(str(spec).removeprefix("task:")).paired
    rows, left_out = [], 0
    for record in load(spec, "preference" if is_pair else "conversation", split=split, directory=directory):
        if isinstance(record, Preference):
            rows.append({"chosen": record.chosen, "rejected": record.rejected})
        elif record is not None:
            rows.append({"messages": record.messages})
        else:
            left_out += 1
    if left_out:
        files.report(f"{spec}: left out {left_out} records without a wrong answer")
    return rows


def _questions(name: str, split: str, directory: str | None) -> list[dict[str, Any]]:
    """Return the records of a task, and their questions as messages."""
    task = tasks.load(name)
    return [{"record": dict(doc), "messages": task.question(doc)} for doc in task_documents(task, split, directory)]
