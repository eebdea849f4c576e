import math

import numpy as np
import pytest

from dph.demo import puzzles, report
from dph.demo.report import SampledAnswers, correctness
from dph.infer.request import Answer


def outcome(right, rewards, logprobs, finished=None):
    finished = finished or [[True] * len(row) for row in right]
    groups = []
    for rows in zip(rewards, logprobs, finished, strict=True):
        group = []
        for i, (reward, logprob, ended) in enumerate(zip(*rows, strict=True)):
            group.append(Answer(i, (1, 2), ended, logprob, logprob, {"default": reward} if ended else {}))
        groups.append(group)
    asked = [puzzles.Puzzle("sort", "sort: b a", "a b", "b a")] * len(right)
    return SampledAnswers(asked, groups, np.array(right, dtype=bool))


FOUND = outcome(
    right=[[0, 1, 0, 1], [0, 0, 0, 1]],
    rewards=[[0.1, 3.0, 0.2, 0.3], [5.0, 1.0, 2.0, 4.0]],
    logprobs=[[-1.0, -5.0, -2.0, -3.0], [-4.0, -3.0, -2.0, -1.0]],
)


def test_one_sample_is_the_mean_over_all_candidates():
    assert correctness(FOUND, report.SAMPLE, 1).tolist() == [0.5, 0.25]


def test_the_oracle_needs_one_right_answer_among_the_first_n():
    assert correctness(FOUND, report.ORACLE, 1).tolist() == [0, 0]
    assert correctness(FOUND, report.ORACLE, 2).tolist() == [1, 0]
    assert correctness(FOUND, report.ORACLE, 4).tolist() == [1, 1]


def test_choosing_by_reward_and_by_log_probability():
    assert correctness(FOUND, report.REWARD, 4).tolist() == [1, 0]
    assert correctness(FOUND, report.PROBABLE, 4).tolist() == [0, 1]
    assert correctness(FOUND, report.PROBABLE, 3).tolist() == [0, 0]


def test_an_answer_that_was_cut_off_is_never_chosen():
    cut = outcome([[1, 0]], [[math.nan, -3.0]], [[-0.1, -9.0]], finished=[[False, True]])
    assert correctness(cut, report.REWARD, 2).tolist() == [0]
    assert correctness(cut, report.PROBABLE, 2).tolist() == [0]


@pytest.mark.parametrize("rule", report.RULES)
def test_accuracy_lies_in_its_interval(rule):
    found = report.accuracy(FOUND, rule, 4)
    assert found.low <= found.value <= found.high


def test_figures_are_pictures(tmp_path):
    wide = outcome([[0, 1] * 8] * 3, [list(range(16))] * 3, [[-1.0] * 16] * 3)
    paths = report.save_figures({"SFT": wide, "aligned jointly": wide}, tmp_path)
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
def test_figures_of_answers_that_were_all_cut_off(tmp_path):
    cut = outcome([[0] * 16] * 3, [[math.nan] * 16] * 3, [[-1.0] * 16] * 3, [[False] * 16] * 3)
    report.save_figures({"SFT": cut, "aligned jointly": cut}, tmp_path)


def test_a_rule_has_one_colour_in_every_panel():
    wide = outcome([[0, 1] * 8] * 3, [list(range(16))] * 3, [[-1.0] * 16] * 3)
    sft, frozen = report._curves({"SFT": wide, "frozen": wide}).axes
    colours = {line.get_label(): line.get_color() for line in frozen.lines}
    assert len(colours) == len(set(colours.values())) == 4
    for line in sft.lines:
        assert line.get_color() == colours[line.get_label()]
