"""TRL's trainers on our models: a few steps of each, and losses that are ours where both have them."""

import pytest
import torch
from helpers.command_line import save_models
from helpers.texts import conversation, message
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import dph

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.ecosystem

CHOSEN, REJECTED = conversation("a film?", "is gripping"), conversation("a film?", "dull")
ROWS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models")) / "judge"


@pytest.fixture
def tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


@pytest.fixture
def common(tmp_path):
    return {
        "output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 4, "report_to": [],
        "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3, "max_length": 64,
        "bf16": False,
    }  # fmt: skip


def rows(**fields):
    return datasets.Dataset.from_list([fields] * ROWS)


def losses(trainer):
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_sft(folder, tokenizer, common):
    """The first loss is the mean over the tokens of one conversation."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer.apply_chat_template(CHOSEN, return_dict=False)])
    expected = model(ids, labels=ids).loss.item()
    config = trl.SFTConfig(**common)
    trainer = trl.SFTTrainer(model, args=config, train_dataset=rows(messages=CHOSEN), processing_class=tokenizer)
    first, second = losses(trainer)
    assert first == pytest.approx(expected, rel=1e-4)
    assert second < first


def test_dpo(folder, tokenizer, common):
    """Before the first step policy and reference agree; after it the chosen answer is preferred."""
    data = rows(prompt=CHOSEN[:1], chosen=CHOSEN[1:], rejected=REJECTED[1:])
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder), args=trl.DPOConfig(**common), train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip
    first, second = losses(trainer)
    assert first == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)
    assert second < first


def test_kto(folder, tokenizer, common):
    data = datasets.Dataset.from_list(
        [{"prompt": CHOSEN[:1], "completion": (CHOSEN, REJECTED)[i % 2][1:], "label": i % 2 == 0} for i in range(ROWS)]
    )
    trainer = trl.KTOTrainer(
        AutoModelForCausalLM.from_pretrained(folder), args=trl.KTOConfig(**common), train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip
    assert losses(trainer)[0] == pytest.approx(0.5, abs=1e-3)


def test_grpo(folder, tokenizer, common):
    del common["max_length"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = model.output_proj.weight.detach().clone()
    trainer = trl.GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [float(len(c[0]["content"])) for c in completions],
        args=trl.GRPOConfig(**common, num_generations=4, max_completion_length=8),
        train_dataset=rows(prompt=[message("user", "a film?")]), processing_class=tokenizer,
    )  # fmt: skip
    losses(trainer)
    assert not torch.equal(model.output_proj.weight, before)


@pytest.mark.parametrize("start", ["trained", "fresh"])
def test_a_reward_trainers_head_is_saved_and_judges(start, folder, tokenizer, common, tmp_path):
    heads = ["default"] if start == "trained" else ["new"]
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, reward_heads=heads, num_labels=1, reward_dropout=0.0
    )
    assert (model.config.num_labels, model.config.id2label) == (1, {0: heads[0]})
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = trl.RewardTrainer(
        model, args=trl.RewardConfig(**common), train_dataset=rows(chosen=CHOSEN, rejected=REJECTED),
        processing_class=tokenizer,
    )  # fmt: skip
    model.train()
    encoded = [tokenizer.apply_chat_template(turns, return_dict=False) for turns in (CHOSEN, REJECTED)]
    with torch.no_grad():
        chosen, rejected = (model(torch.tensor([ids])).logits.squeeze(1) for ids in encoded)
    first, second = losses(trainer)
    assert first == pytest.approx(dph.losses.dph_loss(chosen, rejected, 0.0, "contrastive").item(), rel=1e-3)
    assert second < first
    trainer.save_model(tmp_path / "saved")
    loaded = dph.Model.from_pretrained(tmp_path / "saved")
    assert not loaded.untrained_heads
    expected = model.eval().score(tokenizer, [CHOSEN, REJECTED], head=heads[0])
    assert torch.equal(loaded.score(tokenizer, [CHOSEN, REJECTED], head=heads[0]), expected)
