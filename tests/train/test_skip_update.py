"""Steps that are not finite, and spikes: skipped, counted, told, and an end to the run where they are many."""

import math

import pytest
import torch
from helpers.stages import Killed, Trap, die, figures, go, records, settings, strike, taken, tiny, weights

import dph
from dph.cli import main
from dph.train import checkpointing, skip_update
from dph.train.entry import Diverged


def broken(monkeypatch, model, method, call):
    """Make the last number of the ``call``-th result of ``method`` NaN; the reference's do not count."""
    original, left = getattr(dph.Model, method), [call]

    def wrapped(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        left[0] -= self is model
        if left[0] == 0 and self is model:
            (out[0] if isinstance(out, tuple) else out.rewards["default"]).data[-1] = math.nan
        return out

    monkeypatch.setattr(dph.Model, method, wrapped)


@pytest.mark.parametrize(("stage", "method"), [("sft", "stream_logprobs"), ("align", "forward_packed")])
def test_nan_stops_before_the_update(stage, method, tmp_path, monkeypatch):
    changes = {"evaluation__every": 0, "batch__micro": 2, "output__log_every": 1, "guard__stop_after": 1}
    recipe = settings(stage, tmp_path / "run", **changes)
    model, intact = tiny(), tiny()
    broken(monkeypatch, model, method, 2 * 4 + 2)  # the second part of step 5
    with pytest.raises(Diverged) as caught:
        go(recipe, model=model, held_out={})
    message = str(caught.value)
    assert message.startswith("step 5: stopped before the update, the weights are those of step 4; in ")
    assert "records " in message
    assert "the loss is nan" in message
    assert "\n" not in message
    if stage == "align":
        assert "pair 3 of the batch, which begins '</s><|im_start|>user" in message
    assert [line["step"] for line in figures(tmp_path / "run")] == [1, 2, 3, 4]
    stopped = settings(stage, tmp_path / "four", evaluation__every=0, batch__micro=2)
    go(stopped, Trap(records(stage), taken(stopped, 3) + 1, strike), model=intact)
    for (name, a), b in zip(weights(model).items(), weights(intact).values(), strict=True):
        assert torch.equal(a, b), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("stage", "method"), [("sft", "stream_logprobs"), ("align", "forward_packed")])
def test_nan_is_skipped_counted_and_told(stage, method, tmp_path, monkeypatch, capsys):
    recipe = settings(stage, tmp_path / "run", output__log_every=1, output__save_every=1)
    model = tiny()
    broken(monkeypatch, model, method, 5)
    assert go(recipe, model=model, held_out={}, quiet=False).step == 8
    said = [line for line in capsys.readouterr().err.splitlines() if "was skipped" in line]
    assert len(said) == 1
    assert f"{stage}: step 5 was skipped, the weights are as before; in " in said[0]
    assert "the loss is nan for " in said[0]
    lines = [line for line in figures(tmp_path / "run") if "skipped" in line]
    assert [line["skipped"] for line in lines] == [0] * 4 + [1] * 4
    assert ["loss" in line for line in lines] == [True] * 4 + [False] + [True] * 3
    saved = [
        checkpointing.Checkpoint(n, tmp_path / "run" / "checkpoints" / f"step-{n:08d}").tensors("weights")
        for n in (4, 5, 6)
    ]
    assert all(torch.equal(t, saved[1][name]) for name, t in saved[0].items())
    assert not all(torch.equal(t, saved[2][name]) for name, t in saved[0].items())


def spoilt(step):
    """A model whose states are not finite at one step, from the first layer on, so that its memory has it, too."""
    model, calls = tiny(), [0]

    def spoil(_, inputs, states):
        calls[0] += 1
        return torch.full_like(states, math.nan) if calls[0] == step else states

    model.backbone.input_norm.register_forward_hook(spoil)
    return model


@pytest.mark.parametrize(("kind", "place"), [("kv", "device"), ("hidden", "device"), ("kv", "host")])
def test_memory_forgets_what_is_not_finite(kind, place, tmp_path):
    """Step 5 and, which reads its memory, step 6 are skipped; resumed after either, the run goes on the same."""
    changes = {"data__memory_kind": kind, "data__memory_place": place, "output__log_every": 1, "output__save_every": 0}
    whole = go(settings("sft", tmp_path / "whole", **changes), model=spoilt(5), held_out={})
    lines = figures(tmp_path / "whole")
    assert [line["skipped"] for line in lines] == [0] * 4 + [1, 2, 2, 2]
    assert ["loss" in line for line in lines] == [True] * 4 + [False] * 2 + [True] * 2
    for last in (5, 6):
        recipe = settings("sft", tmp_path / str(last), **changes)
        assert (
            go(recipe, Trap(records("sft"), taken(recipe, last - 1) + 1, strike), spoilt(5), held_out={}).step == last
        )
        resumed = go(recipe, resume=True, held_out={})
        assert figures(tmp_path / str(last)) == lines
        for (name, a), b in zip(weights(whole.model).items(), weights(resumed.model).values(), strict=True):
            assert torch.equal(a, b), name


def test_a_spike_is_skipped_and_many_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(skip_update, "WARMUP_STEPS", 3)
    original, left = dph.Model.stream_logprobs, [0]

    def worse(self, *args, **kwargs):
        logprobs, *rest = original(self, *args, **kwargs)
        left[0] += 1
        return (logprobs * 20 if left[0] in (5, 7, 8) else logprobs), *rest

    monkeypatch.setattr(dph.Model, "stream_logprobs", worse)
    recipe = settings("sft", tmp_path / "run", guard__spike=10.0, guard__stop_after=2, output__log_every=1)
    model = tiny()
    with pytest.raises(Diverged, match=r"step 8: .* weights are those of step 6; in .* is a spike, over 10 deviations"):
        go(recipe, model=model, held_out={})
    assert [line["skipped"] for line in figures(tmp_path / "run")] == [0] * 4 + [1, 1, 2]


def test_resume_remembers_what_the_guard_has_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(skip_update, "WARMUP_STEPS", 2)
    changes = {"guard__spike": 0.1, "guard__stop_after": 9, "optimiser__lr": 1e-6}  # the loss goes up and down
    whole = go(settings("sft", tmp_path / "whole", **changes))
    recipe = settings("sft", tmp_path / "parts", **changes)
    with pytest.raises(Killed):
        go(recipe, Trap(records("sft"), taken(recipe, 5) + 1, die))
    resumed = go(recipe, resume=True)
    assert 0 < figures(tmp_path / "whole")[-2]["skipped"] < 8
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_infinite_gradient_stops_before_the_update(precision, tmp_path):
    """In bf16 too the caller has his own weights back, not their rounded copies."""
    model = tiny()
    before = weights(model)
    model.output_proj.weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(
        Diverged,
        match=r"step 3: .* those of step 0; in segments after records \d+ to \d+: the gradient's norm is (nan|inf)",
    ):
        go(settings("sft", tmp_path / "run", precision=precision), model=model)
    assert all(p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in weights(model).items())


def test_divergence_is_a_failure_and_no_mistake_of_the_users():
    error = Diverged("step 5: stopped")
    assert not isinstance(error, main.INPUT_ERRORS)  # exit code 1
    assert main.explain(error) == "step 5: stopped"
