"""Directories in the layouts of other programs: the released ``lsw_transformer`` layout, and those of families."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from dph import checkpoint
from dph._layouts import blocks_of, pieces
from dph.errors import UserError, shown
from dph.model.families import Family
from dph.model.families.fields import their_fields

if TYPE_CHECKING:
    from dph.model.model import Model

log = logging.getLogger(__name__)


def save_official(model: Model, weights: Mapping[str, Tensor], directory: str | os.PathLike) -> None:
    """Write config.json and model.safetensors in the released layout; as :meth:`Model.save_official`."""
    config = checkpoint.config_to_official(model.config)
    if not any(name.startswith("heads.") for name in weights):
        config |= checkpoint.NO_HEADS  # the released class would fill listed heads with random weights
    tensors = checkpoint.to_official(dict(weights))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    os.makedirs(directory, exist_ok=True)
    save_file(tensors, os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
    _write_json(Path(directory, "config.json"), config)


def save_family(
    model: Model, family: Family | None, weights: Mapping[str, Tensor], directory: str | os.PathLike, shard_size: str
) -> None:
    """Write config.json, weights and generation_config.json of a family; as :meth:`Model.save_family`.

    Args:
        family: of the model; None if it comes from none.
        weights: of the model, by own name.
        shard_size: most bytes of a file, such as "5GB".
    """
    fields, tensors = family_form(model, family, weights)
    if model.head_names:
        log.warning("reward heads %s are left out: the family's layout has none", ", ".join(model.head_names))
    write_form(fields, tensors, directory, shard_size)
    model.generation_config.save_pretrained(directory)


def family_form(
    model: Model, family: Family | None, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config.json and weights of a family, without reward heads; errors as :meth:`Model.save_family`."""
    if family is None:
        raise UserError(
            "family: expected a model that comes from a Hugging Face family's directory, got one of "
            f"{shown(model.config.family or 'none')}: no class of transformers computes it"
        )
    fields = their_fields(family, model.config)
    kept = dict(weights)
    if model.config.tie_word_embeddings:
        del kept["lm_head.weight"]
    names = pieces(kept, family.weights)
    if others := [name for name in kept if name not in names and not name.startswith("heads.")]:
        raise UserError(
            f"weights: expected those of the family {family.model_type}, got {len(others)} others, the first is "
            f"{shown(others[0])}"
        )
    tensors = blocks_of(kept, names, model.config)
    dtype = next(iter(tensors.values())).dtype
    fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = str(dtype).removeprefix("torch.")
    return fields, tensors


def write_form(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], directory: str | os.PathLike, shard_size: str
) -> None:
    """Write config.json, and weights in files of at most ``shard_size`` with an index if there are several."""
    from huggingface_hub import split_torch_state_dict_into_shards

    os.makedirs(directory, exist_ok=True)
    shards = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size
    )
    for file, names in shards.filename_to_tensors.items():
        content = {name: tensors[name].contiguous() for name in names}
        save_file(content, os.path.join(directory, file), metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": dict(shards.metadata), "weight_map": dict(shards.tensor_to_filename)}
        _write_json(Path(directory, "model.safetensors.index.json"), index)
    _write_json(Path(directory, "config.json"), fields)


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
