"""The tolerance rule and the fixtures of the suite can fail."""

import pytest
import torch
from helpers.numerics import FLOOR, assert_close_to_fp64, implementations

from dph_kernels import dispatch

TRUTH = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("dtype", FLOOR)
def test_an_error_up_to_the_floor_passes_and_one_beyond_it_fails(dtype):
    floor, got = FLOOR[dtype] * 2, TRUTH.to(dtype)
    assert_close_to_fp64(got, got, TRUTH)
    assert_close_to_fp64(TRUTH + 0.9 * floor, got, TRUTH, floor=FLOOR[dtype])
    assert_close_to_fp64(got, got, TRUTH + 0.4 * floor)
    with pytest.raises(AssertionError, match="allowed"):
        assert_close_to_fp64(TRUTH + 1.1 * floor, got, TRUTH, floor=FLOOR[dtype])
    with pytest.raises(AssertionError, match="allowed"):
        assert_close_to_fp64(got, TRUTH + 1.1 * floor, TRUTH + 1.1 * floor)


def test_twice_the_error_of_plain_pytorch_is_allowed_and_three_times_is_not():
    same = TRUTH + 0.1
    assert_close_to_fp64(TRUTH + 0.2, same, TRUTH)
    with pytest.raises(AssertionError, match=r"grad: error 3\.000e-01"):
        assert_close_to_fp64(TRUTH + 0.3, same, TRUTH, "grad")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_must_be_so_in_both(bad):
    broken = torch.tensor([1.0, bad, 0.0], dtype=torch.float64)
    assert_close_to_fp64(broken, TRUTH, broken)
    with pytest.raises(AssertionError):
        assert_close_to_fp64(broken, TRUTH, TRUTH)
    with pytest.raises(AssertionError):
        assert_close_to_fp64(TRUTH, TRUTH, broken)


def test_broken_plain_pytorch_earns_no_tolerance():
    with pytest.raises(AssertionError, match="allowed"):
        assert_close_to_fp64(TRUTH + 1, TRUTH * torch.nan, TRUTH)


def test_shape_and_precision_of_the_truth_are_checked():
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_fp64(TRUTH[:2], TRUTH, TRUTH)
    with pytest.raises(AssertionError, match="float64"):
        assert_close_to_fp64(TRUTH, TRUTH, TRUTH.float())


def test_implementations_are_those_of_the_dispatch_table():
    found = [(param.values[0], param.values[1]) for param in implementations("linear_logprob")]
    table = dispatch.AUTO["linear_logprob"]
    found = [pair for pair in found if pair != ("cpu", "triton")]
    assert found == [(device, backend) for device, line in table.items() for backend in line]


@pytest.mark.usefixtures("poisoned_empty")
def test_empty_memory_is_poisoned():
    like = torch.zeros(3)
    for made in (torch.empty(3), torch.empty_like(like), torch.empty_strided((3,), (1,)), like.new_empty(3)):
        assert made.isnan().all()
    assert (torch.empty(2, dtype=torch.int64) == torch.iinfo(torch.int64).min).all()


def test_seeds_are_fixed():
    drawn = torch.rand(2)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2), drawn)
