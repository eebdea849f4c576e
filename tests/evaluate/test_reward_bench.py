"""RewardBench 2's figures by hand."""

import math

import numpy as np
import pytest

from dph.errors import UserError
from dph.evaluate.reward_bench import Prompt, by_subset, ties


def prompt(scores, right, subset="Math", identity="x"):
    correct = np.array([i < right for i in range(len(scores))], dtype=float)
    return Prompt(np.array(scores, dtype=float), correct, subset, identity)


def test_the_best_of_four_by_subset_with_ties_shared():
    rows = [prompt([3, 1, 0, 2], 1), prompt([1, 1, 0, 0], 1), prompt([0, 1, 2, 3], 1), prompt([1, 5, 0, 0], 2, "Focus")]
    math_figure, focus, every = by_subset(rows)
    assert (math_figure.name, math_figure.n, math_figure.value) == ("Math", 3, pytest.approx(0.5))
    assert (focus.name, focus.value) == ("Focus", 1.0)
    assert (every.name, every.n, every.value) == ("all", 4, pytest.approx(0.75))
    assert [row.name for row in by_subset(rows[:3])] == ["Math"]


def test_the_score_of_ties():
    rows = [
        prompt([5, 1, 0], 1, "Ties", "ref:1"),
        prompt([6, 5, 1], 2, "Ties", "tied:1"),  # right, spread 1 below both margins of 4
        prompt([2, 1], 1, "Ties", "ref:2"),
        prompt([9, 3, 1], 2, "Ties", "tied:2"),  # right, spread 6 above both margins
        prompt([0, 1], 1, "Ties", "ref:3"),  # wrong
    ]
    size = (math.tanh(4 / 1 - 1) + math.tanh(1 / 6 - 1)) / 2
    assert ties(rows) == pytest.approx(0.3 * 2 / 3 + 0.3 * 1 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * size)
    assert by_subset(rows)[0].interval is None
    without_spread = [prompt([3, 1], 1, "Ties", "ref:1"), prompt([2, 2, 1], 2, "Ties", "tied:1")]
    assert ties(without_spread) == pytest.approx(1.01)
    with pytest.raises(UserError, match="id: expected ref:N or tied:N in the subset Ties, got 'x'"):
        ties([prompt([1, 0], 1, "Ties")])
