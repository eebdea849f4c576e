"""The loop: exact resume in every stage, accumulation, what trains and what stands still, and what stops it."""

import dataclasses
import math
import signal

import pytest
import torch
from helpers.stages import STAGES, Killed, Trap, die, figures, go, records, settings, strike, taken, tiny, weights
from helpers.texts import small_tokenizer

import dph
from dph.data.batching import Streams
from dph.data.formats import Encoder
from dph.data.packing import PairBatches, pack, packed_length
from dph.data.sampler import Shuffled
from dph.errors import UserError
from dph.train import checkpointing, entry, run_dir, signals
from dph.train.build import make_stage
from dph.train.entry import Trainer, train
from dph.train.stages.lm import LanguageModelStage

PAIRS = ("align", "head")
pytestmark = pytest.mark.usefixtures("every_kernel")


VARIANTS = [(stage, {}) for stage in STAGES] + [
    ("sft", {"data__memory_kind": "hidden", "batch__micro": 2}),
    ("sft", {"data__memory_place": "host", "batch__micro": 2, "checkpointing": "block"}),
    ("sft", {"data__memory": 0, "precision": "bf16"}),
    ("align", {"precision": "bf16", "batch__micro": 1}),
    ("align", {"batch__tokens": 110}),
    ("align", {"precision": "bf16", "batch__tokens": 140}),
    ("align", {"objective__dpo_weight": 0.0, "objective__objective": "contrastive"}),
    ("head", {"precision": "bf16", "optimiser__prior_decay": 0.0}),
]


@pytest.mark.parametrize(
    ("stage", "changes"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain"
)
def test_resume_is_bit_for_bit(stage, changes, tmp_path):
    """Killed within step 6 (in the second epoch, between two logged steps), resumed from step 3."""
    whole = go(settings(stage, tmp_path / "whole", **changes))
    recipe = settings(stage, tmp_path / "parts", **changes)
    with pytest.raises(Killed):
        go(recipe, Trap(records(stage), taken(recipe, 5) + 1, die))
    assert checkpointing.newest_checkpoint(tmp_path / "parts" / "checkpoints").step == 3
    assert [line["step"] for line in figures(tmp_path / "parts")] == [2, 4, 4]
    resumed = go(recipe, resume=True)
    for (name, a), b in zip(weights(whole.model).items(), weights(resumed.model).values(), strict=True):
        assert torch.equal(a, b), name
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    assert whole.evaluation == resumed.evaluation
    last = [
        checkpointing.newest_checkpoint(tmp_path / d / "checkpoints").tensors("optimiser") for d in ("whole", "parts")
    ]
    assert all(torch.equal(a, last[1][key]) for key, a in last[0].items())


@pytest.mark.parametrize("kind", ["kv", "hidden"])
@pytest.mark.parametrize("places", [("host", "host"), ("device", "host"), ("host", "device")], ids="-".join)
def test_the_place_of_memory_changes_nothing(places, kind, tmp_path, capsys):
    """Neither in one run nor where a run is resumed with another."""
    changes = {"data__memory_kind": kind, "batch__micro": 2}
    whole = go(settings("sft", tmp_path / "whole", data__memory_place="device", **changes), quiet=False)
    assert "the memory of" not in capsys.readouterr().err
    first, then = (settings("sft", tmp_path / "parts", data__memory_place=place, **changes) for place in places)
    with pytest.raises(Killed):
        go(first, Trap(records("sft"), taken(first, 5) + 1, die))
    resumed = go(then, resume=True, quiet=False)
    assert ("sft: the memory of 4 streams is on the host\n" in capsys.readouterr().err) == (places[1] == "host")
    assert all(map(torch.equal, weights(whole.model).values(), weights(resumed.model).values()))
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    last = [checkpointing.newest_checkpoint(tmp_path / d / "checkpoints").tensors("data") for d in ("whole", "parts")]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(tensor, last[1][key]) for key, tensor in last[0].items())


def test_rows_of_one_part_at_most_wait_on_the_device(tmp_path, monkeypatch):
    """A part's new rows are written when the next part begins, whose backward pass does not need the old ones."""
    original, seen = LanguageModelStage.loss, []

    def watched(self, inputs):
        loss = original(self, inputs)
        seen.append([bool(memory._rings._pending) for memory in self.memories])
        return loss

    monkeypatch.setattr(LanguageModelStage, "loss", watched)
    go(settings("sft", tmp_path / "run", batch__micro=1, optimiser__steps=2, evaluation__every=0))
    assert seen[:8] == [[i == number for i in range(4)] for number in range(4)] * 2
    evaluated = seen[8:]
    assert evaluated
    assert not any(map(any, evaluated))


@pytest.mark.parametrize("stage", STAGES)
def test_the_runs_above_cross_an_epoch(stage, tmp_path):
    assert taken(settings(stage, tmp_path), 8) > len(records(stage))


@pytest.mark.parametrize("stage", ["sft", "align"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number, stage, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(entry, "describe_data", lambda stage: [])  # which reads records before the first step
    whole = go(settings(stage, tmp_path / "whole"))
    recipe = settings(stage, tmp_path / "parts", output__save_every=0)
    before = signal.getsignal(number)
    stopped = go(recipe, Trap(records(stage), taken(recipe, 4) + 1, lambda: strike(number)), quiet=False)
    said = capsys.readouterr().err.splitlines()
    told = f"{stage}: {number.name}: the step is being finished and saved; Ctrl-C now stops at once"
    assert said.index(told) < len(said) - 1
    assert said[-1].startswith(f"{stage}: stopped after step 5")
    assert (stopped.interrupted, stopped.step) == (True, 5)
    assert signal.getsignal(number) is before
    assert not (tmp_path / "parts" / "model").exists()
    assert checkpointing.newest_checkpoint(tmp_path / "parts" / "checkpoints").step == 5
    resumed = go(recipe, resume=True)
    assert not resumed.interrupted
    assert all(
        torch.equal(a, b) for a, b in zip(*map(lambda r: weights(r.model).values(), (whole, resumed)), strict=True)
    )
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_a_second_ctrl_c_stops_at_once():
    said = []
    with signals.stop_signals(said.append) as told:
        strike(signal.SIGTERM)
        assert (told(), len(said)) == (signal.SIGTERM, 1)
        with pytest.raises(KeyboardInterrupt):
            strike(signal.SIGINT)
    assert len(said) == 1


def test_an_echo_of_sigterm_is_no_second_signal():
    with signals.stop_signals(lambda text: None) as told:
        strike(signal.SIGTERM)
        strike(signal.SIGTERM)
        assert told() == signal.SIGTERM


def test_a_signal_within_a_line_of_output_is_heard_without_a_word():
    def busy(text):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    with signals.stop_signals(busy) as told:
        strike()
        assert told() == signal.SIGTERM


def test_a_finished_run_resumes_to_its_result(tmp_path):
    recipe = settings("sft", tmp_path / "run")
    first, again = go(recipe), go(recipe, resume=True)
    assert again.step == first.step
    assert again.evaluation == first.evaluation
    assert all(
        torch.equal(a, b) for a, b in zip(weights(first.model).values(), weights(again.model).values(), strict=True)
    )
    with pytest.raises(UserError, match="holds a run already"):
        go(recipe)


def test_resumed_data_must_be_the_same(tmp_path):
    recipe = settings("sft", tmp_path / "run", output__save_every=3)
    with pytest.raises(Killed):
        go(recipe, Trap(records("sft"), taken(recipe, 5) + 1, die))
    with pytest.raises(UserError, match=r"records: other records \(22 in place of 23\)"):
        go(recipe, records("sft", 22), resume=True)


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_changes_nothing_but_rounding(stage, tmp_path, monkeypatch):
    """Gradients of every update at fixed weights, all at once and in parts; dropout included."""
    seen = []

    def keep(self, grad_scale):
        seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])

    monkeypatch.setattr(dph.LaProp, "step", keep)
    results = {}
    for micro in (None, 2, 1):
        seen.clear()
        recipe = settings(stage, tmp_path / str(micro), batch__micro=micro)
        go(recipe, model=tiny(reward_dropout=0.5))
        results[micro] = list(seen), figures(tmp_path / str(micro))
    whole, lines = results.pop(None)
    assert len(whole) == 8
    for steps, others in results.values():
        for one, two in zip(whole, steps, strict=True):
            for a, b in zip(one, two, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * max(1.0, float(a.abs().max())))
        for one, two in zip(lines, others, strict=True):
            assert one == pytest.approx(two, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("stage", "kind"), [("sft", "kv"), ("sft", "hidden"), ("align", "kv"), ("head", "kv")])
def test_checkpointing_changes_nothing(stage, kind, tmp_path):
    """Bit for bit, with parts and memory; nor where a run is resumed with the other."""
    changes = {"data__memory_kind": kind, "batch__micro": 2}
    plain, again = (
        go(settings(stage, tmp_path / way, checkpointing=way, **changes)).model for way in ("none", "block")
    )
    first, then = (settings(stage, tmp_path / "parts", checkpointing=way, **changes) for way in ("none", "block"))
    with pytest.raises(Killed):
        go(first, Trap(records(stage), taken(first, 5) + 1, die))
    resumed = go(then, resume=True).model
    for other in (again, resumed):
        assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(other).values(), strict=True))
    assert not again.backbone.gradient_checkpointing


@pytest.mark.parametrize("stage", STAGES)
def test_what_trains_and_what_stands_still(stage, tmp_path):
    model = tiny(task_heads=["other"])
    before = weights(model)
    result = go(settings(stage, tmp_path / "run"), model=model)
    moved = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    backbone = {name for name in before if not name.startswith("heads.")}
    head = {name for name in before if name.startswith("heads.shared.")}
    embedding = {"backbone.embedding.weight"}
    assert (
        moved
        == {"pretrain": backbone, "vocab": embedding, "sft": backbone, "align": backbone | head, "head": head}[stage]
    )
    assert all(p.requires_grad for p in result.model.parameters())
    assert all(p.grad is None for p in result.model.parameters())


@pytest.mark.parametrize("stage", PAIRS)
def test_parts_by_tokens_change_nothing_but_rounding(stage, tmp_path):
    """Pairs go through the model in another order and company; dropout goes by their places."""
    lines = {}
    for tokens in (None, 110):
        recipe = settings(stage, tmp_path / f"{tokens}", batch__tokens=tokens, output__log_every=1, optimiser__steps=3)
        parts = make_stage(recipe, tiny(), small_tokenizer(), records(stage), {}).next_batch().micro_batches
        bins = [each for part in parts for each in part.bins()]
        assert (len(bins) > 1) == (tokens is not None)
        assert all(tokens is None or len(each.packed.tokens) <= tokens for each in bins)
        go(recipe, model=tiny(reward_dropout=0.5))
        lines[tokens] = figures(tmp_path / f"{tokens}")
    for one, two in zip(*lines.values(), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("stage", PAIRS)
def test_no_two_answers_share_a_dropout_mask(stage, tmp_path):
    """In no step; and a pair's keys are the same however an update is cut."""
    found = []
    for cut in ({}, {"batch__micro": 1}, {"batch__tokens": 110}):
        made = make_stage(settings(stage, tmp_path, **cut), tiny(), small_tokenizer(), records(stage), {})
        made.reference, keys = made.model, {}
        for step in (1, 2, 3):
            for part in made.next_batch().micro_batches:
                for place, pair in zip(
                    part.indices, made.prepare(part, step).answer_ids.view(-1, 2).tolist(), strict=True
                ):
                    keys[step, place] = pair
        found.append(keys)
    assert found[0] == found[1] == found[2]
    assert len({key for pair in found[0].values() for key in pair}) == 3 * 4 * 2


def test_pairs_that_take_more_than_the_budget_are_refused(tmp_path):
    pairs = records("align")
    sizes = sorted(packed_length(Encoder(small_tokenizer())(pair)) for pair in pairs)
    assert sizes[0] < sizes[-1]
    go(settings("align", tmp_path / "run", batch__tokens=sizes[-1] - 1, evaluation__every=0), pairs, held_out=pairs)
    assert figures(tmp_path / "run")[0]["refused"] > 0


def test_each_of_several_heads_is_logged(tmp_path):
    heads = ["default", "other"]
    go(settings("head", tmp_path / "run", objective__heads=heads), model=tiny(reward_heads=heads))
    line = figures(tmp_path / "run")[0]
    for name in ("dph_loss", "reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected"):
        assert line[name] == pytest.approx(sum(line[f"{name}_{head}"] for head in heads) / 2, rel=1e-4, abs=1e-6)
    assert line["reward_margin_default"] != line["reward_margin_other"]


def test_head_stage_in_bf16_leaves_the_backbone_bit_for_bit(tmp_path):
    model = tiny()
    before = weights(model)
    result = go(settings("head", tmp_path / "run", precision="bf16"), model=model)
    after = weights(result.model)
    assert all(p.dtype == torch.float32 for p in after.values())
    assert all(torch.equal(after[n], p) for n, p in before.items() if not n.startswith("heads."))
    assert not torch.equal(after["heads.shared.pooler.0.weight"], before["heads.shared.pooler.0.weight"])
    saved = dph.Model.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.equal(p, after[n]) and p.dtype == torch.float32 for n, p in saved.named_parameters())


def test_bf16_trains_as_fp32_does(tmp_path):
    high, low = (
        go(settings("sft", tmp_path / p, precision=p, optimiser__lr=1e-3)).evaluation["loss"] for p in ("fp32", "bf16")
    )
    assert low == pytest.approx(high, rel=0.01)


def test_the_model_directory_opens(tmp_path):
    from transformers import AutoTokenizer

    result = go(settings("align", tmp_path / "run"))
    again = dph.Model.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.equal(p, q) for p, q in zip(result.model.parameters(), again.parameters(), strict=True))
    assert not again.untrained_heads
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.get_vocab() == small_tokenizer().get_vocab()
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "lock" and "tfevents" not in p.name]
    kinds = {p.suffix for p in files}
    assert kinds <= {".json", ".jsonl", ".safetensors", ".jinja", ".py"}


def first_line(tmp_path):
    return figures(tmp_path / "run")[0]


def test_stream_figures(tmp_path):
    """The first update's loss, token accuracy and entropy, from logits over the segments that the seed gives."""
    recipe = settings("sft", tmp_path / "run", output__log_every=1, optimiser__steps=2)
    model = tiny()
    order = Shuffled(records("sft"), recipe.seed)
    tokens, targets = next(Streams(order, Encoder(small_tokenizer()), 4, recipe.data.context, 1))
    wanted = targets != -100
    logits = model(tokens).logits[wanted]
    found = {
        "loss": torch.nn.functional.cross_entropy(logits, targets[wanted]),
        "token_accuracy": (logits.argmax(1) == targets[wanted]).double().mean(),
        "entropy": torch.distributions.Categorical(logits=logits).entropy().mean(),
    }
    go(recipe, model=model)
    line = first_line(tmp_path)
    for name, want in found.items():
        assert line[name] == pytest.approx(want.item(), rel=1e-5), name


@pytest.mark.parametrize("count", [3, 4])
def test_streams_that_read_the_same_are_told_of(count, tmp_path):
    material = tiny(), small_tokenizer(), records("pretrain", count), {}
    told = make_stage(settings("pretrain", tmp_path, batch__size=4), *material).notes
    few = "batch.size: 4 streams take 1 of 3 records at a time, so that some read the same"
    assert told == ((few,) if count == 3 else ())


def test_memory_reaches_the_second_segment(tmp_path):
    losses = {}
    for memory in (0, 20):
        recipe = settings("sft", tmp_path / f"{memory}", data__memory=memory, output__log_every=1)
        go(recipe)
        losses[memory] = [line["loss"] for line in figures(tmp_path / f"{memory}") if "loss" in line]
    assert losses[0][0] == losses[20][0]
    assert losses[0][1] != losses[20][1]


@pytest.mark.parametrize("objective", ["separable", "contrastive"])
def test_pair_loss_is_the_papers(objective, tmp_path):
    """After one update, the losses of answers run one by one, against a reference that has stood still."""
    recipe = settings("align", tmp_path / "run", output__log_every=1, optimiser__steps=2, optimiser__warmup=1,
                      objective__objective=objective, evaluation__every=0)  # fmt: skip
    model, reference = tiny(reward_dropout=0.0), tiny(reward_dropout=0.0)
    batches = PairBatches(Shuffled(records("align"), recipe.seed), Encoder(small_tokenizer()), 4)
    expected = []

    def judged(net, pairs, side):
        outs = [net.forward_packed(pack([[pair[side]]])) for pair in pairs]
        return torch.cat([o.logprobs for o in outs]), torch.cat([o.rewards["default"] for o in outs])

    optimiser = dph.LaProp(dph.optim.param_groups(model, prior_decay=0.5, no_decay=()), lr=0.0)
    for rate in (0.01, 0.001):
        pairs = next(batches)
        (pc, rc), (pr, rr) = (judged(model, pairs, side) for side in (0, 1))
        (qc, _), (qr, _) = (judged(reference, pairs, side) for side in (0, 1))
        dpo = dph.losses.cdpo_loss(pc, pr, qc.detach(), qr.detach(), beta=0.6, epsilon=0.25)
        reward = dph.losses.dph_loss(rc, rr, epsilon=0.1, objective=objective)
        expected.append({"loss": (dpo + reward).item(), "dpo_loss": dpo.item(), "dph_loss": reward.item()})
        (dpo + reward).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        optimiser.zero_grad()
    result = go(recipe, model=tiny(reward_dropout=0.0))
    for line, want in zip(figures(tmp_path / "run"), expected, strict=False):
        assert {key: line[key] for key in want} == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert expected[0]["dpo_loss"] == pytest.approx(math.log(2), rel=1e-5)
    for (name, a), b in zip(weights(result.model).items(), weights(model).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-5, msg=name)


def test_parts_of_the_objective_that_are_off_are_not_logged(tmp_path):
    go(settings("align", tmp_path / "run", objective__dpo_weight=0.0))
    assert "dpo_loss" not in first_line(tmp_path)
    go(settings("align", tmp_path / "other", objective__dph_weight=0.0))
    line = figures(tmp_path / "other")[0]
    assert "reward_accuracy" not in line
    assert "dpo_loss" in line


def test_head_learns_and_ties_count_half(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.heads["shared"].reward["default"].weight.zero_()
    stage = settings("head", tmp_path / "zero", optimiser__lr=0.0, optimiser__final_lr=0.0)
    assert go(stage, model=model).evaluation["reward_accuracy"] == 0.5
    recipe = settings("head", tmp_path / "run", optimiser__steps=60, output__save_every=0, optimiser__prior_decay=0.0)
    assert go(recipe).evaluation["reward_accuracy"] == 1.0


@pytest.mark.parametrize("stage", ["align", "head"])
def test_a_pair_with_an_empty_answer_is_not_compared_by_the_mean(stage, tmp_path):
    pairs = records(stage, 3)
    empty = dataclasses.replace(pairs[0], rejected=[*pairs[0].rejected[:-1], {"role": "assistant", "content": ""}])
    with_empty = go(settings(stage, tmp_path / "a"), held_out={"a": [*pairs[1:], empty], "b": [empty]}).evaluation
    without = go(settings(stage, tmp_path / "b"), held_out={"a": pairs[1:]}).evaluation
    assert with_empty["logprob_accuracy"] == with_empty["logprob_accuracy/a"] == without["logprob_accuracy"]
    assert math.isnan(with_empty["logprob_accuracy/b"])
    assert 0 <= with_empty["reward_accuracy/b"] <= 1


def test_held_out_scores_that_are_no_number_are_an_error(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.heads["shared"].reward["default"].weight.fill_(math.nan)
    recipe, held_out = settings("head", tmp_path, guard__stop_after=99), {"a": records("head", 3)}
    with pytest.raises(RuntimeError, match=r"a: reward_accuracy: expected finite numbers, got \[nan, nan\]"):
        go(recipe, model=model, held_out=held_out)


def test_several_held_out_sources(tmp_path):
    held_out = {"a": records("align", 3), "b": records("align", 6)[3:]}
    found = go(settings("align", tmp_path / "run"), held_out=held_out).evaluation
    parts = [found["logprob_accuracy/a"], found["logprob_accuracy/b"]]
    assert found["logprob_accuracy"] == pytest.approx(sum(parts) / 2)


@pytest.mark.parametrize("stage", STAGES)
def test_no_evaluation_without_held_out_records(stage, tmp_path):
    assert go(settings(stage, tmp_path / "run"), held_out={}).evaluation == {}


@pytest.mark.parametrize("stage", ["vocab", "head"])
def test_a_killed_stage_in_bf16_gives_every_weight_back(stage, tmp_path):
    """Those that stood still as well: vocab and head train but a part."""
    model = tiny()
    before = weights(model)
    recipe = settings(stage, tmp_path / "run", precision="bf16")
    with pytest.raises(Killed):
        go(recipe, Trap(records(stage), taken(recipe, 1) - 1, die), model=model)
    assert all(p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in weights(model).items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective__heads": ["nobody"]}, "objective.heads: expected at least one name, of default, got nobody"),
        ({"objective__heads": []}, "objective.heads: expected at least one name, of default, got none"),
        ({"objective__dph_weight": 0.0}, "objective: expected a weight above 0"),
    ],
)
def test_wrong_objectives(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        go(settings("head", tmp_path / "run", **changes))


def test_a_failed_start_does_not_take_the_directory(tmp_path):
    with pytest.raises(UserError, match=r"data\.sources: expected at least one source"):
        train(settings("sft", tmp_path / "run"), model=tiny(), tokenizer=small_tokenizer())
    with pytest.raises(UserError, match="tokenizer: expected the one that goes with the model"):
        train(settings("sft", tmp_path / "run"), model=tiny(), records=records("sft"))
    go(settings("sft", tmp_path / "run", optimiser__steps=2))


def test_progress_is_lines_where_there_is_no_terminal(tmp_path, capsys):
    go(settings("align", tmp_path / "run"), quiet=False)
    lines = capsys.readouterr().err.splitlines()
    first = next(line for line in lines if not line.startswith("align: "))
    assert first.startswith("align 2/8: loss ")
    assert "tokens/s" in first
    assert "left" in first
    assert lines[-1] == f"align: the model is in {tmp_path / 'run' / 'model'}"
    go(settings("align", tmp_path / "quiet"))
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_never_waits_for_the_device(stage, tmp_path):
    recipe = settings(stage, tmp_path, device="cuda", precision="bf16", data__cache_states=False)
    made = make_stage(recipe, tiny(), small_tokenizer(), records(stage), {})
    loop = Trainer(recipe, made, run_dir.RunDirectory(tmp_path, recipe.as_dict()), quiet=True)
    loop.model.train()
    loop.train_step(1)  # compiles, and makes what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = loop.train_step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.total.isfinite() for loss in metrics.losses)


def test_gradients_gather_in_fp32_where_an_update_has_several_parts(tmp_path, monkeypatch):
    """From one update to the next; of a single part they stay as they come."""
    parts, found = [], []
    update, step = Trainer._update_weights, dph.LaProp.step

    def count(trainer, inputs, number, weight):
        parts.append(number)
        return update(trainer, inputs, number, weight)

    def look(optimiser, *args, **kwargs):
        grads = (p.grad for group in optimiser.param_groups for p in group["params"])
        found.append({grad.dtype for grad in grads if grad is not None})
        return step(optimiser, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_update_weights", count)
    monkeypatch.setattr(dph.LaProp, "step", look)
    go(settings("align", tmp_path / "run", precision="bf16", batch__tokens=140))
    assert {1, 2} <= set(parts), "both kinds"
    assert found == [{torch.bfloat16 if number == 1 else torch.float32} for number in parts]
