"""PEFT's adapters on backbone and heads: an adapter that does nothing, merging, saving and loading."""

import pytest
import torch
from helpers.tiny import END, tiny_config, tiny_model, tokens

from dph.model.auto_classes import RewardModel

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.ecosystem

POOLER = {"reward_pooler": "swiglu_bert"}


def inputs():
    ids = tokens(2, 9)
    ids[:, -1] = END
    return ids


@torch.no_grad()
def results(model):
    model.eval()
    own = model.base_model.model if isinstance(model, peft.PeftModel) else model
    return model(input_ids=inputs()).logits, torch.stack(list(own.rewards(inputs()).values()))


def assert_same(got, expected, **tolerance):
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted, **tolerance)


def shake(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))


@pytest.mark.parametrize("target", ["all-linear", ["qkv", "fc1"], ["pooler.0", "pooler.2"], ["default"]])
def test_lora(target, tmp_path):
    heads = {**POOLER, "reward_heads": ("default", "other")}
    model = tiny_model(**heads)
    before = results(model)
    config = peft.LoraConfig(target_modules=target, r=4, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    assert_same(results(adapted), before, rtol=1e-5, atol=1e-5)
    shake(adapted)
    expected = results(adapted)
    assert not torch.allclose(expected[1], before[1], atol=1e-3)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(**heads), tmp_path)
    assert_same(results(loaded), expected, rtol=0, atol=0)
    assert_same(results(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", ["default", "other", "reward"])
def test_whole_heads_are_saved_with_any_name(adapter, tmp_path):
    heads = {**POOLER, "reward_heads": ("default", "other"), "task_heads": ("reward",)}
    config = peft.LoraConfig(target_modules=["qkv"], r=4, modules_to_save=["heads"])
    adapted = peft.get_peft_model(tiny_model(**heads), config, adapter_name=adapter)
    shake(adapted)
    expected = results(adapted)
    adapted.save_pretrained(tmp_path)
    path = tmp_path if adapter == "default" else tmp_path / adapter
    loaded = peft.PeftModel.from_pretrained(tiny_model(**heads), path, adapter_name=adapter)
    assert_same(results(loaded), expected, rtol=0, atol=0)


def test_heads_that_peft_has_frozen_are_reported_once(caplog):
    """PEFT's sequence classification looks for modules named score or classifier."""
    for saved, warnings in ((None, 1), (["heads"], 0)):
        caplog.clear()
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["qkv"], modules_to_save=saved)
        adapted = peft.get_peft_model(RewardModel(tiny_config()), config)
        for _ in range(2):
            adapted(input_ids=inputs(), labels=torch.zeros(2, 1)).loss.backward()
        assert caplog.text.count("no reward head is trained") == warnings


def test_prompt_tuning_with_the_width_of_the_embedding():
    model = tiny_model()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=model.config.embedding_size)
    adapted = peft.get_peft_model(model, config)
    prompt = adapted.get_prompt(2)
    embeds = torch.cat([prompt, model.get_input_embeddings()(inputs())], 1)
    got = adapted(input_ids=inputs(), labels=inputs())
    torch.testing.assert_close(got.logits, model(inputs_embeds=embeds).logits)
    got.loss.backward()
    assert adapted.prompt_encoder["default"].embedding.weight.grad.abs().max() > 0


def test_prefix_tuning_is_refused_by_name():
    adapted = peft.get_peft_model(tiny_model(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"past_key_values: expected dph\.Memory, got DynamicCache"):
        adapted(input_ids=inputs())
