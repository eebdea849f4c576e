"""Outputs of frozen models for preference pairs, stored on disk across epochs and runs.

    runs/cache/reference-1f6e5d2c9a3b4870-5d41402a/    log-probabilities of one reference model with one tokenizer
    runs/cache/states-90c7a2f41be85d36-5d41402a/       hidden states of judged tokens of one frozen backbone

A directory may be deleted whenever no process uses it: its rows are computed again.
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
from dph.train.precompute.store import RowStore, fingerprint, pair_key
from dph.train.recipe import Recipe

log = logging.getLogger(__name__)


class PairCache:
    """Rows of numbers for pairs, or for single answers, of one model.

    Args:
        directory: parent of all caches; kind, model and tokenizer name this one's subdirectory.
        kind: "reference" or "states".
        weights: weights that the rows depend on, by name.
        config: the model's configuration.
        tokenizer: the tokenizer that made the tokens.
        width: numbers per row.
        any_rank: function from a flag to whether it is true on some rank; on several ranks with a sharded model, all
            have to compute together if one has to.
        by_answer: each of a record's answers has a row of its own, so that a record may have any number of them.

    Attributes:
        computed: number of different rows that were missing and have been computed.
    """

    def __init__(
        self,
        directory: Path,
        kind: str,
        weights: Mapping[str, Tensor],
        config: Any,
        tokenizer: Any,
        width: int,
        any_rank: Callable[[bool], bool] = bool,
        by_answer: bool = False,
    ) -> None:
        self._model = fingerprint(weights, config)
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
        name = f"{kind}-{self._model[:16]}-{hashlib.sha256(vocabulary).hexdigest()[:8]}"
        self.store = RowStore(directory / name, width)
        self.computed, self.any_rank, self.by_answer = 0, any_rank, by_answer
        log.info("%s: %d stored pairs", self.store.directory, len(self.store))

    def rows(self, records: Sequence[Sequence[Encoded]], compute: Callable[[], Tensor]) -> Tensor:
        """Return the rows [N, width] fp32 of N pairs, or of all N answers of ``records``, on the CPU.

        If a row is missing, ``compute`` returns all N, always of the same records: the last bits of a row depend on the
        answers that are packed with it. Missing rows are stored; rows that are stored already are returned as stored,
        so that a run that resumes before some of its stored rows reads the same numbers again.
        """
        keys = self._keys(records)
        rows = [self.store.get(key) for key in keys]
        missing = any(row is None for row in rows)
        outputs = compute() if self.any_rank(missing) else None
        if missing:
            computed = outputs.detach().to("cpu", torch.float32).reshape(len(keys), -1)
            self._put(keys, computed)
            for i, key in enumerate(keys):
                stored = self.store.get(key)
                rows[i] = computed[i] if stored is None else stored  # rows that are not finite are not stored
        return torch.stack(rows)

    def put(self, records: Sequence[Sequence[Encoded]], outputs: Tensor) -> None:
        """Store outputs [A, ...] of the A answers of ``records`` that were computed for another purpose."""
        keys = self._keys(records)
        self._put(keys, outputs.reshape(len(keys), -1))

    def _keys(self, records: Sequence[Sequence[Encoded]]) -> list[bytes]:
        if self.by_answer:
            records = [(answer,) for answers in records for answer in answers]
        return [pair_key(self._model, answers) for answers in records]

    def _put(self, keys: Sequence[bytes], rows: Tensor) -> None:
        before = len(self.store)
        self.store.put(keys, rows)
        self.computed += len(self.store) - before


def cache_directory(recipe: Recipe) -> Path:
    """Return the directory of caches: ``data.cache``, or ``cache`` next to the run directory, shared by its runs."""
    return Path(recipe.data.cache or Path(recipe.output.directory).absolute().parent / "cache")
