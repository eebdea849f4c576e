"""The cache on disk: what comes back, what is ignored, and what keys depend on."""

import errno
from dataclasses import replace

import pytest
import torch
from helpers.cache_files import shards, spoil
from helpers.stages import records, tiny
from helpers.texts import small_tokenizer
from safetensors.torch import save_file

from dph.data.formats import Encoder
from dph.errors import UserError
from dph.train.precompute import store as storage
from dph.train.precompute.store import RowStore, fingerprint, pair_key

WIDTH = 3


def keys(*numbers):
    return [bytes([n]) * 32 for n in numbers]


def rows(*numbers):
    return torch.tensor([[n, n + 0.5, -n] for n in numbers], dtype=torch.float32)


# The store


def test_rows_come_back_from_memory_and_from_disk(tmp_path):
    store = RowStore(tmp_path, WIDTH, rows=4)
    store.put(keys(*range(6)), rows(*range(6)))
    assert len(shards(tmp_path)) == 1  # four are on disk, two wait
    for key, row in zip(keys(*range(6)), rows(*range(6)), strict=True):
        assert torch.equal(store.get(key), row)
    assert store.get(keys(9)[0]) is None
    store.flush()
    store.flush()
    again = RowStore(tmp_path, WIDTH)
    assert (len(store), len(again), len(shards(tmp_path))) == (6, 6, 2)
    assert all(torch.equal(again.get(k), r) for k, r in zip(keys(*range(6)), rows(*range(6)), strict=True))
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_the_first_row_of_a_key_stays_and_what_is_not_finite_is_left_out(tmp_path):
    store = RowStore(tmp_path, WIDTH)
    store.put(keys(1), rows(1))
    store.put(keys(1, 2, 3), torch.stack([rows(7)[0], torch.full((3,), torch.nan), rows(3)[0]]))
    assert torch.equal(store.get(keys(1)[0]), rows(1)[0])
    assert store.get(keys(2)[0]) is None
    assert len(store) == 2


def test_what_is_read_can_be_changed(tmp_path):
    store = RowStore(tmp_path, WIDTH, rows=1)
    store.put(keys(1), rows(1))
    store.get(keys(1)[0]).zero_()
    assert torch.equal(store.get(keys(1)[0]), rows(1)[0])


def test_values_are_read_when_they_are_asked_for(tmp_path, caplog):
    """A value that is damaged is found when it is read, and not before; all others are there."""
    store = RowStore(tmp_path, WIDTH)
    store.put(keys(*range(8)), rows(*range(8)))
    store.flush()
    (shard,) = shards(tmp_path)
    spoil(shard, 5)
    store = RowStore(tmp_path, WIDTH)
    assert not store._shards
    assert not caplog.records
    assert [store.get(key) is None for key in keys(*range(8))] == [i == 5 for i in range(8)]
    assert f"{shard} is damaged (row 5" in caplog.text
    store.put(keys(5), rows(5))
    store.flush()
    assert torch.equal(RowStore(tmp_path, WIDTH).get(keys(5)[0]), rows(5)[0])  # the newer shard's


def test_damaged_shards_are_passed_over(tmp_path, caplog):
    store = RowStore(tmp_path, WIDTH, rows=1)
    store.put(keys(1, 2, 3), rows(1, 2, 3))
    first, second, _ = shards(tmp_path)
    first.write_bytes(first.read_bytes()[:-4])
    second.write_bytes(b"")
    other = tmp_path / "0-other.safetensors"
    save_file({"keys": torch.zeros(1, 32, dtype=torch.uint8), "values": torch.zeros(1, WIDTH + 1)}, other)
    store = RowStore(tmp_path, WIDTH)
    assert [store.get(key) is not None for key in keys(1, 2, 3)] == [False, False, True]
    assert len(caplog.records) == 3
    for path in (first, second, other):
        assert f"{path} is damaged" in caplog.text
    assert "expected rows of 3, got shape [1, 4]" in caplog.text


@pytest.mark.parametrize("change", ["emptied", "cut off", "rewritten", "deleted", "another header"])
def test_a_shard_that_changes_during_a_run_is_damaged_or_read_as_it_was(change, tmp_path, caplog, monkeypatch):
    """A mapped file would kill the process. At most one shard is open here, so a deleted one is looked for again."""
    monkeypatch.setattr(storage, "OPEN_SHARDS", 1)
    store = RowStore(tmp_path, WIDTH, rows=2000)
    numbers = torch.arange(4000 * WIDTH, dtype=torch.float32).view(4000, WIDTH)
    every = [i.to_bytes(32, "little") for i in range(4000)]
    store.put(every, numbers)
    assert torch.equal(store.get(every[1999]), numbers[1999])
    first, _ = shards(tmp_path)
    content = first.read_bytes()
    if change == "deleted":
        first.unlink()
        assert torch.equal(store.get(every[1999]), numbers[1999])
        assert store.get(every[2000]) is not None
    elif change == "another header":
        assert store.get(every[2000]) is not None
        first.write_bytes((1 << 60).to_bytes(8, "little") + content[8:])
    else:
        changed = {"emptied": b"", "cut off": content[:4096], "rewritten": b"\xff" * len(content)}[change]
        with first.open("r+b") as file:
            file.write(changed)
            file.truncate()
    assert store.get(every[1999]) is None
    assert f"{first} is damaged" in caplog.text
    store.put(every[1999:2000], numbers[1999:2000])
    assert torch.equal(store.get(every[1999]), numbers[1999])
    assert len(store._shards) <= 1


def test_leavings_of_a_killed_process_are_deleted_when_they_are_old(tmp_path, monkeypatch, caplog):
    (tmp_path / "1-a.partial").write_bytes(b"half")
    assert len(RowStore(tmp_path, WIDTH)) == 0
    assert (tmp_path / "1-a.partial").exists()  # another process may be at it
    monkeypatch.setattr(storage, "STALE", -1)
    RowStore(tmp_path, WIDTH)
    assert not (tmp_path / "1-a.partial").exists()
    assert "1-a.partial is incomplete" in caplog.text


def test_two_writers_share_a_directory(tmp_path):
    one, two = RowStore(tmp_path, WIDTH, rows=2), RowStore(tmp_path, WIDTH, rows=2)
    for i in range(0, 8, 2):
        one.put(keys(i, i + 1), rows(i, i + 1))
        two.put(keys(i + 1, i + 2), rows(i + 1, i + 2))
    assert len(shards(tmp_path)) == 8
    both = RowStore(tmp_path, WIDTH)
    two.refresh()
    for store in (both, two):
        assert len(store) == 9
        assert all(torch.equal(store.get(k), r) for k, r in zip(keys(*range(9)), rows(*range(9)), strict=True))
    assert len(one) < 9


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(call, tmp_path, monkeypatch):
    store = RowStore(tmp_path, WIDTH)
    store.put(keys(1), rows(1))
    store.flush()
    store.put(keys(2), rows(2))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, call, full)
    with pytest.raises(OSError, match="No space left on device: the cache could not be written") as caught:
        store.flush()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    monkeypatch.undo()
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    store.flush()  # there is room again: nothing is lost
    assert len(RowStore(tmp_path, WIDTH)) == 2


def test_errors_say_what_was_expected(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache: expected a directory, got .*file"):
        RowStore(tmp_path / "file", WIDTH)
    with pytest.raises(UserError, match="width: expected at least 1, got 0"):
        RowStore(tmp_path, 0)
    with pytest.raises(ValueError, match=r"values: expected shape \[2, 3\], got \[1, 3\]"):
        RowStore(tmp_path, WIDTH).put(keys(1, 2), rows(1))


# Keys


def test_keys_differ_by_whatever_the_numbers_depend_on():
    chosen, rejected = Encoder(small_tokenizer())(records("align", 1)[0])
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
    def backbone_fingerprint(model):
        return fingerprint(dict(model.backbone.named_parameters()), model.config)

    moved = tiny()
    with torch.no_grad():
        moved.backbone.blocks[1].ffn.fc2.bias[3] += 1e-6
    models = [tiny(), tiny(seed=1), moved, tiny().bfloat16(), tiny(rope_reversed=False), tiny(layer_norm_eps=1e-6)]
    assert len({backbone_fingerprint(model) for model in models}) == len(models)
    other = tiny(reward_dropout=0.5, task_heads=["other"])
    other.backbone.load_state_dict(tiny().backbone.state_dict())
    assert backbone_fingerprint(other) == backbone_fingerprint(tiny())
