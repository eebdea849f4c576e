"""Reward head: a pooler and one or more reward vectors on the hidden state of the last end-of-turn token."""

import copy
from collections.abc import Callable, ItemsView, Iterator, ValuesView
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from dph_kernels import dispatch, philox, swiglu, swiglu_reward


class SwiGLU(nn.Module):
    """[x | gate] to x * silu(gate)."""

    def forward(self, projected: Tensor) -> Tensor:
        """[R, 2F] -> [R, F]."""
        return swiglu(projected)


class Standardise(nn.Module):
    """(h - mean) / deviation, by figures of the training answers' states; (0, 1) until they are set."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.deviation = nn.Parameter(torch.ones(width), requires_grad=False)

    @torch.no_grad()
    def fit(self, states: Tensor) -> None:
        """Set the figures from states [R, C], of at least two different rows; a constant column keeps its scale."""
        exact = states.double()
        self.mean.copy_(exact.mean(0))
        deviation = exact.std(0)
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1.0))

    @property
    def is_fitted(self) -> bool:
        """Whether the figures have been set."""
        return bool(self.mean.any()) or bool((self.deviation != 1).any())

    def forward(self, states: Tensor) -> Tensor:
        """[R, C] -> [R, C]."""
        return (states - self.mean) / self.deviation


class Mix(nn.Module):
    """Learnt mix of N layers: sum of weight_n * h_n, elementwise; it begins as sum of h_n / sqrt(N)."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights with which the mix of uncorrelated states has their scale."""
        nn.init.constant_(self.weight, len(self.weight) ** -0.5)

    def forward(self, states: Tensor) -> Tensor:
        """[R, N C] -> [R, C]."""
        return (states.unflatten(1, self.weight.shape) * self.weight).sum(1)


class RewardHead(nn.Module):
    """reward = w_r . dropout(f(h)) for K named reward vectors over one pooler f (arXiv 2405.20053).

    | pooler | f(h) |
    |---|---|
    | identity | h |
    | bert | tanh(W h + b) |
    | swiglu_bert | tanh(W2 (x * silu(g)) + b2), [x, g] = W1 h + b1 |
    | t5, swiglu_t5 | as bert, swiglu_bert, with dropout on h too |

    One kernel computes all of it, unless a module was replaced or has hooks (adapters, quantised or offloaded weights):
    then each is called. The dropout masks are the same, unless dropout itself was replaced or has hooks: then it draws
    its own. The pooler's modules have the indices of the released layout's pipeline.

    Args:
        names: K names of the reward vectors.
        pooler: one of ``dph.model.config.POOLERS``.
        hidden_size: C.
        intermediate_size: F, for the SwiGLU poolers.
        dropout: probability in [0, 1), in training only.
        layer: number of the block whose input is judged; -1 for the states after the output norm (the paper's). A list
            of them: h is a learnt mix of these layers (:class:`Mix`).
        standardised: standardise the states before the pooler, and before they are mixed.
        members: M vectors of each name, an ensemble: their mean is the reward. They share the pooler and its dropout
            mask, and differ by their fresh weights and by the pairs that training shows to each
            (``dph.train.stages.preference``).
    """

    def __init__(
        self,
        names: list[str],
        pooler: str,
        hidden_size: int,
        intermediate_size: int,
        dropout: float = 0.0,
        *,
        layer: int | list[int] = -1,
        standardised: bool = False,
        members: int = 1,
    ) -> None:
        super().__init__()
        self.hidden_size, self.standardised, self.members = hidden_size, standardised, members
        self.set_layer(layer)
        layers: list[nn.Module] = [nn.Dropout(dropout)] if pooler.endswith("t5") else []
        if pooler.startswith("swiglu"):
            layers += [nn.Linear(hidden_size, 2 * intermediate_size), SwiGLU()]
            layers += [nn.Linear(intermediate_size, hidden_size), nn.Tanh()]
        elif pooler != "identity":
            layers += [nn.Linear(hidden_size, hidden_size), nn.Tanh()]
        self.pooler = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.reward = nn.ModuleDict({name: nn.Linear(hidden_size, members, bias=False) for name in names})
        self._kinds = tuple(map(type, (self.pooler, *layers, self.dropout)))

    def set_layer(self, layer: int | list[int]) -> None:
        """Judge ``layer``, or a fresh mix of layers, of states whose figures are not known yet."""
        self.layers = (layer,) if isinstance(layer, int) else tuple(layer)
        count, width = len(self.layers), self.hidden_size
        self.standardise = Standardise(count * width) if self.standardised else None
        self.mix = Mix(count, width) if count > 1 else None

    def shared_weights(self) -> list[str]:
        """Return the names of the trained weights that the reward vectors share: those of mix and pooler."""
        return [name for name, _ in self.named_parameters() if name.startswith(("mix.", "pooler."))]

    def forward(
        self,
        hidden: Tensor,
        seed: int | None = None,
        row_ids: Tensor | None = None,
        dropout: bool = True,
        each: bool = False,
    ) -> dict[str, Tensor]:
        """Rewards {name: [R]} in fp32 of ``hidden`` [R, N C].

        Args:
            hidden: states of the N ``layers`` side by side, one row per judged answer.
            seed: seed of the dropout; drawn from torch's generator if None. Unused in evaluation.
            row_ids: [R] int64 keys of the rows' dropout masks, so that a row's mask does not depend on its batch.
            dropout: False switches the head's dropout off in training, too, and leaves ``training`` as it is, which
                other threads may read.
            each: return the rewards [R, M] of an ensemble's members in place of their mean.
        """
        if dropout and seed is None and any(_probability(module) for module in self.modules()):
            seed = int(torch.randint(2**31, ()))
        if self.standardise is not None:
            hidden = self.standardise(hidden)
        if self.mix is not None:
            hidden = self.mix(hidden)
        if self._is_modified():
            rewards = self._in_parts(hidden, seed, row_ids, dropout)
        else:
            rewards = self._fused(hidden, seed or 0, row_ids, dropout)
        return rewards if each else split_members(rewards)[0]

    def _is_modified(self) -> bool:
        """Whether a module is not the original, or observed by hooks."""
        modules = self.pooler, *self.pooler, self.dropout, *self.reward.values()
        kinds = *self._kinds, *[nn.Linear] * len(self.reward)
        return len(modules) != len(kinds) or any(map(dispatch.is_modified, modules, kinds))

    def _in_parts(self, states: Tensor, seed: int | None, row_ids: Tensor | None, dropout: bool) -> dict[str, Tensor]:
        """Rewards as of ``_fused``, by a call of each module."""
        if row_ids is None:
            row_ids = torch.arange(len(states), device=states.device)
        for layer in self.pooler:
            states = _drop(layer, states, seed, row_ids, philox.INPUT, dropout)
        states = _drop(self.dropout, states, seed, row_ids, philox.POOLED, dropout)
        return {name: vector(states).squeeze(1).float() for name, vector in self.reward.items()}

    def _fused(self, hidden: Tensor, seed: int, row_ids: Tensor | None, dropout: bool) -> dict[str, Tensor]:
        """Rewards {name: [R]}, or [R, M] of an ensemble, by one operator."""
        linears = [layer for layer in self.pooler if isinstance(layer, nn.Linear)]
        weights: dict[str, Tensor] = {}
        if len(linears) == 2:
            weights |= {"w1": linears[0].weight, "b1": linears[0].bias}
        if linears:
            weights |= {"w2": linears[-1].weight, "b2": linears[-1].bias}
        rewards = swiglu_reward(
            hidden,
            torch.cat([vector.weight for vector in self.reward.values()]),
            **weights,
            dropout=_probability(self.dropout) if dropout else 0.0,
            input_dropout=_probability(self.pooler[0]) if dropout and self.pooler else 0.0,
            seed=seed,
            row_ids=row_ids,
        )
        if self.members > 1:
            rewards = rewards.view(len(hidden), len(self.reward), self.members)
        return dict(zip(self.reward, rewards.unbind(1), strict=True))


class RewardHeads(nn.Module):
    """The reward heads of a model by the names of their groups, with the interface of ``torch.nn.ModuleDict``.

    It is called as a whole, so that libraries can replace it as a whole (``modules_to_save=["heads"]`` in PEFT). Within
    such a library's wrapper, or alone, its weights are named ``GROUP.reward=NAME.weight`` in place of
    ``GROUP.reward.NAME.weight``: PEFT deletes its adapter's name from the path, which may be a head's name as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_rename_wrapped)
        self.register_load_state_dict_pre_hook(_rename_back)

    def __getitem__(self, name: str) -> RewardHead:
        """Return the heads of a group."""
        return self._modules[name]

    def __setitem__(self, name: str, head: RewardHead) -> None:
        """Add or replace the heads of a group."""
        self.add_module(name, head)

    def __contains__(self, name: object) -> bool:
        """Whether there is a group of this name."""
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the groups."""
        return iter(self._modules)

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self._modules)

    def values(self) -> ValuesView[RewardHead]:
        """Return the groups' heads."""
        return self._modules.values()

    def items(self) -> ItemsView[str, RewardHead]:
        """Return the groups' names and heads."""
        return self._modules.items()

    def clear(self) -> None:
        """Remove all groups."""
        self._modules.clear()

    @property
    def layers(self) -> list[int]:
        """Layers whose states the heads judge, in the order in which ``forward`` takes them; -1 comes last."""
        layers = sorted(set().union(*map(attrgetter("layers"), self.values())))
        return [*layers[1:], -1] if layers[:1] in ([], [-1]) else layers

    def forward(
        self,
        hidden: Tensor,
        seed: int | None = None,
        row_ids: Tensor | None = None,
        dropout: bool = True,
        each: bool = False,
    ) -> dict[str, Tensor]:
        """Rewards {name: [R]} in fp32 by all heads.

        Args:
            hidden: [R, N C], the states of the N ``layers`` side by side.
            seed, row_ids, dropout, each: as those of :class:`RewardHead`.
        """
        layers, rewards = self.layers, {}
        states = dict(zip(layers, hidden.chunk(len(layers), 1), strict=True))
        for head in self.values():
            own = list(map(states.__getitem__, head.layers))
            rewards |= head(torch.cat(own, 1) if len(own) > 1 else own[0], seed, row_ids, dropout, each)
        return rewards


def split_members(rewards: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the rewards [R] of heads, and of ensembles alone those of the members [R, M], whose mean is the reward.

    ``rewards``: of a call with ``each``.
    """
    means, members = dict(rewards), {}
    for name, values in rewards.items():
        if values.dim() == 2:
            means[name], members[name] = values.mean(1), values
    return means, members


class JudgedStates:
    """Observer of a backbone that keeps the states which a model's heads judge.

    Args:
        layers: numbers of blocks whose input is judged, rising; -1 at the end for the result (``RewardHeads.layers``).
        blocks: number of blocks of its backbone.
        select: of the states [T, C] of all rows those of A judged tokens [A, C].

    Attributes:
        blocks: number of blocks that have to be computed; None for all, and the output norm.
    """

    def __init__(self, layers: list[int], blocks: int, select: Callable[[Tensor], Tensor]) -> None:
        self.layers, self.select, self._all = layers, select, blocks
        self.blocks = None if self.layers[-1] == -1 else self.layers[-1]
        self._states: dict[int, Tensor] = {}

    def __call__(self, number: int, states: Tensor) -> None:
        """Keep the input of block ``number``, or the backbone's result, if a head judges it."""
        layer = -1 if number == self._all else number
        if layer in self.layers:
            self._states[layer] = self.select(states)

    def joined(self) -> Tensor:
        """Return the states [A, N C] of the N layers side by side, as ``RewardHeads`` takes them."""
        if len(self.layers) == 1:
            return self._states[self.layers[0]]
        return torch.cat([self._states[layer] for layer in self.layers], 1)


def _rename_wrapped(heads: RewardHeads, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Rename the reward vectors in a state, unless the heads are a model's own."""
    if prefix != "heads." and not prefix.endswith(".heads."):
        for name, renamed in _renamed(heads, prefix).items():
            if name in state:
                state[renamed] = state.pop(name)


def _rename_back(heads: RewardHeads, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Undo ``_rename_wrapped`` before a state is loaded."""
    for name, renamed in _renamed(heads, prefix).items():
        if renamed in state:
            state[name] = state.pop(renamed)


def _renamed(heads: RewardHeads, prefix: str) -> dict[str, str]:
    """Return the other name of each weight of a reward vector."""
    names = {}
    for group in heads:
        start = f"{prefix}{group}.reward"
        for name, _ in heads[group].reward.named_parameters():
            names[f"{start}.{name}"] = f"{start}={name}"
    return names


def _probability(module: nn.Module) -> float:
    """Return the probability with which a module drops elements now."""
    return module.p if isinstance(module, nn.Dropout) and module.training else 0.0


def _drop(module: nn.Module, states: Tensor, seed: int | None, row_ids: Tensor, stream: int, dropout: bool) -> Tensor:
    """Return ``module(states)``; of unmodified dropout with the operator's mask."""
    probability = _probability(module)
    if probability and not dropout:
        module, probability = copy.copy(module).eval(), 0.0  # the copy has the hooks, and a mode of its own
    if not probability or dispatch.modification(module, nn.Dropout):
        return module(states)
    return states * philox.dropout_mask(row_ids, states.shape[1], probability, seed, stream, states.dtype)
