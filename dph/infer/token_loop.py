"""Several tokens of many candidates in a row on the device alone: the host looks at them after the last one.

On a GPU a token of a small model takes less time than the host needs to prepare it. Here what changes from token to
token (rows, lengths, noise, ends) is computed on the device, all shapes are fixed, and the work of one token is
captured in a CUDA graph that is replayed.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dph.infer.choice import choose
from dph.model.heads import JudgedStates
from dph_kernels.rope_attention.growing import GrowingLayout
from dph_kernels.transfer import all_to_device

if TYPE_CHECKING:
    from dph.infer.sampling import Sampling
    from dph.infer.token_pool import TokenPool
    from dph.model.judging import JudgingModel

TURNS = 16  # tokens between two looks of the host
LEAST_SIZE = 16  # candidates of the smallest loop; others have twice as many, and so on
EAGER_CALLS = 1  # before a graph is captured: they compile kernels and allocate what is kept


class Drawn(NamedTuple):
    """Tokens of S candidates from one call.

    Attributes:
        tokens, logprobs: [turns, S]; a candidate's are valid up to its ``count``.
        count: [S] tokens drawn.
        read_end: [S] whether the end-of-turn token has been read.
        judged: [size, N C] on the device, the states that the heads judge, of those that have read it.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    count: np.ndarray
    read_end: np.ndarray
    judged: Tensor


class TokenLoop:
    """The tensors of ``size`` candidates at most, and the work of one token of each.

    Args:
        pool: of the prompts and candidates.
        model: with reward heads or without.
        end: the token that ends an answer.
        sampling: of all candidates, without repetition penalty.
        size: candidates; a call with fewer computes as many.
        turns: tokens of a call.

    Attributes:
        graph_pool: of the graph's memory; None on the CPU.
    """

    def __init__(
        self, pool: TokenPool, model: JudgingModel, end: int, sampling: Sampling, size: int, turns: int
    ) -> None:
        self.pool, self.model, self.end, self.sampling, self.turns = pool, model, end, sampling, turns
        device = model.device
        self.layout = GrowingLayout(size, pool.rows, device)
        self.tokens, self.rows, self.said, self.limit = torch.zeros((4, size), dtype=torch.int64, device=device)
        self.keys = torch.zeros((size, 2), dtype=torch.int32, device=device)
        self.done = torch.ones(size, dtype=torch.bool, device=device)
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)
        self.drawn = torch.zeros((turns, size), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((turns, size), dtype=torch.float32, device=device)
        self.judged: Tensor | None = None
        self.graph_pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._calls, self._graph, self._moved = 0, None, 0

    def run(self, states: np.ndarray, keys: np.ndarray) -> Drawn:
        """Draw up to ``turns`` tokens of each candidate, fewer of those that end.

        Args:
            states: [S] rows of ``pooled_engine.STATES``, of one candidate each, with one fresh token.
            keys: [S, 2] of their noise.
        """
        count = len(states)
        start, said, prompt = states["start"], states["said"], states["prompt"]
        self.layout.load(
            np.stack([start, start + said], 1),
            np.stack([prompt, prompt + states["length"]], 1),
            start + np.minimum(said + self.turns, states["limit"] + 1),
        )
        rows, size = start + said - 1, len(self.tokens)
        columns = self.pool.tokens[rows], rows, said, states["limit"], np.zeros(count, np.int64)
        table = np.repeat([[self.end], [self.pool.padding], [0], [0], [1]], size, 1)
        table[:, :count] = columns
        padded_keys = np.zeros((size, 2), np.int32)
        padded_keys[:count] = keys
        given, own_keys = all_to_device([torch.from_numpy(x) for x in (table, padded_keys)], self.tokens.device)
        for kept, values in zip((self.tokens, self.rows, self.said, self.limit, self.done), given, strict=True):
            kept.copy_(values)
        self.keys.copy_(own_keys)
        self._play()
        results = self.drawn, self.logprobs, self.said, self.done & (self.tokens == self.end)
        tokens, logprobs, all_said, read_end = (result.cpu().numpy()[..., :count] for result in results)
        return Drawn(tokens, logprobs, all_said - said, read_end, self.judged)

    def _play(self) -> None:
        """Compute all turns."""
        self._calls += 1
        if self.tokens.device.type != "cuda" or self._calls <= EAGER_CALLS:
            for _ in range(self.turns):
                self.draw()
            return
        if self._graph is None or self._moved != self.layout.moved:
            self._graph, self._moved = torch.cuda.CUDAGraph(), self.layout.moved
            with torch.cuda.graph(self._graph, pool=self.graph_pool, capture_error_mode="thread_local"):
                self.draw()
        for _ in range(self.turns):
            self._graph.replay()

    def draw(self) -> None:
        """Read the last token of each candidate and draw the next one; nothing here waits for the device."""
        backbone = self.model.backbone
        observer = JudgedStates(self.model.heads.layers, len(backbone.blocks), itemgetter(...))
        memory = self.pool.call(self.rows, decode=True)
        hidden = backbone(self.tokens, self.layout, memory, observe=observer)
        logits = self.pool.predict(hidden)

        is_end = self.tokens == self.end
        states = observer.joined()
        if self.judged is None:
            self.judged = torch.zeros_like(states)
        self.judged.copy_(states.where((is_end & ~self.done)[:, None], self.judged))
        chosen = self.choose(logits)
        logprobs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(1)
        self.drawn.index_copy_(0, self.turn, chosen[None])
        self.logprobs.index_copy_(0, self.turn, logprobs[None])
        self.turn.add_(1).remainder_(self.turns)

        draws = ~(self.done | is_end)
        self.said += draws
        self.tokens.copy_(chosen.where(draws, self.tokens))
        self.done |= is_end | ((self.said >= self.limit) & (self.tokens != self.end))  # the end has to be read
        self.rows.copy_((self.rows + 1).where(~self.done, self.pool.padding))
        self.layout.advance(~self.done)

    def choose(self, logits: Tensor) -> Tensor:
        """Return the next tokens [size] after logits [size, V]."""
        return choose(logits, self.sampling, self.keys, self.said)
