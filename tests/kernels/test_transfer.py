"""Tensors on their way to a device, one by one and together."""

import pytest
import torch

from dph_kernels.transfer import ALIGNED, all_to_device, sent_together

TENSORS = [
    torch.arange(5), torch.tensor([True, False, True]), torch.empty(0, dtype=torch.int64), torch.rand(3, 7),
    torch.arange(12, dtype=torch.int32).view(3, 4).T, torch.tensor(3.5, dtype=torch.float64), torch.empty(0, 2).bool(),
]  # fmt: skip


def alike(sent, tensors):
    for got, want in zip(sent, tensors, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got.cpu(), want)
        assert got.is_contiguous()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_sent_together_arrives_aligned_in_one_piece(device):
    sent = sent_together(TENSORS, device)
    alike(sent, TENSORS)
    assert {x.device.type for x in sent} == {device}
    assert len({x.untyped_storage().data_ptr() for x in sent}) == 1
    assert all(x.storage_offset() * x.itemsize % ALIGNED == 0 for x in sent)
    sent[0].zero_()
    alike(sent[1:], TENSORS[1:])
    rows, other = sent_together([torch.arange(3), torch.rand(2)], device)
    weight = torch.ones(3, 2, device=device, requires_grad=True)
    total = weight[rows].sum()
    other.zero_()
    total.backward()  # which keeps rows, that nobody has written to
    assert sent_together([], device) == []


@pytest.mark.gpu
def test_a_buffer_that_is_still_on_its_way_is_not_used_again():
    torch.cuda._sleep(10**8)
    sent = [sent_together([torch.full((1000,), i), torch.full((7,), -i)], "cuda") for i in range(50)]
    for i, (long, short) in enumerate(sent):
        assert set(long.tolist()) == {i}
        assert set(short.tolist()) == {-i}


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_tensor_that_comes_twice_is_one_there(device):
    twice, other = torch.arange(4), torch.rand(2)
    first, second, third = all_to_device([twice, other, twice], device)
    assert first is third
    assert {first.device.type, second.device.type} == {device}
    assert (first is twice) == (device == "cpu")


@pytest.mark.gpu
def test_what_is_there_already_stays():
    there, here = torch.arange(4, device="cuda"), torch.arange(3)
    first, second = all_to_device([there, here], "cuda")
    assert first is there
    assert second.tolist() == [0, 1, 2]
