"""Several tokens of all candidates without the host: the answers of the engine that looks at every token."""

import math

import pytest
import torch
from helpers.talker import TOK, talker
from helpers.texts import message
from helpers.tiny import FORMS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dph import chat
from dph.infer.pooled_engine import PooledEngine
from dph.infer.request import Pruning, Request, fixed
from dph.infer.sampling import Sampling
from dph.infer.token_loop import TokenLoop

WORDS = "the quick brown fox jumps over a lazy dog and says hello to the world again "
PROMPTS = [chat.prompt([message("user", text)], TOK) for text in ("a", WORDS, "hello", WORDS * 3, "x y", "12 34 56")]


def requests(n=5, limits=(20,), pruning=None, rewards=True, **options):
    asked = []
    for i, prompt in enumerate(PROMPTS):
        sampling = Sampling(max_new_tokens=limits[i % len(limits)], **options)
        asked.append(Request(prompt, fixed(n), sampling, seed=3, rewards=rewards, pruning=pruning))
    return asked


def answered(model, asked, turns, rows=3000, batch=1024):
    """Answers, steps and loops of an engine."""
    engine, steps = PooledEngine(model, TOK, rows, batch, turns), 0
    for request in asked:
        engine.submit(request)
    while engine.requests:
        engine.step()
        steps += 1
    assert engine.pool._gaps == [(2, rows)]  # all rows are free again, but for that of padding
    return [request.answers for request in asked], steps, engine._loops


def assert_same(found, expected):
    for group, other in zip(found, expected, strict=True):
        assert [(a.index, a.tokens, a.finished) for a in group] == [(a.index, a.tokens, a.finished) for a in other]
        for answer, alike in zip(group, other, strict=True):
            for got, want in ((answer.logprob, alike.logprob), (answer.mean_logprob, alike.mean_logprob)):
                assert got == pytest.approx(want, abs=1e-4, nan_ok=True)
            assert answer.rewards == pytest.approx(alike.rewards, abs=1e-4)
            assert answer.spreads == pytest.approx(alike.spreads, abs=1e-4)


@pytest.mark.parametrize("turns", [2, 5, 16])
@pytest.mark.parametrize(
    "form", [{}, *FORMS.values(), {"reward_layer": 1}, {"reward_members": 3}, {"reward_heads": []}], ids=str
)
def test_answers_are_those_of_single_tokens(form, turns):
    model = talker(**form)
    expected, single_steps, loops = answered(model, requests(), 1)
    assert not loops
    assert 0 < sum(answer.finished for group in expected for answer in group) < 30
    found, steps, loops = answered(model, requests(), turns)
    assert_same(found, expected)
    assert loops
    assert steps <= 2 + math.ceil(single_steps / turns)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0}, {"temperature": 0.3}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"typical_p": 0.5},
        {"rewards": False}, {"limits": (1, 2, 7, 20)}, {"n": 40},
    ],
    ids=str,
)  # fmt: skip
def test_options(options):
    """Answers of other lengths share a loop; the most probable ones are told apart all the same."""
    model = talker()
    expected, _, _ = answered(model, requests(**options), 1)
    found, _, loops = answered(model, requests(**options), 4)
    assert_same(found, expected)
    assert loops


@pytest.mark.parametrize("options", [{"repetition_penalty": 2.0}, {"stop": ["e"]}, {"pruning": Pruning(2, "default")}])
def test_what_needs_the_host_is_done_token_by_token(options):
    model = talker()
    expected, _, _ = answered(model, requests(**options), 1)
    found, _, loops = answered(model, requests(**options), 4)
    assert repr(found) == repr(expected)
    assert not loops


def test_prompts_that_wait_and_candidates_of_other_options():
    """With little room candidates begin as others end; different options are drawn token by token."""
    model = talker()
    expected, _, _ = answered(model, requests(), 1)
    longest = len(PROMPTS[3]) + 21
    for rows, batch in ((longest + 30, 7), (longest + 100, 3), (longest + 200, 9)):
        found, _, loops = answered(model, requests(), 4, rows, batch)
        assert_same(found, expected)
        assert loops
    mixed = [requests(temperature=0.5)[0], *requests()[1:]]
    expected, _, _ = answered(model, mixed, 1)
    found, _, _ = answered(model, [requests(temperature=0.5)[0], *requests()[1:]], 4)
    assert_same(found, expected)


def test_a_request_can_be_cancelled_between_calls():
    model = talker()
    for steps in (2, 3, 4):
        engine = PooledEngine(model, TOK, 3000, turns=3)
        kept, gone = requests(n=12)[:2]
        for request in (kept, gone):
            engine.submit(request)
        for _ in range(steps):
            engine.step()
        partial = engine.partial(gone)
        assert all(1 <= len(tokens) <= 3 * steps for tokens in partial.values())
        engine.cancel(gone)
        engine.run()
        assert_same([kept.answers], answered(model, requests(n=12)[:1], 1)[0])


class Waits(TorchDispatchMode):
    """Operations whose results the host needs: on a GPU they would wait."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "pin_memory")

    def __init__(self):
        super().__init__()
        self.count, self.found = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += 1
        if name in self.NAMES or by_mask:
            self.found.append(str(func))
        return func(*args, **kwargs or {})


class FromTheHost(TorchFunctionMode):
    """Functions whose data come from the host: a graph would repeat them, or refuse them."""

    NAMES = ("tensor", "as_tensor")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            self.found.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9}]
)
@pytest.mark.parametrize("form", [{}, *FORMS.values()], ids=["dph", *FORMS])
def test_nothing_in_a_turn_needs_the_host(form, options, monkeypatch):
    draw, modes = TokenLoop.draw, []

    def watched(self):
        with monkeypatch.context() as patch, FromTheHost() as given, Waits() as mode:
            patch.setattr(torch, "from_numpy", None)  # which no mode sees
            draw(self)
        modes.append(mode)
        mode.found += given.found

    monkeypatch.setattr(TokenLoop, "draw", watched)
    model = talker(**form)
    answered(model, requests(**options), 4)
    assert len(modes) >= 8
    assert all(mode.count > 50 for mode in modes)
    assert not [name for mode in modes[4:] for name in mode.found]  # the first call fills caches


def test_the_watch_finds_what_waits():
    x = torch.arange(4)
    for wait in (lambda: x[0].item(), lambda: x[x > 1], lambda: x.nonzero(), lambda: bool(x[0])):
        with Waits() as mode:
            wait()
        assert mode.found
    for give in (lambda: torch.tensor([1]), lambda: torch.as_tensor([1])):
        with FromTheHost() as mode:
            give()
        assert mode.found


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("form", [{}, FORMS["qwen3"], {"reward_members": 3}], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "temperature": 0.7}, {"limits": (7, 20)}], ids=str)
def test_graphs_give_the_same_answers(form, options, monkeypatch):
    model = talker(**form).cuda()
    expected, _, _ = answered(model, requests(n=24, **options), 1)
    replayed, play = [], TokenLoop._play

    def watched(self):
        was_captured = self._graph is not None and self._moved == self.layout.moved
        torch.cuda.set_sync_debug_mode("error" if was_captured else "default")
        try:
            play(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        replayed.append(self._graph is not None)

    monkeypatch.setattr(TokenLoop, "_play", watched)
    found, _, _ = answered(model, requests(n=24, **options), 2)
    assert_same(found, expected)
    assert sum(replayed) > 3
