"""What a frozen model says of preference pairs, kept on disk from one epoch and one run to the next.

    runs/cache/reference-1f6e5d2c9a3b4870-5d41402a/    log-probabilities by one reference model with one tokenizer
    runs/cache/states-90c7a2f41be85d36-5d41402a/       hidden states of judged tokens by one frozen backbone

A folder may be deleted whenever no process runs on it: its numbers are computed again.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dph.chat import Encoded
from dph.train.precompute.store import Cache, fingerprint, pair_key
from dph.train.recipe import Recipe

log = logging.getLogger(__name__)


class PairCache:
    """Rows of numbers for pairs, by one model.

    Args:
        directory: of all caches; this one's folder in it is named after kind, model and tokenizer.
        kind: what the numbers are.
        weights: that they depend on, by name.
        config: of the model.
        tokenizer: that made the tokens.
        width: numbers a pair.
        agree: of several processes whose model lies in shards, whether one needs what all have to compute together.

    Attributes:
        computed: different pairs whose numbers were not there, and are now.
    """

    def __init__(
        self,
        directory: Path,
        kind: str,
        weights: Mapping[str, Tensor],
        config: Any,
        tokenizer: Any,
        width: int,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self._model = fingerprint(weights, config)
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
        folder = f"{kind}-{self._model[:16]}-{hashlib.sha256(vocabulary).hexdigest()[:8]}"
        self.store = Cache(directory / folder, width)
        self.computed, self.agree = 0, agree
        log.info("%s: %d pairs are there", self.store.directory, len(self.store))

    def rows(self, pairs: Sequence[tuple[Encoded, Encoded]], compute: Callable[[], Tensor]) -> Tensor:
        """Numbers [N, width] fp32 of N pairs, on the CPU.

        Where one is missing, ``compute`` gives those of all N, always of the same N: what a number is, down to its last
        bit, depends on the pairs that are packed beside it. Of these the missing ones are stored, and the others are
        taken as they were stored, so that a run that is resumed over what it stored after its last checkpoint sees the
        numbers that it saw before.
        """
        keys = [pair_key(self._model, pair) for pair in pairs]
        found = [self.store.get(key) for key in keys]
        missing = any(row is None for row in found)
        fresh = compute() if self.agree(missing) else None
        if missing:
            computed = fresh.detach().to("cpu", torch.float32).reshape(len(pairs), -1)
            before = len(self.store)
            self.store.put(keys, computed)
            self.computed += len(self.store) - before
            found = [self.store.get(key) for key in keys]
            found = [new if old is None else old for old, new in zip(found, computed, strict=True)]  # not finite
        return torch.stack(found)


def directory(recipe: Recipe) -> Path:
    """Where the recipe's caches lie: ``data.cache``, or ``cache`` beside the run directory, so that runs share it."""
    return Path(recipe.data.cache or Path(recipe.output.directory).absolute().parent / "cache")
