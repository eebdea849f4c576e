"""Fill the cache of a stage before it trains: one pass over its data through the frozen model.

    filled = fill(recipe.load("align", ["objective.reference=cache"]))

The pass takes the batches that training takes, so that every number is, bit for bit, what training would compute. What
is there already is skipped: a pass that was interrupted goes on when it is started again.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dph.data.sampler import Order
from dph.devices import low_precision
from dph.errors import UserError
from dph.model.model import Model
from dph.train import build, compile, distributed
from dph.train.entry import make_stage
from dph.train.recipe import Recipe
from dph.train.stages.preference import PairPart, PairStage

FLUSH_EVERY = 60  # seconds of work that a killed pass loses at most, beside the batch that it was at


@dataclass(frozen=True)
class Filled:
    """What a pass gives.

    Attributes:
        directory: the cache's folder.
        pairs: seen.
        computed: of these, different ones that were not there.
        stored: all that are there now.
    """

    directory: Path
    pairs: int
    computed: int
    stored: int


def fill(
    recipe: Recipe,
    *,
    model: Model | None = None,
    tokenizer: Any = None,
    records: Sequence[Any] | None = None,
    quiet: bool = False,
) -> Filled:
    """Go through the training data once, or through the recipe's steps if they are fewer.

    The arguments are :func:`dph.train.entry.train`'s. ``model`` in memory is put where, and turned into the precision that,
    the recipe says.

    Raises UserError for whatever the recipe or the data have wrong, for a stage that keeps nothing in a cache, and for
    one of several processes.
    """
    check(recipe)
    if model is None:
        model, tokenizer = build.open_start(recipe)
    stage = make_stage(recipe, model, tokenizer, records, held_out={})
    if recipe.compile:
        compile.require(model.device)
    if low_precision(recipe.precision, model.device):
        model.to(torch.bfloat16)
    model.eval()
    stage.reference = model if stage.needs_reference else None  # before its first step a model is its own reference
    try:
        if recipe.compile:
            compile.switch_on(model.backbone)
        pairs = _go_through(stage, quiet)
    finally:
        compile.switch_off(model.backbone)
        stage.close()
        stage.flush()
    store = stage.cache.store
    return Filled(store.directory, pairs, stage.cache.computed, len(store))


def check(recipe: Recipe) -> None:
    """Raise UserError unless training by ``recipe`` reads a cache, and one process is to fill it."""
    if (processes := distributed.told().size) > 1:
        raise UserError(f"WORLD_SIZE: expected one process to fill a cache, got {processes}")
    if recipe.kind != "preference":
        raise UserError(f"stage: expected align or head, which keep a cache, got {recipe.stage}")
    if recipe.stage == "head" and not recipe.data.cache_states:
        raise UserError("data.cache_states: expected true for a cache to fill, got false")
    if recipe.stage == "align" and recipe.objective.reference != "cache":
        raise UserError(
            f"objective.reference: expected cache, got {recipe.objective.reference}; give objective.reference=cache"
        )
    if recipe.stage == "align" and recipe.objective.dpo_weight == 0:
        raise UserError("objective.dpo_weight: expected one above 0, which takes a reference to cache, got 0")


def _go_through(stage: PairStage, quiet: bool) -> int:
    """Pairs seen; progress on stderr."""
    count, flushed = 0, time.monotonic()
    size = stage.recipe.batch.size
    total = min(stage.recipe.optimiser.steps, -(-stage.records.size // size)) * size  # as training takes them
    with tqdm(desc="cache", total=total, unit="pair", dynamic_ncols=True, disable=quiet) as bar:
        for part in _parts(stage):
            stage.frozen(part)
            count += len(part.pairs)
            bar.update(len(part.pairs))
            bar.set_postfix_str(f"{stage.cache.computed} computed", refresh=False)
            if time.monotonic() - flushed > FLUSH_EVERY:
                stage.flush()
                flushed = time.monotonic()
    for line in () if quiet else stage.left_out().values():
        print(f"cache: {line}", file=sys.stderr)
    return count


def _parts(stage: PairStage) -> Iterator[PairPart]:
    """Parts of training's first steps, until every record has been taken or training would end."""
    for _ in range(stage.recipe.optimiser.steps):
        yield from stage.next().parts
        if _all_taken(stage.records):
            return


def _all_taken(order: Order) -> bool:
    """Whether every source of a mixture, or the only one, has been gone through."""
    state = order.state_dict()
    return all(source["position"] >= source["size"] for source in state.get("sources", [state]))
