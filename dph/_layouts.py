"""Layouts of weights in checkpoints: tables of names, several of which may stand for row blocks of one weight of ours.

A table maps names of the layout to own names; ``{}`` stands for one part of a name, such as the number of a block.
Entries with the same own name are row blocks of it, in the order of the table.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

Names = Mapping[str, str]
Pieces = dict[str, list[str]]
"""Names in a layout, by own name."""


def renamed(name: str, table: Names) -> str | None:
    """Return the name that ``table`` gives ``name``; None if it has none."""
    for pattern, target in _patterns(tuple(table.items())):
        if match := pattern.fullmatch(name):
            return target.format(*match.groups())
    return None


def names_of(own: str, table: Names) -> list[str]:
    """Return the names in a layout of a weight of ours: of its row blocks, in order; empty if the layout lacks it."""
    names = []
    for pattern, target in _patterns(tuple((own_name, name) for name, own_name in table.items())):
        if match := pattern.fullmatch(own):
            names.append(target.format(*match.groups()))
    return names


@functools.lru_cache
def _patterns(table: tuple[tuple[str, str], ...]) -> list[tuple[re.Pattern[str], str]]:
    patterns = []
    for source, target in table:
        patterns.append((re.compile(re.escape(source).replace(r"\{\}", r"([^.]+)")), target))
    return patterns


def pieces(own_names: Iterable[str], table: Names | None) -> Pieces:
    """Return the names in a layout of weights that it holds; the own layout (``table`` None) has one name each."""
    if table is None:
        return {own: [own] for own in own_names}
    return {own: names for own in own_names if (names := names_of(own, table))}


def row_blocks(own: str, rows: int, config: Any) -> list[int]:
    """Return the rows of each block of a weight of ours that a layout holds apart."""
    if ".attention.qkv." in own:
        width = config.head_dim
        return [config.num_attention_heads * width, *[config.num_key_value_heads * width] * 2]
    return [rows // 2, rows // 2]


def blocks_of(weights: Mapping[str, Tensor], names: Pieces, config: Any) -> dict[str, Tensor]:
    """Return weights by their ``names`` in a layout: views of the row blocks of those that it holds apart."""
    blocks: dict[str, Tensor] = {}
    for own, parts in names.items():
        weight = weights[own]
        sizes = row_blocks(own, len(weight), config) if len(parts) > 1 else [len(weight)]
        blocks |= dict(zip(parts, weight.split(sizes), strict=True))
    return blocks
