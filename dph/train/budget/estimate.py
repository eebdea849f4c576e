"""Estimate of a run before it starts: parameters, memory footprint, tokens, arithmetic and hours.

print(estimate(recipe.load("sft", ["model.path=runs/vocab"])).table())
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from dph import devices
from dph.evaluate.tables import table
from dph.train import build
from dph.train.budget import flops, memory
from dph.train.budget.memory import size_text
from dph.train.distributed import torchrun_world
from dph.train.recipe import Recipe

ASSUMED = 0.4  # fraction of a device's matrix rate that training reaches


@dataclass(frozen=True)
class Estimate:
    """Requirements of one run.

    Attributes:
        device: name of the device that the estimate is for.
        processes: number of ranks that torchrun started.
        parameters: of the model; ``trained`` of them are trained.
        memory: bytes by purpose on the device of one rank, at the peak.
        host: bytes by purpose that one rank pins on the host.
        tokens: tokens that go through the model in the first step.
        flops: operations that the first step needs.
        steps: optimizer steps.
        rate: operations per second that matrix products reach on one rank's device.
        left_out: messages about the records of the first step that are left out.
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
        """Duration of all steps, at ``ASSUMED`` of ``rate``."""
        return self.steps * self.flops / (ASSUMED * self.rate * self.processes)

    def table(self) -> str:
        """Return the estimate as a table of text."""
        rows: list[tuple[str, Any]] = [
            ("parameters", f"{self.parameters:,}"),
            ("trained parameters", f"{self.trained:,}"),
        ]
        if self.processes > 1:
            rows.append(("processes (figures are per process)", f"{self.processes}"))
        for purpose, size in self.memory.items():
            rows.append((f"footprint: {purpose}", size_text(size)))
        rows.append(("total footprint", size_text(sum(self.memory.values()))))
        for purpose, size in self.host.items():
            rows.append((f"host footprint: {purpose}", size_text(size)))
        hours = self.seconds / 3600
        rows += [
            ("tokens in a step", f"{self.tokens:,}"),
            ("steps", f"{self.steps:,}"),
            ("arithmetic of a step", f"{self.flops / 1e12:,.3g} TFLOP"),
            ("matrix rate", f"{self.rate / 1e12:,.3g} TFLOP/s ({self.device})"),
            (f"time at {ASSUMED:.0%} of it", f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"),
        ]
        return "\n".join([table(["", "estimate"], rows), *(f"first step: {line}" for line in self.left_out)])


def estimate(recipe: Recipe) -> Estimate:
    """Return the estimate for a recipe; reads the first step's data, trains nothing and writes nothing.

    On several ranks each estimates for itself; rank 0, which prints, has the largest micro-batches.

    Raises UserError for errors in the recipe or the data, as training does.
    """
    recipe = replace(recipe, data=replace(recipe.data, workers=0))  # workers would not pay off for one step
    model, tokenizer = build.open_model(recipe)
    device = torch.device(devices.choose(recipe.device))
    stage = build.make_stage(recipe, model, tokenizer, None, None, device=torch.device("cpu"), world=torchrun_world())
    batch = stage.next_batch()
    left_out = stage.left_out()
    rows = max(micro_batch.rows for micro_batch in batch.micro_batches)
    alone = len(batch.micro_batches) == 1
    return Estimate(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        processes=stage.world.world_size,
        parameters=model.num_parameters(),
        trained=memory.count_trained(stage),
        memory=memory.on_device(stage, rows, device, stage.memory_place, alone=alone),
        host=memory.on_host(stage, device, stage.memory_place),
        tokens=batch.tokens,
        flops=flops.batch_flops(stage, batch),
        steps=recipe.optimiser.steps,
        rate=flops.peak_flops(device) or _measure_matrix_rate(device),
        left_out=() if left_out is None else (left_out,),
    )


def _measure_matrix_rate(device: torch.device) -> float:
    """Return the operations per second of a short series of matrix products."""
    a = torch.randn(1024, 1024, device=device)
    a @ a
    began = time.perf_counter()
    for _ in range(5):
        b = a @ a
    b.sum().item()
    return 5 * 2 * 1024**3 / (time.perf_counter() - began)
