"""Options of a source that say how its rows become records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dph.data.conversions import is_one_of
from dph.data.json_lines import combined_fingerprint


class RowFormat:
    """Options of a source that say how its rows become records.

    Args:
        kind, text_field, columns, rendered: see ``dph.data.formats.parse_record``.
        filter: name in the data -> a value, or the list of values, of the rows that are used; None for all rows.

    Attributes:
        options: ``text_field``, ``columns`` and ``rendered``.
        ignored: names of fields with a value that no record depends on, of the rows that were checked.
    """

    def __init__(
        self,
        kind: str,
        text_field: str = "text",
        columns: Mapping[str, str] | None = None,
        filter: Mapping[str, Any] | None = None,
        rendered: bool = False,
    ) -> None:
        self.ignored: set[str] = set()
        self.kind, self.options, self.filter = kind, (text_field, columns or None, rendered), dict(filter or {})

    def accepts(self, fields: Mapping[str, Any]) -> bool:
        """Return whether the filter uses a row."""
        for name, wanted in self.filter.items():
            values = wanted if isinstance(wanted, list | tuple) else [wanted]
            if not is_one_of(fields.get(name), values):
                return False
        return True

    def fingerprint(self, digest: str) -> str:
        """Return the digest of rows, and of the options of this source that not every source has."""
        own = self.filter, *self.options[1:]
        return combined_fingerprint(digest, *own) if any(own) else digest
