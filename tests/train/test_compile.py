"""Compiled blocks: the same results, one graph for all, the same bits after a resume, and a plain model back."""

import contextlib
import dataclasses

import pytest
import torch
from helpers.numerics import assert_close_to_fp64
from helpers.stages import Killed, Trap, die, figures, go, records, settings, taken, tiny, weights
from helpers.texts import small_tokenizer
from helpers.tiny import tiny_model, tokens
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import dph
from benchmarks import train_step
from dph.data.formats import Encoder
from dph.data.packing import pack
from dph.errors import UserError
from dph.train import compile

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
COUNTS = (13, 5, 30, 21)  # tokens of segments


def stream(model, kind, counts=COUNTS):
    """Log-probabilities of every segment of two streams, each with its backward pass, and the sums of gradients."""
    memory = None if kind is None else dph.Memory(16, kind)
    found = {}
    for i, count in enumerate(counts):
        ids = tokens(2, count, seed=i).to(model.device)
        found[f"segment {i}"] = model.stream_logprobs(ids, ids.roll(-1, 1), memory)
        found[f"segment {i}"].mean().backward()
    return found | gradients(model)


def pairs(model):
    """Log-probabilities and rewards of packed pairs of three lengths, and the gradients of both."""
    encode, found = Encoder(small_tokenizer()), {}
    for count in (3, 1, 2):
        batch = pack([encode(record) for record in records("align", count)]).to(model.device)
        out = model.forward_packed(batch)
        found |= {f"{count} log-probabilities": out.logprobs, f"{count} rewards": out.rewards["default"]}
        (out.logprobs.mean() + out.rewards["default"].mean()).backward()
    return found | gradients(model)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(make, run):
    """``run`` of a compiled model against that of a plain one, and of one in fp64."""
    plain, quick, true = make(), make(), make().double()
    compile.switch_on(quick.backbone)
    before = counters["stats"]["unique_graphs"]
    results = [run(model) for model in (quick, plain, true)]
    assert counters["stats"]["unique_graphs"] > before
    for name in results[0].keys() | results[2].keys():
        assert_close_to_fp64(*(result[name] for result in results), name)


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("kind", [None, "kv", "hidden"])
def test_streams_are_the_same(kind, again, device):
    def make():
        model = tiny_model().to(device)
        model.backbone.gradient_checkpointing = again
        return model

    compare(make, lambda model: stream(model, kind))


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("device", DEVICES)
def test_pairs_are_the_same(device):
    compare(lambda: tiny(reward_dropout=0.0).to(device), pairs)


@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_one_row_is_the_same():
    compare(tiny_model, lambda model: {f"{count}": model(tokens(1, count)).logits for count in (1, 2)})


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointing"])
def test_all_blocks_and_steps_share_two_graphs(again):
    """And two more without gradients; none is made anew for other numbers of rows."""
    model = tiny_model(num_hidden_layers=4)
    model.backbone.gradient_checkpointing = again
    compile.switch_on(model.backbone)
    began = counters["stats"]["unique_graphs"]
    stream(model, "kv", counts=(9,))
    assert counters["stats"]["unique_graphs"] == began + 2
    with torch.no_grad():
        model(tokens(2, 7))
    assert counters["stats"]["unique_graphs"] == began + 4
    with torch.compiler.set_stance("fail_on_recompile"):
        stream(model, "kv")
        with torch.no_grad():
            model(tokens(3, 11))
    assert counters["stats"]["unique_graphs"] == began + 4


def test_the_first_rows_that_a_graph_sees_are_always_as_many(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda method, **_: lambda block, *rows: seen.append([*map(len, rows)]))
    block = tiny_model().backbone.blocks[0]
    after = compile.CompiledMethod(type(block).after)
    sizes = 5, 6, compile.LONG, compile.LONG + 1, 1, 9000, 0
    for count in sizes:
        after(block, *torch.zeros(2, count, 16))
    assert seen == [[n, n] for n in (compile.FEW, 5, 6, 4096, compile.MANY, 4097, 1, 1, 9000, 0, 0)]


@pytest.mark.usefixtures("inductor")
def test_gradients_that_have_gathered_stay():
    """A graph that is first needed amid an update, whose weights are bf16 and their gradients fp32."""
    model = tiny_model().bfloat16()
    for p in model.parameters():
        p.grad_dtype = torch.float32
        p.grad = torch.ones_like(p, dtype=torch.float32)
    compile.switch_on(model.backbone)
    gathered = gradients(model)
    with torch.no_grad():
        model(tokens(2, 7))
    for name, p in model.named_parameters():
        assert p.grad is gathered[name], name
        assert p.grad.eq(1).all(), name


# Training


def kill(recipe, **options):
    """Train into the sixth update; the third is the last one saved."""
    with pytest.raises(Killed):
        go(recipe, Trap(records(recipe.stage), taken(recipe, 5) + 1, die), **options)


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("sft", {"data__memory_kind": "hidden", "checkpointing": "block"}),
        ("align", {"objective__reference": "cache"}),
        ("align", {"objective__dpo_weight": 0.0, "evaluation__every": 0}),
    ],
)
def test_resume_is_bit_for_bit(stage, changes, tmp_path):
    """Though other numbers of rows come first; in the last case, which has the fewest graphs, all are built anew."""
    changes = {"compile": True, "batch__micro": 2, **changes}
    held_out = {} if "evaluation__every" in changes else records(stage, 5)
    whole = go(settings(stage, tmp_path / "whole", **changes), held_out=held_out)
    recipe = settings(stage, tmp_path / "parts", **changes)
    kill(recipe, held_out=held_out)
    torch.compiler.reset()
    with contextlib.nullcontext() if held_out else fresh_cache():
        resumed = go(recipe, resume=True, held_out=held_out)
    for (name, a), b in zip(weights(whole.model).items(), weights(resumed.model).values(), strict=True):
        assert torch.equal(a, b), name
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    plain = go(settings(stage, tmp_path / "plain", **(changes | {"compile": False})), held_out=held_out)
    assert plain.evaluation == pytest.approx(whole.evaluation, rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_the_model_is_plain_again(tmp_path):
    """However training ended; here in bf16, with gradients that gather over parts."""
    model = tiny()
    names, attributes = list(model.state_dict()), [set(vars(block)) for block in model.backbone.blocks]
    recipe = settings("align", tmp_path / "run", compile=True, precision="bf16", batch__micro=2)
    began = counters["stats"]["unique_graphs"]
    kill(recipe, model=model)
    assert counters["stats"]["unique_graphs"] > began
    assert [set(vars(block)) for block in model.backbone.blocks] == attributes
    assert list(model.state_dict()) == names


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("stage", ["sft", "align"])
def test_training_goes_as_plain_training_does(stage):
    """Losses, every gradient and the way of the weights, as the benchmark checks its contenders."""
    contender = next(c for c in train_step.contenders(stage, 220) if c.who == "ours, torch.compile")
    sizes = {"hidden_size": 16, "intermediate_size": 24}  # as everywhere here: they are compiled already
    shape = dataclasses.replace(train_step.TINY, model=train_step.TINY.model | sizes)
    train_step.check(contender, train_step.Job(stage=stage, shape=shape))


@pytest.mark.usefixtures("inductor")
def test_no_compiler_is_an_error_before_the_first_step(tmp_path):
    torch.compiler.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), fresh_cache():
        with pytest.raises(UserError, match=r"compile: expected a torch.compile that works on cpu, got: .*compiler"):
            go(settings("sft", tmp_path / "run", compile=True))
        go(settings("sft", tmp_path / "plain", optimiser__steps=2))
