"""Log-probabilities on the GPU: what ``triton_kernels.py`` is launched with, and in which configuration.

In half precision the logits never reach memory: the forward pass reduces each tile of them as its product is there, and
the backward pass turns it into gradients of logits, of which cuBLAS makes those of states and weights. Where these are
computed along, the forward pass keeps what they are made of, for some rows at a time. Single precision multiplies by
cuBLAS, with a fused pass over each tile.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dph_kernels.cublas import readable
from dph_kernels.launches import Launch, cdiv, signature
from dph_kernels.linear_logprob import tiles
from dph_kernels.linear_logprob import triton_kernels as kernels
from dph_kernels.native import device_guard
from dph_kernels.strides import last_contiguous

# Configurations


class Config(NamedTuple):
    """How a kernel that multiplies is launched.

    rows, columns: its tile of logits (BM x BN).
    step: how many elements of a state are taken at once (BK).
    warps, stages: of a program, and of its software pipeline.
    group: blocks of rows that go through all columns together.
    tma: whether Hopper's copies in bulk bring states and weights, where these are aligned.
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    group: int
    tma: bool = False

    @property
    def constants(self) -> dict[str, int]:
        """What the kernel is compiled with."""
        return {"BM": self.rows, "BN": self.columns, "BK": self.step, "GROUP": self.group}

    def programs(self, rows: int, columns: int) -> tuple[int]:
        """The grid."""
        return (cdiv(rows, self.rows) * cdiv(columns, self.columns),)


# Of both passes, by architecture. Large tiles, since what they read passes through the cache; that of 90 is the best of
# eight on an H200, where copies in bulk save 8 and 4 % (forward, backward). 120 has the instructions of 80, and 99 KB
# of shared memory.
CONFIGS = {
    80: Config(128, 128, 32, 4, 4, 8),
    90: Config(128, 256, 64, 8, 4, 16, True),
    120: Config(128, 128, 32, 4, 4, 8),
}
INTERPRETED = Config(16, 32, 16, 1, 1, 2, True)
COMBINE = {"BLOCKS": 32, "BR": 32}  # partial results that a program takes at once: blocks of columns x rows
BLOCK = 2048  # logits that a program of a pass holds at once
WARPS = 4  # of all kernels that do not multiply
# In what gradients are computed along: those of a sum over all rows can be too much for fp16.
JOINT = (torch.bfloat16,)
JOINT_BYTES = 295_000_000  # that this may take beside the gradients themselves
LEAST_ROWS = 1024  # for which it is worth to read and write the sums of the weights' gradient
UNIT = 16  # elements: rows of tiles in memory begin at multiples of it, which vectors and fast products need


class _Machine:
    """What kernels are launched on; capability 0 is Triton's interpreter."""

    def __init__(self, device: torch.device, capability: int) -> None:
        self.device, self.capability = device, capability

    @property
    def config(self) -> Config:
        """That of the nearest architecture which is not newer; for interpreted kernels, small tiles."""
        if not self.capability:
            return INTERPRETED
        known = [capability for capability in CONFIGS if capability <= self.capability]
        if not known:
            raise RuntimeError(
                f"linear_logprob: expected a GPU of compute capability {min(CONFIGS)} or higher for half precision, "
                f"got {self.capability}"
            )
        return CONFIGS[max(known)]

    def run(
        self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any],
        config: Config | None = None,
    ) -> None:  # fmt: skip
        """Launch it; without a configuration, as a kernel that does not multiply."""
        warps, stages = (config.warps, config.stages) if config else (WARPS, 1)
        with device_guard(self.device):
            kernel[grid](**arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


@functools.cache
def _machine(device: torch.device) -> _Machine:
    if device.type == "cpu":
        return _Machine(device, 0)
    major, minor = torch.cuda.get_device_capability(device)
    return _Machine(device, major * 10 + minor)


# Engines


class Engine:
    """Sizes for a bound of 300 MB on extra memory, products and passes of fp32 (see :class:`tiles.Engine`)."""

    # 44 times 128: with C = 768 the 128 x 256 blocks of a gradient's product just fill the 132 processors of an H100 or
    # H200, on which sides of 4096 and 8192 are 8 and 3 % slower. fp32 logits of a tile take 127 MB, gradients of logits
    # in half precision 63.
    side = 5632
    most_sums = 2**24  # 64 MiB

    def __init__(self, machine: _Machine, hidden: Tensor, weight: Tensor) -> None:
        """Choose tiles; few rows make wide ones."""
        self.machine = machine
        self.rows = max(1, min(self.side, len(hidden)))
        wide = min(max(self.side, self.side**2 // self.rows), self.most_sums // max(1, weight.shape[1]))
        self.columns = max(UNIT, wide // UNIT * UNIT)
        self.size = self.rows, -(-min(self.columns, len(weight)) // UNIT) * UNIT
        self.dtype = hidden.dtype

    @functools.cached_property
    def buffer(self) -> Tensor:
        """Memory for one tile, which all tiles share: for logits, their gradients, or one in the place of the other."""
        return torch.empty(self.size, dtype=self.dtype, device=self.machine.device)

    def operand(self, x: Tensor) -> Tensor:
        """As it is: cuBLAS takes all strides with a 1 among them, and PyTorch copies the others."""
        return x

    def reduce(
        self, hidden: Tensor, weight: Tensor, first: int, last: bool, targets: Tensor,
        normaliser: Tensor, logprobs: Tensor, entropy: Tensor, best: Tensor,
    ) -> None:  # fmt: skip
        """One program for each row."""
        logits = self._logits(hidden, weight)
        arguments = {
            "logits": logits, "targets": targets, "largest": normaliser[0], "log_sum": normaliser[1],
            "logprobs": logprobs, "entropy": entropy, "best": best, **self._sizes(logits, first),
        }  # fmt: skip
        constants = {"START": first == 0, "LAST": last, "STATISTICS": len(entropy) > 0, "UNIT": UNIT, "BLOCK": BLOCK}
        self.machine.run(kernels.reduce_rows, (len(logits),), arguments, constants)

    def gradient(
        self, hidden: Tensor, weight: Tensor, first: int, upstream: Tensor, targets: Tensor, normaliser: Tensor
    ) -> Tensor:
        """One program for each block of a row; blocks of one row are neighbours. The logits are overwritten."""
        logits = self._logits(hidden, weight)
        arguments = {
            "logits": logits, "targets": targets, "largest": normaliser[0], "log_sum": normaliser[1],
            "upstream": upstream, **self._sizes(logits, first),
        }  # fmt: skip
        grid = cdiv(logits.shape[1], BLOCK), len(logits)
        self.machine.run(kernels.gradient_rows, grid, arguments, {"UNIT": UNIT, "BLOCK": BLOCK})
        return logits

    def sums(self, result: Tensor, transposed: bool) -> Tensor:
        """The result itself, if it is fp32: products of all layouts are equally fast."""
        return tiles.fp32_sums(result)

    def add(self, total: Tensor, a: Tensor, b: Tensor, start: bool) -> None:
        """``total`` (+)= ``a @ b``: half precision goes in, and nothing is rounded to it before the last sum."""
        a, b = readable(a), readable(b)
        if a.is_cuda and a.dtype != torch.float32:
            if start:
                torch.mm(a, b, out_dtype=torch.float32, out=total)
            else:
                torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, a.float(), b.float(), beta=0 if start else 1, out=total)

    def finish(self, sums: Tensor, result: Tensor) -> None:
        """Nothing is left to do: the sums are the result."""

    def _logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = self.buffer[: len(hidden), : len(weight)]
        self.add(logits, hidden, weight.T, True)
        return logits

    def _sizes(self, tile: Tensor, first: int) -> dict[str, int]:
        return {"units": tile.stride(0) // UNIT, "columns": tile.shape[1], "first": first}


class Fused(Engine):
    """Half precision: kernels that multiply and make of the logits in their registers what is asked for.

    The bound on memory is beside a copy of weights whose columns are not contiguous.
    """

    def __init__(self, machine: _Machine, hidden: Tensor, weight: Tensor, partials: int = 0) -> None:
        """``partials``: how many numbers the forward pass keeps for each row and block of columns.

        With them a tile has all columns, and as many rows as partial results have room for.
        """
        super().__init__(machine, hidden, weight)
        self.unit: Tensor | None = None  # of the gradients of logits, where these are scaled
        if partials:
            config, self.columns = machine.config, len(weight)
            room = self.most_sums // (partials * cdiv(self.columns, config.columns))
            self.rows = max(1, room // config.rows) * config.rows

    def keep(self, hidden: Tensor, weight: Tensor) -> None:
        """Have room for what :meth:`reduce_and_keep` keeps: all columns of so many rows as the bound allows."""
        self.rows = min(self.rows, _joint_rows(self.machine, weight))
        self.size = min(self.rows, len(hidden)), cdiv(len(weight), UNIT) * UNIT

    def operand(self, x: Tensor) -> Tensor:
        """Copied only where its last dimension is not contiguous: the kernels read vectors of it."""
        return last_contiguous(x)

    def reduce(
        self, hidden: Tensor, weight: Tensor, first: int, last: bool, targets: Tensor,
        normaliser: Tensor, logprobs: Tensor, entropy: Tensor, best: Tensor,
    ) -> None:  # fmt: skip
        """One program for each tile of logits, then one for some rows; all columns are here."""
        self._reduce(hidden, weight, targets, normaliser, logprobs, entropy, best, None)

    def reduce_and_keep(
        self, hidden: Tensor, weight: Tensor, targets: Tensor,
        normaliser: Tensor, logprobs: Tensor, entropy: Tensor, best: Tensor,
    ) -> Tensor:  # fmt: skip
        """The same, and what :meth:`gradient` gives of these rows for upstream gradients of 1, with all columns.

        No product more, but a pass.
        """
        shares = self.buffer[: len(hidden), : len(weight)]
        tops = self._reduce(hidden, weight, targets, normaliser, logprobs, entropy, best, shares)
        arguments = {
            "shares": shares, "tops": tops, "targets": targets, "largest": normaliser[0], "log_sum": normaliser[1],
            "units": shares.stride(0) // UNIT, "rows": len(hidden), "columns": len(weight),
        }  # fmt: skip
        width = self.machine.config.columns
        constants = {"UNIT": UNIT, "BN": width, "BLOCKS": max(1, BLOCK // width)}
        grid = len(hidden), cdiv(len(weight), width * constants["BLOCKS"])
        self.machine.run(kernels.gradient_shares, grid, arguments, constants)
        return shares

    def _reduce(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, normaliser: Tensor, logprobs: Tensor, entropy: Tensor,
        best: Tensor, shares: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Largest logits by blocks of columns [blocks, rows], from which ``shares`` were taken."""
        config, statistics = self.machine.config, {"STATISTICS": len(entropy) > 0}
        size = cdiv(len(weight), config.columns), len(hidden)
        partials = {name: torch.empty(size, dtype=torch.float32, device=hidden.device) for name in ("tops", "totals")}
        for name, dtype in {"weighted": torch.float32, "indices": torch.int32}.items():
            partials[name] = torch.empty(size if len(entropy) else 0, dtype=dtype, device=hidden.device)
        results = {"targets": targets, "logprobs": logprobs}
        kept = {"shares": partials["tops"], "units": 0}  # any address, where nothing is kept
        if shares is not None:
            kept = {"shares": shares, "units": shares.stride(0) // UNIT}
        constants = statistics | {"SHARES_UNIT": 0 if shares is None else UNIT}
        self._multiply(kernels.reduce_tile, hidden, weight, partials | results | kept, constants)
        results |= {"largest": normaliser[0], "log_sum": normaliser[1], "entropy": entropy, "best": best}
        sizes, constants = {"rows": len(hidden), "columns": len(weight)}, {"BN": config.columns, **COMBINE}
        grid = (cdiv(len(hidden), COMBINE["BR"]),)
        self.machine.run(kernels.combine, grid, partials | results | sizes, statistics | constants)
        return partials["tops"]

    def gradient(
        self, hidden: Tensor, weight: Tensor, first: int, upstream: Tensor, targets: Tensor, normaliser: Tensor
    ) -> Tensor:
        """One program for each tile of logits."""
        changes = self.buffer[: len(hidden), : len(weight)]
        arguments = {
            "changes": changes, "targets": targets, "largest": normaliser[0], "log_sum": normaliser[1],
            "upstream": upstream, **self._sizes(changes, first),
        }  # fmt: skip
        self._multiply(kernels.gradient_tile, hidden, weight, arguments, {"CHANGES_UNIT": UNIT})
        return changes

    def finish(self, sums: Tensor, result: Tensor) -> None:
        """In the gradient's own unit again."""
        tiles.rounded(sums if self.unit is None else sums.mul_(self.unit), result)

    def scale(self, upstream: Tensor) -> Tensor:
        """``upstream`` by a power of two that brings the largest of it to 2^14 or above.

        Gradients of logits go through the products in fp16, where a mean over some thousand rows would lose them below
        its smallest number, and a loss scaled for fp16 above its largest.
        """
        largest = upstream.abs().amax()
        exponent = torch.where(largest.isfinite() & (largest > 0), largest.frexp().exponent, 15).clamp(-100, 100)
        self.unit = torch.ldexp(torch.ones_like(largest), exponent - 15)
        return upstream / self.unit

    def _multiply(
        self, kernel: Any, hidden: Tensor, weight: Tensor, arguments: dict[str, Any], constants: dict[str, Any]
    ) -> None:
        """Launch a kernel that multiplies; strides go to it, unless by descriptors, in units of up to 16 elements."""
        config = self.machine.config
        tma = config.tma and _describable(hidden) and _describable(weight)
        unit = 1 if tma else math.gcd(16, hidden.stride(0), weight.stride(0))
        operands = {
            "hidden": hidden, "hidden_units": hidden.stride(0) // unit, "rows": len(hidden),
            "weight": weight, "weight_units": weight.stride(0) // unit, "columns": len(weight),
        }  # fmt: skip
        if tma:
            operands["hidden"] = TensorDescriptor.from_tensor(hidden, [config.rows, config.step])
            operands["weight"] = TensorDescriptor.from_tensor(weight, [config.columns, config.step])
        constants = {**constants, **config.constants, "C": hidden.shape[1], "UNIT": unit, "TMA": tma}
        grid = config.programs(len(hidden), len(weight))
        self.machine.run(kernel, grid, operands | arguments, constants, config)


def _describable(x: Tensor) -> bool:
    """Whether a descriptor can tell where the rows of ``x`` lie: apart, and aligned to 16 bytes."""
    aligned = x.data_ptr() % 16 == x.stride(0) * x.element_size() % 16 == 0
    return aligned and x.stride(0) >= x.shape[1] > 0 and x.stride(1) == 1


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``reference.forward`` gives, but NaN for a target outside of [0, V)."""
    return _forward(_machine(hidden.device), hidden, weight, targets, statistics)


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    hidden_needed: bool,
    weight_needed: bool,
) -> tuple[Tensor, Tensor]:
    """What ``reference.backward`` gives."""
    arguments = hidden, weight, targets, normaliser, hidden_needed, weight_needed
    return _backward(_machine(hidden.device), grad, *arguments)


def joint_pays(hidden: Tensor, weight: Tensor) -> bool:
    """Whether :func:`forward_and_gradients` is for these: states of a dtype in JOINT, and room for enough rows."""
    if hidden.dtype not in JOINT or not hidden.numel():
        return False
    return _joint_rows(_machine(hidden.device), weight) >= min(LEAST_ROWS, len(hidden))


def forward_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``reference.forward`` gives, and the gradients of the sum of all log-probabilities.

    Some rows at a time, with all columns: three products.
    """
    return _forward_and_gradients(_machine(hidden.device), hidden, weight, targets, statistics)


def _joint_rows(machine: _Machine, weight: Tensor) -> int:
    """Rows at a time for which there is room, beside the fp32 sums of the weights' gradient: whole tiles, or 0."""
    (vocabulary, width), config = weight.shape, machine.config
    # Shares, fp32 sums and a copy of a row's state, partial results.
    row = weight.element_size() * (vocabulary + width) + 4 * width + 16 * cdiv(vocabulary, config.columns)
    return max(0, JOINT_BYTES - 4 * weight.numel()) // row // config.rows * config.rows


def _forward_and_gradients(
    machine: _Machine, hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    engine = Fused(machine, hidden, weight, partials=4 if statistics else 2)
    engine.keep(hidden, weight)
    logprobs, normaliser, entropy, best = tiles.room(hidden, targets, statistics)
    grad_hidden, grad_weight = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (hidden, weight))
    targets, w, weight_sums = targets.contiguous(), engine.operand(weight), tiles.fp32_sums(grad_weight)
    for part in tiles.spans(len(hidden), engine.rows, machine.config.rows):
        h, hidden_sums = engine.operand(hidden[part]), tiles.fp32_sums(grad_hidden[part])
        results = normaliser[:, part], logprobs[part], entropy[part], best[part]
        change = engine.reduce_and_keep(h, w, targets[part], *results)
        engine.add(hidden_sums, change, w, True)
        engine.finish(hidden_sums, grad_hidden[part])
        engine.add(weight_sums, change.T, h, part.start == 0)
        del h, hidden_sums, change  # before the next ones: their memory serves again
    engine.finish(weight_sums, grad_weight)
    return logprobs, normaliser, entropy, best, grad_hidden, grad_weight


def _forward(
    machine: _Machine, hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    engine = _engine(machine, hidden, weight, partials=4 if statistics else 2)
    return tiles.forward(engine, hidden, weight, targets, statistics)


def _backward(
    machine: _Machine, grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, normaliser: Tensor,
    hidden_needed: bool, weight_needed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    engine = _engine(machine, hidden, weight)
    if hidden.dtype == torch.float16 and len(hidden):
        grad = engine.scale(grad)
    return tiles.backward(engine, grad, hidden, weight, targets, normaliser, hidden_needed, weight_needed)


def _engine(machine: _Machine, hidden: Tensor, weight: Tensor, partials: int = 0) -> Engine:
    if hidden.dtype == torch.float32:
        return Engine(machine, hidden, weight)
    return Fused(machine, hidden, weight, partials)


# For the audit


class _Recorder(_Machine):
    """Keeps every launch instead of doing it."""

    def __init__(self, capability: int) -> None:
        super().__init__(torch.device("meta"), capability)
        self.found: list[Launch] = []

    def run(
        self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any],
        config: Config | None = None,
    ) -> None:  # fmt: skip
        """Describe it."""
        first = next(iter(arguments.values()))
        words = [str(getattr(first, "base", first).dtype).removeprefix("torch.")]
        words += [f"{config.rows}x{config.columns}"] if config else []
        words += [name.lower() for name in ("START", "LAST", "STATISTICS", "TMA") if constants.get(name)]
        words += ["shares"] if constants.get("SHARES_UNIT") else []
        words += [f"UNIT={constants['UNIT']}"] if config and not constants["TMA"] else []
        matrices = ("hidden", "weight", "logits", "changes", "shares", "tops", "totals", "weighted", "indices")
        self.found.append(
            Launch(
                name=" ".join([f"linear_logprob.{kernel.__name__}", *words]),
                kernel=kernel,
                signature=signature(kernel, arguments, constants),
                constants=constants,
                aligned=tuple(name for name in matrices if isinstance(arguments.get(name), Tensor)),
                num_warps=config.warps if config else WARPS,
                num_stages=config.stages if config else 1,
                matrix=("HGMMA" if self.capability // 10 == 9 else "HMMA") if config else "",
                copies=config is not None,
            )
        )


def launches(capability: int) -> list[Launch]:
    """Every kernel for bf16 and fp32 states; for fp16, and for rows that are aligned to 8 bytes, without statistics."""
    found: dict[tuple, Launch] = {}
    targets = torch.empty(8, dtype=torch.int64, device="meta")
    cases = [(torch.bfloat16, 768, False), (torch.bfloat16, 768, True), (torch.bfloat16, 772, False)]
    cases += [(torch.float16, 768, False), (torch.float32, 768, False), (torch.float32, 768, True)]
    for vocabulary, (dtype, stride, statistics) in itertools.product((1000, 100_000), cases):
        hidden, weight = (torch.empty(rows, stride, dtype=dtype, device="meta")[:, :768] for rows in (8, vocabulary))
        machine = _Recorder(capability)
        logprobs, normaliser, *_ = _forward(machine, hidden, weight, targets, statistics)
        _backward(machine, logprobs, hidden, weight, targets, normaliser, True, True)
        if dtype in JOINT and _joint_rows(machine, weight):
            _forward_and_gradients(machine, hidden, weight, targets, statistics)
        for launch in machine.found:
            found.setdefault(launch.key(), launch)
    return list(found.values())
