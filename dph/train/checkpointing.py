"""Checkpoint files: manifest with hashes, damage check, and tensors that several ranks hold.

A checkpoint is a directory ``checkpoints/step-NNNNNNNN`` with one safetensors file per part (weights, optimiser, data,
generators), ``state.json``, and ``manifest.json`` with the size and SHA-256 of each file. It has the same content for
any world size: shards are gathered to whole tensors, and only the Transformer-XL memories of a rank's streams are
files of that rank (``data-00001.safetensors``, ...). A run can therefore resume with another number of ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dph.data.atomic import atomic_directory, naming, sync
from dph.errors import UserError, one_line, shown
from dph.model.directories import MANIFEST
from dph.train.distributed import World, full_tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    step: int
    path: Path

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of one part, on the CPU, from rank 0's file and those of the other ranks."""
        tensors = {}
        for path in [self.path / f"{part}.safetensors", *sorted(self.path.glob(f"{part}-*.safetensors"))]:
            with loading(path):  # not mapped: a mapped file that another program truncates kills the process
                tensors |= safetensors.torch.load(path.read_bytes())
        return tensors

    def state(self) -> Section:
        """Return the JSON state; reading a key that another version of dph did not write raises UserError."""
        path = self.path / "state.json"
        return Section(read_json(path), path)


class Section(dict):
    """The JSON state of a checkpoint or a section of it: UserError with file and key for what no run saves.

    Args:
        values: content.
        path: file of the state.
        key: dotted key of the section in the state; empty for the state itself.
    """

    def __init__(self, values: Mapping[str, Any], path: Path, key: str = "") -> None:
        super().__init__(values)
        self.path, self.key = path, key

    def __missing__(self, key: str) -> Any:
        """Raise UserError for a key that is not there."""
        raise UserError(f"{self.path}: {self.full_key(key)}: expected what this version of dph saves, got nothing")

    def full_key(self, key: str) -> str:
        """Return the dotted key in the state."""
        return f"{self.key}.{key}" if self.key else key

    def require(self, key: str, fits: Callable[[Any], bool], expected: str) -> Any:
        """Return a value. Raises UserError, with ``expected`` in words, unless ``fits``."""
        value = self[key]
        if not fits(value):
            raise UserError(f"{self.path}: {self.full_key(key)}: expected {expected}, got {shown(value)}")
        return value

    def section(self, key: str) -> Section:
        """Return a section in this one."""
        values = self.require(key, lambda value: isinstance(value, dict), "a section with keys")
        return Section(values, self.path, self.full_key(key))


# Reading


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that a run wrote. Raises UserError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8 and not JSON are both ValueError
        reason = error.strerror if isinstance(error, OSError) else str(error) or type(error).__name__
        raise UserError(f"{path}: expected a JSON object that a run wrote, got {reason}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object that a run wrote, got {shown(value)}")
    return value


LOADING_ERRORS = (
    OSError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@contextlib.contextmanager
def loading(place: str | Path) -> Iterator[None]:
    """Context that turns errors of loading into UserError that begins with ``place``: no run saves what fails to load.

    A UserError gets ``place`` before its message.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except (SafetensorError, *LOADING_ERRORS) as error:
        text = f"expected what a run of this version of dph saves, got {type(error).__name__}: {one_line(error, 200)}"
        raise UserError(f"{place}: {text}") from error


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the path of the checkpoint of ``step`` in a run directory."""
    return directory / "checkpoints" / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint from its name, or None for another name."""
    match = re.fullmatch(r"step-([0-9]+)|\.step-([0-9]{8,})\.old", path.name)
    return None if match is None else int(match[1] or match[2])


def saved_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, complete or not, in the order of their steps.

    One that a process was killed in replacing still has the name ``.step-NNNNNNNN.old``.
    """
    paths = []
    for path in folder.glob("*step-*"):
        is_old = path.suffix == ".old"
        if step_of(path) is not None and not (is_old and path.with_name(path.stem[1:]).exists()):
            paths.append(path)
    return sorted(paths, key=step_of)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint in ``folder``, or None; newer incomplete ones are logged as warnings."""
    for path in reversed(saved_checkpoints(folder)):
        reason = damage(path)
        if reason is None:
            return Checkpoint(step_of(path), path)
        log.warning("%s is not complete (%s): ignored", path, reason)
    return None


def damage(path: Path) -> str | None:
    """Return why the checkpoint at ``path`` is not complete, or None if each file has its size and hash."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        step = step_of(path)
        if step is not None and manifest["step"] != step:
            return f"{MANIFEST} is that of step {shown(manifest['step'])}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"no readable {MANIFEST}"
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or _sha256(file) != digest:
            return f"{name} is damaged"
    return None


def load_start(directory: Path) -> dict[str, Tensor]:
    """Return the weights that training does not change (``start/``). UserError if they are damaged."""
    path = directory / "start"
    if reason := damage(path):
        raise UserError(f"{path}: {reason}; the run cannot continue without it")
    return Checkpoint(0, path).tensors("start")


# Writing


def write_checkpoint(
    path: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    rank_files: Sequence[Path] = (),
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint atomically.

    ``rank_files``, written by other ranks, are moved into it, and ``write_more`` writes further files into its folder.
    """
    with atomic_directory(path) as folder:
        for name, tensors in parts.items():
            write_tensors(folder / f"{name}.safetensors", tensors)
        for file in rank_files:
            file.rename(folder / file.name)
        (folder / "state.json").write_text(json.dumps(state))
        if write_more is not None:
            write_more(folder)
        files = {}
        for file in sorted(filter(Path.is_file, folder.rglob("*"))):
            files[str(file.relative_to(folder))] = {"size": file.stat().st_size, "sha256": _sha256(file)}
        (folder / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=2))


def gather_parts(
    parts: Mapping[str, Mapping[str, Tensor]], world: World, folder: Path
) -> tuple[dict[str, dict[str, Tensor]], list[Path]]:
    """Gather the parts of a checkpoint from all ranks; every rank calls it.

    Rank 0 gets whole tensors on the CPU (the others empty parts), gathered one at a time so that no device holds them
    all. The part ``data`` differs between ranks: each rank but 0 writes its own to a file in ``folder``.

    Returns the gathered parts, and the paths of the other ranks' files.
    """
    gathered: dict[str, dict[str, Tensor]] = {}
    for name, tensors in parts.items():
        gathered[name] = {}
        for key, tensor in tensors.items():
            full = full_tensor(tensor)
            if world.rank == 0:
                gathered[name][key] = full.cpu()
    rank_files = []
    if parts["data"]:
        rank_files = [folder / f"data-{rank:05}.safetensors" for rank in range(1, world.world_size)]
    with world.fail_together():
        if rank_files and world.rank > 0:
            folder.mkdir(exist_ok=True)
            own_file = rank_files[world.rank - 1]
            write_tensors(own_file, parts["data"])
            sync(own_file)
    return gathered, rank_files


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device to a safetensors file."""
    with naming(path):
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


# Random number generators


def random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of all random number generators (PyTorch, every device; Python; NumPy) as tensors and JSON."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda:{index}"] = state
    name, keys, *rest = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(keys.astype(np.int64))
    return tensors, {"python": random.getstate(), "numpy": [name, *rest]}


def set_random_states(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Load the states that :func:`random_states` returned; those of missing devices are ignored."""
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda:{index}"], index)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, *rest = state["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))
