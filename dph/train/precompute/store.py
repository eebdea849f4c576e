"""Rows of fp32 numbers on disk, found by their keys, so that a frozen model's outputs are computed once.

    store = RowStore(directory, width=2)
    store.put([key], torch.tensor([[-3.5, -7.25]]))
    store.get(key)                                   # tensor([-3.5, -7.25]), or None
    store.flush()                                    # written to the disk

A shard is a safetensors file, written whole and never changed: ``keys`` [n, 32] uint8, ``values`` [n, width] fp32, and
``checks`` [n] int64, a CRC-32 of each row with its key. Values are read row by row when they are needed, so a store may
be larger than the memory; the keys, about 200 bytes each, are held in memory. Shards have unique names, so several
processes may write to one directory; each reads the shards present when it opened or last refreshed the store, and its
own.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
import weakref
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dph.chat import Encoded
from dph.data.atomic import atomic_file
from dph.errors import UserError, one_line, shown
from dph.train.config_schema import model_fields

log = logging.getLogger(__name__)

KEY = hashlib.sha256().digest_size  # bytes
SHARD_BYTES, SHARD_ROWS = 64 << 20, 65_536  # limits of a shard, and so of the rows that wait in memory
OPEN_SHARDS = 128  # at the same time; a process may often have no more than 1024 open files
MAX_HEADER = 1 << 20  # bytes of a shard's header, which has three entries
STALE = 3600  # seconds after which a partial file cannot belong to a running process


class RowStore:
    """Persistent mapping from keys to rows.

    Args:
        directory: created if it is missing.
        width: numbers in a row.
        rows: largest number of rows in a shard; None for as many as fit into 64 MiB.

    Raises UserError if the directory is a file, and OSError if the disk reports an error.
    """

    def __init__(self, directory: str | Path, width: int, rows: int | None = None) -> None:
        if width < 1:
            raise UserError(f"width: expected at least 1, got {width}")
        self.directory, self.width = Path(directory), width
        self.rows = rows or max(1, min(SHARD_ROWS, SHARD_BYTES // (4 * width)))
        self._locations: dict[bytes, tuple[Path, int]] = {}  # shard and row
        self._shards: dict[Path, _Shard] = {}  # opened when one of their rows is first read
        self._waiting: dict[bytes, Tensor] = {}  # not yet written
        self._reported: set[Path] = set()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"cache: expected a directory, got {self.directory}, which is a file") from None
        self._delete_stale()
        self._indexed: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        """Read the keys of shards that other processes have written."""
        for path in sorted({*self.directory.glob("*.safetensors")} - self._indexed):
            self._index(path)

    def __len__(self) -> int:
        """Return the number of rows, on disk and waiting."""
        return len(self._locations) + len(self._waiting)

    def get(self, key: bytes) -> Tensor | None:
        """Return the row [width] fp32 of ``key``, or None if it is missing or damaged."""
        if key in self._waiting:
            return self._waiting[key]
        if key not in self._locations:
            return None
        path, row = self._locations[key]
        value = self._read(path, row, key)
        if value is None:
            del self._locations[key]
        return value

    def put(self, keys: Sequence[bytes], values: Tensor) -> None:
        """Store rows [len(keys), width]; a key that is stored already keeps its first row.

        Rows that are not finite are left out: they would repeat a temporary fault of the machine in every later run.
        """
        if values.shape != (len(keys), self.width):
            raise ValueError(f"values: expected shape {[len(keys), self.width]}, got {list(values.shape)}")
        values = values.detach().to("cpu", torch.float32)
        for key, value, finite in zip(keys, values, values.isfinite().all(1).tolist(), strict=True):
            if finite and key not in self._locations and key not in self._waiting:
                self._waiting[key] = value.clone()
            if len(self._waiting) >= self.rows:
                self.flush()

    def flush(self) -> None:
        """Write the waiting rows as a shard, atomically. OSError if the disk is full; stored rows stay intact."""
        if not self._waiting:
            return
        path = self._write()
        self._indexed.add(path)
        self._locations |= {key: (path, row) for row, key in enumerate(self._waiting)}
        self._waiting = {}

    def _write(self) -> Path:
        values = torch.stack(list(self._waiting.values()))
        keys = torch.frombuffer(bytearray(b"".join(self._waiting)), dtype=torch.uint8).view(-1, KEY)
        checks = torch.tensor([_check(key, value) for key, value in self._waiting.items()])
        # Named by time, so that a row stored again because its first copy is damaged is indexed after that copy.
        path = self.directory / f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}.safetensors"
        try:
            with atomic_file(path) as file:
                file.write(save({"keys": keys, "values": values, "checks": checks}))
        except OSError as error:
            text = f"{error.strerror}: the cache could not be written; what it held before is intact"
            raise OSError(error.errno, text, str(self.directory)) from error
        return path

    def _index(self, path: Path) -> None:
        """Read the keys of a shard; log a warning if it is damaged."""
        self._indexed.add(path)
        try:
            packed = _Shard(path, self.width).keys()
        except (OSError, ValueError, RecursionError) as error:
            return self._report_damage(path, str(error))
        rows = range(len(packed) // KEY)
        self._locations |= {packed[KEY * row : KEY * (row + 1)]: (path, row) for row in rows}

    def _read(self, path: Path, row: int, key: bytes) -> Tensor | None:
        """Return one row of a shard; None, with a warning, if it is damaged."""
        try:
            if path not in self._shards:
                if len(self._shards) == OPEN_SHARDS:
                    del self._shards[next(iter(self._shards))]  # the one that was opened first
                self._shards[path] = _Shard(path, self.width)
            value, check = self._shards[path].row(row)
        except (OSError, ValueError, RecursionError) as error:
            return self._report_damage(path, str(error))
        if _check(key, value) != check:
            return self._report_damage(path, f"row {row} is not what was written")
        return value

    def _report_damage(self, path: Path, reason: str) -> None:
        if path not in self._reported:
            log.warning("%s is damaged (%s): ignored; it can be deleted", path, one_line(reason, 200))
        self._reported.add(path)

    def _delete_stale(self) -> None:
        """Delete partial files of killed processes."""
        for path in self.directory.glob("*.partial"):
            with contextlib.suppress(OSError):  # another process may delete it first
                if time.time() - path.stat().st_mtime > STALE:
                    log.warning("%s is incomplete: deleted", path)
                    path.unlink()


class _Shard:
    """The arrays of a shard, read by system calls: a mapped file that another program truncates kills the process.

    Raises ValueError for a file that is no shard of rows of ``width`` numbers, or that ends too early, and OSError.
    """

    def __init__(self, path: Path, width: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._width = width
        length = int.from_bytes(self._read(0, 8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"expected a header of at most {MAX_HEADER} bytes, got {length}")
        header, self._data = json.loads(self._read(8, length)), 8 + length
        shape = _array(header, "values")["shape"]
        if shape[1:] != [width]:
            raise ValueError(f"expected rows of {width}, got shape {shape}")
        self.rows = shape[0]
        self._starts = {}
        for name, dtype, expected in (
            ("keys", "U8", [self.rows, KEY]),
            ("values", "F32", [self.rows, width]),
            ("checks", "I64", [self.rows]),
        ):
            array_header = _array(header, name)
            if (array_header.get("dtype"), array_header["shape"]) != (dtype, expected):
                raise ValueError(f"expected {name} of {dtype} {expected}, got {shown(array_header)}")
            self._starts[name], end = array_header["data_offsets"]
            if self._data + end > os.fstat(self._descriptor).st_size:
                raise ValueError(f"expected {self._data + end} bytes, got {os.fstat(self._descriptor).st_size}")

    def keys(self) -> bytes:
        """Return the keys of all rows, end to end."""
        return self._read(self._data + self._starts["keys"], KEY * self.rows)

    def row(self, row: int) -> tuple[Tensor, int]:
        """Return the numbers [width] of a row and its checksum."""
        size = 4 * self._width
        numbers = self._read(self._data + self._starts["values"] + row * size, size)
        check = self._read(self._data + self._starts["checks"] + row * 8, 8)
        return torch.frombuffer(bytearray(numbers), dtype=torch.float32), int.from_bytes(check, "little")

    def _read(self, start: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, start)  # at most 2 GiB, many times a shard
        if len(data) < size:
            raise ValueError(f"expected {start + size} bytes or more, got {start + len(data)}")
        return data


def _array(header: Any, name: str) -> dict[str, Any]:
    """Return type, shape and offsets of an array in a safetensors header. Raises ValueError unless they are there."""
    entry = header.get(name) if isinstance(header, dict) else None
    if not isinstance(entry, dict):
        raise ValueError(f"expected an array called {name}, got none")
    for key, count in (("shape", None), ("data_offsets", 2)):
        numbers = entry.get(key)
        valid = isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**62 for number in numbers)
        if not valid or len(numbers) != (count or len(numbers)) or not numbers:
            raise ValueError(f"expected whole numbers as {key} of {name}, got {shown(numbers)}")
    return entry


def _check(key: bytes, value: Tensor) -> int:
    return zlib.crc32(value.numpy().tobytes(), zlib.crc32(key))


def fingerprint(weights: Mapping[str, Tensor], config: Any) -> str:
    """Return a hash, as 64 hexadecimal digits, of a model's weights and of its configuration's backbone fields.

    Names, types and shapes count too: bf16 weights are another model than the fp32 weights they were rounded from.
    """
    digest = hashlib.sha256(repr(_backbone_fields(config)).encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _backbone_fields(config: Any) -> list[tuple[str, Any]]:
    """Return the fields of a ``ModelConfig`` that the backbone may depend on: all but those of the heads."""
    return [(name, value) for name, value in model_fields(config).items() if not name.startswith(("reward_", "task_"))]


def pair_key(model: str, pair: Iterable[Encoded]) -> bytes:
    """Return the key [32 bytes] of a pair's row: a hash of the model's fingerprint and the pair's tokens and masks."""
    digest = hashlib.sha256(model.encode())
    for side in pair:
        position = -1 if side.reward_position is None else side.reward_position
        for numbers in ([len(side), position], side.tokens, side.targets):
            digest.update(array("q", numbers).tobytes())
        digest.update(bytes(side.loss_mask))
    return digest.digest()
