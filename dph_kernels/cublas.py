"""What PyTorch's matrix products on a GPU need to be told."""

from torch import Tensor


def readable(x: Tensor) -> Tensor:
    """``x``, copied where its elements span 2**31 or more, which cuBLAS does not count: it reads elsewhere then.

    Seen with PyTorch 2.11 on an H200: an illegal access in a product of fp16 rows that lay 2**30 elements apart.
    """
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.contiguous() if x.is_cuda and span >= 2**31 else x
