"""The names under which transformers' Auto classes find the model."""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from dph.model.config import ModelConfig, ReleasedConfig
from dph.model.model import Model


class RewardModel(Model):
    """A :class:`Model` that answers with its rewards, for sequence classification and reward trainers."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput:
        """``logits`` [B, K]: the rewards of the last tokens that are no padding, which must be ``<|im_end|>``.

        ``use_cache`` is taken for other libraries' sake and means nothing here. Raises ValueError as
        :meth:`Model.rewards`.
        """
        rewards = self.rewards(input_ids, attention_mask)
        output = SequenceClassifierOutput(logits=torch.stack([rewards[name] for name in self.head_names], dim=1))
        return output if return_dict else output.to_tuple()


for _config in (ModelConfig, ReleasedConfig):
    AutoConfig.register(_config.model_type, _config)
AutoModelForCausalLM.register(ModelConfig, Model)
AutoModelForSequenceClassification.register(ModelConfig, RewardModel)
