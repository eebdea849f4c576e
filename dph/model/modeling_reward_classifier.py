"""A language model of a Hugging Face family with a reward head, as a sequence classifier of one label.

Needs torch and transformers only; ``AutoModelForSequenceClassification.from_pretrained(..., trust_remote_code=True)``
opens the folder that holds this file. The logit [B, 1] of a row is the reward at its last end-of-turn token, behind
which padding and other tokens may follow; padding may be on either side.

reward = score . f(h), h being the state of ``layer``, (h - mean) / deviation if ``standardised``; of several layers the
sum of mix_n * h_n, elementwise:

| pooler | f(h) |
|---|---|
| identity | h |
| bert, t5 | tanh(W h + b) |
| swiglu_bert, swiglu_t5 | tanh(W2 (x * silu(g)) + b2), [x, g] = W1 h + b1 |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class RewardConfig(PretrainedConfig):
    """Configuration of the backbone (the fields of its own config.json), and the form of the head.

    ``layer`` is the number of the block whose input is judged, -1 for the result after the last norm, or a list.
    """

    model_type = "reward_classifier"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        pooler: str = "identity",
        layer: int | list[int] = -1,
        standardised: bool = False,
        intermediate_size: int = 1,
        end_of_turn_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone or {}
        self.hidden_size = self.backbone.get("hidden_size")
        self.vocab_size = self.backbone.get("vocab_size")
        self.pooler, self.layer, self.standardised = pooler, layer, standardised
        self.intermediate_size = intermediate_size
        self.end_of_turn_token_id = end_of_turn_token_id
        super().__init__(**kwargs)


class RewardClassifier(PreTrainedModel):
    """Backbone, pooler and reward; blocks that the judged state does not need are left out."""

    config_class = RewardConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def __init__(self, config: RewardConfig) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(AutoConfig.for_model(**config.backbone))
        self.layers = config.layer if isinstance(config.layer, list) else [config.layer]
        if -1 not in self.layers:
            self.model.layers, self.model.norm = self.model.layers[: max(self.layers)], nn.Identity()
        width, inner, count = self.model.config.hidden_size, config.intermediate_size, len(self.layers)
        if config.standardised:
            self.mean = nn.Parameter(torch.zeros(count * width), requires_grad=False)
            self.deviation = nn.Parameter(torch.ones(count * width), requires_grad=False)
        if count > 1:
            self.mix = nn.Parameter(torch.ones(count, width))
        if config.pooler.startswith("swiglu"):
            self.inner = nn.Linear(width, 2 * inner)
        if config.pooler != "identity":
            self.outer = nn.Linear(inner if config.pooler.startswith("swiglu") else width, width)
        self.score = nn.Linear(width, 1, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Judge the rows of ``input_ids`` [B, S].

        Args:
            input_ids: conversations, each with an end-of-turn token after its answer.
            attention_mask: [B, S], 0 for padding; None if there is none.
            position_ids: [B, S]; None to count the tokens that are not padding.
            labels: [B], for transformers' loss of ``config.problem_type`` (mean squared error by default).
            kwargs: ignored; other libraries pass more.

        Raises ValueError for a row without an end-of-turn token.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if position_ids is None:
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        ends = (input_ids == self.config.end_of_turn_token_id) & (mask > 0)
        if not bool(ends.any(1).all()):
            raise ValueError(
                f"input_ids: expected the end-of-turn token {self.config.end_of_turn_token_id} in every row, got none"
            )
        columns = (ends * torch.arange(1, ends.shape[1] + 1, device=ends.device)).argmax(1)
        rows = torch.arange(len(columns), device=columns.device)
        several = len(self.layers) > 1
        result = self.model(
            input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False, output_hidden_states=several
        )
        if several:
            states = torch.cat([result.hidden_states[layer][rows, columns] for layer in self.layers], 1)
        else:
            states = result.last_hidden_state[rows, columns]
        logits = self.score(self.pooled(states)).float()
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def pooled(self, states: Tensor) -> Tensor:
        """Return f(h) [B, C] of the layers' states [B, N C]."""
        if self.config.standardised:
            states = (states - self.mean) / self.deviation
        if len(self.layers) > 1:
            states = (states.unflatten(1, self.mix.shape) * self.mix).sum(1)
        if self.config.pooler == "identity":
            return states
        if self.config.pooler.startswith("swiglu"):
            values, gates = self.inner(states).chunk(2, -1)
            states = values * nn.functional.silu(gates)
        return self.outer(states).tanh()
