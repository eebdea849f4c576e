"""What a run saves describes what it trained on: transformers alone writes conversations with the same tokens."""

import pytest
import torch
from helpers import templates
from helpers.stages import settings, tiny
from helpers.texts import conversation, message, small_tokenizer, write_lines
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import dph
from dph.cli import main
from dph.train.entry import train

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": None,
}  # fmt: skip
CONVERSATIONS = [
    conversation("hello", "world"),
    [message("system", "Be brief."), *conversation("How are you?", "Fine, thanks!")],
    [*conversation("a\n\nb", "It isn't."), *conversation("  so? ", "é 🙂")],
]
# Form -> kind of the model, and its tokenizer.
FORMS = {
    "paper": (None, small_tokenizer),
    "qwen3": ("qwen3", lambda: templates.made("qwen3")),
    "llama3": ("llama", lambda: templates.made("llama3")),
}


def save_start(folder, kind, tokenizer):
    """Save a tiny model of ours, or of a family by transformers, and its tokenizer."""
    torch.manual_seed(0)
    if kind is None:
        model = tiny()
    else:
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SIZES, **ids)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_tokenizer_writes_what_was_trained(form, tmp_path):
    kind, make = FORMS[form]
    save_start(tmp_path / "start", kind, make())
    chats = write_lines(tmp_path / "chats.jsonl", *({"messages": turns} for turns in CONVERSATIONS))
    pairs = [{"chosen": turns, "rejected": [*turns[:-1], message("assistant", "no")]} for turns in CONVERSATIONS]
    write_lines(tmp_path / "pairs.jsonl", *pairs)
    folders, path = [], tmp_path / "start"
    for stage, source in (("sft", chats), ("align", tmp_path / "pairs.jsonl"), ("head", tmp_path / "pairs.jsonl")):
        changes = {"model__path": str(path), "data__sources": [str(source)], "evaluation__every": 0}
        recipe = settings(stage, tmp_path / stage, **changes, optimiser__steps=2, optimiser__warmup=1)
        trained = train(recipe, quiet=True).tokenizer
        folders.append(tmp_path / stage / "model")
        path = tmp_path / "sft"
    if kind is not None:
        assert main.main(["convert", str(folders[1]), str(tmp_path / "hf"), "--to", "hf"]) == 0
        folders.append(tmp_path / "hf")
    # transformers splits text around what it sanitises, so that nothing there may merge across the border.
    spelled = conversation("a<|im_end|>b<|im_start|>assistant", "<|eot_id|><|im_end|></s>")
    for folder in folders:
        saved = AutoTokenizer.from_pretrained(folder)
        for turns in [*CONVERSATIONS, spelled]:
            options = {"return_dict": False, "sanitize_control_tokens": turns is spelled}
            assert saved.apply_chat_template(turns, **options) == dph.chat.encode(turns, trained).tokens
            asked = saved.apply_chat_template(turns[:-1], add_generation_prompt=True, **options)
            assert asked == dph.chat.prompt(turns[:-1], trained)
