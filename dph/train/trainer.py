"""Training loop of a stage: batch, loss, gradient, clipping, LaProp, metrics, evaluation and checkpoints.

Nothing here depends on the kind of stage (``dph.train.stages.base``) or on a data set. Within a step the host never
waits for the device, except in the step that records a CUDA graph (``dph.train.cuda_graph``): the metrics of a step are
read while the device computes the next one. How a run ends is in ``dph.train.endings``, what its checkpoints hold in
``dph.train.saved_state``.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dph.devices import low_precision
from dph.optim import LaProp, gradient_norm, param_groups, warmup_cosine
from dph.train import checkpointing, compile, cuda_graph, endings, fingerprints, saved_state
from dph.train.adapters import Adapters, shared_copy
from dph.train.best_checkpoint import BestCheckpoint, check_metric
from dph.train.budget import flops
from dph.train.distributed import full_tensor
from dph.train.endings import Diverged, Reached, Result
from dph.train.progress import Progress, RunningMeans
from dph.train.recipe import Recipe
from dph.train.run_dir import RunDirectory
from dph.train.signals import stop_signals
from dph.train.skip_update import StepGuard
from dph.train.stages.base import LossSum, Stage, StepBatch


class StepMetrics:
    """Metrics of one step, copied from the device to the host asynchronously.

    Attributes:
        step: number of the step.
        lr: learning rate.
        batch: data of the step.
        losses: losses of this rank's micro-batches, without gradient.
        loss: mean over the step's items [].
        left_out: message about the records that were left out so far; None without any, and if it is not logged.
    """

    left_out: str | None = None

    def __init__(
        self, step: int, lr: float, batch: StepBatch, losses: list[LossSum], loss: Tensor, values: Tensor
    ) -> None:
        """Start the copy of ``values`` [M], between the device's current work and the work launched next."""
        self.step, self.lr, self.batch, self.losses, self.loss = step, lr, batch, losses, loss
        self._values, self._copied = values, None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def values(self) -> list[float]:
        """Wait for the copy, and return the values: see :meth:`Trainer._update_weights`."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class Trainer:
    """One run of one stage.

    The constructor shards the model or casts it to bf16, creates the optimizer and loads the run's checkpoint, if there
    is one. When all of it fits, the run begins: no file of its directory changes before.

    Args:
        recipe: the stage's recipe.
        stage: its batches and losses.
        run: directory of the run, new or resumed.
        quiet: no progress on the terminal.
        force_resume: resume although records, tokenizer or configuration of the model are not those of the run.

    Raises UserError if they differ otherwise, or if the checkpoint is not one that a run can have written.
    """

    def __init__(
        self, recipe: Recipe, stage: Stage, run: RunDirectory, quiet: bool = False, force_resume: bool = False
    ) -> None:
        self.recipe, self.stage, self.run, self.quiet = recipe, stage, run, quiet
        self.world, self.settings = stage.world, recipe.optimiser
        self.step = run.step  # completed steps
        self.fingerprints = fingerprints.of_stage(stage)
        saved = None
        if run.checkpoint is not None:
            saved = saved_state.accept(run.checkpoint, stage, self.fingerprints, force_resume)
        self.model = self.full_model = stage.model  # the first is replaced by shards if there are several ranks
        device = self.world.device or self.model.device
        if recipe.compile:
            with self.world.fail_together():
                compile.require(device)
        if recipe.cuda_graph:
            cuda_graph.require(device, self.world.world_size)
        self.weights = dict(self.model.named_parameters())  # of the full model, without adapters
        self._required_grad = {name: p.requires_grad for name, p in self.weights.items()}
        for name, p in self.weights.items():
            p.requires_grad_(stage.trains(name))
        if saved is not None:
            saved_state.load_start(self)
        if stage.needs_reference and self.world.world_size == 1:
            stage.reference = shared_copy(self.model)
        elif stage.needs_reference:  # each is sharded on its own
            stage.reference = copy.deepcopy(self.model).requires_grad_(False).eval()
            stage.reference.heads.clear()
        self.adapters: Adapters | None = None
        if recipe.lora.rank is not None:
            self.adapters = Adapters(self.model, recipe)
            for name, p in self.model.named_parameters():  # PEFT has frozen the reward heads, too
                p.requires_grad_(stage.trains(name))
        try:
            low = low_precision(recipe.precision, device)
            self._place_models(torch.bfloat16 if low else None)
            self.names = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
            s = self.settings
            groups = param_groups(
                self.model, s.weight_decay, s.prior_decay, s.no_decay,
                head_weight_decay=s.head_weight_decay, head_prior_decay=s.head_prior_decay,
            )  # fmt: skip
            self.optimiser = LaProp(groups, lr=s.lr, betas=s.betas, eps=s.eps)
            self.means = RunningMeans((*stage.metrics, "grad_norm"))
            self.evaluation: dict[str, float] = {}
            check_metric(recipe.output.best, stage.held_out.names())
            self.best = BestCheckpoint(recipe.output.best)
            self.guard = StepGuard(recipe.guard.stop_after, recipe.guard.spike, self.model.device)
            self.pending: StepMetrics | None = None  # of the last step, not yet logged
            self.memory_reset_step = 0  # before which the stage resets its memory
            self._last_logged = 0.0  # time when metrics were last read
            self._left_out: dict[str, str] = {}  # messages that were shown, by source
            self.signal: Callable[[], int] = int
            self._stop_requested = False  # whether some rank received a signal, as all ranks have read
            self.reached = Reached.NOTHING
            self.common_error: Exception | None = None  # raised by this rank, while all others raise one as well
            self.evaluation_due = False  # whether the evaluation after the last step is still to be done
            self._has_memory = any(memory is not None for memory in stage.memories)
            if saved is not None:
                saved_state.load(self, run.checkpoint, saved)
            run.begin(self.best.state)
        except BaseException:  # the model is the caller's
            self._restore_modules()
            raise
        if saved is None:
            saved_state.save_start(self)
        self.model.backbone.gradient_checkpointing = recipe.checkpointing == "block"
        self.low = low and self.world.world_size == 1
        if self.low:
            self.optimiser.to_mixed_precision(torch.bfloat16)
            for model in filter(None, (self.model, self.stage.reference)):  # which share their frozen weights
                model.to(torch.bfloat16)
        if recipe.compile:
            for model in filter(None, (self.model, self.stage.reference)):
                compile.switch_on(model.backbone)
        self.graph: cuda_graph.GraphedFunction | None = None
        if recipe.cuda_graph:
            for group in self.optimiser.param_groups:  # the graph reads the learning rate on the device
                group["lr"] = torch.zeros((), dtype=torch.float64, device=self.model.device)
            recorder = cuda_graph.GraphRecorder(self.model.device)
            self.graph = cuda_graph.GraphedFunction(
                lambda inputs: self._update_weights([inputs], 1, recipe.batch.size), recorder
            )

    # One step

    def train_step(self, step: int) -> StepMetrics:
        """Do one optimizer step: next batch, forward pass and loss, backward pass, clipping, update of the weights.

        Includes reading and packing the records and, in stage align, the reference model. Logging is left to
        :meth:`log_pending`, evaluation and checkpoints to :meth:`train`. Nothing here waits for the device. A harmful
        step (``dph.train.skip_update``) leaves the weights unchanged.
        """
        s = self.settings
        lr = warmup_cosine(step, peak=s.lr, warmup=s.warmup, total=s.steps, final=s.final_lr)
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if step == self.memory_reset_step:
            self.stage.reset_memory()
        self.reached = Reached.BATCH
        batch = self.stage.next_batch() if self.world.world_size == 1 else self._next_batch_together()
        if self.graph is None:
            # Lazily: the inputs of a micro-batch are prepared after the previous one's backward pass.
            inputs = (self.stage.prepare(micro_batch, step) for micro_batch in batch.micro_batches)
            losses, loss, values = self._update_weights(inputs, len(batch.micro_batches), batch.weight)
        else:
            (micro_batch,) = batch.micro_batches
            self.reached = Reached.CHANGES
            losses, loss, values = self.graph(self.stage.prepare(micro_batch, step))
            # Copies, since the next replay overwrites the outputs.
            losses = [LossSum(*map(torch.clone, micro_loss)) for micro_loss in losses]
            loss, values = loss.clone(), values.clone()
        metrics = StepMetrics(step, lr, batch, losses, loss, values)
        if self._is_logged(step):  # now, before the next batch is read
            metrics.left_out = self.stage.left_out()
        self.step, self.reached = step, Reached.NOTHING
        return metrics

    def _next_batch_together(self) -> StepBatch:
        """Return the next batch; if it fails on one rank, all ranks raise before any of them begins the step."""
        try:
            with self.world.fail_together():
                return self.stage.next_batch()
        except Exception as error:
            self.common_error = error
            raise

    def _update_weights(self, inputs: Iterable[Any], count: int, weight: float) -> tuple[list[LossSum], Tensor, Tensor]:
        """Forward, backward, clip and step the optimizer; a CUDA graph records this function.

        Args:
            inputs: the data of ``count`` micro-batches.
            weight: number of items of the step, over which the loss is a mean.

        Returns:
            Losses of the micro-batches, without gradient. Mean loss [] over all ranks. fp64 values: the means of
            ``stage.metrics``, the gradient norm, the number of steps skipped in a row and, on several ranks, the number
            of ranks that received a signal.
        """
        several_ranks = self.world.world_size > 1
        self.optimiser.accumulate_in_fp32(count > 1)
        if self._has_memory:
            self.reached = Reached.CHANGES
        losses, sums = [], []
        for number, micro_inputs in enumerate(inputs, 1):
            if several_ranks:
                self.world.set_last_micro_batch(self.model, number == count)
            micro_loss = self.stage.loss(micro_inputs)
            (micro_loss.total / weight).backward()
            micro_loss = micro_loss._replace(total=micro_loss.total.detach())  # frees the autograd graph
            losses.append(micro_loss)
            sums.append(micro_loss.sums)
        norm = gradient_norm(self.names, self.settings.clip)

        total = losses[0].total
        for micro_loss in losses[1:]:
            total = total + micro_loss.total
        metric_sums, signals = torch.stack(sums).double().sum(0), []
        if several_ranks:
            received = metric_sums.new_full((1,), float(self.signal() > 0))
            reduced = self.world.all_reduce(torch.cat([total.double().reshape(1), metric_sums, received]))
            total, metric_sums, signals = reduced[0].to(total.dtype), reduced[1:-1], [reduced[-1]]

        loss = total / weight
        self.reached = Reached.CHANGES
        grad_scale, skipped = self.guard.check(loss, norm)
        self.optimiser.step(grad_scale=grad_scale)
        self.optimiser.zero_grad()
        return losses, loss, torch.cat([metric_sums / weight, torch.stack([norm.norm, skipped, *signals])])

    def log_pending(self, progress: Progress) -> None:
        """Read the metrics of the last step, unless that is done: average and log them, and report a skipped step.

        Raises Diverged after too many skipped steps in a row.
        """
        if self.pending is None:
            return
        metrics, self.pending = self.pending, None
        values = metrics.values()
        if self.world.world_size > 1:
            self._stop_requested |= values.pop() > 0
        skipped = int(values.pop())
        now = time.monotonic()
        seconds, self._last_logged = now - self._last_logged, now
        step, batch = metrics.step, metrics.batch
        needed = flops.batch_flops(self.stage, batch)
        self.means.add(values, metrics.lr, batch.tokens, needed, seconds, skipped=skipped > 0)
        if skipped:
            finite = math.isfinite(values[0]) and math.isfinite(values[-1])
            if not finite and self.memory_reset_step <= step:
                # The memory may hold numbers that are not finite. The next step may have started, and is lost as well;
                # a resumed run skips it, too.
                self.memory_reset_step = step + 2
            self._report_skipped(metrics, values[-1], skipped, progress)
        if self._is_logged(step):
            averages = self.means.flush()
            if peak := flops.peak_flops(self.model.device):
                averages["mfu"] = averages["tflops_per_second"] * 1e12 / (peak * self.world.world_size)
            if self.model.device.type == "cuda":
                averages["memory_gb"] = torch.cuda.max_memory_allocated(self.model.device) / 1e9
            if batch.refused is not None:
                averages["refused"] = batch.refused
            self._log(step, progress, averages)
            if metrics.left_out is not None:
                self._report_left_out({"records": metrics.left_out}, progress)

    def _is_logged(self, step: int) -> bool:
        return step == self.settings.steps or step % self.recipe.output.log_every == 0

    def _report_skipped(self, metrics: StepMetrics, norm: float, in_a_row: int, progress: Progress) -> None:
        """Show why a step was skipped; raise Diverged if it was one too many."""
        reason = f"in {metrics.batch.records}: {self._skip_reason(metrics, norm)}"
        if in_a_row < self.recipe.guard.stop_after:
            return progress.note(f"step {metrics.step} was skipped, the weights are as before; {reason}")
        good = metrics.step - in_a_row
        raise Diverged(
            f"step {metrics.step}: stopped before the update, the weights are those of step {good}; {reason}"
        )

    def _skip_reason(self, metrics: StepMetrics, norm: float) -> str:
        """Return the first item whose loss is not finite, on any rank, or else the loss and the gradient norm."""
        own = None
        for micro_batch, loss in zip(metrics.batch.micro_batches, metrics.losses, strict=True):
            if own is None and not bool(torch.isfinite(loss.values).all()):
                item = micro_batch.describe_nonfinite(loss.values, self.stage.tokenizer)
                own = f"the loss is {float(loss.total)} for {item}"
        for reason in self.world.all_gather_object(own):
            if reason is not None:
                return reason
        loss = float(metrics.loss)
        if math.isfinite(loss) and math.isfinite(norm):
            return f"a loss of {loss:.4g} is a spike, over {self.recipe.guard.spike:g} deviations above the mean"
        return f"the gradient's norm is {norm} at a loss of {loss:.4g}"

    def _log(self, step: int, progress: Progress, values: Mapping[str, float]) -> None:
        finite = {key: value for key, value in values.items() if math.isfinite(value)}  # inactive parts are NaN
        self.run.log(step, finite)
        progress.show(step, finite)

    def _report_left_out(self, messages: Mapping[str, str], progress: Progress, final: bool = False) -> None:
        """Show once per source how many records were left out, and again at the end if the number has grown."""
        for source, message in messages.items():
            shown = self._left_out.get(source)
            if shown is None or (final and shown != message):
                progress.note(f"in all, {message}" if final else message)
                self._left_out[source] = message

    # The whole run

    def train(self) -> Result:
        """Train until the last step, or until a signal or an error; save the model, or a checkpoint."""
        progress = Progress(self.recipe.stage, self.settings.steps, self.run.step, self.quiet)
        self.model.train()
        try:
            for note in self.stage.notes:
                progress.note(note)
            if self.run.step == self.settings.steps:
                progress.note(f"all {self.run.step} steps are done")
            with stop_signals(progress.note) as self.signal, contextlib.closing(progress):
                try:
                    stopped = self._train_steps(progress)
                except Exception as error:
                    endings.after_error(self, error, progress)
                    raise
                self._gather_full_model()
        except BaseException:
            with contextlib.suppress(Exception):  # such as weights in a run directory that is gone
                self._reset_model()
            self._restore_modules()
            raise
        self._reset_model()
        if stopped is None and self.recipe.output.model == "best" and self.best.state is not None:
            best = checkpointing.Checkpoint(0, self.run.checkpoint_path(self.best.state["step"]))
            saved_state.copy_weights(best.tensors("weights"), dict(self.model.named_parameters()))
        if self.adapters is not None:
            self.adapters.merge()
        self._report_left_out(self._left_out_messages(), progress, final=True)
        return endings.finish(self, stopped, progress)

    def _train_steps(self, progress: Progress) -> int | None:
        """Do the remaining steps; return None, or the step after which a signal stopped them."""
        output, total = self.recipe.output, self.settings.steps
        self._last_logged = time.monotonic()
        if self.evaluation_due:  # the run ended in the evaluation after its last step
            self._evaluate(self.step, progress)
            self.save_checkpoint()
        for step in range(self.run.step + 1, total + 1):
            if self._is_exhausted(step - 1, progress):
                break
            metrics = self.train_step(step)
            try:
                self.log_pending(progress)  # of the previous step, while the device computes this one
            finally:
                self.pending = metrics
            progress.advance()
            last = step == total
            # Several ranks learn of a signal from the metrics, a step late, so that all stop after the same step.
            stop = self.signal() > 0 if self.world.world_size == 1 else self._stop_requested
            evaluate = last or self._due(self.recipe.evaluation.every, step)
            save = last or stop or self._due(output.save_every, step)
            if evaluate or save:
                self.log_pending(progress)
            if evaluate and stop:  # saved first: whoever sent the signal may not wait for an evaluation
                self.evaluation_due = True
                self.save_checkpoint()
                if not last:
                    return step
            if evaluate:
                save |= self._evaluate(step, progress)
                stop |= self.world.world_size == 1 and self.signal() > 0
            if save or stop:
                self.save_checkpoint()
            if evaluate or save:
                self._last_logged = time.monotonic()
            if stop and not last:
                return step
        return None

    def _is_exhausted(self, step: int, progress: Progress) -> bool:
        """Return whether ``step`` is the last, ``evaluation.patience`` evaluations after the best one."""
        patience, every = self.recipe.evaluation.patience, self.recipe.evaluation.every
        if patience is None or self.best.state is None or step - self.best.state["step"] < patience * every:
            return False
        progress.note(f"step {step} is the last: {self.best} is step {self.best.state['step']}")
        if self.run.saved_step != step:
            self.save_checkpoint()
        return True

    @staticmethod
    def _due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _evaluate(self, step: int, progress: Progress) -> bool:
        """Evaluate on held-out records, and return whether the step is the best one so far.

        Every rank evaluates on all records, since shards are gathered together. All ranks use rank 0's metrics, so that
        they decide the same even on different machines.
        """
        self.evaluation_due = True  # until it is done: a resumed run begins with it
        self.model.eval()
        self.evaluation = self.world.all_gather_object(self.stage.held_out.evaluate())[0]
        self.model.train()
        if self.evaluation:
            self._log(step, progress, {f"eval/{key}": value for key, value in self.evaluation.items()})
            self._report_left_out(self._left_out_messages(), progress)
        self.evaluation_due = False
        return self.best.update(step, self.evaluation)

    def _left_out_messages(self) -> dict[str, str]:
        """Return messages about training and held-out records that were left out so far, by source."""
        message = self.stage.left_out()
        training = {} if message is None else {"records": message}
        return training | self.stage.held_out.left_out()

    # Model and checkpoints

    def _place_models(self, dtype: torch.dtype | None) -> None:
        """With several ranks, turn the reference into ``dtype`` and shard it and a copy of the model."""
        if self.world.world_size > 1:
            self.model = self.stage.model = self.world.shard(copy.deepcopy(self.full_model), dtype)
            if self.stage.reference is not None:
                reference = self.stage.reference if dtype is None else self.stage.reference.to(dtype)
                self.stage.reference = self.world.shard(reference, dtype)

    def save_checkpoint(self) -> None:
        """Save the state after the last whole step."""
        undo_batch, self.reached = self.reached is Reached.BATCH, Reached.CHANGES  # a second try would fail as well
        saved_state.save(self, undo_batch)
        self.reached = Reached.NOTHING

    def _gather_full_model(self) -> None:
        """Copy the trained shards of all ranks into the full model; all ranks have to call this."""
        if self.world.world_size > 1:
            params = dict(self.full_model.named_parameters())
            with torch.no_grad():
                for p, name in self.names.items():
                    params[name].copy_(full_tensor(p))
            self.model = self.stage.model = self.full_model

    def _restore_required_grad(self) -> None:
        """Freeze the weights again that were frozen when the trainer was made, and no others."""
        for name, p in self.weights.items():
            p.requires_grad_(self._required_grad[name])

    def _restore_modules(self) -> None:
        """After an error: the caller's model without adapters, its weights frozen as they were."""
        if self.adapters is not None:
            self.adapters.remove()
        self._restore_required_grad()

    def _reset_model(self) -> None:
        """Turn the model back into fp32, with frozen weights and attributes as they were, however training ended."""
        self.graph = None
        self.full_model.backbone.gradient_checkpointing = False
        compile.switch_off(self.full_model.backbone)
        self._restore_required_grad()
        if self.low:
            self.optimiser.to_full_precision()
            self.model.float()
            trained = set(self.names.values())
            frozen = {name: tensor for name, tensor in self.run.load_start().items() if name not in trained}
            saved_state.copy_weights(frozen, self.weights)
