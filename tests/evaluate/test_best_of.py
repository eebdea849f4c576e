"""Best of N over all choices of N candidates, votes, and what makes answers equal."""

import itertools

import numpy as np
import pytest
from scipy import stats

from dph.evaluate import best_of
from dph.evaluate.best_of import scored
from dph.evaluate.metrics import wilson


def test_the_best_of_n_is_the_mean_over_all_choices():
    rng = np.random.default_rng(0)
    for count in range(1, 7):
        scores, correct = rng.integers(0, 3, count).astype(float), rng.random(count)
        for n in range(1, count + 2):
            expected = []
            for kept in map(list, itertools.combinations(range(count), min(n, count))):
                expected.append(correct[kept][scores[kept] == scores[kept].max()].mean())
            assert best_of.right_of_best(scores, correct, n) == pytest.approx(np.mean(expected), abs=1e-12)


def test_a_vote_adds_up_equal_answers():
    answers, correct = ["4", "5", "5", "6"], np.array([0.0, 1.0, 1.0, 0.0])
    vote = lambda weights, n: best_of.right_of_vote(answers, np.array(weights), correct, n, np.random.default_rng(0))  # noqa: E731
    assert vote([1, 1, 1, 1], 4) == 1
    assert vote([3, 1, 1, 1], 4) == 0
    assert vote([2, 1, 1, 1], 4) == 0.5  # a tie
    for n in (1, 2, 3):
        every = [max_right(answers, correct, kept) for kept in itertools.combinations(range(4), n)]
        assert vote([1, 1, 1, 1], n) == pytest.approx(np.mean(every), abs=1e-12)


def test_a_vote_of_many_candidates_is_a_mean_over_draws():
    rng = np.random.default_rng(3)
    correct = (rng.random(40) < 0.4).astype(float)
    answers = [str(int(right)) for right in correct]
    shares = [best_of.right_of_vote(answers, np.ones(40), correct, n, np.random.default_rng(0)) for n in (1, 9, 40)]
    assert (shares[0], shares[2]) == (pytest.approx(correct.mean(), abs=1e-12), float(correct.mean() > 0.5))
    expected = stats.hypergeom(40, int(correct.sum()), 9).sf(4)  # most of nine candidates are right
    assert shares[1] == pytest.approx(expected, abs=0.1)


def test_answers_that_were_cut_off_do_not_vote():
    prompt = scored(["4", "4", "5"], [0.0, 0.0, 1.0], {"reward": [None, None, 1.0]}, [False, False, True])
    curves = best_of.curves([prompt], str.strip, {"reward": lambda rewards: 1 / (1 + np.exp(-rewards))})
    last = {curve.rule: curve.right[-1].value for curve in curves}
    assert (last["vote"], last["vote by reward"], last["random"]) == (1, 1, pytest.approx(1 / 3))


def max_right(answers, correct, kept):
    counts = {answers[i]: sum(answers[j] == answers[i] for j in kept) for i in kept}
    best = [answer for answer, count in counts.items() if count == max(counts.values())]
    return np.mean([correct[answers.index(answer)] for answer in best])


@pytest.mark.parametrize(
    ("text", "as_number", "as_words"),
    [
        ("So A: 1,234.50", "1234.5", "so 1 234 50"),
        ("The cat, a dog!", "cat dog", "cat dog"),
        ("it is -3.0 degrees", "-3", "it is 3 0 degrees"),
        ("pages 10-20", "20", "pages 10 20"),
        ("0.50 of it, not .5", "0.5", "0 50 of it not 5"),
        ("12345678901234567", "12345678901234567", "12345678901234567"),
        ("-0.0", "0", "0 0"),
        (" A.", "a", "a"),
        ("+", "+", "+"),
    ],
)
def test_equal_answers(text, as_number, as_words):
    assert (best_of.number(text), best_of.words(text)) == (as_number, as_words)


def test_few_prompts_that_are_all_right_are_no_proof():
    """Intervals are Wilson's over prompts: a resample of right prompts alone is always right."""
    right = [scored(["4", "5", "6"], [1.0, 0.0, 0.0], {"reward": [2.0, 1.0, 0.0]})] * 14
    curves = {curve.rule: curve for curve in best_of.curves(right, best_of.words, {})}
    last = curves["reward"].right[-1]
    assert (last.low, last.high) == pytest.approx((wilson(14, 14).low, 1.0))
    assert curves["random"].right[-1].low == pytest.approx(wilson(14, 42).low)  # of 42 candidates
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        figures = (rng.random((20, 1)) < 0.95).astype(float)
        interval = best_of._curve("reward", (4,), figures, np.full((1, 20), 1 / 20)).right[0]
        covered += interval.low <= 0.95 <= interval.high
    assert covered / 300 > 0.92  # the bootstrap's is at most 0.64, the share of samples with a wrong one


def test_curves_from_a_random_choice_to_an_oracle():
    rng = np.random.default_rng(1)
    prompts = []
    for i in range(40):
        count = 5 + i % 4
        correct = (rng.random(count) < 0.4).astype(float)
        scores = {"reward": correct + rng.normal(0, 0.7, count), "noise": rng.normal(size=count)}
        prompts.append(scored([str(int(c)) for c in correct], correct, scores))
    curves = {curve.rule: curve for curve in best_of.curves(prompts, best_of.words, {"reward": np.exp})}
    assert list(curves) == ["random", "reward", "noise", "vote", "vote by reward", "oracle"]
    mean = np.mean([prompt.correct.mean() for prompt in prompts])
    for curve in curves.values():
        assert (curve.ns, curve.prompts) == ((1, 2, 4, 8), 40)
        first = curve.right[0]
        assert first.value == pytest.approx(mean, abs=1e-12)
        assert all(right.low <= right.value <= right.high for right in curve.right)
    values = {rule: [right.value for right in curve.right] for rule, curve in curves.items()}
    assert values["random"] == pytest.approx([mean] * 4)
    assert values["oracle"] == sorted(values["oracle"])
    assert values["oracle"][-1] > values["reward"][-1] > mean
    assert curves["random"].enough == 1 < curves["reward"].enough
    worse = [scored(p.texts, p.correct, {"reward": -p.correct}) for p in prompts]
    assert best_of.curves(worse, best_of.words, {})[1].enough == 1  # more candidates make it worse
    assert best_of.curves(prompts, best_of.words, {}) == best_of.curves(prompts, best_of.words, {})
    dips = [scored("abc", [0.5, 0.0, 1.0], {"reward": [2.0, 1.0, 0.0]})] * 20
    best = best_of.curves(dips, best_of.words, {})[1]
    assert ([round(right.value, 3) for right in best.right], best.enough) == ([0.5, 0.333, 0.5], 1)
