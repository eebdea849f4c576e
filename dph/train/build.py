"""What a recipe starts from: the model, its tokenizer, and the records."""

import difflib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dph import chat, checkpoint
from dph.data import dataset
from dph.data.formats import Record
from dph.data.sampler import Order
from dph.data.tokenizer import add_chat_tokens
from dph.errors import UserError
from dph.model.config import ModelConfig
from dph.model.loading import load_model, load_tokenizer, model_path
from dph.model.model import Model
from dph.train import run_dir
from dph.train.recipe import Data, Evaluation, Objective, Recipe, from_dict


def open_start(recipe: Recipe) -> tuple[Model, Any]:
    """The model in fp32 on the CPU, and its tokenizer, with the chat tokens added where it lacks them.

    Raises UserError where they are missing or do not fit each other.
    """
    start = recipe.model
    if (start.path is None) == (start.config is None):
        raise UserError("model: expected either path or config, got " + ("neither" if start.path is None else "both"))
    if start.tokenizer is None and start.path is None:
        raise UserError("model.tokenizer: expected a directory or hub name beside model.config, got nothing")
    if start.path is not None:
        model_path(start.path)  # where there is no model, that is said, and not that its tokenizer is missing
    tokenizer = load_tokenizer(start.tokenizer or start.path)
    add_chat_tokens(tokenizer)
    torch.manual_seed(recipe.seed)
    if start.path is not None:
        model = load_model(start.path, dtype=torch.float32)
        if recipe.kind == "preference":
            model = with_heads(model, recipe.objective)
    else:
        model = fresh(start.config, tokenizer)
        if start.embeddings is not None:
            checkpoint.init_embeddings(model, start.embeddings)
    check_tokenizer(model, tokenizer)
    return model, tokenizer


def open_checkpoint(path: str | Path) -> tuple[Model, Any]:
    """The model in fp32 that a run's checkpoint (``RUN/checkpoints/step-NNNNNNNN``) holds, and its tokenizer.

    What the run started from is opened again for its sizes and tokenizer. Raises UserError where that is not there any
    more, was in memory, or the checkpoint is damaged.
    """
    path = Path(path)
    if reason := run_dir.damage(path):
        raise UserError(f"{path}: {reason}")
    directory = path.resolve().parents[1]
    made_by = from_dict(json.loads((directory / "config.json").read_text()))
    model, tokenizer = open_start(made_by)
    tensors = run_dir.start_weights(directory) | run_dir.Checkpoint(0, path).tensors("weights")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    if made_by.kind == "preference":
        model.untrained_heads -= set(made_by.objective.heads)
    return model, tokenizer


def fresh(config: dict[str, Any], tokenizer: Any) -> Model:
    """A model with fresh weights; vocabulary and special tokens are the tokenizer's where ``config`` is silent.

    It has no reward heads unless ``config`` names some: the stages that train them add them.
    """
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    end = tokenizer.convert_tokens_to_ids(chat.END)
    known = {"vocab_size": len(tokenizer), "im_end_token_id": end, "reward_heads": (), **special}
    arguments = inspect.signature(ModelConfig).parameters
    if unknown := sorted(config.keys() - arguments.keys()):
        nearest = difflib.get_close_matches(unknown[0], arguments, 1, 0.0)[0]
        raise UserError(f"model.config.{unknown[0]}: unknown key; did you mean {nearest}?")
    return Model(ModelConfig(**{**known, **config}))


def with_heads(model: Model, objective: Objective) -> Model:
    """``model`` with the reward heads, pooler and dropout that the recipe asks for; what is new starts afresh.

    The first heads share one pooler; on a model that has heads, each new one brings a pooler of its own (paper 5.2.2).
    """
    config = model.config
    pooler = config.reward_pooler if objective.pooler is None else objective.pooler
    dropout = config.reward_dropout if objective.dropout is None else objective.dropout
    new = [name for name in objective.heads if name not in model.head_names]
    if not new and (pooler, dropout) == (config.reward_pooler, config.reward_dropout):
        return model
    fields = {**config.to_dict(), "reward_pooler": pooler, "reward_dropout": dropout}
    fields["task_heads" if model.head_names else "reward_heads"] += new
    if pooler != config.reward_pooler:  # another kind of head: nothing of the old ones fits
        fields |= {"reward_heads": list(objective.heads), "task_heads": []}
    changed = Model(ModelConfig.from_dict(fields))
    same = {k: v for k, v in model.state_dict().items() if not k.startswith("heads.") or pooler == config.reward_pooler}
    missing = changed.load_state_dict(same, strict=False).missing_keys
    changed.untrained_heads = model.untrained_heads | set(new) if pooler == config.reward_pooler else {*objective.heads}
    if any(not name.startswith("heads.") for name in missing):
        raise AssertionError(f"weights lost on the way to new heads: {missing}")
    return changed


def check_tokenizer(model: Model, tokenizer: Any) -> None:
    """Raise UserError where the tokenizer and the model do not speak of the same tokens."""
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"tokenizer: expected at most {model.config.vocab_size} tokens, got {len(tokenizer)}")
    end = tokenizer.get_vocab().get(chat.END)
    if end is not None and model.config.im_end_token_id is None:
        model.config.im_end_token_id = end
    if end is not None and end != model.config.im_end_token_id:
        raise UserError(f"tokenizer: expected {chat.END} as id {model.config.im_end_token_id}, got {end}")


def open_records(section: Data | Evaluation, recipe: Recipe, split: str) -> list[Sequence[Record]]:
    """The sources of one section of the recipe, in its order; ``split`` where a source names none.

    UserError, with the source's key, where one cannot be read.
    """
    name = "data" if isinstance(section, Data) else "evaluation"
    found = []
    for i, source in enumerate(section.sources):
        try:
            records = dataset.load(
                source.source,
                recipe.kind,
                split=source.split or split,
                directory=source.directory or section.directory,
                limit=source.limit,
                seed=recipe.seed,
                text_field=source.text_field,
            )
        except UserError as error:
            without = "; evaluation.sources=[] goes without" if name == "evaluation" else ""
            raise UserError(f"{name}.sources.{i}: {error}{without}") from error
        found.append(records)
    return found


def open_mixture(recipe: Recipe) -> Order:
    """The training records in their order. UserError where there are none."""
    if not recipe.data.sources:
        raise UserError("data.sources: expected at least one source, got none")
    weights = [source.weight for source in recipe.data.sources]
    return dataset.mixture(open_records(recipe.data, recipe, "train"), recipe.seed, recipe.data.consecutive, weights)


def open_held_out(recipe: Recipe) -> dict[str, Sequence[Record]]:
    """The held-out sources, by names that differ."""
    found: dict[str, Sequence[Record]] = {}
    opened = open_records(recipe.evaluation, recipe, "validation")
    for source, records in zip(recipe.evaluation.sources, opened, strict=True):
        name = source.source.removeprefix("task:")
        found[name if name not in found else f"{name}, {source.split or len(found)}"] = records
    return found
