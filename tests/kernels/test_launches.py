"""Launches that know the compiled kernel of an earlier one like them."""

import pytest
import torch

from dph_kernels import launches, swiglu


class Kernel:
    """A kernel of Triton's that counts how often it is looked for, and keeps what its compiled forms are given."""

    arg_names = ("x", "size", "WIDE")

    def __init__(self):
        self.found, self.given = 0, []

    def __getitem__(self, grid):
        def search(**given):
            self.found += 1
            self.given.append((grid, *given.values()))
            return {(*grid, 1, 1)[:3]: lambda *values: self.given.append((grid, *values))}

        return search


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launches, "JITFunction", Kernel)
    monkeypatch.setattr(launches, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def run(kernel, x, size=3, *, wide=True, warps=4):
    launches.launch(kernel, (2,), {"size": size, "x": x}, {"WIDE": wide}, num_warps=warps)


def test_a_call_like_an_earlier_one_is_not_looked_for_again(kernel):
    x, other = torch.zeros(8), torch.ones(8)
    run(kernel, x)
    run(kernel, other)
    assert kernel.found == 1
    grid, *values = kernel.given[1]
    assert grid == (2,)
    assert values[0] is other, "the kernel's order, not the call's"
    assert values[1:] == [3, True]


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(8, dtype=torch.bfloat16)},
        {"x": torch.zeros(9)[1:]},
        {"size": 4},
        {"wide": False},
        {"warps": 8},
    ],
    ids=["dtype", "alignment", "number", "constant", "option"],
)
def test_a_call_unlike_the_earlier_ones_is(kernel, change):
    call = {"x": torch.zeros(8)}
    run(kernel, **call)
    run(kernel, **call | change)
    assert kernel.found == 2


def test_only_so_many_are_kept(kernel, monkeypatch):
    monkeypatch.setattr(launches, "KEPT", 2)
    for size in (1, 2, 3, 3):
        run(kernel, torch.zeros(8), size)
    assert kernel.found == 3
    assert len(launches._compiled) == 1


@pytest.mark.gpu
def test_rows_that_begin_anywhere():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(2**16 + 64, generator=generator).to("cuda", torch.bfloat16)
    for start in (0, 1, 0, 8, 3, 1):  # aligned and not, in turn
        x = flat[start : start + 2**16].view(64, 1024)
        expected = swiglu(x.double(), backend="reference")
        torch.testing.assert_close(swiglu(x, backend="triton").double(), expected, rtol=1e-2, atol=1e-2)
