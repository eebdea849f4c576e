"""Training of the last blocks alone: gradients, the reference, what is stored, and the frozen blocks' shared states."""

import pytest
import torch
from helpers.stages import Killed, Trap, die, figures, go, records, same, same_gradients, settings, tiny, weights
from helpers.texts import small_tokenizer
from helpers.tiny import FORMS
from safetensors.torch import load_file

from dph.errors import UserError
from dph.train import checkpointing
from dph.train.budget import flops, memory
from dph.train.build import make_stage
from dph.train.run_dir import RunDirectory
from dph.train.trainer import Trainer
from dph_kernels import dispatch

FORM = pytest.mark.parametrize("form", [None, "llama"])


def model_of(form, **changes):
    return tiny(num_hidden_layers=3, **(FORMS[form] if form else {}), **changes)


def last(stage, directory, **changes):
    return settings(stage, directory, train__last_layers=1, **changes)


def trainer_of(stage, directory, model, made=last, **changes):
    values = made(stage, directory, **changes)
    built = make_stage(values, model, small_tokenizer(), records(stage), [])
    return Trainer(values, built, RunDirectory(directory, values.as_dict()), quiet=True)


def first_loss(trainer):
    """The loss of the first micro-batch, with gradients."""
    trainer.model.train()
    stage = trainer.stage
    loss = stage.loss(stage.prepare(stage.next_batch().micro_batches[0], 1)).total
    loss.backward()
    return loss


@FORM
@pytest.mark.parametrize("stage", ["align", "sft"])
@pytest.mark.parametrize("changes", [{}, {"checkpointing": "block"}, {"data__memory_kind": "hidden"}])
def test_gradients_are_those_of_full_training(stage, form, changes, tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)
    full = trainer_of(stage, tmp_path / "full", model_of(form), settings, **changes)
    part = trainer_of(stage, tmp_path / "part", model_of(form), **changes)
    assert torch.equal(first_loss(part), first_loss(full))
    expected = dict(full.model.named_parameters())
    trained = same_gradients(part, full)
    assert trained == set(part.names.values())
    heads = {name for name in expected if name.startswith("heads.") and stage == "align"}
    above = {name for name in expected if name.startswith(("backbone.blocks.2.", "backbone.output_norm."))}
    assert trained == above | heads


@pytest.mark.parametrize("stage", ["align", "sft"])
def test_nothing_is_stored_for_the_frozen_blocks(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)
    trainer = trainer_of(stage, tmp_path, model_of("llama"))
    inputs = trainer.stage.prepare(trainer.stage.next_batch().micro_batches[0], 1)
    needed = []
    for block in trainer.model.backbone.blocks:
        block.ffn.fc2.register_forward_hook(lambda module, inputs, out: needed.append(out.requires_grad))
    trainer.stage.loss(inputs)
    assert needed == ([True] if stage == "align" else [False, False, True])  # align: computed with the reference's


@FORM
def test_the_reference_is_the_untouched_model_bit_for_bit(form, tmp_path, monkeypatch):
    """Its own weights are copies of those that train, and no others."""
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)
    trainer, untouched = trainer_of("align", tmp_path, model_of(form)), model_of(form).eval()
    for step in (1, 2, 3):
        trainer.train_step(step)
    micro_batch = trainer.stage.next_batch().micro_batches[0]
    inputs = trainer.stage.prepare(micro_batch, 4)
    assert inputs.states[0] == 2
    with torch.no_grad():
        expected = untouched.forward_packed(micro_batch.packed).logprobs
        assert torch.equal(inputs.frozen_outputs, expected)
        assert not torch.equal(trainer.model.forward_packed(micro_batch.packed).logprobs, expected)
    reference = dict(trainer.stage.reference.named_parameters())
    for name, p in trainer.model.named_parameters():
        if not name.startswith("heads."):
            assert (reference[name].data_ptr() == p.data_ptr()) == (name not in trainer.names.values())


@pytest.mark.parametrize("layer", [0, 2])
def test_a_head_on_a_frozen_layer(layer, tmp_path):
    """It judges frozen states, and the blocks are computed for the reference and again for the head."""
    trainer = trainer_of("align", tmp_path, model_of(None, reward_layer=layer), objective__layer=layer)
    assert trainer.stage.shares_states == (layer == 2)
    first_loss(trainer)
    full = trainer_of("align", tmp_path / "full", model_of(None, reward_layer=layer), settings, objective__layer=layer)
    first_loss(full)
    for name, p in full.model.named_parameters():
        if name.startswith("heads."):
            torch.testing.assert_close(trainer.model.get_parameter(name).grad, p.grad, rtol=1e-5, atol=1e-6)


def test_cached_references_and_shared_states_change_nothing(tmp_path):
    """But rounding: references are cached in other batches, and a product may round a row by the rows beside it."""
    changes = {"batch__micro": 2}
    shared = go(last("align", tmp_path / "shared", **changes), model=model_of(None))
    cached = go(last("align", tmp_path / "cached", objective__reference="cache", **changes), model=model_of(None))
    same(shared, cached, rtol=1e-5, atol=1e-6)
    for one, two in zip(figures(tmp_path / "shared"), figures(tmp_path / "cached"), strict=True):
        assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("stage", ["align", "sft"])
def test_a_killed_run_resumes_bit_for_bit(stage, tmp_path):
    whole = go(last(stage, tmp_path / "whole"), model=model_of(None))
    with pytest.raises(Killed):
        go(last(stage, tmp_path / "run"), model=model_of(None), data=Trap(records(stage), 24, die))
    assert 0 < checkpointing.newest_checkpoint(tmp_path / "run/checkpoints").step < 8
    resumed = go(last(stage, tmp_path / "run"), model=model_of(None), resume=True)
    same(whole, resumed)
    assert figures(tmp_path / "whole") == figures(tmp_path / "run")
    begun = weights(model_of(None))
    trained = load_file(tmp_path / "run/checkpoints/step-00000008/weights.safetensors").keys()
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, begun[name]) == (name not in trained)
        assert p.requires_grad


def test_bf16_leaves_the_frozen_weights_as_they_were(tmp_path):
    begun = weights(model_of(None))
    result = go(last("align", tmp_path, precision="bf16"), model=model_of(None))
    changed = {name for name, p in result.model.named_parameters() if not torch.equal(p, begun[name])}
    assert changed
    assert all(name.startswith(("heads.", "backbone.blocks.2.", "backbone.output_norm.")) for name in changed)


def test_the_estimate_counts_what_trains(tmp_path):
    trainer = trainer_of("align", tmp_path, model_of(None))
    sizes = memory.on_device(trainer.stage, 100, torch.device("cpu"), "device")
    trained = sum(p.numel() for p in trainer.names)
    heads = sum(p.numel() for p, name in trainer.names.items() if name.startswith("heads."))
    assert sizes["momentum and second moment"] == 8 * trained
    assert sizes["reference model"] == 4 * (trained - heads)
    full = make_stage(settings("align", tmp_path / "f"), model_of(None), small_tokenizer(), records("align"), [])
    assert sizes["activations"] < 0.5 * memory.on_device(full, 100, torch.device("cpu"), "device")["activations"]
    needed = flops.batch_flops(trainer.stage, trainer.stage.next_batch())
    assert 0 < needed < 0.6 * flops.batch_flops(full, full.next_batch())


@pytest.mark.parametrize("stage", ["vocab", "head"])
def test_other_stages_refuse(stage, tmp_path):
    with pytest.raises(UserError, match=rf"train\.last_layers: expected null in stage {stage}, got 1"):
        last(stage, tmp_path)


def test_more_blocks_than_there_are(tmp_path):
    with pytest.raises(UserError, match=r"train\.last_layers: expected at most the 3 blocks of the model, got 4"):
        go(settings("sft", tmp_path, train__last_layers=4), model=model_of(None))
