"""A model of a family with one reward head as a sequence classifier that others open without dph.

An identity head on the last layer, not standardised, becomes the family's own ``...ForSequenceClassification``, which
transformers, TRL and vLLM open. Any other becomes ``RewardClassifier``, in a file of the folder
(``modeling_reward_classifier.py``) that needs ``trust_remote_code=True``.

The family's class judges the last token that is not padding, so a text has to end with the end-of-turn token, without
the newline that some chat formats put behind it. It has no bias, which a standardised head needs. Neither
class has dropout.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dph import chat
from dph.errors import UserError
from dph.model import head_file, saving
from dph.model.config import FAMILIES, ModelConfig

if TYPE_CHECKING:
    from dph.model.model import Model

SOURCE = Path(__file__).with_name("modeling_reward_classifier.py")
# Names in the exported class of the weights of a RewardHead; the linear layers of its pooler are renamed apart.
RENAMED = {"standardise.mean": "mean", "standardise.deviation": "deviation", "mix.weight": "mix"}


def save_classifier(
    model: Model, tokenizer: Any, directory: str | os.PathLike, head: str | None = None, shard_size: str = "5GB"
) -> str:
    """Write config.json, weights and, for a class of its own, its source; return the name of the class.

    ``tokenizer`` gets a padding token other than the end-of-turn token, which would be taken for padding; saving it is
    left to the caller. Raises UserError for a model of no family, without a name if it has several heads, and for a
    tokenizer without such a token; ValueError for a missing or untrained head.
    """
    if not isinstance(model.config, ModelConfig):
        raise UserError(
            "--to classifier: expected a model of a family that dph computes, got one that transformers does"
        )
    head, group = head_file.find(model, head, "--head")
    form = model.config.head_form(group)
    end = chat.markup(tokenizer).end_of_turn
    pad = _padding(tokenizer, end, model.config.vocab_size)
    weights = model.state_dict()
    fields, tensors = saving.family_form(model, FAMILIES.get(model.config.family), weights)
    tensors.pop("lm_head.weight", None)
    vector = weights[f"heads.{group}.reward.{head}.weight"].mean(0, keepdim=True)  # of an ensemble's members
    labels = {"id2label": {"0": head}, "label2id": {head: 0}, "pad_token_id": pad}
    if form["pooler"] == "identity" and form["layer"] == -1 and not form["standardised"]:
        name = FAMILIES[model.config.family].architecture.replace("ForCausalLM", "ForSequenceClassification")
        tensors["score.weight"] = vector
        saving.write_form({**fields, **labels, "architectures": [name]}, tensors, directory, shard_size)
        return name
    layers = model.heads[group].layers
    if -1 not in layers:
        tensors = {key: weight for key, weight in tensors.items() if _is_before(key, max(layers))}
    tensors |= {"score.weight": vector, **_pooler_tensors(weights, group)}
    module, name = SOURCE.stem, "RewardClassifier"
    config = {
        "model_type": "reward_classifier",
        "architectures": [name],
        "auto_map": {
            "AutoConfig": f"{module}.RewardConfig",
            "AutoModelForSequenceClassification": f"{module}.{name}",
        },
        "backbone": {**fields, "pad_token_id": pad},
        **{key: form[key] for key in ("pooler", "layer", "standardised", "intermediate_size")},
        "end_of_turn_token_id": end,
        "tie_word_embeddings": False,
        "dtype": fields.get("dtype", fields.get("torch_dtype")),
        **labels,
    }
    saving.write_form(config, tensors, directory, shard_size)
    shutil.copyfile(SOURCE, Path(directory, SOURCE.name))
    return name


def _is_before(name: str, layer: int) -> bool:
    """Whether a weight of the backbone is needed for the input of block ``layer``."""
    if name.startswith("model.layers."):
        return int(name.split(".")[2]) < layer
    return name != "model.norm.weight"


def _pooler_tensors(weights: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """Return the other weights of a head by their names in ``RewardClassifier``."""
    own = {}
    for key, weight in weights.items():
        if key.startswith(f"heads.{group}.") and not key.startswith(f"heads.{group}.reward."):
            own[key.removeprefix(f"heads.{group}.")] = weight
    tensors = {}
    for key, name in RENAMED.items():
        if key in own:
            tensors[name] = own.pop(key)
    layers = sorted({int(key.split(".")[1]) for key in own})  # of the pooler, the last of which is the outer one
    for layer, name in zip(reversed(layers), ("outer", "inner"), strict=False):
        for kind in ("weight", "bias"):
            tensors[f"{name}.{kind}"] = own[f"pooler.{layer}.{kind}"]
    return tensors


def _padding(tokenizer: Any, end: int, rows: int) -> int:
    """Return the id of a padding token other than the end-of-turn token, which the tokenizer uses from now on."""
    for token in dict.fromkeys([tokenizer.pad_token_id, tokenizer.unk_token_id, *sorted(tokenizer.all_special_ids)]):
        if token is not None and token != end and token < rows:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)
            return token
    raise UserError(f"{chat.tokenizer_name(tokenizer)}: expected a special token to pad with, got only the end of turn")
