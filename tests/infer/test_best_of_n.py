"""Best-of-N: what is sampled, how it is judged, and who wins."""

import copy
import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import templates
from helpers.texts import message, small_tokenizer
from helpers.tiny import FORMS, tiny_model

import dph
from dph import chat
from dph.infer.best_of_n import ranked, sample
from dph.model.judging import Judged

TOK = small_tokenizer()
END = TOK.convert_tokens_to_ids("<|im_end|>")
ASKED = [message("user", "hello world")]


def talker(**changes):
    """A tiny model that ends its answers now and then: END's logit is twice as far from zero as another row's."""
    model = tiny_model(
        vocab_size=len(TOK), im_end_token_id=END, pad_token_id=TOK.pad_token_id, eos_token_id=TOK.eos_token_id,
        bos_token_id=TOK.bos_token_id, **changes,
    )  # fmt: skip
    with torch.no_grad():
        model.backbone.embedding.weight[END] *= 2
    return model


def answers(*texts, finished=None):
    """Continuations of one prompt; those whose place is not in ``finished`` are cut off."""
    prompt = chat.prompt(ASKED, TOK)
    ends = [[END] if finished is None or i in finished else [] for i in range(len(texts))]
    return prompt, [chat.continuation(prompt, chat.plain(TOK)(t) + e, TOK) for t, e in zip(texts, ends, strict=True)]


def judged(rewards, logprobs=None):
    logprobs = logprobs or [-1.0] * len(rewards)
    return Judged(logprobs, [x / 2 for x in logprobs], {"default": rewards})


# Ranking


def test_the_best_reward_comes_first():
    prompt, group = answers("one", "two", "three")
    candidates = ranked(group, judged([0.5, 2.0, -1.0], [-3.0, -9.0, -1.0]), TOK, head="default", start=len(prompt))
    assert [c.text for c in candidates] == ["two", "one", "three"]
    assert [c.reward for c in candidates] == [2.0, 0.5, -1.0]
    assert [c.logprob for c in candidates] == [-9.0, -3.0, -1.0]
    assert [c.mean_logprob for c in candidates] == [-4.5, -1.5, -0.5]
    assert all(c.finished for c in candidates)
    assert candidates[0].tokens[: len(group[1].tokens)] == tuple(group[1].tokens[len(prompt) :])


def test_without_a_head_the_likeliest_comes_first_and_the_cut_off_last():
    prompt, group = answers("one", "two", "three", finished=(0, 1))
    without = Judged([-3.0, -2.0, -1.0], [-1.5, -1.0, -0.5], {})
    candidates = ranked(group, without, TOK, head=None, start=len(prompt))
    assert [c.text for c in candidates] == ["two", "one", "three"]
    assert [c.logprob for c in candidates] == [-2.0, -3.0, -1.0]
    assert [c.mean_logprob for c in candidates] == [-1.0, -1.5, -0.5]
    assert [c.finished for c in candidates] == [True, True, False]
    assert all(math.isnan(c.reward) for c in candidates)


def test_answers_that_were_cut_off_come_last_whatever_their_probability():
    nan = math.nan
    prompt, group = answers("a", "b", "c", "d", finished=(1, 3))
    candidates = ranked(
        group, judged([nan, -50.0, nan, -40.0], [-0.1, -9.0, -0.2, -9.0]), TOK, head="default", start=len(prompt)
    )
    assert [c.text for c in candidates] == ["d", "b", "a", "c"]
    assert [c.finished for c in candidates] == [True, True, False, False]
    assert all(math.isnan(c.reward) for c in candidates[2:])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_reward_that_is_no_number_wins_nothing(place):
    prompt, group = answers("a", "b", "c")
    rewards = [1.0, 2.0, 3.0]
    rewards[place] = math.nan
    with pytest.raises(ValueError, match=f"candidate {place}: expected a number as its reward, got NaN"):
        ranked(group, judged(rewards), TOK, head="default", start=len(prompt))


def test_text_is_the_content_alone():
    prompt, group = answers("12 lazy dogs\n", "", "<|im_end|> said", finished=(0, 1))
    texts = {c.text for c in ranked(group, judged([1.0, 2.0, math.nan]), TOK, head="default", start=len(prompt))}
    assert texts == {"12 lazy dogs\n", "", "<|im_end|> said"}


# Judging


def alone(model, item):
    logprobs = model(torch.tensor([item.tokens])).logits[0].log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(item.targets)[:, None]).flatten()
    reward = math.nan
    if item.reward_position is not None:
        ids = torch.tensor([item.tokens[: item.reward_position + 1]])
        reward = model.rewards(ids)["default"].item()
    scored = chosen[torch.tensor(item.score_mask)]
    return chosen[torch.tensor(item.loss_mask)].sum().item(), scored.mean().item(), reward


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


def said(item, prompt):
    end = len(item.tokens) if item.reward_position is None else item.reward_position + 1
    return item.tokens[len(prompt) : end]


@pytest.mark.parametrize("form", [{}, *FORMS.values()], ids=["dph", *FORMS])
def test_temperature_zero_takes_the_likeliest_token(form):
    model = talker(**form)
    prompts = [chat.prompt([message("user", text)], TOK) for text in ("a", "the quick brown fox", "12")]
    groups = sample(model, TOK, prompts, 3, max_new_tokens=15, temperature=0)
    for prompt, group in zip(prompts, groups, strict=True):
        assert [said(item, prompt) for item in group] == [greedy(model, prompt, 15)] * 3


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
    assert len({tuple(item.tokens) for item in first[0]}) > 1


def test_without_a_seed_torchs_generator_decides_by_one_number():
    model, prompts = talker(), [chat.prompt(ASKED, TOK)]
    torch.manual_seed(3)
    first, after = sample(model, TOK, prompts, 4, max_new_tokens=10), torch.get_rng_state()
    torch.manual_seed(3)
    assert sample(model, TOK, prompts, 4, max_new_tokens=2) != first
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(3)
    assert sample(model, TOK, prompts, 4, max_new_tokens=10) == first
    assert sample(model, TOK, prompts, 4, max_new_tokens=10) != first
    state = torch.get_rng_state()
    sample(model, TOK, prompts, 4, max_new_tokens=10, temperature=0)  # nothing is drawn
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 9}, {"top_p": 0.7}, {"temperature": 1.7, "top_k": 20, "top_p": 0.9}],
    ids=str,
)
def test_answers_are_those_of_transformers_with_torchs_generator(options):
    model, n, limit = talker(), 12, 25
    prompts = [chat.prompt([message("user", text)], TOK) for text in ("a", "the quick brown fox")]
    groups = sample(model, TOK, prompts, n, max_new_tokens=limit, seed=5, **options)
    width = max(map(len, prompts))
    ids = torch.tensor([[TOK.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    torch.manual_seed(5)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=limit, do_sample=True, num_return_sequences=n, eos_token_id=END,
        pad_token_id=TOK.pad_token_id, **settings,
    )  # fmt: skip
    for i, row in enumerate(out[:, width:].tolist()):
        answer = row[: row.index(END) + 1] if END in row else row[:limit]
        assert said(groups[i // n][i % n], prompts[i // n]) == answer


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
    finished = [item for item in group if item.reward_position is not None]
    assert 0 < len(finished) < 24, "the test needs answers of both sorts"
    for item in group:
        assert item.tokens[: len(prompt)] == prompt
        answer = said(item, prompt)
        if item.reward_position is None:
            assert len(answer) == 40
            assert END not in answer
        else:
            assert answer.index(END) == len(answer) - 1
            assert len(answer) <= 40
            assert item.tokens[item.reward_position] == END


def test_sampling_follows_the_model_s_distribution():
    """Chi-squared over the first token of 4,000 answers, the twelve likeliest tokens against the rest."""
    model, prompt = talker(), chat.prompt(ASKED, TOK)
    with torch.no_grad():
        p = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    (group,) = sample(model, TOK, [prompt], 4000, max_new_tokens=1, seed=0)
    counts = torch.bincount(torch.tensor([item.tokens[len(prompt)] for item in group]), minlength=len(p))
    top = p.topk(12).indices
    observed = torch.cat([counts[top], counts.sum()[None] - counts[top].sum()]).double()
    expected = torch.cat([p[top], 1 - p[top].sum()[None]]) * 4000
    assert ((observed - expected).square() / expected).sum() < 34.5  # 12 degrees of freedom, one in two thousand


@pytest.mark.parametrize(("settings", "allowed"), [({"top_k": 2}, 2), ({"top_p": 1e-6}, 1)])
def test_truncated_sampling(settings, allowed):
    model, prompt = talker(), chat.prompt(ASKED, TOK)
    with torch.no_grad():
        likeliest = model(torch.tensor([prompt])).logits[0, -1].topk(allowed).indices.tolist()
    (group,) = sample(model, TOK, [prompt], 40, max_new_tokens=1, seed=0, **settings)
    assert {item.tokens[len(prompt)] for item in group} == set(likeliest)


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
    settings = {"n": 24, "max_new_tokens": 40, "seed": 0}
    orders = [[c.tokens for c in dph.best_of_n(model, TOK, ASKED, head=h, **settings)] for h in ("default", "other")]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
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
