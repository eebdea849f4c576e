"""Families of other makers' models against transformers' own classes: logits, gradients, generation, files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.templates import made
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

import dph
from dph._layouts import blocks_of, pieces
from dph.errors import UserError
from dph.model.auto_classes import RewardModel
from dph.model.config import FAMILIES

pytestmark = pytest.mark.usefixtures("every_kernel")
VOCAB = 97
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
CONTEXT = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "llama": ("llama", {}),
    "llama-all-heads": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-one-key-head": ("llama", {"num_key_value_heads": 1, "head_dim": 12}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-wide-window": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-yarn": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2-yarn-settings": (
        "qwen2",
        {"rope_parameters": YARN | {"beta_fast": 16, "beta_slow": 2.0, "attention_factor": 0.8, "truncate": False}},
    ),
    "qwen2-yarn-scales": ("qwen2", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1}}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
}


def write(folder, kind, changes, *, seed=0, dtype=torch.float32, **options):
    """Save a model of transformers with weights large enough to matter; return it."""
    config = AutoConfig.for_model(kind, **(SIZES | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
    model.to(dtype).save_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def ids_of(*shape, seed=1):
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got, want, tolerance, name=""):
    scale = want.abs().max().item()
    assert (got - want).abs().max().item() <= tolerance * max(scale, 1e-6), name


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_transformers(name, tmp_path):
    theirs = write(tmp_path, *CASES[name])
    ours = dph.Model.from_pretrained(tmp_path)
    ids = ids_of(3, 33)
    ids.masked_fill_(torch.arange(33) < torch.tensor([[0], [9], [20]]), 0)
    mask = torch.arange(33) >= torch.tensor([[0], [9], [20]])
    first = torch.arange(33) == torch.tensor([[0], [9], [20]])  # predicted by padding, if there is any
    labels = ids.masked_fill(~mask | first, -100)
    want, got = theirs(ids, mask, labels=labels), ours(ids, mask, labels=labels)
    assert_close(got.logits[mask], want.logits[mask], 1e-5)
    assert_close(got.loss, want.loss, 1e-5)
    want.loss.backward()
    got.loss.backward()
    gradients = dict(theirs.named_parameters())
    grads = {}
    for own, weight in ours.named_parameters():
        grads[own] = weight.grad
    blocks = blocks_of(grads, pieces(grads, FAMILIES[ours.config.family].weights), ours.config)
    assert blocks.keys() == gradients.keys()
    for part, block in blocks.items():
        assert_close(block, gradients[part].grad, 1e-4, part)


@pytest.mark.parametrize("name", ["llama-llama3", "mistral", "qwen2", "qwen3"])
def test_greedy_generation_is_that_of_transformers(name, tmp_path):
    theirs = write(tmp_path, *CASES[name], seed=3)
    ours = dph.Model.from_pretrained(tmp_path)
    for seed in range(20):
        ids = ids_of(1, 3 + seed, seed=seed)
        options = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


@pytest.mark.parametrize("name", ["llama-biases", "mistral", "qwen2-tied-yarn", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_comes_back_bit_for_bit(name, dtype, tmp_path):
    """From files in shards, by the own format, into shards again."""
    theirs = write(tmp_path / "source", *CASES[name], dtype=dtype, max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("model-*.safetensors"))) > 2
    GenerationConfig(eos_token_id=[1, 5], temperature=0.5, do_sample=True).save_pretrained(tmp_path / "source")
    model = dph.Model.from_pretrained(tmp_path / "source")
    assert model.dtype == dtype
    model.save_pretrained(tmp_path / "own")
    model = dph.Model.from_pretrained(tmp_path / "own")
    model.save_family(tmp_path / "back", max_shard_size="30KB")
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    assert back.generation_config.eos_token_id == [1, 5]
    assert back.generation_config.temperature == 0.5
    for (part, weight), want in zip(back.named_parameters(), theirs.parameters(), strict=True):
        assert weight.dtype == dtype
        assert torch.equal(weight, want), part
    ids = ids_of(2, 11)
    assert torch.equal(back(ids).logits, theirs(ids).logits)
    source, returned = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("source", "back"))
    assert returned == source


def test_settings_that_changed_are_written_back(tmp_path):
    write(tmp_path / "source", "qwen2", {})
    model = dph.Model.from_pretrained(tmp_path / "source", reward_heads=["judge"], layer_norm_eps=1e-3)
    model.resize_token_embeddings(VOCAB + 3)
    model.save_family(tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert (back.config.vocab_size, back.config.rms_norm_eps) == (VOCAB + 3, 1e-3)
    ids = ids_of(1, 9)
    assert_close(model.eval()(ids).logits, back(ids).logits, 1e-5)
    model.config.rope_base = 77.0
    with pytest.raises(UserError, match=r"rope_base: expected 10000\.0, as in the qwen2 model that .*, got 77\.0"):
        model.save_family(tmp_path / "other")
    model.config.rope_base = 10000.0
    model.backbone.blocks[0].attention.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"^weights: expected those of the family qwen2, got 2 others"):
        model.save_family(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="family: expected a model that comes from a Hugging Face family's directory"):
        dph.Model(dph.ModelConfig(**{"num_hidden_layers": 1, "vocab_size": 8})).save_family(tmp_path / "other")


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        ("mistral", {"sliding_window": 32}, "sliding_window: expected none, or one of at least .* 64 .*, got 32"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "window: .* got 8"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: "),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 9.0}}}, "the same for all layers, got others"),
        ("llama", {"rope_theta": "1e4"}, "rope_theta: expected a finite number, got '1e4'"),
        ("llama", {"rope_parameters": YARN | {"mscale": "1", "mscale_all_dim": 1}}, "mscale: expected a finite number"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 1e308, "rope_theta": 1e4}}, "number, got inf"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, CONTEXT: "x"}},
         f"rope_parameters.{CONTEXT}: expected a finite number, got 'x'"),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 5.0}}, "low_freq_factor: expected at most .* 4.0"),
        ("qwen2", {"rope_parameters": YARN | {"factor": 8.0}, "use_sliding_window": True, "sliding_window": 64,
                   "max_window_layers": 0}, "sliding_window: .* the context of 128 tokens .*, got 64"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: expected silu, got 'gelu'"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout: expected 0, got 0.1"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config: expected none"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map: expected no code"),
        ("llama", {"num_hidden_layers": "two"}, "expected settings of a llama model, got: .*num_hidden_layers"),
        ("gemma2", {}, "expected a model of type dph, .*, got gemma2"),
        ("mixtral", {}, "expected a model of type dph, .*, got mixtral"),
    ],
)  # fmt: skip
def test_what_cannot_be_represented_is_refused_by_name(kind, changes, text, tmp_path):
    fields = {"model_type": kind, **SIZES, **changes}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=f"^{tmp_path}.*{text}") as error:
        dph.Model.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_files_of_old_and_odd_converters(tmp_path):
    """Tables of the rotary embedding; a tied embedding stored twice, or as the head alone; old names of settings."""
    theirs = write(tmp_path, "llama", {"tie_word_embeddings": True})
    ids, file = ids_of(1, 9), tmp_path / "model.safetensors"
    expected, weights = theirs(ids).logits, load_file(file)
    config = tmp_path / "config.json"
    fields = json.loads(config.read_text())
    del fields["rope_parameters"], fields["dtype"], fields["head_dim"]
    fields |= {"rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "float32", "pad_token_id": -1}
    config.write_text(json.dumps(fields))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    embedding = weights["model.embed_tokens.weight"]
    save_file(weights | extra | {"lm_head.weight": embedding.clone()}, file)
    assert_close(dph.Model.from_pretrained(tmp_path)(ids).logits, expected, 1e-5)
    alone = {name: tensor for name, tensor in weights.items() if name != "model.embed_tokens.weight"}
    save_file(alone | {"lm_head.weight": embedding}, file)
    assert_close(dph.Model.from_pretrained(tmp_path)(ids).logits, expected, 1e-5)
    save_file(weights | {"lm_head.weight": embedding * 2}, file)
    with pytest.raises(UserError, match=r"lm_head.weight: expected the values of model.embed_tokens.weight .*, got o"):
        dph.Model.from_pretrained(tmp_path)
    numbers = embedding.to(torch.int32)
    save_file(alone | {"model.embed_tokens.weight": numbers, "lm_head.weight": numbers.clone()}, file)
    with pytest.raises(UserError, match=r"2 of another type \(the first is lm_head.weight: I32\)"):
        dph.Model.from_pretrained(tmp_path)
    save_file({name: tensor for name, tensor in alone.items() if name != "lm_head.weight"}, file)
    with pytest.raises(UserError, match=r"1 missing \(the first is model.embed_tokens.weight\)"):
        dph.Model.from_pretrained(tmp_path)
    del alone["model.norm.weight"]
    save_file(alone | {"lm_head.weight": embedding, "score.weight": torch.ones(1, 32)}, file)
    with pytest.raises(UserError, match=r"1 missing \(the first is model.norm.weight\), 1 not .*score.weight"):
        dph.Model.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "context"),
    [
        ({"original_max_position_embeddings": 8, "rope_scaling": {**LLAMA3, CONTEXT: 16}}, 24),
        ({"original_max_position_embeddings": 8, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 32),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "finetuned": True, CONTEXT: 16}}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 99.0}, 48),
        ({"rope_scaling": None, "rope_theta": 77}, 24),
    ],
)
def test_forms_of_rotary_settings_in_released_files(settings, context, tmp_path):
    """The context of the scaling counts, which ``max_position_embeddings`` of these files may not include."""
    write(tmp_path, "llama", {"max_position_embeddings": 24})
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(fields | settings))
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), dph.Model.from_pretrained(tmp_path)
    assert ours.config.max_position_embeddings == context
    ids = ids_of(2, context)
    assert_close(ours(ids).logits, theirs(ids).logits, 1e-5)
    ours.save_family(tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text()) == fields | settings


def test_settings_of_generation_that_transformers_warns_about_are_saved(tmp_path):
    write(tmp_path / "source", "llama", {})
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "transformers_version": "4.31.0"}  # Vicuna's
    (tmp_path / "source/generation_config.json").write_text(json.dumps(settings))
    model = dph.Model.from_pretrained(tmp_path / "source")
    model.generation_config.pad_token_id = 0  # as trainers do
    model.save_pretrained(tmp_path / "own")
    dph.Model.from_pretrained(tmp_path / "own").save_family(tmp_path / "back")
    written = json.loads((tmp_path / "back/generation_config.json").read_text())
    assert {key: written[key] for key in settings if key != "transformers_version"} == {
        "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2,
    }  # fmt: skip


def test_wrong_arguments_are_named(tmp_path):
    write(tmp_path, "qwen3", {})
    for dtype in ("int8", "real", torch.int32, 3):
        with pytest.raises(UserError, match=r"^dtype: expected one of float64, .* or auto, got "):
            dph.Model.from_pretrained(tmp_path, dtype=dtype)
    with pytest.raises(UserError, match=r"^config: expected a dph\.ModelConfig, or the path of one, got a Qwen3Config"):
        dph.Model.from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path))
    assert dph.ModelConfig.from_pretrained(tmp_path / "config.json").family == "qwen3"
    with pytest.raises(ValueError, match="expected norm = layer, as in the released layout, got rms"):
        dph.Model.from_pretrained(tmp_path).save_official(tmp_path / "released")


PEAK = """
import re, sys, torch, dph
peak = lambda: int(re.search("VmHWM: *(\\d+)", open("/proc/self/status").read().replace("\t", " "))[1]) * 1024
dtype = getattr(torch, sys.argv[3])
dph.Model.from_pretrained(sys.argv[1], dtype=dtype)
before = peak()
model = dph.Model.from_pretrained(sys.argv[2], dtype=dtype)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak() - before) / size, model.dtype)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_memory_is_the_size_of_the_weights(dtype, tmp_path):
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    write(tmp_path / "small", "qwen3", small)
    large = {"vocab_size": 20_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    write(tmp_path / "large", "qwen3", large, dtype=torch.bfloat16, max_shard_size="40MB")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large"), dtype]
    ratio, got = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert got == f"torch.{dtype}"
    assert 0.9 < float(ratio) < 1.2


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_padding_packing_and_memory_change_nothing(name, tmp_path):
    theirs = write(tmp_path, *CASES[name])
    ours = dph.Model.from_pretrained(tmp_path)
    ids = ids_of(2, 24)
    expected = theirs(ids).logits
    documents = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    assert_close(ours(ids, position_ids=documents).logits[:, :10], expected[:, :10], 1e-5)
    for kind in ("kv", "hidden"):
        memory = dph.Memory(length=32, kind=kind)
        steps = [ours(part, past_key_values=memory).logits for part in ids.split(7, 1)]
        assert_close(torch.cat(steps, 1), expected, 1e-5)


def test_longer_rows_than_the_context_are_refused(tmp_path):
    write(tmp_path, "llama", {})
    model = dph.Model.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected at most 64 tokens .*, got 65"):
        model(ids_of(1, 65))


@pytest.fixture(scope="module")
def stories(shared):
    return shared / "real/stories260k"


def test_a_real_model_speaks_as_in_transformers(stories, tmp_path):
    theirs, ours = AutoModelForCausalLM.from_pretrained(stories), dph.Model.from_pretrained(stories)
    theirs = theirs.float().eval()
    ids = torch.randint(3, 512, (2, 200), generator=torch.Generator().manual_seed(0))
    assert_close(ours.float()(ids).logits, theirs(ids).logits, 1e-5)
    for seed in range(20):
        prompt = torch.randint(3, 512, (1, 4 + seed), generator=torch.Generator().manual_seed(seed))
        options = {"do_sample": False, "max_new_tokens": 24, "attention_mask": torch.ones_like(prompt)}
        assert torch.equal(ours.generate(prompt, **options), theirs.generate(prompt, **options))


def test_the_command_line_writes_the_family_s_directory(tmp_path, capsys):
    from dph.cli.main import main

    source, back = tmp_path / "source", tmp_path / "back"
    theirs = write(source, *CASES["qwen3"])
    shutil.copy(Path(__file__).parents[1] / "train/interrupted_runs/model/tokenizer.json", source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "tokenizer.model").write_bytes(b"of sentencepiece")
    main(["convert", str(source), str(back), "--to", "hf"])
    assert {path.name for path in back.iterdir()} == {path.name for path in source.iterdir()}
    ids = ids_of(1, 9)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(back)(ids).logits, theirs(ids).logits)
    model = dph.Model.from_pretrained(source, reward_heads=["judge"])
    model.untrained_heads.clear()
    model.save_pretrained(tmp_path / "own")
    capsys.readouterr()
    main(["convert", str(tmp_path / "own"), str(tmp_path / "again"), "--to", "hf"])
    assert f"again: {theirs.num_parameters():,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize("template", ["llama3", "zephyr", "phi3", "qwen2"])
def test_a_classifier_finds_the_end_of_an_answer_in_the_chat_format(template, tmp_path):
    tokenizer = made(template)
    write(tmp_path, "llama", {"vocab_size": len(tokenizer), "max_position_embeddings": 512})
    tokenizer.save_pretrained(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, num_labels=1).eval()
    model.untrained_heads.clear()
    conversation = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Fine, thanks!"}]
    ids = torch.tensor([dph.chat.encode(conversation, tokenizer).tokens])
    assert_close(model(ids).logits[:, 0], model.score(tokenizer, [conversation]), 1e-5)
    model.save_pretrained(tmp_path)
    assert_close(AutoModelForSequenceClassification.from_pretrained(tmp_path)(ids).logits, model(ids).logits, 1e-5)


def test_a_classifier_of_a_family_begins_with_an_untrained_head(tmp_path, caplog):
    write(tmp_path, "qwen2", {"tie_word_embeddings": True})
    model = RewardModel.from_pretrained(tmp_path, num_labels=1)
    assert model.untrained_heads == {"default"}
    assert "no weights for reward heads default" in caplog.text
    assert model.lm_head.weight is model.backbone.embedding.weight
