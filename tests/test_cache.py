"""The cache of a frozen model's numbers: the store on disk, and training with it as without it."""

import errno
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from stages import records, settings, tiny, weights
from texts import small_tokenizer, write_lines

from dph import ahead, cache, cli, pair_cache, runs
from dph.backbone import Backbone
from dph.cache import Cache, fingerprint, pair_key
from dph.errors import UserError
from dph.records import encoder
from dph.trainer import train

WIDTH = 3


def keys(*numbers):
    return [bytes([n]) * 32 for n in numbers]


def rows(*numbers):
    return torch.tensor([[n, n + 0.5, -n] for n in numbers], dtype=torch.float32)


def shards(directory):
    return sorted(directory.rglob("*.safetensors"))


def spoil(shard, row):
    """Change a row's numbers, as a disk may, and not its check."""
    held = load_file(shard)
    held["values"][row] += 1
    save_file(held, shard)


# The store


def test_rows_come_back_from_memory_and_from_disk(tmp_path):
    store = Cache(tmp_path, WIDTH, rows=4)
    store.put(keys(*range(6)), rows(*range(6)))
    assert len(shards(tmp_path)) == 1  # four are on disk, two wait
    for key, row in zip(keys(*range(6)), rows(*range(6)), strict=True):
        assert torch.equal(store.get(key), row)
    assert store.get(keys(9)[0]) is None
    store.flush()
    store.flush()
    again = Cache(tmp_path, WIDTH)
    assert (len(store), len(again), len(shards(tmp_path))) == (6, 6, 2)
    assert all(torch.equal(again.get(k), r) for k, r in zip(keys(*range(6)), rows(*range(6)), strict=True))
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_the_first_row_of_a_key_stays_and_what_is_not_finite_is_left_out(tmp_path):
    store = Cache(tmp_path, WIDTH)
    store.put(keys(1), rows(1))
    store.put(keys(1, 2, 3), torch.stack([rows(7)[0], torch.full((3,), torch.nan), rows(3)[0]]))
    assert torch.equal(store.get(keys(1)[0]), rows(1)[0])
    assert store.get(keys(2)[0]) is None
    assert len(store) == 2


def test_what_is_read_can_be_changed(tmp_path):
    store = Cache(tmp_path, WIDTH, rows=1)
    store.put(keys(1), rows(1))
    store.get(keys(1)[0]).zero_()
    assert torch.equal(store.get(keys(1)[0]), rows(1)[0])


def test_values_are_read_when_they_are_asked_for(tmp_path, caplog):
    """A value that is damaged is found when it is read, and not before; all others are there."""
    store = Cache(tmp_path, WIDTH)
    store.put(keys(*range(8)), rows(*range(8)))
    store.flush()
    (shard,) = shards(tmp_path)
    spoil(shard, 5)
    store = Cache(tmp_path, WIDTH)
    assert not store._shards
    assert not caplog.records
    assert [store.get(key) is None for key in keys(*range(8))] == [i == 5 for i in range(8)]
    assert f"{shard} is damaged (row 5" in caplog.text
    store.put(keys(5), rows(5))
    store.flush()
    assert torch.equal(Cache(tmp_path, WIDTH).get(keys(5)[0]), rows(5)[0])  # the newer shard's


def test_damaged_shards_are_passed_over(tmp_path, caplog):
    store = Cache(tmp_path, WIDTH, rows=1)
    store.put(keys(1, 2, 3), rows(1, 2, 3))
    first, second, _ = shards(tmp_path)
    first.write_bytes(first.read_bytes()[:-4])
    second.write_bytes(b"")
    other = tmp_path / "0-other.safetensors"
    save_file({"keys": torch.zeros(1, 32, dtype=torch.uint8), "values": torch.zeros(1, WIDTH + 1)}, other)
    store = Cache(tmp_path, WIDTH)
    assert [store.get(key) is not None for key in keys(1, 2, 3)] == [False, False, True]
    assert len(caplog.records) == 3
    for path in (first, second, other):
        assert f"{path} is damaged" in caplog.text
    assert "expected rows of 3, got shape [1, 4]" in caplog.text


def test_leavings_of_a_killed_process_are_deleted_when_they_are_old(tmp_path, monkeypatch, caplog):
    (tmp_path / "1-a.partial").write_bytes(b"half")
    assert len(Cache(tmp_path, WIDTH)) == 0
    assert (tmp_path / "1-a.partial").exists()  # another process may be at it
    monkeypatch.setattr(cache, "STALE", -1)
    Cache(tmp_path, WIDTH)
    assert not (tmp_path / "1-a.partial").exists()
    assert "1-a.partial was left half written" in caplog.text


def test_two_writers_share_a_directory(tmp_path):
    one, two = Cache(tmp_path, WIDTH, rows=2), Cache(tmp_path, WIDTH, rows=2)
    for i in range(0, 8, 2):
        one.put(keys(i, i + 1), rows(i, i + 1))
        two.put(keys(i + 1, i + 2), rows(i + 1, i + 2))
    assert len(shards(tmp_path)) == 8
    both = Cache(tmp_path, WIDTH)
    assert len(both) == 9
    assert all(torch.equal(both.get(k), r) for k, r in zip(keys(*range(9)), rows(*range(9)), strict=True))


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_what_was_there(call, tmp_path, monkeypatch):
    store = Cache(tmp_path, WIDTH)
    store.put(keys(1), rows(1))
    store.flush()
    store.put(keys(2), rows(2))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os if call == "fsync" else cache.Path, call, full)
    with pytest.raises(OSError, match="No space left on device: the cache could not be written") as caught:
        store.flush()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    monkeypatch.undo()
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    store.flush()  # there is room again: nothing is lost
    assert len(Cache(tmp_path, WIDTH)) == 2


def test_errors_say_what_was_expected(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache: expected a directory, got .*file"):
        Cache(tmp_path / "file", WIDTH)
    with pytest.raises(UserError, match="width: expected at least 1, got 0"):
        Cache(tmp_path, 0)
    with pytest.raises(ValueError, match=r"values: expected shape \[2, 3\], got \[1, 3\]"):
        Cache(tmp_path, WIDTH).put(keys(1, 2), rows(1))


# Keys


def test_keys_differ_by_whatever_the_numbers_depend_on():
    chosen, rejected = encoder(small_tokenizer())(records("align", 1)[0])
    changed = [
        {"tokens": [*chosen.tokens[:-1], 5]},
        {"targets": [*chosen.targets[:-1], 5]},
        {"loss_mask": [not on for on in chosen.loss_mask]},
        {"reward_position": chosen.reward_position - 1},
        {"reward_position": None},
    ]
    pairs = [(chosen, rejected), (rejected, chosen)]
    pairs += [(replace(chosen, **change), rejected) for change in changed]
    pairs += [(rejected, replace(chosen, **change)) for change in changed]
    assert len({pair_key(model, pair) for model in ("a", "b") for pair in pairs}) == 2 * len(pairs)
    assert pair_key("a", (replace(chosen, score_mask=[]), rejected)) == pair_key("a", pairs[0])


def test_fingerprints_differ_by_weights_and_configuration():
    def of(model):
        return fingerprint(dict(model.backbone.named_parameters()), model.config)

    moved = tiny()
    with torch.no_grad():
        moved.backbone.blocks[1].ffn.fc2.bias[3] += 1e-6
    models = [tiny(), tiny(seed=1), moved, tiny().bfloat16(), tiny(rope_reversed=False), tiny(layer_norm_eps=1e-6)]
    assert len({of(model) for model in models}) == len(models)
    other = tiny(reward_dropout=0.5, task_heads=["other"])
    other.backbone.load_state_dict(tiny().backbone.state_dict())
    assert of(other) == of(tiny())


# Training


@pytest.fixture
def calls(monkeypatch):
    """How often a backbone has run, by whether it was of a model that trains or judges (True) or of a reference."""
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


def same(one, two, **tolerance):
    for (name, a), b in zip(weights(one.model).items(), weights(two.model).values(), strict=True):
        assert torch.allclose(a, b, **tolerance) if tolerance else torch.equal(a, b), name


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


def test_a_damaged_row_is_computed_again(tmp_path, caplog):
    plain = go(stage_settings("head", tmp_path / "plain", on=False, optimiser__steps=5))
    go(stage_settings("head", tmp_path / "cold", optimiser__steps=5))
    for shard in shards(tmp_path / "cache"):
        spoil(shard, 0)
    same(plain, go(stage_settings("head", tmp_path / "warm", optimiser__steps=5)))
    assert "is damaged (row 0" in caplog.text


class Killed(Exception):
    pass


class Trap(list):
    """Records of which the given one of those taken kills the run."""

    left = 0

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            raise Killed
        return super().__getitem__(index)


@pytest.mark.parametrize("after", [18, 30])
@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_for_bit(stage, after, tmp_path, monkeypatch):
    """Killed in the first epoch and in the second, after a step that was stored in the cache but in no checkpoint."""
    whole = go(stage_settings(stage, tmp_path / "whole", data__cache=str(tmp_path / "one"), optimiser__steps=9))
    monkeypatch.setattr(cache, "SHARD_ROWS", 3)
    recipe = stage_settings(stage, tmp_path / "parts", data__cache=str(tmp_path / "two"), optimiser__steps=9)
    data = Trap(records(stage))
    data.left = after
    with pytest.raises(Killed):
        go(recipe, data)
    assert runs.newest(tmp_path / "parts" / "checkpoints").step == after // 4 // 3 * 3
    assert sum(len(load_file(shard)["keys"]) for shard in shards(tmp_path / "two")) >= min(after // 4 * 4 - 2, 21)
    same(whole, go(recipe, resume=True))


def test_the_cache_lies_beside_the_run_unless_the_recipe_says_where(tmp_path):
    assert pair_cache.directory(settings("head", tmp_path / "run")) == tmp_path / "cache"
    assert pair_cache.directory(settings("head", tmp_path / "run", data__cache="there")).name == "there"
    go(settings("head", tmp_path / "run", optimiser__steps=2))
    assert [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()] == ["states"]
    go(settings("align", tmp_path / "other", optimiser__steps=2))  # on the fly: nothing is kept
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_no_cache_is_made_where_it_is_off(tmp_path):
    go(stage_settings("head", tmp_path / "run", on=False, optimiser__steps=2))
    assert not (tmp_path / "cache").exists()


# A pass ahead


def fill(recipe, **options):
    data = records(recipe.stage)
    return ahead.fill(recipe, model=tiny(), tokenizer=small_tokenizer(), records=data, **options)


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


def test_a_pass_ends_with_the_data_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    recipe = stage_settings("head", tmp_path / "run", optimiser__steps=100)
    data = Trap(records("head"))
    data.left = 11
    with pytest.raises(Killed):
        ahead.fill(recipe, model=tiny(), tokenizer=small_tokenizer(), records=data, quiet=True)
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
    assert not (tmp_path / "cache").exists()


def test_the_command_fills_what_training_reads(tmp_path, calls, capsys):
    tiny().save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    data = write_lines(tmp_path / "pairs.jsonl", *(asdict(record) for record in records("align")))
    asked = [
        "mini-align", f"model.path={tmp_path / 'model'}", f"data.sources=[{data}]", "objective.reference=cache",
        "--output", str(tmp_path / "run"), "optimiser.steps=2", "optimiser.warmup=1", "batch.size=4", "device=cpu",
    ]  # fmt: skip
    for new in (8, 0):
        assert cli.main(["cache", *asked]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"{tmp_path / 'cache' / 'reference-'}")
        assert out.endswith(f": 8 pairs, {new} of the 8 seen are new\n")
        assert "8/8" in err
    calls.clear()
    assert cli.main(["train", *asked]) == 0
    assert calls == [True, True]
