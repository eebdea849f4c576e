"""What a recipe will take before it starts: parameters, memory, tokens, arithmetic and hours.

print(estimate(recipe.load("sft", ["model.path=runs/vocab"])).table())
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from dph import devices, flops, start
from dph.model import Model
from dph.recipe import Recipe
from dph.stages import Stage
from dph.tables import table
from dph.trainer import low_precision, make_stage

ASSUMED = 0.4  # share of a device's matrix rate that training reaches
LOGPROBS = {"cuda": 300e6, "cpu": 64e6}  # bytes that log-probabilities take at most beside their gradients


@dataclass(frozen=True)
class Estimate:
    """What one run takes.

    Attributes:
        device: by which it was reckoned.
        parameters: of the model; ``trained`` of them train.
        memory: bytes of each part of it, on the device, at the peak.
        tokens: that go through the model in the first update.
        flops: that the first update needs.
        steps: updates.
        rate: operations per second that the device's matrix products reach.
    """

    device: str
    parameters: int
    trained: int
    memory: dict[str, float]
    tokens: int
    flops: float
    steps: int
    rate: float

    @property
    def seconds(self) -> float:
        """Of all updates, at ``ASSUMED`` of ``rate``."""
        return self.steps * self.flops / (ASSUMED * self.rate)

    def table(self) -> str:
        """For people."""
        rows: list[tuple[str, Any]] = [
            ("parameters", f"{self.parameters:,}"),
            ("of them trained", f"{self.trained:,}"),
            *((f"memory: {part}", _size(size)) for part, size in self.memory.items()),
            ("memory in all", _size(sum(self.memory.values()))),
            ("tokens in an update", f"{self.tokens:,}"),
            ("updates", f"{self.steps:,}"),
            ("arithmetic of an update", f"{self.flops / 1e12:,.3g} TFLOP"),
            ("matrix rate", f"{self.rate / 1e12:,.3g} TFLOP/s ({self.device})"),
            (f"time at {ASSUMED:.0%} of it", _time(self.seconds)),
        ]
        return table(["", "estimate"], rows)


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"


def estimate(recipe: Recipe) -> Estimate:
    """Open what the recipe starts from and take its first update's work, without training or writing anything.

    Raises UserError for whatever the recipe or the data have wrong, as training would.
    """
    model, tokenizer = start.open_start(recipe)
    device = torch.device(devices.choose(recipe.device))
    stage = make_stage(recipe, model, tokenizer, None, None, device=torch.device("cpu"))
    work = stage.next()
    trained = sum(p.numel() for name, p in model.named_parameters() if stage.trains(name))
    largest = max(_rows(part) for part in work.parts)
    return Estimate(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        parameters=model.num_parameters(),
        trained=trained,
        memory=memory(recipe, model, stage, trained, largest, device),
        tokens=work.tokens,
        flops=work.flops,
        steps=recipe.optimiser.steps,
        rate=flops.peak(device) or _matrix_rate(device),
    )


def _rows(part: Any) -> int:
    """Rows of hidden state of one part of an update."""
    return part.tokens if hasattr(part, "tokens") else part[1].numel()


def memory(
    recipe: Recipe, model: Model, stage: Stage, trained: int, rows: int, device: torch.device
) -> dict[str, float]:
    """Bytes by part, at the peak of an update whose largest part has ``rows`` rows."""
    config, low = model.config, low_precision(recipe.precision, device)
    size, total = 2 if low else 4, model.num_parameters()
    parts = {"weights": size * total, "gradients": 4 * trained, "momentum and second moment": 8 * trained}
    if low:
        parts["fp32 masters"] = 4 * trained
    if recipe.optimiser.prior_decay:
        parts["priors"] = 4 * trained
    if stage.needs_reference:
        parts["reference model"] = size * total
    if recipe.kind != "preference" and recipe.data.memory:
        rings = 2 if recipe.data.memory_kind == "kv" else 1
        per_token = rings * config.num_hidden_layers * config.hidden_size * size
        parts["Transformer-XL memory"] = per_token * recipe.batch.size * recipe.data.memory
        parts["rows to remember"] = per_token * recipe.batch.size * recipe.data.context
    parts["activations"] = activations(recipe, model, rows, size) if recipe.stage != "head" else 0
    parts["log-probabilities"] = LOGPROBS[device.type] if recipe.stage != "head" else 0
    return {name: float(count) for name, count in parts.items() if count}


def activations(recipe: Recipe, model: Model, rows: int, size: int) -> float:
    """Bytes that the backward pass keeps of ``rows`` rows.

    A block keeps its input, both norms' outputs, q, k (rotated, too) and v, what attention gives with its log-sum-exp,
    the sum after it; [x | gate], silu(gate) and their product.
    """
    config = model.config
    block = size * (10 * config.hidden_size + 4 * config.intermediate_size) + 4 * config.num_attention_heads
    kept = config.num_hidden_layers * block
    if recipe.checkpointing == "block":
        kept = config.num_hidden_layers * size * config.hidden_size + block
    return rows * (kept + size * (2 * config.embedding_size + 3 * config.hidden_size))


def _matrix_rate(device: torch.device) -> float:
    """Operations per second of a square product, measured in a moment."""
    a = torch.randn(1024, 1024, device=device)
    a @ a
    began = time.perf_counter()
    for _ in range(5):
        b = a @ a
    b.sum().item()
    return 5 * 2 * 1024**3 / (time.perf_counter() - began)
