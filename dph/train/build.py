"""Construction of a training stage from its recipe: model, tokenizer, heads, records."""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dph import chat, checkpoint, devices
from dph._weights import check_tensors
from dph.data import dataset
from dph.data.formats import Encoder
from dph.data.sampler import Shuffled
from dph.data.tokenizer import add_chat_tokens
from dph.data.workers import WorkerPool
from dph.errors import UserError
from dph.model.attached import AttachedConfig, AttachedModel
from dph.model.config import FAMILIES, ModelConfig
from dph.model.directories import model_path
from dph.model.judging import JudgingModel
from dph.model.loading import check_settings, check_tokenizer, check_vocabulary, load_model, load_tokenizer
from dph.model.model import Model
from dph.train import checkpointing
from dph.train.adapters import Adapters, is_adapter, load_package
from dph.train.budget import memory
from dph.train.distributed import SINGLE_PROCESS, World
from dph.train.layer_choice import mixed_layers
from dph.train.recipe import Objective, Recipe, from_dict
from dph.train.stages.base import Stage
from dph.train.stages.lm import LanguageModelStage
from dph.train.stages.preference import PreferenceStage


def make_stage(
    recipe: Recipe,
    model: JudgingModel,
    tokenizer: Any,
    records: Any,
    held_out: Any,
    device: torch.device | None = None,
    world: World = SINGLE_PROCESS,
) -> Stage:
    """Return the stage of ``recipe``, on its device or on ``device``.

    A model that several ranks will shard stays on the CPU.

    Args:
        model: trained model, turned into fp32.
        tokenizer: of the model.
        records: training records in memory; None for the recipe's sources.
        held_out: records for evaluation, or a mapping from names to them; None for the recipe's sources.

    Raises UserError for errors in the recipe or the data, if a package is missing, and if the host has too little
    memory.
    """
    if recipe.lora.rank is not None:
        load_package()
    check_tokenizer(model, tokenizer)
    if isinstance(model, AttachedModel):
        _check_attached(recipe, model, world)
    if records is None:
        data = recipe.data
        sampler, development = dataset.open_training(
            data.sources, recipe.kind, directory=data.directory, seed=recipe.seed, consecutive=data.consecutive,
            share=recipe.evaluation.share, redraw=data.redraw,
        )  # fmt: skip
    else:
        if recipe.evaluation.share:
            raise UserError("evaluation.share: expected 0 with records in memory, got a share: give them as held_out")
        sampler = Shuffled(records, recipe.seed)
        if recipe.data.loss != "answers" and isinstance(records[0], chat.Encoded):
            raise UserError(
                f"data.loss: expected answers with records that are encoded already, got {recipe.data.loss}"
            )
    if recipe.data.workers:
        loss = recipe.data.loss if recipe.data.repeat_system else None  # else runs of records are encoded together
        sampler = WorkerPool(sampler, tokenizer, recipe.data.workers, loss)
    if held_out is None:
        section = recipe.evaluation
        held_out = dataset.open_held_out(section.sources, recipe.kind, directory=section.directory, seed=recipe.seed)
        if records is None and development:
            held_out["development"] = development
    elif not isinstance(held_out, Mapping):
        held_out = {"held out": held_out}
    if device is None:
        device = devices.choose(recipe.device if world.world_size == 1 else "cpu")
    stage_class = PreferenceStage if recipe.kind == "preference" else LanguageModelStage
    stage = stage_class(
        recipe=recipe,
        model=model.to(device=device, dtype=torch.float32),
        tokenizer=tokenizer,
        world=world,
        encode=Encoder(tokenizer, recipe.data.loss),
        records=sampler,
        held_out={name: source for name, source in held_out.items() if len(source)},
    )
    limit = model.config.max_position_embeddings
    if limit is not None and recipe.data.context > limit:
        stage.notes += (
            f"data.context: {recipe.data.context} tokens, longer than the {limit} that the model was made for "
            "(config.max_position_embeddings)",
        )
    if recipe.kind != "preference":
        memory.check_host_batch(stage)
        if recipe.data.memory:
            training_device = torch.device(devices.choose(recipe.device))
            place = memory.choose_place(stage, training_device)
            stage.set_memory_place(place)
            if place == "host" or training_device.type != "cpu":
                stage.notes += (memory.explain_place(stage, training_device, place),)
    return stage


def _check_attached(recipe: Recipe, model: AttachedModel, world: World) -> None:
    """Raise UserError unless the recipe trains only the heads of a frozen network of transformers, in one process."""
    kind = model.config.network.get("model_type")
    if recipe.stage != "head":
        families = ", ".join(FAMILIES)
        raise UserError(
            f"stage: expected head, got {recipe.stage}: the {kind} model is frozen and only its heads are trained "
            f"(models of {families} and our own train in every stage)"
        )
    if recipe.compile:
        raise UserError(f"compile: expected false, got true: the {kind} model is computed by transformers")
    if world.world_size > 1:
        raise UserError(f"WORLD_SIZE: expected one process for heads of a {kind} model, got {world.world_size}")


def open_model(recipe: Recipe) -> tuple[JudgingModel, Any]:
    """Return the starting model in fp32 on the CPU, and its tokenizer, which has a chat format.

    Raises UserError if they are missing or do not match.
    """
    start = recipe.model
    if (start.path is None) == (start.config is None):
        raise UserError("model: expected either path or config, got " + ("neither" if start.path is None else "both"))
    if start.tokenizer is None and start.path is None:
        raise UserError("model.tokenizer: expected a directory or hub name with model.config, got nothing")
    if start.path is not None:
        model_path(start.path)  # a missing model is reported before its missing tokenizer
    tokenizer = _load_chat_tokenizer(start.tokenizer or start.path)
    if start.path is not None and start.tokenizer is not None:
        check_vocabulary(start.path, tokenizer)
    torch.manual_seed(recipe.seed)
    if start.path is not None:
        model = load_model(start.path, dtype=torch.float32)
        if recipe.kind == "preference":
            model = with_heads(model, recipe.objective)
    else:
        model = new_model(start.config, tokenizer)
        if start.embeddings is not None:
            if Path(start.embeddings).is_dir():
                check_settings(start.embeddings)
            checkpoint.init_embeddings(model, start.embeddings)
    check_tokenizer(model, tokenizer)
    return model, tokenizer


def reopen_model(recipe: Recipe, start: Path) -> tuple[JudgingModel, Any, tuple[str, ...]]:
    """Return the model of a run that resumes, its tokenizer, and notes; all weights are then loaded from the run.

    What the recipe names is opened if it is a directory. Otherwise, if it is gone or a hub name, configuration and
    tokenizer are the run's own copies in its folder ``start``; runs of earlier versions have none.

    Raises UserError as :func:`open_model`.
    """
    names = recipe.model
    place = names.tokenizer or names.path
    if not (start / "config.json").is_file() or place is None:
        return *open_model(recipe), ()
    if recipe.kind == "preference" and recipe.objective.layer == "auto":
        fields = checkpointing.read_json(start / "config.json")  # the layer that the run has chosen
        form = fields.get("task_head_forms", {}).get(recipe.objective.heads[0], {})
        layer = form.get("layer", fields.get("reward_layer", -1))
        layer = tuple(layer) if isinstance(layer, list) else layer
        recipe = dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, layer=layer))
    has_model, has_tokenizer = names.path is not None and Path(names.path).is_dir(), Path(place).is_dir()
    notes = []
    if not has_tokenizer:
        copies = "the tokenizer is the run's copy"
        if place == names.path:
            copies = "the model's configuration and tokenizer are the run's copies"
        notes.append(f"{place} is not a directory here: {copies}")
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(names, tokenizer=str(start)))
    if has_model:
        return *open_model(recipe), tuple(notes)
    if names.path is not None and names.path != place:
        notes.append(f"{names.path} is not a directory here: the model's configuration is the run's copy")
    tokenizer = _load_chat_tokenizer(recipe.model.tokenizer or place)
    return stored_model(start), tokenizer, tuple(notes)


def _load_chat_tokenizer(name: str) -> Any:
    """Return the tokenizer ``name``, with the paper's chat tokens if it has no chat template of its own."""
    tokenizer = load_tokenizer(name)
    if chat.own_template(tokenizer) is None:
        add_chat_tokens(tokenizer)
    return tokenizer


def stored_model(start: Path) -> JudgingModel:
    """Return the model of a run, with random weights, of the configuration in its folder ``start``."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with checkpointing.loading(start / "config.json"):
        if checkpointing.read_json(start / "config.json").get("model_type") == AttachedConfig.model_type:
            model: JudgingModel = AttachedModel(AttachedConfig.from_pretrained(start))
        else:
            model = Model(ModelConfig.from_pretrained(start))
        model.untrained_heads = set(checkpointing.read_json(start / "state.json")["untrained_heads"])
    return model


def open_checkpoint(path: str | Path) -> tuple[JudgingModel, Any]:
    """Return the model in fp32 of a run's checkpoint (``RUN/checkpoints/step-NNNNNNNN``), and its tokenizer.

    Configuration and tokenizer come from the run's copies, or from the starting model if an earlier version made the
    run. Raises UserError if that is missing, if it was a model in memory, or if the checkpoint is damaged.
    """
    path = Path(path)
    if reason := checkpointing.damage(path):
        raise UserError(f"{path}: {reason}")
    directory = path.resolve().parents[1]
    recipe = from_dict(checkpointing.read_json(directory / "config.json"))
    start = directory / "start"
    if (start / "config.json").is_file():
        model, tokenizer = stored_model(start), load_tokenizer(str(start))
    else:
        model, tokenizer = open_model(recipe)
    tensors = checkpointing.load_start(directory) | checkpointing.Checkpoint(0, path).tensors("weights")
    where = f"{path / 'weights.safetensors'} and {start / 'start.safetensors'}"
    params = dict(model.named_parameters())
    adapters = None if recipe.lora.rank is None else Adapters(model, recipe)
    params |= {name: p for name, p in model.named_parameters() if is_adapter(name)}
    check_tensors(params, tensors, where)
    with torch.no_grad():
        for name, parameter in params.items():
            parameter.copy_(tensors[name])
    if adapters is not None:
        adapters.merge()
        model.requires_grad_(True)
    if recipe.kind == "preference" and recipe.objective.dph_weight > 0:
        model.untrained_heads -= set(recipe.objective.heads)
    return model, tokenizer


def new_model(config: dict[str, Any], tokenizer: Any) -> Model:
    """Return a model with random weights; vocabulary and special tokens default to the tokenizer's.

    It has no reward heads unless ``config`` names some: the stages that train heads add them.
    """
    values: dict[str, Any] = {"vocab_size": len(tokenizer), "reward_heads": ()}
    values["im_end_token_id"] = chat.end_of_turn(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values[name] = getattr(tokenizer, name)
    arguments = inspect.signature(ModelConfig).parameters
    if unknown := sorted(config.keys() - arguments.keys()):
        nearest = difflib.get_close_matches(unknown[0], arguments, 1, 0.0)[0]
        raise UserError(f"model.config.{unknown[0]}: unknown key; did you mean {nearest}?")
    try:
        return Model(ModelConfig(**{**values, **config}))
    except UserError as error:
        raise UserError(f"model.config.{error}") from None


def with_heads(model: JudgingModel, objective: Objective) -> JudgingModel:
    """Return ``model`` with the reward heads, pooler and dropout of the recipe; new parts have random weights.

    The first heads share a pooler. In a model that has heads, each new head gets a pooler of its own (paper 5.2.2), and
    so does each head of the recipe that has another form; heads that the recipe does not name stay as they are.
    """
    config, shared = model.config, model.config.head_form("shared")
    layer = list(objective.layer) if isinstance(objective.layer, tuple) else objective.layer
    if layer == "mix":
        layer = mixed_layers(config.num_hidden_layers)
        if not layer:
            raise UserError("objective.layer: expected a model of at least 2 blocks for mix, got one of 1")
    asked = {"pooler": objective.pooler, "standardised": objective.standardised, "members": objective.ensemble}
    asked["layer"] = None if layer == "auto" else layer  # chosen later, by dph.train.head_states
    asked = {key: value for key, value in asked.items() if value is not None}

    def fits(name: str) -> bool:
        form = {"members": 1, **config.head_form("shared" if name in config.reward_heads else f"task_{name}")}
        return all(form[key] == value for key, value in asked.items())

    new = [name for name in objective.heads if name not in model.head_names or not fits(name)]
    dropout = config.reward_dropout if objective.dropout is None else objective.dropout
    forms = {name: dict(form) for name, form in config.task_head_forms.items() if name not in new}
    changed = [forms[name] for name in forms if name in objective.heads and objective.dropout is not None]
    if not new and all(form["dropout"] == dropout for form in (shared, *changed)):
        return model
    for each in changed:
        each["dropout"] = dropout
    shared["dropout"] = dropout
    form = {"members": 1, **shared, **asked}
    if form["members"] == 1:
        form.pop("members")
    kept = [name for name in model.head_names if name not in new]
    fields = {**config.to_dict(), "reward_dropout": dropout}
    if kept:
        if form != shared:
            forms |= dict.fromkeys(new, form)
        fields["reward_heads"] = [name for name in config.reward_heads if name in kept]
        fields["task_heads"] = [*(name for name in config.task_heads if name in kept), *new]
        fields["task_head_forms"] = forms
    else:
        fields |= {"reward_heads": new, "task_heads": [], "task_head_forms": {}}
        fields |= {f"reward_{key}": form.get(key, 1) for key in ("pooler", "layer", "standardised", "members")}
    extended = model.remade(type(config).from_dict(fields))
    extended.head_records = {name: about for name, about in model.head_records.items() if name in kept}
    replaced = tuple(f"heads.{key}." for key, head in model.heads.items() if set(head.reward).issubset(new))
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith(replaced)}
    for name in extended.load_state_dict(weights, strict=False).missing_keys:
        if not name.startswith("heads."):
            raise AssertionError(f"{name} is missing from the model with new heads")
    extended.untrained_heads = model.untrained_heads.intersection(kept) | set(new)
    return extended
