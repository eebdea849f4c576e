"""Models on disk and a conversation for tests of the command line."""

import torch

import dph
from dph.data import tokenizer

CORPUS = ["positive or negative? a gripping film is watchable, the film is not"] * 2
SIZES = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
USER, ANSWER = {"role": "user", "content": "a film?"}, {"role": "assistant", "content": "is gripping"}
ASKED = ["--prompt", USER["content"], "-n", 6, "--max-new-tokens", 5, "--seed", 3]


def save_models(folder):
    """Three directories in ``folder``: judge has heads, mute has none, and fresh lacks the weights of its head."""
    tok = tokenizer.from_iterator(CORPUS, 280)
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "im_end_token_id": 3, "num_attention_heads": 2}
    for name, heads in (("judge", ["default", "short"]), ("mute", [])):
        model = dph.Model(dph.ModelConfig(vocab_size=len(tok), reward_heads=heads, **SIZES, **ids))
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        tok.save_pretrained(folder / name)
    model.config.reward_heads = ["default"]
    model.save_pretrained(folder / "fresh")
    tok.save_pretrained(folder / "fresh")
    return folder
