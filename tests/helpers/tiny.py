"""A tiny model with weights large enough to matter, and its definition in fp64, token by token."""

import torch

import dph

PAD, END, VOCAB = 1, 3, 61


# Changes that give the tiny model the form of a family (dph.model.families).
_NO_BIAS = dict.fromkeys(("qkv_bias", "out_bias", "ffn_bias"), False)
_FAMILY = {"norm": "rms", "embedding_projection": False, "embedding_size": 16, "rope_reversed": False, **_NO_BIAS}
FORMS = {
    "llama": {**_FAMILY, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "qwen2": {**_FAMILY, "qkv_bias": True, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {**_FAMILY, "qk_norm": True, "head_dim": 6, "num_key_value_heads": 1},
}


def tiny_config(**changes):
    sizes = {
        "vocab_size": VOCAB, "embedding_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "im_end_token_id": END, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": PAD,
    }  # fmt: skip
    return dph.ModelConfig(**(sizes | changes))


def tiny_model(seed=0, **changes):
    """A model in evaluation mode. Fresh weights (std 0.02) would leave all tokens' states nearly equal."""
    model = dph.Model(tiny_config(**changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 + ("norm.weight" in name))
    return model


def tokens(*shape, seed=0):
    """Random ids of ordinary tokens."""
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def padded(*rows):
    """Rows of ids as [B, S] with their mask; a row is (padding on the left, ids, padding on the right)."""
    ids = torch.tensor([[PAD] * left + list(row) + [PAD] * right for left, row, right in rows])
    mask = torch.tensor([[0] * left + [1] * len(row) + [0] * right for left, row, right in rows])
    return ids, mask


def norm(x, weights, name):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name + ".weight"] + weights[name + ".bias"]


def rotated(x, positions, config):
    """[n, H, D] rotated by position * base^(-2i/D), as complex numbers; by the negative if positions are reversed."""
    half = x.shape[-1] // 2
    frequencies = config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, None, None] * frequencies * (-1 if config.rope_reversed else 1)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def naive(model, ids, memory=None, length=0, kind="kv"):
    """Hidden states [S, C] in fp64 of one sequence [S] by the definition: no layout, no cache, plain loops.

    ``memory`` is the second result of the last call: per layer the keys and values before rotation (kind "kv") or the
    inputs of attention (kind "hidden") of the last ``length`` tokens.

    Returns the states and the new memory.
    """
    config = model.config
    weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    x = weights["backbone.embedding.weight"][ids] @ weights["backbone.input_proj.weight"].T
    x = norm(x, weights, "backbone.input_norm")
    remembered = []
    for i in range(config.num_hidden_layers):
        at = f"backbone.blocks.{i}."
        inputs = norm(x, weights, at + "attention_norm")
        old = memory[i] if memory else tuple(inputs[:0] for _ in range(1 if kind == "hidden" else 2))

        def project(rows, part, at=at):
            weight = weights[at + "attention.qkv.weight"].chunk(3)[part]
            return rows @ weight.T + weights[at + "attention.qkv.bias"].chunk(3)[part]

        if kind == "hidden":
            all_inputs = torch.cat([old[0], inputs])
            keys, values, kept = project(all_inputs, 1), project(all_inputs, 2), (all_inputs,)
        else:
            keys, values = torch.cat([old[0], project(inputs, 1)]), torch.cat([old[1], project(inputs, 2)])
            kept = (keys, values)
        remembered.append(tuple(rows[max(len(rows) - length, 0) :] for rows in kept))
        x = x + attend(project(inputs, 0), keys, values, config) @ weights[at + "attention.out.weight"].T
        x = x + weights[at + "attention.out.bias"]
        gated = norm(x, weights, at + "ffn_norm") @ weights[at + "ffn.fc1.weight"].T + weights[at + "ffn.fc1.bias"]
        value, gate = gated.chunk(2, -1)
        x = x + value * gate / (1 + (-gate).exp()) @ weights[at + "ffn.fc2.weight"].T + weights[at + "ffn.fc2.bias"]
    return norm(x, weights, "backbone.output_norm"), remembered


def attend(queries, keys, values, config):
    """[S, C]: query i attends to all older keys and to the own ones up to i."""
    heads, older = config.num_attention_heads, len(keys) - len(queries)
    q, k, v = (t.reshape(len(t), heads, -1) for t in (queries, keys, values))
    positions = torch.arange(len(keys))
    q, k = rotated(q, positions[older:], config), rotated(k, positions, config)
    rows = []
    for i in range(len(q)):
        scores = torch.einsum("hd,khd->hk", q[i], k[: older + i + 1]) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[: older + i + 1]).flatten())
    return torch.stack(rows) if rows else queries


def naive_logits(model, hidden):
    """[S, V]."""
    down = hidden @ model.output_proj.weight.detach().double().T
    return down @ model.backbone.embedding.weight.detach().double().T
