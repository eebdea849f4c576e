"""Weight files: which are read, what their headers must hold, and what a message about them names."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from dph._weights import check_tensors, read_weight_files
from dph.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FIRST, SECOND = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}, {"c": torch.zeros(1, dtype=torch.int64)}


def write(folder, index=None, first=FIRST):
    """Write three tensors in two files with an index, or with ``index`` in its place."""
    save_file(first, folder / SHARDS[0])
    save_file(SECOND, folder / SHARDS[1])
    if index is None:
        index = {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_headers_of_one_file_and_of_several(tmp_path):
    write(tmp_path)
    found = read_weight_files(tmp_path)
    assert (found.path, found.files) == (tmp_path / INDEX, tuple(tmp_path / name for name in SHARDS))
    assert found.tensors["a"] == ((2, 3), "float32", tmp_path / SHARDS[0])
    assert found.tensors["c"] == ((1,), "I64", tmp_path / SHARDS[1])
    save_file(FIRST, tmp_path / SINGLE)  # is preferred
    assert read_weight_files(tmp_path).tensors.keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ({"a": SHARDS[0], "b": "gone.safetensors"}, "gone.safetensors: expected a safetensors file, got nothing there"),
        ({"a": "../x.safetensors"}, f"{INDEX}: weight_map.a: expected a .safetensors file of .*, got ../x"),
        ({"a": "x.bin"}, f"{INDEX}: weight_map.a: expected a .safetensors file .*, got x.bin"),
        ({"a": 5}, f"{INDEX}: weight_map.a: expected a .safetensors file .*, got 5"),
        ({}, f"{INDEX}: weight_map: expected an object of file names by tensor, got none"),
        ([1], f"{INDEX}: weight_map: expected an object of file names by tensor, got none"),
        ({"a": SHARDS[0], "c": SHARDS[0], "z": SHARDS[1]}, f"{INDEX}: .* got 2 that .*, the first is c in {SHARDS[0]}"),
    ],
)  # fmt: skip
def test_wrong_indices(index, text, tmp_path):
    write(tmp_path, index)
    with pytest.raises(UserError, match=f"^{tmp_path}/{text}"):
        read_weight_files(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    write(tmp_path, first={**FIRST, "c": torch.zeros(1)})
    text = f"{INDEX}: expected each tensor in one file, got 1 in several, the first is c in {SHARDS[0]} and {SHARDS[1]}"
    with pytest.raises(UserError, match=text):
        read_weight_files(tmp_path)


def broken(folder, kind):
    """Put something else than a whole safetensors file into ``folder``."""
    file = folder / SINGLE
    save_file(FIRST, file)
    content = file.read_bytes()
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "link":
        file.symlink_to("gone")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "pickle":
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    elif kind == "distributed":
        save_file(FIRST, file)
        save_file(FIRST, folder / "shard-00000-model-00001-of-00001.safetensors")
    elif kind != "nothing":
        contents = {"truncated": content[:-5], "text": b"hello, I am text", "empty": b"", "header": b"\xff" * 8 + b"{}"}
        file.write_bytes(contents[kind])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("folder", f"/{SINGLE}: expected a safetensors file, got a folder"),
        ("link", f"/{SINGLE}: expected a safetensors file, got a link to 'gone', which does not exist"),
        ("pipe", f"/{SINGLE}: expected a safetensors file, got a pipe or device"),
        ("truncated", f"/{SINGLE}: expected a whole safetensors file, got a damaged one: "),
        ("text", f"/{SINGLE}: expected a whole safetensors file, got a damaged one: "),
        ("empty", f"/{SINGLE}: expected a whole safetensors file, got a damaged one: "),
        ("header", f"/{SINGLE}: expected a whole safetensors file, got a damaged one: "),
        ("pickle", f": expected weights in {SINGLE} or {INDEX}, got pytorch_model.bin: a pickle, which could run code"),
        ("distributed", f": expected {SINGLE} or {INDEX}, got files of a distributed checkpoint"),
        ("nothing", f": expected weights in {SINGLE} or {INDEX}, got none of them"),
    ],
)
def test_unreadable_weights_are_not_called_missing(kind, text, tmp_path):
    broken(tmp_path, kind)
    with pytest.raises(UserError, match=f"^{tmp_path}{text}"):
        read_weight_files(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_weights_without_permission(tmp_path):
    save_file(FIRST, tmp_path / SINGLE)
    (tmp_path / SINGLE).chmod(0)
    with pytest.raises(UserError, match=r"model\.safetensors: expected a readable file, got: Permission denied"):
        read_weight_files(tmp_path)


def test_one_message_names_the_first_of_each_kind_and_counts():
    expected = {name: torch.empty(2, 3, device="meta") for name in ("a", "b", "c", "d", "head.x")}
    right = {name: torch.zeros(2, 3, dtype=dtype) for name, dtype in zip(
        expected, (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float32), strict=True
    )}  # fmt: skip
    check_tensors(expected, right, "FILE")
    del right["head.x"]
    check_tensors(expected, right, "FILE", optional=lambda name: name.startswith("head."))
    wrong = {"a": right["a"].T, "d": right["d"].int(), "z": right["b"], "y\x1b\n": right["b"], "head.y": right["b"]}
    with pytest.raises(UserError) as error:
        check_tensors(expected, wrong, "FILE", optional=lambda name: name.startswith("head."))
    assert str(error.value) == (
        "FILE: expected the model's 5 tensors in float16, bfloat16, float32 or float64, got 2 missing (the first is "
        "b), 2 not of this model (the first is y\\x1b), 1 of another type (the first is d: int32), 1 of another shape "
        "(the first is a: [3, 2], expected [2, 3])"
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_that_would_be_cast_are_refused(dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"1 of another type \(the first is a: {name}\)"):
        check_tensors({"a": torch.zeros(2)}, {"a": torch.zeros(2).to(dtype)}, "FILE")
