"""The model's forms for transformers' Auto classes, and their registration."""

import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dph import chat
from dph.errors import UserError
from dph.model.attached import AttachedConfig, AttachedModel
from dph.model.config import ModelConfig, hub_arguments
from dph.model.heads import JudgedStates
from dph.model.loading import load_tokenizer
from dph.model.model import CAUSAL_NAME, Model
from dph.model.padded_batch import last_positions

log = logging.getLogger(__name__)


class BaseModel(Model):
    """A :class:`Model` whose result is the states that its language-model head multiplies."""

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """Return ``last_hidden_state`` [B, S, E] and the memory, as ``Model.base_model``."""
        return self._read(*args, **kwargs)


class RewardModel(Model):
    """A :class:`Model` whose logits are its rewards, for sequence classification and reward trainers.

    The labels are the heads: ``config.num_labels`` and ``config.id2label`` are set from them. Several heads are
    independent of each other (``problem_type`` "multi_label_classification", unless the configuration has another). A
    model without heads gets one, "default", if it is loaded with ``num_labels=1``. PEFT, which expects heads of another
    name, trains and saves these with ``modules_to_save=["heads"]``.
    """

    _get_name = torch.nn.Module._get_name
    _behind = 1  # most tokens behind the end-of-turn token of a row

    def __init__(self, config: ModelConfig) -> None:
        names = [*config.reward_heads, *config.task_heads]
        if not names and config.num_labels == 1:
            names = config.reward_heads = ["default"]
        if not names:
            raise UserError(
                "reward_heads: expected a model with reward heads (or num_labels=1, for a new one), got one without"
            )
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        if len(names) > 1 and config.problem_type is None:
            config.problem_type = "multi_label_classification"
        super().__init__(config)
        self.loss_type = "ForSequenceClassification"
        self._warned = False  # that no head is trained

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *args: Any, **kwargs: Any) -> "RewardModel":
        """Load a model as :meth:`Model.from_pretrained`; for one of a family, also the end of an answer.

        The chat format of the tokenizer in the same place gives it, unless ``config.im_end_token_id`` has another.
        """
        result = super().from_pretrained(path, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        if model.config.family is not None:
            model._read_chat_format(path, hub_arguments(kwargs))
        return result

    def _read_chat_format(self, path: str | os.PathLike, hub: Mapping[str, Any]) -> None:
        try:
            marks = chat.markup(load_tokenizer(str(path), **hub))
        except UserError:  # no tokenizer, or one without a chat format
            return
        if self.config.im_end_token_id is None and marks.end_of_turn < self.config.vocab_size:
            self.config.im_end_token_id = marks.end_of_turn
        if self.config.im_end_token_id == marks.end_of_turn:
            self._behind = max(1, len(marks.tail) - 1)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """None: this form's result depends on the heads."""
        return []

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Judge a batch.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, output_hidden_states, return_dict,
                output_attentions: as those of :meth:`Model.forward`; a row is one document.
            labels: [B] or [B, K], for transformers' loss of ``config.problem_type`` (by default mean squared error for
                one head, binary cross-entropy for several).
            kwargs: ignored; other libraries pass more.

        Returns:
            ``logits`` [B, K]: the rewards after each row's last end-of-turn token, behind which padding and the tokens
            of the chat format, by default one for a newline, may follow; with ``inputs_embeds`` after the last token
            that is not padding. Also ``loss`` and ``hidden_states``.

        Raises ValueError as :meth:`Model.rewards`.
        """
        self.check_heads(*self.head_names, training=self.training)
        if self.training and not self._warned and not any(p.requires_grad for p in self.heads.parameters()):
            self._warned = True
            log.warning("no reward head is trained: all are frozen (with PEFT, give modules_to_save=['heads'])")
        inputs, padded = self._padded(
            input_ids, attention_mask, position_ids, inputs_embeds, kwargs.get("cu_seq_lens_q"), output_attentions
        )
        padded.check_one_document()
        end = self.config.im_end_token_id
        columns = last_positions(inputs, padded.mask, end, self._behind)
        states = self._states_list(output_hidden_states)
        judged = JudgedStates(self.heads.layers, len(self.backbone.blocks), partial(padded.select, columns=columns))

        def observe(number: int, rows: Tensor) -> None:
            judged(number, rows)
            if states is not None:
                states.append(rows)

        self._hidden(inputs, padded, observe=observe)
        rewards = self.rewards_of(judged.joined())
        logits = torch.stack([rewards[name] for name in self.head_names], dim=1)
        output = SequenceClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=None if states is None else tuple(map(padded.scatter, states)),
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


AutoModel.register(ModelConfig, BaseModel)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ModelConfig.model_type] = CAUSAL_NAME  # for these the Trainer shifts smoothed labels
AutoModelForCausalLM.register(ModelConfig, Model)
AutoModelForCausalLM.register(AttachedConfig, AttachedModel)
AutoModelForSequenceClassification.register(ModelConfig, RewardModel)
