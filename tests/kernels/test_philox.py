"""Philox4x32-10 against the published known answers, and the statistics of the masks that are made of it."""

import pytest
import torch

from dph_kernels import philox

# Random123 (Salmon et al.), kat_vectors, philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    got = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(word.item() for word in got) == words


def test_multiply_is_exact_to_the_last_bit():
    values = torch.tensor([0, 1, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    for a in (1, 0xD2511F53, 0xFFFFFFFF):
        high, low = philox.multiply(a, values)
        assert [h << 32 | lo for h, lo in zip(high.tolist(), low.tolist(), strict=True)] == [
            a * b for b in values.tolist()
        ]


@pytest.mark.parametrize("value", [0, 1, -1, 2**32, -(2**63), 2**63 - 1])
def test_split_is_twos_complement(value):
    low, high = philox.split(value)
    assert (high << 32 | low) == value % 2**64
    tensor_low, tensor_high = philox.split(torch.tensor(value))
    assert (tensor_low.item(), tensor_high.item()) == (low, high)


def mask(rows, columns=512, dropout=0.25, seed=7, stream=philox.POOLED):
    return philox.dropout_mask(torch.as_tensor(rows), columns, dropout, seed, stream, torch.float64)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 0.9])
def test_mask_drops_its_share_and_keeps_the_mean(dropout):
    drawn = mask(range(256), dropout=dropout)
    dropped = (drawn == 0).double().mean().item()
    assert abs(dropped - dropout) < 5 * (dropout * (1 - dropout) / drawn.numel()) ** 0.5 + 1e-12
    assert torch.equal(drawn[drawn != 0].unique(), torch.tensor([1 / (1 - dropout)], dtype=torch.float64))


def test_threshold_is_exact():
    assert philox.threshold(0.5) == 2**31
    assert philox.threshold(0.0) == 0
    assert philox.threshold(1 - 2**-53) == 2**32 - 1


def test_a_row_has_the_same_mask_in_any_batch_and_of_any_width():
    whole = mask(range(100))
    assert torch.equal(mask([41, 7]), whole[[41, 7]])
    assert torch.equal(mask([41], columns=63), whole[[41], :63])


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8},
        {"seed": 7 + 2**32},
        {"seed": -7},
        {"stream": philox.INPUT},
        {"rows": range(1000, 1256)},
        {"rows": [r + 2**32 for r in range(256)]},
        {"rows": [-r - 1 for r in range(256)]},
    ],
)
def test_seeds_streams_and_rows_are_independent(other):
    first, second = mask(range(256), dropout=0.5), mask(**{"rows": range(256), "dropout": 0.5, **other})
    correlation = ((first - 1) * (second - 1)).mean().item()
    assert abs(correlation) < 5 / first.numel() ** 0.5


def test_columns_and_neighbouring_rows_are_independent():
    drawn = mask(range(256), dropout=0.5) - 1
    for shifted in (drawn.roll(1, 0), drawn.roll(1, 1), drawn.roll(4, 1), drawn.roll((1, 1), (0, 1))):
        assert abs((drawn * shifted).mean().item()) < 5 / drawn.numel() ** 0.5
