"""Memory footprint of a run on the device and on the host, and the place of the Transformer-XL memory it leaves."""

from __future__ import annotations

import torch

from dph import devices
from dph.devices import low_precision
from dph.errors import UserError
from dph.model.config import ModelConfig
from dph.train.adapters import count_adapted, is_adapter
from dph.train.recipe import Lora, Recipe
from dph.train.stages.base import Stage

LOGPROBS = {"cuda": 300e6, "cpu": 64e6}  # bytes of log-probabilities and their gradients, at most
USABLE = 0.9  # of a GPU's memory: the rest is for the driver, the allocator and other programs


def on_device(stage: Stage, rows: int, device: torch.device, place: str, *, alone: bool = False) -> dict[str, float]:
    """Return bytes by purpose, at the peak of a step.

    Args:
        rows: rows of hidden state that the backbone computes at a time.
        device: "cuda" or "cpu".
        place: of the Transformer-XL memory, "device" or "host".
        alone: whether these are all rows of the step. Then gradients are not accumulated in fp32, and they replace the
            activations as the backward pass frees them (except for the embedding's gradient, which is neglected).
    """
    recipe, config = stage.recipe, stage.model.config
    total = sum(p.numel() for name, p in stage.model.named_parameters() if not is_adapter(name))
    adapters = 0 if recipe.lora.rank is None else count_adapted(stage.model, recipe)
    trained, low = count_trained(stage), low_precision(recipe.precision, device)
    sharded = stage.world.world_size > 1
    size = 2 if low else 4
    # Shards are fp32 and their own masters; only gathered weights are bf16.
    sizes = {"weights": (4 if sharded else size) * (total + adapters)}
    sizes["gradients"] = (size if alone and not sharded else 4) * trained
    sizes["momentum and second moment"] = 8 * trained
    if low and not sharded:
        sizes["fp32 masters"] = 4 * trained
    sizes["priors"] = 4 * _count_priors(stage)
    if stage.needs_reference:
        sizes["reference model"] = size * _count_reference(stage)
    if sharded:
        sizes = _per_rank(stage, sizes, size)
    if has_memory(recipe):
        sizes |= _stream_memory(stage, rows, place, size * _memory_width(recipe, config))
    if recipe.stage != "head":
        saved = activations(recipe, config, rows, size, stage.frozen_blocks)
        if alone:
            sizes["gradients beyond activations"] = max(0, sizes.pop("gradients") - saved)
        sizes["activations"] = saved
        sizes["log-probabilities"] = LOGPROBS[device.type]
    return {name: float(count) for name, count in sizes.items() if count}


def _per_rank(stage: Stage, sizes: dict[str, float], size: int) -> dict[str, float]:
    """Return the sizes that one of several ranks holds of the weights and their state, and of gathered weights."""
    shards = stage.world.world_size if stage.recipe.parallel == "shard" else 1
    blocks = stage.model.backbone.blocks
    block = sum(p.numel() for p in blocks[0].parameters())
    others = stage.model.num_parameters() - len(blocks) * block
    own = {name: count / shards for name, count in sizes.items()}
    return own | {"gathered weights": size * (others + 2 * block)}  # the current block and the next one


def _stream_memory(stage: Stage, rows: int, place: str, width: int) -> dict[str, float]:
    """Return the sizes of Transformer-XL memory on the device; a row of keys, values or inputs has ``width`` bytes."""
    data, layers, tensors = stage.recipe.data, stage.model.config.num_hidden_layers, _memory_tensors(stage.recipe)
    block, hidden = stage.recipe.checkpointing == "block", data.memory_kind == "hidden"
    active_layers = 1 if block else layers  # whose memory the backward pass refers to at a time
    micro_batch = width * stage.micro_size * data.memory  # one tensor of the memory of a micro-batch
    sizes: dict[str, float] = {}
    if place == "device":
        rings = tensors * layers * width * data.memory
        sizes["Transformer-XL memory"] = rings * stage.rank_size
        sizes["Transformer-XL memory of held-out streams"] = rings * held_out_streams(stage)
        if block:  # otherwise autograd saves the same rows; values are views of a storage three times as large
            sizes["rows to remember"] = (1 if hidden else 4) * layers * width * rows
    else:
        sizes["windows of the memory on the host"] = tensors * (2 if hidden else active_layers + 1) * micro_batch
    if hidden:  # inputs joined with the segment's own; their keys, rotated keys and values
        sizes["projections of the memory"] = 4 * active_layers * micro_batch
    return sizes


def on_host(stage: Stage, device: torch.device, place: str) -> dict[str, float]:
    """Return bytes by purpose of pinned host memory: rings of twice the memory's length, one per layer and tensor."""
    recipe, config = stage.recipe, stage.model.config
    if not has_memory(recipe) or place != "host":
        return {}
    size = 2 if low_precision(recipe.precision, device) else 4
    ring = 2 * stage.micro_size * recipe.data.memory * _memory_width(recipe, config) * size
    if device.type == "cuda":
        ring = 1 << (ring - 1).bit_length()  # PyTorch's allocator of pinned memory takes powers of two
    micro_batch = _memory_tensors(recipe) * config.num_hidden_layers * ring
    sizes = {
        "Transformer-XL memory": micro_batch * (stage.rank_size // stage.micro_size),
        "Transformer-XL memory of held-out streams": micro_batch * -(-held_out_streams(stage) // stage.micro_size),
    }
    return {name: float(count) for name, count in sizes.items() if count}


def has_memory(recipe: Recipe) -> bool:
    """Return whether streams carry a Transformer-XL memory."""
    return recipe.kind != "preference" and recipe.data.memory > 0


def _memory_tensors(recipe: Recipe) -> int:
    """Return the number of rows that a token leaves in the memory of a layer."""
    return 2 if recipe.data.memory_kind == "kv" else 1


def _memory_width(recipe: Recipe, config: ModelConfig) -> int:
    """Return the elements of such a row: of the keys, the values or the input of attention."""
    return config.num_key_value_heads * config.head_dim if recipe.data.memory_kind == "kv" else config.hidden_size


def held_out_streams(stage: Stage) -> int:
    """Return the number of streams of the largest held-out source."""
    return min(stage.recipe.batch.size, max(map(len, stage.held_out.sources.values()), default=0))


def count_trained(stage: Stage) -> int:
    """Return the number of trained parameters, with those of adapters, whether the model has them yet or not."""
    own = sum(p.numel() for name, p in stage.model.named_parameters() if stage.trains(name) and not is_adapter(name))
    return own if stage.recipe.lora.rank is None else own + count_adapted(stage.model, stage.recipe)


def _count_priors(stage: Stage) -> int:
    """Return the number of trained parameters with a prior decay, of which the optimizer stores the initial values."""
    recipe, count = stage.recipe, 0
    decay = {False: recipe.optimiser.prior_decay, True: recipe.optimiser.head_prior_decay}
    if decay[True] is None:
        decay[True] = decay[False]
    for name, p in stage.model.named_parameters():
        if stage.trains(name) and not is_adapter(name) and not any(word in name for word in recipe.optimiser.no_decay):
            count += p.numel() if decay[name.startswith("heads.")] else 0
    if recipe.lora.rank is not None and decay[False]:
        count += count_adapted(stage.model, recipe)
    return count


def _count_reference(stage: Stage) -> int:
    """Return the number of parameters that a reference model has of its own: on one rank it shares those frozen."""
    count = 0
    for name, p in stage.model.named_parameters():
        if not name.startswith("heads.") and not is_adapter(name):
            count += p.numel() if stage.world.world_size > 1 or stage.trains(name) else 0
    return count


def choose_place(stage: Stage, device: torch.device) -> str:
    """Return the place of the Transformer-XL memory: the recipe's, or for "auto" the device if the run fits there.

    Raises UserError if the place is the host and its memory is too small.
    """
    place = stage.recipe.data.memory_place
    if place == "auto":
        fits = device.type == "cpu" or _required(stage, device) <= _usable(device)
        place = "device" if fits else "host"
    required = sum(on_host(stage, device, place).values()) * stage.world.local_world_size
    available = devices.host_memory()
    if required > available:
        raise UserError(
            f"data.memory_place: expected {size_text(required)} on the host for the memory of "
            f"{stage.recipe.batch.size} streams, got {size_text(available)}"
        )
    return place


def check_host_batch(stage: Stage) -> None:
    """Raise UserError if the host's memory is too small for the tokens and targets of one step, in int64.

    Every rank reads those of all streams. Without this check a mistyped length would fill the host's memory.
    """
    size, context, available = stage.recipe.batch.size, stage.recipe.data.context, devices.host_memory()
    required = 2 * 8 * size * context * stage.world.local_world_size
    if required > available:
        raise UserError(
            f"batch.size, data.context: expected a step whose tokens fit into {size_text(available)} on the host, "
            f"got {size:,} times {context:,} tokens, which take {size_text(required)}"
        )


def explain_place(stage: Stage, device: torch.device, place: str) -> str:
    """Return a message about the place of the memory and, on a GPU, the footprint of the alternative."""
    text = f"the memory of {stage.recipe.batch.size} streams is on the {place}"
    if device.type == "cpu":
        return text
    required, usable = size_text(_required(stage, device)), size_text(_usable(device))
    return f"{text}; all on the GPU takes about {required} of the {usable} that may be filled"


def _required(stage: Stage, device: torch.device) -> float:
    return sum(on_device(stage, stage.micro_size * stage.recipe.data.context, device, "device").values())


def _usable(device: torch.device) -> float:
    return USABLE * devices.device_memory(device)


def size_text(count: float) -> str:
    """Return a number of bytes as GB, or as MB below 0.1 GB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def activations(recipe: Recipe, config: ModelConfig, rows: int, size: int, frozen_blocks: int = 0) -> float:
    """Return bytes that autograd saves for ``rows`` rows of numbers of ``size`` bytes.

    A block saves its input, the outputs of both norms, q (and normed q), k (and rotated k) and v, attention's output
    with its log-sum-exp, the sum after attention, [x | gate], and the SwiGLU activations. Frozen blocks below those
    that are trained save nothing.
    """
    layers = config.num_hidden_layers - frozen_blocks
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    per_head = (3 if config.qk_norm else 2) * heads + 3 * key_heads
    block = size * (5 * config.hidden_size + per_head * config.head_dim + 3 * config.intermediate_size) + 4 * heads
    if recipe.lora.rank is not None:
        block += size * _adapter_activations(recipe.lora, config)
    saved = layers * block
    if recipe.checkpointing == "block":
        saved = layers * size * config.hidden_size + block
    if recipe.lora.rank is not None:  # gradients of a block's activations, for which those of weights leave room else
        saved += block
    return rows * (saved + size * (2 * config.embedding_size + 3 * config.hidden_size))


def _adapter_activations(lora: Lora, config: ModelConfig) -> float:
    """Return the numbers that autograd saves for a row of a block with adapters, beyond those without.

    A layer saves its input for its adapter alone, since its own weight is frozen, and the adapter A's output.
    """
    width, attended = config.hidden_size, config.num_attention_heads * config.head_dim
    inputs = {"qkv": width, "out": attended, "fc1": width, "fc2": config.intermediate_size}
    count: float = 0
    for name, size in inputs.items():
        if name in lora.targets:
            count += lora.rank + (1.25 * size if lora.dropout else 0)  # the dropped input, and a mask of bytes
        elif name != "out":  # whose input is saved by attention
            count -= size
    return count
