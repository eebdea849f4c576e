"""The engine: the same answers in any batch, equal to every answer alone; stops, rounds, pruning, its pool."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers.talker import ASKED, END, TOK, alone, talker
from helpers.texts import message
from helpers.tiny import FORMS

import dph
from dph import chat
from dph.errors import UserError
from dph.infer import engine, pooled_engine, prompt_reader
from dph.infer.best_of_n import Choice, best_of_n_each
from dph.infer.engine import answered, engine_for
from dph.infer.pooled_engine import PooledEngine
from dph.infer.request import Pruning, Request, fixed
from dph.infer.sampling import Sampling
from dph.infer.token_pool import TokenPool
from dph.model.kv_pool import KVPool

WORDS = "the quick brown fox jumps over a lazy dog and says hello to the world again "
PROMPTS = [chat.prompt([message("user", text)], TOK) for text in ("a", WORDS, "hello", WORDS * 3, "x y", "12 34 56")]


def requests(prompts=PROMPTS, n=5, limit=20, seed=3, **options):
    return [Request(prompt, fixed(n), Sampling(max_new_tokens=limit, **options), seed=seed) for prompt in prompts]


def answers(model, asked):
    return [request.answers for request in answered(model, TOK, asked)]


def same(found, expected):
    """Whether two lists of answers are equal, NaN included."""
    return repr(found) == repr(expected)


def crowd(model, rows, batch, asked):
    """The answers of an engine with little room."""
    small = PooledEngine(model, TOK, rows, batch)
    for request in asked:
        small.submit(request)
    small.run()
    assert len(small._states) == len(small._candidates) == len(small.prompts.opened) == 0
    assert small.pool._gaps == [(2, rows)]  # all rows are free again, but for that of padding
    return [request.answers for request in asked]


@pytest.mark.parametrize("form", [{}, *FORMS.values()], ids=["dph", *FORMS])
def test_answers_are_those_of_each_prompt_alone_bit_by_bit(form, monkeypatch):
    """In one batch, in any order, with little room, and with prompts that are read in pieces."""
    model = talker(**form)
    together = answers(model, requests())
    assert 0 < sum(answer.finished for group in together for answer in group) < 30
    assert same([answers(model, [request])[0] for request in requests()], together)
    assert same(answers(model, requests()[::-1])[::-1], together)
    longest = len(PROMPTS[3]) + 21
    for rows, batch in ((longest + 30, 7), (longest + 100, 3)):
        assert same(crowd(model, rows, batch, requests()), together)
    monkeypatch.setattr(pooled_engine, "BATCH", 64)
    monkeypatch.setattr(engine, "BATCH", 2)
    assert same(answers(model, requests()), together)


@pytest.mark.parametrize("form", [{}, FORMS["qwen3"], {"reward_layer": 1}, {"reward_members": 3}], ids=str)
def test_figures_are_those_of_every_conversation_alone(form):
    model = talker(**form)
    for prompt, group in zip(PROMPTS, answers(model, requests()), strict=True):
        for answer in group[:3]:
            item = chat.continuation(prompt, answer.tokens, TOK)
            got = answer.logprob, answer.mean_logprob, answer.rewards.get("default", math.nan)
            assert got == pytest.approx(alone(model, item), abs=1e-4, nan_ok=True)
            if answer.finished and "reward_members" in form:
                (judged,) = model.judge([[item]])
                assert answer.spreads == pytest.approx({"default": judged.spreads["default"][0]}, abs=1e-5)


def test_long_prompts_are_read_in_pieces():
    model = talker()
    prompt = chat.prompt([message("user", WORDS * 60)], TOK)
    assert len(prompt) > 2 * prompt_reader.CHUNK
    asked = requests([prompt, PROMPTS[0]], n=2, limit=4)
    group, other = answers(model, asked)
    assert same(other, answers(model, requests([PROMPTS[0]], n=2, limit=4))[0])
    for answer in group:
        item = chat.continuation(prompt, answer.tokens, TOK)
        assert answer.logprob == pytest.approx(alone(model, item)[0], abs=1e-3)


def test_modified_models_give_the_same_answers():
    """A hook lets the blocks be computed in parts."""
    model = talker()
    expected = answers(model, requests())
    handles = [block.ffn.register_forward_hook(lambda *_: None) for block in model.backbone.blocks]
    found = answers(model, requests())
    for handle in handles:
        handle.remove()
    for group, other in zip(found, expected, strict=True):
        assert [answer.tokens for answer in group] == [answer.tokens for answer in other]
        for answer, alike in zip(group, other, strict=True):
            assert answer.logprob == pytest.approx(alike.logprob, abs=1e-4)


def test_bfloat16_and_inference_mode():
    model = talker(hidden_size=64, num_attention_heads=2).bfloat16()
    with torch.inference_mode():
        (group,) = answers(model, requests(PROMPTS[1:2]))
    assert len(group) == 5
    (judged,) = model.judge([[chat.continuation(PROMPTS[1], answer.tokens, TOK) for answer in group]])
    for answer, logprob in zip(group, judged.logprobs, strict=True):
        assert answer.logprob == pytest.approx(logprob, rel=0.05, abs=0.5)


def test_requests_of_other_options_share_the_batch():
    model = talker()
    kinds = [{"temperature": 0.5}, {"top_k": 5}, {"repetition_penalty": 2.0}, {"temperature": 0}, {"top_p": 0.5}]
    asked = [requests(PROMPTS[i : i + 1], **kind)[0] for i, kind in enumerate(kinds)]
    together = answers(model, asked)
    for i, kind in enumerate(kinds):
        assert same(answers(model, requests(PROMPTS[i : i + 1], **kind)), [together[i]])


def test_without_rewards_the_end_is_not_read():
    model = talker()
    (with_rewards,) = answers(model, requests(PROMPTS[:1]))
    (without,) = answers(model, [Request(PROMPTS[0], fixed(5), Sampling(max_new_tokens=20), seed=3, rewards=False)])
    assert same(without, [replace(answer, rewards={}) for answer in with_rewards])


# Stop texts


@pytest.mark.parametrize("rewards", [True, False])
def test_an_answer_ends_before_a_stop_text(rewards):
    """With the figures of the conversation that is left, whether the text begins within a token or at once."""
    model, n = talker(), 24
    (free,) = answers(model, requests(PROMPTS[:1], n=n))
    texts = [TOK.decode(answer.tokens[: len(answer.tokens) - answer.finished]) for answer in free]
    stops = [texts[0][:2], texts[1][3:5], texts[2][-4:]]
    sampling = Sampling(max_new_tokens=20, stop=stops)
    (group,) = answers(model, [Request(PROMPTS[0], fixed(n), sampling, seed=3, rewards=rewards)])
    stopped = 0
    for answer, whole, text in zip(group, free, texts, strict=True):
        places = [text.find(stop) for stop in stops if stop in text]
        said = TOK.decode(answer.tokens[: len(answer.tokens) - answer.finished])
        if not places:
            assert answer.tokens == whole.tokens
            continue
        stopped += 1
        assert said == text[: min(places)]
        assert answer.finished
        item = chat.continuation(PROMPTS[0], answer.tokens, TOK)
        got = answer.logprob, answer.mean_logprob, answer.rewards.get("default", math.nan)
        want = alone(model, item)
        assert got == pytest.approx(want if rewards else (*want[:2], math.nan), abs=1e-4, nan_ok=True)
    assert stopped >= 3
    assert any(len(answer.tokens) == 1 for answer in group), "the test needs an answer that stops at once"


# Rounds and pruning


def calibrated(model, temperature=1.0, midpoint=0.0):
    model.head_records["default"] = {"calibration": {"temperature": temperature, "midpoint": midpoint}}
    return model


def test_sampling_stops_once_the_best_answer_is_good_enough():
    model = calibrated(talker())
    options = {"seed": 2, "max_new_tokens": 30}
    (every,) = best_of_n_each(model, TOK, [ASKED], Choice(n=24), **options)
    rewards = [c.reward for c in every if c.finished]
    for round_size in (4, 7):
        sizes = set()
        for confidence in (1e-6, float(torch.tensor(rewards[1]).sigmoid()) - 1e-6, 1 - 1e-9):
            choice = Choice(n=24, confidence=confidence, round_size=round_size)
            (few,) = best_of_n_each(model, TOK, [ASKED], choice, **options)
            sizes.add(len(few))
            assert len(few) == 24 or len(few) % round_size == 0
            reached = [c.reward for c in few if c.finished and torch.tensor(c.reward).sigmoid() >= confidence]
            assert len(few) == 24 or reached
            assert {c.tokens for c in few} <= {c.tokens for c in every}
        assert min(sizes) < max(sizes) == 24
    with pytest.raises(UserError, match="head default: expected one with a calibration"):
        dph.best_of_n(talker(), TOK, ASKED, 4, confidence=0.5)
    with pytest.raises(UserError, match="confidence: expected a reward head with it, got none"):
        dph.best_of_n(talker(), TOK, ASKED, 4, head=None, confidence=0.5)


def test_pruning_drops_the_weaker_half_and_leaves_the_others_as_they_are():
    model, n, every = talker(), 16, 4
    whole, pruned = (
        Request(PROMPTS[1], fixed(n), Sampling(max_new_tokens=24), seed=1, pruning=pruning)
        for pruning in (None, Pruning(every, "default"))
    )
    beside = requests([PROMPTS[0], PROMPTS[2]])
    (expected,), found = answers(model, [whole]), answers(model, [pruned, *beside])
    assert same(found[1:], answers(model, requests([PROMPTS[0], PROMPTS[2]])))
    group = found[0]
    assert [answer.index for answer in group] == list(range(n))
    dropped = [answer for answer in group if answer.pruned]
    assert len(dropped) >= n // 2 - sum(len(answer.tokens) <= every for answer in group)
    for answer, alike in zip(group, expected, strict=True):
        if answer.pruned:
            assert not answer.finished
            assert answer.rewards == {}
            assert len(answer.tokens) % every == 0
            assert answer.tokens == alike.tokens[: len(answer.tokens)]
        else:
            assert same(answer, alike)

    # The first decision, by the rewards of the answers as they would be if they ended there.
    def reward(answer, length):
        tokens = answer.tokens if len(answer.tokens) <= length else (*answer.tokens[:length], END)
        return alone(model, chat.continuation(PROMPTS[1], tokens, TOK))[2]

    order = sorted(expected, key=lambda answer: -reward(answer, every))
    weaker = {answer.index for answer in order[n // 2 :] if len(answer.tokens) > every}
    assert {answer.index for answer in dropped if len(answer.tokens) == every} == weaker
    best = dph.best_of_n(model, TOK, ASKED, n, prune_every=every, seed=1, max_new_tokens=24)
    assert [c.pruned for c in best] == sorted(c.pruned for c in best)  # behind those that were cut off


def test_a_request_can_be_cancelled_at_any_time():
    model = talker()
    for steps in (0, 1, 2, 5):
        small = PooledEngine(model, TOK, 600, 16)
        kept, gone = requests(PROMPTS[:2], n=12, limit=12)
        small.submit(kept)
        small.submit(gone)
        for _ in range(steps):
            small.step()
        partial = small.partial(gone)
        assert all(1 <= len(tokens) <= steps for tokens in partial.values())
        small.cancel(gone)
        small.run()
        assert gone.done
        assert same(kept.answers, answers(model, requests(PROMPTS[:1], n=12, limit=12))[0])
        assert small.pool._gaps == [(2, 600)]


def test_what_never_fits_is_refused():
    small = PooledEngine(talker(), TOK, 64, 4)
    with pytest.raises(UserError, match="prompt: expected at least one token, got none"):
        requests([[]])
    with pytest.raises(UserError, match=r"prompt, max_new_tokens: expected at most 62 rows .* got .* of up to 100"):
        small.submit(requests(PROMPTS[:1], limit=100)[0])
    pruned = Request(PROMPTS[0], fixed(5), Sampling(max_new_tokens=4), pruning=Pruning(2, "default"))
    with pytest.raises(UserError, match=r"4 answers at once, got .* 5 answers"):
        small.submit(pruned)
    other = Request(PROMPTS[0], fixed(2), Sampling(max_new_tokens=4), pruning=Pruning(2, "other"))
    with pytest.raises(ValueError, match="head: expected one of default, got 'other'"):
        engine_for(talker(), TOK, [other]).submit(other)


# The pool


def test_ranges_of_a_pool_never_meet_and_all_come_back():
    pool, taken = KVPool(100), {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        if taken and torch.rand((), generator=generator) < 0.5:
            start = list(taken)[int(torch.randint(len(taken), (), generator=generator))]
            pool.free(start)
            del taken[start]
        else:
            rows = int(torch.randint(1, 20, (), generator=generator))
            start = pool.take(rows)
            if start is not None:
                taken[start] = rows
        ranges = sorted((start, start + rows) for start, rows in taken.items())
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(ranges))
        assert all(start >= 0 and end < 100 for start, end in ranges)
    for start in taken:
        pool.free(start)
    assert pool._gaps == [(0, 100)]


# Shared beginnings of prompts


def test_prompts_with_the_same_beginning_read_it_once(monkeypatch):
    """Bit by bit as alone, for prompts of all lengths around the blocks; the beginning is computed once."""
    beginning = chat.prompt([message("user", WORDS * 12)], TOK)
    assert len(beginning) > 3 * prompt_reader.BEGINNING
    ends = [PROMPTS[i % 6][:rest] for i, rest in enumerate((1, 9, 62, 63, 64, 65, 90, 128, 129))]
    prompts = [[*beginning[: 200 - i], *end] for i, end in enumerate(ends * 2)] + [PROMPTS[0], beginning[:130]]
    model, read = talker(**FORMS["qwen2"]), []
    forward = TokenPool.forward

    def counted(self, rows, layout, tokens, *, decode, **options):
        read.append(0 if decode else int((layout.segments[:, 1] - layout.segments[:, 0]).sum()))
        return forward(self, rows, layout, tokens, decode=decode, **options)

    monkeypatch.setattr(TokenPool, "forward", counted)
    together = answers(model, requests(prompts, n=2, limit=6))
    assert sum(read) < sum(map(len, prompts)) / 2
    assert same(together, [answers(model, [request])[0] for request in requests(prompts, n=2, limit=6)])
    assert same(crowd(model, 700, 5, requests(prompts, n=2, limit=6)), together)
