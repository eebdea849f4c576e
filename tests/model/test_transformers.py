"""What transformers and other libraries ask of the model: generation, saving and loading, and what they pass."""

import json
import logging

import pytest
import torch
from helpers.texts import conversation, message, small_tokenizer
from helpers.tiny import END, PAD, VOCAB, naive, naive_logits, padded, tiny_config, tiny_model, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import dph
from dph.errors import UserError
from dph.model.auto_classes import RewardModel

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


# What others ask


def test_saved_and_loaded_bit_for_bit(tmp_path):
    model, ids = tiny_model(task_heads=("task",)), tokens(2, 9)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "modeling_dph.py",
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
    with pytest.raises(UserError, match=r"expected weights in model.safetensors .*, got pytorch_model.bin: a pickle"):
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
    with caplog.at_level(logging.WARNING, "dph.model.model"):
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
    with pytest.raises(ValueError, match="expected the end-of-turn token"):
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
    harmless |= {"output_attentions": False, "output_hidden_states": None, "inputs_embeds": None}
    assert torch.equal(model(ids, **harmless).logits, model(ids).logits)
    with pytest.raises(ValueError, match="output_attentions: expected False, got True: no kernel of ours forms them"):
        model(ids, output_attentions=True)


def test_generation_from_embeddings():
    """As for soft prompts: the first step takes embeddings, the others the tokens that were sampled."""
    model, ids = tiny_model().eval(), tokens(2, 5)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 5:]
    given = model.get_input_embeddings()(ids)
    for options in ({}, {"use_cache": False}):
        got = model.generate(inputs_embeds=given, max_new_tokens=6, do_sample=False, eos_token_id=None, **options)
        assert torch.equal(got, expected)


def test_embeddings_that_the_memory_has_seen_already():
    model, ids = tiny_model().eval(), tokens(1, 3)
    memory = dph.Memory(16)
    model(ids, past_key_values=memory)
    text = "inputs_embeds: expected the 3 tokens that the memory has seen and at least one more .*, got 3"
    with pytest.raises(ValueError, match=text):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=memory, max_new_tokens=1)


def test_generation_gives_hidden_states():
    model, ids = tiny_model().eval(), tokens(1, 4)
    out = model.generate(ids, max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True)
    blocks = model.config.num_hidden_layers
    assert [len(step) for step in out.hidden_states] == [blocks + 1] * len(out.hidden_states)
    assert out.hidden_states[0][-1].shape == (1, 4, model.config.hidden_size)


def test_documents_as_transformers_flattens_them():
    """``DataCollatorWithFlattening``: one row, positions that begin anew, and no label across a boundary."""
    from transformers import DataCollatorWithFlattening

    model, rows = tiny_model(), [tokens(1, n, seed=n)[0].tolist() for n in (7, 1, 4)]
    flat = DataCollatorWithFlattening()([{"input_ids": row} for row in rows])
    out = model(**flat)
    start = 0
    for row in rows:
        own = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(out.logits[0, start : start + len(row)], own, rtol=0, atol=1e-5)
        start += len(row)
    apart = [-model(torch.tensor([r]), labels=torch.tensor([r])).loss * (len(r) - 1) for r in rows if len(r) > 1]
    torch.testing.assert_close(out.loss, -sum(apart) / 9)


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


def test_what_transformers_trainer_looks_for():
    """Whose labels are shifted inside, so that it does not count the first; and what evaluation is to leave out."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    model = tiny_model()
    assert LOSS_MAPPING[model.loss_type] is ForCausalLMLoss
    assert [*model.config.keys_to_ignore_at_inference, "loss"] == model.config.keys_to_ignore_at_inference + ["loss"]  # noqa: RUF005


@pytest.mark.parametrize(("ends", "expected"), [(9, [9, 3]), ([9, 8], [9, 8, 3]), (3, [3]), (None, [3])])
def test_tokens_that_end_an_answer(ends, expected):
    model = tiny_model(eos_token_id=ends, im_end_token_id=3)
    assert model.generation_config.eos_token_id == expected
    assert model.generate(tokens(1, 4), max_new_tokens=2).shape[0] == 1


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


# Settings of transformers


@pytest.mark.parametrize(("name", "backend"), [("eager", "reference"), ("sdpa", "sdpa"), ("cpu", "cpu")])
def test_implementations_of_attention_are_backends(name, backend, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model, ids = dph.Model.from_pretrained(tmp_path, attn_implementation=name), tokens(2, 9)
    assert {block.attention.backend for block in model.backbone.blocks} == {backend}
    plain = dph.Model.from_pretrained(tmp_path)
    assert {block.attention.backend for block in plain.backbone.blocks} == {"auto"}
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    plain.set_attn_implementation(name)
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_other_implementations_of_attention_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    message = "attn_implementation: expected one of auto, cpu, .*, got 'flex_attention'"
    with pytest.raises(UserError, match=message):
        dph.Model.from_pretrained(tmp_path, attn_implementation="flex_attention")
    with pytest.raises(UserError, match=message):
        tiny_model().set_attn_implementation("flex_attention")


def test_rows_are_no_longer_than_the_model_was_made_for(tmp_path):
    tiny_model(max_position_embeddings=8).save_pretrained(tmp_path)
    model = dph.Model.from_pretrained(tmp_path)
    assert model.config.max_position_embeddings == 8
    model(tokens(1, 8))
    message = r"input_ids: expected at most 8 tokens \(config\.max_position_embeddings\), got (9|10)"
    for call in (model, lambda ids: model(ids, use_cache=True), lambda ids: model.generate(ids, max_new_tokens=1)):
        with pytest.raises(ValueError, match=message):
            call(tokens(1, 9))
    with pytest.raises(ValueError, match=message):
        model.generate(tokens(1, 5), max_new_tokens=4)
    model(tokens(1, 9), past_key_values=dph.Memory(4))
    model.generate(tokens(1, 9), past_key_values=dph.Memory(4), max_new_tokens=4)


# Forms for other libraries


def test_the_base_model_gives_the_states_that_the_head_multiplies(tmp_path):
    model, ids = tiny_model(), tokens(2, 9)
    base = model.base_model(input_ids=ids, output_hidden_states=True)
    torch.testing.assert_close(base.last_hidden_state @ model.get_output_embeddings().weight.T, model(ids).logits)
    assert len(base.hidden_states) == model.config.num_hidden_layers + 1
    assert {id(p) for p in model.base_model.parameters()} < {id(p) for p in model.parameters()}
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).last_hidden_state, model.base_model(ids).last_hidden_state)


def test_a_language_model_head_that_is_observed_is_called():
    model, ids = tiny_model(), tokens(2, 9)
    expected, called = model(ids, labels=ids).loss, []
    model.lm_head.register_forward_hook(lambda *_: called.append(True))
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)
    assert len(called) == 2  # for the loss and for the logits


def test_heads_trained_by_any_loop_are_saved(tmp_path, caplog):
    """Those that a checkpoint lacked, once their weights have changed; others are left out with a warning."""
    model = tiny_model(reward_heads=())
    model.save_pretrained(tmp_path / "mute")
    model = dph.Model.from_pretrained(tmp_path / "mute", reward_heads=["a", "b"])
    assert model.untrained_heads == {"a", "b"}
    model.bfloat16().float()  # rounding is no training
    model.save_pretrained(tmp_path / "untrained")
    assert "reward heads a, b were not trained" in caplog.text
    with torch.no_grad():
        model.heads["shared"].reward["a"].weight += 0.1
    model.check_heads("a")
    model.save_pretrained(tmp_path / "trained")
    assert dph.Model.from_pretrained(tmp_path / "trained").untrained_heads == {"b"}
    other = dph.Model.from_pretrained(tmp_path / "mute", reward_heads=["a", "b"])
    torch.nn.Sequential(other).load_state_dict(torch.nn.Sequential(model).state_dict())
    assert not other.untrained_heads


def test_a_sequence_classifier():
    """Its labels are the heads; it judges the last end of an answer, behind which the format's newline may stand."""
    model = RewardModel(tiny_config(reward_heads=("a",), task_heads=("b",))).eval()
    assert (model.config.num_labels, model.config.id2label) == (2, {0: "a", 1: "b"})
    ids, mask = padded((0, [9, 8, END], 2), (0, [9, 8, 7, END, 6], 0))
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    alone = [model.rewards(torch.tensor([row])) for row in ([9, 8, END], [9, 8, 7, END])]
    for i, head in enumerate(("a", "b")):
        torch.testing.assert_close(output.logits[:, i], torch.cat([rewards[head] for rewards in alone]))
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    labels = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, labels)
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=labels).loss, expected)
    embeds = model.get_input_embeddings()(ids[:1, :3])
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, output.logits[:1])
    with pytest.raises(ValueError, match="the answer was cut off"):
        model(torch.tensor([[9, END, 6, 5]]))
    with pytest.raises(ValueError, match="expected one document in each row"):
        model(torch.tensor([[9, END, 9, END]]), position_ids=torch.tensor([[0, 1, 0, 1]]))


def test_a_sequence_classifier_of_one_head_is_a_regression():
    model = RewardModel(tiny_config(reward_heads=(), num_labels=1)).eval()
    assert (model.head_names, model.config.num_labels) == (["default"], 1)
    ids = torch.tensor([[9, 8, END]])
    output = model(ids, labels=torch.tensor([2.0]))
    torch.testing.assert_close(output.loss, (output.logits - 2.0).square().mean())
    with pytest.raises(UserError, match="expected a model with reward heads"):
        RewardModel(tiny_config(reward_heads=()))


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
def test_a_model_of_another_kind_is_one_line(kind, tmp_path):
    sizes = {"vocab_size": 64, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, **sizes)
    config.save_pretrained(tmp_path)
    message = f"^{tmp_path}: expected a model of type dph, lsw_transformer, .*, qwen3, got {kind} .dph.attach"
    with pytest.raises(UserError, match=message):
        dph.Model.from_pretrained(tmp_path)


def test_saved_folders_name_our_classes_and_others_are_refused(tmp_path):
    model = tiny_model()
    model.register_for_auto_class("AutoModelForCausalLM")
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["auto_map"]["AutoModelForCausalLM"] == "modeling_dph.Model"
    assert "auto_map" not in model.config.to_dict()
    assert "from dph.model.auto_classes import BaseModel, Model" in (tmp_path / "modeling_dph.py").read_text()
    fields["auto_map"]["AutoModelForCausalLM"] = "evil.Model"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="auto_map: expected no code or kernel to load"):
        dph.Model.from_pretrained(tmp_path)


def test_arguments_of_other_libraries_are_taken():
    model, ids = tiny_model(), tokens(1, 7)
    ignored = {"cache_position": torch.arange(7), "token_type_ids": ids * 0, "max_length_q": 7, "seq_idx": None}
    assert torch.equal(model(ids, **ignored).logits, model(ids).logits)
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    expected = torch.cat([model(ids[:, :3]).logits, model(ids[:, 3:]).logits], 1)
    torch.testing.assert_close(model(ids, cu_seq_lens_q=bounds).logits, expected)
    for wrong in ([0, 3, 6], [1, 7], [0, 5, 3, 7]):
        with pytest.raises(ValueError, match="cu_seq_lens_q: expected rising bounds from 0 to 7"):
            model(ids, cu_seq_lens_q=torch.tensor(wrong))


def test_export_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"torch\.export: expected .* the layout of a batch is computed on the host"):
        torch.export.export(tiny_model(), (tokens(2, 6),))
