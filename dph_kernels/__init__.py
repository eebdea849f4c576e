"""Fused operators of Direct Preference Heads: attention, norm, gate, log-probabilities, rewards, loss, optimizer.

Under ``torch.func`` (``grad``, ``jvp``, ...) and forward-mode differentiation, ``backend="auto"`` computes in PyTorch's
own operations, and a kernel that is requested by name raises. Tensors without memory raise ValueError.
"""

from dph_kernels.laprop import GradientNorm, gradient_norm, laprop
from dph_kernels.layout import PackedLayout, Rotary
from dph_kernels.linear_logprob import linear_logprob
from dph_kernels.preference_loss import preference_loss
from dph_kernels.residual_norm import residual_norm
from dph_kernels.rope_attention import rope_attention
from dph_kernels.swiglu import swiglu
from dph_kernels.swiglu_reward import swiglu_reward

__all__ = [
    "GradientNorm",
    "PackedLayout",
    "Rotary",
    "gradient_norm",
    "laprop",
    "linear_logprob",
    "preference_loss",
    "residual_norm",
    "rope_attention",
    "swiglu",
    "swiglu_reward",
]
