"""Overlap of sources: records whose prompt is among those of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from dph.data.formats import Record
from dph.data.sampler import evenly_spaced, read
from dph.data.sources import location, prompt_key


@dataclass(frozen=True)
class Overlap:
    """Training records with the prompt, or the whole text, of a held-out record.

    Attributes:
        shared: number of them.
        compared: training records that were compared, of ``records``.
        held_out: held-out records that were compared, of ``all_held_out``.
        place: of the first one, as FILE:LINE.
    """

    shared: int
    compared: int
    records: int
    held_out: int
    all_held_out: int
    place: str

    def describe(self, what: str) -> str:
        """Return the overlap on one line; ``what`` is shared."""
        counts = []
        for compared, total in ((self.compared, self.records), (self.held_out, self.all_held_out)):
            counts.append(f"{total:,}" if compared == total else f"a sample of {compared:,} of {total:,}")
        training, held_out = counts
        verb = "has" if self.shared == 1 else "have"
        return (
            f"{self.shared:,} of {training} training records {verb} the {what} of one of {held_out} held-out records, "
            f"first {self.place}"
        )


def find_overlap(training: Sequence[Sequence[Any]], held_out: Sequence[Sequence[Any]], most: int) -> Overlap | None:
    """Return the overlap of sources, by at most about ``most`` records of each side; None without any.

    Records that are encoded already, whose prompts are not marked, are not compared.
    """
    known = {number for *_, number in _prompts(held_out, most)}
    if not known:
        return None
    shared, first = 0, ""
    for records, index, number in _prompts(training, most):
        if number in known:
            shared += 1
            first = first or location(records, index)
    if not shared:
        return None
    sizes = []
    for sources in (training, held_out):
        total = sum(map(len, sources))
        sizes += [sum(map(len, _sampled(sources, most))), total]
    return Overlap(shared, *sizes, first)


def _sampled(sources: Sequence[Sequence[Any]], most: int) -> list[list[int]]:
    """Return indices of about ``most`` records of all sources, in proportion to their sizes."""
    total = sum(map(len, sources))
    return [evenly_spaced(len(records), -(-most * len(records) // max(total, 1))) for records in sources]


def _prompts(sources: Sequence[Sequence[Any]], most: int) -> Iterator[tuple[Sequence[Any], int, int]]:
    """Yield source, index and digest of the prompt of a sample of records."""
    for records, indices in zip(sources, _sampled(sources, most), strict=True):
        for index in indices:
            record = read(records, index, 0)
            if isinstance(record, Record):
                yield records, index, digest(prompt_key(record))


def digest(text: str) -> int:
    """Return a 64-bit digest of a text."""
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
