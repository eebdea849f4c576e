"""Launches of Triton kernels: device, configuration, and a recorder that describes launches for the audit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dph_kernels.native import device_guard

# Triton's names of the dtypes that kernels take.
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}

# Triton compiles a kernel again for an integer that is 1 or a multiple of 16, and for a pointer that is aligned to 16
# bytes. ``do_not_specialize`` turns this off for a parameter, but not for the elements of a tuple (Triton 3.6 to 3.9).
# Strides in tuples are therefore multiplied by 16, which gives one kernel for all of them.
SPECIALIZED = 16


def cdiv(size: int, step: int) -> int:
    """Ceiling division. Triton's own, which kernels can call too, takes 3 us."""
    return -(-size // step)


def next_power_of_2(size: int) -> int:
    """Return the smallest power of 2 that is at least ``size``, from 1 on; faster than Triton's, like ``cdiv``."""
    return 1 << max(size - 1, 0).bit_length()


def matrix(x: Tensor) -> tuple[Tensor, int]:
    """Argument (data, row stride) of a matrix whose last dimension is contiguous.

    Tuples of arguments are plain: Triton builds two more from each at every launch, which takes 1 us if it has names.
    """
    return x, x.stride(0)


def strided(x: Tensor) -> tuple[Tensor, int, int]:
    """Argument (data, row stride, head stride) of a tensor [N] or [N, K]; strides are times ``SPECIALIZED``."""
    return x, x.stride(0) * SPECIALIZED, x.stride(-1) * SPECIALIZED


class LaunchConfig(NamedTuple):
    """Configuration of a kernel launch.

    block_m, block_n: rows and columns of a program's tile.
    block_k: step of its inner loop.
    num_warps, num_stages: warps of a program, and depth of its software pipeline.
    maxnreg: registers per thread, at most. Fewer allow more programs per SM. None: the compiler decides.
    group_m: row tiles that are scheduled together over all columns, so that they share the cache.
    tma: whether the operands are read through tensor descriptors (Hopper's bulk copies).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    group_m: int = 1
    tma: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Return the compiler options of the launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options | ({"maxnreg": self.maxnreg} if self.maxnreg else {})


class TritonDevice:
    """Device that kernels are launched on.

    Attributes:
        device: device of the kernels' tensors.
        capability: compute capability (80, 90, ...); 0 is Triton's interpreter on the CPU.
        sm_count: number of streaming multiprocessors (SMs).
    """

    def __init__(self, device: torch.device, capability: int, sm_count: int) -> None:
        self.device, self.capability, self.sm_count = device, capability, sm_count

    def newest(self, configs: Mapping[int, Any], operator: str, purpose: str = "") -> Any:
        """Return the entry of ``configs`` for the newest architecture that is not newer than this device.

        Raises:
            RuntimeError: The device is older than all entries.
        """
        supported = [capability for capability in configs if capability <= self.capability]
        if not supported:
            raise RuntimeError(
                f"{operator}: expected a GPU of compute capability {min(configs)} or higher{purpose}, "
                f"got {self.capability}"
            )
        return configs[max(supported)]

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        config: LaunchConfig,
        arguments: dict[str, Any],
        constants: dict[str, Any],
    ) -> None:
        """Launch a kernel, unless the grid is empty."""
        if 0 in grid:
            return
        with device_guard(self.device):
            kernel[grid](**arguments, **constants, **config.options)


@functools.cache
def triton_device(device: torch.device, interpreter_sms: int = 4) -> TritonDevice:
    """Return the description of a device; the interpreter has ``interpreter_sms`` SMs, few so that tests split work."""
    if device.type != "cuda":
        return TritonDevice(device, 0, interpreter_sms)
    properties = torch.cuda.get_device_properties(device)
    return TritonDevice(device, properties.major * 10 + properties.minor, properties.multi_processor_count)


# Audit


@dataclass(frozen=True)
class Launch:
    """Launch of a kernel, as the audit compiles it ahead of time.

    Attributes:
        name: operator, kernel, dtype and constants, for people to read.
        kernel: the ``@triton.jit`` function.
        signature: parameter -> Triton's type ("*bf16", "i32", ...; "constexpr" for constants), a tuple of types for a
            tuple.
        constants: values of the constants.
        aligned: arguments that the launch guarantees to be divisible by 16; "q.0" is the first element of tuple q.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        maxnreg: registers per thread, at most. None: the compiler decides.
        spill_budget: bytes of registers that may be spilled to memory.
        matrix: tensor-core instruction that must occur, "HMMA" or "HGMMA"; empty if none is needed.
        copies: whether asynchronous copies must occur.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, object]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    spill_budget: int = 0
    matrix: str = ""
    copies: bool = False

    def key(self) -> tuple:
        """Return a key that is equal for two launches of the same machine code."""
        types, constants = (tuple(sorted(items.items())) for items in (self.signature, self.constants))
        return self.kernel.__name__, types, constants, self.num_warps, self.num_stages, self.maxnreg


class LaunchRecorder(TritonDevice):
    """Device that records its launches; tensors are on the meta device.

    Args:
        capability, sm_count: of the GPU to compile for.
        product_rows: (kernel, constants) -> rows of the left operand of the kernel's matrix products, 0 without any.
        spill_budgets: kernel name -> bytes that it may spill; 0 for the others.
    """

    def __init__(
        self,
        capability: int,
        sm_count: int = 0,
        product_rows: Callable[[Any, Mapping[str, Any]], int] = lambda kernel, constants: 0,
        spill_budgets: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(torch.device("meta"), capability, sm_count)
        self.product_rows, self.spill_budgets = product_rows, spill_budgets or {}
        self.launches: list[Launch] = []

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        config: LaunchConfig,
        arguments: dict[str, Any],
        constants: dict[str, Any],
    ) -> None:
        """Record a launch."""
        dtype, rows = _dtype(arguments), self.product_rows(kernel, constants)
        operator = kernel.__module__.split(".")[-2]
        sizes = [f"{name}={value}" for name, value in constants.items() if type(value) is int]
        flags = [name.lower() for name, value in constants.items() if value is True]
        wgmma = self.capability // 10 == 9 and rows >= 64 and config.num_warps >= 4  # four warps multiply 64 rows
        matrix = ("HGMMA" if wgmma else "HMMA") if rows and dtype != torch.float32 else ""
        self.launches.append(
            Launch(
                name=" ".join([f"{operator}.{kernel.__name__}", str(dtype).removeprefix("torch."), *sizes, *flags]),
                kernel=kernel,
                signature=signature(kernel, arguments, constants),
                constants=constants,
                aligned=tuple(_aligned(kernel, arguments)),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                maxnreg=config.maxnreg,
                spill_budget=self.spill_budgets.get(kernel.__name__, 0),
                matrix=matrix,
                copies=rows > 0,
            )
        )


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """Return the first launch of each machine code."""
    by_key: dict[tuple, Launch] = {}
    for launch in launches:
        by_key.setdefault(launch.key(), launch)
    return list(by_key.values())


def signature(kernel: Any, arguments: Mapping[str, Any], constants: Mapping[str, Any]) -> dict[str, Any]:
    """Return Triton's types of a call's arguments: the annotated type, else that of the value."""
    types = {}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            types[parameter.name] = "constexpr"
            if parameter.name not in constants:
                raise ValueError(f"{kernel.__name__}: expected a constant {parameter.name}, got {sorted(constants)}")
        else:
            types[parameter.name] = parameter.annotation_type or _type(arguments[parameter.name])
    return types


def _type(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_type, value))
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if hasattr(value, "block_shape"):  # Triton's TensorDescriptor
        return f"tensordesc<{TYPES[value.base.dtype]}[{', '.join(map(str, value.block_shape))}]>"
    return "fp32" if isinstance(value, float) else "i32"


def _elements(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of an argument, or of all elements of a tuple."""
    if isinstance(value, tuple):
        for index, element in enumerate(value):
            yield from _elements(element, f"{path}.{index}")
    else:
        yield path, value


def _aligned(kernel: Any, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Arguments that Triton specializes as divisible by 16: tensors and such integers."""
    unspecialized = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    for name, argument in arguments.items():
        for path, value in _elements(argument, name):
            if path not in unspecialized and (
                isinstance(value, Tensor) or (isinstance(value, int) and value % SPECIALIZED == 0)
            ):
                yield path


def _dtype(arguments: Mapping[str, Any]) -> torch.dtype:
    """The shortest floating dtype among a call's tensors."""
    values = [value for name, argument in arguments.items() for _, value in _elements(argument, name)]
    dtypes = [getattr(value, "base", value).dtype for value in values if not isinstance(value, (int, float))]
    return min((dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: dtype.itemsize)
