"""Choice of the layers whose states a reward head judges, by linear probes on a sample of training pairs.

Middle layers often hold more of what a head has to find than the last one, whose states serve the next token, and
several layers more than one (linear probes on truthfulqa_human pairs, frozen SmolLM2-135M, two folds by prompt: 0.823
on layer 20 of 30, 0.808 on the last, 0.835 on ``mixed_layers``).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dph.data.sampler import draw
from dph.model.heads import deviations

FOLDS = 5
DECAYS = (0.03, 0.1, 0.3, 1.0)  # of the probes, relative to the mean loss
STEPS = 60  # of L-BFGS
MIXED = (6, 8, 10, 12, 14)  # depths of the layers of a mix, in fifteenths: the last blocks need not be computed


def mixed_layers(blocks: int) -> list[int]:
    """Return the layers of the mix that a model of ``blocks`` blocks is offered; [] for a single block."""
    layers = list(dict.fromkeys(blocks * depth // 15 for depth in MIXED))
    return layers if len(layers) > 1 else []


def probe_layers(
    states: Tensor, prompts: Sequence[object], seed: int = 0, chosen: Sequence[Sequence[int]] | None = None
) -> list[float]:
    """Return the accuracy of a linear probe on each of N layers, or on each choice of layers.

    A probe is a logistic regression on the difference of the standardised states of chosen and rejected answers. It
    judges pairs whose prompts it was not fitted to (``FOLDS`` folds); of several decays the best counts.

    Args:
        states: [P, 2, N, C] of the chosen and the rejected answers of P pairs.
        prompts: P keys; pairs of one prompt are in one fold.
        seed: of the folds.
        chosen: indices of the layers that a probe reads together; None for each layer alone.
    """
    folds = torch.tensor([draw(FOLDS, seed, repr(prompt)) for prompt in prompts])
    accuracies = []
    for layers in [[layer] for layer in range(states.shape[2])] if chosen is None else chosen:
        own = states[:, :, layers].flatten(2)
        difference = (own[:, 0].double() - own[:, 1].double()) / deviations(own.flatten(0, 1))
        accuracies.append(max(_cross_validated(difference, folds, decay) for decay in DECAYS))
    return accuracies


def best_layer(accuracies: Sequence[float]) -> tuple[int, float]:
    """Return the index of the best layer, and its accuracy: its mean with its neighbours, as single ones are noisy.

    Of equals it is the last.
    """
    best, best_mean = 0, float("-inf")
    for layer in range(len(accuracies)):
        neighbours = accuracies[max(layer - 1, 0) : layer + 2]
        mean = sum(neighbours) / len(neighbours)
        if mean >= best_mean - 1e-9:
            best, best_mean = layer, mean
    return best, best_mean


def _cross_validated(difference: Tensor, folds: Tensor, decay: float) -> float:
    """Return the share of pairs that probes judge right which were fitted to the other folds; a tie is half right."""
    right = 0.0
    for fold in range(FOLDS):
        held_out = folds == fold
        margins = difference[held_out] @ fit_probe(difference[~held_out], decay)
        right += float((margins > 0).sum()) + 0.5 * float((margins == 0).sum())
    return right / max(len(difference), 1)


def fit_probe(difference: Tensor, decay: float) -> Tensor:
    """Return the weights [C] that minimise mean log(1 + exp(-d w)) + decay |w|^2 / 2 over the rows d of [P, C] fp64."""
    weights = torch.zeros(difference.shape[1], dtype=difference.dtype, requires_grad=True)
    if not len(difference):
        return weights.detach()
    optimiser = torch.optim.LBFGS([weights], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.softplus(-difference @ weights).mean() + decay / 2 * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return weights.detach()
