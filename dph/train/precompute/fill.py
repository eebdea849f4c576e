"""Filling of a stage's cache before training: one pass of the frozen model over the data.

    summary = fill_cache(recipe.load("align", ["objective.reference=cache"]))

The pass takes the batches of training, so that every number equals, bit for bit, the one that training would compute.
Stored rows are skipped: an interrupted pass continues when it is started again.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dph.data.sampler import Sampler
from dph.devices import low_precision
from dph.errors import UserError
from dph.model.model import Model
from dph.train import build, compile
from dph.train.distributed import torchrun_world
from dph.train.head_states import prepare_heads
from dph.train.recipe import Recipe
from dph.train.stages.preference import PreferenceStage

FLUSH_EVERY = 60  # seconds of work that a killed pass loses at most, besides its current batch


@dataclass(frozen=True)
class CacheSummary:
    """Result of a pass.

    Attributes:
        directory: the cache's directory.
        pairs: number of pairs in the pass.
        computed: number of different pairs that were missing and have been computed.
        stored: number of pairs in the cache.
    """

    directory: Path
    pairs: int
    computed: int
    stored: int


def fill_cache(
    recipe: Recipe,
    *,
    model: Model | None = None,
    tokenizer: Any = None,
    records: Sequence[Any] | None = None,
    quiet: bool = False,
) -> CacheSummary:
    """Store the frozen model's outputs for one pass over the training data, or for the recipe's steps if fewer.

    The arguments are those of :func:`dph.train.entry.train`. A ``model`` in memory is moved to the recipe's device, and
    turned into its precision.

    Raises UserError for errors in the recipe or the data, for a stage without a cache, and on several ranks.
    """
    check(recipe)
    if model is None:
        model, tokenizer = build.open_model(recipe)
    stage = build.make_stage(recipe, model, tokenizer, records, held_out={})
    prepare_heads(stage, quiet)  # whose layer decides which states are stored
    if recipe.compile:
        compile.require(model.device)
    if low_precision(recipe.precision, model.device):
        model.to(torch.bfloat16)
    model.eval()
    stage.reference = model if stage.needs_reference else None  # before the first step a model is its own reference
    try:
        if recipe.compile:
            compile.switch_on(model.backbone)
        pairs = _run_frozen_model(stage, quiet)
    finally:
        compile.switch_off(model.backbone)
        stage.close()
        stage.frozen.flush()
    caches = stage.frozen.caches or [stage.frozen.cache]
    computed, stored = sum(cache.computed for cache in caches), sum(len(cache.store) for cache in caches)
    return CacheSummary(caches[0].store.directory, pairs, computed, stored)


def check(recipe: Recipe) -> None:
    """Raise UserError unless training by ``recipe`` reads a cache, and a single process fills it."""
    if (processes := torchrun_world().world_size) > 1:
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


def _run_frozen_model(stage: PreferenceStage, quiet: bool) -> int:
    """Run the frozen model over training's first steps, with progress on stderr; return the number of pairs."""
    pairs, flushed = 0, time.monotonic()
    steps, size, records = stage.recipe.optimiser.steps, stage.recipe.batch.size, stage.batches.records
    total = min(steps, -(-records.size // size)) * size
    with tqdm(desc="cache", total=total, unit="pair", dynamic_ncols=True, disable=quiet) as progress:
        for _ in range(steps):
            for micro_batch in stage.next_batch().micro_batches:
                stage.frozen(micro_batch)
                pairs += len(micro_batch.pairs)
                progress.update(len(micro_batch.pairs))
                progress.set_postfix_str(
                    f"{sum(cache.computed for cache in stage.frozen.caches)} computed", refresh=False
                )
                if time.monotonic() - flushed > FLUSH_EVERY:
                    stage.frozen.flush()
                    flushed = time.monotonic()
            if _all_taken(records):
                break
    if not quiet and (message := stage.left_out()):
        print(f"cache: {message}", file=sys.stderr)
    return pairs


def _all_taken(records: Sampler) -> bool:
    """Return whether every source has been passed over."""
    state = records.state_dict()
    return all(source["position"] >= source["size"] for source in state.get("sources", [state]))
