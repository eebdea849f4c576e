"""Rows of fp32 numbers on disk, found by their keys: what a frozen model says of a record is computed once.

    cache = Cache(directory, width=2)
    cache.put([key], torch.tensor([[-3.5, -7.25]]))
    cache.get(key)                                   # tensor([-3.5, -7.25]), or None
    cache.flush()                                    # on disk

A shard is a safetensors file that is written whole and never changed: ``keys`` [n, 32] uint8, ``values`` [n, width]
fp32, and ``checks`` [n] int64, a CRC-32 of each row with its key. Values are read row by row as they are asked for, so
a cache may be larger than memory; the keys, about 200 bytes each, are held. Shards have names that no two processes
give, so several may write to one directory; each sees what lay there when it opened it or last looked, and its own.
"""

import contextlib
import hashlib
import inspect
import logging
import os
import time
import uuid
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dph.chat import Encoded
from dph.errors import UserError
from dph.train.run_dir import sync

log = logging.getLogger(__name__)

KEY = hashlib.sha256().digest_size  # bytes
SHARD_BYTES, SHARD_ROWS = 64 << 20, 65_536  # bounds of a shard, and so of what waits in memory to be written
STALE = 3600  # seconds after which a half-written file can be no other process's work


class Cache:
    """See the module.

    Args:
        directory: made if it is not there.
        width: numbers in a row.
        rows: of a shard at most; None for what fits 64 MiB.

    Raises UserError where the directory cannot be one, and OSError where the disk refuses.
    """

    def __init__(self, directory: str | Path, width: int, rows: int | None = None) -> None:
        if width < 1:
            raise UserError(f"width: expected at least 1, got {width}")
        self.directory, self.width = Path(directory), width
        self.rows = rows or max(1, min(SHARD_ROWS, SHARD_BYTES // (4 * width)))
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._shards: dict[Path, Any] = {}  # opened when a row of theirs is first asked for
        self._waiting: dict[bytes, Tensor] = {}
        self._complained: set[Path] = set()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"cache: expected a directory, got {self.directory}, which is a file") from None
        self._sweep()
        self._indexed: set[Path] = set()
        self.look()

    def look(self) -> None:
        """See what other processes have written since."""
        for path in sorted({*self.directory.glob("*.safetensors")} - self._indexed):
            self._index(path)

    def __len__(self) -> int:
        """Rows on disk and waiting."""
        return len(self._places) + len(self._waiting)

    def get(self, key: bytes) -> Tensor | None:
        """The row [width] fp32 of ``key``, or None; a damaged one counts as not there."""
        if key in self._waiting:
            return self._waiting[key]
        if key not in self._places:
            return None
        path, row = self._places[key]
        value = self._read(path, row, key)
        if value is None:
            del self._places[key]
        return value

    def put(self, keys: Sequence[bytes], values: Tensor) -> None:
        """Store rows [len(keys), width]; of a key that is there already the first row stays.

        A row that is not finite is left out: it would bring a passing fault of the machine back in every later run.
        """
        if values.shape != (len(keys), self.width):
            raise ValueError(f"values: expected shape {[len(keys), self.width]}, got {list(values.shape)}")
        values = values.detach().to("cpu", torch.float32)
        for key, value, finite in zip(keys, values, values.isfinite().all(1).tolist(), strict=True):
            if finite and key not in self._places and key not in self._waiting:
                self._waiting[key] = value.clone()
            if len(self._waiting) >= self.rows:
                self.flush()

    def flush(self) -> None:
        """Write what waits as a shard, whole or not at all. OSError where the disk is full: what was there stays."""
        if not self._waiting:
            return
        path = self._write()
        self._indexed.add(path)
        self._places |= {key: (path, row) for row, key in enumerate(self._waiting)}
        self._waiting = {}

    def _write(self) -> Path:
        values = torch.stack(list(self._waiting.values()))
        keys = torch.frombuffer(bytearray(b"".join(self._waiting)), dtype=torch.uint8).view(-1, KEY)
        checks = torch.tensor([_check(key, value) for key, value in self._waiting.items()])
        # By time, so that a row that was stored anew, since its first copy is damaged, is indexed after that one.
        path = self.directory / f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}.safetensors"
        temporary = path.with_suffix(".partial")
        try:
            with temporary.open("wb") as file:
                file.write(save({"keys": keys, "values": values, "checks": checks}))
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            sync(self.directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            text = f"{error.strerror}: the cache could not be written; what it held before is intact"
            raise OSError(error.errno, text, str(self.directory)) from error
        return path

    def _index(self, path: Path) -> None:
        """Note where the keys of a shard lie; a warning where it is damaged."""
        self._indexed.add(path)
        try:
            with safe_open(path, "pt") as shard:
                shape = shard.get_slice("values").get_shape()
                if shape[1:] != [self.width]:
                    raise ValueError(f"expected rows of {self.width}, got shape {shape}")
                keys = shard.get_tensor("keys")
                if keys.shape != (shape[0], KEY):
                    raise ValueError(f"expected {shape[0]} keys of {KEY} bytes, got shape {list(keys.shape)}")
        except (OSError, ValueError, SafetensorError) as error:
            return self._complain(path, str(error))
        packed = keys.numpy().tobytes()
        self._places |= {packed[KEY * row : KEY * (row + 1)]: (path, row) for row in range(shape[0])}

    def _read(self, path: Path, row: int, key: bytes) -> Tensor | None:
        """One row of a shard; None and a warning where it is damaged."""
        try:
            if path not in self._shards:
                self._shards[path] = safe_open(path, "pt")  # maps the file into memory, and reads nothing of it
            shard = self._shards[path]
            value, check = (shard.get_slice(name)[row] for name in ("values", "checks"))
        except (OSError, SafetensorError) as error:
            return self._complain(path, str(error))
        if _check(key, value) != int(check):
            return self._complain(path, f"row {row} is not what was written")
        return value.clone()  # not the mapped file itself

    def _complain(self, path: Path, reason: str) -> None:
        if path not in self._complained:
            log.warning("%s is damaged (%s): passed over; it can be deleted", path, " ".join(reason.split()))
        self._complained.add(path)

    def _sweep(self) -> None:
        """Delete what killed processes left half written."""
        for path in self.directory.glob("*.partial"):
            with contextlib.suppress(OSError):  # another process may be quicker
                if time.time() - path.stat().st_mtime > STALE:
                    log.warning("%s was left half written: deleted", path)
                    path.unlink()


def _check(key: bytes, value: Tensor) -> int:
    return zlib.crc32(value.numpy().tobytes(), zlib.crc32(key))


def fingerprint(weights: Mapping[str, Tensor], config: Any) -> str:
    """Hash, as 64 hexadecimal digits, of a model's weights and of what its configuration says of the backbone.

    Names, types and shapes count too: bf16 weights are another model than the fp32 ones that they come from.
    """
    digest = hashlib.sha256(repr(_backbone_fields(config)).encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _backbone_fields(config: Any) -> list[tuple[str, Any]]:
    """Fields of a ``ModelConfig`` on which the backbone depends, to be on the safe side all but those of the heads."""
    names = [name for name in inspect.signature(type(config)).parameters if name not in ("released", "kwargs")]
    return [(name, getattr(config, name)) for name in names if not name.startswith(("reward_", "task_"))]


def pair_key(model: str, pair: Iterable[Encoded]) -> bytes:
    """Key [32 bytes] of a pair's row: the model's fingerprint and all of the pair that its numbers depend on."""
    digest = hashlib.sha256(model.encode())
    for side in pair:
        position = -1 if side.reward_position is None else side.reward_position
        for numbers in ([len(side), position], side.tokens, side.targets):
            digest.update(array("q", numbers).tobytes())
        digest.update(bytes(side.loss_mask))
    return digest.digest()
