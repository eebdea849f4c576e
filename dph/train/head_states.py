"""Preparation of new reward heads by a sample of the training pairs: their layer, and the figures of their states."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from dph.data.packing import batches, pack
from dph.errors import UserError
from dph.model.heads import JudgedStates
from dph.model.model import Model
from dph.train.layer_choice import best_layer, mixed_layers, probe_layers
from dph.train.stages.labelled import label_indices
from dph.train.stages.preference import Pair, PreferenceStage

TOKENS = 8192  # of a packed batch


def prepare_heads(stage: PreferenceStage, quiet: bool = False) -> None:
    """Choose the layer of new heads if the recipe leaves it open, and fit their standardisation, in place.

    Adds the probes' accuracies to the stage's notes. The stage's position in the data does not change.

    Raises UserError on several ranks, where the model is not on a device yet.
    """
    model, objective = stage.model, stage.recipe.objective
    chooses = objective.layer == "auto" and model.untrained_heads.issuperset(model.head_names)
    figures = [head.standardise for head in model.heads.values() if head.standardise is not None]
    if not chooses and all(standardise.is_fitted for standardise in figures):
        return
    if stage.world.world_size > 1:
        raise UserError(
            "objective.layer, objective.standardised: expected a number and false with several processes, got a choice "
            "by a sample of the pairs: train the head by one process"
        )
    count = min(objective.sample, stage.batches.records.size)
    pairs = stage.first_pairs(count)[:count]
    layers = [*range(model.config.num_hidden_layers), -1] if chooses else model.heads.layers
    states = sample_states(model, pairs, layers, quiet)
    if chooses:
        compared, prompts = compared_states(states, pairs)
        seed = stage.recipe.seed
        accuracies = probe_layers(compared, prompts, seed)
        best, accuracy = best_layer(accuracies)
        layer, mix = layers[best], mixed_layers(model.config.num_hidden_layers)
        figures = ", ".join(f"{number}: {value:.3f}" for number, value in zip(layers, accuracies, strict=True))
        if mix:
            (mixed,) = probe_layers(compared, prompts, seed, [mix])
            figures += f", mix of {mix}: {mixed:.3f}"
            layer = mix if mixed > accuracy else layer
        model.set_reward_layer(layer)
        stage.notes += (
            f"the head judges layer {layer}; linear probes judge right, of {len(compared)} pairs in five folds, by "
            f"layer: {figures}",
        )
    for head in model.heads.values():
        if head.standardise is not None and not head.standardise.is_fitted:
            own = [layers.index(layer) for layer in head.layers]
            head.standardise.fit(states[:, own].flatten(1))


def compared_states(states: Tensor, records: Sequence[Pair]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Return the states [P, 2, N, C] of the better and the worse answer of P labels, and the prompts of these.

    An answer that is labelled alone is compared with the mean of all answers; ``states``: [A, N, C] of the answers.
    """
    better, worse, numbers = label_indices(records)
    padded = torch.cat([states, states.mean(0, keepdim=True)])
    record_prompts = [prompt_of(record) for record in records]
    prompts = [record_prompts[numbers[answer]] for answer in torch.minimum(better, worse).tolist()]
    return torch.stack([padded[better], padded[worse]], 1), prompts


def prompt_of(pair: Pair) -> tuple[int, ...]:
    """Return the tokens before the first answer."""
    chosen = pair[0]
    first = chosen.loss_mask.index(True) if True in chosen.loss_mask else len(chosen)
    return tuple(chosen.tokens[: first + 1])


@torch.no_grad()
def sample_states(model: Model, pairs: Sequence[Pair], layers: list[int], quiet: bool = False) -> Tensor:
    """Return the states [A, N, C] fp32, on the CPU, of the judged tokens of A answers in N layers (JudgedStates)."""
    results = []
    with tqdm(desc="sample", total=len(pairs), unit="pair", dynamic_ncols=True, disable=quiet) as progress:
        for batch in batches(pairs, TOKENS):
            packed = pack(batch).to(model.device)
            select = partial(_rows_on_host, numbers=packed.reward_rows)
            judged = JudgedStates(layers, len(model.backbone.blocks), select)
            model.backbone(packed.tokens, packed.layout, observe=judged, blocks=judged.blocks)
            results.append(judged.joined())
            progress.update(len(batch))
    answers = sum(map(len, pairs))
    return torch.cat(results).view(answers, len(layers), -1)


def _rows_on_host(states: Tensor, numbers: Tensor) -> Tensor:
    return states[numbers].float().cpu()
