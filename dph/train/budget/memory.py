"""Bytes that a run takes on its device and on the host, and so where the memory of its streams has room."""

from __future__ import annotations

import torch

from dph import devices
from dph.devices import low_precision
from dph.errors import UserError
from dph.model.config import ModelConfig
from dph.train.recipe import Recipe
from dph.train.stages.base import Stage

LOGPROBS = {"cuda": 300e6, "cpu": 64e6}  # bytes that log-probabilities take at most beside their gradients
SHARE = 0.9  # of a GPU's memory that a run is to fill at most: the rest is the driver's, the allocator's and others'


def on_device(stage: Stage, rows: int, device: torch.device, place: str, *, alone: bool = False) -> dict[str, float]:
    """Bytes by part, at the peak of an update that computes ``rows`` rows at a time; memory of streams in ``place``.

    ``alone``: these are all rows of the update, so that its gradients are not gathered in fp32, and come as its
    activations go (but for that of the embedding, which is the first, and is neglected here).
    """
    recipe, config, total = stage.recipe, stage.model.config, stage.model.num_parameters()
    trained, low, several = count_trained(stage), low_precision(recipe.precision, device), stage.world.size > 1
    size = 2 if low else 4
    # Shards are fp32, masters themselves: it is what is gathered of them that is bf16.
    parts = {"weights": (4 if several else size) * total}
    parts |= {"gradients": (size if alone and not several else 4) * trained, "momentum and second moment": 8 * trained}
    if low and not several:
        parts["fp32 masters"] = 4 * trained
    if recipe.optimiser.prior_decay:
        parts["priors"] = 4 * trained
    if stage.needs_reference:
        parts["reference model"] = size * total
    if several:
        parts = _in_shards(stage, parts, size)
    if remembers(recipe):
        parts |= _of_streams(stage, rows, place, size * config.hidden_size)
    kept = activations(recipe, config, rows, size) if recipe.stage != "head" else 0
    if alone and kept:
        parts["gradients beyond activations"] = max(0, parts.pop("gradients") - kept)
    parts["activations"] = kept
    parts["log-probabilities"] = LOGPROBS[device.type] if recipe.stage != "head" else 0
    return {name: float(count) for name, count in parts.items() if count}


def _in_shards(stage: Stage, parts: dict[str, float], size: int) -> dict[str, float]:
    """Of several processes, what one keeps of the weights and what hangs on them, and what it gathers at a time."""
    shards = stage.world.size if stage.recipe.parallel == "shard" else 1
    blocks = stage.model.backbone.blocks
    block = sum(p.numel() for p in blocks[0].parameters())
    others = stage.model.num_parameters() - len(blocks) * block
    parts = {name: count / shards for name, count in parts.items()}
    return parts | {"gathered weights": size * (others + 2 * block)}  # a block, and the next one


def _of_streams(stage: Stage, rows: int, place: str, width: int) -> dict[str, float]:
    """What memory takes on the device; a row of keys, values or inputs has ``width`` bytes."""
    data, layers, kept = stage.recipe.data, stage.model.config.num_hidden_layers, _kept(stage.recipe)
    block, hidden = stage.recipe.checkpointing == "block", data.memory_kind == "hidden"
    at_work = 1 if block else layers  # layers for whose memory the backward pass keeps something at a time
    part = width * stage.micro * data.memory  # a tensor of the memory of all streams that compute together
    parts: dict[str, float] = {}
    if place == "device":
        rings = kept * layers * width * data.memory
        parts["Transformer-XL memory"] = rings * stage.share
        parts["Transformer-XL memory of held-out streams"] = rings * held_out_streams(stage)
        if block:  # else the backward pass keeps the same rows; values are a third of what their storage holds
            parts["rows to remember"] = (1 if hidden else 4) * layers * width * rows
    else:
        parts["windows of the memory on the host"] = kept * (2 if hidden else at_work + 1) * part
    if hidden:  # inputs beside the segment's own; keys (rotated, too) and values of them
        parts["projections of the memory"] = 4 * at_work * part
    return parts


def on_host(stage: Stage, device: torch.device, place: str) -> dict[str, float]:
    """Bytes by part that streams pin on the host: rings of twice their length, a tensor each layer, part and kind."""
    recipe, config = stage.recipe, stage.model.config
    if not remembers(recipe) or place != "host":
        return {}
    size = 2 if low_precision(recipe.precision, device) else 4
    ring = 2 * stage.micro * recipe.data.memory * config.hidden_size * size
    if device.type == "cuda":
        ring = 1 << (ring - 1).bit_length()  # PyTorch's allocator of pinned memory takes powers of two
    of_part = _kept(recipe) * config.num_hidden_layers * ring
    parts = {
        "Transformer-XL memory": of_part * (stage.share // stage.micro),
        "Transformer-XL memory of held-out streams": of_part * -(-held_out_streams(stage) // stage.micro),
    }
    return {name: float(count) for name, count in parts.items() if count}


def remembers(recipe: Recipe) -> bool:
    """Whether streams carry a memory."""
    return recipe.kind != "preference" and recipe.data.memory > 0


def _kept(recipe: Recipe) -> int:
    """Rows of the model's width that a token leaves in a layer."""
    return 2 if recipe.data.memory_kind == "kv" else 1


def held_out_streams(stage: Stage) -> int:
    """Streams of the largest held-out source."""
    return min(stage.recipe.batch.size, max(map(len, stage.held_out.values()), default=0))


def count_trained(stage: Stage) -> int:
    """Parameters that train."""
    return sum(p.numel() for name, p in stage.model.named_parameters() if stage.trains(name))


def choose_place(stage: Stage, device: torch.device) -> str:
    """Where the memory of streams lies: as the recipe says, or on the device where all of the run fits, else the host.

    Raises UserError where it is to lie on the host, and that has no room.
    """
    place = stage.recipe.data.memory_place
    if place == "auto":
        place = "device" if device.type == "cpu" or _needed(stage, device) <= _room(device) else "host"
    needed, there = sum(on_host(stage, device, place).values()) * stage.world.here, devices.host_memory()
    if needed > there:
        raise UserError(
            f"data.memory_place: expected {size_text(needed)} on the host for the memory of {stage.recipe.batch.size} "
            f"streams, got {size_text(there)}"
        )
    return place


def check_update(stage: Stage) -> None:
    """Raise UserError where the host has no room for the tokens of one update: each with its target, in int64.

    Every process reads those of all streams. Without this a mistyped length fills the memory without a word.
    """
    size, context, there = stage.recipe.batch.size, stage.recipe.data.context, devices.host_memory()
    needed = 2 * 8 * size * context * stage.world.here
    if needed > there:
        raise UserError(
            f"batch.size, data.context: expected an update whose tokens fit into {size_text(there)} on the host, "
            f"got {size:,} times {context:,} tokens, which take {size_text(needed)}"
        )


def explain(stage: Stage, device: torch.device, place: str) -> str:
    """Where the memory lies and, of a GPU, what it would have to hold."""
    text = f"the memory of {stage.recipe.batch.size} streams is on the {place}"
    if device.type == "cpu":
        return text
    needed, room = size_text(_needed(stage, device)), size_text(_room(device))
    return f"{text}; all on the GPU takes about {needed} of the {room} that may be filled"


def _needed(stage: Stage, device: torch.device) -> float:
    return sum(on_device(stage, stage.micro * stage.recipe.data.context, device, "device").values())


def _room(device: torch.device) -> float:
    return SHARE * devices.memory(device)


def size_text(count: float) -> str:
    """GB, or MB where they are few."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def activations(recipe: Recipe, config: ModelConfig, rows: int, size: int) -> float:
    """Bytes that the backward pass keeps of ``rows`` rows.

    A block keeps its input, both norms' outputs, q, k (rotated, too) and v, what attention gives with its log-sum-exp,
    the sum after it; [x | gate] and what SwiGLU makes of them.
    """
    block = size * (10 * config.hidden_size + 3 * config.intermediate_size) + 4 * config.num_attention_heads
    kept = config.num_hidden_layers * block
    if recipe.checkpointing == "block":
        kept = config.num_hidden_layers * size * config.hidden_size + block
    return rows * (kept + size * (2 * config.embedding_size + 3 * config.hidden_size))
