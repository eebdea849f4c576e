"""Private names of PyTorch: each is there, and a version without one is reported by name."""

from pathlib import Path

import pytest
import torch

from dph_kernels import torch_private

PACKAGE = Path(torch_private.__file__).parent
USES = ("torch._C", "_RecordFunctionFast", "_current_level", "_profiler_enabled", "_python_dispatch", "mkldnn._")
FIXED = (
    "torch.Tensor._is_zerotensor",
    "torch._C._FunctionBase.apply",
    "torch._C.DispatchKey.AutogradFunctionality",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported",
    "torch.ops.mkldnn._linear_pointwise",
)
"""Attributes of types in C++ and of torch.ops, which cannot be removed for a test."""


@pytest.mark.parametrize("name", torch_private.NAMES)
def test_this_pytorch_has_every_private_name(name):
    assert torch_private.missing([name]) == [], f"PyTorch {torch.__version__} lacks {name}: {torch_private.NAMES[name]}"


def test_no_private_name_is_used_elsewhere():
    """The package reads them from one module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "torch_private.py":
            continue
        text = path.read_text(encoding="utf-8")
        for private in USES:
            assert private not in text, f"{path.relative_to(PACKAGE)}: {private}"


@pytest.mark.parametrize("name", [name for name in torch_private.NAMES if name not in FIXED])
def test_a_name_that_is_gone_is_reported(name, monkeypatch):
    """By ``missing``, and by the call that needs it."""
    owner, _, attribute = name.rpartition(".")
    monkeypatch.delattr(torch_private.find(owner), attribute)
    assert torch_private.missing() == [name]
    with pytest.raises(RuntimeError, match=rf"PyTorch .* lacks {name}.*tested: 2"):
        torch_private.function(name)()


def test_names_that_never_were():
    names = ["torch._C._no_such_name", "torch.no_such_module.name"]
    assert torch_private.missing([*names, "torch.Tensor"]) == names
