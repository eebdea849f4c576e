"""What a dry run says, against what training takes."""

import json

import pytest
import torch
from stages import settings, tiny
from texts import conversation, small_tokenizer

import dph
from dph import cli, estimate, footprint, recipe
from dph.packing import pack
from dph.records import Preference, encoder


@pytest.fixture
def start(tmp_path):
    """A model's directory and files of records."""
    tiny().save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    pair = {"prompt": "hello", "chosen": "world", "rejected": "late"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 9)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "The quick brown fox. " * 9}) + "\n")
    return tmp_path


def make(start, stage, source, **changes):
    values = settings(stage, start / "run", **changes).as_dict()
    values["model"] = {"path": str(start / "model")}
    values["data"]["sources"] = [{"source": str(start / source)}]
    return recipe.from_dict(values)


def test_numbers_of_a_stage(start):
    found = estimate.estimate(make(start, "align", "pairs.jsonl", batch__micro=2))
    model = tiny()
    pair = encoder(small_tokenizer())(Preference(conversation("hello", "world"), conversation("hello", "late")))
    assert found.parameters == found.trained == model.num_parameters()
    assert found.tokens == 4 * len(pack([pair]).tokens)
    assert (found.steps, found.device) == (8, "CPU")
    assert found.memory["weights"] == found.memory["reference model"] == 4 * model.num_parameters()
    assert found.memory["momentum and second moment"] == 8 * model.num_parameters()
    assert "fp32 masters" not in found.memory
    assert found.seconds == pytest.approx(8 * found.flops / (estimate.ASSUMED * found.rate))
    low = estimate.estimate(make(start, "align", "pairs.jsonl", precision="bf16"))
    assert low.memory["weights"] == 2 * model.num_parameters()
    assert low.memory["fp32 masters"] == 4 * model.num_parameters()
    assert low.memory["activations"] == pytest.approx(
        found.memory["activations"], rel=0.2
    )  # twice the rows, half a size


def test_frozen_parts_take_no_state(start):
    found = estimate.estimate(make(start, "head", "pairs.jsonl"))
    heads = sum(p.numel() for name, p in tiny().named_parameters() if name.startswith("heads."))
    assert found.trained == heads
    assert found.memory["gradients"] == 4 * heads
    assert "activations" not in found.memory


def test_memory_of_streams(start):
    sizes = {kind: estimate.estimate(make(start, "pretrain", "texts.jsonl", data__memory_kind=kind)).memory
             for kind in ("kv", "hidden")}  # fmt: skip
    assert sizes["kv"]["Transformer-XL memory"] == 4 * 20 * 2 * 2 * 16 * 4  # streams, tokens, layers, k and v, C, bytes
    assert sizes["hidden"]["Transformer-XL memory"] == sizes["kv"]["Transformer-XL memory"] / 2


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_activations_are_those_that_autograd_keeps(checkpointing):
    """Within a tenth, of a model with the paper's proportions."""
    torch.manual_seed(0)
    config = dph.ModelConfig(
        vocab_size=512, embedding_size=96, hidden_size=192, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=3, reward_heads=(),
    )  # fmt: skip
    model, rows = dph.Model(config), 200
    model.backbone.gradient_checkpointing = checkpointing == "block"
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address serves twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.stream_logprobs(torch.randint(512, (1, rows)), torch.randint(512, (1, rows))).sum()
    measured = sum(size for size, _ in kept.values())
    values = settings("sft", "unused", checkpointing=checkpointing)
    reckoned = footprint.activations(values, model.config, rows, 4)
    if checkpointing == "block":  # while one block is computed again, its own activations are there
        reckoned -= rows * (4 * (10 * 192 + 4 * 512) + 4 * 3)
    assert reckoned == pytest.approx(measured, rel=0.1)


def test_the_command_writes_nothing(start, capsys, monkeypatch):
    monkeypatch.chdir(start)
    before = sorted(start.rglob("*"))
    arguments = [f"model.path={start / 'model'}", f"data.sources=[{start / 'pairs.jsonl'}]", "batch.size=4"]
    assert cli.main(["train", "mini-align", *arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    for word in ("parameters", "memory in all", "tokens in an update", "minutes"):
        assert word in said
    assert sorted(start.rglob("*")) == before
