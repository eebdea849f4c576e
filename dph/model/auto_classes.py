"""Registration of the model with transformers' Auto classes."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from dph.model.config import ModelConfig
from dph.model.model import Model


class RewardModel(Model):
    """A :class:`Model` whose logits are its rewards, for sequence classification and reward trainers."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput:
        """Return ``logits`` [B, K]: the rewards of the last tokens that are not padding, which must be ``<|im_end|>``.

        ``use_cache`` is ignored; other libraries pass it. Raises ValueError as :meth:`Model.rewards`.
        """
        rewards = self.rewards(input_ids, attention_mask)
        output = SequenceClassifierOutput(logits=torch.stack([rewards[name] for name in self.head_names], dim=1))
        return output if return_dict else output.to_tuple()


AutoModelForCausalLM.register(ModelConfig, Model)
AutoModelForSequenceClassification.register(ModelConfig, RewardModel)
