"""The run directory of one training stage.

    config.json                   what was asked for
    lock                          locked while a process trains here
    metrics.jsonl                 one object per logged step
    tensorboard/                  the same, for TensorBoard
    tracker.json                  the run's id at Weights & Biases or trackio, where it is tracked there
    start/                        weights that training does not change and a resume needs (frozen, reference)
    checkpoints/step-00000200/    weights, optimiser, data, memories, generators; written whole or not at all, the same
                                  by one process and by several, but that each of these writes its streams' memories
    checkpoints/step-*.damaged    one that a resume found damaged, behind the one from which it went on
    checkpoints/best.json         which of them is the best, by which figure and value, where a best one is kept
    model/                        the finished model and its tokenizer

Tensors are safetensors, the rest is JSON; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from dph.errors import UserError
from dph.train import trackers
from dph.train.trackers import Tracker

log = logging.getLogger(__name__)

MANIFEST, BEST = "manifest.json", "best.json"
# Keys of metrics.jsonl that differ between equal runs.
TIMES = ("seconds", "tokens_per_second", "tflops_per_second", "mfu", "memory_gb")
# Sections and keys that a resumed run may change.
FREE = (
    "output", "evaluation", "data.memory_place", "data.workers", "batch.micro", "parallel", "checkpointing", "compile",
    "cuda_graph",
)  # fmt: skip
# Names that a run writes to.
OWN = ("config.json", "metrics.jsonl", "start", "checkpoints", "model", "tensorboard", "tracker.json")


class Run:
    """A run directory, new or resumed.

    Attributes:
        directory: its place.
        checkpoint: the newest complete checkpoint, or None where the run begins.

    Raises UserError where the directory holds a run and ``resume`` is off, was made by another configuration, is in use
    by another process, or holds files that a run would overwrite and that are not a run's.
    """

    def __init__(
        self, directory: str | Path, config: Mapping[str, Any], *, resume: bool = False, keep: int = 2
    ) -> None:
        self.directory, self.keep = Path(directory), keep
        self.checkpoint: Checkpoint | None = None
        self._lock = self._take()
        try:
            self._open(json.loads(json.dumps(config)), resume)
        except BaseException:
            self._lock.close()
            raise

    def _take(self) -> Any:
        """The lock file, locked until it is closed or the process ends, however it ends."""
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = (self.directory / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(f"{self.directory}: another process trains there; give another directory") from None
        except OSError as error:  # some network file systems have no locks
            log.warning("%s: cannot be locked against a second process (%s)", self.directory, error)
        return lock

    def _open(self, config: dict, resume: bool) -> None:
        self._check_own()
        if self._has_begun():
            if not resume:
                raise UserError(
                    f"{self.directory}: holds a run already; resume it (--resume) or give another directory (--output)"
                )
            self._check_same(config)
            for leaving in self._leavings():
                _clear(leaving)
            self.checkpoint = self._take_up()
            self._mark_best(self.checkpoint.state() if self.checkpoint else {})
        _write_file(self.directory / "config.json", json.dumps(config, indent=2) + "\n")
        self._metrics, self._board = self._open_metrics(), None
        self._tracker = self._open_tracker(config)

    def _take_up(self) -> Checkpoint | None:
        """The newest complete checkpoint. Newer ones, which are damaged, are set aside: their steps will come again.

        UserError where there are but damaged ones.
        """
        folder = self.directory / "checkpoints"
        saved, found = _steps(folder), newest(folder)
        if saved and found is None:
            raise UserError(
                f"{folder}: expected a complete checkpoint, got {', '.join(path.name for path in saved)}, all damaged; "
                "delete them for the run to begin again, or give another directory (--output)"
            )
        for path in saved[saved.index(found.path) + 1 :] if found else []:
            aside = path.with_name(path.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("%s is kept as %s", path, aside.name)
        return found

    @property
    def step(self) -> int:
        """Steps that are done: the checkpoint's, or 0."""
        return self.checkpoint.step if self.checkpoint else 0

    def _check_own(self) -> None:
        """Raise where something stands in a run's place: a model's config.json, a folder ``model`` of the user's."""
        try:
            own = "stage" in json.loads((self.directory / "config.json").read_text())
        except (OSError, ValueError, TypeError):
            own = False
        if not own and (foreign := [name for name in OWN if (self.directory / name).exists()]):
            raise UserError(
                f"{self.directory}: expected a new directory or a run's, got one with {', '.join(foreign)} that no run "
                "made; give another directory"
            )

    def _has_begun(self) -> bool:
        """Whether there is a step to lose: a start that failed, over its data say, takes no directory."""
        metrics = self.directory / "metrics.jsonl"
        logged = metrics.exists() and metrics.stat().st_size > 0
        saved = _steps(self.directory / "checkpoints") or any(path.suffix == ".old" for path in self._leavings())
        return (self.directory / "config.json").exists() and bool(logged or saved)

    def _leavings(self) -> list[Path]:
        """Directories that a killed process left half written or half replaced, by the names that runs give them."""
        places = [(self.directory, r"\.(model|start|shares)"), (self.directory / "checkpoints", r"\.step-\d{8,}")]
        return [
            path
            for folder, name in places
            for path in sorted(folder.glob(".*"))
            if re.fullmatch(name + r"\.(partial|old)", path.name)
        ]

    def _check_same(self, config: dict) -> None:
        before, now = _flat(json.loads((self.directory / "config.json").read_text())), _flat(config)
        different = [
            f"{key}: expected {before.get(key, 'nothing')}, got {now.get(key, 'nothing')}"
            for key in sorted(before.keys() | now.keys(), key=lambda key: (key != "stage", key))
            if not {key, key.split(".")[0]} & {*FREE} and before.get(key) != now.get(key)
        ]
        if different:
            found = different[:1] if before["stage"] != now["stage"] else different  # the stage says all
            raise UserError(
                f"{'; '.join(found)}: a resumed run must not differ from how the one in {self.directory} began"
            )

    def _open_metrics(self) -> Any:
        """Drop the lines after the checkpoint's step, and a line that was cut off, then append."""
        path = self.directory / "metrics.jsonl"
        kept = []
        self._seen: trackers.Line | None = None
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                values = json.loads(line)
                self._seen = trackers.line(values["step"], values)
                if values["step"] <= self.step:
                    kept.append(line + "\n")
        _write_file(path, "".join(kept))
        return path.open("a")

    def _open_tracker(self, config: dict) -> Tracker | None:
        """The tracker that the configuration asks for, from the line on that it has not seen."""
        output = config.get("output", {})
        if output.get("tracker") is None:
            return None
        return Tracker(output["tracker"], output["project"], self.directory, config, self._seen)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, TensorBoard and the tracker; NaN (a part that is off) is left out."""
        values = {key: value for key, value in values.items() if math.isfinite(value)}
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.directory / "tensorboard"), purge_step=self.step + 1)
        for key, value in values.items():
            self._board.add_scalar(key, value, step)
        if self._tracker is not None:
            self._tracker.log(step, values)

    def save(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        shares: Sequence[Path] = (),
    ) -> Path:
        """Write checkpoint ``step``: a safetensors file each part, and ``state`` as JSON; then drop the oldest ones.

        That of ``state["best"]["step"]`` stays, if there is one. ``shares`` are files that other processes wrote; they
        move into the checkpoint.
        """
        os.fsync(self._metrics.fileno())
        folder = self.directory / "checkpoints"
        path = checkpoint_path(self.directory, step)
        _write_checkpoint(path, step, parts, state, shares)
        best = self._mark_best(state)
        for old in _steps(folder)[: -self.keep]:
            if old != best:
                shutil.rmtree(old)
        return path

    def _mark_best(self, state: Mapping[str, Any]) -> Path | None:
        """Write which checkpoint is the best by ``state``, or that none is; where it lies."""
        mark, best = self.directory / "checkpoints" / BEST, state.get("best")
        if best is None:
            return mark.unlink(missing_ok=True)
        path = checkpoint_path(self.directory, best["step"])
        _write_file(mark, json.dumps({"checkpoint": path.name, **best}) + "\n")
        return path

    def save_start(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the weights that training does not change, once."""
        _write_checkpoint(self.directory / "start", 0, {"start": tensors}, {})

    def load_start(self) -> dict[str, Tensor]:
        """What ``save_start`` wrote. UserError where it is damaged."""
        return start_weights(self.directory)

    def save_model(self, model: Any, tokenizer: Any) -> Path:
        """Write the finished model, in the format of ``save_pretrained``, and its tokenizer if there is one."""
        transformers.utils.logging.disable_progress_bar()
        with atomic_directory(self.directory / "model") as folder:
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        return self.directory / "model"

    def close(self) -> None:
        """Flush and close the files, and let the next process in."""
        self._metrics.close()
        self._lock.close()
        for other in filter(None, (self._board, self._tracker)):
            other.close()


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted keys, as the recipe's errors name them, and their values; an item of a list has its number."""
    if not isinstance(value, Mapping | list):
        return {key: value}
    flat = {}
    for name, part in value.items() if isinstance(value, Mapping) else enumerate(value):
        flat |= _flat(part, f"{key}.{name}" if key else name)
    return flat


class _State(dict):
    """The JSON of a checkpoint, which knows where it lies."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.path}: expected a checkpoint of this version of dph, got one without {key}")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    step: int
    path: Path

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part, on the CPU: one file, or as many as processes wrote it."""
        shares = sorted(self.path.glob(f"{part}-*.safetensors"))
        return {k: t for path in [self.path / f"{part}.safetensors", *shares] for k, t in load_file(path).items()}

    def state(self) -> dict[str, Any]:
        """What was saved as JSON. UserError where a key is asked for that another version of dph did not write."""
        return _State(self.path, json.loads((self.path / "state.json").read_text()))


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where a run in ``directory`` keeps the checkpoint of a step."""
    return directory / "checkpoints" / f"step-{step:08d}"


def start_weights(directory: Path) -> dict[str, Tensor]:
    """The weights that the training of a run does not change. UserError where they are damaged."""
    path = directory / "start"
    if reason := damage(path):
        raise UserError(f"{path}: {reason}; the run cannot go on without it")
    return load_file(path / "start.safetensors")


def newest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in ``folder``; a warning names each newer one that had to be passed over."""
    for path in reversed(_steps(folder)):
        reason = damage(path)
        if reason is None:
            return Checkpoint(int(path.name.removeprefix("step-")), path)
        log.warning("%s is not complete (%s): passed over", path, reason)
    return None


def damage(path: Path) -> str | None:
    """Why the checkpoint at ``path`` is not complete, or None: every file has the size and hash of the manifest."""
    try:
        listed = json.loads((path / MANIFEST).read_text())["files"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST}"
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or _sha256(file) != digest:
            return f"{name} is damaged"
    return None


def _steps(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of what lies on any device."""
    save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path)


def _write_checkpoint(
    path: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping, shares: Sequence[Path] = ()
) -> None:
    with atomic_directory(path) as folder:
        for name, tensors in parts.items():
            write_tensors(folder / f"{name}.safetensors", tensors)
        for share in shares:
            share.rename(folder / share.name)
        (folder / "state.json").write_text(json.dumps(state))
        files = {f.name: {"size": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(folder.iterdir())}
        (folder / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=2))


def make_readable(folder: Path) -> None:
    """Let those read the files in ``folder`` who may read it; safetensors makes its own private."""
    readable = folder.stat().st_mode & 0o666
    for file in filter(Path.is_file, folder.rglob("*")):
        if readable & ~file.stat().st_mode:
            with contextlib.suppress(PermissionError):  # some file systems know no such thing
                file.chmod(readable)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes ``path`` when the block ends well: on disk whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        make_readable(temporary)
        for entry in [*temporary.rglob("*"), temporary]:
            sync(entry)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    temporary.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _clear(leaving: Path) -> None:
    """Delete what a killed process left half written; a directory that it was about to replace goes back."""
    place = leaving.with_name(leaving.name[1:].removesuffix(leaving.suffix))
    if leaving.suffix == ".old" and not place.exists():
        leaving.rename(place)
    else:
        shutil.rmtree(leaving)


def _write_file(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(text)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file's, or a directory's, contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of all random number generators (PyTorch on all devices, Python, NumPy), as tensors and JSON."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, *rest = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(keys.astype(np.int64))
    return tensors, {"python": random.getstate(), "numpy": [name, *rest]}


def set_generators(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Take up what :func:`generators` gave; devices that are not here are left out."""
    torch.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda:{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda:{i}"], i)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, *rest = state["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))
