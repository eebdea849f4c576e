"""The choice of the next tokens, by noise that depends on nothing but a candidate's key, its step and the token.

A token is drawn as the largest sum of a logit and Gumbel noise (the Gumbel-max trick), which has the distribution of
the softmax. A change of the logits by rounding, as another device or library may make, changes the choice only if two
sums are closer than that.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

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

from dph.infer.sampling import Sampling

STEPS = np.array([0x9E3779B1, 0x85EBCA77], dtype=np.uint32)  # odd: all steps of a key differ
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


def prompt_key(seed: int, prompt: Sequence[int]) -> bytes:
    """Return what the keys of a prompt's candidates begin with."""
    return hashlib.blake2b(np.array([seed, *prompt], dtype=np.int64).tobytes(), digest_size=16).digest()


def candidate_key(prompt: bytes, index: int) -> np.ndarray:
    """Return the key [2] uint32 of a candidate of a prompt."""
    digest = hashlib.blake2b(index.to_bytes(8, "little"), key=prompt, digest_size=8).digest()
    return np.frombuffer(digest, dtype=np.uint32)


def choose(
    logits: Tensor, options: Sampling, keys: np.ndarray, steps: np.ndarray, seen: Tensor | None = None
) -> Tensor:
    """Return the next tokens [R] after logits [R, V] fp32.

    Args:
        options: of all rows.
        keys: [R, 2] uint32, of the candidates.
        steps: [R] tokens that each has said so far.
        seen: [R, S] tokens of prompts and answers, in any order and as often as wanted; for the repetition penalty.
    """
    scores = processors(options)(seen, logits)
    if not options.greedy:
        scores = scores + gumbel(keys, steps, logits.shape[1], logits.device)
    return scores.argmax(-1)


def gumbel(keys: np.ndarray, steps: np.ndarray, vocabulary: int, device: torch.device) -> Tensor:
    """Return standard Gumbel noise [R, V] fp32 for keys [R, 2] uint32 and steps [R]."""
    mixed = keys + steps.astype(np.uint32)[:, None] * STEPS
    first, second = torch.from_numpy(mixed.view(np.int32)).to(device)[:, :, None].unbind(1)
    word = _hashed_tokens(vocabulary, device) ^ first
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
