"""Argument checks: what passes, and the message of what does not."""

import pytest
import torch

from dph_kernels import checks


def test_what_is_right_passes():
    x = torch.zeros(2, 3)
    checks.shape("x", x, 2, 3)
    checks.shape("x", x, "R", 3)
    checks.shape("x", torch.tensor(1.0))
    checks.dtype("x", x, torch.float32)
    checks.dtype("x", x, checks.FLOATS)
    checks.device("x", x, torch.device("cpu"))
    checks.tensor("x", x)
    checks.contiguous("x", x)
    checks.number("p", 0.0, 0.0, 1.0, below=True)
    checks.number("p", 1.0, 0.0, 1.0)
    checks.number("p", float("inf"), 0.0)
    checks.option("kind", "a", ("a", "b"))


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ((2, 4), r"^x: expected shape \[2, 4\], got \[2, 3\]$"),
        (("R", "C", 1), r"^x: expected shape \[R, C, 1\], got \[2, 3\]$"),
        ((), r"^x: expected shape \[\], got \[2, 3\]$"),
    ],
)
def test_shape(expected, message):
    with pytest.raises(ValueError, match=message):
        checks.shape("x", torch.zeros(2, 3), *expected)


@pytest.mark.parametrize("value", [None, [[1.0]], 3])
def test_what_is_no_tensor(value):
    with pytest.raises(ValueError, match=f"^x: expected a tensor, got {type(value).__name__}$"):
        checks.shape("x", value, "R")
    with pytest.raises(ValueError, match=f"^x: expected a tensor, got {type(value).__name__}$"):
        checks.tensor("x", value)


def test_dtype():
    with pytest.raises(ValueError, match=r"^x: expected int64, got float32$"):
        checks.dtype("x", torch.zeros(1), torch.int64)
    with pytest.raises(ValueError, match=r"^x: expected int32 or int64, got float32$"):
        checks.dtype("x", torch.zeros(1), checks.INTEGERS)
    with pytest.raises(ValueError, match=r"^x: expected int32 or int64, got float32$"):
        checks.dtype("x", torch.zeros(1), (*checks.INTEGERS, torch.int32))


def test_device():
    with pytest.raises(ValueError, match=r"^x: expected a tensor on cpu, got one on meta$"):
        checks.device("x", torch.zeros(1, device="meta"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("value", "strides"), [(torch.zeros(3, 2).t(), r"\(1, 2\)"), (torch.zeros(1).expand(4), r"\(0,\)")]
)
def test_contiguous(value, strides):
    with pytest.raises(ValueError, match=f"^x: expected a contiguous tensor, got strides {strides}$"):
        checks.contiguous("x", value)


@pytest.mark.parametrize("value", [-1e-9, 1.0, float("nan"), float("inf")])
def test_number(value):
    with pytest.raises(ValueError, match=rf"^p: expected 0.0 <= p < 1.0, got {value}$"):
        checks.number("p", value, 0.0, 1.0, below=True)


def test_option():
    with pytest.raises(ValueError, match=r"^kind: expected one of 'a', 'b', got 'c'$"):
        checks.option("kind", "c", ("a", "b"))
