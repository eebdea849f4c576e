"""A run resumes to what it was: other data, tokenizers and configurations are refused, other places are not."""

import json
import shutil

import pytest
import torch
from helpers.stages import records, same, settings, tiny
from helpers.texts import TEXTS, small_tokenizer, write_lines
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dph.cli import main
from dph.data import tokenizer
from dph.data.tokenizer import add_chat_tokens
from dph.errors import UserError
from dph.train import checkpointing, fingerprints, recipe
from dph.train.entry import train


def test_a_tokenizer_is_its_content(tmp_path):
    """Wherever it is, and whatever padding a caller has set; other merges or special tokens are another one."""
    small_tokenizer().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    add_chat_tokens(again)
    digest = fingerprints.of_tokenizer(small_tokenizer())
    assert fingerprints.of_tokenizer(again) == digest
    again(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert fingerprints.of_tokenizer(again) == digest
    again.pad_token = "a"
    assert fingerprints.of_tokenizer(again) != digest
    assert fingerprints.of_tokenizer(tokenizer.from_iterator(TEXTS[:1], 300)) != digest


@pytest.fixture
def material(tmp_path, monkeypatch):
    """A model, records and held-out records, in the current directory."""
    monkeypatch.chdir(tmp_path)
    small_tokenizer().save_pretrained("model")
    tiny().save_pretrained("model")
    for name, count in (("chats", 23), ("held-out", 5)):
        write_lines(tmp_path / f"{name}.jsonl", *({"messages": record.messages} for record in records("sft", count)))
    return tmp_path


def go(directory="run", data="chats.jsonl", model="model", steps=8, **options):
    """Train on the material, as far as ``steps``."""
    values = settings("sft", directory, output__save_every=1, output__keep=2, evaluation__every=2).as_dict()
    values["data"]["sources"] = [{"source": data}]
    values["evaluation"]["sources"] = [{"source": "held-out.jsonl"}]
    values["model"] = {"path": model}
    done = train(recipe.from_dict(values), quiet=True, **options)
    for number in range(steps + 1, 9):  # as if killed after step ``steps``
        shutil.rmtree(checkpointing.checkpoint_path(done.run, number), ignore_errors=True)
    return done


@pytest.fixture
def stopped(material):
    """The material with a run that was killed after step 7."""
    go(steps=7)
    return material


def change_line(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:] + lines[:1]))


def drop_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def change_tokenizer(path):
    tokenizer.from_iterator(["what the fox says"] * 4, len(small_tokenizer())).save_pretrained(path.parent / "model")


def change_config(path):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_base": 5000.0}))


CHANGES = {
    "order": ("chats.jsonl", change_line, "data.sources.0 (chats.jsonl): other records (also 23)"),
    "number": ("chats.jsonl", drop_line, "data.sources.0 (chats.jsonl): other records (22 in place of 23)"),
    "held out": ("held-out.jsonl", change_line, "evaluation.sources: held-out.jsonl: other records"),
    "tokenizer": ("model/tokenizer.json", change_tokenizer, "model.tokenizer: another tokenizer"),
    "config": ("model/config.json", change_config, "model: another configuration"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_refused_by_name_unless_forced(name, stopped):
    file, change, message = CHANGES[name]
    change(stopped / file)
    before = {path: path.read_bytes() for path in (stopped / "run").rglob("*.json")}
    with pytest.raises(UserError) as caught:
        go(resume=True)
    assert str(caught.value).startswith(f"{message}: expected what the run in run began with; ")
    assert "--force-resume" in str(caught.value)
    assert {path: path.read_bytes() for path in (stopped / "run").rglob("*.json")} == before
    assert go(force_resume=True).step == 8
    assert go(resume=True).step == 8  # from a checkpoint of what is now its own


def test_data_and_model_may_move_and_the_model_may_go(stopped):
    whole = go("whole")
    shutil.move("chats.jsonl", "moved.jsonl")
    shutil.move("model", "elsewhere")
    with pytest.raises(UserError, match=r"data\.sources\.0: chats\.jsonl: expected"):
        go(resume=True)
    same(whole, go(data="moved.jsonl", resume=True, steps=7))  # the model is gone
    config = json.loads((stopped / "run" / "config.json").read_text())
    assert config["data"]["sources"][0]["source"] == "moved.jsonl"
    same(whole, go(data="moved.jsonl", model="elsewhere", resume=True))
    assert main.main(["convert", "run/checkpoints/step-00000008", "converted", "--to", "own"]) == 0
    models = [load_file(path / "model.safetensors") for path in (whole.run / "model", stopped / "converted")]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_another_choice_of_held_out_records_is_no_change(stopped):
    values = json.loads((stopped / "run" / "config.json").read_text())
    values["evaluation"]["sources"][0]["limit"] = 3
    assert train(recipe.from_dict(values), resume=True, quiet=True).step == 8


def test_a_run_without_fingerprints_may_not_move(stopped):
    """Of an earlier version: nothing would notice other data."""
    for path in (stopped / "run" / "checkpoints").glob("step-*"):
        state = json.loads((path / "state.json").read_text())
        del state["fingerprints"]
        checkpointing.write_checkpoint(
            path, int(path.name[5:]), {file.stem: load_file(file) for file in path.glob("*.safetensors")}, state
        )
    shutil.copy("chats.jsonl", "moved.jsonl")
    with pytest.raises(UserError, match=r"data\.sources\.0\.source: expected chats\.jsonl, got moved\.jsonl"):
        go(data="moved.jsonl", resume=True)
    assert go(resume=True).step == 8
