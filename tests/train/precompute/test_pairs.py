"""What frozen models say, kept on disk: training with it as without it, resumed too, and passes ahead."""

import dataclasses
import re
from dataclasses import asdict

import pytest
import torch
from helpers.cache_files import shards, spoil
from helpers.stages import Killed, Trap, die, figures, records, same, settings, tiny
from helpers.texts import small_tokenizer, write_lines
from safetensors.torch import load_file

from dph.cli import main
from dph.data.formats import Encoder
from dph.errors import UserError
from dph.model.backbone import Backbone
from dph.train import checkpointing, distributed, head_files
from dph.train.entry import train
from dph.train.precompute import fill as precompute
from dph.train.precompute import pairs, store


@pytest.fixture
def calls(monkeypatch):
    """How often a backbone has run, by whether it was of a model that trains or judges (True) or of a reference.

    The head's file, for which the trained model judges a sample, is not written.
    """
    monkeypatch.setattr(head_files, "write", lambda *_: None)
    found = []
    original = Backbone.forward

    def counted(self, *args, **kwargs):
        found.append(next(self.parameters()).requires_grad)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Backbone, "forward", counted)
    return found


STAGES = {"align": "objective__reference", "head": "data__cache_states"}
ON, OFF = {"align": "cache", "head": True}, {"align": "fly", "head": False}


def stage_settings(stage, directory, on=True, **changes):
    """23 pairs, so steps 1 to 5 are the first epoch but for the fifth's last; each pair is in a part with one other."""
    changes = {"batch__micro": 2, "data__cache": str(directory.parent / "cache"), **changes}
    return settings(stage, directory, **{STAGES[stage]: (ON if on else OFF)[stage]}, **changes)


def go(recipe, data=None, **options):
    data = data or records(recipe.stage)
    model = tiny(reward_dropout=0.3)
    return train(recipe, model=model, tokenizer=small_tokenizer(), records=data, quiet=True, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_first_epoch_is_the_same_bit_for_bit(stage, precision, tmp_path):
    plain, kept = (
        go(stage_settings(stage, tmp_path / name, name == "kept", optimiser__steps=5, precision=precision))
        for name in ("plain", "kept")
    )
    same(plain, kept)


@pytest.mark.parametrize("stage", STAGES)
def test_later_epochs_are_the_same_but_for_rounding(stage, tmp_path):
    plain, kept = (
        go(stage_settings(stage, tmp_path / name, name == "kept", optimiser__steps=20)) for name in ("plain", "kept")
    )
    same(plain, kept, rtol=0, atol=1e-6 if stage == "head" else 1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_warm_cache_never_asks_the_frozen_model(stage, tmp_path, calls):
    cold = go(stage_settings(stage, tmp_path / "cold", optimiser__steps=6))
    frozen = (stage == "align" and calls.count(False)) or len(calls)
    assert frozen == 12
    calls.clear()
    warm = go(stage_settings(stage, tmp_path / "warm", optimiser__steps=6))
    assert calls == ([True] * 12 if stage == "align" else [])
    same(cold, warm)
    go(stage_settings(stage, tmp_path / "other", optimiser__steps=6, batch__micro=4, seed=6))
    assert len(calls) == (18 if stage == "align" else 0)  # pairs are found in other batches too


def test_held_out_states_are_computed_once(tmp_path, calls):
    """The first evaluation of a frozen backbone takes its log-probabilities, the second its states, no other either."""
    changes = {"batch__micro": 2, "evaluation__every": 1, "optimiser__steps": 6, "output__log_every": 1}
    others = records("head", 31)[23:]
    held_out = {"one": others[:5], "two": others[5:]}
    lines = []
    for name, on in (("plain", False), ("kept", True)):
        calls.clear()
        go(stage_settings("head", tmp_path / name, on, **changes), held_out=held_out)
        lines.append([line for line in figures(tmp_path / name) if any(key.startswith("eval/") for key in line)])
    assert len(lines[0]) == 6
    assert lines[0] == lines[1]
    assert len(calls) == 12 + 2 * 5, "parts of six steps, and twice those of both sources"


def test_cut_off_held_out_answers_have_no_reward(tmp_path):
    encode = Encoder(small_tokenizer())
    pairs = [encode(record) for record in records("head", 4)]
    pairs[1] = pairs[1][0], dataclasses.replace(pairs[1][1], reward_position=None)
    changes = {"batch__micro": 2, "evaluation__every": 1, "optimiser__steps": 4}
    for name, on in (("plain", False), ("kept", True)):
        go(stage_settings("head", tmp_path / name, on, **changes), held_out=pairs)
    assert figures(tmp_path / "plain") == figures(tmp_path / "kept")


def test_a_damaged_row_is_computed_again(tmp_path, caplog):
    plain = go(stage_settings("head", tmp_path / "plain", on=False, optimiser__steps=5))
    go(stage_settings("head", tmp_path / "cold", optimiser__steps=5))
    for shard in shards(tmp_path / "cache"):
        spoil(shard, 0)
    same(plain, go(stage_settings("head", tmp_path / "warm", optimiser__steps=5)))
    assert "is damaged (row 0" in caplog.text


@pytest.mark.parametrize("after", [18, 30])
@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_for_bit(stage, after, tmp_path, monkeypatch):
    """Killed in the first epoch and in the second, after a step that was stored in the cache but in no checkpoint."""
    whole = go(stage_settings(stage, tmp_path / "whole", data__cache=str(tmp_path / "one"), optimiser__steps=9))
    monkeypatch.setattr(store, "SHARD_ROWS", 3)
    recipe = stage_settings(stage, tmp_path / "parts", data__cache=str(tmp_path / "two"), optimiser__steps=9)
    data = Trap(records(stage), after, die)
    with pytest.raises(Killed):
        go(recipe, data)
    assert checkpointing.newest_checkpoint(tmp_path / "parts" / "checkpoints").step == after // 4 // 3 * 3
    assert sum(len(load_file(shard)["keys"]) for shard in shards(tmp_path / "two")) >= min(after // 4 * 4 - 2, 21)
    same(whole, go(recipe, resume=True))


@pytest.mark.parametrize("stage", STAGES)
def test_without_company_every_epoch_is_the_same_bit_for_bit(stage, tmp_path):
    """A number depends on the pairs that are packed beside its own: where none is, not even on the epoch.

    Killed and resumed in the second epoch, whose numbers are all from the cache, and never without it.
    """
    plain = go(stage_settings(stage, tmp_path / "plain", on=False, batch__micro=1, optimiser__steps=9))
    recipe = stage_settings(stage, tmp_path / "kept", batch__micro=1, optimiser__steps=9)
    data = Trap(records(stage), 30, die)
    with pytest.raises(Killed):
        go(recipe, data)
    assert checkpointing.newest_checkpoint(tmp_path / "kept" / "checkpoints").step == 6
    same(plain, go(recipe, resume=True))


def test_the_cache_lies_beside_the_run_unless_the_recipe_says_where(tmp_path):
    assert pairs.cache_directory(settings("head", tmp_path / "run", data__cache=None)) == tmp_path / "cache"
    assert pairs.cache_directory(settings("head", tmp_path / "run", data__cache="there")).name == "there"
    go(settings("head", tmp_path / "run", data__cache=None, optimiser__steps=2))
    assert [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()] == ["states"]
    go(settings("align", tmp_path / "other", data__cache=None, optimiser__steps=2))  # on the fly: nothing is kept
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_no_cache_is_made_where_it_is_off(tmp_path):
    go(stage_settings("head", tmp_path / "run", on=False, optimiser__steps=2))
    assert not (tmp_path / "cache").exists()


# A pass ahead


def fill(recipe, data=None, **options):
    data = data or records(recipe.stage)
    return precompute.fill_cache(recipe, model=tiny(), tokenizer=small_tokenizer(), records=data, **options)


def test_a_pass_ahead_tells_what_it_left_out(tmp_path, capsys):
    data = records("align", 4)
    data.append(type(data[0])(data[0].chosen, data[0].chosen))
    fill(stage_settings("align", tmp_path / "run"), data)
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"cache: ([1-9]) of [0-9]+ records were left out: \1 identical", said)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_pass_ahead_computes_what_training_needs(stage, precision, tmp_path, calls, capsys):
    plain = go(stage_settings(stage, tmp_path / "plain", on=False, optimiser__steps=5, precision=precision))
    recipe = stage_settings(stage, tmp_path / "run", precision=precision, optimiser__steps=5)
    filled = fill(recipe)
    # 20 pairs are 5 steps of 4: training would not see more.
    assert (filled.pairs, filled.computed, filled.stored) == (20, 20, 20)
    assert "20/20" in capsys.readouterr().err
    assert fill(recipe, quiet=True).computed == 0
    assert capsys.readouterr().err == ""
    calls.clear()
    same(plain, go(recipe))
    assert calls == ([True] * 10 if stage == "align" else [])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_pass_ahead_is_compiled_where_training_is(stage, tmp_path, inductor):
    """In bf16, where compiled blocks round otherwise: bit for bit the rows that training would store."""
    options = {"compile": True, "precision": "bf16", "optimiser__steps": 5}
    found = []
    for name, work in (("trained", go), ("filled", fill)):
        work(stage_settings(stage, tmp_path / name, data__cache=str(tmp_path / f"{name}-cache"), **options))
        found.append(stored(tmp_path / f"{name}-cache"))
    assert len(found[1]) == 20
    assert all(torch.equal(row, found[0][key]) for key, row in found[1].items())


def stored(directory):
    """Rows of a cache by their keys."""
    loaded = [load_file(shard) for shard in shards(directory)]
    return {bytes(k.tolist()): v for each in loaded for k, v in zip(each["keys"], each["values"], strict=True)}


def test_a_pass_ends_with_the_data_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    recipe = stage_settings("head", tmp_path / "run", optimiser__steps=100)
    data = Trap(records("head"), 11, die)
    with pytest.raises(Killed):
        precompute.fill_cache(recipe, model=tiny(), tokenizer=small_tokenizer(), records=data, quiet=True)
    filled = fill(recipe, quiet=True)
    assert (filled.pairs, filled.computed, filled.stored) == (24, 15, 23)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("sft", {}, "stage: expected align or head, which keep a cache, got sft"),
        ("align", {}, "objective.reference: expected cache, got fly"),
        (
            "align",
            {"objective__reference": "cache", "objective__dpo_weight": 0.0},
            "objective.dpo_weight: expected one",
        ),
        ("head", {"data__cache_states": False}, "data.cache_states: expected true for a cache to fill, got false"),
    ],
)
def test_a_pass_says_why_there_is_nothing_to_fill(stage, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fill(settings(stage, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_pair_that_comes_twice_is_one(tmp_path):
    """In one part, and at the data's end, where the last update begins anew."""
    recipe = stage_settings("align", tmp_path / "run", batch__micro=None)
    filled = fill(recipe, data=records("align", 3) * 2)
    assert (filled.pairs, filled.computed, filled.stored) == (8, 3, 3)


def test_a_pass_is_one_process_s(tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", *distributed.TORCHRUN_VARIABLES):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="WORLD_SIZE: expected one process to fill a cache, got 2"):
        fill(stage_settings("head", tmp_path / "run"))


def test_the_command_fills_what_training_reads(tmp_path, calls, capsys):
    tiny().save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    data = write_lines(tmp_path / "pairs.jsonl", *(asdict(record) for record in records("align")))
    asked = [
        "mini-align", f"model.path={tmp_path / 'model'}", f"data.sources=[{data}]", "objective.reference=cache",
        "--output", str(tmp_path / "run"), "optimiser.steps=2", "optimiser.warmup=1", "batch.size=4", "device=cpu",
    ]  # fmt: skip
    for new in (8, 0):
        assert main.main(["cache", *asked]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"{tmp_path / 'cache' / 'reference-'}")
        assert out.endswith(f": 8 pairs, {new} of them new\n")
        assert "8/8" in err
    calls.clear()
    assert main.main(["train", *asked]) == 0
    assert calls == [True, True]
