"""The choice of the next tokens, by noise that depends on nothing but a candidate's key, its step and the token.

A token is drawn as the largest sum of a logit and Gumbel noise (the Gumbel-max trick), which has the distribution of
the softmax. A change of the logits by rounding, as another device or library may make, changes the choice only if two
sums are closer than that.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

if TYPE_CHECKING:
    from dph.infer.sampling import Sampling

STEPS = (0x9E3779B1 - 2**32, 0x85EBCA77 - 2**32)  # as int32; odd: all steps of a key differ
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)  # of lowbias32, a hash of 32 bits with little bias, as int32


@functools.lru_cache(maxsize=64)
def processors(options: Sampling) -> LogitsProcessorList:
    """Return transformers' processors of logits for the options, in its order."""
    made = LogitsProcessorList()
    if options.repetition_penalty != 1:
        made.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.greedy:
        return made
    made.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        made.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        made.append(TopPLogitsWarper(options.top_p))
    if options.min_p > 0:
        made.append(MinPLogitsWarper(options.min_p))
    if options.typical_p < 1:
        made.append(TypicalLogitsWarper(options.typical_p))
    return made


def candidate_keys(seed: int, prompt: Sequence[int], indices: Sequence[int]) -> np.ndarray:
    """Return the keys [C, 2] int32 of a prompt's candidates with these numbers."""
    digest = hashlib.blake2b(np.array([seed, *prompt], dtype=np.int64).tobytes(), digest_size=8).digest()
    word = np.frombuffer(digest, np.uint64) + np.asarray(indices, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # the finaliser of SplitMix64
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (word ^ (word >> np.uint64(31))).view(np.int32).reshape(-1, 2)


def choose(
    logits: Tensor,
    options: Sampling,
    keys: Tensor,
    steps: Tensor,
    states: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Return the next tokens [C] of candidates; all tensors are on one device, and the host waits for none.

    Args:
        logits: [S, V] fp32, of their states.
        options: of all candidates.
        keys: [C, 2] int32, of ``candidate_keys``.
        steps: [C] tokens that each has said so far.
        states: [C] row of ``logits`` of each; None: candidate i has row i.
        seen: [S, L] tokens of prompts and answers, in any order and as often as wanted; for the repetition penalty.
    """
    scores = processors(options)(seen, logits)
    if options.greedy:
        best = scores.argmax(-1)
        return best if states is None else best[states]
    noise = gumbel(keys, steps, logits.shape[1])
    return noise.add_(scores if states is None else scores[states]).argmax(-1)


def gumbel(keys: Tensor, steps: Tensor, vocabulary: int) -> Tensor:
    """Return standard Gumbel noise [R, V] fp32 for keys [R, 2] int32 and steps [R]."""
    steps = steps.to(torch.int32)[:, None]
    first, second = (keys[:, i : i + 1] + steps * STEPS[i] for i in (0, 1))
    word = _hashed_tokens(vocabulary, keys.device) ^ first
    word *= MULTIPLIERS[0]
    word ^= (word >> 15) & 0x1FFFF
    word += second
    word *= MULTIPLIERS[1]
    word ^= (word >> 16) & 0xFFFF
    uniform = ((word >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)  # 24 bits: fp32 holds all of them exactly
    return uniform.log_().neg_().log_().neg_()


@functools.lru_cache(maxsize=8)
def _hashed_tokens(vocabulary: int, device: torch.device) -> Tensor:
    """Return lowbias32 of the token ids [V] int32."""
    word = np.arange(vocabulary, dtype=np.uint32)
    word ^= word >> 16
    word *= np.uint32(0x7FEB352D)
    word ^= word >> 15
    word *= np.uint32(0x846CA68B)
    word ^= word >> 16
    return torch.from_numpy(word.view(np.int32)).to(device)
