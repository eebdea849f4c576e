"""Heads as files: saved alone, loaded next to others, refused on another backbone."""

import json

import pytest
import torch
from helpers.texts import small_tokenizer
from helpers.tiny import END, tiny_model, tokens

import dph
from dph.cli.main import main
from dph.errors import UserError
from dph.model import head_file

IDS = torch.cat([tokens(3, 9), torch.full((3, 1), END)], 1)


def other_head(seed=1, **form):
    """A model with the backbone of ``tiny_model()`` and another head."""
    model = tiny_model(reward_heads=("other",), **form)
    heads = tiny_model(seed, reward_heads=("other",), **form).heads.state_dict()
    model.heads.load_state_dict(heads)
    bare = tiny_model(reward_heads=()).state_dict()
    model.load_state_dict(bare, strict=False)
    return model


FORM = {"reward_pooler": "bert", "reward_layer": 1, "reward_standardised": True, "reward_dropout": 0.3}


def test_a_head_moves_to_a_model_with_the_same_backbone(tmp_path):
    source, model = other_head(**FORM), tiny_model()
    model.load_state_dict(tiny_model(reward_heads=()).state_dict(), strict=False)
    source.save_head(tmp_path / "other.head", about={"data": ["pairs.jsonl"]})
    before, expected = model.rewards(IDS), source.rewards(IDS)
    assert model.load_head(tmp_path / "other.head") == "other"
    assert model.head_names == ["default", "other"]
    rewards = model.rewards(IDS)
    assert torch.equal(rewards["default"], before["default"])
    torch.testing.assert_close(rewards["other"], expected["other"])
    assert model.load_head(tmp_path / "other.head", "again") == "again"
    torch.testing.assert_close(model.rewards(IDS)["again"], expected["other"])
    saved = head_file.read(tmp_path / "other.head")
    assert saved.about == {"data": ["pairs.jsonl"]}
    model.save_pretrained(tmp_path / "model")
    opened = dph.Model.from_pretrained(tmp_path / "model")
    assert opened.head_names == ["default", "other", "again"]
    for name, values in model.rewards(IDS).items():
        torch.testing.assert_close(opened.rewards(IDS)[name], values)
    opened.save_head(tmp_path / "back.head", "again")
    assert head_file.read(tmp_path / "back.head").form == saved.form


def test_a_head_of_several_on_one_pooler_is_saved_alone(tmp_path):
    model = tiny_model(reward_heads=("a", "b"))
    model.save_head(tmp_path, "b")
    bare = tiny_model(reward_heads=())
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("heads.")})
    bare.load_head(tmp_path)
    torch.testing.assert_close(bare.rewards(IDS)["b"], model.rewards(IDS)["b"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_digest_is_that_of_the_values(dtype):
    model = tiny_model().bfloat16()
    digest = head_file.backbone_digest(model.backbone)
    assert head_file.backbone_digest(model.to(dtype).backbone) == digest
    with torch.no_grad():
        model.backbone.output_norm.weight[0] += 1
    assert head_file.backbone_digest(model.backbone) != digest


def test_what_is_refused(tmp_path):
    model = other_head()
    model.save_head(tmp_path / "head")
    other = tiny_model(seed=5, reward_heads=())
    with pytest.raises(UserError, match=r"expected a head of this backbone, got one of '.*force=True takes it"):
        other.load_head(tmp_path / "head")
    other.load_head(tmp_path / "head", force=True)
    with pytest.raises(UserError, match="name: expected one that the model lacks, got 'other'"):
        other.load_head(tmp_path / "head", force=True)
    wide = tiny_model(hidden_size=32, reward_heads=())
    with pytest.raises(UserError, match="expected a head for states of 32 elements, got one for 16"):
        wide.load_head(tmp_path / "head")
    assert wide.head_names == []
    model.untrained_heads = {"other"}
    with pytest.raises(ValueError, match="the checkpoint holds no weights for it"):
        model.save_head(tmp_path / "none")
    with pytest.raises(UserError, match="name: expected one of a, b, got none"):
        tiny_model(reward_heads=("a", "b")).save_head(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    expected = "expected the directory of a reward head, got"
    places = {"": r"one without head\.json", "none": "nothing there", "head/head.json": "a file"}
    for place, got in places.items():
        with pytest.raises(UserError, match=f"{expected} {got}$"):
            other.load_head(tmp_path / place)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("format", 2, "format: expected 1, got 2"),
        ("form", {"pooler": "bert"}, "form: expected pooler, intermediate_size, dropout, layer, standardised, got"),
        ("backbone", {"name": "x"}, "backbone: expected name and digest"),
        ("hidden_size", "16", "hidden_size: expected a int, got '16'"),
    ],
)
def test_broken_descriptions(key, value, text, tmp_path):
    other_head().save_head(tmp_path)
    file = tmp_path / "head.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match=f"^{file}: {text}"):
        head_file.read(tmp_path)


def test_forms_are_checked(tmp_path):
    model = other_head()
    model.save_head(tmp_path)
    file = tmp_path / "head.json"
    fields = json.loads(file.read_text())
    fields["form"]["layer"] = 9
    file.write_text(json.dumps(fields))
    bare = tiny_model(reward_heads=())
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("heads.")})
    with pytest.raises(UserError, match=r"task_head_forms\.other\.layer: expected at most 1, got 9"):
        bare.load_head(tmp_path)
    assert bare.head_names == []


def test_the_command_lists_and_saves(tmp_path, capsys):
    other_head().save_pretrained(tmp_path / "model")
    main(["heads", "--save", str(tmp_path / "head"), "--model", str(tmp_path / "model")])
    text = capsys.readouterr().out
    assert "other" in text
    assert "swiglu_bert" in text
    main(["heads", str(tmp_path / "head"), "--json"])
    assert json.loads(capsys.readouterr().out)["name"] == "other"


def test_the_record_of_a_head_stays(tmp_path):
    model = other_head()
    model.head_records["other"] = {"pairs": 5}
    model.save_head(tmp_path / "first", about={"note": "mine"})
    second = dph.Model(model.config)
    second.load_head(tmp_path / "first", "again", force=True)
    second.save_head(tmp_path / "second", "again")
    assert head_file.read(tmp_path / "second").about == {"pairs": 5, "note": "mine"}


def test_a_model_with_an_untrained_head_of_another_form_is_converted(tmp_path):
    other_head().save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    model = dph.attach(tmp_path / "model", heads=("new",), pooler="bert")
    model.save_pretrained(tmp_path / "both")
    small_tokenizer().save_pretrained(tmp_path / "both")
    assert main(["convert", str(tmp_path / "both"), str(tmp_path / "out"), "--to", "own"]) == 0
    assert dph.Model.from_pretrained(tmp_path / "out").head_names == ["other"]
