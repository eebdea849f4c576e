"""Of launches: the sizes of their grids, and one as the audit compiles it ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Triton's names of the dtypes that kernels take.
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def cdiv(size: int, step: int) -> int:
    """Steps that cover ``size``; Triton's own, which kernels may call too, takes 3 us."""
    return -(-size // step)


def next_power_of_2(size: int) -> int:
    """The smallest that is not below ``size``, from 1 on; likewise."""
    return 1 << max(size - 1, 0).bit_length()


@functools.cache
def multiprocessors(device: torch.device, interpreted: int = 1) -> int:
    """Of a GPU; ``interpreted`` in Triton's interpreter: few, so that tests see a program take several shares."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else interpreted


@dataclass(frozen=True)
class Launch:
    """One ahead-of-time compilation.

    Attributes:
        name: operator, kernel and configuration, for people to read.
        kernel: the ``@triton.jit`` function.
        signature: argument -> Triton's type ("*bf16", "i32", ...; "constexpr" for constants).
        constants: the values of the constants.
        aligned: arguments that the launch guarantees to be divisible by 16.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        registers: most that a thread may have; None: the compiler decides.
        spill_budget: bytes of registers that may be spilled to memory.
        matrix: the tensor-core instruction that must occur, "HMMA" or "HGMMA"; empty where none need.
        copies: whether asynchronous copies must occur.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, object]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    registers: int | None = None
    spill_budget: int = 0
    matrix: str = ""
    copies: bool = False

    def key(self) -> tuple:
        """Equal for two launches that run the same machine code."""
        types, constants = (tuple(sorted(part.items())) for part in (self.signature, self.constants))
        return self.kernel.__name__, types, constants, self.num_warps, self.num_stages, self.registers


def signature(kernel: Any, arguments: Mapping[str, Any], constants: Mapping[str, Any]) -> dict[str, str]:
    """Triton's types of a call: those of tensors and of descriptors, an annotated one as it says, numbers by kind."""
    types = {}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            types[parameter.name] = "constexpr"
            if parameter.name not in constants:
                raise ValueError(f"{kernel.__name__}: expected a constant {parameter.name}, got {sorted(constants)}")
            continue
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            types[parameter.name] = f"*{TYPES[value.dtype]}"
        elif hasattr(value, "block_shape"):  # Triton's TensorDescriptor
            block = ", ".join(map(str, value.block_shape))
            types[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        else:
            types[parameter.name] = parameter.annotation_type or ("fp32" if isinstance(value, float) else "i32")
    return types
