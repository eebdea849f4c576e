"""Endings of a run, and the state that each of them saves.

Every ending but SIGKILL and a second Ctrl-C saves the state after the last whole step: a signal, an error of the data,
of a worker process, of an evaluation or within a step, and divergence. An error within a step can be taken back until
the step changes the Transformer-XL memory or the weights; after that the newest checkpoint stands, as it does if the
disk is full. Of several ranks, one whose batch fails or that receives a signal stops all, and they save together; an
error elsewhere in a step, which the others cannot hear of, ends them without.
"""

from __future__ import annotations

import contextlib
import enum
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.errors import OtherRankFailed, RunLost, add_note, one_line
from dph.model.config import FAMILIES

if TYPE_CHECKING:
    from dph.model.model import Model
    from dph.train.progress import Progress
    from dph.train.run_dir import RunDirectory
    from dph.train.trainer import Trainer


class Diverged(RuntimeError):
    """Training stopped after too many skipped steps in a row; the weights are those before the first of them."""


class Reached(enum.Enum):
    """Progress of the unfinished step: an error leaves the state after the last whole step to be saved, or none."""

    NOTHING = "the last whole step is the state"
    BATCH = "a batch was taken, which can be given back"
    CHANGES = "memory or weights are changing: the state is that of no step, and cannot be saved"


@dataclass(frozen=True)
class Result:
    """Result of training a stage.

    Attributes:
        model: trained model in fp32; gathered on the CPU if several ranks trained shards.
        tokenizer: the model's tokenizer.
        run: run directory; its ``model`` opens with ``Model.from_pretrained``.
        step: optimizer steps done.
        interrupted: whether a signal (SIGTERM, Ctrl-C, SIGHUP, SIGXCPU) stopped the run: a checkpoint was saved, no
            model; ``resume=True`` continues.
        signal: number of the signal that this process received; 0 for none.
        evaluation: last metrics on held-out records.
    """

    model: Model
    tokenizer: Any
    run: Path
    step: int
    interrupted: bool
    signal: int
    evaluation: dict[str, float]

    @property
    def exit_code(self) -> int:
        """Exit code of a command: 0, or 128 and the signal's number (SIGTERM's if another rank received the signal)."""
        return 128 + (self.signal or signal.SIGTERM) if self.interrupted else 0


def after_error(trainer: Trainer, error: Exception, progress: Progress) -> None:
    """Save the state after the last whole step, if that is possible, and note in ``error`` where a run resumes."""
    is_common = error is trainer.common_error
    if isinstance(error, RunLost | OtherRankFailed) and not is_common:
        return
    # Of several ranks, all have to save; they diverge together, since they read the same metrics.
    together = trainer.world.world_size == 1 or is_common or isinstance(error, Diverged)
    if together and trainer.reached is not Reached.CHANGES:
        try:
            trainer.optimiser.zero_grad()  # frees memory
            with contextlib.suppress(Diverged):
                trainer.log_pending(progress)
            if trainer.step not in (0, trainer.run.saved_step):
                trainer.save_checkpoint()
        except Exception as second:
            reason = one_line(second, 500)
            if isinstance(second, OSError) and second.filename is not None:
                reason = f"{second.filename}: {second.strerror}"
            add_note(error, f"saving step {trainer.step} failed, too: {reason}")
    _note_saved(error, trainer.run, trainer.step)


def _note_saved(error: Exception, run: RunDirectory, step: int) -> None:
    """Note in ``error`` from which step a run resumes that has done ``step`` steps."""
    if isinstance(error, RunLost) or step == 0:
        return
    text = "no checkpoint was saved"
    if run.saved_step is not None:
        text = f"step {run.saved_step} is saved in {run.directory}, --resume continues from it"
    add_note(error, text)


def finish(trainer: Trainer, stopped: int | None, progress: Progress) -> Result:
    """Save the model, unless a signal ``stopped`` the run after that step, and return the result."""
    run, recipe, model, best = trainer.run, trainer.recipe, trainer.model, trainer.best
    if stopped is not None:
        progress.note(f"stopped after step {stopped}, which is saved; a resumed run continues from it")
    else:
        if recipe.kind == "preference" and recipe.objective.dph_weight > 0:
            model.untrained_heads -= set(recipe.objective.heads)
        try:
            path = run.save_model(model.eval(), trainer.stage.tokenizer)
            if trainer.adapters is not None:
                run.save_adapter("adapter", trainer.adapters.save)
                if model.config.family is not None:
                    table = FAMILIES[model.config.family].weights
                    run.save_adapter("adapter-hf", partial(trainer.adapters.save_family, table))
        except Exception as error:
            _note_saved(error, run, trainer.step)
            raise
        progress.note(f"the model is in {path}")
        if best.state is not None and recipe.output.model == "best":
            progress.note(f"its weights are those of step {best.state['step']}, {best}")
        elif best.state is not None:
            path = run.checkpoint_path(best.state["step"])
            progress.note(f"{best} is {path}, which dph convert makes a model")
    return Result(
        model=model,
        tokenizer=trainer.stage.tokenizer,
        run=run.directory,
        step=trainer.step if stopped is None else stopped,
        interrupted=stopped is not None,
        signal=trainer.signal(),
        evaluation=trainer.evaluation,
    )
