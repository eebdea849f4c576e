"""Run directory of one training stage.

    config.json                   the recipe
    lock                          locked while a process trains here
    metrics.jsonl                 one object per logged step
    tensorboard/                  the same, for TensorBoard
    tracker.json                  the run's id at Weights & Biases or trackio, if it is tracked there
    start/                        weights that training does not change and a resume needs (frozen, reference)
    checkpoints/step-00000200/    weights, optimiser, data, memories, generators (``dph.train.checkpointing``)
    checkpoints/step-*.damaged    a damaged checkpoint, newer than the one from which the run resumed
    checkpoints/best.json         the best checkpoint with its metric and value, if ``output.best`` is set
    model/                        the finished model and its tokenizer

Tensors are safetensors, the rest is JSON; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from dph.errors import UserError
from dph.train import checkpointing, trackers
from dph.train.checkpointing import Checkpoint
from dph.train.distributed import SINGLE_PROCESS, World
from dph.train.recipe import MAY_CHANGE_ON_RESUME
from dph.train.trackers import Tracker

log = logging.getLogger(__name__)

BEST = "best.json"
MACHINE_METRICS = ("seconds", "tokens_per_second", "tflops_per_second", "mfu", "memory_gb")
"""Keys of metrics.jsonl that differ between equal runs."""

WRITTEN = ("config.json", "metrics.jsonl", "start", "checkpoints", "model", "tensorboard", "tracker.json")
"""Names that a run writes."""


class RunDirectory:
    """A run directory, new or resumed.

    All ranks see the same directory and call the same methods. Rank 0 holds the lock and writes; an error on one rank
    raises on all of them (``World.fail_together``).

    Attributes:
        directory: path of the run directory.
        checkpoint: newest complete checkpoint, or None if the run starts from the beginning.

    Raises UserError if the directory holds a run and ``resume`` is off, was made by another configuration, is in use
    by another process, or holds files that a run would overwrite and that are not a run's.
    """

    def __init__(
        self,
        directory: str | Path,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        keep: int = 2,
        world: World = SINGLE_PROCESS,
    ) -> None:
        self.world, self.keep = world, keep
        self.directory = Path(directory)
        self.checkpoint: Checkpoint | None = None
        self._lock = self._metrics = self._board = None
        self._tracker: Tracker | None = None
        with world.fail_together():
            if world.rank == 0:
                self._lock = self._acquire_lock()
                try:
                    self._open(json.loads(json.dumps(config)), resume)
                except BaseException:
                    self._lock.close()
                    raise
        self.directory, self.checkpoint = world.all_gather_object((self.directory, self.checkpoint))[0]

    @property
    def step(self) -> int:
        """Number of completed steps: the checkpoint's, or 0."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    # Opening

    def _acquire_lock(self) -> Any:
        """Return the lock file, locked until it is closed or the process ends."""
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
        """Check the directory, choose the checkpoint to resume from, and open the metrics and the tracker."""
        self._check_ownership()
        if self._has_started():
            if not resume:
                raise UserError(
                    f"{self.directory}: holds a run already; resume it (--resume) or give another directory (--output)"
                )
            self._check_same_config(config)
            for leftover in self._leftovers():
                checkpointing.clean_up(leftover)
            self.checkpoint = self._select_checkpoint()
            self._mark_best({} if self.checkpoint is None else self.checkpoint.state())
        checkpointing.write_text(self.directory / "config.json", json.dumps(config, indent=2) + "\n")
        last_logged = self._open_metrics()
        output = config.get("output", {})
        if output.get("tracker") is not None:
            self._tracker = Tracker(output["tracker"], output["project"], self.directory, config, last_logged)

    def _check_ownership(self) -> None:
        """Raise if the directory holds files with a run's names that no run wrote (a model's config.json, ...)."""
        try:
            is_run = "stage" in json.loads((self.directory / "config.json").read_text())
        except (OSError, ValueError, TypeError):
            is_run = False
        if is_run:
            return
        if foreign := [name for name in WRITTEN if (self.directory / name).exists()]:
            raise UserError(
                f"{self.directory}: expected a new directory or a run's, got one with {', '.join(foreign)} that no run "
                "made; give another directory"
            )

    def _has_started(self) -> bool:
        """Return whether the directory holds a step; one whose start failed (missing data, ...) can be used again."""
        metrics = self.directory / "metrics.jsonl"
        has_metrics = metrics.exists() and metrics.stat().st_size > 0
        has_replaced = any(path.suffix == ".old" for path in self._leftovers())
        has_checkpoints = bool(checkpointing.saved_checkpoints(self.directory / "checkpoints"))
        return (self.directory / "config.json").exists() and (has_metrics or has_checkpoints or has_replaced)

    def _leftovers(self) -> list[Path]:
        """Return the directories that a killed process left half written or half replaced; only names of runs match."""
        leftovers = []
        checkpoints = self.directory / "checkpoints"
        for folder, name in ((self.directory, r"\.(model|start|shares)"), (checkpoints, r"\.step-\d{8,}")):
            for path in sorted(folder.glob(".*")):
                if re.fullmatch(name + r"\.(partial|old)", path.name):
                    leftovers.append(path)
        return leftovers

    def _check_same_config(self, config: dict) -> None:
        """Raise unless the options that may not change on resume are those that the run started with."""
        before = _flatten(json.loads((self.directory / "config.json").read_text()))
        now = _flatten(config)
        different = []
        for key in sorted(before.keys() | now.keys(), key=lambda key: (key != "stage", key)):
            may_change = key in MAY_CHANGE_ON_RESUME or key.split(".")[0] in MAY_CHANGE_ON_RESUME
            if not may_change and before.get(key) != now.get(key):
                different.append(f"{key}: expected {before.get(key, 'nothing')}, got {now.get(key, 'nothing')}")
        if before["stage"] != now["stage"]:
            different = different[:1]  # another stage explains all other differences
        if different:
            raise UserError(
                f"{'; '.join(different)}: a resumed run must not differ from how the one in {self.directory} began"
            )

    def _select_checkpoint(self) -> Checkpoint | None:
        """Return the newest complete checkpoint; rename newer ones, which are damaged, since their steps are repeated.

        UserError if all checkpoints are damaged.
        """
        folder = self.directory / "checkpoints"
        saved, newest = checkpointing.saved_checkpoints(folder), checkpointing.newest_checkpoint(folder)
        if newest is None:
            if saved:
                raise UserError(
                    f"{folder}: expected a complete checkpoint, got {', '.join(path.name for path in saved)}, all "
                    "damaged; delete them for the run to begin again, or give another directory (--output)"
                )
            return None
        for path in saved[saved.index(newest.path) + 1 :]:
            renamed = path.with_name(path.name + ".damaged")
            shutil.rmtree(renamed, ignore_errors=True)
            path.rename(renamed)
            log.warning("%s is kept as %s", path, renamed.name)
        return newest

    def _open_metrics(self) -> trackers.Position | None:
        """Drop the lines after the checkpoint's step and a truncated line, then open the file to append.

        Returns the position of the last complete line before that, or None.
        """
        path = self.directory / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        kept, last_logged = [], None
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                values = json.loads(line)
                last_logged = trackers.position(values["step"], values)
                if values["step"] <= self.step:
                    kept.append(line + "\n")
        checkpointing.write_text(path, "".join(kept))
        self._metrics = path.open("a")
        return last_logged

    # During training

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step to metrics.jsonl, TensorBoard and the tracker, without NaN (unused terms)."""
        if self.world.rank > 0:
            return
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

    def save(self, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write checkpoint ``step``, then delete the oldest ones.

        The ``keep`` newest ones stay, and that of ``state["best"]["step"]`` if there is a best one.

        Args:
            step: completed steps.
            parts: tensors by file (weights, optimiser, ...); shards are gathered, and in a run of several ranks each
                rank writes its own ``data``.
            state: JSON values.
        """
        path = checkpointing.checkpoint_path(self.directory, step)
        rank_folder, rank_files = self.directory / ".shares.partial", []
        if self.world.world_size > 1:
            parts, rank_files = checkpointing.gather_parts(parts, self.world, rank_folder)
        with self.world.fail_together():
            if self.world.rank == 0:
                os.fsync(self._metrics.fileno())
                checkpointing.write_checkpoint(path, step, parts, state, rank_files)
                best = self._mark_best(state)
                for old in checkpointing.saved_checkpoints(path.parent)[: -self.keep]:
                    if old != best:
                        shutil.rmtree(old)
                if rank_files:
                    rank_folder.rmdir()
        return path

    def _mark_best(self, state: Mapping[str, Any]) -> Path | None:
        """Write best.json from ``state["best"]``, or delete it if there is no best step; return its checkpoint."""
        mark, best = self.directory / "checkpoints" / BEST, state.get("best")
        if best is None:
            mark.unlink(missing_ok=True)
            return None
        path = checkpointing.checkpoint_path(self.directory, best["step"])
        checkpointing.write_text(mark, json.dumps({"checkpoint": path.name, **best}) + "\n")
        return path

    def save_start(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the weights that training does not change, once."""
        with self.world.fail_together():
            if self.world.rank == 0:
                checkpointing.write_checkpoint(self.directory / "start", 0, {"start": tensors}, {})

    def load_start(self) -> dict[str, Tensor]:
        """Return the weights that ``save_start`` wrote; rank 0 raises UserError if they are damaged."""
        with self.world.fail_together():
            if self.world.rank == 0:
                return checkpointing.load_start(self.directory)
        return Checkpoint(0, self.directory / "start").tensors("start")

    def save_model(self, model: Any, tokenizer: Any) -> Path:
        """Write the finished model in the format of ``save_pretrained``, and its tokenizer unless it is None."""
        path = self.directory / "model"
        with self.world.fail_together():
            if self.world.rank == 0:
                transformers.utils.logging.disable_progress_bar()
                with checkpointing.atomic_directory(path) as folder:
                    model.save_pretrained(folder)
                    if tokenizer is not None:
                        tokenizer.save_pretrained(folder)
        return path

    def close(self) -> None:
        """Flush and close the files, and release the lock."""
        for resource in (self._metrics, self._lock, self._board, self._tracker):
            if resource is not None:
                resource.close()


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Return the values of nested sections and lists by their dotted keys, as in the recipe's errors."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {key: value}
    flat = {}
    for name, item in items:
        flat |= _flatten(item, f"{key}.{name}" if key else str(name))
    return flat
