"""Readers of a run's metrics: TensorBoard, and Weights & Biases or trackio (``output.tracker``).

Neither package is imported, and no data is sent, unless the recipe sets ``output.tracker``. Destination and account are
configured as the tracker documents it (``wandb login``, ``WANDB_MODE=offline``, ``TRACKIO_SPACE_ID``).
"""

import contextlib
import importlib
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dph.data import atomic
from dph.errors import UserError, one_line

FILE = "tracker.json"
"""File in the run directory with the tracker's name and the run's id there."""

Position = tuple[int, bool]
"""Order of a run's log lines: the step, and whether the line is an evaluation."""


def position(step: int, values: Mapping[str, float]) -> Position:
    """Return the position of the log line with ``values``."""
    return step, any(key.startswith("eval/") for key in values)


class TensorBoard:
    """Event file for TensorBoard, written by this thread: that of ``SummaryWriter`` reports its errors by itself.

    Args:
        directory: folder of the event files, created with the first line.
        first_step: step of the first line; a resumed run replaces what was logged from this step on.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        self.directory, self.first_step = directory, first_step
        self._file = self._writer = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line. Raises ImportError, OSError and others."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._file is None:
            self._open()
        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._write(step=step, summary=Summary(value=scalars))
        self._file.flush()

    def _open(self) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self._file = (self.directory / name).open("wb")
        self._writer = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=self.first_step, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def load_package(name: str) -> ModuleType:
    """Return the package of a tracker. Raises UserError if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"output.tracker: needs the {name} package: pip install {name}") from None


class Tracker:
    """A run at a tracker, which receives every log line once.

    Args:
        name: "wandb" or "trackio".
        project: project of the run at the tracker.
        directory: run directory; its name is the run's name, and ``FILE`` in it holds the run's id for a resume.
        config: configuration of the run, shown by the tracker.
        last_logged: position of the last line that the run logged before it was interrupted; None for a new run.
            A resumed run repeats the lines since its checkpoint, up to that position they are not sent again.

    Raises UserError if the package is missing or cannot start a run.
    """

    def __init__(
        self, name: str, project: str, directory: Path, config: Mapping[str, Any], last_logged: Position | None = None
    ) -> None:
        module = load_package(name)
        saved_id = None if last_logged is None else _saved_id(directory / FILE, name)
        self.last_logged = None if saved_id is None else last_logged  # a new tracker has received no line
        run_id = saved_id or uuid.uuid4().hex[:8]
        start = _start_wandb if name == "wandb" else _start_trackio
        try:
            with contextlib.redirect_stdout(sys.stderr):  # trackio prints a greeting
                self._run = start(module, project, directory, config, run_id, saved_id is not None)
            self._finish = module.finish  # trackio would finish a run again at exit after the run's own finish()
        except Exception as error:  # no account, no network, an invalid name: the tracker's own message
            reason = one_line(error, 500) or type(error).__name__
            raise UserError(f"output.tracker: {name} cannot begin a run: {reason}") from error
        if saved_id is None:  # after a start that may fail: a refused resume changes no file
            try:
                atomic.write_text(directory / FILE, json.dumps({"tracker": name, "id": run_id}) + "\n")
            except BaseException:
                self.close()
                raise

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send one line, unless the tracker received it before the run was interrupted."""
        if self.last_logged is None or position(step, values) > self.last_logged:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send the remaining data and finish the run."""
        with contextlib.redirect_stdout(sys.stderr):
            self._finish()


def _saved_id(path: Path, name: str) -> str | None:
    """Return the run's id from ``tracker.json``, or None if the run had no tracker or another one."""
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):  # not tracked before, or damaged
        return None
    same_tracker = isinstance(saved, dict) and saved.get("tracker") == name
    return saved["id"] if same_tracker and isinstance(saved.get("id"), str) else None


def _start_wandb(
    wandb: Any, project: str, directory: Path, config: Mapping[str, Any], run_id: str, resumed: bool
) -> Any:
    return wandb.init(
        project=project,
        id=run_id,
        name=directory.name,
        dir=str(directory),
        config=dict(config),
        resume="allow" if resumed else "never",
        allow_val_change=True,  # some options may change on resume
    )


def _start_trackio(
    trackio: Any, project: str, directory: Path, config: Mapping[str, Any], run_id: str, resumed: bool
) -> Any:
    name = f"{directory.name}-{run_id}"  # trackio identifies runs by name alone
    return trackio.init(project, name=name, config=dict(config), resume="allow" if resumed else "never")
