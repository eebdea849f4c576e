"""The records that a head learns from sampled answers: hard ones first."""

import pytest
from helpers.texts import small_tokenizer

from dph.improve.figures import describe, figures, share_right
from dph.improve.prompts import Prompt, grow, split
from dph.improve.selection import Selection

TOK = small_tokenizer()
ASKED = [{"role": "user", "content": "which?"}]


def line(right=(), wrong=(), cut_off=0, logprobs=None):
    """A line of samples; ``right`` and ``wrong`` are (text, reward)."""
    texts = [text for text, _ in (*right, *wrong)] + ["cut"] * cut_off
    count = len(texts)
    return {
        "prompt": ASKED,
        "candidates": texts,
        "correct": [1.0] * len(right) + [0.0] * (len(wrong) + cut_off),
        "finished": [True] * (count - cut_off) + [False] * cut_off,
        "logprobs": logprobs or [-1.0] * count,
        "rewards": [reward for _, reward in (*right, *wrong)] + [None] * cut_off,
    }


def pairs(rows):
    return [(row["chosen"], row["rejected"]) for row in rows]


def test_hard_pairs_come_first_and_each_answer_is_in_few():
    hard = line([("r1", 2.0), ("r0", -1.0)], [("w0", 3.0), ("w2", -2.0), ("w1", 1.0), ("w0", 3.0)], cut_off=2)
    rows, refused = Selection(most=3).rows([hard], TOK)
    assert refused == 0
    assert pairs(rows) == [("r0", "w0"), ("r1", "w1"), ("r0", "w2")]  # by the difference of rewards: 4, -1, -1
    every, _ = Selection(most=100).rows([hard], TOK)
    assert sorted(pairs(every)) == [(r, w) for r in ("r0", "r1") for w in ("w0", "w1", "w2")]
    easy = line([("good", 9.0)], [("bad", -9.0)])
    assert pairs(Selection(most=1).rows([easy, hard], TOK)[0]) == [("r0", "w0"), ("good", "bad")]


@pytest.mark.parametrize(("right", "wrong"), [(1, 7), (2, 4), (3, 3), (4, 6), (6, 1)])
def test_no_pair_is_made_twice(right, wrong):
    many = line([(f"r{i}", 0.0) for i in range(right)], [(f"w{i}", 0.0) for i in range(wrong)])
    found = pairs(Selection(most=100).rows([many], TOK)[0])
    assert len(found) == len(set(found)) == right * wrong


def test_labels_are_those_of_the_hardest_answers():
    rows, _ = Selection("labels", most=1).rows([line([("r1", 2.0), ("r0", -1.0)], [("w0", 3.0), ("w1", 1.0)])], TOK)
    found = [(row["completion"], row["label"]) for row in rows]
    assert found == [("w0", False), ("r0", True)]
    assert Selection("labels").rows([line([], [("w0", 0.0)])], TOK)[0] != []  # no right answer is needed
    assert Selection().rows([line([], [("w0", 0.0)])], TOK)[0] == []


def test_without_rewards_the_choice_is_random_by_the_seed():
    plain = line([("r", None)], [(f"w{i}", None) for i in range(20)])
    found = [pairs(Selection(most=5, seed=seed).rows([plain], TOK)[0]) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_answers_that_the_format_refuses_are_counted():
    rows, refused = Selection().rows([line([("r", 0.0)], [("w", 0.0), ("\ud800", 0.0)])], TOK)
    assert (pairs(rows), refused) == ([("r", "w")], 1)


def test_figures_count_a_cut_off_answer_as_wrong_and_choose_it_last():
    lines = [line([("r", -5.0)], [], cut_off=1, logprobs=[-9.0, -1.0]), line([], [("w", 1.0), ("x", 0.0)])]
    found = figures(lines, str.strip)
    assert found["n"] == [1, 2]
    values = {rule: [figure["value"] for figure in own] for rule, own in found["rules"].items()}
    for rule in ("by reward", "most probable", "oracle"):
        assert values[rule] == [0.25, 0.5]
    assert values["one sample"] == [0.25, 0.25]
    assert share_right(lines) == 0.25
    text = describe({"round": 1, "prompts": 2, "n": 2, "right": 0.25, "cut_off": 0.5, "records": 3, "refused": 4,
                     "held_out": 2, "figures": found})  # fmt: skip
    assert "25.0 % right, 50.0 % cut off, 3 records, 4 answers left out, which the chat format changes" in text
    assert "by reward" in text.splitlines()[2]


def test_files_grow_by_whole_batches(tmp_path):
    prompts = [Prompt(ASKED, {"i": i}, f"prompt {i}") for i in range(10)]
    path, made = tmp_path / "lines.jsonl", []

    def make(batch):
        made.append([prompt.row["i"] for prompt in batch])
        if len(made) == 3:
            raise KeyboardInterrupt
        return [{"i": prompt.row["i"]} for prompt in batch]

    with pytest.raises(KeyboardInterrupt):
        grow(path, prompts, 3, make)
    with open(tmp_path / "lines.jsonl.partial", "ab") as file:
        file.write(b'{"i": 6}\n{"i')  # a process that was killed while it wrote
    assert [one["i"] for one in grow(path, prompts, 3, make)] == list(range(10))
    assert made == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8], [9]]
    assert grow(path, prompts, 3, make) == [{"i": i} for i in range(10)]
    assert len(made) == 5


def test_held_out_prompts_depend_on_themselves_and_the_seed_alone():
    prompts = [Prompt([{"role": "user", "content": f"{i}"}], {}, "") for i in range(200)]
    train, held_out = split(prompts, 0.25, 3)
    assert 30 < len(held_out) < 70
    assert {*map(id, train), *map(id, held_out)} == set(map(id, prompts))
    assert split(prompts[100:], 0.25, 3)[1] == [prompt for prompt in held_out if int(prompt.key.split('"')[3]) >= 100]
