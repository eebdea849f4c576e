"""The model: its definition, streams, judging, and scoring text."""

import threading

import pytest
import torch
from helpers.texts import conversation, message, small_tokenizer
from helpers.tiny import END, PAD, VOCAB, naive, naive_logits, padded, tiny_config, tiny_model, tokens

import dph

pytestmark = pytest.mark.usefixtures("every_kernel")

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
        ({"tie_word_embeddings": None}, "tie_word_embeddings: expected true or false, got None"),
        ({"qkv_bias": "no"}, "qkv_bias: expected true or false, got 'no'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads = 2, got 3"),
        ({"head_dim": 7}, "head_dim: expected an even number, got 7"),
        ({"norm": "batch"}, "norm: expected one of layer, rms, got 'batch'"),
        ({"embedding_projection": False}, "embedding_size: expected hidden_size = 16 without embedding_projection"),
        ({"rotary_scaling": {"rope_type": "dynamic"}}, "rotary_scaling: expected rope_type linear, llama3, yarn"),
        ({"rotary_scaling": {"rope_type": "yarn", "factor": 2}}, "expected original_max_position_embeddings of yarn"),
        ({"rotary_scaling": {"rope_type": "linear", "factor": 0}}, "rotary_scaling.factor: expected a finite number a"),
        ({"rotary_scaling": {"rope_type": "linear", "beta": 1}}, "rotary_scaling.beta: expected one of factor"),
        ({"reward_heads": "default"}, "reward_heads: expected a sequence of names, got 'default'"),
        ({"task_heads": None}, "task_heads: expected a sequence of names, got None"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected at least 1, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: expected at least 0, got -1"),
        ({"rope_base": 0.0}, "rope_base: expected a number above 0, got 0"),
        ({"reward_dropout": 1.0}, r"reward_dropout: expected a probability in \[0, 1\), got 1"),
    ],
)
def test_configurations_that_cannot_be(change, text):
    with pytest.raises(ValueError, match=text):
        tiny_config(**change)


# Streams


def test_streams_have_two_dimensions():
    with pytest.raises(ValueError, match=r"tokens: expected shape \[B, S\], got \[6\]"):
        tiny_model().stream_logprobs(tokens(6), tokens(6))


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
    with pytest.raises(ValueError, match=r"expected the end-of-turn token \(id 3\) as the last.*rows \[0\].*cut off"):
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
    batches, pack = [], dph.pack
    monkeypatch.setattr("dph.model.judging.pack", lambda groups: batches.append(groups) or pack(groups))
    model.score(tok, TALK, max_tokens=1)
    model.score(tok, TALK[:1] * 5, max_tokens=2 * lengths[0])
    sizes = [sum(len(answer) for group in groups for answer in group) for groups in batches]
    assert sizes == [*lengths, 2 * lengths[0], 2 * lengths[0], lengths[0]]
    batches.clear()
    model.score(tok, [TALK[0], *(conversation("hello world", text) for text in ("a", "b")), *TALK[1:]])
    assert [len(group) for groups in batches for group in groups] == [3, 1, 1]  # a prompt is computed once


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


def test_scoring_in_a_thread_leaves_training_alone():
    model, tok = scorer(reward_dropout=0.5)
    expected, packed = model.score(tok, TALK), dph.pack([[dph.chat.encode(talk, tok)] for talk in TALK])
    model.train()
    trained = model.forward_packed(packed, dropout_seed=1).rewards["default"]
    assert not torch.allclose(trained, expected, atol=1e-3)
    modes, scores, done = [], [], threading.Event()
    model.train = lambda mode=True: modes.append(mode)  # ``eval`` calls it, too

    def score():
        while not done.is_set():
            scores.append(model.score(tok, TALK))

    thread = threading.Thread(target=score)
    thread.start()
    try:
        steps = 0
        while steps < 20 or (len(scores) < 20 and thread.is_alive()):
            steps += 1
            torch.testing.assert_close(model.forward_packed(packed, dropout_seed=1).rewards["default"], trained)
            assert all(module.training for module in model.modules())
    finally:
        done.set()
        thread.join()
    assert len(scores) >= 20
    for got in scores:
        torch.testing.assert_close(got, expected)
    assert all(module.training for module in model.modules())
    assert not modes


def test_nothing_to_score():
    model, tok = scorer()
    assert model.score(tok, []).shape == (0,)


def test_a_conversation_without_an_answer_cannot_be_scored():
    model, tok = scorer()
    with pytest.raises(ValueError, match="expected an assistant message"):
        model.score(tok, [TALK[0], [message("user", "hello")]])
    with pytest.raises(ValueError, match=r"conversations\[1\]: expected the assistant's answer at the end, got a user"):
        model.score(tok, [TALK[0], [*TALK[1], message("user", "hello")]])


@pytest.mark.parametrize("way", ["hook", "another module"])
def test_a_product_that_somebody_watches_or_replaces_is_called(way):
    """Of the feed-forward network, whose gate else adds its bias."""
    model, seen = tiny_model(), []
    ids = tokens(2, 9)
    expected = model(ids).logits
    ffn = model.backbone.blocks[0].ffn
    if way == "another module":
        ffn.fc1 = torch.nn.Sequential(ffn.fc1)
    ffn.fc1.register_forward_hook(lambda module, given, result: seen.append(result))
    torch.testing.assert_close(model(ids).logits, expected)
    assert len(seen) == 1


def test_hooks_on_norms_are_called():
    model, seen = tiny_model(), []
    model.backbone.blocks[0].ffn_norm.register_forward_hook(lambda *_: seen.append(1))
    model(tokens(2, 9))
    assert seen == [1]


def test_norms_of_another_class():
    """A fused residual is for ours alone; a plain LayerNorm with the same weights gives the same numbers."""
    model, ids = tiny_model(), tokens(2, 9)
    expected = model(ids).logits
    for block in model.backbone.blocks:
        for name in ("attention_norm", "ffn_norm"):
            own = getattr(block, name)
            plain = torch.nn.LayerNorm(len(own.weight), own.eps)
            plain.load_state_dict(own.state_dict())
            setattr(block, name, plain)
    torch.testing.assert_close(model(ids).logits, expected)
    model.backbone.blocks[0].ffn_norm = torch.nn.Identity()
    assert not torch.allclose(model(ids).logits, expected)
