"""The model: its definition, losses, generation, judging, and what transformers and others ask of it."""

import logging

import pytest
import torch
import torch.nn.functional as F
from texts import conversation, message, small_tokenizer
from tiny import END, PAD, VOCAB, naive, naive_logits, tiny_config, tiny_model, tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import dph


def padded(*rows):
    """Rows of ids as [B, S] with their mask; a row is (padding on the left, ids, padding on the right)."""
    ids = torch.tensor([[PAD] * left + list(row) + [PAD] * right for left, row, right in rows])
    mask = torch.tensor([[0] * left + [1] * len(row) + [0] * right for left, row, right in rows])
    return ids, mask


# Definition


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("length", [1, 2, 33])
def test_logits_and_rewards_are_those_of_the_definition(reverse, length):
    model, ids = tiny_model(rope_reversed=reverse, reward_pooler="identity"), tokens(2, length)
    logits = model(ids).logits
    rewards = model.rewards(ids, reward_positions=torch.tensor([length - 1, 0]))["default"]
    vector = model.heads["shared"].reward["default"].weight[0].double()
    for b, at in enumerate((length - 1, 0)):
        hidden, _ = naive(model, ids[b])
        torch.testing.assert_close(logits[b].double(), naive_logits(model, hidden), rtol=0, atol=5e-5)
        assert rewards[b].item() == pytest.approx((hidden[at] @ vector).item(), abs=5e-5)


@pytest.mark.parametrize("pooler", ["identity", "bert", "t5", "swiglu_bert", "swiglu_t5"])
def test_parameters_of_the_551m_model(pooler):
    """The paper's 551M. Its backbone is all but the heads: blocks, norms, both projections and the tied embedding."""
    with torch.device("meta"):
        model = dph.Model(dph.ModelConfig(reward_pooler=pooler))
    heads = sum(p.numel() for p in model.heads.parameters())
    assert sum(p.numel() for p in model.parameters()) - heads == 550_978_560
    kind = {"t5": "bert", "swiglu_t5": "swiglu_bert"}.get(pooler, pooler)
    assert heads == {"identity": 1_536, "bert": 2_362_368, "swiglu_bert": 18_885_632}[kind]


def test_names_by_which_the_optimiser_knows_norms_biases_and_embedding():
    names = {name for name, _ in tiny_model().named_parameters()}
    assert {n for n in names if "embedding" in n} == {"backbone.embedding.weight"}
    assert {n for n in names if "norm" in n} == {
        f"backbone.{place}.{kind}" for kind in ("weight", "bias")
        for place in ("input_norm", "output_norm",
                      *(f"blocks.{i}.{which}_norm" for i in range(2) for which in ("attention", "ffn")))
    }  # fmt: skip


def test_fresh_weights():
    torch.manual_seed(1)
    model = dph.Model(tiny_config(hidden_size=64, embedding_size=64, initializer_range=0.02))
    for name, parameter in model.named_parameters():
        if "norm.weight" in name:
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
    assert not model.untrained_heads


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden_size": 18}, r"hidden_size: expected a multiple of 2 \* num_attention_heads = 4, got 18"),
        ({"reward_pooler": "mean"}, "reward_pooler: expected one of identity, bert, t5, swiglu_bert, swiglu_t5, got"),
        ({"reward_heads": ("a", "a")}, "reward_heads, task_heads: expected different names without dots"),
        ({"reward_heads": ("a",), "task_heads": ("a",)}, "expected different names"),
        ({"reward_heads": ("a.b",)}, "without dots"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: expected True"),
    ],
)
def test_configurations_that_cannot_be(change, text):
    with pytest.raises(ValueError, match=text):
        tiny_config(**change)


# Dense batches


def test_padding_on_either_side_changes_nothing():
    model = tiny_model()
    rows = [tokens(n, seed=n).tolist() for n in (9, 4, 1)]
    ids, mask = padded((0, rows[0], 0), (5, rows[1], 0), (3, rows[2], 5))
    logits = model(ids, attention_mask=mask).logits
    for b, row in enumerate(rows):
        own = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(logits[b][mask[b].bool()], own, rtol=0, atol=1e-5)
    assert (logits[mask == 0] == 0).all()


def test_a_mask_of_ones_and_one_of_booleans():
    model, ids = tiny_model(), tokens(2, 6)
    expected = model(ids).logits
    for mask in (torch.ones(2, 6), torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 11, dtype=torch.int64)):
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (1, 1)])
def test_empty_batches_and_single_tokens(shape):
    model, ids = tiny_model(), tokens(*shape)
    assert model(ids).logits.shape == (*shape, VOCAB)
    assert model(ids, attention_mask=torch.ones(shape, dtype=torch.int64)).logits.shape == (*shape, VOCAB)
    assert model(ids, attention_mask=torch.zeros(shape, dtype=torch.int64)).logits.shape == (*shape, VOCAB)
    assert model(ids, labels=ids).loss.isnan()  # nothing to predict: torch's cross-entropy says so as well


@pytest.mark.parametrize("divisor", [None, 7, torch.tensor(7)])
def test_loss_is_the_cross_entropy_of_the_shifted_labels(divisor):
    model, ids = tiny_model(), tokens(3, 12)
    labels = ids.clone()
    labels[0, :5], labels[2] = -100, -100
    logits, targets = model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = F.cross_entropy(logits, targets)
    if divisor is not None:
        expected = F.cross_entropy(logits, targets, reduction="sum") / 7
    out = model(ids, labels=labels, num_items_in_batch=divisor)
    torch.testing.assert_close(out.loss, expected)
    names = [n for n, _ in model.named_parameters() if not n.startswith("heads.")]
    parameters = [model.get_parameter(n) for n in names]
    grads = torch.autograd.grad(out.loss, parameters), torch.autograd.grad(expected, parameters)
    for name, got, want in zip(names, *grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_loss_of_a_padded_batch_is_that_of_its_rows():
    model = tiny_model()
    rows = [tokens(n, seed=n).tolist() for n in (9, 4)]
    ids, mask = padded((0, rows[0], 0), (2, rows[1], 3))
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 2] = -100  # predicted from padding
    loss = model(ids, attention_mask=mask, labels=labels).loss
    sums = [
        F.cross_entropy(model(torch.tensor([r])).logits[0, :-1], torch.tensor(r[1:]), reduction="sum") for r in rows
    ]
    torch.testing.assert_close(loss, sum(sums) / 11)


def test_logits_to_keep():
    model, ids = tiny_model(), tokens(2, 9)
    whole = model(ids, labels=ids)
    for keep, columns in ((0, slice(None)), (1, slice(-1, None)), (4, slice(-4, None)), (torch.tensor([2, 7]), [2, 7])):
        out = model(ids, labels=ids, logits_to_keep=keep)
        torch.testing.assert_close(out.logits, whole.logits[:, columns])
        assert torch.equal(out.loss, whole.loss)


def test_forms_of_the_output():
    model, ids = tiny_model(), tokens(1, 4)
    assert model(ids).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, dph.Memory)
    memory = dph.Memory(8)
    out = model(ids, past_key_values=memory, return_dict=False)
    assert out[1] is memory
    (logits,) = model(ids, return_dict=False)
    torch.testing.assert_close(logits, out[0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"input_ids": tokens(4)}, r"input_ids: expected shape \[B, S\], got \[4\]"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask: expected shape \[2, 4\] or wider, got \[2, 3\]"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask: expected shape \[2, 4\]"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"attention_mask: expected shape \[2, 4\]"),
        ({"labels": tokens(2, 5)}, r"labels: expected shape \[2, 4\], got \[2, 5\]"),
    ],
)
def test_shapes_that_do_not_fit(arguments, text):
    with pytest.raises(ValueError, match=text):
        tiny_model()(**({"input_ids": tokens(2, 4)} | arguments))


def test_stream_logprobs():
    model, ids, memory = tiny_model(), tokens(2, 12), dph.Memory(20)
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    targets[0, 3] = -100
    expected = model(ids).logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    parts = [model.stream_logprobs(i, t, memory) for i, t in zip(ids.split(6, 1), targets.split(6, 1), strict=True)]
    wanted = [expected[:, c][targets[:, c] != -100] for c in (slice(0, 6), slice(6, 12))]
    torch.testing.assert_close(torch.cat(parts), torch.cat(wanted), rtol=0, atol=2e-5)
    torch.testing.assert_close(model.stream_logprobs(ids, targets), expected[targets != -100], rtol=0, atol=2e-5)


def test_stream_statistics():
    model, ids = tiny_model(), tokens(2, 12)
    logits = model(ids).logits
    targets = logits.argmax(-1).masked_fill(torch.rand(2, 12) < 0.5, 3)
    targets[0, 3] = -100
    wanted = targets != -100
    logprobs, entropy, right = model.stream_logprobs(ids, targets, statistics=True)
    assert torch.equal(logprobs, model.stream_logprobs(ids, targets))
    expected = torch.distributions.Categorical(logits=logits[wanted]).entropy()
    torch.testing.assert_close(entropy, expected, rtol=0, atol=2e-5)
    assert torch.equal(right, logits.argmax(-1)[wanted] == targets[wanted])
    assert right.any()
    assert not right.all()
    assert not entropy.requires_grad


# Generation


def greedy_by_hand(model, ids, mask, new, step):
    """Recompute everything for every token. ``step`` takes the last logits [B, V] to tokens [B]."""
    for _ in range(new):
        with torch.no_grad():
            following = step(model(ids, attention_mask=mask).logits[:, -1])
        ids, mask = torch.cat([ids, following[:, None]], 1), torch.cat([mask, mask[:, :1] * 0 + 1], 1)
    return ids


PROMPTS = [((0, tokens(6, seed=1).tolist(), 0),), ((0, tokens(6, seed=1).tolist(), 0), (4, [9, 8], 0))]
NEVER = {"eos_token_id": VOCAB - 1, "pad_token_id": PAD, "suppress_tokens": [VOCAB - 1]}


@pytest.mark.parametrize("rows", PROMPTS, ids=["one", "left-padded"])
@pytest.mark.parametrize("memory", [None, 64], ids=["plain", "memory"])
def test_greedy(rows, memory):
    model = tiny_model()
    ids, mask = padded(*rows)
    cache = memory and dph.Memory(memory)
    got = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, past_key_values=cache, eos_token_id=None
    )
    assert torch.equal(got, greedy_by_hand(model, ids, mask, 12, lambda logits: logits.argmax(-1)))
    if memory:
        assert cache.get_seq_length() == ids.shape[1] + 11


@pytest.mark.parametrize("rows", PROMPTS, ids=["one", "left-padded"])
@pytest.mark.parametrize("copies", [1, 3])
def test_sampling(rows, copies):
    model = tiny_model()
    ids, mask = padded(*rows)
    torch.manual_seed(7)
    got = model.generate(
        ids, attention_mask=mask, max_new_tokens=10, do_sample=True, top_k=0, num_return_sequences=copies,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(7)
    want = greedy_by_hand(
        model, ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0), 10,
        lambda logits: torch.multinomial(logits.softmax(-1), 1).flatten(),
    )  # fmt: skip
    assert torch.equal(got, want)
    assert len({tuple(row) for row in got.tolist()}) == len(got)


@pytest.mark.parametrize("rows", PROMPTS, ids=["one", "left-padded"])
@pytest.mark.parametrize("memory", [None, 64], ids=["plain", "memory"])
@pytest.mark.parametrize("copies", [1, 2])
def test_beams_find_what_they_find_without_cache(rows, memory, copies):
    model = tiny_model()
    ids, mask = padded(*rows)
    settings = {
        "attention_mask": mask, "max_new_tokens": 8, "num_beams": 4, "num_return_sequences": copies,
        "do_sample": False, "return_dict_in_generate": True, "output_scores": True, **NEVER,
    }  # fmt: skip
    cached = model.generate(ids, past_key_values=memory and dph.Memory(memory), **settings)
    recomputed = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(cached.sequences, recomputed.sequences)
    torch.testing.assert_close(cached.sequences_scores, recomputed.sequences_scores)


def test_a_finished_row_is_padded():
    model, ids = tiny_model(), tokens(3, 4)
    free = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
    stop = free[0, 6].item()
    got = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=stop, pad_token_id=PAD)
    for row, unbounded in zip(got.tolist(), free.tolist(), strict=True):
        at = next((i for i in range(4, 14) if unbounded[i] == stop), 13)
        assert row[: at + 1] == unbounded[: at + 1]
        assert set(row[at + 1 :]) <= {PAD}


def test_generation_continues_a_memory():
    """Either with the whole sequence, or with the new tokens and a mask over all."""
    model, ids = tiny_model(), tokens(2, 14)
    want = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for given in ("all", "new"):
        memory = dph.Memory(64)
        model(ids[:, :9], past_key_values=memory)
        arguments = {"attention_mask": torch.ones(2, 14, dtype=torch.int64)}
        got = model.generate(
            ids if given == "all" else ids[:, 9:], past_key_values=memory, max_new_tokens=6, do_sample=False,
            eos_token_id=None, **arguments,
        )  # fmt: skip
        assert torch.equal(got[:, -6:], want[:, -6:])
    for known in (14, 20):
        memory = dph.Memory(64)
        model(tokens(2, known), past_key_values=memory)
        with pytest.raises(ValueError, match=f"input_ids: expected the {known} tokens that the memory has seen and at"):
            model.generate(ids, past_key_values=memory, max_new_tokens=2)


def test_a_memory_branches_into_beams_and_samples():
    model, ids = tiny_model(), tokens(2, 14)
    for settings in ({"num_beams": 3, "do_sample": False, **NEVER},
                     {"num_return_sequences": 3, "do_sample": True, "top_k": 0, "eos_token_id": None}):  # fmt: skip
        memory = dph.Memory(64)
        model(ids[:, :9], past_key_values=memory)
        torch.manual_seed(3)
        got = model.generate(ids, past_key_values=memory, max_new_tokens=6, **settings)
        torch.manual_seed(3)
        assert torch.equal(got, model.generate(ids, max_new_tokens=6, **settings))
        assert memory.batch_size == 6


def test_a_sliding_memory_generates_by_the_definition():
    model, ids, length = tiny_model(), tokens(1, 10), 5
    got = model.generate(ids, past_key_values=dph.Memory(length), max_new_tokens=12, do_sample=False, eos_token_id=None)
    hidden, memory = naive(model, ids[0], None, length)
    want = ids[0].tolist()
    for _ in range(12):
        want.append(naive_logits(model, hidden)[-1].argmax().item())
        hidden, memory = naive(model, torch.tensor(want[-1:]), memory, length)
    assert got[0].tolist() == want


def test_generate_with_the_hidden_kind():
    model, ids = tiny_model(), tokens(2, 7)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    got = model.generate(ids, past_key_values=dph.Memory(32, "hidden"), **settings)
    assert torch.equal(got, model.generate(ids, **settings))


# Judging


def test_rewards_of_the_last_token_that_is_not_padding():
    model = tiny_model()
    rows = [[*tokens(n, seed=n).tolist(), END] for n in (8, 3)]
    ids, mask = padded((0, rows[0], 0), (4, rows[1], 1))
    rewards = model.rewards(ids, attention_mask=mask)["default"]
    for b, row in enumerate(rows):
        assert rewards[b].item() == pytest.approx(model.rewards(torch.tensor([row]))["default"].item(), abs=1e-5)
    given = model.rewards(ids, mask, torch.tensor([8, 7]))["default"]
    torch.testing.assert_close(given, rewards)


def test_an_earlier_turn_is_not_judged_in_the_last_ones_place():
    model = tiny_model()
    ids = torch.tensor([[5, 6, END, 7, 8]])  # an earlier <|im_end|>, and an answer that was cut off
    with pytest.raises(ValueError, match=r"expected <\|im_end\|> \(id 3\) as the last token.*rows \[0\].*cut off"):
        model.rewards(ids)


@pytest.mark.parametrize(
    ("ids", "mask", "positions", "text"),
    [
        ([[5, 6, END, PAD]], None, None, "as the last token that is not"),  # pad = eos and no mask: not to be guessed
        ([[5, END], [END, 5]], None, None, r"rows \[1\]"),
        ([[5, END]], [[1, 0]], None, "as the last token that is not"),
        ([[5, END]], [[0, 0]], None, "as the last token that is not"),
        ([[5, END]], None, [2], r"reward_positions: expected 1 columns in \[0, 2\), got \[2\]"),
        ([[5, END]], None, [-1], r"reward_positions: expected 1 columns in \[0, 2\), got \[-1\]"),
        ([[5, END]], None, [0, 1], r"reward_positions: expected 1 columns in \[0, 2\), got \[0, 1\]"),
        ([[PAD, END]], [[0, 1]], [0], "reward_positions: expected tokens that are not padding"),
    ],
)
def test_the_wrong_token_is_refused(ids, mask, positions, text):
    with pytest.raises(ValueError, match=text):
        tiny_model().rewards(torch.tensor(ids), mask and torch.tensor(mask), positions and torch.tensor(positions))


def test_without_an_end_token_positions_are_needed():
    model, ids = tiny_model(im_end_token_id=None), torch.tensor([[5, END]])
    with pytest.raises(
        ValueError, match=r"reward_positions: expected positions, since config\.im_end_token_id is not set"
    ):
        model.rewards(ids)
    assert model.rewards(ids, reward_positions=torch.tensor([1]))["default"].shape == (1,)


def test_a_model_without_heads_has_nothing_to_judge_with():
    model, ids = tiny_model(reward_heads=()), torch.tensor([[5, END]])
    assert model(ids).logits.shape == (1, 2, VOCAB)
    for judge in (lambda: model.rewards(ids), lambda: model.score(small_tokenizer(), [conversation("a", "b")])):
        with pytest.raises(ValueError, match=r"expected a model with reward heads, got one without"):
            judge()


def test_heads_of_both_sorts():
    """Shared ones have one pooler, task heads one each; names give the rewards' keys in order."""
    model, ids = tiny_model(reward_heads=("a", "b"), task_heads=("c", "d")), torch.tensor([[5, 6, END]])
    rewards = model.rewards(ids)
    assert list(rewards) == model.head_names == ["a", "b", "c", "d"]
    assert len({r.item() for r in rewards.values()}) == 4
    with torch.no_grad():
        model.heads["task_c"].pooler[0].weight.add_(1.0)
    changed = {name: rewards[name].item() != r.item() for name, r in model.rewards(ids).items()}
    assert changed == {"a": False, "b": False, "c": True, "d": False}
    with torch.no_grad():
        model.heads["shared"].pooler[0].weight.add_(1.0)
    assert all(model.rewards(ids)[name].item() != rewards[name].item() for name in ("a", "b"))


def test_rewards_have_gradients_down_to_the_embedding():
    model = tiny_model().train()
    model.rewards(torch.tensor([[5, 6, END]]))["default"].sum().backward()
    assert model.backbone.embedding.weight.grad[5].abs().sum() > 0
    assert model.output_proj.weight.grad is None  # the language-model head has no part in it


# Scoring text


def scorer(**changes):
    tok = small_tokenizer()
    return tiny_model(vocab_size=len(tok), **changes), tok


TALK = [conversation("hello world", "the quick brown fox"), conversation("dogs?", "12 lazy dogs"),
        [message("system", "be brief"), *conversation("a", "b" * 30), *conversation("c", "late")]]  # fmt: skip


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_score_equals_rewards_one_by_one(budget):
    model, tok = scorer(reward_heads=("default", "other"))
    for head in ("default", "other"):
        scores = model.score(tok, TALK * 2, head=head, max_tokens=budget)
        for talk, score in zip(TALK * 2, scores, strict=True):
            encoded = dph.chat.encode(talk, tok)
            ids, at = torch.tensor([encoded.tokens]), torch.tensor([encoded.reward_position])
            assert score.item() == pytest.approx(model.rewards(ids, None, at)[head].item(), abs=1e-5)


def test_score_packs_up_to_its_budget(monkeypatch):
    model, tok = scorer()
    lengths = [len(dph.chat.encode(talk, tok)) for talk in TALK]
    sizes, forward = [], model.forward_packed
    monkeypatch.setattr(model, "forward_packed", lambda batch: sizes.append(len(batch.tokens)) or forward(batch))
    model.score(tok, TALK, max_tokens=1)
    model.score(tok, TALK[:1] * 5, max_tokens=2 * lengths[0])
    assert sizes == [*lengths, 2 * lengths[0], 2 * lengths[0], lengths[0]]


def test_score_leaves_the_mode_and_no_graph():
    model, tok = scorer(reward_dropout=0.5)
    model.train()
    scores = model.score(tok, TALK)
    assert model.training
    assert not scores.requires_grad
    assert torch.equal(scores, model.score(tok, TALK))  # no dropout
    with pytest.raises(ValueError, match="head: expected one of default, got 'other'"):
        model.score(tok, TALK, head="other")
    assert model.training


def test_nothing_to_score():
    model, tok = scorer()
    assert model.score(tok, []).shape == (0,)


def test_a_conversation_without_an_answer_cannot_be_scored():
    model, tok = scorer()
    with pytest.raises(ValueError, match="expected an assistant message"):
        model.score(tok, [TALK[0], [message("user", "hello")]])


# What others ask


def test_saved_and_loaded_bit_for_bit(tmp_path):
    model, ids = tiny_model(task_heads=("task",)), tokens(2, 9)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is dph.Model
    assert type(AutoConfig.from_pretrained(tmp_path)) is dph.ModelConfig
    assert again.config.to_dict().keys() == model.config.to_dict().keys()
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(again(ids).logits, model(ids).logits)
    position = torch.tensor([3, 8])
    for name, reward in model.rewards(ids, reward_positions=position).items():
        assert torch.equal(again.rewards(ids, reward_positions=position)[name], reward)
    assert not again.untrained_heads


def test_only_safetensors_are_read(tmp_path):
    """A pickle beside the configuration is not opened, whatever it holds."""
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(OSError, match="safetensors"):
        dph.Model.from_pretrained(tmp_path)


def test_loading_with_changes_of_the_configuration(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    again = dph.Model.from_pretrained(tmp_path, rope_reversed=False, dtype=torch.bfloat16)
    assert (again.config.rope_reversed, again.dtype) == (False, torch.bfloat16)
    again, info = dph.Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_checkpoint_without_its_head_says_so_and_does_not_judge(tmp_path, caplog):
    tiny_model(reward_heads=()).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "dph.model"):
        model = dph.Model.from_pretrained(tmp_path, reward_heads=("default",), task_heads=("task",)).eval()
    assert "no weights for reward heads default, task: they start untrained" in caplog.text
    ids = torch.tensor([[5, END]])
    tok = small_tokenizer()
    for judge in (
        lambda: model.rewards(ids),
        lambda: model.score(tok, [conversation("a", "b")]),
        lambda: dph.best_of_n(model, tok, [message("user", "a")], n=2),
    ):
        with pytest.raises(ValueError, match=r"head 'default': the checkpoint holds no weights for it"):
            judge()
    assert model.train().rewards(ids)["default"].shape == (1,)  # it may be trained


def test_only_the_head_that_is_missing_is_untrained(tmp_path):
    tiny_model(reward_heads=("old",)).save_pretrained(tmp_path)
    model = dph.Model.from_pretrained(tmp_path, reward_heads=("old", "new"), task_heads=("task",)).eval()
    assert model.untrained_heads == {"new", "task"}
    model.check_heads("old")
    with pytest.raises(ValueError, match="head 'new'"):
        model.check_heads("new")


@pytest.mark.parametrize("size", [50, 61, 80])
def test_resizing_embeddings_resizes_the_tied_head(size, tmp_path):
    model, ids = tiny_model(), tokens(2, 5) % 40
    before = model(ids).logits.detach()  # a graph that is still alive remembers the old shape
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == size
    logits = model(ids).logits
    assert logits.shape == (2, 5, size)
    shared = min(size, VOCAB)
    torch.testing.assert_close(logits[..., :shared], before[..., :shared])
    model(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.shape == (size, 12)
    model.save_pretrained(tmp_path)
    assert torch.equal(dph.Model.from_pretrained(tmp_path).eval()(ids).logits, logits)


def test_a_new_embedding_is_the_new_head():
    model, ids = tiny_model(), tokens(1, 5)
    model.set_input_embeddings(torch.nn.Embedding(VOCAB, 12))
    expected, _ = naive(model, ids[0])
    torch.testing.assert_close(model(ids).logits[0].double(), naive_logits(model, expected), rtol=0, atol=5e-5)
    model.tie_weights()
    torch.testing.assert_close(model(ids).logits[0].double(), naive_logits(model, expected), rtol=0, atol=5e-5)


def test_calls_as_lm_evaluation_harness_makes_them():
    """HFLM: no mask, ``.device``, ``.config``, ``.tie_weights()``, and generation from a left-padded batch."""
    model = tiny_model()
    model.eval()
    model.tie_weights()
    assert model.device.type == "cpu"
    assert (model.config.model_type, model.config.vocab_size) == ("dph", VOCAB)
    ids = tokens(3, 8)
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.shape == (3, 8, VOCAB)
        assert torch.equal(logits, model(input_ids=ids).logits)
    ids, mask = padded((0, ids[0].tolist(), 0), (5, [7, 8, 9], 0))
    out = model.generate(input_ids=ids, attention_mask=mask, max_length=12, use_cache=True, do_sample=False,
                         pad_token_id=PAD)  # fmt: skip
    assert out.shape[1] <= 12


def test_task_heads_leave_the_backbone_as_it_was(tmp_path):
    """A frozen backbone with another head: the language model's numbers are bit for bit those of before."""
    model, ids = tiny_model(), tokens(1, 7)
    model.save_pretrained(tmp_path)
    again = dph.Model.from_pretrained(tmp_path, task_heads=("glue",)).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_auto_sequence_classification_answers_with_the_rewards(tmp_path):
    model = tiny_model(reward_heads=("a", "b")).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = tokens(3, 7)
    ids[:, -1] = model.config.im_end_token_id
    rewards = model.rewards(ids)
    assert torch.equal(loaded(ids).logits, torch.stack([rewards["a"], rewards["b"]], 1))
    with pytest.raises(ValueError, match=r"expected <\|im_end\|>"):
        loaded(tokens(1, 4))


def test_a_head_that_was_never_trained_is_not_saved_as_if_it_had_been(tmp_path):
    model = tiny_model(reward_heads=("a", "b"), task_heads=("c",))
    model.untrained_heads = {"b", "c"}
    model.save_pretrained(tmp_path)
    loaded = dph.Model.from_pretrained(tmp_path).eval()
    assert loaded.untrained_heads == {"b", "c"}
    assert torch.equal(loaded.heads["shared"].reward["a"].weight, model.heads["shared"].reward["a"].weight)
    with pytest.raises(ValueError, match="no weights"):
        loaded.check_heads("b")


# What other libraries pass


def test_arguments_that_change_nothing_and_those_that_cannot_be():
    model, ids = tiny_model(), tokens(2, 5)
    harmless = {"cache_position": torch.arange(5), "token_type_ids": torch.zeros_like(ids)}
    harmless |= {"output_attentions": False, "output_hidden_states": None}
    assert torch.equal(model(ids, **harmless).logits, model(ids).logits)
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=f"{name}.*: expected False, got True: not supported"):
            model(ids, **{name: True})
    with pytest.raises(TypeError, match="inputs_embeds"):
        model(ids, inputs_embeds=None)


def test_micro_batches_as_transformers_trainer_counts_them():
    """Rows of 2 and 7 labels, accumulated: the gradient is that of their common mean."""
    model, together, ids = tiny_model(), tiny_model(), tokens(2, 8)
    assert model.accepts_loss_kwargs is True  # where its Trainer looks before it passes num_items_in_batch
    labels = ids.clone()
    labels[0, 3:] = -100
    for row in range(2):
        pick = slice(row, row + 1)
        model(ids[pick], labels=labels[pick], num_items_in_batch=torch.tensor(9)).loss.backward()
    together(ids, labels=labels).loss.backward()
    for (name, p), q in zip(model.named_parameters(), together.parameters(), strict=True):
        if not name.startswith("heads."):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_labels_without_a_target_are_a_mean_over_nothing():
    assert tiny_model()(tokens(1, 4), labels=torch.full((1, 4), -100)).loss.isnan()


def test_reward_positions_may_be_a_list_and_must_be_whole_numbers():
    model, ids = tiny_model(), tokens(2, 5)
    expected = model.rewards(ids, reward_positions=torch.tensor([1, 4]))["default"]
    assert torch.equal(model.rewards(ids, reward_positions=[1, 4])["default"], expected)
    assert torch.equal(model.rewards(ids, reward_positions=torch.tensor([1, 4]).int())["default"], expected)
    for wrong, kind in (([1.0, 4.0], "float32"), (torch.tensor([True, False]), "bool")):
        with pytest.raises(ValueError, match=f"reward_positions: expected int64, got {kind}"):
            model.rewards(ids, reward_positions=wrong)
    for call in (model.rewards, model):
        with pytest.raises(ValueError, match=r"input_ids: expected shape \[B, S\], got \[5\]"):
            call(ids[0])
