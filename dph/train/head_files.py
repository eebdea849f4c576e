"""Trained heads as files: ``RUN/heads/NAME``, written when a run has ended, with a record of their training."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import dph
from dph import chat
from dph.data import atomic
from dph.model import head_file
from dph.train import config_schema

if TYPE_CHECKING:
    from dph.train.best_checkpoint import BestCheckpoint
    from dph.train.endings import Result
    from dph.train.run_dir import RunDirectory
    from dph.train.stages.preference import PreferenceStage

UNCACHED = 100  # pairs of the sample whose states have to be computed


def write(stage: PreferenceStage, run: RunDirectory, result: Result, best: BestCheckpoint) -> None:
    """Write the heads that a finished run has trained; ``RUN/heads`` appears with all of them at once.

    ``about`` of each holds dph's version, the stage, the objective, the chat format, the sources and the number of
    pairs, the steps that its weights have seen, mean and deviation of its rewards on the first training answers
    (``objective.sample`` pairs if their states are cached, else at most UNCACHED; null with several ranks), its
    accuracy and the metrics of the last evaluation. If the model is that of the best step, the metric that it was
    chosen by is the only one. The model's ``head_records`` hold the same.
    """
    if not stage.rewarded:
        return
    recipe, model = stage.recipe, result.model
    rewards: dict[str, Tensor] | None = None
    if stage.world.world_size == 1:
        rewards = _sample_rewards(stage, result.step)
    evaluation, step = dict(result.evaluation), result.step
    if recipe.output.model == "best" and best.state is not None and best.state["step"] != step:
        evaluation, step = {best.state["figure"]: best.state["value"]}, best.state["step"]
    about = {
        "dph": dph.__version__,
        "stage": recipe.stage,
        "objective": config_schema.plain(dataclasses.asdict(recipe.objective)),
        "format": chat_format(result.tokenizer),
        "sources": [source.source for source in recipe.data.sources] or ["records in memory"],
        "pairs": stage.batches.records.size,
        "steps": step,
        "evaluation": evaluation,
    }
    backbone = str(run.directory / "model") if recipe.stage == "align" else recipe.model.path
    with stage.world.fail_together():
        if stage.world.rank == 0:
            with atomic.atomic_directory(run.directory / "heads") as folder:
                digests = head_file.backbone_digests(model.backbone)
                for name in recipe.objective.heads:
                    own = {**about, "accuracy": _accuracy(evaluation, name), "rewards": None}
                    if rewards is not None:
                        values = rewards[name].double()
                        figures = {"mean": float(values.mean()), "deviation": float(values.std())}
                        own["rewards"] = {**figures, "answers": len(values)}
                    model.head_records[name] = own
                    head_file.save(model, folder / folder_name(name), name, {}, backbone, digests)


def folder_name(head: str) -> str:
    """Return the name of a head's directory: its own name, without slashes."""
    name = head.replace("%", "%25").replace("/", "%2F")
    return name if len(name.encode()) <= 200 else hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def chat_format(tokenizer: Any) -> str:
    """Return the name of a tokenizer's chat format: "chatml" for the paper's, else a digest of its own template."""
    template = chat.own_template(tokenizer)
    return "chatml" if template is None else f"template {hashlib.blake2b(template.encode(), digest_size=8).hexdigest()}"


def _accuracy(evaluation: Mapping[str, float], head: str) -> float | None:
    """Return the head's accuracy on held-out pairs; None if it was not measured."""
    return evaluation.get(f"reward_accuracy_{head}", evaluation.get("reward_accuracy"))


@torch.no_grad()
def _sample_rewards(stage: PreferenceStage, steps: int) -> dict[str, Tensor]:
    """Return the rewards {head: [A]} of the first training answers, on the CPU; the position in the data stays.

    Only pairs of the first ``steps`` steps, whose states the cache holds already.
    """
    model, recipe = stage.model, stage.recipe
    cached = stage.frozen.kind == "states" and stage.frozen.cached
    count = min(recipe.objective.sample, steps * recipe.batch.size, stage.batches.records.size)
    count = count if cached else min(count, UNCACHED)
    pairs = stage.first_pairs(count)
    training, rewards = model.training, []
    model.eval()
    lengths = list(map(stage.micro_batch_class.length, pairs))
    for micro_batch in stage.micro_batches(pairs, lengths):
        if stage.frozen.kind == "states":
            states = stage.frozen(micro_batch)
        else:
            states = model.reward_states(micro_batch.packed.to(model.device))
        rewards.append(model.rewards_of(states))
    model.train(training)
    return {name: torch.cat([values[name] for values in rewards]).cpu() for name in rewards[0]}
