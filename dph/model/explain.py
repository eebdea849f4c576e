"""Report of the form of each block and the backends of its operators (``Model.explain``)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dph.model.backbone import NORMS, Attention, Backbone, Block, FeedForward, block_form
from dph_kernels import checks, dispatch
from dph_kernels.dispatch import Choice
from dph_kernels.layout import PackedLayout
from dph_kernels.residual_norm import WIDEST


class BlockReport(NamedTuple):
    """The form of one block and the backends of its operators, each with the reason."""

    fused: bool
    reason: str
    attention: Choice
    norm: Choice
    gate: Choice


def report_blocks(backbone: Backbone, tokens: int, memory_kind: str | None = None) -> list[BlockReport]:
    """Return a report per block for a call with ``tokens`` rows in the current modes (grad, autocast, transforms)."""
    weight = backbone.output_norm.weight
    x = weight.detach().new_empty(tokens, len(weight))
    layout = PackedLayout.documents([tokens]).to(x.device)
    before_block = [backbone.embedding, backbone.input_proj, backbone.input_norm]
    reports = []
    for block in backbone.blocks:
        trained = any(p.requires_grad for module in before_block for p in module.parameters())
        x.requires_grad_(trained and torch.is_grad_enabled())
        fused, reason, *_ = block_form(block, x, layout, memory_kind)
        attention = _choose("rope_attention", x, {block.attention: Attention})
        kind = NORMS[getattr(block.attention_norm, "kind", "layer")]
        norm = _choose("residual_norm", x, {block.attention_norm: kind, block.ffn_norm: kind})
        gate = _choose("swiglu", x, {block.ffn: FeedForward})
        if not fused:
            norm, gate = _in_parts(block, x, norm, gate)
        reports.append(BlockReport(fused, reason, attention, norm, gate))
        before_block.append(block)
    return reports


def _choose(operator: str, x: Tensor, modules: dict[nn.Module, type[nn.Module]]) -> Choice:
    """The backend for tensors of the device and dtype of ``x`` (or autocast's), if the modules are of these classes."""
    for module, kind in modules.items():
        if not isinstance(module, kind):
            return Choice(type(module).__name__, f"the module is not a {kind.__module__}.{kind.__name__}")
    device, dtype = x.device.type, x.dtype
    if checks.autocast_active(x) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    try:
        return dispatch.choose(operator, device, "auto", dtype)
    except ValueError as error:  # neither CPU nor GPU
        return Choice("none", str(error))


def _in_parts(block: Block, x: Tensor, norm: Choice, gate: Choice) -> tuple[Choice, Choice]:
    """The backends of norm and gate outside of the fused form, which may be plain PyTorch."""
    if {"before", "after"} & vars(block).keys():
        replaced = Choice("replaced", "computed by the method in place of before or after")
        return replaced, replaced
    few = Choice("PyTorch", f"its operations are as fast for up to {dispatch.SMALL_ELEMENTS} elements")
    norms = tuple(NORMS.values())
    if isinstance(block.attention_norm, norms) and isinstance(block.ffn_norm, norms):
        if checks.autocast_active(x):
            norm = Choice("PyTorch", "under autocast its rules decide the dtypes")
        elif dispatch.prefer_pytorch("residual_norm", x, "auto", everywhere=block.ffn_norm.kind == "layer"):
            norm = few
        elif x.shape[1] > WIDEST:
            norm = Choice("PyTorch", f"rows have more than {WIDEST} elements")
    if isinstance(block.ffn, FeedForward):
        projected = x.new_empty(1, 1).expand(len(x), 2 * block.ffn.fc2.weight.shape[1])
        gate = few if dispatch.prefer_pytorch("swiglu", projected, "auto") else gate
    return norm, gate


def as_text(reports: list[BlockReport]) -> str:
    """One line per block, then one line with the reason for each backend."""
    lines, reasons = [], {}
    for number, report in enumerate(reports):
        backends = []
        for operator in ("attention", "norm", "gate"):
            choice = getattr(report, operator)
            backends.append(f"{operator} {choice.backend}")
            reasons.setdefault(f"{backends[-1]}: {choice.reason}")
        form = "fused" if report.fused else "parts"
        lines.append(f"block {number}: {form} ({report.reason}); {', '.join(backends)}")
    return "\n".join([*lines, *reasons])
