"""What a recipe starts from: files, tokenizer, model and heads; and all stages in a row by recipe alone."""

import gc
import json
import sys
import weakref

import pytest
import torch
from helpers import templates
from helpers.stages import records as stage_records
from helpers.stages import settings as stage_settings
from helpers.stages import tiny, weights
from helpers.texts import TEXTS, conversation, small_tokenizer, write_lines
from transformers import AutoTokenizer

import dph
from dph.data import dataset, tokenizer
from dph.errors import UserError
from dph.model import loading
from dph.train import build, recipe
from dph.train.entry import train

CONFIG = {
    "embedding_size": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "reward_heads": [],
}


@pytest.fixture
def files(tmp_path):
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_lines(tmp_path / "text.jsonl", *({"text": f"The quick brown fox {i}."} for i in range(9)))
    write_lines(tmp_path / "chats.jsonl", *({"messages": conversation(f"hello {i}", f"world {i}")} for i in range(9)))
    pairs = ({"prompt": f"hello {i}", "chosen": f"world {i}", "rejected": "dogs"} for i in range(9))
    write_lines(tmp_path / "pairs.jsonl", *pairs)
    sst2 = ({"idx": i, "sentence": f"late {i}", "label": i % 2} for i in range(9))
    write_lines(tmp_path / "tasks/glue/sst2/train.jsonl", *sst2)
    sst2 = ({"idx": i, "sentence": f"lazy {i}", "label": i % 2} for i in range(5))
    write_lines(tmp_path / "tasks/glue/sst2/validation.jsonl", *sst2)
    return tmp_path


def make(files, stage, sources, **model):
    values = {
        "stage": stage,
        "model": model,
        "data": {"sources": sources, "directory": str(files / "tasks"), "context": 300, "memory": 16},
        "optimiser": {"lr": 0.01, "warmup": 1, "steps": 2},
        "batch": {"size": 2},
        "evaluation": {"sources": [{"source": "task:glue/sst2", "limit": 3}], "directory": str(files / "tasks")},
        "output": {"directory": str(files / stage)},
        "device": "cpu",
    }
    return recipe.from_dict(json.loads(json.dumps(values)))


def test_all_stages_in_a_row(files):
    tokenizer = str(files / "tokenizer")
    (files / "tokenizer/chat_template.jinja").unlink()  # as of an earlier version
    text, chats, pairs = (str(files / f"{name}.jsonl") for name in ("text", "chats", "pairs"))
    mix = [{"source": "task:glue/sst2", "weight": 2.0}, chats]
    train(make(files, "pretrain", [text], config=CONFIG, tokenizer=tokenizer), quiet=True)
    train(make(files, "vocab", mix, path=str(files / "pretrain")), quiet=True)
    sft = train(make(files, "sft", mix, path=str(files / "vocab/model")), quiet=True)
    assert sft.evaluation.keys() == {"loss", "token_accuracy", "entropy"}
    assert sft.model.head_names == []
    assert AutoTokenizer.from_pretrained(files / "sft/model").chat_template == dph.chat.TEMPLATE
    short = make(files, "align", [pairs], path=str(files / "sft")).as_dict()
    short["data"]["context"], short["output"]["directory"] = 80, str(files / "short")
    with pytest.raises(
        UserError,
        match=r"glue/sst2: expected held-out pairs, got none: "
        r"3 of 3 records were left out: 3 longer than 80 tokens \(data\.context\)$",
    ):
        train(recipe.from_dict(short), quiet=True)
    for stage in ("align", "head"):
        result = train(make(files, stage, [pairs, "task:glue/sst2"], path=str(files / "sft")), quiet=True)
        assert result.evaluation.keys() == {"reward_accuracy", "logprob_accuracy"}
        model = dph.Model.from_pretrained(files / stage / "model")
        assert model.head_names == ["default"]
        assert not model.untrained_heads
        assert torch.isfinite(model.score(result.tokenizer, [conversation("hello", "world")])).all()


def test_fresh_weights_follow_the_seed(files):
    options = {"config": CONFIG, "tokenizer": str(files / "tokenizer")}
    one, tokenizer = build.open_model(make(files, "pretrain", [], **options))
    two, _ = build.open_model(make(files, "pretrain", [], **options))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.config.vocab_size == len(tokenizer)
    assert one.config.im_end_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (one.config.eos_token_id, one.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_a_tokenizer_with_a_chat_template_of_its_own_gets_no_chat_tokens(files):
    made = templates.made("llama3")
    made.save_pretrained(files / "own")
    model, tokenizer = build.open_model(make(files, "pretrain", [], config=CONFIG, tokenizer=str(files / "own")))
    assert len(tokenizer) == len(made)
    assert model.config.im_end_token_id == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert dph.chat.encode(conversation("a", "b"), tokenizer) == dph.chat.encode(conversation("a", "b"), made)
    model.config.im_end_token_id = 3
    with pytest.raises(UserError, match=r"expected its end-of-turn token '<\|eot_id\|>' as id 3, got"):
        loading.check_tokenizer(model, tokenizer)


def held_out(r):
    section = r.evaluation
    return dataset.open_held_out(section.sources, r.kind, directory=section.directory, seed=r.seed)


def test_held_out_sources_have_names_of_their_own(files):
    r = make(files, "sft", [])
    sources = [{"source": "task:glue/sst2"}, {"source": "task:glue/sst2", "split": "train"}]
    r = recipe.from_dict({**r.as_dict(), "evaluation": {"sources": sources, "directory": str(files / "tasks")}})
    assert {name: len(found) for name, found in held_out(r).items()} == {
        "glue/sst2": 5,
        "glue/sst2, train": 9,
    }


def test_a_source_that_cannot_be_read_is_named_by_its_key(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    r = make(files, "sft", [str(files / "chats.jsonl"), str(files / "none.jsonl")])
    with pytest.raises(UserError, match=r"^data\.sources\.1: .*none\.jsonl: expected a JSONL file, got nothing there$"):
        dataset.open_training(
            r.data.sources, r.kind, directory=r.data.directory, seed=r.seed, consecutive=r.data.consecutive
        )
    r = recipe.from_dict({**r.as_dict(), "evaluation": {"sources": ["task:glue/sst2"]}})
    with pytest.raises(UserError, match=r"^evaluation\.sources\.0: hub data set .*glue: needs the package datasets"):
        held_out(r)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, r"model: expected either path or config, got neither"),
        ({"path": "x/y", "config": {}}, r"model: expected either path or config, got both"),
        ({"config": {}}, r"model\.tokenizer: expected a directory or hub name"),
        ({"config": {}, "tokenizer": "no/such/place"}, r"no/such/place: expected the directory of a tokenizer"),
        ({"path": "no/such/place"}, r"no/such/place: expected the directory of a model"),
        ({"config": {"hiden_size": 8}, "tokenizer": "tokenizer"}, r"config\.hiden_size: unknown key; .* hidden_size\?"),
        ({"config": {**CONFIG, "vocab_size": 9}, "tokenizer": "tokenizer"}, "tokenizer: expected at most 9 tokens"),
        (
            {"config": {**CONFIG, "im_end_token_id": 9}, "tokenizer": "tokenizer"},
            r"expected its end-of-turn token '<\|im_end\|>' as id 9, got 3",
        ),
    ],
)
def test_wrong_starts(files, monkeypatch, model, message):
    monkeypatch.chdir(files)
    with pytest.raises(UserError, match=message):
        build.open_model(make(files, "sft", ["chats.jsonl"], **model))


def test_a_tokenizer_trained_on_other_data_is_refused(files):
    """It has the size of the model's own, and other tokens; one with other settings but the same tokens is taken."""
    tiny().save_pretrained(files / "model")
    own = small_tokenizer()
    own.save_pretrained(files / "model")
    other = tokenizer.from_iterator([text[::-1] for text in TEXTS], len(own))
    other.save_pretrained(files / "other")
    start = {"path": str(files / "model"), "tokenizer": str(files / "other")}
    with pytest.raises(UserError, match=r"expected the vocabulary of .*model, whose token 26\d is '.*', got '"):
        build.open_model(make(files, "sft", ["chats.jsonl"], **start))
    build.open_model(make(files, "sft", ["chats.jsonl"], **{**start, "tokenizer": str(files / "tokenizer")}))


def test_a_damaged_model_is_named(files):
    tiny().save_pretrained(files / "model")
    small_tokenizer().save_pretrained(files / "model")
    weights = files / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"model.safetensors: expected a whole safetensors file, .*header"):
        build.open_model(make(files, "sft", ["chats.jsonl"], path=str(files / "model")))


def heads(**changes):
    return recipe.Objective(**changes)


def same(one, two, prefix=""):
    names = [name for name in weights(one) if name.startswith(prefix)]
    assert names
    return all(torch.equal(weights(one)[name], weights(two)[name]) for name in names)


def test_heads_that_are_there_stay():
    model = tiny()
    assert build.with_heads(model, heads()) is model
    changed = build.with_heads(model, heads(dropout=0.3))
    assert same(model, changed)
    assert (changed.config.reward_dropout, changed.heads["shared"].dropout.p) == (0.3, 0.3)
    assert not changed.untrained_heads


def test_the_first_heads_share_a_pooler():
    model = tiny(reward_heads=[])
    changed = build.with_heads(model, heads(heads=("helpful", "honest"), pooler="bert"))
    assert same(model, changed)
    assert changed.config.reward_heads == ["helpful", "honest"]
    assert list(changed.heads) == ["shared"]
    assert changed.untrained_heads == {"helpful", "honest"}
    with pytest.raises(ValueError, match="holds no weights"):
        changed.eval().check_heads("helpful")


def test_a_later_head_brings_its_own_pooler():
    model = tiny()
    changed = build.with_heads(model, heads(heads=("boolq",)))
    assert same(model, changed)
    assert changed.config.task_heads == ["boolq"]
    assert changed.untrained_heads == {"boolq"}
    assert not torch.equal(weights(changed)["heads.task_boolq.reward.boolq.weight"], torch.zeros(1, 16))


def test_heads_of_another_form_leave_the_others(tmp_path):
    model = tiny(reward_heads=["default", "helpful"])
    model.head_records["helpful"] = {"pairs": 5}
    asked = heads(heads=("default", "new"), pooler="bert", layer=1, dropout=0.2)
    changed = build.with_heads(model, asked)
    assert same(model, changed, "heads.shared.reward.helpful")
    assert same(model, changed, "heads.shared.pooler")
    assert changed.head_names == ["helpful", "default", "new"]
    assert changed.untrained_heads == {"default", "new"}
    assert changed.head_records == {"helpful": {"pairs": 5}}
    assert (
        changed.config.head_form("task_new")["pooler"] == changed.config.head_form("task_default")["pooler"] == "bert"
    )
    assert changed.heads.layers == [1, -1]
    assert build.with_heads(changed, asked) is changed
    assert build.with_heads(changed, heads(heads=("new",))) is changed  # null: the heads' own
    other = build.with_heads(changed, heads(heads=("new",), dropout=0.4))
    assert [other.heads[key].dropout.p for key in ("shared", "task_default", "task_new")] == [0.4, 0.2, 0.4]
    assert same(other, changed)


def test_another_pooler_is_another_head():
    model = tiny()
    changed = build.with_heads(model, heads(pooler="bert"))
    backbone = [name for name in weights(model) if not name.startswith("heads.")]
    assert all(torch.equal(weights(model)[name], weights(changed)[name]) for name in backbone)
    assert not same(changed, model, "heads.shared.reward")
    assert changed.untrained_heads == {"default"}


@pytest.mark.parametrize("stage", ["sft", "align", "head"])
def test_a_stage_is_freed_without_the_cyclic_collector(stage, tmp_path):
    """Reference models and memories take gigabytes: they go when the stage goes."""
    data, held_out = stage_records(stage), stage_records(stage, 3)
    made = build.make_stage(stage_settings(stage, tmp_path / "run"), tiny(), small_tokenizer(), data, held_out)
    made.next_batch()
    made.held_out.evaluate()
    freed = weakref.ref(made)
    gc.collect()
    gc.disable()
    try:
        del made
        assert freed() is None
    finally:
        gc.enable()
