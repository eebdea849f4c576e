"""Overview of a run's data, printed when it begins: records, share and passes of each source, tokens, and overlap.

Nothing is read but bounded samples of the records, which the opened sources find by their index.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dph.data.overlap import find_overlap
from dph.data.packing import packed_length
from dph.data.sampler import InOrder, Interleaved, evenly_spaced, read
from dph.evaluate.tables import table

if TYPE_CHECKING:
    from dph.train.stages.base import Stage

SAMPLED = 256  # records whose tokens are counted, of all sources together, but some of each
LEAST = 8  # of each source
COMPARED = 10_000  # training records, and held-out ones, whose prompts are compared

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """Means over a sample of a source's records.

    Attributes:
        size: number of records.
        taken: pairs that a record gives (0 if it is left out), or tokens of a stream.
        tokens: tokens that a record gives.
    """

    size: int
    taken: float
    tokens: float


def describe_data(stage: Stage) -> list[str]:
    """Return lines about the training data of a stage, which are logged as well: a table, tokens, and any overlap.

    Passes and, for pairs, tokens are estimates by a sample: of several sources, a step takes what the weights give.
    """
    recipe = stage.recipe
    sampler = stage.batches.records
    sampler = getattr(sampler, "sampler", sampler)  # of a pool of workers
    datasets, weights, names = sampler.datasets, [1.0], ["records in memory"]
    if isinstance(sampler, Interleaved):
        weights, names = sampler.weights, [source.source for source in recipe.data.sources]
    samples = [_sample(stage, records, max(LEAST, SAMPLED // len(datasets))) for records in datasets]
    shares = [weight / sum(weights) for weight in weights]
    taken = sum(share * sample.taken for share, sample in zip(shares, samples, strict=True))  # by a record, on average
    is_stream = recipe.kind != "preference"
    needed = recipe.batch.size * (recipe.data.context if is_stream else 1)  # in a step
    rows: list[list[Any]] = []
    for name, records, share in zip(names, datasets, shares, strict=True):
        passes = recipe.optimiser.steps * needed / taken * share / len(records) if taken else None
        rows.append([name, len(records), share, passes])
    lines = table(["source", "records", "share", "passes"], rows).splitlines()
    if is_stream:
        lines.append(f"{needed:,} tokens in a step")
    elif taken:
        tokens = needed / taken * sum(share * sample.tokens for share, sample in zip(shares, samples, strict=True))
        count = sum(sample.size for sample in samples)
        lines.append(f"about {tokens:,.0f} tokens in a step, by a sample of {count:,} records")
    held_out = list(stage.held_out.sources.values())
    if overlap := find_overlap(datasets, held_out, COMPARED):
        what = "text" if recipe.kind == "text" else "prompt"
        lines.append(f"warning: {overlap.describe(what)}")
    for line in lines:
        log.info("%s", line)
    return lines


def _sample(stage: Stage, records: Sequence[Any], count: int) -> Sample:
    """Return what a record of a source gives, by ``count`` of them at most."""
    sampled = [read(records, index, 0) for index in evenly_spaced(len(records), count)]
    size = len(sampled)
    if stage.recipe.kind != "preference":
        tokens = sum(len(stage.encode(record)) for record in sampled) / size
        return Sample(size, tokens, tokens)
    pairs = next(stage.open_pairs(InOrder(sampled), size), [])
    return Sample(size, len(pairs) / size, sum(map(packed_length, pairs)) / size)
