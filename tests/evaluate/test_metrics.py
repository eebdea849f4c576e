"""Metrics against known values, and degenerate inputs."""

import math
import warnings

import numpy as np
import pytest

from dph import tasks
from dph.evaluate.metrics import (
    METRICS,
    accuracy,
    bootstrap,
    chosen_shares,
    f1,
    matthews,
    pearson,
    spearman,
    wilson,
    wilson_of_groups,
    with_interval,
)


def chosen(*columns):
    """Shares of records whose choices are these, without ties, and their references."""
    predicted, gold = (np.array(column) for column in columns)
    return np.eye(max(predicted.max(), gold.max().astype(int)) + 1)[predicted], gold.astype(float)


# The literals are what scikit-learn 1.9.1 and scipy 1.17.1 give for these arrays.


def test_accuracy():
    assert accuracy(*chosen([1, 0, 2, 1], [1, 1, 2, 0])) == 0.5


@pytest.mark.parametrize(
    ("predicted", "gold", "want"),
    [
        ([1, 1, 1, 0, 0, 1], [1, 0, 1, 1, 0, 1], 0.75),
        ([0, 0], [0, 0], 0.0),
        ([0, 0, 1], [1, 1, 0], 0.0),
    ],
)
def test_f1(predicted, gold, want):
    assert f1(*chosen(predicted, gold)) == pytest.approx(want)


@pytest.mark.parametrize(
    ("predicted", "gold", "want"),
    [
        ([1, 0, 1, 1], [1, 1, 1, 0], -1 / 3),
        ([1, 0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1, 1], 5 / 12),
        ([0, 2, 1, 2, 0, 1, 2], [0, 2, 2, 2, 1, 1, 0], 0.34375),
        ([1, 1, 1], [0, 1, 0], 0.0),
    ],
)
def test_matthews(predicted, gold, want):
    assert matthews(*chosen(predicted, gold)) == pytest.approx(want)


def test_correlations():
    x, y = [1, 2, 3, 4, 5, 5], [5, 6, 7, 8, 7, 8.5]
    assert pearson(*chosen(x, y)) == pytest.approx(0.8762228583311031)
    assert spearman(*chosen(x, y)) == pytest.approx(0.8382352941176471)
    assert pearson(*chosen(x, np.subtract(6, x))) == pytest.approx(-1.0)
    assert spearman(*chosen(x, np.exp(x))) == pytest.approx(1.0)
    assert pearson(*chosen([1] * 6, y)) == 0.0


def test_every_task_has_a_known_metric():
    assert {tasks.load(name).metric for name in tasks.names()} - {None} <= set(METRICS)


def test_shares_of_one_group_count_as_often_as_they_are_independent():
    rng = np.random.default_rng(0)
    alone = rng.integers(0, 2, 50).astype(float)
    assert wilson_of_groups(alone, range(50)) == wilson(alone.sum(), 50)
    groups = np.repeat(np.arange(50), 6).tolist()
    copies = wilson_of_groups(np.repeat(alone, 6), groups)  # six copies of a share say no more than one
    assert (copies.low, copies.high) == pytest.approx(
        (wilson(alone.sum(), 50).low, wilson(alone.sum(), 50).high), abs=0.01
    )
    assert wilson_of_groups(np.ones(12), [0] * 4 + [1] * 8) == wilson(2, 2)
    assert wilson_of_groups(np.array([1.0, 0.0]), "aa") == wilson(0.5, 1)
    assert wilson_of_groups(np.tile([1.0, 0.0], 5), np.repeat(np.arange(5), 2).tolist()) == wilson(5, 10)
    covered = 0
    for _ in range(400):  # pairs of 30 prompts, whose own shares spread about 0.7
        own = rng.beta(0.7, 0.3, 30)
        interval = wilson_of_groups(
            (rng.random((30, 6)) < own[:, None]).astype(float).ravel(), np.repeat(range(30), 6).tolist()
        )
        covered += interval.low <= 0.7 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


def test_wilson_known_values():
    assert all(wilson(0, n).low == 0 and wilson(n, n).high == 1 for n in range(1, 50))
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert (wilson(81, 263).low, wilson(81, 263).high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert (wilson(0, 20).low, wilson(0, 20).high) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(20, 20).high == 1.0
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        wilson(0, 0)


def test_bootstrap_is_seeded_and_covers():
    rng = np.random.default_rng(3)
    gold = rng.integers(2, size=400)
    records = chosen(np.where(rng.random(400) < 0.8, gold, 1 - gold), gold)
    interval = bootstrap(accuracy, *records)
    assert interval == bootstrap(accuracy, *records)
    assert interval.low < interval.value < interval.high
    # The normal approximation's width is 2 * 1.96 * sqrt(p (1 - p) / n).
    width = 2 * 1.96 * math.sqrt(interval.value * (1 - interval.value) / 400)
    assert interval.high - interval.low == pytest.approx(width, rel=0.15)


@pytest.mark.parametrize("metric", [matthews, pearson, spearman])
@pytest.mark.parametrize("constant", [0, 3])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_constant_array_correlates_with_nothing(metric, constant, n):
    other = np.arange(n) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for predicted, gold in (
            (np.full(n, constant), other), (other, np.full(n, constant)), (np.full(n, constant),) * 2,
        ):  # fmt: skip
            assert metric(*chosen(predicted, gold)) == 0.0


# Ties


@pytest.mark.parametrize(
    ("scores", "want"),
    [
        ([[0.1, 0.3, 0.2]], [[0, 1, 0]]),
        ([[1.0, 1.0, 1.0, 1.0]], [[0.25] * 4]),
        ([[1.0, 0.0, 1.0], [2.0, 2.0]], [[0.5, 0, 0.5], [0.5, 0.5, 0]]),
        ([[-1e9]], [[1]]),
    ],
)
def test_k_equal_scores_are_chosen_with_a_share_of_1_in_k(scores, want):
    assert chosen_shares(scores).tolist() == want


@pytest.mark.parametrize("gold", range(4))
def test_a_tie_counts_the_same_whichever_choice_is_right(gold):
    shares = chosen_shares([[0.5] * 4] * 8)
    interval = with_interval(accuracy, shares, np.full(8, gold))
    assert interval == wilson(2, 8)
    assert accuracy(shares, np.full(8, gold)) == interval.value == 0.25


def test_metrics_of_ties_are_those_of_every_choice_in_turn():
    """A record whose k choices tie equals k records of weight 1/k."""
    shares, gold = chosen_shares([[1, 1], [0, 1], [1, 0], [1, 0]]), np.array([1, 1, 0, 1])
    several = chosen([0, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 1, 1])
    for metric in (accuracy, f1, matthews):
        assert metric(shares, gold) == pytest.approx(metric(*several))
    middle = np.eye(6)[[0, 2, 5]]  # the mean of choices 1 and 3 that tie is 2
    tied = chosen_shares([[1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]])
    for metric in (pearson, spearman):
        assert metric(tied, np.array([0.5, 3, 4])) == pytest.approx(metric(middle, np.array([0.5, 3, 4])))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_finite_number_is_an_error(bad):
    with pytest.raises(RuntimeError, match=r"row 1: expected finite numbers, got \[0.0, -?(nan|inf)\]: the model's"):
        chosen_shares([[1.0, 2.0], [0.0, bad]], "row {}".format)
