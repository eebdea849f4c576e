"""A limit of PyTorch's matrix products on a GPU."""

from torch import Tensor


def readable(x: Tensor) -> Tensor:
    """Return ``x``, copied if its elements span 2**31 or more, which overflows the 32-bit offsets of cuBLAS.

    Seen with PyTorch 2.11 on an H200: an illegal access in a product of fp16 rows 2**30 elements apart.
    """
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.contiguous() if x.is_cuda and span >= 2**31 else x
