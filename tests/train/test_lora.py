"""Low-rank adapters: gradients, the reference without them, checkpoints, the merged model and PEFT's own format."""

import json
import sys

import pytest
import torch
from helpers.stages import Killed, Trap, die, figures, go, records, same, settings, tiny, weights
from helpers.texts import small_tokenizer
from helpers.tiny import FORMS
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import dph
from dph.cli import main
from dph.errors import UserError
from dph.train import build, checkpointing, recipe
from dph.train.budget import flops, memory
from dph.train.build import make_stage
from dph.train.run_dir import RunDirectory
from dph.train.trainer import Trainer
from dph_kernels import dispatch

peft = pytest.importorskip("peft")
LAYERS = {"attention.qkv", "attention.out", "ffn.fc1", "ffn.fc2"}
FORM = pytest.mark.parametrize("form", [None, "llama"])


def model_of(form, **changes):
    return tiny(**(FORMS[form] if form else {}), **changes)


def lora(stage, directory, **changes):
    return settings(stage, directory, **{"lora__rank": 3, "lora__alpha": 4, **changes})


def trainer_of(stage, directory, model, made=lora, **changes):
    """A trainer at its first step."""
    values = made(stage, directory, **changes)
    built = make_stage(values, model, small_tokenizer(), records(stage), [])
    return Trainer(values, built, RunDirectory(directory, values.as_dict()), quiet=True)


def shake(trainer):
    """Give the adapters' B other numbers than zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if ".lora_B." in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


def first_loss(trainer, number=1):
    """The loss of the first micro-batch, with gradients."""
    trainer.model.train()
    stage = trainer.stage
    loss = stage.loss(stage.prepare(stage.next_batch().micro_batches[0], number)).total
    loss.backward()
    return loss


@FORM
@pytest.mark.parametrize("stage", ["align", "sft"])
def test_gradients_are_those_of_the_product(form, stage, tmp_path):
    """With W + s B A in place of W, and its gradient G: that of A is s B' G, and that of B is s G A'."""
    adapted = trainer_of(stage, tmp_path / "lora", model_of(form))
    shake(adapted)
    loss = first_loss(adapted)
    own, scale, products = dict(adapted.model.named_parameters()), 4 / 3, {}
    plain = trainer_of(stage, tmp_path / "full", model_of(form), settings)  # before its weights change
    for name, p in plain.model.named_parameters():
        a, b = (own.get(name.replace(".weight", f".lora_{x}.default.weight")) for x in "AB")
        if ".blocks." in name and name.endswith(".weight") and a is not None:
            products[name] = a.detach(), b.detach()
            p.data += scale * b.detach() @ a.detach()
    assert {name.split(".", 3)[3].removesuffix(".weight") for name in products} == LAYERS
    torch.testing.assert_close(first_loss(plain), loss, rtol=1e-5, atol=1e-5)
    for name, p in plain.model.named_parameters():
        if name in products:
            a, b = products[name]
            for x, expected in (("A", scale * b.T @ p.grad), ("B", scale * p.grad @ a.T)):
                got = own[name.replace(".weight", f".lora_{x}.default.weight")].grad
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        elif stage == "align" and name.startswith("heads."):
            torch.testing.assert_close(own[name].grad, p.grad, rtol=1e-4, atol=1e-5)
    trained = {name for name, p in own.items() if p.grad is not None}
    assert trained == set(adapted.names.values())
    assert not any(".base_layer." in name for name in trained)


@FORM
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_is_the_untouched_model_bit_for_bit(form, precision, tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)  # so that the untouched model's blocks are fused
    trainer, untouched = trainer_of("align", tmp_path, model_of(form), precision=precision), model_of(form).eval()
    if precision == "bf16":
        untouched.bfloat16()
    for step in (1, 2, 3):
        trainer.train_step(step)
    micro_batch = trainer.stage.next_batch().micro_batches[0]
    got = trainer.stage.frozen(micro_batch)
    with torch.no_grad():
        assert torch.equal(got, untouched.forward_packed(micro_batch.packed).logprobs)
        assert not torch.equal(got, trainer.model.forward_packed(micro_batch.packed).logprobs)
    own = {p.data_ptr() for p in trainer.model.parameters()}
    assert all(p.data_ptr() in own for p in trainer.stage.reference.parameters())


def test_the_cache_of_reference_log_probabilities_is_that_of_full_training(tmp_path):
    shared = {"objective__reference": "cache", "data__cache": str(tmp_path / "cache")}
    go(settings("align", tmp_path / "full", **shared))
    (stored,) = (tmp_path / "cache").iterdir()
    files = sorted(stored.iterdir())
    cached = go(lora("align", tmp_path / "lora", **shared))
    assert list((tmp_path / "cache").iterdir()) == [stored]
    assert sorted(stored.iterdir()) == files
    same(cached, go(lora("align", tmp_path / "fly")))


@pytest.mark.parametrize("stage", ["align", "sft"])
def test_a_killed_run_resumes_bit_for_bit(stage, tmp_path):
    changes = {"lora__dropout": 0.3, "batch__micro": 2}
    whole = go(lora(stage, tmp_path / "whole", **changes))
    with pytest.raises(Killed):
        go(lora(stage, tmp_path / "run", **changes), data=Trap(records(stage), 24, die))
    assert 0 < checkpointing.newest_checkpoint(tmp_path / "run" / "checkpoints").step < 8
    resumed = go(lora(stage, tmp_path / "run", **changes), resume=True)
    same(whole, resumed)
    adapter = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "run")]
    assert all(torch.equal(tensor, adapter[1][name]) for name, tensor in adapter[0].items())
    assert figures(tmp_path / "whole") == figures(tmp_path / "run")


@FORM
def test_what_a_run_saves(form, tmp_path):
    """The merged model, the adapter in PEFT's format, and checkpoints of what trains alone."""
    before = weights(model_of(form))
    result = go(lora("align", tmp_path), model=model_of(form))
    merged = dph.Model.from_pretrained(tmp_path / "model").eval()
    assert {name.split(".", 3)[-1] for name, p in merged.named_parameters() if not torch.equal(p, before[name])} == {
        *(f"{layer}.weight" for layer in LAYERS),
        *(name.split(".", 3)[-1] for name in before if name.startswith("heads.")),
    }
    assert not hasattr(result.model, "peft_config")
    assert all(p.requires_grad for p in result.model.parameters())

    loaded = peft.PeftModel.from_pretrained(model_of(form), tmp_path / "adapter").eval()
    ids = torch.arange(4, 40).view(2, 18)
    torch.testing.assert_close(loaded(input_ids=ids).logits, merged(ids).logits, rtol=1e-5, atol=3e-6)
    assert not torch.allclose(merged(ids).logits, model_of(form)(ids).logits, atol=1e-3)

    saved = load_file(tmp_path / "checkpoints/step-00000008/weights.safetensors")
    assert all(".lora_" in name or name.startswith("heads.") for name in saved)
    assert load_file(tmp_path / "start/start.safetensors").keys() == before.keys()  # names of the plain model


def test_a_checkpoint_opens_merged(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    values = lora("align", tmp_path / "run", model__path=str(tmp_path / "model"), evaluation__every=0).as_dict()
    result = go(recipe.from_dict(values), model=tiny())
    model, _ = build.open_checkpoint(tmp_path / "run/checkpoints/step-00000008")
    for name, p in model.named_parameters():
        assert torch.equal(p, result.model.get_parameter(name)), name
        assert p.requires_grad
    assert not model.untrained_heads


def test_prior_decay_pulls_b_to_zero_and_a_to_its_beginning(tmp_path):
    trainer = trainer_of("align", tmp_path, tiny(), optimiser__prior_decay=20.0)
    begun = weights(trainer.model)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    trainer.optimiser.step()  # takes the priors for those of the beginning
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if ".lora_" in name:
                p.add_(1.0)
    for _ in range(5):
        trainer.optimiser.step()
    for name, p in trainer.model.named_parameters():
        if ".lora_" in name:
            torch.testing.assert_close(p - begun[name], torch.full_like(p, 0.8**5), rtol=1e-4, atol=1e-5)
        if ".lora_B." in name:
            assert not begun[name].any()


def test_recomputed_blocks_repeat_the_dropout(tmp_path):
    gradients = []
    for number, kind in enumerate(("none", "block")):
        trainer = trainer_of("align", tmp_path / f"{number}", tiny(), checkpointing=kind, lora__dropout=0.5)
        shake(trainer)
        torch.manual_seed(3)
        first_loss(trainer)
        gradients.append({name: p.grad for p, name in trainer.names.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_bf16_leaves_the_frozen_weights_as_they_were(tmp_path):
    """They come back in fp32; with a rate of zero the adapters are none."""
    rates = {"optimiser__lr": 0.0, "optimiser__final_lr": 0.0}
    result = go(lora("align", tmp_path, precision="bf16", **rates))
    for name, p in tiny().named_parameters():
        assert torch.equal(result.model.get_parameter(name), p), name


@pytest.mark.parametrize("data", [Trap(records("align"), 24, lambda: 1 / 0), Trap(records("align"), 24, die)])
def test_an_error_gives_the_model_back_without_adapters(data, tmp_path):
    model = tiny()
    with pytest.raises((ZeroDivisionError, Killed)):
        go(lora("align", tmp_path), data=data, model=model)
    assert weights(model).keys() == weights(tiny()).keys()
    assert not hasattr(model, "peft_config")
    other = tiny()
    with pytest.raises(UserError, match=r"output\.best"):
        go(lora("align", tmp_path / "other", output__best="nonsense"), model=other)
    assert weights(other).keys() == weights(model).keys()


def test_the_estimate_counts_what_trains(tmp_path):
    trainer = trainer_of("align", tmp_path, tiny(), lora__targets=["qkv", "fc2"], train__last_layers=1)
    trained = sum(p.numel() for p in trainer.names)
    assert {name.split(".")[2] for name in trainer.names.values() if ".lora_" in name} == {"1"}
    plain = make_stage(trainer.recipe, tiny(), small_tokenizer(), records("align"), [])
    assert memory.count_trained(plain) == trained
    sizes = memory.on_device(plain, 100, torch.device("cpu"), "device")
    assert "reference model" not in sizes
    assert sizes["momentum and second moment"] == 8 * trained
    assert sizes["priors"] == 4 * trained
    full = make_stage(settings("align", tmp_path / "full"), tiny(), small_tokenizer(), records("align"), [])
    assert flops.batch_flops(plain, plain.next_batch()) < 0.7 * flops.batch_flops(full, full.next_batch())


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("align", {"lora__rank": 0}, r"lora\.rank: expected 1 <= rank < inf, got 0"),
        ("align", {"lora__targets": ["q_proj"]}, r"lora\.targets\.0: expected one of qkv, out, fc1, fc2, got 'q_proj'"),
        ("align", {"lora__targets": []}, r"lora\.targets: expected at least one of qkv, out, fc1, fc2, got none"),
        ("align", {"lora__dropout": 1.0}, r"lora\.dropout: expected 0 <= dropout < 1, got 1"),
        ("head", {}, r"lora\.rank: expected null in stage head, got 3"),
        ("vocab", {}, r"lora\.rank: expected null in stage vocab, got 3"),
        ("sft", {"compile": True}, r"compile: expected false with lora\.rank 3, got true"),
    ],
)
def test_bad_values_are_named(stage, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        lora(stage, tmp_path, **changes)


def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"lora\.rank: needs the peft package: pip install -e '\.\[lora\]'"):
        go(lora("sft", tmp_path))


def test_a_run_without_these_options_resumes_and_one_with_others_does_not(tmp_path):
    values = settings("align", tmp_path).as_dict()
    del values["lora"], values["train"]  # as an earlier version wrote it
    run = RunDirectory(tmp_path, values)
    run.begin()
    run.log(1, {"loss": 1.0})
    run.close()
    RunDirectory(tmp_path, settings("align", tmp_path).as_dict(), resume=True).close()
    with pytest.raises(UserError, match=r"lora\.rank: expected None, got 3"):
        RunDirectory(tmp_path, lora("align", tmp_path).as_dict(), resume=True)
    one = RunDirectory(tmp_path / "one", lora("align", tmp_path, lora__targets=["qkv"]).as_dict())
    one.begin()
    one.log(1, {"loss": 1.0})
    one.close()
    with pytest.raises(UserError, match=r"lora\.targets\.1: expected nothing, got out"):
        RunDirectory(tmp_path / "one", lora("align", tmp_path).as_dict(), resume=True)


def test_the_command(tmp_path, capsys):
    """On a directory of transformers' own class, which PEFT gives the adapter that the run has saved for it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer, base = small_tokenizer(), tmp_path / "base"
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=1,
        initializer_range=0.2,
        tie_word_embeddings=True,
        **sizes,
        **ids,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    pairs = [{"prompt": f"hello {i}", "chosen": "world", "rejected": "late"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = ["train", "align", f"model.path={base}", f"data.sources=[{tmp_path / 'pairs.jsonl'}]", "lora.rank=16"]
    words += ["evaluation.sources=[]", "batch={size: 4, tokens: 512}", "device=cpu", "data.context=100"]
    words += ["optimiser={steps: 4, warmup: 1, lr: 0.01}", f"--output={tmp_path / 'run'}"]
    assert main.main([*words, "--dry-run"]) == 0
    assert "trained parameters" in capsys.readouterr().out
    assert main.main(words) == 0
    merged = dph.Model.from_pretrained(tmp_path / "run/model").eval()
    assert merged.untrained_heads == set()
    tokens = torch.arange(4, 40).view(2, 18)
    before = LlamaForCausalLM.from_pretrained(base).eval()
    assert not torch.allclose(before(tokens).logits, merged(tokens).logits, atol=1e-2)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run/adapter-hf").eval()
    assert isinstance(loaded.base_model.model, LlamaForCausalLM)
    torch.testing.assert_close(loaded(input_ids=tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-5)
    own = peft.PeftModel.from_pretrained(dph.Model.from_pretrained(base), tmp_path / "run/adapter").eval()
    torch.testing.assert_close(own(input_ids=tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-5)
