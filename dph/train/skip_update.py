"""Skips updates that would do harm, without the device ever waiting for the host."""

import torch
from torch import Tensor

from dph_kernels import GradientNorm

DECAY = 0.98  # of the running mean and variance of the loss
WARM = 50  # updates before a spike can be told from noise


class Guard:
    """Admits or skips each update, on the device.

    An update is skipped where its loss or its gradient is not finite and, with ``spike``, where the loss lies more than
    ``spike`` standard deviations above the running mean of the updates before. After ``stop_after`` skipped in a row
    every further one is skipped, too: the weights stand still while the host, which reads a step late, finds out.
    """

    def __init__(self, stop_after: int, spike: float | None, device: torch.device) -> None:
        self.stop_after, self.spike = stop_after, spike
        self._state = torch.zeros(4, dtype=torch.float64, device=device)  # admitted, mean, variance, skipped in a row

    def admit(self, loss: Tensor, norm: GradientNorm) -> tuple[Tensor, Tensor]:
        """What multiplies the gradients [1], NaN to skip the update; and how many were skipped in a row, 0 for none."""
        admitted, mean, variance, skipped = self._state.unbind()
        loss = loss.double()
        good = norm.finite & loss.isfinite() & (skipped < self.stop_after)
        if self.spike is not None:
            good &= (admitted < WARM) | (loss - mean <= self.spike * variance.sqrt())
        rate = (1 / (admitted + 1)).clamp(min=1 - DECAY)  # at first the plain mean
        off = loss - mean
        after = [admitted + 1, mean + rate * off, (1 - rate) * (variance + rate * off.square()), torch.zeros_like(mean)]
        before = [admitted, mean, variance, skipped + 1]
        # In place: a step that is replayed (dph.train.cuda_graph) finds it where it was.
        self._state.copy_(torch.where(good, torch.stack(after), torch.stack(before)))
        return torch.where(good, norm.scale, torch.nan), self._state[3].clone()

    def state(self) -> list[float]:
        """For a checkpoint, as JSON."""
        return self._state.tolist()

    def load(self, state: list[float]) -> None:
        """Take up what ``state`` gave."""
        self._state.copy_(torch.tensor(state, dtype=torch.float64))
