"""Tables as plain text and Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from dph.errors import printable


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Aligned columns under ``headers``, two spaces apart, without a newline at the end.

        method           n  accuracy
        ---------------  -  --------
        log-probability  8     0.500

    Floats get three decimals, None becomes "-", and characters that a terminal cannot print are escaped ("\\n"). A
    column of numbers is aligned to the right. Raises ValueError if a row is not as wide as the headers.
    """
    lines = [[str(header) for header in headers], [""] * len(headers)]
    numeric = [True] * len(headers)
    for row in map(list, rows):
        if len(row) != len(headers):
            raise ValueError(f"rows: expected {len(headers)} cells, got {len(row)}: {row}")
        lines.append([_cell(value) for value in row])
        numeric = [right and _is_number(value) for right, value in zip(numeric, row, strict=True)]
    if len(lines) == 2:
        numeric = [False] * len(headers)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines[1] = ["-" * width for width in widths]
    return "\n".join(_line(line, widths, numeric) for line in lines)


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The table in Markdown, with the cells of :func:`table`."""
    lines = [list(headers), ["---"] * len(headers)]
    for row in rows:
        lines.append([_cell(value).replace("|", "\\|") for value in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    aligned = []
    for cell, width, right in zip(cells, widths, numeric, strict=True):
        aligned.append(cell.rjust(width) if right else cell.ljust(width))
    return "  ".join(aligned).rstrip()


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else printable(str(value), keep="")
