"""Weights & Biases or trackio, beside TensorBoard, where a recipe asks for one (``output.tracker``).

Nothing is imported and nothing is sent anywhere unless it is asked for; where to, and as whom, is the tracker's own
matter (``wandb login``, ``WANDB_MODE=offline``, ``TRACKIO_SPACE_ID``).
"""

import contextlib
import importlib
import json
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dph.errors import UserError

FILE = "tracker.json"  # in the run directory: the tracker's name and the run's id there
Line = tuple[int, bool]  # what tells a run's lines apart, in their order: the step, and whether it is an evaluation


def line(step: int, values: Mapping[str, float]) -> Line:
    """Which line of a run it is that says ``values``."""
    return step, any(key.startswith("eval/") for key in values)


class Tracker:
    """A run at a tracker, which has every line once.

    Args:
        name: "wandb" or "trackio".
        project: that the run belongs to there.
        directory: of the run, which is called after it; ``FILE`` in it holds the id by which a resumed run goes on.
        config: what the tracker shows as the run's configuration.
        seen: the last line that the run had logged before it was interrupted; None where it begins. Up to there a
            resumed run logs its lines again, which the tracker has.

    Raises UserError where the package is missing, or cannot begin a run.
    """

    def __init__(
        self, name: str, project: str, directory: Path, config: Mapping[str, Any], seen: Line | None = None
    ) -> None:
        module = _module(name)
        known = None if seen is None else _known(directory / FILE, name)
        self.seen = None if known is None else seen  # one that it is new to has seen nothing
        identity = known or uuid.uuid4().hex[:8]
        (directory / FILE).write_text(json.dumps({"tracker": name, "id": identity}) + "\n")
        try:
            with contextlib.redirect_stdout(sys.stderr):  # trackio greets there
                self._run = START[name](module, project, directory, config, identity, known is not None)
            self._finish = module.finish  # the run's own leaves trackio to finish it again at exit
        except Exception as error:  # no account, no network, a name that it does not take: in its own words
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"output.tracker: {name} cannot begin a run: {reason}") from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line, unless the tracker has it."""
        if self.seen is None or line(step, values) > self.seen:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        with contextlib.redirect_stdout(sys.stderr):
            self._finish()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"output.tracker: needs the {name} package: pip install {name}") from None


def _known(path: Path, name: str) -> str | None:
    """The id under which a tracker knows the run, if it is the one that the run had before."""
    try:
        saved = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # not tracked before, or killed as it was written
        return None
    return saved["id"] if saved["tracker"] == name else None


def _wandb(wandb: Any, project: str, directory: Path, config: Mapping[str, Any], identity: str, resumed: bool) -> Any:
    return wandb.init(
        project=project,
        id=identity,
        name=directory.name,
        dir=str(directory),
        config=dict(config),
        resume="allow" if resumed else "never",
        allow_val_change=True,  # a resumed run may differ (runs.FREE)
    )


def _trackio(
    trackio: Any, project: str, directory: Path, config: Mapping[str, Any], identity: str, resumed: bool
) -> Any:
    name = f"{directory.name}-{identity}"  # trackio finds runs again by their names alone
    return trackio.init(project, name=name, config=dict(config), resume="allow" if resumed else "never")


START = {"wandb": _wandb, "trackio": _trackio}
