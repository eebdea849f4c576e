"""Preparation of new reward heads by a sample of the training pairs: their layer, and the figures of their states."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from dph import devices
from dph.data.labels import EncodedAnswers
from dph.data.packing import batches, pack
from dph.errors import UserError
from dph.model.model import Model
from dph.train.layer_choice import best_layer, mixed_layers, probe_layers
from dph.train.precompute.pairs import PairCache
from dph.train.stages.labelled import label_indices
from dph.train.stages.preference import Pair, PreferenceStage

TOKENS = 8192  # of a packed batch


def prepare_heads(stage: PreferenceStage, quiet: bool = False) -> None:
    """Choose the layer of new heads if the recipe leaves it open, and fit their standardisation, in place.

    Adds the probes' accuracies to the stage's notes, and the states of the chosen layers to its cache. The stage's
    position in the data does not change.

    Raises UserError on several ranks, where the model is not on a device yet.
    """
    model, objective = stage.model, stage.recipe.objective
    new = []  # keys of heads whose layer is open
    for key, head in model.heads.items() if objective.layer == "auto" else ():
        if set(head.reward) <= model.untrained_heads.intersection(objective.heads):
            new.append(key)
    unfitted = [head for head in model.heads.values() if head.standardise and not head.standardise.is_fitted]
    if not new and not unfitted:
        return
    if stage.world.world_size > 1:
        raise UserError(
            "objective.layer, objective.standardised: expected a number and false with several processes, got a choice "
            "by a sample of the pairs: train the head by one process"
        )
    count = min(objective.sample, stage.batches.records.size)
    pairs = stage.first_pairs(count)
    # Training may compute in another precision than this; then its cache has other states, and another name.
    cached = stage.frozen.cached and not devices.low_precision(stage.recipe.precision, model.device)
    if new:
        layers = [*range(model.config.num_hidden_layers), -1]
        states = sample_states(model, pairs, layers, quiet=quiet)
        compared, prompts = compared_states(states, pairs)
        layer, note = choose_layer(compared, layers, prompts, stage.recipe.seed)
        model.set_reward_layer(layer, new)
        stage.notes += (note,)
        states = states[:, [layers.index(layer) for layer in model.heads.layers]]
        if cached:
            _cache(stage, pairs).put(pairs, states)
    else:
        states = sample_states(model, pairs, model.heads.layers, _cache(stage, pairs) if cached else None, quiet)
    stage.frozen.flush()  # a run that is resumed would not compute these states again as they were
    layers = model.heads.layers
    for head in unfitted:
        head.standardise.fit(states[:, [layers.index(layer) for layer in head.layers]].flatten(1))


def _cache(stage: PreferenceStage, records: Sequence[Pair]) -> PairCache:
    """Return the cache that steps with such records read; in a mixture, steps of plain pairs alone read another one."""
    labelled = any(isinstance(answers, EncodedAnswers) for answers in records)
    return stage.frozen.answer_cache if labelled else stage.frozen.cache


def choose_layer(
    states: Tensor, layers: Sequence[int], prompts: Sequence[tuple[int, ...]], seed: int
) -> tuple[int | list[int], str]:
    """Return the best layer, or the mix if it is better, and a sentence with the accuracies of all probes.

    Args:
        states: [P, 2, N, C] of P pairs in all ``layers`` of the model, -1 last.
        prompts: P keys; pairs of one prompt are in one fold.
        seed: of the folds.
    """
    accuracies = probe_layers(states, prompts, seed)
    best, accuracy = best_layer(accuracies)
    layer, mix = layers[best], mixed_layers(len(layers) - 1)
    shown = [f"{number}: {value:.3f}" for number, value in zip(layers, accuracies, strict=True)]
    if mix:
        (mixed,) = probe_layers(states, prompts, seed, [mix])
        shown.append(f"mix of {mix}: {mixed:.3f}")
        layer = mix if mixed > accuracy else layer
    return layer, (
        f"the head judges layer {layer}; linear probes judge right, of {len(states)} pairs in five folds, by layer: "
        f"{', '.join(shown)}"
    )


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
def sample_states(
    model: Model, pairs: Sequence[Pair], layers: list[int], cache: PairCache | None = None, quiet: bool = False
) -> Tensor:
    """Return the states [A, N, C] fp32, on the CPU, of the judged tokens of A answers in N layers (JudgedStates).

    With a ``cache`` of these layers, what it holds is read, and the rest is added.
    """
    results = []
    with tqdm(desc="sample", total=len(pairs), unit="pair", dynamic_ncols=True, disable=quiet) as progress:
        for batch in batches(pairs, TOKENS):
            compute = partial(_states_on_host, model, batch, layers)
            results.append((compute() if cache is None else cache.rows(batch, compute)).flatten())
            progress.update(len(batch))
    answers = sum(map(len, pairs))
    return torch.cat(results).view(answers, len(layers), -1)


def _states_on_host(model: Model, pairs: Sequence[Pair], layers: list[int]) -> Tensor:
    return model.reward_states(pack(pairs).to(model.device), layers).float().cpu()
