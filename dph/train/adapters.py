"""Low-rank adapters (LoRA) on the blocks of a model while a run trains them, by PEFT.

While a model has adapters its blocks are computed in parts (``dph.model.backbone.block_form``). Its own weights are
frozen, with the same tensors as before, so that a second set of modules over them (``shared_copy``) is the model
without adapters, bit for bit and in its fused form, at no cost in memory: the reference of stage align.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dph._layouts import Names, names_of, row_blocks
from dph.errors import UserError

if TYPE_CHECKING:
    from dph.model.model import Model
    from dph.train.recipe import Recipe

NAME = "default"  # of the adapter, as PEFT calls the only one
PARTS = {"qkv": "attention", "out": "attention", "fc1": "ffn", "fc2": "ffn"}  # of a block, by name of the layer


def load_package() -> Any:
    """Return PEFT. Raises UserError if it is missing."""
    try:
        import peft
    except ImportError:
        raise UserError("lora.rank: needs the peft package: pip install -e '.[lora]' or pip install peft") from None
    return peft


def is_adapter(name: str) -> bool:
    """Whether a parameter of a model with adapters is one of theirs."""
    return ".lora_A." in name or ".lora_B." in name


def count_adapted(model: Model, recipe: Recipe) -> int:
    """Return the number of parameters of the adapters that a run adds to ``model``."""
    count = 0
    for block in model.backbone.blocks[_first_block(model, recipe) :]:
        for target in recipe.lora.targets:
            linear = getattr(getattr(block, PARTS[target]), target)
            count += recipe.lora.rank * (linear.in_features + linear.out_features)
    return count


def _first_block(model: Model, recipe: Recipe) -> int:
    return len(model.backbone.blocks) - (recipe.train.last_layers or len(model.backbone.blocks))


def _adapted(layer: nn.Module, x: Tensor) -> Tensor:
    """Rows [T, I] -> [T, O] of an adapted layer, like PEFT's own ``forward``.

    That one has three more tensors [T, O], which take time and, freed between stored activations, leave gaps in the
    host's memory: in a step of 2,200 tokens of a 135M model 1.3 GB, a third of its peak.
    """
    reduced = layer.lora_A[NAME](layer.lora_dropout[NAME](x))
    return layer.base_layer(x).addmm_(reduced, layer.lora_B[NAME].weight.t(), alpha=layer.scaling[NAME])


def shared_copy(model: Model) -> Model:
    """Return a copy of ``model`` in evaluation mode, without reward heads, that shares its frozen weights.

    The other weights are copied, and frozen.
    """
    shared = {}
    for name, p in model.named_parameters():
        if not p.requires_grad or name.startswith("heads."):
            shared[id(p)] = p  # which deepcopy takes for a copy that it has made
    twin = copy.deepcopy(model, shared)
    twin.heads.clear()
    return twin.requires_grad_(False).eval()


class Adapters:
    """Adapters of a model, from their injection until they are merged into its weights or removed.

    Args:
        model: plain model, changed in place: every weight but the adapters' is frozen, and each adapted layer is the
            ``base_layer`` of PEFT's module in its place.
        recipe: of the run; its seed draws the weights A, without effect on torch's generator.

    Raises UserError if PEFT is missing.
    """

    def __init__(self, model: Model, recipe: Recipe) -> None:
        peft, lora = load_package(), recipe.lora
        numbers = "|".join(map(str, range(_first_block(model, recipe), len(model.backbone.blocks))))
        layers = "|".join(f"{PARTS[target]}\\.{target}" for target in lora.targets)
        self.config = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=rf"backbone\.blocks\.({numbers})\.({layers})",
            task_type="CAUSAL_LM",
            base_model_name_or_path=recipe.model.path,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self._tuner = peft.LoraModel(model, self.config, NAME)
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.forward = MethodType(_adapted, module)
        self.model, self._merged = model, {}

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of the adapters' weights on the CPU: by name of the layer, ``LAYER.lora_A.weight`` and B's."""
        tensors = {}
        for name, p in self.model.named_parameters():
            if is_adapter(name):
                tensors[name.replace(f".{NAME}.", ".")] = p.detach().to("cpu", copy=True).contiguous()
        return tensors

    def merge(self) -> None:
        """Add the adapters to the model's weights, and give the model its own layers back."""
        self._merged = self.tensors()
        self._tuner.merge_and_unload()

    def remove(self) -> None:
        """Give the model its own layers back, with their weights as they were."""
        self._tuner.unload()

    def save(self, directory: str | os.PathLike) -> None:
        """Write the merged adapters in PEFT's format, to be loaded on a ``dph.Model``."""
        tensors = {f"base_model.model.{name}": tensor for name, tensor in self._merged.items()}
        self._write(directory, tensors, self.config.target_modules)

    def save_family(self, table: Names, directory: str | os.PathLike) -> None:
        """Write the merged adapters in PEFT's format, to be loaded on the class of transformers of the model's family.

        A layer that the class holds in several parts has there as many adapters, which share A. ``table``: names of the
        family's weights.
        """
        config, tensors, targets = self.model.config, {}, set()
        for name, a in self._merged.items():
            if ".lora_A." not in name:
                continue
            b = self._merged[name.replace(".lora_A.", ".lora_B.")]
            own = name.replace(".lora_A.", ".")
            names = names_of(own, table)
            rows = row_blocks(own, len(b), config) if len(names) > 1 else [len(b)]
            for part, part_b in zip(names, b.split(rows), strict=True):
                target = part.removesuffix(".weight")
                targets.add(target)
                tensors[f"base_model.model.{target}.lora_A.weight"] = a.clone()
                tensors[f"base_model.model.{target}.lora_B.weight"] = part_b.clone()
        self._write(directory, tensors, targets)

    def _write(self, directory: str | os.PathLike, tensors: Mapping[str, Tensor], targets: str | set[str]) -> None:
        config = copy.copy(self.config)
        config.target_modules, config.inference_mode = targets, True  # the adapter is loaded to be used
        save_file(tensors, Path(directory, "adapter_model.safetensors"), metadata={"format": "pt"})
        config.save_pretrained(directory)
