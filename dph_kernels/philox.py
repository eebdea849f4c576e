"""Philox4x32-10, the counter-based random generator (Salmon et al., SC 2011), and dropout masks from it.

A mask is a pure function of (seed, row id, column, stream): nothing is stored between forward and backward, and a
row's mask depends neither on the rest of the batch nor on the device. All backends draw the same words.
"""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF

# Streams of one seed, one for each dropout of an operator.
POOLED, INPUT = 0, 1


def split(value: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """Return the low and high 32 bits of an int64 (two's complement), each in [0, 2**32)."""
    return value & LOW, (value >> 32) & LOW


def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return high and low 32 bits of a 32 x 32 bit product, in int64 without overflow: b in two halves of 16 bits."""
    low = a * (b & 0xFFFF)
    rest = a * (b >> 16) + (low >> 16)
    return rest >> 16, ((rest & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = 10) -> list[Tensor]:
    """Return four random 32-bit words per counter, as int64 in [0, 2**32).

    ``counter`` holds four int64 tensors that broadcast, ``key`` two ints, all with values in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = multiply(MULTIPLIERS[0], c0)
        high1, low1 = multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return [c0, c1, c2, c3]


def threshold(dropout: float) -> int:
    """Return how many of the 2**32 words drop a column: it is kept if its word >= threshold, an exact integer test."""
    return int(dropout * 2**32)


def dropout_mask(row_ids: Tensor, columns: int, dropout: float, seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Return the mask [R, columns]: 0 for a dropped element, else 1 / (1 - dropout).

    Word 0 of Philox with key (seed low, seed high) and counter (column, stream, row id low, row id high).
    """
    row_low, row_high = split(row_ids[:, None])
    column = torch.arange(columns, device=row_ids.device)
    word = philox4x32((column, torch.full_like(column, stream), row_low, row_high), split(seed))[0]
    return (word >= threshold(dropout)).to(dtype) / (1 - dropout)
