"""Fused operators of Direct Preference Heads: attention, log-probabilities, reward, preference loss, optimiser."""

from dph_kernels.layout import PackedLayout, Rotary
from dph_kernels.rope_attention import rope_attention

__all__ = ["PackedLayout", "Rotary", "rope_attention"]
