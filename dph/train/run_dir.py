"""Run directory of one training stage.

    config.json                   the recipe
    lock                          locked while a process trains here
    metrics.jsonl                 one object per logged step
    tensorboard/                  the same, for TensorBoard
    tracker.json                  the run's id at Weights & Biases or trackio, if it is tracked there
    start/                        weights that training does not change and a resume needs (frozen, reference), and
                                  configuration and tokenizer of a model that the recipe names
    checkpoints/step-00000200/    weights, optimiser, data, memories, generators (``dph.train.checkpointing``)
    checkpoints/step-*.damaged    a damaged checkpoint, newer than the one from which the run resumed
    checkpoints/best.json         the best checkpoint with its metric and value, if ``output.best`` is set
    model/                        the finished model and its tokenizer
    heads/NAME/                   its trained reward heads (``dph.train.head_files``)
    adapter/                      the adapters alone in PEFT's format, for dph.Model, if the run trained adapters
    adapter-hf/                   the same for transformers' own class, if the model comes from a family

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from dph.data import atomic
from dph.errors import RunLost, UserError, one_line, shown
from dph.train import checkpointing, trackers
from dph.train.checkpointing import Checkpoint
from dph.train.distributed import SINGLE_PROCESS, World
from dph.train.recipe import BEFORE, MAY_CHANGE_ON_RESUME, from_dict
from dph.train.trackers import TensorBoard, Tracker

log = logging.getLogger(__name__)

BEST = "best.json"
MACHINE_METRICS = ("seconds", "tokens_per_second", "tflops_per_second", "mfu", "memory_gb")
"""Keys of metrics.jsonl that differ between equal runs."""

WRITTEN = (
    "config.json", "metrics.jsonl", "start", "checkpoints", "model", "heads", "adapter", "adapter-hf", "tensorboard",
    "tracker.json",
)  # fmt: skip
"""Names that a run writes."""

PLACES = re.compile(r"model\.(path|tokenizer|embeddings)|data\.(directory|sources\.\d+\.(source|directory))")
"""Options that name a place: a resumed run may change them if the content is the same (``dph.train.fingerprints``)."""

LEFTOVERS = re.compile(
    r"\.(model|heads|adapter|adapter-hf|start|shares)\.(partial|old)"
    r"|\.(config\.json|metrics\.jsonl|tracker\.json)\.[0-9a-f]{8}\.partial"
)
CHECKPOINT_LEFTOVERS = re.compile(r"\.step-\d{8,}\.(partial|old)|\.best\.json\.[0-9a-f]{8}\.partial")
"""Names of files and folders that a killed process leaves (``dph.data.atomic``)."""


class RunDirectory:
    """A run directory, new or resumed.

    The constructor only reads, and creates the lock; :meth:`begin` makes the first change, so that a resume that is
    refused before it changes no file of the run. All ranks see the same directory and call the same methods. Rank 0
    holds the lock and writes; an error on one rank raises on all of them (``World.fail_together``).

    Attributes:
        directory: path of the run directory.
        checkpoint: newest complete checkpoint, or None if the run starts from the beginning.
        saved_step: step of the last checkpoint written, or of the one to resume from; None before the first.
        config: recipe of the run, with the values of ``recipe.BEFORE`` if it began before these options.

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
        self._lock: Any = None
        self._metrics: MetricsFile | None = None
        self._readers: dict[str, Any] = {}  # TensorBoard and the tracker, by name, while they work
        self.config: dict[str, Any] = json.loads(json.dumps(config))
        self._written = self.config  # in config.json
        with world.fail_together():
            if world.rank == 0:
                self._lock = self._acquire_lock()
                try:
                    self._check(resume)
                except BaseException:
                    self._lock.close()
                    raise
        opened = self.directory, self.checkpoint, self.config
        self.directory, self.checkpoint, self.config = world.all_gather_object(opened)[0]
        self.saved_step = None if self.checkpoint is None else self.checkpoint.step

    @property
    def step(self) -> int:
        """Number of completed steps: the checkpoint's, or 0."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    def checkpoint_path(self, step: int) -> Path:
        """Return the path of the checkpoint of ``step``."""
        return checkpointing.checkpoint_path(self.directory, step)

    # Opening

    def _acquire_lock(self) -> Any:
        """Return the lock file, locked until it is closed or the process ends."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "lock"
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: expected the lock of a run, a regular file, got something else")
        lock = path.open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(f"{self.directory}: another process trains there; give another directory") from None
        except OSError as error:  # some network file systems have no locks
            log.warning("%s: cannot be locked against a second process (%s)", self.directory, error)
        return lock

    def _check(self, resume: bool) -> None:
        """Check the directory, and choose the checkpoint to resume from."""
        self._check_ownership()
        if self._has_started():
            if not resume:
                raise UserError(
                    f"{self.directory}: holds a run already; resume it (--resume) or give another directory (--output)"
                )
            self._written = _without_later(self._read_config(), self.config)
            self.config = _as_begun(self._written)
            self._check_same_config()
            self.checkpoint = self._select_checkpoint()
        if (name := self._output.get("tracker")) is not None:
            trackers.load_package(name)

    @property
    def _output(self) -> dict[str, Any]:
        """The recipe's section ``output``."""
        return self.config.get("output", {})

    def begin(self, best: Mapping[str, Any] | None = None) -> None:
        """Prepare the directory for training, new or from the checkpoint, when all else of the run is checked.

        ``best`` is the best evaluated step so far.

        Begins the tracker's run, which may be refused; deletes what killed processes left; renames damaged checkpoints
        that are newer than the one to resume from, since their steps are repeated; and writes the recipe, the mark of
        the best checkpoint, and the metrics up to the checkpoint's step.
        """
        self.world.first_failed(False)  # wait until no rank can refuse any more
        with self.world.fail_together():
            if self.world.rank == 0:
                self._begin(best)

    def _begin(self, best: Mapping[str, Any] | None) -> None:
        lines, last_logged = self._read_metrics()
        self._readers["TensorBoard"] = TensorBoard(self.directory / "tensorboard", self.step + 1)
        if (name := self._output.get("tracker")) is not None:
            generators = checkpointing.random_states()  # from which a tracker may draw
            try:
                self._readers[name] = Tracker(name, self._output["project"], self.directory, self.config, last_logged)
            finally:
                checkpointing.set_random_states(*generators)
        for leftover in self._leftovers():
            atomic.clean_up(leftover)
        folder = self.directory / "checkpoints"
        for path in checkpointing.saved_checkpoints(folder):
            if checkpointing.step_of(path) > self.step:
                renamed = path.with_name(path.name + ".damaged")
                shutil.rmtree(renamed, ignore_errors=True)
                path.rename(renamed)
                log.warning("%s is kept as %s", path, renamed.name)
        if self.checkpoint is not None and self.checkpoint.path.suffix == ".old":  # renamed with the other leftovers
            self.checkpoint = Checkpoint(self.step, self.checkpoint_path(self.step))
        if folder.exists():
            self._mark_best(best)
        atomic.write_text(self.directory / "config.json", json.dumps(self._written, indent=2) + "\n")
        path = self.directory / "metrics.jsonl"
        atomic.write_text(path, "".join(lines))
        self._metrics = MetricsFile(path)

    def _check_ownership(self) -> None:
        """Raise if the directory holds files with a run's names that no run wrote (a model's config.json, ...)."""
        config = self.directory / "config.json"
        if config.is_file():
            if checkpointing.saved_checkpoints(self.directory / "checkpoints"):
                self._read_config()  # raises if a run's is damaged
            with contextlib.suppress(UserError):
                if "stage" in checkpointing.read_json(config):
                    return
        if foreign := [name for name in WRITTEN if (self.directory / name).exists()]:
            raise UserError(
                f"{self.directory}: expected a new directory or a run's, got one with {', '.join(foreign)} that no run "
                "made; give another directory"
            )

    def _read_config(self) -> dict[str, Any]:
        """Return the recipe with which the run in the directory last began or resumed.

        Raises UserError if config.json is not a recipe.
        """
        path = self.directory / "config.json"
        config = checkpointing.read_json(path)
        if not isinstance(config.get("stage"), str):
            raise UserError(f"{path}: stage: expected the name of a stage, got {shown(config.get('stage'))}")
        return config

    def _has_started(self) -> bool:
        """Return whether the directory holds a step; one whose start failed (missing data, ...) can be used again."""
        metrics = self.directory / "metrics.jsonl"
        has_metrics = metrics.exists() and metrics.stat().st_size > 0
        has_checkpoints = bool(checkpointing.saved_checkpoints(self.directory / "checkpoints"))
        return (self.directory / "config.json").exists() and (has_metrics or has_checkpoints)

    def _leftovers(self) -> list[Path]:
        """Return what a killed process left half written or half replaced; only names of runs match."""
        leftovers = []
        for folder, pattern in ((self.directory, LEFTOVERS), (self.directory / "checkpoints", CHECKPOINT_LEFTOVERS)):
            leftovers += [path for path in sorted(folder.glob(".*")) if pattern.fullmatch(path.name)]
        return leftovers

    def _check_same_config(self) -> None:
        """Raise unless the options that may not change on resume are those that the run started with.

        Places may change if the newest checkpoint holds fingerprints, which the trainer compares.
        """
        # Options that a later version added had their default, which is the same in every stage.
        defaults = json.loads(json.dumps(from_dict({"stage": "sft"}).as_dict()))
        stored = _as_begun(self._read_config())
        before, now = _flatten(_with_defaults(stored, self.config, defaults)), _flatten(self.config)
        different, places_may_change = [], self._has_fingerprints()
        for key in sorted(before.keys() | now.keys(), key=lambda key: (key != "stage", key)):
            may_change = key in MAY_CHANGE_ON_RESUME or key.split(".")[0] in MAY_CHANGE_ON_RESUME
            if places_may_change and PLACES.fullmatch(key) and key in before and key in now:
                is_kind = key == "model.path" and None in (before[key], now[key])  # path or config, not another place
                may_change = may_change or not is_kind
            if not may_change and before.get(key) != now.get(key):
                values = [str(values.get(key, "nothing")) for values in (before, now)]
                expected, got = values if max(map(len, values)) <= 200 else map(shown, values)
                different.append(f"{key}: expected {expected}, got {got}")
        if before["stage"] != now["stage"]:
            different = different[:1]  # another stage explains all other differences
        if different:
            raise UserError(
                f"{'; '.join(different)}: a resumed run must not differ from how the one in {self.directory} began"
            )

    def _has_fingerprints(self) -> bool:
        """Return whether the newest checkpoint that can be read holds fingerprints of data, tokenizer and model."""
        for path in reversed(checkpointing.saved_checkpoints(self.directory / "checkpoints")):
            with contextlib.suppress(UserError):
                return "fingerprints" in checkpointing.read_json(path / "state.json")
        return False

    def _select_checkpoint(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, or None. UserError if all checkpoints are damaged."""
        folder = self.directory / "checkpoints"
        saved, newest = checkpointing.saved_checkpoints(folder), checkpointing.newest_checkpoint(folder)
        if newest is None and saved:
            raise UserError(
                f"{folder}: expected a complete checkpoint, got {', '.join(path.name for path in saved)}, all "
                "damaged; delete them for the run to begin again, or give another directory (--output)"
            )
        return newest

    def _read_metrics(self) -> tuple[list[str], trackers.Position | None]:
        """Return the complete lines up to the checkpoint's step, and the position of the last complete one after all.

        The position is None if there are no lines.
        """
        path = self.directory / "metrics.jsonl"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        kept, last_logged, dropped = [], None, 0
        for line in text.splitlines():
            step, values = _logged_step(line)
            if step is None:
                dropped += 1
                continue
            last_logged = trackers.position(step, values)
            if step <= self.step:
                kept.append(line + "\n")
        if dropped:
            log.warning("%s: %d lines that are not a run's are left out", path, dropped)
        return kept, last_logged

    # During training

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step to metrics.jsonl, TensorBoard and the tracker, without NaN (unused terms).

        Lines for which the disk has no room are written with a later one, at the latest before a checkpoint.
        TensorBoard and the tracker are left out from their first error on. Raises RunLost.
        """
        if self.world.rank > 0:
            return
        self._check_present()
        values = {key: value for key, value in values.items() if math.isfinite(value)}
        self._metrics.write({"step": step, **values})
        for name, reader in list(self._readers.items()):
            with self._harmless(name):
                reader.log(step, values)

    @contextlib.contextmanager
    def _harmless(self, name: str) -> Iterator[None]:
        """Context in which an error of TensorBoard or the tracker leaves it out for the rest of the run."""
        try:
            yield
        except Exception as error:  # of the disk, the network, or the package itself
            del self._readers[name]
            reason = one_line(error, 200) or type(error).__name__
            log.warning("%s is left out for the rest of the run: %s", name, reason)

    def _check_present(self) -> None:
        """Raise RunLost if the directory was deleted or moved."""
        try:
            present = os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.directory / "lock"))
        except OSError:
            present = False
        if not present:
            raise RunLost(f"{self.directory}: the run directory was deleted or moved while the run trained there")

    def save(self, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write checkpoint ``step``, then delete the oldest ones.

        The ``keep`` newest ones stay, and that of ``state["best"]["step"]`` if there is a best one.

        Args:
            step: completed steps.
            parts: tensors by file (weights, optimiser, ...); shards are gathered, and in a run of several ranks each
                rank writes its own ``data``.
            state: JSON values.
        """
        path = self.checkpoint_path(step)
        rank_folder, rank_files = self.directory / ".shares.partial", []
        if self.world.world_size > 1:
            parts, rank_files = checkpointing.gather_parts(parts, self.world, rank_folder)
        with self.world.fail_together():
            if self.world.rank == 0:
                self._check_present()
                self._metrics.sync()
                checkpointing.write_checkpoint(path, step, parts, state, rank_files)
                self.saved_step = step
                best = self._mark_best(state.get("best"))
                for old in checkpointing.saved_checkpoints(path.parent)[: -self.keep]:
                    if old != best:
                        shutil.rmtree(old)
                if rank_files:
                    rank_folder.rmdir()
        self.saved_step = step
        return path

    def _mark_best(self, best: Mapping[str, Any] | None) -> Path | None:
        """Write best.json, or delete it if there is no best step; return its checkpoint."""
        mark = self.directory / "checkpoints" / BEST
        if best is None:
            mark.unlink(missing_ok=True)
            return None
        path = self.checkpoint_path(best["step"])
        atomic.write_text(mark, json.dumps({"checkpoint": path.name, **best}) + "\n")
        return path

    def save_start(
        self,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any] | None = None,
        write_more: Callable[[Path], None] | None = None,
    ) -> None:
        """Write the weights that training does not change, once, with a JSON ``state``; ``write_more`` adds files."""
        with self.world.fail_together():
            if self.world.rank == 0:
                path = self.directory / "start"
                checkpointing.write_checkpoint(path, 0, {"start": tensors}, state or {}, write_more=write_more)

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
                self._check_present()
                transformers.utils.logging.disable_progress_bar()
                with atomic.atomic_directory(path) as folder:
                    model.save_pretrained(folder)
                    if tokenizer is not None:
                        tokenizer.save_pretrained(folder)
        return path

    def save_adapter(self, name: str, save: Callable[[Path], None]) -> None:
        """Write the folder ``name`` by ``save``, which gets a path."""
        with self.world.fail_together():
            if self.world.rank == 0:
                self._check_present()
                with atomic.atomic_directory(self.directory / name) as folder:
                    save(folder)

    def close(self) -> None:
        """Flush and close the files, and release the lock."""
        for name, reader in list(self._readers.items()):
            with self._harmless(name):
                reader.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._lock is not None:
            self._lock.close()


class MetricsFile:
    """metrics.jsonl, opened to append; lines that cannot be written, as on a full disk, wait for a later call."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, path.open("ab", buffering=0)
        self._unwritten, self._reported = b"", False

    def write(self, values: Mapping[str, Any]) -> None:
        """Write one line, and those that wait. Logs a warning, once, if that fails."""
        self._unwritten += json.dumps(values).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not self._reported:
                log.warning("%s: %s; its lines wait until they can be written", self.path, error.strerror)
            self._reported = True

    def _flush(self) -> None:
        while self._unwritten:  # a full disk takes a part
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def sync(self) -> None:
        """Write the lines that wait, and flush the file to the disk. Raises OSError."""
        with atomic.naming(self.path):
            self._flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write the lines that wait, if possible, and close the file."""
        with contextlib.suppress(OSError):
            self._flush()
        self._file.close()


def _logged_step(line: str) -> tuple[int | None, Mapping[str, Any]]:
    """Return the step of a line of metrics.jsonl and its values; None if no run wrote it, or not whole."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None, {}
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None, {}
    return values["step"], values


def _without_later(stored: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` without the options of ``BEFORE`` that the ``stored`` one lacks: the run began before them."""
    kept = dict(config)
    for key in BEFORE:
        section, name = key.split(".")
        if section in kept and name not in stored.get(section, {}):
            kept[section] = {option: value for option, value in kept[section].items() if option != name}
    return kept


def _as_begun(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the values of ``BEFORE`` for the options that it lacks."""
    begun = dict(config)
    for key, value in BEFORE.items():
        section, name = key.split(".")
        if section in begun:
            begun[section] = {name: value} | begun[section]
    return begun


def _with_defaults(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``before`` with the default of each option that it lacks and ``now`` has; a list is one value."""
    values = dict(before)
    for key in now.keys() & defaults.keys():
        if key not in values:
            values[key] = defaults[key]
        elif all(isinstance(part.get(key), Mapping) for part in (before, now, defaults)):
            values[key] = _with_defaults(before[key], now[key], defaults[key])
    return values


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
