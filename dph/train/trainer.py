"""The loop of a training stage: data -> loss -> gradient -> clip -> LaProp, and checkpoints from which it goes on.

Nothing here is specific to a stage (``dph.train.stages.base``) or to a data set. The device is never waited for within a step, but
for the one that is recorded (``dph.train.cuda_graph``): the figures of a step are read while the next one runs.
"""

import contextlib
import copy
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dph.devices import Reading, low_precision
from dph.model.model import Model
from dph.optim import LaProp, gradient_norm, param_groups, warmup_cosine
from dph.train import best_checkpoint, compile, cuda_graph, distributed, run_dir
from dph.train.best_checkpoint import Best
from dph.train.budget import flops
from dph.train.checkpointing import SharedRun
from dph.train.progress import Progress, Window
from dph.train.recipe import Recipe
from dph.train.signals import told_to_stop
from dph.train.skip_update import Guard
from dph.train.stages.base import Loss, Stage, Work

log = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """As many updates in a row as the recipe allows had to be skipped: the weights are those before the first."""


@dataclass(frozen=True)
class Result:
    """What a stage of training gives.

    Attributes:
        model: the trained model, in fp32; of several processes' shards made whole, on the CPU.
        tokenizer: its tokenizer.
        run: the run directory; ``model`` in it opens with ``Model.from_pretrained``.
        step: updates done.
        interrupted: SIGTERM or Ctrl-C came: a checkpoint was saved, no model; ``resume=True`` goes on.
        signal: number of the signal that came to this process; 0 for none.
        evaluation: the last figures on held-out records.
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
        """Of a command: 0, or as shells have it 128 and the signal (SIGTERM where another process was told)."""
        return 128 + (self.signal or signal.SIGTERM) if self.interrupted else 0


class Update(NamedTuple):
    """What an update gives, on the device.

    Attributes:
        losses: of its parts, without gradient.
        loss: of all, a mean.
        figures: fp64: the means of what the stage's ``metrics`` name, the gradient's norm, how many updates in a row
            were skipped, how many processes were told to stop.
    """

    losses: list[Loss]
    loss: Tensor
    figures: Tensor


class Launched(NamedTuple):
    """A step that the device has been given, and the figures that it will give."""

    step: int
    lr: float
    work: Work
    losses: list[Loss]
    loss: Tensor
    counts: dict[str, int]
    left_out: dict[str, str]
    reading: Reading


class Trainer:
    """One run of one stage. Made, it stands at the run's checkpoint, or at the beginning."""

    def __init__(self, recipe: Recipe, stage: Stage, run: run_dir.Run | SharedRun, quiet: bool = False) -> None:
        self.recipe, self.stage, self.run, self.quiet = recipe, stage, run, quiet
        self.world, self.settings = stage.world, recipe.optimiser
        self.model = self.whole = stage.model  # of which several processes keep but shards
        if recipe.compile:
            with self.world.together():
                compile.require(self.world.device or self.model.device)
        if recipe.cuda_graph:
            cuda_graph.require(self.world.device or self.model.device, self.world.size)
        self.before = {name: p.requires_grad for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            p.requires_grad_(stage.trains(name))
        self._begin()
        low = low_precision(recipe.precision, self.world.device or self.model.device)
        self._share(torch.bfloat16 if low else None)
        self.names = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimiser = self._optimiser()
        self.window, self.evaluation = Window((*stage.metrics, "grad_norm")), {}
        best_checkpoint.check(recipe.output.best, stage.figures())
        self.best = Best(recipe.output.best)
        self.guard = Guard(recipe.guard.stop_after, recipe.guard.spike, self.model.device)
        self._launched: Launched | None = None
        self._forget = 0  # the step before which the stage forgets what it remembers of the data
        self._clock = 0.0  # when figures were last taken up
        self._left_out: dict[str, str] = {}  # what has been said of records that were left out
        self._told_to_stop: Callable[[], int] = int
        self._stopping = False  # whether a process has been told to, as all have read
        if self.run.checkpoint is not None:
            self._load(self.run.checkpoint)
        self.model.backbone.gradient_checkpointing = recipe.checkpointing == "block"
        self.low = low and self.world.size == 1
        if self.low:
            self.optimiser.lower(torch.bfloat16)
            self.model.to(torch.bfloat16)
        if recipe.compile:
            for model in filter(None, (self.model, self.stage.reference)):
                compile.switch_on(model.backbone)
        self.replayed = self._capture() if recipe.cuda_graph else None

    def _optimiser(self) -> LaProp:
        s = self.settings
        groups = param_groups(self.model, s.weight_decay, s.prior_decay, s.no_decay)
        return LaProp(groups, lr=s.lr, betas=s.betas, eps=s.eps)

    def _begin(self) -> None:
        """Keep the weights that a resume cannot find elsewhere, or take them up; make the reference."""
        if self.run.checkpoint is None:
            kept = dict(self.model.named_parameters())
            if not self.stage.needs_reference:
                kept = {name: p for name, p in kept.items() if not p.requires_grad}
            self.run.save_start(kept)
        else:
            self._set_weights(self.run.load_start())
        if self.stage.needs_reference:
            self.stage.reference = copy.deepcopy(self.model).requires_grad_(False).eval()
            self.stage.reference.heads.clear()

    def _share(self, lowered: torch.dtype | None) -> None:
        """The reference in the run's precision; to each of several processes a shard of it and of the model's copy."""
        if self.stage.reference is not None and lowered is not None:
            self.stage.reference.to(lowered)
        if self.world.size > 1:
            self.model = self.stage.model = self.world.shard(copy.deepcopy(self.whole), lowered)
            if self.stage.reference is not None:
                self.stage.reference = self.world.shard(self.stage.reference, lowered)

    def _set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        params = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                params[name].copy_(distributed.placed(tensor, params[name]))

    def _load(self, checkpoint: run_dir.Checkpoint) -> None:
        state = checkpoint.state()
        self._set_weights(checkpoint.tensors("weights"))
        params = {name: p for p, name in self.names.items()}
        optimiser = checkpoint.tensors("optimiser")
        placed = {key: distributed.placed(t, params[key.rpartition("/")[0]]) for key, t in optimiser.items()}
        self.optimiser.from_tensors(self.names, placed, state["optimiser"])
        self.stage.load_state(checkpoint.tensors("data"), state["data"])
        self.window.load(state["window"])
        self.guard.load(state["guard"])
        self._forget = state["forget"]
        self.evaluation = state["evaluation"]
        self.best.load(self._kept(state["best"], checkpoint))
        run_dir.set_generators(checkpoint.tensors("generators"), state["generators"])

    def _kept(self, best: dict[str, Any] | None, newest: run_dir.Checkpoint) -> dict[str, Any] | None:
        """The best step, or None where its checkpoint is not there whole any more."""
        if best is None or best["step"] == newest.step:
            return best
        path = run_dir.checkpoint_path(self.run.directory, best["step"])
        reason = self.world.gather(run_dir.damage(path) if self.world.rank == 0 else None)[0]
        if reason is None:
            return best
        log.warning("%s, the best, is not complete (%s): the next to be evaluated is the best", path, reason)
        return None

    def _save(self, step: int) -> None:
        optimiser, optimiser_state = self.optimiser.to_tensors(self.names)
        data, data_state = self.stage.state()
        generators, generators_state = run_dir.generators()
        weights = self.optimiser.weights(self.names)
        parts = {"weights": weights, "optimiser": optimiser, "data": data, "generators": generators}
        state = {
            "optimiser": optimiser_state,
            "data": data_state,
            "window": self.window.state(),
            "guard": self.guard.state(),
            "forget": self._forget,
            "evaluation": self.evaluation,
            "best": self.best.found,
            "generators": generators_state,
        }
        self.run.save(step, parts, state)

    def train(self) -> Result:
        """Run the loop to its end, or until SIGTERM or Ctrl-C."""
        progress = Progress(self.recipe.stage, self.settings.steps, self.run.step, self.quiet)
        self.model.train()
        try:
            for note in self.stage.notes:
                progress.note(note)
            if self.run.step == self.settings.steps:
                progress.note(f"all {self.run.step} steps are done")
            with told_to_stop(progress.note) as self._told_to_stop, contextlib.closing(progress):
                stopped = self._loop(progress)
                self._collect()
        finally:
            self._give_back()
        self._tell_left_out(self.stage.left_out(), progress, in_all=True)
        if stopped is None:
            progress.note(f"the model is in {self._finish()}")
            if self.best.found is not None:
                path = run_dir.checkpoint_path(self.run.directory, self.best.found["step"])
                progress.note(f"{self.best} is {path}, which dph convert makes a model")
        else:
            progress.note(f"stopped after step {stopped}, which is saved; a resumed run goes on from there")
        done = self.settings.steps if stopped is None else stopped
        return Result(
            model=self.model,
            tokenizer=self.stage.tokenizer,
            run=self.run.directory,
            step=done,
            interrupted=stopped is not None,
            signal=self._told_to_stop(),
            evaluation=self.evaluation,
        )

    def _loop(self, progress: Progress) -> int | None:
        """All steps that are left: None at their end, or the step after which a signal stopped it."""
        output, total = self.recipe.output, self.settings.steps
        self._clock = time.monotonic()
        for step in range(self.run.step + 1, total + 1):
            launched = self._launch(step)
            self._settle(progress)  # the step before, while the device is busy with this one
            self._launched = launched
            progress.advance()
            last, stop = step == total, self._has_to_stop()
            evaluate = last or self._due(self.recipe.evaluation.every, step)
            save = last or stop or self._due(output.save_every, step)
            if evaluate or save:
                self._settle(progress)
            if evaluate:
                self._evaluate(step, progress)
                save |= self.best.see(step, self.evaluation)
            if save:
                self._save(step)
            if evaluate or save:
                self._clock = time.monotonic()
            if stop and not last:
                return step
        return None

    def _has_to_stop(self) -> bool:
        """Of several processes each hears of it by the figures, a step late, so that all stop after the same step."""
        return self._told_to_stop() > 0 if self.world.size == 1 else self._stopping

    @staticmethod
    def _due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _launch(self, step: int) -> Launched:
        """One update of the weights, or none where the guard skips it; nothing here waits for the device."""
        lr = warmup_cosine(
            step,
            peak=self.settings.lr,
            warmup=self.settings.warmup,
            total=self.settings.steps,
            final=self.settings.final_lr,
        )
        self._set_rate(lr)
        if step == self._forget:
            self.stage.forget()
        work = self.stage.next()
        if self.replayed is None:
            given = (self.stage.given(part, step) for part in work.parts)  # each when the one before is done with
            done = self._update(given, len(work.parts), work.weight)
        else:
            [part] = work.parts
            losses, *numbers = self.replayed(self.stage.given(part, step))  # which the next step overwrites
            done = Update([Loss(*map(torch.clone, loss)) for loss in losses], *map(torch.clone, numbers))
        left_out = self.stage.left_out() if self._is_logged(step) else {}
        return Launched(step, lr, work, done.losses, done.loss, self.stage.counts(), left_out, Reading(done.figures))

    def _is_logged(self, step: int) -> bool:
        return step == self.settings.steps or step % self.recipe.output.log_every == 0

    def _set_rate(self, lr: float) -> None:
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _capture(self) -> cuda_graph.Captured:
        """The update as a CUDA graph; the learning rate, which it reads, on the device.

        Whether this process was told to stop is recorded, too, as it was then; one alone does not ask its figures.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = torch.zeros((), dtype=torch.float64, device=self.model.device)
        recording = cuda_graph.Recording(self.model.device)
        return cuda_graph.Captured(lambda given: self._update([given], 1, self.recipe.batch.size), recording)

    def _update(self, given: Iterable[Any], parts: int, weight: float) -> Update:
        """Loss and gradient of all parts, whose loss is a mean over ``weight``, and the update of the weights."""
        losses = []
        self.optimiser.gather_in_fp32(parts > 1)
        for number, part in enumerate(given, 1):
            self.world.last_part(self.model, number == parts)
            loss = self.stage.loss(part)
            (loss.total / weight).backward()
            losses.append(loss._replace(total=loss.total.detach()))
        norm = gradient_norm(self.names, self.settings.clip)
        loss, sums, told = self._summed(losses)
        loss, sums = loss / weight, sums / weight
        scale, skipped = self.guard.admit(loss, norm)
        self.optimiser.step(grad_scale=scale)
        self.optimiser.zero_grad()
        return Update(losses, loss, torch.cat([sums, torch.stack([norm.norm, skipped, told])]))

    def _summed(self, losses: Sequence[Loss]) -> tuple[Tensor, Tensor, Tensor]:
        """Over all parts, and in one exchange over all processes: the loss, what was counted, who was told to stop."""
        total = sum(loss.total for loss in losses)
        sums = torch.stack([loss.sums for loss in losses]).double().sum(0)
        told = sums.new_full((1,), float(self._told_to_stop() > 0))
        summed = self.world.sum(torch.cat([total.double().reshape(1), sums, told]))
        return summed[0].to(total.dtype), summed[1:-1], summed[-1]

    def _settle(self, progress: Progress) -> None:
        """Take up the figures of the step that was launched last, if that has not been done."""
        if self._launched is None:
            return
        launched, self._launched = self._launched, None
        *figures, skipped, told = launched.reading.numbers()
        self._stopping |= told > 0
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        work = launched.work
        self.window.add(figures, launched.lr, work.tokens, work.flops, seconds, skipped=skipped > 0)
        if skipped:
            self._tell(launched, figures[-1], int(skipped), progress)
            self._recover(launched.step, math.isfinite(figures[0]) and math.isfinite(figures[-1]))
        step = launched.step
        if self._is_logged(step):
            self._log(step, progress, self._machine(self.window.close()) | launched.counts)
            self._tell_left_out(launched.left_out, progress)

    def _machine(self, values: dict[str, float]) -> dict[str, float]:
        """The figures with what they say of the GPU: the share of its peak rate (MFU), and the memory taken at most."""
        if peak := flops.peak(self.model.device):
            values["mfu"] = values["tflops_per_second"] * 1e12 / (peak * self.world.size)
        if self.model.device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated(self.model.device) / 1e9
        return values

    def _tell(self, launched: Launched, norm: float, in_a_row: int, progress: Progress) -> None:
        """Say why a step was skipped; raise Diverged where it was one too many."""
        reason = f"in {launched.work.records}: {self._explain(launched, norm)}"
        if in_a_row < self.recipe.guard.stop_after:
            return progress.note(f"step {launched.step} was skipped, the weights are as before; {reason}")
        good = launched.step - in_a_row
        raise Diverged(
            f"step {launched.step}: stopped before the update, the weights are those of step {good}; {reason}"
        )

    def _recover(self, step: int, finite: bool) -> None:
        """A step that was not finite may live on in the memory of streams, which is to be emptied.

        By then the next step may be under way, and is lost as well; a resumed run does as if it were.
        """
        if not finite and self._forget <= step:
            self._forget = step + 2

    def _explain(self, launched: Launched, norm: float) -> str:
        found = self.world.gather(next(self._not_finite(launched), None))
        if reason := next(filter(None, found), None):
            return reason
        total = float(launched.loss)
        if math.isfinite(total) and math.isfinite(norm):
            return f"a loss of {total:.4g} is a spike, over {self.recipe.guard.spike:g} deviations above the mean"
        return f"the gradient's norm is {norm} at a loss of {total:.4g}"

    def _not_finite(self, launched: Launched) -> Iterator[str]:
        """What went wrong in this process's parts."""
        for part, loss in zip(launched.work.parts, launched.losses, strict=True):
            if not bool(torch.isfinite(loss.values).all()):
                yield f"the loss is {float(loss.total)} for {self.stage.describe(part, loss.values)}"

    def _log(self, step: int, progress: Progress, values: dict[str, float]) -> None:
        values = {key: value for key, value in values.items() if math.isfinite(value)}  # a part that is off has NaN
        self.run.log(step, values)
        progress.show(step, values)

    def _evaluate(self, step: int, progress: Progress) -> None:
        """Each process evaluates all of it: they gather shards together, and held-out records are few.

        The figures are the first one's, so that what is decided by them is decided alike on unlike machines.
        """
        self.model.eval()
        self.evaluation = self.world.gather(self.stage.evaluate())[0]
        self.model.train()
        if self.evaluation:
            self._log(step, progress, {f"eval/{key}": value for key, value in self.evaluation.items()})
            self._tell_left_out(self.stage.left_out(), progress)

    def _tell_left_out(self, found: Mapping[str, str], progress: Progress, in_all: bool = False) -> None:
        """Say which records were left out: of each source once, and at the end ``in_all`` if it has become more."""
        for name, line in found.items():
            said = self._left_out.get(name)
            if said is None or (in_all and said != line):
                progress.note(f"in all, {line}" if in_all else line)
                self._left_out[name] = line

    def _collect(self) -> None:
        """Put what several processes have trained into the whole model; all have to come here."""
        if self.world.size > 1:
            found = dict(self.whole.named_parameters())
            with torch.no_grad():
                for p, name in self.names.items():
                    found[name].copy_(distributed.whole(p))
            self.model = self.stage.model = self.whole

    def _give_back(self) -> None:
        """Turn the model back into fp32, what did not train as it was found, however training ended."""
        self.replayed = None
        self.whole.backbone.gradient_checkpointing = False
        compile.switch_off(self.whole.backbone)
        for name, p in self.whole.named_parameters():
            p.requires_grad_(self.before[name])
        if self.low:
            self.optimiser.restore()
            self.model.float()
            trained = set(self.names.values())
            self._set_weights({name: t for name, t in self.run.load_start().items() if name not in trained})

    def _finish(self) -> Path:
        """Save the model."""
        if self.recipe.kind == "preference":
            self.model.untrained_heads -= set(self.recipe.objective.heads)
        return self.run.save_model(self.model.eval(), self.stage.tokenizer)
