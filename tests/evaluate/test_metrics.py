"""Metrics against known values, and degenerate inputs."""

import math
import warnings

import numpy as np
import pytest

from dph import tasks
from dph.evaluate.metrics import METRICS, accuracy, bootstrap, f1, matthews, pearson, spearman, wilson


def arrays(*columns):
    return tuple(np.array(column, dtype=float) for column in columns)


# The literals are what scikit-learn 1.9.1 and scipy 1.17.1 give for these arrays.


def test_accuracy():
    assert accuracy(*arrays([1, 0, 2, 1], [1, 1, 2, 0])) == 0.5


@pytest.mark.parametrize(
    ("predicted", "gold", "want"),
    [
        ([1, 1, 1, 0, 0, 1], [1, 0, 1, 1, 0, 1], 0.75),
        ([0, 0], [0, 0], 0.0),
        ([0, 0, 1], [1, 1, 0], 0.0),
    ],
)
def test_f1(predicted, gold, want):
    assert f1(*arrays(predicted, gold)) == pytest.approx(want)


@pytest.mark.parametrize(
    ("predicted", "gold", "want"),
    [
        ([1, -1, 1, 1], [1, 1, 1, -1], -1 / 3),
        ([1, 0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1, 1], 5 / 12),
        ([0, 2, 1, 2, 0, 1, 2], [0, 2, 2, 2, 1, 1, 0], 0.34375),
        ([1, 1, 1], [0, 1, 0], 0.0),
    ],
)
def test_matthews(predicted, gold, want):
    assert matthews(*arrays(predicted, gold)) == pytest.approx(want)


def test_correlations():
    x, y = arrays([1, 2, 3, 4, 5, 5], [5, 6, 7, 8, 7, 8.5])
    assert pearson(x, y) == pytest.approx(0.8762228583311031)
    assert spearman(x, y) == pytest.approx(0.8382352941176471)
    assert pearson(x, -x) == pytest.approx(-1.0)
    assert spearman(np.exp(x), x) == pytest.approx(1.0)
    assert pearson(np.ones(6), y) == 0.0


def test_every_task_has_a_known_metric():
    assert {tasks.load(name).metric for name in tasks.names()} - {None} <= set(METRICS)


def test_wilson_known_values():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert (wilson(81, 263).low, wilson(81, 263).high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert (wilson(0, 20).low, wilson(0, 20).high) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(20, 20).high == 1.0
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        wilson(0, 0)


def test_bootstrap_is_seeded_and_covers():
    rng = np.random.default_rng(3)
    gold = rng.integers(2, size=400)
    predicted = np.where(rng.random(400) < 0.8, gold, 1 - gold)
    interval = bootstrap(accuracy, predicted, gold)
    assert interval == bootstrap(accuracy, predicted, gold)
    assert interval.low < interval.value < interval.high
    # The normal approximation's width is 2 * 1.96 * sqrt(p (1 - p) / n).
    width = 2 * 1.96 * math.sqrt(interval.value * (1 - interval.value) / 400)
    assert interval.high - interval.low == pytest.approx(width, rel=0.15)


@pytest.mark.parametrize("metric", [matthews, pearson, spearman])
@pytest.mark.parametrize("constant", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_constant_array_correlates_with_nothing(metric, constant, n):
    other = np.arange(n) % 2 + 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for predicted, gold in (
            (np.full(n, constant), other), (other, np.full(n, constant)), (np.full(n, constant),) * 2,
        ):  # fmt: skip
            assert metric(predicted, gold) == 0.0


@pytest.mark.parametrize(
    ("metric", "want"), [(accuracy, 0.75), (f1, 2 / 3), (matthews, 0.6708203932499369), (spearman, 0.9428090415820635)]
)
def test_a_nan_is_a_wrong_prediction(metric, want):
    """As computed without either library: a class of its own, the highest in a ranking."""
    predicted, gold = arrays([1, math.nan, 0, 0], [1, 1, 0, 0])
    assert metric(predicted, gold) == pytest.approx(want)


def test_pearson_of_a_nan_is_nan():
    assert math.isnan(pearson(*arrays([1, math.nan, 0], [1, 1, 0])))
    assert math.isnan(pearson(*arrays([1, math.nan, 0], [1, 1, 1])))
