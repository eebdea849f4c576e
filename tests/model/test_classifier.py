"""Classifiers made of a model with a head give its rewards in transformers, in a process without dph."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.texts import conversation, small_tokenizer

import dph
from dph import chat
from dph.cli.main import main
from dph.errors import UserError

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1, "eos_token_id": 0,
}  # fmt: skip
HEADS = {
    "plain": {"reward_pooler": "identity"},
    "standardised": {"reward_pooler": "identity", "reward_standardised": True},
    "bert": {"reward_pooler": "bert", "reward_layer": 2},
    "swiglu": {"reward_pooler": "swiglu_t5", "reward_layer": 1, "reward_standardised": True},
    "first": {"reward_pooler": "identity", "reward_layer": 0},
    "mix": {"reward_pooler": "bert", "reward_layer": [2, 0], "reward_standardised": True},
    "mix with the last": {"reward_pooler": "identity", "reward_layer": [1, -1]},
}
# Reads the folders and rows of ids of a JSON file, and prints the logits, padded on the right and on the left.
SCRIPT = """
import json, sys
sys.modules["dph"] = sys.modules["dph_kernels"] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folders, rows = json.load(open(sys.argv[1]))
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    results = [type(model).__name__]
    for dtype in (torch.float32, torch.float64):
        for side in ("right", "left"):
            batch = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
            with torch.no_grad():
                results.append(model.eval().to(dtype)(**batch).logits[:, 0].double().tolist())
    print(json.dumps(results))
"""


def family_folder(family, path):
    """A tiny model of a family, with the tokenizer of the tests; its padding token is the end-of-turn token."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = small_tokenizer()
    config = AutoConfig.for_model(family, **SIZES, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(path)
    return path


def model_folder(family, form, path):
    """A model of a family with a trained head."""
    model = dph.Model.from_pretrained(family, reward_heads=["good"], **form).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.heads.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + 0.5)
    model.untrained_heads.clear()
    model.save_pretrained(path)
    small_tokenizer().save_pretrained(path)
    return path


def in_transformers(folders, rows, tmp_path):
    """Class, and logits with both paddings, in fp32 and then in fp64, of each folder."""
    (tmp_path / "input.json").write_text(json.dumps([list(map(str, folders)), rows]))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "input.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("family", "heads"), [("llama", list(HEADS)), ("qwen3", ["plain", "swiglu"])])
def test_scores_are_ours(family, heads, tmp_path, capsys):
    start, tokenizer = family_folder(family, tmp_path / "start"), small_tokenizer()
    talks = [conversation(f"hello {'dogs ' * i}", f"late {i} fox") for i in range(6)]
    rows = []
    for talk in talks:
        encoded = chat.encode(talk, tokenizer)
        rows.append(encoded.tokens[: encoded.reward_position + 1])
    folders, expected = [], []
    for name in heads:
        source = model_folder(start, HEADS[name], tmp_path / f"{name}-model")
        folders.append(tmp_path / name)
        assert main(["convert", str(source), str(folders[-1]), "--to", "classifier"]) == 0
        expected.append(dph.Model.from_pretrained(source).double().score(tokenizer, talks, "good").double())
    assert "ForSequenceClassification; texts end" in capsys.readouterr().out
    results = in_transformers(folders, rows, tmp_path)
    for (kind, *sides), name, rewards in zip(results, heads, expected, strict=True):
        assert kind.endswith("ForSequenceClassification") == (name == "plain")
        for logits, bound in zip(map(torch.tensor, sides), (5e-6, 5e-6, 1e-6, 1e-6), strict=True):
            error = (logits.double() - rewards).abs().max() / rewards.abs().max()
            assert error < bound, (name, error)
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "modeling_reward_classifier.py" not in names
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert config["id2label"] == {"0": "good"}
    assert config["pad_token_id"] != chat.markup(tokenizer).end_of_turn


def test_what_is_refused(tmp_path, refused):
    small = dph.Model(dph.ModelConfig(vocab_size=len(small_tokenizer()), embedding_size=8, hidden_size=16,
        intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, im_end_token_id=None))  # fmt: skip
    small.save_pretrained(tmp_path / "own")
    small_tokenizer().save_pretrained(tmp_path / "own")
    words = ("convert", str(tmp_path / "own"), str(tmp_path / "out"), "--to")
    assert "family: expected a model that comes from a Hugging Face family" in refused(*words, "classifier")
    assert "--head: expected none with --to own, got default" in refused(*words, "own", "--head", "default")
    assert "head: expected one of default, got 'x'" in refused(*words, "classifier", "--head", "x")
    start = family_folder("llama", tmp_path / "start")
    message = refused("convert", str(start), str(tmp_path / "out"), "--to", "classifier")
    assert "--head: expected one of the heads, got none" in message
    assert not (tmp_path / "out").exists()


def test_without_trust_nothing_opens_with_fresh_weights(tmp_path):
    """The class of the folder has a model type of its own, so that no class of transformers passes for it."""
    from transformers import AutoModelForSequenceClassification

    start = family_folder("llama", tmp_path / "start")
    source = model_folder(start, HEADS["bert"], tmp_path / "model")
    main(["convert", str(source), str(tmp_path / "out"), "--to", "classifier"])
    with pytest.raises((ValueError, EOFError, OSError)):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=False)
    with pytest.raises(UserError):
        dph.Model.from_pretrained(tmp_path / "out")
