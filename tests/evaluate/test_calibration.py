"""Probabilities from rewards, their errors, and the share of wrong labels."""

import numpy as np
import pytest
from scipy.special import expit

from dph.errors import UserError
from dph.evaluate import calibration
from dph.evaluate.calibration import UNCALIBRATED, Calibration


def sampled(count, temperature, midpoint, seed=0):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(0, 3, count)
    return rewards, rng.random(count) < expit((rewards - midpoint) / temperature)


@pytest.mark.parametrize(("temperature", "midpoint"), [(1.0, 0.0), (3.0, 0.7), (0.4, -1.5)])
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_the_calibration_that_made_the_labels_is_found(temperature, midpoint, scale):
    rewards, is_good = sampled(20_000, temperature, midpoint)
    fitted = calibration.fit(rewards * scale, is_good)
    assert fitted.temperature == pytest.approx(temperature * scale, rel=0.1)
    assert fitted.midpoint == pytest.approx(midpoint * scale, abs=0.1 * scale)


def test_calibration_lowers_the_error_on_the_other_half():
    rewards, is_good = sampled(4000, 4.0, 0.5)
    before = calibration.errors(UNCALIBRATED.probability(rewards), is_good)
    after = calibration.errors(calibration.crossed(rewards, is_good, list(range(4000))), is_good)
    assert before.ece > 0.15 > 0.03 > after.ece
    assert after.brier < before.brier
    assert before.ece_by_chance < 0.03
    assert after.ece == pytest.approx(after.ece_by_chance, abs=0.015)
    assert sum(point.n for point in after.bins) == 4000


def test_errors_by_hand():
    probabilities, is_good = np.array([0.01, 0.02, 0.5, 1.0]), np.array([0, 1, 1, 1])
    found = calibration.errors(probabilities, is_good)
    assert found.ece == pytest.approx((abs(0.03 - 1) + abs(0.5 - 1) + 0) / 4)
    assert found.brier == pytest.approx(np.mean((probabilities - is_good) ** 2))
    assert [point.n for point in found.bins] == [2, 1, 1]


def test_separated_answers_have_a_finite_temperature():
    fitted = calibration.fit(np.array([2.0, 3.0, -1.0, -2.0]), np.array([1, 1, 0, 0]))
    assert 0 < fitted.temperature < 10
    assert np.all(np.diff(fitted.probability(np.array([-2.0, 0.0, 3.0]))) > 0)


def test_data_that_show_no_calibration_are_refused():
    with pytest.raises(UserError, match="expected good and bad answers, got 2 good and 0 bad"):
        calibration.fit(np.array([1.0, 2.0]), np.array([True, True]))
    with pytest.raises(UserError, match="expected good answers to have higher rewards"):
        calibration.fit(np.array([1.0, 2.0]), np.array([True, False]))
    with pytest.raises(UserError, match="expected at least 10 prompts, got 1"):
        calibration.crossed(np.zeros(20), np.arange(20) % 2, ["same"] * 20)


def test_halves_keep_prompts_together():
    first = calibration.halves([f"p{i // 2}" for i in range(40)])
    assert first.sum() == 20
    assert np.array_equal(first[::2], first[1::2])


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3])
def test_the_share_of_exchanged_labels_is_found(epsilon):
    rng = np.random.default_rng(3)
    margins = np.abs(rng.normal(0, 6, 3000))
    wrong = rng.random(3000) < expit(-margins)
    exchanged = rng.random(3000) < epsilon
    found = calibration.label_noise(np.where(wrong ^ exchanged, -margins, margins) * 1e-3, list(range(3000)))
    assert found.value == pytest.approx(epsilon, abs=0.04)
    assert found.low <= epsilon <= found.high
    assert found.high - found.low < 0.1


def test_probability_of_any_shape():
    assert Calibration(2.0, 1.0).probability(np.array([[1.0, 3.0]])) == pytest.approx(np.array([[0.5, expit(1.0)]]))
