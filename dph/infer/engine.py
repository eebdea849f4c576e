"""The engine that answers requests by a model, and all requests in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dph.infer.attached_engine import AttachedEngine
from dph.infer.pooled_engine import BATCH, PooledEngine
from dph.infer.request import Engine, Request
from dph.model.backbone import Backbone
from dph.model.judging import JudgingModel

POOL_BYTES = 1 << 30  # of keys and values, unless a single prompt with one candidate needs more


def engine_for(model: JudgingModel, tokenizer: Any, requests: Sequence[Request] = ()) -> Engine:
    """Return an engine for the model, with room for these requests as far as the memory's bound allows."""
    if not isinstance(model.backbone, Backbone):
        return AttachedEngine(model, tokenizer)
    wanted = least = 0
    for request in requests:
        prompt, one = len(request.prompt) + 1, request.rows + 1
        wanted += prompt + one * request.wanted
        least = max(least, prompt + one * max(request.gang, 1))
    return PooledEngine(model, tokenizer, max(least, min(wanted, pool_rows(model))) + 2)


def pool_rows(model: JudgingModel, size: int = POOL_BYTES) -> int:
    """Return the rows of keys and values of all layers that ``size`` bytes hold."""
    attention = model.backbone.blocks[0].attention
    row = 2 * attention.key_heads * attention.head_dim * model.dtype.itemsize
    return max(size // (row * len(model.backbone.blocks)), 1)


def answered(model: JudgingModel, tokenizer: Any, requests: Sequence[Request]) -> Iterator[Request]:
    """Yield all requests in their order, each when all of its answers are there; later ones are answered meanwhile."""
    engine, waiting = engine_for(model, tokenizer, requests), 0
    for request in requests:
        while not request.done or (waiting < len(requests) and len(engine.requests) < BATCH):
            if waiting < len(requests) and len(engine.requests) < BATCH:
                engine.submit(requests[waiting])
                waiting += 1
            else:
                engine.step()
        yield request
