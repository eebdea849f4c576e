"""Under `torch.autocast` operators and model run in its dtype: finite, and as close to fp32 as bf16 is."""

import pytest
import torch
from helpers.numerics import FLOOR, assert_close_to_fp64
from helpers.tiny import END, tiny_model, tokens

import dph
from dph import losses
from dph.chat import Encoded
from dph_kernels import PackedLayout, Rotary, linear_logprob, preference_loss, rope_attention, swiglu_reward
from dph_kernels.rope_attention import reference

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
KINDS = pytest.mark.parametrize("kind", ["kv", "hidden"])


def near(got, expected, tolerance=0.05):
    """Relative to the largest value: a tiny model in bf16, whose every product is rounded to three digits."""
    assert got.isfinite().all()
    error = (got.detach().double() - expected.detach().double()).abs().max()
    assert error <= tolerance * expected.detach().abs().max(), f"error {error:.3e}"


def both(run, device, dtype=torch.bfloat16):
    """The result of ``run`` under autocast and without."""
    with torch.autocast(device, dtype=dtype):
        narrow = run()
    return narrow, run()


def packed(device):
    """Two finished answers to one prompt, judged together."""
    prompt, answers = tokens(5).tolist(), [tokens(n, seed=n).tolist() for n in (3, 4)]
    encoded = []
    for answer in answers:
        whole = [*prompt, *answer, END, 4]
        mask = [i >= 4 for i in range(len(whole) - 1)]
        encoded.append(Encoded(whole[:-1], whole[1:], mask, mask, len(whole) - 2))
    return dph.data.packing.pack([encoded]).to(device)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_casts_all_it_is_given(device, dtype):
    """fp32 queries, half-precision keys, and a memory that was filled outside of autocast."""
    layout = PackedLayout.with_memory([3, 2], [4, 1], 4).to(device)
    q, k, v = (torch.randn(5, 2, 8, device=device, requires_grad=True) for _ in range(3))
    memory = tuple(torch.randn(8, 2, 8, device=device) for _ in range(2))

    def run():
        key = k.to(dtype) if torch.is_autocast_enabled(device) else k
        return rope_attention(q, key, v, layout, rope=Rotary(), memory=memory, return_keys=True)

    narrow, wide = both(run, device, dtype)
    for got, expected in zip(narrow, wide, strict=True):
        assert got.dtype == dtype
        near(got, expected)
    grads = [torch.autograd.grad(out[0].float().square().sum(), (q, k, v)) for out in (narrow, wide)]
    for got, expected in zip(*grads, strict=True):
        assert got.dtype == torch.float32
        near(got, expected)


def test_without_autocast_a_memory_of_another_dtype_is_refused():
    layout = PackedLayout.with_memory([3], [4], 4)
    q, memory = torch.zeros(3, 2, 8), torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"memory\[0\]: expected float32, got bfloat16"):
        rope_attention(q, q, q, layout, rope=Rotary(), memory=(memory, memory))


@DEVICES
def test_linear_logprob_of_narrow_states_and_wide_weights(device):
    hidden, weight = (torch.randn(n, 16, device=device, requires_grad=True) for n in (6, 40))
    targets = torch.arange(6, device=device)

    def run():
        states = hidden.bfloat16() if torch.is_autocast_enabled(device) else hidden
        return linear_logprob(states, weight, targets, statistics=True)[:2]

    narrow, wide = both(run, device)
    for got, expected in zip(narrow, wide, strict=True):
        assert got.dtype == torch.float32
        near(got, expected)
    grads = [torch.autograd.grad(logprobs.sum(), (hidden, weight)) for logprobs, _ in (narrow, wide)]
    for got, expected in zip(*grads, strict=True):
        near(got, expected)


@DEVICES
def test_reward_of_narrow_states_and_wide_weights(device):
    hidden, reward, w1, w2 = (
        torch.randn(*size, device=device).mul(0.3).requires_grad_() for size in ((6, 16), (2, 16), (24, 16), (16, 12))
    )

    def run():
        states = hidden.bfloat16() if torch.is_autocast_enabled(device) else hidden
        return swiglu_reward(states, reward, w1=w1, w2=w2, dropout=0.2, seed=5)

    narrow, wide = both(run, device)
    assert narrow.dtype == torch.float32
    near(narrow, wide)
    grads = [torch.autograd.grad(x.sum(), (hidden, reward, w1, w2)) for x in (narrow, wide)]
    for got, expected in zip(*grads, strict=True):
        near(got, expected)


@DEVICES
def test_the_sums_inside_stay_wide(device):
    """Rounded inputs and fp32 sums: equal to the same call, on inputs cast by hand, outside of autocast."""
    hidden, weight = torch.randn(6, 512, device=device), torch.randn(40, 512, device=device)
    targets = torch.arange(6, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = linear_logprob(hidden, weight, targets)
    assert torch.equal(got, linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets))


@DEVICES
def test_the_backward_pass_may_run_under_autocast_too(device):
    layout = PackedLayout.documents([5]).to(device)
    q = torch.randn(5, 2, 8, device=device).bfloat16().requires_grad_()

    def gradient():
        return torch.autograd.grad(rope_attention(q, q, q, layout, rope=Rotary()).float().square().sum(), q)[0]

    with torch.autocast(device, dtype=torch.bfloat16):
        inside = gradient()
    assert torch.equal(inside, gradient())


@DEVICES
def test_compiles_as_one_graph(device):
    hidden, weight = (torch.randn(n, 16, device=device, requires_grad=True) for n in (6, 40))
    targets = torch.arange(6, device=device)

    def run(hidden, weight):
        with torch.autocast(device, dtype=torch.bfloat16):
            return linear_logprob(hidden, weight, targets)

    logprobs = torch.compile(run, fullgraph=True, backend="aot_eager")(hidden, weight), run(hidden, weight)
    torch.testing.assert_close(*logprobs)
    # On a GPU the one computes gradients along, from shares of probabilities that are rounded otherwise.
    gradients = (torch.autograd.grad(x.sum(), (hidden, weight)) for x in logprobs)
    torch.testing.assert_close(*gradients, **({"rtol": 2e-2, "atol": 2e-2} if device == "cuda" else {}))


def test_fp64_is_left_alone():
    q = torch.randn(5, 2, 8, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = rope_attention(q, q, q, PackedLayout.documents([5]), rope=Rotary())
    assert out.dtype == torch.float64


def test_bodies_see_no_autocast(monkeypatch):
    seen, original = [], reference.forward

    def forward(**inputs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(**inputs)

    monkeypatch.setattr(reference, "forward", forward)
    q = torch.randn(5, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rope_attention(q, q, q, PackedLayout.documents([5]), rope=Rotary(), backend="reference")
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


@DEVICES
def test_model_trains(device):
    model, batch = tiny_model().to(device), packed(device)

    def run():
        out = model.forward_packed(batch)
        rewards, logprobs = out.rewards["default"], out.logprobs
        joint, _ = preference_loss(
            rewards[:1], rewards[1:], logprobs[:1], logprobs[1:], logprobs[:1].detach() + 0.3, logprobs[1:].detach()
        )
        return joint + losses.dph_loss(rewards[:1], rewards[1:]) - out.mean_logprobs.mean(), logprobs, rewards

    (loss, *narrow), (expected, *wide) = both(run, device)
    near(torch.cat(narrow), torch.cat(wide))
    near(loss, expected)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    expected.backward()
    for name, parameter in model.named_parameters():
        assert grads[name].dtype == torch.float32
        near(grads[name], parameter.grad, tolerance=0.2)


@DEVICES
def test_model_judges(device):
    """At most twice as far from fp64 as a model whose weights are bf16."""
    model, ids = tiny_model().to(device), tokens(2, 7).to(device)
    ids[:, -1] = END
    with torch.autocast(device, dtype=torch.bfloat16):
        rewards = model.rewards(ids)["default"]
    truth = tiny_model().to(device, torch.float64).rewards(ids)["default"]
    narrow = tiny_model().to(device, torch.bfloat16).rewards(ids)["default"]
    assert_close_to_fp64(rewards, narrow, truth, floor=FLOOR[torch.bfloat16])


@DEVICES
@KINDS
def test_model_with_memory(device, kind):
    """Segment after segment, each with its backward pass; what is remembered is in the dtype of autocast."""
    model, ids = tiny_model().to(device), tokens(2, 12).to(device)

    def run():
        memory, found = dph.Memory(length=6, kind=kind), []
        model.zero_grad()
        for part in ids.split(4, dim=1):
            out = model(part, labels=part, past_key_values=memory)
            out.loss.backward()
            found += [out.logits.float().flatten(), out.loss.reshape(1)]
        return torch.cat(found), model.backbone.embedding.weight.grad.clone()

    for got, expected in zip(*both(run, device), strict=True):
        assert got.dtype == torch.float32
        near(got, expected)


def test_a_memory_filled_in_fp32_goes_on_under_autocast():
    model, memory = tiny_model().eval(), dph.Memory(length=8)
    first, second = tokens(2, 5), tokens(2, 5, seed=1)
    with torch.no_grad():
        model(first, past_key_values=memory)
        expected = model(second, past_key_values=memory).logits
        memory.reset()
        model(first, past_key_values=memory)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(second, past_key_values=memory).logits
            model(second, past_key_values=memory)  # writes what the call before left
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)
