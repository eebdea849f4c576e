"""Every stage trains a model in the form of a family, and an interrupted run resumes to the same weights."""

import copy

import pytest
import torch
from helpers.stages import STAGES, Killed, Trap, die, figures, go, records, same, settings, taken, tiny, weights
from helpers.texts import small_tokenizer
from helpers.tiny import FORMS

import dph
from dph.train.build import make_stage

CHANGES = {"sft": {"data__memory_kind": "hidden", "checkpointing": "block"}, "align": {"batch__tokens": 110}}


@pytest.mark.parametrize("form", ["llama", "qwen3"])
@pytest.mark.parametrize("stage", STAGES)
def test_stages_train_and_resume(stage, form, tmp_path):
    model, changes = tiny(**FORMS[form]), CHANGES.get(stage, {})
    recipe = settings(stage, tmp_path / "whole", **changes)
    before = weights(model)
    whole = go(recipe, model=copy.deepcopy(model))
    after = weights(whole.model)
    moved = {name for name in after if name in before and not torch.equal(after[name], before[name])}
    expected = {
        "vocab": {"backbone.embedding.weight", *({"lm_head.weight"} if form == "llama" else ())},
        "head": set(),
    }
    blocks = {name for name in before if not name.startswith("heads.")}
    assert moved - {name for name in moved if name.startswith("heads.")} == expected.get(stage, blocks)
    interrupted = settings(stage, tmp_path / "parts", **changes)
    data = Trap(records(stage), taken(recipe, 5) + 1, die)
    with pytest.raises(Killed):
        go(interrupted, data, model=copy.deepcopy(model))
    resumed = go(interrupted, model=copy.deepcopy(model), resume=True)
    same(whole, resumed)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")


def test_segments_longer_than_the_model_s_context_are_noted(tmp_path):
    for limit in (23, 24):
        model = tiny(**FORMS["llama"], max_position_embeddings=limit)
        notes = make_stage(settings("sft", tmp_path), model, small_tokenizer(), records("sft"), {}).notes
        assert [note for note in notes if "data.context: 24 tokens, longer than the 23" in note] == [*notes][
            : 24 - limit
        ]


@pytest.mark.parametrize("form", FORMS)
def test_a_trained_family_is_saved_and_opened(form, tmp_path):
    result = go(settings("align", tmp_path / "run"), model=tiny(**FORMS[form]))
    opened = dph.Model.from_pretrained(tmp_path / "run/model")
    assert not opened.untrained_heads
    for (name, a), b in zip(weights(result.model).items(), weights(opened).values(), strict=True):
        assert torch.equal(a, b), name
