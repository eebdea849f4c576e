"""Reward head: a pooler and one or more reward vectors on the hidden state of the last ``<|im_end|>``."""

import torch
from torch import Tensor, nn

from dph_kernels import swiglu_reward


class RewardHead(nn.Module):
    """reward = w_r . dropout(f(h)) for K named reward vectors over one pooler f (arXiv 2405.20053).

    | pooler | f(h) |
    |---|---|
    | identity | h |
    | bert | tanh(W h + b) |
    | swiglu_bert | tanh(W2 (x * silu(g)) + b2), [x, g] = W1 h + b1 |
    | t5, swiglu_t5 | as bert, swiglu_bert, with dropout on h too |

    The pooler's modules have the indices of the released layout's pipeline, so ``nn.Identity`` stands for dropout (the
    first module of the t5 kinds) and for the gate.

    Args:
        names: K names of the reward vectors.
        pooler: one of ``dph.model.config.POOLERS``.
        hidden_size: C.
        intermediate_size: F, for the SwiGLU poolers.
        dropout: probability in [0, 1), in training only.
    """

    def __init__(
        self, names: list[str], pooler: str, hidden_size: int, intermediate_size: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.input_dropout = dropout if pooler.endswith("t5") else 0.0
        layers: list[nn.Module] = [nn.Identity()] if pooler.endswith("t5") else []
        if pooler.startswith("swiglu"):
            layers += [nn.Linear(hidden_size, 2 * intermediate_size), nn.Identity()]
            layers += [nn.Linear(intermediate_size, hidden_size)]
        elif pooler != "identity":
            layers += [nn.Linear(hidden_size, hidden_size)]
        self.pooler = nn.Sequential(*layers)
        self.reward = nn.ModuleDict({name: nn.Linear(hidden_size, 1, bias=False) for name in names})

    def forward(self, hidden: Tensor, seed: int | None = None, row_ids: Tensor | None = None) -> dict[str, Tensor]:
        """Rewards {name: [R]} in fp32 of ``hidden`` [R, C].

        Args:
            hidden: states after the output norm, one row per judged answer.
            seed: seed of the dropout; drawn from torch's generator if None. Unused in evaluation.
            row_ids: [R] int64 keys of the rows' dropout masks, so that a row's mask does not depend on its batch.
        """
        linears, vectors = [], []
        for layer in self.pooler:
            if isinstance(layer, nn.Linear):
                linears.append(layer)
        for vector in self.reward.values():
            vectors.append(vector.weight)
        *gated, last = linears or [None]
        weights: dict[str, Tensor] = {}
        if gated:
            weights |= {"w1": gated[0].weight, "b1": gated[0].bias}
        if last is not None:
            weights |= {"w2": last.weight, "b2": last.bias}
        dropping = self.training and self.dropout > 0
        if dropping and seed is None:
            seed = int(torch.randint(2**31, ()))
        rewards = swiglu_reward(
            hidden,
            torch.cat(vectors),
            **weights,
            dropout=self.dropout if dropping else 0.0,
            input_dropout=self.input_dropout if dropping else 0.0,
            seed=seed or 0,
            row_ids=row_ids,
        )
        return dict(zip(self.reward, rewards.unbind(1), strict=True))
