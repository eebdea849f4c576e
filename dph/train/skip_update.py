"""Skipping of harmful steps, decided on the device so that it never waits for the host."""

import torch
from torch import Tensor

from dph_kernels import GradientNorm

DECAY = 0.98  # of the running mean and variance of the loss
WARMUP_STEPS = 50  # before which a spike cannot be distinguished from noise


class StepGuard:
    """Decides on the device whether a step updates the weights.

    A step is skipped if its loss or its gradient is not finite and, with ``spike``, if the loss is more than ``spike``
    standard deviations above the running mean of earlier steps. After ``stop_after`` skipped steps in a row all further
    ones are skipped: the weights stay unchanged until the host, which reads the metrics a step late, stops the run.
    """

    def __init__(self, stop_after: int, spike: float | None, device: torch.device) -> None:
        self.stop_after, self.spike = stop_after, spike
        # Number of accepted steps, mean and variance of their loss, number of steps skipped in a row.
        self._state = torch.zeros(4, dtype=torch.float64, device=device)

    def check(self, loss: Tensor, norm: GradientNorm) -> tuple[Tensor, Tensor]:
        """Return the factor of the gradients [1], NaN to skip the step, and the number of steps skipped in a row []."""
        accepted, mean, variance, skipped = self._state.unbind()
        loss = loss.double()
        good = norm.finite & loss.isfinite() & (skipped < self.stop_after)
        if self.spike is not None:
            good &= (accepted < WARMUP_STEPS) | (loss - mean <= self.spike * variance.sqrt())
        rate = (1 / (accepted + 1)).clamp(min=1 - DECAY)  # a plain mean of the first steps
        deviation = loss - mean
        new_variance = (1 - rate) * (variance + rate * deviation.square())
        after_accepted = torch.stack([accepted + 1, mean + rate * deviation, new_variance, torch.zeros_like(mean)])
        after_skipped = torch.stack([accepted, mean, variance, skipped + 1])
        # In place: a CUDA graph (dph.train.cuda_graph) reads and writes the same address in every replay.
        self._state.copy_(torch.where(good, after_accepted, after_skipped))
        return torch.where(good, norm.scale, torch.nan), self._state[3].clone()

    def state(self) -> list[float]:
        """Return the state as JSON, for a checkpoint."""
        return self._state.tolist()

    def load(self, state: list[float]) -> None:
        """Continue from a state; after a run that ended by too many skipped steps, their count begins again."""
        accepted, mean, variance, skipped = state
        if skipped >= self.stop_after:
            skipped = 0.0
        self._state.copy_(torch.tensor([accepted, mean, variance, skipped], dtype=torch.float64))
