"""The released layout both ways, its configuration, and embeddings from another model."""

import json
import logging
import re

import pytest
import torch
from helpers.texts import small_tokenizer
from helpers.tiny import VOCAB, tiny_config, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

import dph
from dph import checkpoint
from dph.model.config import POOLERS
from dph_kernels import PackedLayout


@pytest.mark.parametrize("pooler", POOLERS)
def test_names_there_and_back(pooler):
    own = dict(tiny_model(reward_pooler=pooler, reward_heads=("default", "other")).named_parameters())
    official = checkpoint.to_official(own)
    again = checkpoint.from_official(official)
    assert again.keys() == own.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in own.items())
    assert sum(t.numel() for t in official.values()) == sum(t.numel() for t in own.values())
    assert all(re.match(r"(model|head_proj|pooler_pipeline|reward_heads)\.", name) for name in official)


def test_queries_keys_and_values_lie_in_this_order():
    official = checkpoint.to_official({"backbone.blocks.1.attention.qkv.weight": torch.arange(6).view(6, 1)})
    assert {name.split(".")[4]: tensor.flatten().tolist() for name, tensor in official.items()} == {
        "proj_q": [0, 1], "proj_k": [2, 3], "proj_v": [4, 5],
    }  # fmt: skip


def test_gradients_are_renamed_as_weights_are():
    model, ids = tiny_model(reward_heads=()), tokens(1, 6)
    model(ids, labels=ids).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    again = checkpoint.from_official(checkpoint.to_official(grads))
    assert all(torch.equal(again[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize(
    ("convert", "names", "text"),
    [
        (checkpoint.from_official, ["model.unknown.weight"], "model.unknown.weight: expected a name of the checkpoint"),
        (checkpoint.to_official, ["heads.task_sst2.reward.sst2.weight"], "heads.task_sst2.*: expected a name of"),
        (
            checkpoint.from_official,
            ["model.blocks.0.att.proj_q.weight"],
            "expected .*proj_k.weight and .*proj_v.weight",
        ),
        (
            checkpoint.from_official,  # keys and values alone must not vanish either
            ["model.blocks.0.att.proj_k.bias", "model.blocks.0.att.proj_v.bias"],
            r"proj_k.bias: expected model.blocks.0.att.proj_q.bias with it, got none",
        ),
    ],
)
def test_tensors_without_a_place_are_refused(convert, names, text):
    with pytest.raises(ValueError, match=text):
        convert({name: torch.zeros(2) for name in names})


# Directories


@pytest.mark.parametrize("pooler", POOLERS)
def test_saved_in_the_released_layout_and_loaded(pooler, tmp_path):
    model = tiny_model(reward_pooler=pooler, reward_heads=("default", "other"), rope_reversed=False)
    model.save_official(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    ids, at = tokens(2, 9), torch.tensor([8, 4])
    for load in (dph.Model.from_pretrained, AutoModelForCausalLM.from_pretrained):
        again = load(tmp_path).eval()
        assert type(again) is dph.Model
        assert torch.equal(again(ids).logits, model(ids).logits)
        rewards = model.rewards(ids, reward_positions=at)
        assert all(torch.equal(again.rewards(ids, reward_positions=at)[n], r) for n, r in rewards.items())
        assert again.config.im_end_token_id == model.config.im_end_token_id
        assert again.name_or_path == str(tmp_path)
        assert not again.untrained_heads


def test_released_then_own_then_released_is_bit_for_bit(tmp_path):
    tiny_model().save_official(tmp_path / "a")
    dph.Model.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    dph.Model.from_pretrained(tmp_path / "b").save_official(tmp_path / "c")
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "c/config.json").read_text()


def test_a_released_model_with_changes_and_another_dtype(tmp_path):
    tiny_model().save_official(tmp_path)
    model = dph.Model.from_pretrained(tmp_path, rope_reversed=False, reward_dropout=0.3, dtype=torch.bfloat16)
    assert (model.config.rope_reversed, model.config.reward_dropout, model.dtype) == (False, 0.3, torch.bfloat16)
    given = dph.Model.from_pretrained(tmp_path, config=tiny_config(rope_reversed=False))
    assert given.config.rope_reversed is False


def test_a_released_model_without_its_head(tmp_path, caplog):
    tiny_model(reward_heads=()).save_official(tmp_path)
    with caplog.at_level(logging.WARNING, "dph.model.model"):
        model = dph.Model.from_pretrained(tmp_path, reward_heads=("default",)).eval()
    assert "no weights for reward heads default" in caplog.text
    with pytest.raises(ValueError, match="holds no weights for it"):
        model.rewards(torch.tensor([[5, 3]]))


def test_every_auto_class_reads_a_released_directory_without_a_warning(tmp_path, monkeypatch):
    """transformers warned of 'a model of type lsw_transformer', and read the fields that it knew: none."""
    tiny_model().save_official(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    warnings = []
    for name in ("transformers.configuration_utils", "transformers.modeling_utils"):
        monkeypatch.setattr(logging.getLogger(name), "handle", lambda record: warnings.append(record.getMessage()))
    for read in (dph.ModelConfig.from_pretrained, AutoConfig.from_pretrained):
        config = read(tmp_path)
        assert (type(config), config.hidden_size, config.num_hidden_layers) == (dph.ModelConfig, 16, 2)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(small_tokenizer())
    dph.Model.from_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert warnings == []
    (tmp_path / "config.json").write_text('{"model_type": "another"}')
    dph.ModelConfig.from_pretrained(tmp_path)
    assert "model of type `another`" in warnings[0]  # the trap above does catch it


# Configurations


def test_configuration_there_and_back():
    config = tiny_config(reward_pooler="t5", reward_dropout=0.25, rope_base=1000.0, rope_reversed=False)
    again = dph.ModelConfig(**checkpoint.config_from_official(checkpoint.config_to_official(config)))
    assert again.to_dict() == config.to_dict()
    json.dumps(checkpoint.config_to_official(config))


def test_the_paper_s_chat_tokens_lie_in_the_free_rows():
    official = checkpoint.config_to_official(dph.ModelConfig())
    del official["im_end_token_id"]
    end = lambda **changes: dph.ModelConfig(**checkpoint.config_from_official(official | changes)).im_end_token_id  # noqa: E731
    assert (end(), end(vocab_size=512), end(im_end_token_id=9)) == (50_266, None, 9)
    assert (dph.ModelConfig().im_end_token_id, dph.ModelConfig(vocab_size=50_267).im_end_token_id) == (50_266, None)


@pytest.mark.parametrize("given", [None, 7])
def test_the_end_token_of_a_released_model_is_its_tokenizers(given, tmp_path):
    """Every released configuration lacks it, and rewards need it."""
    tiny_model(im_end_token_id=given).save_official(tmp_path)
    loads = (
        dph.ModelConfig.from_pretrained,
        AutoConfig.from_pretrained,
        lambda path: dph.Model.from_pretrained(path).config,
        lambda path: AutoModelForCausalLM.from_pretrained(path).config,
    )
    assert [load(tmp_path).im_end_token_id for load in loads] == [given] * 4  # no tokenizer there
    small_tokenizer().save_pretrained(tmp_path)
    expected = given or small_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert [load(tmp_path).im_end_token_id for load in loads] == [expected] * 4


def test_what_only_the_released_code_reads_is_written_back(tmp_path):
    tiny_model().save_official(tmp_path / "a")
    path = tmp_path / "a/config.json"
    theirs = {"recompute_kv": True, "rope_positions": 64, "rope_yarn_a": 0.07, "parent_embeddings": "facebook/opt-125m"}
    path.write_text(json.dumps(json.loads(path.read_text()) | theirs))
    dph.Model.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    model = dph.Model.from_pretrained(tmp_path / "b")
    assert (model.config.memory_kind, dph.ModelConfig().memory_kind) == ("hidden", "kv")
    model.save_official(tmp_path / "c")
    assert json.loads((tmp_path / "c/config.json").read_text()) == json.loads(path.read_text())


def test_heads_that_were_never_trained_are_not_written(tmp_path):
    model = tiny_model(reward_heads=("a", "b"))
    model.untrained_heads = {"b"}
    model.save_official(tmp_path)
    assert [n for n in load_file(tmp_path / "model.safetensors") if "reward" in n] == ["reward_heads.a.weight"]
    assert dph.Model.from_pretrained(tmp_path).untrained_heads == {"b"}


@pytest.mark.parametrize("heads", [(), ("a", "b")])
def test_a_model_without_trained_heads_is_a_language_model(heads, tmp_path):
    model = tiny_model(reward_heads=heads)
    model.untrained_heads = set(heads)
    model.save_official(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["architectures"], fields["reward_heads"]) == (["LSWTForCausalLM"], None)
    for load in (dph.Model.from_pretrained, AutoModelForCausalLM.from_pretrained):
        again = load(tmp_path).eval()
        assert (again.head_names, again.untrained_heads) == ([], set())
        assert torch.equal(again(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@pytest.mark.parametrize(
    ("key", "value"),
    [("enable_bias", False), ("gated_att", True), ("gated_ffn", False), ("n_registers", 4), ("qk_norm", True),
     ("rope_dynamic", True), ("rope_ntk_scale", 2.0), ("dropout_layers", 0.1), ("dropout_att_mat", 0.1)],
)  # fmt: skip
def test_switches_of_other_models_are_refused(key, value, tmp_path):
    tiny_model().save_official(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for load in (dph.Model.from_pretrained, dph.ModelConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=f"config.json: expected {key} = .*, got {value}: not part of this model"):
            load(tmp_path)


@pytest.mark.parametrize("change", [{"layer_norm_eps": 1e-6}, {"task_heads": ("sst2",)}])
def test_what_the_released_layout_cannot_say_is_not_written(change, tmp_path):
    with pytest.raises(ValueError, match="config: expected layer_norm_eps = 1e-05 and no task_heads"):
        tiny_model(**change).save_official(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Embeddings of OPT


def tiny_opt(folder, vocab_size=VOCAB, width=12):
    config = OPTConfig(
        vocab_size=vocab_size, hidden_size=16, word_embed_proj_dim=width, ffn_dim=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    model.save_pretrained(folder)
    return model.get_input_embeddings().weight.detach()


@pytest.mark.parametrize("extra", [0, 7])
def test_embeddings_come_from_opt(extra, tmp_path):
    table = tiny_opt(tmp_path, VOCAB + extra)
    model = tiny_model()
    others = {n: t.detach().clone() for n, t in model.named_parameters() if "embedding" not in n}
    checkpoint.init_embeddings(model, tmp_path)
    assert torch.equal(model.backbone.embedding.weight, table[:VOCAB])
    assert model.backbone.embedding.weight.requires_grad
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in others.items())
    ids = tokens(1, 4)
    logits = model.output_proj(model.backbone(ids[0], PackedLayout.documents([4]))) @ table[:VOCAB].T
    torch.testing.assert_close(model(ids).logits[0], logits)  # the head is the same table


@pytest.mark.parametrize(("vocab_size", "width"), [(VOCAB - 1, 12), (VOCAB, 16)])
def test_embeddings_that_do_not_fit(vocab_size, width, tmp_path):
    tiny_opt(tmp_path, vocab_size, width)
    with pytest.raises(ValueError, match=rf"embedding of at least \[61, 12\], got \[{vocab_size}, {width}\]"):
        checkpoint.init_embeddings(tiny_model(), tmp_path)


def test_a_table_that_is_stored_as_the_head_is_found(tmp_path):
    """As converters of tied pickles store it (transformers issue 43159)."""
    table = tiny_opt(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.decoder.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = tiny_model()
    checkpoint.init_embeddings(model, tmp_path)
    assert torch.equal(model.backbone.embedding.weight, table)


def test_a_table_that_is_missing_is_not_made_up(tmp_path):
    """transformers would initialise it at random and only warn."""
    tiny_opt(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.decoder.embed_tokens.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = tiny_model()
    before = model.backbone.embedding.weight.clone()
    with pytest.raises(
        ValueError, match=r"expected weights with a token embedding, got none for .*embed_tokens.weight"
    ):
        checkpoint.init_embeddings(model, tmp_path)
    assert torch.equal(model.backbone.embedding.weight, before)


def test_integers_in_place_of_a_table_are_refused(tmp_path):
    tiny_opt(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.decoder.embed_tokens.weight"
    save_file(weights | {name: weights[name].long()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"model.safetensors: {name}: expected a floating-point embedding, got I64"):
        checkpoint.init_embeddings(tiny_model(), tmp_path)


def test_a_source_of_embeddings_runs_no_code(tmp_path):
    """Neither a model that only its own Python can read, nor a kernel of the hub."""
    tiny_opt(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"_attn_implementation": "evil/kernel"}))
    checkpoint.init_embeddings(tiny_model(), tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the folder ran')\n")
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    path.write_text(json.dumps(fields | {"model_type": "evil", "auto_map": names}))
    with pytest.raises(ValueError, match=r"expected a language model that transformers reads, got .*custom code"):
        checkpoint.init_embeddings(tiny_model(), tmp_path)


# Golden numbers


def test_golden_checkpoint_through_every_door(shared, tmp_path):
    """The paper's own layout -> own format -> the paper's, and the Auto class: one set of logits."""
    source, ids = shared / "golden/checkpoint", torch.arange(24).view(2, 12)
    model = dph.Model.from_pretrained(source).eval()
    assert model.config.im_end_token_id == AutoTokenizer.from_pretrained(source).convert_tokens_to_ids("<|im_end|>")
    expected = model(ids).logits
    model.save_official(tmp_path / "official")
    first, last = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "official"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    for folder in (source, tmp_path / "official"):
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits, expected)
