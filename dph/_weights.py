"""Weight files of a folder or the hub: their safetensors headers, compared with the weights that a model needs.

A model never starts from weights that a file lacks: transformers would make them up at random.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dph._folder import describe_other, find_file, read_json
from dph.errors import UserError, one_line

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names and PyTorch's
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # transformers prefers these to others
CHUNK = 2**20  # elements that are converted to another dtype at a time
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class TensorHeader(NamedTuple):
    """Description of a tensor in a safetensors file.

    Attributes:
        shape: sizes of the dimensions.
        dtype: PyTorch's name of a floating-point dtype of at least 16 bits, else safetensors' ("I64", "F8_E4M3").
        file: path of the file.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path


@dataclass(frozen=True)
class WeightFiles:
    """Weights of a model on disk.

    Attributes:
        path: the file of all weights, or the index of several.
        files: safetensors files.
        tensors: headers by name.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorHeader]


def read_weight_files(path: str | os.PathLike, variant: str | None = None, **hub: Any) -> WeightFiles:
    """Return the headers of ``model.safetensors``, or of the files that ``model.safetensors.index.json`` names.

    Args:
        path: folder, or the name of a model on the hub.
        variant: inserted into the files' names, as in transformers.
        hub: arguments for downloads; ``subfolder`` also counts in a folder.

    Raises UserError, which begins with the file, if files are missing (pickles do not count), unreadable, damaged or
    contain the same tensor, or if tensors are not in the file that the index names. OSError if the hub fails.
    """
    infix = f".{variant}" if variant else ""
    single, index = f"model{infix}.safetensors", f"model.safetensors.index{infix}.json"
    folder = Path(path) / (hub.get("subfolder") or "") if os.path.isdir(path) else None
    if folder is not None and any(map(DISTRIBUTED.fullmatch, os.listdir(folder))):
        raise UserError(f"{folder}: expected {single} or {index}, got files of a distributed checkpoint")
    where = find_file(single, path, hub) or find_file(index, path, hub)
    if where is None:
        raise UserError(f"{folder or path}: expected weights in {single} or {index}, got {_other_weights(folder)}")
    if where.name != index:
        return WeightFiles(where, (where,), read_header(where))
    named = _read_index(where)
    files, tensors = [], {}
    for name in sorted(set(named.values())):
        file = where.parent / name if folder is not None else find_file(name, path, hub)
        if file is None:
            raise UserError(f"{where}: weight_map: expected files on the hub, got none for {one_line(name)}")
        header = read_header(file)
        if duplicates := sorted(tensors.keys() & header.keys()):
            raise UserError(
                f"{where}: expected each tensor in one file, got {len(duplicates)} in several, the first is "
                f"{one_line(duplicates[0])} in {tensors[duplicates[0]].file.name} and {file.name}"
            )
        files.append(file)
        tensors |= header
    wrong = [tensor for tensor, name in named.items() if tensor not in tensors or tensors[tensor].file.name != name]
    if wrong:
        raise UserError(
            f"{where}: weight_map: expected the file of each tensor, got {len(wrong)} that are not in the named file, "
            f"the first is {one_line(wrong[0])} in {named[wrong[0]]}"
        )
    return WeightFiles(where, tuple(files), tensors)


def _other_weights(folder: Path | None) -> str:
    """Return what a folder without our weight files has in their place."""
    names = sorted(os.listdir(folder)) if folder is not None and folder.is_dir() else []
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return f"{one_line(pickles[0])}: a pickle, which could run code and is not read"
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    return f"{one_line(others[0])}, a name of another layout" if others else "none of them"


def _read_index(path: Path) -> dict[str, str]:
    """Return {tensor: file} of an index. Raises UserError unless it names safetensors files of its own folder."""
    fields = read_json(path)
    named = fields.get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{path}: weight_map: expected an object of file names by tensor, got none")
    for tensor, name in named.items():
        plain = isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
        if not plain or not name.isprintable():
            raise UserError(
                f"{path}: weight_map.{one_line(tensor)}: expected a .safetensors file of the same folder, got "
                f"{one_line(name)}"
            )
    if not isinstance(fields.get("metadata"), dict):
        raise UserError(f"{path}: metadata: expected an object, got none")
    return named


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return the tensors' headers of a safetensors file, without reading the tensors.

    Raises UserError, which begins with the path, if it is no regular file, unreadable or damaged.
    """
    if got := describe_other(path):
        raise UserError(f"{path}: expected a safetensors file, got {got}")
    headers = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                entry = file.get_slice(name)
                dtype = entry.get_dtype()
                headers[name] = TensorHeader(tuple(entry.get_shape()), FLOATS.get(dtype, dtype), path)
    except SafetensorError as error:
        raise UserError(f"{path}: expected a whole safetensors file, got a damaged one: {one_line(error)}") from None
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, got: {error.strerror or one_line(error)}") from None
    return headers


def read_tensors(
    pieces: Mapping[str, Sequence[str]], headers: Mapping[str, TensorHeader], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Read tensors, each of which may be several of the files' tensors above each other, into memory of their own.

    The files are not mapped: mapped pages count as the process's memory, and another program may change them. So the
    peak is the size of the result.

    Args:
        pieces: {name of the result: names in the files, of one shape but for their rows}.
        headers: by name in the files.
        dtype: of the results; that of the first piece if None.

    Raises UserError, which begins with the file, if it became shorter since its header was read.
    """
    starts: dict[Path, dict[str, int]] = {}
    results, scratch = {}, torch.empty(CHUNK, dtype=torch.float64)
    for result, names in pieces.items():
        parts = [headers[name] for name in names]
        shape = parts[0].shape
        if len(parts) > 1:
            shape = (sum(part.shape[0] for part in parts), *shape[1:])
        results[result] = torch.empty(shape, dtype=dtype or getattr(torch, parts[0].dtype))
        blocks = [results[result]]
        if len(parts) > 1:
            blocks = results[result].split([part.shape[0] for part in parts])
        for name, part, block in zip(names, parts, blocks, strict=True):
            if part.file not in starts:
                starts[part.file] = _tensor_starts(part.file)
            _read_into(block.flatten(), part, starts[part.file][name], scratch)
    return results


def _tensor_starts(path: Path) -> dict[str, int]:
    """Return the position of each tensor's first byte in a safetensors file with a sound header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__"}


def _read_into(target: Tensor, header: TensorHeader, start: int, scratch: Tensor) -> None:
    """Copy a tensor of a file into ``target`` [N], converted to its dtype by chunks in ``scratch``."""
    stored, buffer = getattr(torch, header.dtype), target
    if stored != target.dtype:
        buffer = scratch.view(stored)[:CHUNK]
    with header.file.open("rb") as file:
        file.seek(start)
        for first in range(0, len(target), max(len(buffer), 1)):
            chunk = buffer[: len(target) - first]
            content = memoryview(chunk.view(torch.uint8).numpy())
            if file.readinto(content) != len(content):
                raise UserError(f"{header.file}: expected a whole safetensors file, got one that became shorter")
            if chunk.dtype != target.dtype:
                target[first : first + len(chunk)] = chunk


def remove_tables(files: WeightFiles, headers: dict[str, TensorHeader], pattern: str) -> None:
    """Remove tensors from ``headers`` whose names match: tables that follow from the configuration."""
    for name in files.tensors:
        if re.fullmatch(pattern, name):
            del headers[name]


def remove_copy(files: WeightFiles, headers: dict[str, TensorHeader], original: str, copy: str) -> None:
    """Remove the second copy of a tied tensor from ``headers``, if there is one.

    Raises UserError, which begins with the file, if it is not equal to the original bit for bit.
    """
    if copy not in headers or original not in headers or copy == original:
        return
    if not {headers[copy].dtype, headers[original].dtype} <= set(FLOATS.values()):
        return  # ``check_tensors`` refuses them
    both = {name: headers[name] for name in (original, copy)}
    first, second = read_tensors({name: [name] for name in both}, both).values()
    if first.dtype != second.dtype or not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
        raise UserError(
            f"{files.path}: {copy}: expected the values of {original} (tie_word_embeddings is true in config.json), "
            "got others"
        )
    del headers[copy]


def check_tensors(
    expected: Mapping[str, Tensor],
    got: Mapping[str, TensorHeader | Tensor],
    where: str | os.PathLike,
    *,
    optional: Callable[[str], bool] | None = None,
) -> None:
    """Raise one UserError unless ``got`` has the names and shapes of ``expected``, in floating-point dtypes.

    Sharded tensors count with their whole shape. Infinite and NaN values are not looked for.

    Args:
        expected: tensors of the model, on any device (``meta`` included).
        got: tensors, or their headers, read from ``where``.
        where: file, begins the message. It names the first tensor of each kind of fault, and how many there are.
        optional: of a name: whether it may be missing or not expected (reward heads).
    """

    def required(names: Iterable[str]) -> list[str]:
        return [name for name in names if optional is None or not optional(name)]

    missing = required(name for name in expected if name not in got)
    unexpected = required(sorted(name for name in got if name not in expected))
    not_float, misshapen = [], []
    for name, tensor in got.items():
        if _dtype(tensor) not in FLOATS.values():
            not_float.append(name)
        if name in expected and tuple(tensor.shape) != tuple(expected[name].shape):
            misshapen.append(name)
    faults = []
    if missing:
        faults.append(f"{len(missing)} missing (the first is {missing[0]})")
    if unexpected:
        faults.append(f"{len(unexpected)} not of this model (the first is {one_line(unexpected[0])})")
    if not_float:
        name = min(not_float)
        faults.append(f"{len(not_float)} of another type (the first is {one_line(name)}: {_dtype(got[name])})")
    if misshapen:
        name = misshapen[0]
        shapes = f"{list(got[name].shape)}, expected {list(expected[name].shape)}"
        faults.append(f"{len(misshapen)} of another shape (the first is {name}: {shapes})")
    if faults:
        floats = "float16, bfloat16, float32 or float64"
        raise UserError(f"{where}: expected the model's {len(expected)} tensors in {floats}, got {', '.join(faults)}")


def _dtype(tensor: TensorHeader | Tensor) -> str:
    return tensor.dtype if isinstance(tensor.dtype, str) else str(tensor.dtype).removeprefix("torch.")
