"""What a recipe will take before it starts: parameters, memory, tokens, arithmetic and hours.

print(estimate(recipe.load("sft", ["model.path=runs/vocab"])).table())
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from dph import devices
from dph.evaluate.tables import table
from dph.train import build, distributed
from dph.train.budget import flops, memory
from dph.train.budget.memory import size_text
from dph.train.entry import make_stage
from dph.train.recipe import Recipe

ASSUMED = 0.4  # share of a device's matrix rate that training reaches


@dataclass(frozen=True)
class Estimate:
    """What one run takes.

    Attributes:
        device: by which it was reckoned.
        processes: that torchrun started.
        parameters: of the model; ``trained`` of them train.
        memory: bytes of each part of it, on the device of one process, at the peak.
        host: bytes of what one process pins on the host.
        tokens: that go through the model in the first update.
        flops: that the first update needs.
        steps: updates.
        rate: operations per second that the matrix products of one process's device reach.
        left_out: lines that say which of the first update's records were left out, and why.
    """

    device: str
    processes: int
    parameters: int
    trained: int
    memory: dict[str, float]
    host: dict[str, float]
    tokens: int
    flops: float
    steps: int
    rate: float
    left_out: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of all updates, at ``ASSUMED`` of ``rate``."""
        return self.steps * self.flops / (ASSUMED * self.rate * self.processes)

    def table(self) -> str:
        """For people."""
        rows: list[tuple[str, Any]] = [
            ("parameters", f"{self.parameters:,}"),
            ("of them trained", f"{self.trained:,}"),
            *([("processes, of which each takes", f"{self.processes}")] if self.processes > 1 else []),
            *((f"memory: {part}", size_text(size)) for part, size in self.memory.items()),
            ("memory in all", size_text(sum(self.memory.values()))),
            *((f"memory of the host: {part}", size_text(size)) for part, size in self.host.items()),
            ("tokens in an update", f"{self.tokens:,}"),
            ("updates", f"{self.steps:,}"),
            ("arithmetic of an update", f"{self.flops / 1e12:,.3g} TFLOP"),
            ("matrix rate", f"{self.rate / 1e12:,.3g} TFLOP/s ({self.device})"),
            (f"time at {ASSUMED:.0%} of it", _time(self.seconds)),
        ]
        return "\n".join([table(["", "estimate"], rows), *(f"first update: {line}" for line in self.left_out)])


def _time(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"


def estimate(recipe: Recipe) -> Estimate:
    """Open what the recipe starts from and take its first update's work, without training or writing anything.

    Of processes that torchrun started, each finds its own alone; the first, which prints, has the largest parts.

    Raises UserError for whatever the recipe or the data have wrong, as training would.
    """
    recipe = replace(recipe, data=replace(recipe.data, workers=0))  # for one update they would not pay
    model, tokenizer = build.open_start(recipe)
    device = torch.device(devices.choose(recipe.device))
    stage = make_stage(recipe, model, tokenizer, None, None, device=torch.device("cpu"), world=distributed.told())
    work = stage.next()
    largest = max(stage.rows(part) for part in work.parts)
    return Estimate(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        processes=stage.world.size,
        parameters=model.num_parameters(),
        trained=memory.count_trained(stage),
        memory=memory.on_device(stage, largest, device, stage.place, alone=len(work.parts) == 1),
        host=memory.on_host(stage, device, stage.place),
        tokens=work.tokens,
        flops=work.flops,
        steps=recipe.optimiser.steps,
        rate=flops.peak(device) or _matrix_rate(device),
        left_out=tuple(stage.left_out().values()),
    )


def _matrix_rate(device: torch.device) -> float:
    """Operations per second of a square product, measured in a moment."""
    a = torch.randn(1024, 1024, device=device)
    a @ a
    began = time.perf_counter()
    for _ in range(5):
        b = a @ a
    b.sum().item()
    return 5 * 2 * 1024**3 / (time.perf_counter() - began)
