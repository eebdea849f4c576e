"""How near is near enough, and over which backends a test runs.

A tolerance is earned: the error against fp64 may be at most twice that of plain PyTorch in the same precision, plus a
floor per dtype (the rule of flash-attention's tests).
"""

import pytest
import torch
from torch import Tensor

from dph_kernels import dispatch

FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative to the largest value of the fp64 result: about one step of half precision, eight of single."""


def assert_close_to_fp64(
    got: Tensor,
    same_precision: Tensor,
    fp64: Tensor,
    name: str = "result",
    *,
    factor: float = 2.0,
    floor: float | None = None,
) -> None:
    """Require |got - fp64| <= factor * |same_precision - fp64| + floor * |fp64|, each as the maximum over elements.

    ``same_precision`` is what plain eager PyTorch gives on the same inputs, ``fp64`` the same computed in fp64 from the
    same (rounded) inputs. NaN and infinities must be where fp64 has them. ``floor`` defaults to FLOOR[got.dtype].
    """
    assert fp64.dtype == torch.float64, f"{name}: expected the truth in float64, got {fp64.dtype}"
    assert got.shape == fp64.shape, f"{name}: shape {list(got.shape)}, expected {list(fp64.shape)}"
    got64, same64, truth = (x.detach().cpu().double() for x in (got, same_precision, fp64))
    finite = truth.isfinite()
    assert torch.equal(got64.isnan(), truth.isnan()), f"{name}: NaN in other places than in fp64"
    assert torch.equal(got64[truth.isinf()], truth[truth.isinf()]), f"{name}: other infinities than in fp64"
    if not finite.any():
        return
    error = (got64[finite] - truth[finite]).abs().max().item()
    earned, allowed = tolerance(same64, truth, factor, FLOOR[got.dtype] if floor is None else floor)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} (plain PyTorch has {earned:.3e})"


def tolerance(same_precision: Tensor, fp64: Tensor, factor: float, floor: float) -> tuple[float, float]:
    """Return the error of plain PyTorch in the same precision, and the error that it allows."""
    finite = fp64.isfinite()
    if not finite.any():
        return 0.0, 0.0
    truth = fp64[finite]
    earned = (same_precision.double()[finite] - truth).abs().max().nan_to_num(0, 0).item()
    return earned, factor * earned + floor * truth.abs().max().item()


def strange_nans() -> Tensor:
    """NaN as arithmetic makes it, and as memory that was never written often holds it: the low bits are payload."""
    return torch.tensor([0x7FC00000, 0x7FC00001, -1], dtype=torch.int32).view(torch.float32)


def implementations(operator: str) -> list:
    """Parameters ``(device, backend)``: every backend of ``operator``, skipped with the reason where it cannot run.

    Triton's kernels run on the CPU too, where its interpreter is on (conftest.py).
    """
    found = []
    if "triton" in dispatch.implemented(operator) and dispatch.interpreted():
        found.append(pytest.param("cpu", "triton", id="cpu-triton"))
    for device, backends in dispatch.AUTO[operator].items():
        for backend in backends:
            marks = [pytest.mark.gpu] if device == "cuda" else []
            here = device == "cpu" or torch.cuda.is_available()
            if here and (reason := dispatch.missing(operator, backend, device)):
                marks.append(pytest.mark.skip(reason=reason))
            found.append(pytest.param(device, backend, marks=marks, id=f"{device}-{backend}"))
    return found


def skip_where_unsupported(operator: str, device: str, backend: str, dtype: torch.dtype) -> None:
    """Skip the test, with the reason, where the backend does not compute in ``dtype``."""
    if reason := dispatch.missing(operator, backend, device, dtype):
        pytest.skip(reason)
