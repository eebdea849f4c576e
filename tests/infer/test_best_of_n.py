"""Best-of-N: what is sampled, how it is judged, and who wins."""

import copy
import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import templates
from helpers.talker import ASKED, END, TOK, alone, talker
from helpers.texts import message
from helpers.tiny import FORMS, tiny_model

import dph
from dph import chat
from dph.infer.best_of_n import Choice, ranked, sample
from dph.infer.choice import candidate_keys, gumbel
from dph.infer.request import Answer


def answers(*texts, finished=None):
    """Continuations of one prompt; those whose place is not in ``finished`` are cut off."""
    prompt = chat.prompt(ASKED, TOK)
    ends = [[END] if finished is None or i in finished else [] for i in range(len(texts))]
    return prompt, [chat.continuation(prompt, chat.plain(TOK)(t) + e, TOK) for t, e in zip(texts, ends, strict=True)]


def in_order(texts, rewards, logprobs=None, *, finished=None, spreads=None, **options):
    """The candidates of answers with these figures, ranked."""
    prompt, group = answers(*texts, finished=finished)
    sampled = []
    for i, item in enumerate(group):
        ended, logprob = item.reward_position is not None, -1.0 if logprobs is None else logprobs[i]
        figures = [{"default": part[i]} if part and ended else {} for part in (rewards, spreads)]
        sampled.append(
            Answer(
                i, tuple(item.tokens[len(prompt) :][: len(said(item, prompt))]), ended, logprob, logprob / 2, *figures
            )
        )
    return ranked(prompt, sampled, TOK, Choice(**options))


def said(item, prompt):
    end = len(item.tokens) if item.reward_position is None else item.reward_position + 1
    return item.tokens[len(prompt) : end]


# Ranking


def test_the_best_reward_comes_first():
    candidates = in_order(["one", "two", "three"], [0.5, 2.0, -1.0], [-3.0, -9.0, -1.0])
    assert [c.text for c in candidates] == ["two", "one", "three"]
    assert [c.reward for c in candidates] == [2.0, 0.5, -1.0]
    assert [c.logprob for c in candidates] == [-9.0, -3.0, -1.0]
    assert [c.mean_logprob for c in candidates] == [-4.5, -1.5, -0.5]
    assert all(c.finished for c in candidates)
    prompt, group = answers("one", "two")
    assert candidates[0].tokens == tuple(group[1].tokens[len(prompt) :])


def test_without_a_head_the_likeliest_comes_first_and_the_cut_off_last():
    candidates = in_order(["one", "two", "three"], None, [-3.0, -2.0, -1.0], finished=(0, 1), head=None)
    assert [c.text for c in candidates] == ["two", "one", "three"]
    assert [c.logprob for c in candidates] == [-2.0, -3.0, -1.0]
    assert [c.finished for c in candidates] == [True, True, False]
    assert all(math.isnan(c.reward) for c in candidates)


def test_answers_that_were_cut_off_come_last_whatever_their_probability():
    candidates = in_order("abcd", [0, -50.0, 0, -40.0], [-0.1, -9.0, -0.2, -9.0], finished=(1, 3))
    assert [c.text for c in candidates] == ["d", "b", "a", "c"]
    assert [c.finished for c in candidates] == [True, True, False, False]


def test_equal_answers_vote_together():
    texts, rewards = ["a", "b ", "a", "b", "c"], [2.0, 0.5, 1.9, 0.6, 2.5]
    assert [c.text for c in in_order(texts, rewards, rank="vote")] == ["a", "a", "b", "b ", "c"]  # 1.75, 1.27, 0.92
    assert in_order(texts, rewards, rank="vote", normalise=lambda text: "same")[0].text == "c"
    assert [c.text for c in in_order(["a", "b", "b"], [1.0, -9.0, -9.0], rank="vote")] == ["a", "b", "b"]
    assert in_order(["a", "b", "a"], [1.0, 2.0, 1.0], rank="vote", finished=(0, 1))[0].text == "b"


@pytest.mark.parametrize("place", [0, 1])
def test_a_reward_that_is_no_number_wins_nothing(place):
    rewards = [1.0, 1.0]
    rewards[place] = math.nan
    with pytest.raises(ValueError, match=f"candidate {place}: expected a number as its reward, got NaN"):
        in_order(["one", "two"], rewards)


def test_text_is_the_content_alone():
    texts = {c.text for c in in_order(["one two", "", "three"], [1.0, 2.0, 0], finished=(0, 1))}
    assert texts == {"one two", "", "three"}


# Judging


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_judging_equals_every_answer_alone(budget):
    model = talker()
    groups = [answers("one", "two", "one", "on", finished=(0, 1, 2))[1], answers("", "the quick brown fox")[1]]
    results = model.judge(groups, max_tokens=budget)
    assert [len(r.logprobs) for r in results] == [4, 2]
    for group, result in zip(groups, results, strict=True):
        rows = zip(result.logprobs, result.mean_logprobs, result.rewards["default"], strict=True)
        for item, got in zip(group, rows, strict=True):
            assert (got[1] is None) == (not any(item.score_mask))  # an empty answer has no mean
            assert np.array(got, dtype=float) == pytest.approx(alone(model, item), abs=1e-4, nan_ok=True)
    for alike, result in zip(model.judge(groups, budget, logprobs=False), results, strict=True):
        assert alike.rewards["default"] == pytest.approx(result.rewards["default"], abs=1e-6, nan_ok=True)
        assert alike.logprobs is alike.mean_logprobs is None


def test_rewards_alone_need_no_language_model_head(monkeypatch):
    model, (_, group) = talker(reward_layer=1), answers("one", "two", finished=(0,))
    expected = model.judge([group])[0].rewards["default"]
    monkeypatch.delattr(model, "lm_head")
    for weight in model.backbone.blocks[1].parameters():
        torch.nn.init.constant_(weight, math.nan)
    (found,) = model.judge([group], logprobs=False)
    assert found.rewards["default"] == pytest.approx(expected, nan_ok=True)


def test_judging_keeps_to_its_budget(monkeypatch):
    groups = [answers("one", "two")[1], answers("three")[1], answers("four")[1]]
    sizes, pack = [], dph.pack
    monkeypatch.setattr("dph.model.judging.pack", lambda part: sizes.append(len(part)) or pack(part))
    one = len(groups[1][0].tokens)
    talker().judge(groups, max_tokens=2 * one)
    assert sizes == [1, 2]
    assert talker().judge([]) == []


@pytest.mark.parametrize("training", [True, False])
def test_judging_leaves_the_mode_even_where_it_fails(training, monkeypatch):
    model = talker(reward_dropout=0.5).train(training)
    _, group = answers("one")
    first, second = model.judge([group]), model.judge([group])
    assert first == second  # no dropout
    assert model.training == training
    monkeypatch.setattr(model, "forward_packed", lambda *_, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.judge([group])
    assert model.training == training


# Sampling


def greedy(model, prompt, limit):
    tokens = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
        if tokens[-1] == END:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("form", [{}, *FORMS.values()], ids=["dph", *FORMS])
def test_temperature_zero_takes_the_likeliest_token(form):
    model = talker(**form)
    prompts = [chat.prompt([message("user", text)], TOK) for text in ("a", "the quick brown fox", "12")]
    groups = sample(model, TOK, prompts, 3, max_new_tokens=15, temperature=0)
    for prompt, group in zip(prompts, groups, strict=True):
        assert [list(answer.tokens) for answer in group] == [greedy(model, prompt, 15)] * 3
        assert [answer.index for answer in group] == [0, 1, 2]


def test_a_seed_gives_the_same_answers_and_touches_nothing():
    model, prompt = talker(), chat.prompt(ASKED, TOK)
    state = torch.get_rng_state()
    first, again, other = (sample(model, TOK, [prompt], 6, max_new_tokens=10, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)
    unseeded = sample(model, TOK, [prompt], 6, max_new_tokens=10)
    assert not torch.equal(torch.get_rng_state(), state)
    assert unseeded not in (first, other)
    assert len({answer.tokens for answer in first[0]}) > 1


def test_without_a_seed_torchs_generator_decides_by_one_number_a_prompt():
    model, prompts = talker(), [chat.prompt(ASKED, TOK)] * 2
    torch.manual_seed(3)
    first, after = sample(model, TOK, prompts, 4, max_new_tokens=10), torch.get_rng_state()
    assert first[0] != first[1]  # the same prompt twice
    torch.manual_seed(3)
    assert sample(model, TOK, prompts, 4, max_new_tokens=2) != first
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(3)
    assert sample(model, TOK, prompts, 4, max_new_tokens=10) == first
    assert sample(model, TOK, prompts, 4, max_new_tokens=10) != first
    state = torch.get_rng_state()
    sample(model, TOK, prompts, 4, max_new_tokens=10, temperature=0)  # nothing is drawn
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fresh", [False, True])
def test_seeded_answers_are_the_same_in_any_number_of_threads(fresh):
    model, state = talker(reward_dropout=0.5).train(), torch.get_rng_state()
    tokenizer = copy.deepcopy(TOK) if fresh else TOK  # its markup is made by the threads

    def best(seed):
        return repr(dph.best_of_n(model, tokenizer, ASKED, n=8, max_new_tokens=30, seed=seed))

    if fresh:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(best, range(12)))
        alone = list(map(best, range(12)))
    else:
        alone = list(map(best, range(12)))
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(best, range(12)))
    assert together == alone
    assert len(set(alone)) == 12
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_sampled_answers_end_at_the_first_end_token():
    model, prompt = talker(), chat.prompt(ASKED, TOK)
    (group,) = sample(model, TOK, [prompt], 24, max_new_tokens=40, seed=0)
    assert 0 < sum(answer.finished for answer in group) < 24, "the test needs answers of both sorts"
    for answer in group:
        if answer.finished:
            assert answer.tokens.index(END) == len(answer.tokens) - 1 < 40
        else:
            assert len(answer.tokens) == 40
            assert END not in answer.tokens
            assert answer.rewards == {}


OPTIONS = [
    {}, {"temperature": 0.6}, {"top_k": 9}, {"top_p": 0.7}, {"min_p": 0.3}, {"typical_p": 0.6},
    {"repetition_penalty": 3.0}, {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 0.7},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sampling_follows_the_distribution_of_transformers(options):
    """Chi-squared over the first token of 4,000 answers, the twelve likeliest tokens against the rest."""
    model, prompt = talker(), chat.prompt(ASKED, TOK)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
        out = model.generate(
            ids, max_new_tokens=1, do_sample=True, output_scores=True, return_dict_in_generate=True, **settings
        )
    p = out.scores[0][0].double().softmax(-1)
    (group,) = sample(model, TOK, [prompt], 4000, max_new_tokens=1, seed=0, **options)
    counts = torch.bincount(torch.tensor([answer.tokens[0] for answer in group]), minlength=len(p))
    assert not counts[p == 0].any()
    top = p.topk(min(12, int((p > 0).sum()) - 1)).indices
    observed = torch.cat([counts[top], counts.sum()[None] - counts[top].sum()]).double()
    expected = torch.cat([p[top], 1 - p[top].sum()[None]]) * 4000
    assert ((observed - expected).square() / expected).sum() < 34.5  # 12 degrees of freedom, one in two thousand


def test_steps_and_candidates_draw_independent_noise():
    """Neighbouring keys, steps and tokens have no correlation, and the noise is Gumbel's."""
    keys = torch.from_numpy(candidate_keys(1, [1, 2, 3], range(64)))
    noise = torch.stack([gumbel(keys, torch.full((64,), step), 300) for step in range(4)]).double()
    uniform = (-(-noise).exp()).exp()
    counts = torch.histc(uniform.float(), 20, 0, 1)
    expected = uniform.numel() / 20
    assert ((counts - expected) ** 2 / expected).sum() < 45  # 19 degrees of freedom
    for a, b in ((uniform[1:], uniform[:-1]), (uniform[:, 1:], uniform[:, :-1]), (uniform[..., 1:], uniform[..., :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.02


@pytest.mark.parametrize(("settings", "allowed"), [({"top_k": 2}, 2), ({"top_p": 1e-6}, 1)])
def test_truncated_sampling(settings, allowed):
    model, prompt = talker(), chat.prompt(ASKED, TOK)
    with torch.no_grad():
        likeliest = model(torch.tensor([prompt])).logits[0, -1].topk(allowed).indices.tolist()
    (group,) = sample(model, TOK, [prompt], 40, max_new_tokens=1, seed=0, **settings)
    assert {answer.tokens[0] for answer in group} == set(likeliest)


def test_sampling_leaves_the_mode():
    model, prompt = talker().train(), chat.prompt(ASKED, TOK)
    sample(model, TOK, [prompt], 1, max_new_tokens=2)
    assert model.training
    assert sample(model, TOK, [], 3) == []


COUNT, INT64 = "a whole number of at least 1", "a whole number of at least -2**63 and below 2**63"
WRONG = [
    *(("n", x, COUNT) for x in (0, -1, 1.5, 2.0, "2", None, True, 2**63)),
    *(("max_new_tokens", x, COUNT) for x in (0, 7.5)),
    *(
        ("temperature", x, "a finite number of at least 0")
        for x in (-1, -1e-300, math.nan, np.float32("inf"), 10**400, "1")
    ),
    *(("top_k", x, "a whole number of at least 0") for x in (-1, 0.5, None)),
    *(("top_p", x, "a number above 0 and at most 1") for x in (0, -0.5, 1.01, math.nan, None)),
    *(("min_p", x, "a number from 0 to 1") for x in (-0.1, 1.5)),
    *(("repetition_penalty", x, "a finite number above 0") for x in (0, math.inf)),
    *(("stop", x, "a list of texts that are not empty") for x in ("a", [""], [1])),
    *(("seed", x, INT64) for x in (10**23, 2**63, -(2**63) - 1, 0.5, "1")),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG, ids=lambda x: str(x)[:25])
def test_options_out_of_range_are_named(name, value, expected):
    with pytest.raises(ValueError, match=re.escape(f"{name}: expected {expected}, got {value!r}")):
        dph.best_of_n(talker(), TOK, ASKED, **{"n": 2, "max_new_tokens": 2, name: value})
    with pytest.raises(ValueError, match=re.escape(f"{name}: expected {expected}, got {value!r}")):
        sample(None, TOK, [], **{"n": 2, name: value})  # before anything is done


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": x} for x in (1, 1e-20, 1e300, np.float32(0.5))),
        *({"seed": x} for x in (-(2**63), 2**63 - 1, np.int64(3))),
        {"top_p": 1e-300},
        {"top_p": 1, "top_k": 2**63 - 1},
        {"n": np.int64(3), "max_new_tokens": np.int64(4), "top_k": np.int64(2), "top_p": np.float32(0.5)},
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_and_numbers_of_numpy_work(options):
    (group,) = sample(talker(), TOK, [chat.prompt(ASKED, TOK)], **{"n": 3, "max_new_tokens": 4, **options})
    assert len(group) == 3


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-36, 1e-20])
def test_a_tiny_temperature_is_its_limit(temperature):
    model, prompt = talker(), chat.prompt(ASKED, TOK)
    groups = [sample(model, TOK, [prompt], 3, max_new_tokens=8, temperature=t, seed=0) for t in (temperature, 0)]
    assert groups[0] == groups[1]


# Best of N


@pytest.mark.parametrize("form", [{}, FORMS["qwen3"]], ids=["dph", "qwen3"])
def test_best_of_n_is_sampling_judging_and_ranking(form):
    model = talker(**form)
    state = torch.get_rng_state()
    candidates = dph.best_of_n(model, TOK, ASKED, n=24, max_new_tokens=40, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    again = dph.best_of_n(model, TOK, ASKED, n=24, max_new_tokens=40, seed=0)
    assert repr(candidates) == repr(again)  # NaN rewards included
    assert len(candidates) == 24
    finished = [c for c in candidates if c.finished]
    assert 0 < len(finished) < 24
    assert candidates[: len(finished)] == finished
    assert [c.reward for c in finished] == sorted((c.reward for c in finished), reverse=True)
    rest = candidates[len(finished) :]
    assert [c.logprob for c in rest] == sorted((c.logprob for c in rest), reverse=True)
    prompt = chat.prompt(ASKED, TOK)
    for c in candidates[::5]:
        answer = list(c.tokens[: c.tokens.index(END) + 1] if c.finished else c.tokens)
        item = chat.continuation(prompt, answer, TOK)
        assert (c.logprob, c.mean_logprob, c.reward) == pytest.approx(alone(model, item), abs=1e-3, nan_ok=True)


def test_another_head_ranks_by_its_own_rewards():
    model = talker(reward_heads=("default", "other"))
    with torch.no_grad():
        vectors = model.heads["shared"].reward
        vectors["other"].weight.copy_(-vectors["default"].weight)
    settings = {"n": 48, "max_new_tokens": 60, "seed": 0}
    found = [dph.best_of_n(model, TOK, ASKED, head=head, **settings) for head in ("default", "other")]
    finished = sum(c.finished for c in found[0])
    orders = [[c.tokens for c in candidates] for candidates in found]
    assert finished > 1
    assert orders[0][:finished] == orders[1][:finished][::-1]
    assert orders[0][finished:] == orders[1][finished:]
    with pytest.raises(ValueError, match="head: expected one of default, other, got 'third'"):
        dph.best_of_n(model, TOK, ASKED, head="third")


def test_broken_weights_do_not_win():
    model = talker()
    with torch.no_grad():
        model.heads["shared"].reward["default"].weight.fill_(math.nan)
    with pytest.raises(ValueError, match="expected a number as its reward, got NaN"):
        dph.best_of_n(model, TOK, ASKED, n=24, max_new_tokens=40, seed=0)


def test_what_cannot_be_answered():
    with pytest.raises(ValueError, match="expected a model with reward heads"):
        dph.best_of_n(talker(reward_heads=()), TOK, ASKED)
    with pytest.raises(ValueError, match="expected a message to answer, got the assistant's own"):
        dph.best_of_n(talker(), TOK, [*ASKED, message("assistant", "hello")])


def test_plain_generate_stops_at_the_end_of_an_answer(tmp_path):
    """Of a fresh model and of one that was saved; without <|im_end|> in the configuration, at EOS alone."""
    model = talker()
    model.save_pretrained(tmp_path)
    for one in (model, dph.Model.from_pretrained(tmp_path).eval()):
        assert one.generation_config.eos_token_id == [TOK.eos_token_id, END]
        with torch.no_grad():
            one.backbone.embedding.weight[END] *= 50
        ids = torch.tensor([chat.prompt(ASKED, TOK)])
        torch.manual_seed(0)
        said = one.generate(ids, max_new_tokens=30, do_sample=True, num_return_sequences=8)[:, ids.shape[1] :]
        assert (said == END).any()
        for row in said.tolist():
            after = row[row.index(END) + 1 :] if END in row else []
            assert set(after) <= {TOK.pad_token_id}
    assert tiny_model(im_end_token_id=None, eos_token_id=2).generation_config.eos_token_id == [2]


def test_answers_in_the_format_of_another_chat_template():
    """Its tokenizer has no padding token, and its prompts have other lengths."""
    tok = templates.made("llama3")
    assert tok.pad_token_id is None
    end = chat.markup(tok).end_of_turn
    model = tiny_model(vocab_size=len(tok), im_end_token_id=end, pad_token_id=None, eos_token_id=end, bos_token_id=None)
    prompts = [chat.prompt([message("user", text)], tok) for text in ("Hello there, how are you?", "Who?")]
    together = sample(model, tok, prompts, 2, max_new_tokens=4, temperature=0.0)
    alone = [sample(model, tok, [prompt], 2, max_new_tokens=4, temperature=0.0)[0] for prompt in prompts]
    assert together == alone
    best = dph.best_of_n(model, tok, [message("user", "Who?")], n=2, max_new_tokens=4, seed=0)
    assert all(c.finished == (end in c.tokens) for c in best)
