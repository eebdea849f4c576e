"""Options for what the paper's scripts do: decays of heads, frozen parameters, mean log-probabilities, ..."""

import copy
import itertools
import json

import pytest
import torch
from helpers.stages import Killed, Trap, die, go, records, same, same_gradients, settings, tiny, weights
from helpers.texts import small_tokenizer, write_lines
from helpers.tiny import FORMS

from dph import chat
from dph.data import dataset
from dph.data.formats import Conversation, Encoder, Preference
from dph.data.labels import Label, Labelled
from dph.errors import UserError
from dph.losses import sequence_logprobs
from dph.optim import LaProp, warmup_cosine
from dph.train import checkpointing
from dph.train import recipe as recipes
from dph.train.budget import flops, memory
from dph.train.build import make_stage
from dph.train.run_dir import RunDirectory
from dph.train.trainer import Trainer

OWN_DECAYS = {"prior_decay": 0.5, "head_prior_decay": 0.0, "head_weight_decay": 0.1}
OWN_DECAYS = {f"optimiser__{name}": value for name, value in OWN_DECAYS.items()}
LATER = {
    "optimiser": ["head_prior_decay", "head_weight_decay"],
    "train": ["frozen"],
    "objective": ["dpo_mean"],
    "data": ["loss", "prefixes", "repeat_system"],
}
FROZEN = ["backbone.embedding.*", "backbone.input_*", "backbone.blocks.0.*", "*.attention.qkv.bias"]


def trainer_of(recipe, model, data=None):
    stage = make_stage(recipe, model, small_tokenizer(), data or records(recipe.stage), [])
    return Trainer(recipe, stage, RunDirectory(recipe.output.directory, recipe.as_dict()), quiet=True)


# Decays of pooler and heads


@pytest.mark.parametrize("no_decay", [[], ["bias"]])
def test_heads_with_decays_of_their_own_take_the_steps_of_laprop_with_groups_by_hand(no_decay, tmp_path):
    """The paper's script for other models: the backbone is pulled to its prior, pooler and head to zero."""
    recipe = settings("align", tmp_path, optimiser__no_decay=no_decay, optimiser__eps=1e-3, **OWN_DECAYS)
    trainer, model = trainer_of(recipe, tiny(reward_dropout=0.0)), tiny(reward_dropout=0.0)
    stage = make_stage(recipe, model, small_tokenizer(), records("align"), [])
    stage.reference = copy.deepcopy(model).eval()
    groups = {"backbone": [], "heads": [], "bias": []}
    for name, p in model.named_parameters():
        kind = "heads" if name.startswith("heads.") else "backbone"
        groups["bias" if no_decay and "bias" in name else kind].append(p)
    decays = {"backbone": {"prior_decay": 0.5}, "heads": {"weight_decay": 0.1}, "bias": {}}
    by_hand = LaProp([{"params": groups[kind], **decays[kind]} for kind in groups if groups[kind]], lr=0.01, eps=1e-3)
    for step in range(1, 6):
        trainer.train_step(step)
        batch = stage.next_batch()
        loss = stage.loss(stage.prepare(batch.micro_batches[0], step))
        (loss.total / batch.weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimiser.clip)
        for group in by_hand.param_groups:
            group["lr"] = warmup_cosine(step, peak=0.01, warmup=2, total=8, final=0.001)
        by_hand.step()
        by_hand.zero_grad()
    begun = weights(tiny())
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p, model.get_parameter(name), rtol=1e-5, atol=1e-6)
        assert not torch.equal(p, begun[name]), name
    heads = sum(p.numel() for name, p in begun.items() if name.startswith("heads."))
    biases = sum(p.numel() for name, p in begun.items() if "bias" in name and not name.startswith("heads."))
    total = sum(p.numel() for p in begun.values())
    sizes = memory.on_device(trainer.stage, 100, torch.device("cpu"), "device")
    assert sizes["priors"] == 4 * (total - heads - (biases if no_decay else 0))
    priors = sum("prior" in state for state in trainer.optimiser.state.values())
    assert priors == len(groups["backbone"])


# Frozen parameters


@pytest.mark.parametrize("form", [None, "llama"])
@pytest.mark.parametrize("stage", ["align", "sft"])
def test_frozen_parameters_have_no_gradient_and_the_others_that_of_full_training(stage, form, tmp_path, every_kernel):
    shape = {"num_hidden_layers": 3, **(FORMS[form] if form else {})}
    patterns = FROZEN if form is None else ["backbone.embedding.*", "backbone.blocks.0.*", "*.ffn_norm.weight"]
    full = trainer_of(settings(stage, tmp_path / "full"), tiny(**shape))
    part = trainer_of(settings(stage, tmp_path / "part", train__frozen=patterns), tiny(**shape))
    assert part.stage.frozen_blocks == 1
    for trainer in (full, part):
        trainer.model.train()
        trainer.stage.loss(trainer.stage.prepare(trainer.stage.next_batch().micro_batches[0], 1)).total.backward()
    trained = same_gradients(part, full)
    assert trained == set(part.names.values()) == set(full.names.values()) - part.stage.frozen_names
    assert {part.names[p] for p in part.optimiser.state} == trained
    count = sum(p.numel() for p in part.names)
    sizes, whole = (memory.on_device(t.stage, 100, torch.device("cpu"), "device") for t in (part, full))
    assert (sizes["momentum and second moment"], sizes["priors"]) == (8 * count, 4 * count)
    assert sizes["weights"] == whole["weights"]
    assert sizes["activations"] < whole["activations"]
    batches = part.stage.next_batch(), full.stage.next_batch()
    assert 0 < flops.batch_flops(part.stage, batches[0]) < flops.batch_flops(full.stage, batches[1])


@pytest.mark.parametrize("stage", ["align", "sft", "head"])
def test_a_killed_run_with_the_paper_s_options_resumes_bit_for_bit(stage, tmp_path):
    """Frozen parameters stay the same bytes."""
    changes = {
        "sft": {"train__frozen": FROZEN, "data__loss": "all", "data__repeat_system": False},
        "align": {"train__frozen": ["backbone.embedding.*", "*.bias"], "objective__dpo_mean": True} | OWN_DECAYS,
        "head": {"train__frozen": ["heads.*.pooler.0.*"]} | OWN_DECAYS,
    }[stage]
    whole = go(settings(stage, tmp_path / "whole", **changes))
    with pytest.raises(Killed):
        go(settings(stage, tmp_path / "run", **changes), Trap(records(stage), 24, die))
    assert 0 < checkpointing.newest_checkpoint(tmp_path / "run/checkpoints").step < 8
    same(whole, go(settings(stage, tmp_path / "run", **changes), resume=True))
    begun, unchanged = weights(tiny()), set()
    for name, p in whole.model.named_parameters():
        if torch.equal(p, begun[name]):
            unchanged.add(name)
        assert p.requires_grad
    stage = make_stage(settings(stage, tmp_path / "s", **changes), tiny(), small_tokenizer(), records(stage), [])
    assert unchanged == {name for name in begun if not stage.trains(name)}
    assert stage.frozen_names


def test_frozen_parameters_are_the_same_bytes_after_training_in_bf16(tmp_path):
    recipe = settings("align", tmp_path, train__frozen=FROZEN, precision="bf16")
    stage = make_stage(recipe, tiny(), small_tokenizer(), records("align"), [])
    begun, result = weights(tiny()), go(recipe)
    changed = {name for name, p in result.model.named_parameters() if not torch.equal(p, begun[name])}
    assert changed == {name for name in begun if stage.trains(name)}


@pytest.mark.parametrize("stage", ["align", "sft"])
def test_a_run_from_before_these_options_resumes_without_them_only(stage, tmp_path):
    whole, recipe = go(settings(stage, tmp_path / "whole")), settings(stage, tmp_path / "run")
    with pytest.raises(Killed):
        go(recipe, Trap(records(stage), 24, die))
    path = tmp_path / "run/config.json"
    config = json.loads(path.read_text())
    for section, names in LATER.items():
        for name in names:
            del config[section][name]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"train\.frozen.*: expected .* a resumed run must not differ"):
        go(settings(stage, tmp_path / "run", train__frozen=["backbone.embedding.*"]), resume=True)
    same(whole, go(recipe, resume=True))


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (
            "sft",
            {"train__frozen": ["backbone.*", "embeding.weight"]},
            r"train\.frozen\.1: expected a pattern of parameters, such as backbone\.embedding\.weight, .* got 'embed",
        ),
        ("sft", {"train__frozen": ["*"]}, r"train\.frozen: expected a parameter to train, got none besides \d+ frozen"),
        ("head", {"train__frozen": ["heads.*"]}, r"train\.frozen: expected a parameter to train"),
        ("sft", {"train__frozen": ["*"], "lora__rank": 2}, r"train\.frozen: expected none with lora\.rank, got '\*'"),
        (
            "sft",
            {"optimiser__head_weight_decay": 0.1},
            r"optimiser\.head_weight_decay: expected null in stage sft, got",
        ),
        ("head", {"objective__dpo_mean": True}, r"objective\.dpo_mean: expected false in stage head, got true"),
        (
            "align",
            {"objective__dpo_mean": True, "objective__dpo_weight": 0.0},
            r"objective\.dpo_mean: expected false with objective\.dpo_weight 0, got true",
        ),
        ("align", {"data__loss": "all"}, r"data\.loss: expected answers in stage align, got all"),
        (
            "pretrain",
            {"data__repeat_system": False},
            r"data\.repeat_system: expected true in stage pretrain, got false",
        ),
    ],
)
def test_what_a_stage_would_not_use_is_refused(stage, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make_stage(settings(stage, tmp_path, **changes), tiny(), small_tokenizer(), records(stage), [])


# Mean log-probabilities


def in_two_forms(pairs):
    """Pairs, and the same through the form of any labels."""
    return {"pairs": pairs, "labels": [Labelled([p.rejected, p.chosen], (Label(1, 0),)) for p in pairs]}


@pytest.mark.parametrize("form", ["pairs", "labels"])
@pytest.mark.parametrize("changes", [{}, {"batch__micro": 2}, {"objective__reference": "cache"}])
def test_cdpo_on_means_equals_plain_pytorch(form, changes, tmp_path):
    """Loss and gradients, packed, one answer being empty: its mean is that of its end of turn."""
    pairs = records("align", 4)
    pairs[1].rejected[-1]["content"] = ""
    changes = {"objective__dpo_mean": True, "objective__dph_weight": 0.0, "batch__size": 4} | changes
    recipe, model, reference = settings("align", tmp_path, **changes), tiny(), tiny(seed=1).eval()
    stage = make_stage(recipe, model, small_tokenizer(), in_two_forms(pairs)[form], {})
    stage.reference = reference
    batch, total = stage.next_batch(), 0.0
    for micro_batch in batch.micro_batches:
        loss = stage.loss(stage.prepare(micro_batch, 1))
        (loss.total / batch.weight).backward()
        total += float(loss.total.detach()) / batch.weight

    plain, encode = tiny(), Encoder(small_tokenizer())
    losses = []
    for pair in pairs:
        implicit = []
        for answer in encode(pair):
            tokens = torch.tensor([answer.tokens])
            targets = torch.tensor([answer.targets]).masked_fill(~torch.tensor([answer.loss_mask]), -100)
            means = [sequence_logprobs(net(tokens).logits, targets, "mean") for net in (plain, reference)]
            implicit.append(means[0] - means[1].detach())
        d = 0.6 * (implicit[0] - implicit[1])
        losses.append(-0.75 * torch.nn.functional.logsigmoid(d) - 0.25 * torch.nn.functional.logsigmoid(-d))
    expected = torch.cat(losses).mean()
    expected.backward()
    assert total == pytest.approx(expected.item(), abs=1e-6)
    for name, p in plain.named_parameters():
        if not name.startswith("heads."):
            torch.testing.assert_close(model.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_mean_over_no_token_is_refused(tmp_path):
    answers = [
        chat.encode(side, small_tokenizer())
        for side in (records("align", 1)[0].chosen, [*records("sft", 1)[0].messages])
    ]
    answers[1].loss_mask[:] = [False] * len(answers[1])
    recipe = settings("align", tmp_path, objective__dpo_mean=True, batch__size=1)
    stage = make_stage(recipe, tiny(), small_tokenizer(), [tuple(answers)], {})
    with pytest.raises(UserError, match="pairs: expected answers with tokens to take the mean of, got none: which beg"):
        stage.next_batch()


# Conversations: loss on all tokens, one system message for several


def turns(*contents, **last):
    """A conversation of system, user, assistant, user, assistant, ... messages."""
    roles = itertools.chain(["system"], itertools.cycle(["user", "assistant"]))
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    messages[-1] |= last
    return messages


def test_the_loss_on_all_tokens_is_that_of_every_token_but_the_first(tmp_path):
    tokenizer, conversation = small_tokenizer(), Conversation(turns("be brief", "hello", "world", "and", "late"))
    usual, encoded = Encoder(tokenizer)(conversation), Encoder(tokenizer, "all")(conversation)
    assert encoded.loss_mask == [True] * (len(encoded) - 1) + [False]
    assert sum(usual.loss_mask) < len(usual) - 1
    for name in ("tokens", "targets", "score_mask", "reward_position"):
        assert getattr(encoded, name) == getattr(usual, name)
    recipe = settings("sft", tmp_path, data__loss="all", batch__size=1, data__context=len(encoded))
    stage = make_stage(recipe, tiny(), tokenizer, [conversation], [conversation])
    batch = stage.next_batch()
    assert batch.targets == len(encoded) - 1
    ids = torch.tensor([encoded.tokens])
    expected = -sequence_logprobs(stage.model(ids[:, :-1]).logits, ids[:, 1:], "mean").item()
    loss = stage.loss(stage.prepare(batch.micro_batches[0], 1))
    assert loss.total.item() / batch.weight == pytest.approx(expected, rel=1e-5)
    assert stage.held_out.evaluate()["loss"] == pytest.approx(expected, rel=1e-5)


def test_an_answer_of_weight_0_stays_out_of_the_loss_on_all_tokens():
    tokenizer = small_tokenizer()
    messages = turns("be brief", "hello", "world", "and", "late")
    messages[2]["train"] = False
    encoded, alone = Encoder(tokenizer, "all")(Conversation(messages)), chat.encode(messages[:3], tokenizer)
    assert [i for i, counted in enumerate(encoded.loss_mask[:-1]) if not counted] == [
        i for i, counted in enumerate(chat.encode(turns("be brief", "hello", "world"), tokenizer).loss_mask) if counted
    ]
    assert not any(alone.loss_mask)


def test_encoded_records_have_a_loss_mask_of_their_own(tmp_path):
    encoded = chat.encode(turns("be brief", "hello", "world"), small_tokenizer())
    assert Encoder(small_tokenizer())(encoded) is encoded
    with pytest.raises(UserError, match=r"data\.loss: expected answers with records that are encoded already, got all"):
        make_stage(settings("sft", tmp_path, data__loss="all"), tiny(), small_tokenizer(), [encoded], {})
    with pytest.raises(UserError, match=r"data\.repeat_system: expected conversations to join, got Encoded"):
        Encoder(small_tokenizer()).joined([encoded])


def sources(folder, *sizes):
    """Files of conversations, whose system message is the file's name."""
    paths = []
    for number, size in enumerate(sizes):
        rows = [{"messages": turns(f"system {number}", f"hello {i}", f"world {number} {i}")} for i in range(size)]
        paths.append(str(write_lines(folder / f"{number}.jsonl", *rows)))
    return paths


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize(("loss", "workers"), [("answers", 0), ("all", 0), ("all", 1)])
def test_consecutive_conversations_of_a_stream_have_one_system_message(repeated, loss, workers, tmp_path):
    """As the paper's code encodes several conversations, and from a state on as before."""
    paths, tokenizer = sources(tmp_path, 5, 7), small_tokenizer()
    recipe = settings(
        "sft", tmp_path / "run", data__sources=paths, data__consecutive=3, batch__size=1,
        data__repeat_system=repeated, data__loss=loss, data__workers=workers,
    )  # fmt: skip
    stages = [make_stage(recipe, tiny(), tokenizer, None, {}) for _ in range(2)]
    streams, again = (stage.batches for stage in stages)
    sampler, _ = dataset.open_training(
        recipe.data.sources, "conversation", directory=None, seed=recipe.seed, consecutive=3
    )
    order = list(itertools.islice(sampler, 30))
    tokens, counted = [], []
    for start in range(0, 30, 3):
        run = [record.messages for record in order[start : start + 3]]
        if repeated:
            encoded = [Encoder(tokenizer, loss)(record) for record in order[start : start + 3]]
        else:
            encoded = [chat.encode_many(run, tokenizer, repeat_system=False)]
        for each in encoded:
            tokens += each.tokens
            counted += each.loss_mask if loss == "answers" else [True] * (len(each) - 1) + [False]
    for number in range(6):
        if number == 3:
            again.load_state_dict(streams.state_dict())
            streams = again
        got, targets = (rows[0].tolist() for rows in next(streams))
        part = slice(24 * number, 24 * number + 24)
        assert got == tokens[part]
        assert [target != -100 for target in targets] == counted[part]
    for stage in stages:
        stage.close()


# Weights by size


def test_weights_by_size_are_the_numbers_of_records(tmp_path):
    """The same records in the same order as with these numbers, without those kept for evaluation."""
    paths = sources(tmp_path, 3, 30)
    orders = []
    for weight in (["size", "size"], [3, 30]):
        listed = [{"source": path, "weight": each} for path, each in zip(paths, weight, strict=True)]
        recipe = settings("sft", tmp_path / "run", data__sources=listed)
        sampler, _ = dataset.open_training(recipe.data.sources, "conversation", directory=None, seed=5, consecutive=1)
        orders.append([sampler.next_index() for _ in range(300)])
    assert orders[0] == orders[1]
    assert 0 < sum(number == 0 for number, *_ in orders[0]) < 60
    rows = [{"prompt": f"hello {i}", "chosen": "world", "rejected": "late"} for i in range(40)]
    path = write_lines(tmp_path / "pairs.jsonl", *rows)
    recipe = settings("head", tmp_path / "run", data__sources=[{"source": str(path), "weight": "size"}])
    sampler, kept = dataset.open_training(
        recipe.data.sources, "preference", directory=None, seed=5, consecutive=1, share=0.5
    )
    assert sampler.weights == [40 - len(kept)]
    assert all(isinstance(pair, Preference) for pair in kept)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            ["size", 2],
            r"data\.sources\.1\.weight: expected size for all sources or for none, got 2, and size for data\.s",
        ),
        ([1.5, "size"], r"data\.sources\.0\.weight: .* got 1\.5, and size for data\.sources\.1"),
        (["large", 1], r"data\.sources\.0\.weight: expected a number or size, got 'large'"),
        ([None, 1], r"data\.sources\.0\.weight: expected a number or size, got None"),
    ],
)
def test_weights_by_size_are_for_all_sources(weights, message):
    listed = [{"source": "x.jsonl", "weight": weight} for weight in weights]
    with pytest.raises(UserError, match=message):
        recipes.from_dict({"stage": "sft", "data": {"sources": listed}})
