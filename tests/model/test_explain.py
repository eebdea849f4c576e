"""``model.explain()``: the form of each block and the backends that a call of that size uses."""

import torch
from helpers.forced import forced
from helpers.tiny import tiny_model
from torch import nn

from dph.model.backbone import block_form
from dph.model.explain import report_blocks
from dph.train import compile
from dph_kernels import PackedLayout, dispatch

TOKENS = 24
OPERATORS = {"attention": "rope_attention", "norm": "residual_norm", "gate": "swiglu"}


def used_by(model):
    """(operator, backend) as they are called by one forward pass over ``TOKENS`` rows, and the blocks' forms."""
    rows, layout = torch.randn(TOKENS, 16), PackedLayout.documents([TOKENS])
    forms = [block_form(block, rows.requires_grad_(), layout) for block in model.backbone.blocks]
    with forced("cpu") as used:
        rows = rows.detach()
        for block in model.backbone.blocks:
            rows = block(rows, layout)
    return used, forms


def test_one_line_a_block_and_one_a_reason(capsys):
    model = tiny_model(num_hidden_layers=3)
    model.backbone.blocks[1].ffn.fc1.register_forward_hook(lambda *_: None)
    text = model.explain()
    assert capsys.readouterr().out == text + "\n"
    lines = text.splitlines()
    assert [line.split(" (")[0] for line in lines[:3]] == ["block 0: parts", "block 1: parts", "block 2: parts"]
    assert "up to 131072 elements" in lines[0]
    model.explain(tokens=10_000)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines[:3]] == ["block 0: fused", "block 1: parts", "block 2: fused"]
    assert "ffn.fc1 has hooks" in lines[1]
    assert lines[3:] == [
        f"{operator} cpu: {dispatch.choose(name, 'cpu').reason}" for operator, name in OPERATORS.items()
    ]


def test_it_names_the_backends_that_run(monkeypatch):
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)
    model = tiny_model()
    used, _ = used_by(model)
    for report in report_blocks(model.backbone, TOKENS):
        assert {(operator, getattr(report, name).backend) for name, operator in OPERATORS.items()} <= used


def test_few_elements_are_left_to_pytorch(monkeypatch):
    """Those of a LayerNorm, and without a kernel, as in fp64, of the gate."""
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", TOKENS * 16)
    for double, kernel in ((True, "reference"), (False, "cpu")):
        model = tiny_model()
        (report, _) = report_blocks((model.double() if double else model).backbone, TOKENS)
        backends = report.attention.backend, report.norm.backend, report.gate.backend
        assert (report.fused, *backends) == (False, kernel, "PyTorch", kernel)  # the gate has more columns
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", TOKENS * 48)
    assert report_blocks(tiny_model().double().backbone, TOKENS)[0].gate.backend == "PyTorch"
    assert report_blocks(tiny_model().backbone, TOKENS)[0].gate.backend == "cpu"


def test_its_forms_are_those_of_the_call(monkeypatch):
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)
    model = tiny_model(num_hidden_layers=4)
    model.backbone.blocks[0].requires_grad_(False)
    model.backbone.blocks[2].ffn_norm = nn.LayerNorm(16)
    compile.switch_on(model.backbone)
    compile.switch_off(model.backbone)
    model.backbone.blocks[3].after = model.backbone.blocks[3].after
    _, forms = used_by(model)
    reports = report_blocks(model.backbone, TOKENS)
    assert [(r.fused, r.reason) for r in reports] == [form[:2] for form in forms]
    assert [r.fused for r in reports] == [False, True, False, False]
    assert reports[2].norm.backend == "LayerNorm"
    assert reports[3].norm.backend == reports[3].gate.backend == "replaced"


def test_frozen_parts_and_modes(monkeypatch):
    """A block with frozen weights is fused unless its input needs a gradient."""
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)
    model = tiny_model().requires_grad_(False)
    assert [r.fused for r in report_blocks(model.backbone, TOKENS)] == [True, True]
    model.backbone.input_norm.requires_grad_(True)
    assert [r.fused for r in report_blocks(model.backbone, TOKENS)] == [False, False]
    with torch.no_grad():
        assert [r.fused for r in report_blocks(model.backbone, TOKENS)] == [True, True]
    with torch.autocast("cpu", torch.bfloat16):
        report = report_blocks(model.backbone, TOKENS)[0]
    assert (report.reason, report.norm.backend) == ("autocast is active", "PyTorch")
    assert "attention inputs" in report_blocks(model.backbone, TOKENS, "hidden")[0].reason
    report = report_blocks(model.to("meta").backbone, TOKENS)[0]
    assert (report.reason, report.attention.backend) == ("a tensor is on the meta device", "none")
