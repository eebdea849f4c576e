"""A tiny model that ends its answers now and then, and its tokenizer."""

import math

import torch
from helpers.texts import message, small_tokenizer
from helpers.tiny import tiny_model

TOK = small_tokenizer()
END = TOK.convert_tokens_to_ids("<|im_end|>")
ASKED = [message("user", "hello world")]


def talker(**changes):
    """A tiny model that ends its answers now and then: END's logit is twice as far from zero as another row's."""
    model = tiny_model(
        vocab_size=len(TOK), im_end_token_id=END, pad_token_id=TOK.pad_token_id, eos_token_id=TOK.eos_token_id,
        bos_token_id=TOK.bos_token_id, **changes,
    )  # fmt: skip
    with torch.no_grad():
        model.backbone.embedding.weight[END] *= 2
    return model


def alone(model, item):
    """(log-probability, its mean, reward) of a conversation that is computed by itself."""
    logprobs = model(torch.tensor([item.tokens])).logits[0].log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(item.targets)[:, None]).flatten()
    reward = math.nan
    if item.reward_position is not None:
        ids = torch.tensor([item.tokens[: item.reward_position + 1]])
        reward = model.rewards(ids)["default"].item()
    scored = chosen[torch.tensor(item.score_mask)]
    return chosen[torch.tensor(item.loss_mask)].sum().item(), scored.mean().item(), reward
