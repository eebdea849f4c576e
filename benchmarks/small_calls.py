"""Calls of every operator on few rows against eager PyTorch on the CPU, in fp32: the cost of Python and of bindings.

    python -m benchmarks.small_calls                                          # 10 to 20 minutes on 2 cores
    python -m benchmarks.small_calls residual_norm swiglu --rows 1 16 --threads 1
    python -m benchmarks.small_calls --json small_calls.json --output small_calls.md

Ours and the rival, PyTorch's operations as a user writes them, take turns of a fraction of a millisecond, and a ratio
is the median of those of all turns: other processes, which would change the times of both, seldom change it. A forward
pass runs under ``torch.no_grad()`` on weights that require gradients, as in evaluation. "forward + backward" adds
``torch.autograd.grad`` for all inputs and weights. Both compute the same results, which are compared first.

The goal is at least 0.95 for every number of rows. Exits with 1 if a ratio is below it.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import bench_linear_logprob, bench_preference_loss, bench_residual_norm, bench_swiglu_reward
from benchmarks.conftest import device
from dph.evaluate.tables import markdown_table
from dph_kernels import (
    PackedLayout,
    Rotary,
    gradient_norm,
    laprop,
    linear_logprob,
    preference_loss,
    residual_norm,
    rope_attention,
    swiglu,
    swiglu_reward,
)
from dph_kernels.laprop import reference as laprop_reference

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GOAL = 0.95  # of eager's time over ours
TOLERANCE = 1e-4  # of the largest value, or of 1: the gradient of a single visible score is zero
TURN = 2e-4  # seconds of calls in a row
MOST_TURNS = 301
HEAD_DIM = 64
MEMORY = 256  # cached tokens
ROPE = Rotary()
LAPROP = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "prior_decay": 0.5}
LAPROP |= {"bias_correction": 0.9, "momentum_scale": 1.1}

Run = Callable[[], object]


class Sizes(NamedTuple):
    """C, F and V of a small model."""

    columns: int
    width: int
    vocabulary: int

    @property
    def heads(self) -> int:
        return self.columns // HEAD_DIM


SIZES = (Sizes(768, 3072, 50272), Sizes(256, 1024, 8192))


class Problem(NamedTuple):
    """Two functions of the same results, the inputs that get gradients, and the number of results that have one."""

    ours: Run
    eager: Run
    leaves: Sequence[Tensor] = ()
    differentiable: int = 1


# The operators


def _draw(*size: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(size) * scale).requires_grad_()


def norm(kind: str, rows: int, sizes: Sizes) -> Problem:
    """The residual connection and the norm after it."""
    x, update, weight = _draw(rows, sizes.columns), _draw(rows, sizes.columns), _draw(sizes.columns)
    bias = _draw(sizes.columns) if kind == "layer" else None
    ours = functools.partial(residual_norm, x, update, weight, bias, kind=kind)
    eager = functools.partial(bench_residual_norm.eager, x, update, weight, bias, kind)
    return Problem(ours, eager, [leaf for leaf in (x, update, weight, bias) if leaf is not None], 2)


def head_norm(rows: int, sizes: Sizes) -> Problem:
    """The norm of each head of the queries in a joint projection."""
    x, weight = _draw(rows, 3 * sizes.heads, HEAD_DIM), _draw(HEAD_DIM)
    queries = x[:, : sizes.heads].detach().requires_grad_()

    def ours() -> Tensor:
        return residual_norm(queries, None, weight, kind="rms")[1]

    def eager() -> Tensor:
        return bench_residual_norm.eager(queries, None, weight, None, "rms")[1]

    return Problem(ours, eager, [queries, weight])


def gate(with_bias: bool, rows: int, sizes: Sizes) -> Problem:
    """The gated activation."""
    projected, bias = _draw(rows, 2 * sizes.width), _draw(2 * sizes.width) if with_bias else None

    def eager() -> Tensor:
        x, gate = (projected if bias is None else projected + bias).chunk(2, -1)
        return torch.nn.functional.silu(gate) * x

    return Problem(functools.partial(swiglu, projected, bias), eager, [projected, *([bias] if with_bias else [])])


def attention(memory: int, rows: int, sizes: Sizes) -> Problem:
    """Causal attention of one sequence, with ``memory`` cached tokens before it."""
    heads = rows, sizes.heads, HEAD_DIM
    q, k, v = _draw(*heads), _draw(*heads), _draw(*heads)
    cached = [torch.randn(memory, *heads[1:]) for _ in range(2)] if memory else None
    layout = PackedLayout.with_memory([rows], [memory], memory)
    cos, sin = (torch.cat([x, x], -1)[:, None] for x in ROPE.tables(memory + torch.arange(rows), HEAD_DIM))
    mask = torch.ones(rows, memory + rows, dtype=torch.bool).tril(memory) if memory and rows > 1 else None

    def rotated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def eager() -> Tensor:
        keys, values = rotated(k), v
        if cached is not None:
            keys, values = torch.cat([cached[0], keys]), torch.cat([cached[1], values])
        batch = (x.transpose(0, 1)[None] for x in (rotated(q), keys, values))
        out = scaled_dot_product_attention(*batch, attn_mask=mask, is_causal=mask is None and rows > 1)
        return out[0].transpose(0, 1)

    ours = functools.partial(rope_attention, q, k, v, layout, rope=ROPE, memory=cached and tuple(cached))
    return Problem(ours, eager, [q, k, v])


def logprob(rows: int, sizes: Sizes) -> Problem:
    """Log-probabilities of targets, and for gradients their mean, as in training."""
    hidden, weight = _draw(rows, sizes.columns), _draw(sizes.vocabulary, sizes.columns, scale=0.05)
    given = hidden, weight, torch.randint(sizes.vocabulary, (rows,))

    def mean_of(run: Callable[..., Tensor]) -> Run:
        return lambda: run(*given).mean() if torch.is_grad_enabled() else run(*given)

    return Problem(mean_of(linear_logprob), mean_of(bench_linear_logprob.materialised), [hidden, weight])


def reward(rows: int, sizes: Sizes) -> Problem:
    """Pooler and reward head."""
    shapes = {"w1": (2 * sizes.width, sizes.columns), "b1": (2 * sizes.width,)}
    shapes |= {"w2": (sizes.columns, sizes.width), "b2": (sizes.columns,)}
    hidden, head = _draw(rows, sizes.columns), _draw(1, sizes.columns, scale=0.05)
    weights = {name: _draw(*shape, scale=shape[-1] ** -0.5) for name, shape in shapes.items()}
    ours = functools.partial(swiglu_reward, hidden, head, **weights)
    eager = functools.partial(bench_swiglu_reward.eager, hidden, head, **weights, dropout=0.0)
    return Problem(ours, eager, [hidden, head, *weights.values()])


def loss(rows: int, sizes: Sizes) -> Problem:
    """The joint objective with its metrics; rows are pairs."""
    given = [torch.randn(rows).requires_grad_(i < 4) for i in range(6)]
    ours = functools.partial(preference_loss, *given)
    return Problem(ours, functools.partial(bench_preference_loss.eager, *given), given[:4])


def update(rows: int, sizes: Sizes) -> Problem:
    """An optimizer step on one matrix of this many rows."""
    lists = [[torch.rand(rows, sizes.columns)] for _ in range(5)]
    copies = [[x.clone() for x in tensors] for tensors in lists]

    def ours() -> Tensor:
        laprop(*lists, **LAPROP)
        return lists[0][0]

    def eager() -> Tensor:
        laprop_reference.forward(*copies, [], None, None, None, **LAPROP)
        return copies[0][0]

    return Problem(ours, eager)


def total_norm(rows: int, sizes: Sizes) -> Problem:
    """The norm of one gradient of this many rows, and the clip coefficient."""
    grads = [torch.randn(rows, sizes.columns)]

    def ours() -> list[Tensor]:
        norm, scale, _ = gradient_norm(grads, max_norm=1.0)
        return [norm, scale]

    def eager() -> list[Tensor]:
        norm = torch.nn.utils.get_total_norm(grads)
        return [norm, (1.0 / norm).clamp(max=1.0).view(1)]

    return Problem(ours, eager)


OPERATORS: dict[str, Callable[[int, Sizes], Problem]] = {
    "residual_norm, layer": functools.partial(norm, "layer"),
    "residual_norm, rms": functools.partial(norm, "rms"),
    "residual_norm, rms of heads": head_norm,
    "swiglu": functools.partial(gate, False),
    "swiglu, bias": functools.partial(gate, True),
    "rope_attention": functools.partial(attention, 0),
    f"rope_attention on {MEMORY} tokens": functools.partial(attention, MEMORY),
    "linear_logprob": logprob,
    "swiglu_reward": reward,
    "preference_loss": loss,
    "laprop": update,
    "gradient_norm": total_norm,
}


# Measuring


def step(run: Run, problem: Problem, upstream: Sequence[Tensor]) -> list[Tensor]:
    """Return the results, and with an upstream gradient the gradients of the leaves."""
    results = run()
    results = [results] if isinstance(results, Tensor) else list(results)
    if not upstream:
        return results
    return [*results, *torch.autograd.grad(results[: problem.differentiable], problem.leaves, upstream)]


def check(problem: Problem, upstream: Sequence[Tensor]) -> None:
    """Compare the results and gradients of both."""
    for got, want in zip(step(problem.ours, problem, upstream), step(problem.eager, problem, upstream), strict=True):
        error = (got.double() - want.double()).abs().max()
        assert error <= TOLERANCE * max(want.abs().max(), 1.0), f"off by {error:.2e}"


def seconds_of(call: Run, count: int) -> float:
    """Return the mean time of ``count`` calls in a row."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


class Figures(NamedTuple):
    """Medians of all turns, in microseconds, and the median of the turns' ratios of eager's time to ours."""

    ours: float
    eager: float
    ratio: float
    turns: int


def measure(problem: Problem, direction: str, seconds: float) -> Figures:
    """Time both in turns for about this time in total."""
    with torch.set_grad_enabled(direction != "forward"):
        upstream = []
        if direction != "forward":
            results = step(problem.eager, problem, [])
            upstream = [torch.randn_like(result) for result in results[: problem.differentiable]]
            upstream = [x if x.ndim else torch.ones(()) for x in upstream]
        check(problem, upstream)
        calls = [functools.partial(step, run, problem, upstream) for run in (problem.ours, problem.eager)]
        calls = calls if upstream else [problem.ours, problem.eager]
        once = [min(seconds_of(call, 1) for _ in range(3)) for call in calls]
        count = max(math.ceil(TURN / max(once)), 1)
        turns = min(max(int(seconds / (sum(once) * count)), 5), MOST_TURNS)
        times: list[list[float]] = [[], []]
        gc.disable()
        for turn in range(turns):
            for i in (0, 1) if turn % 2 else (1, 0):
                times[i].append(seconds_of(calls[i], count))
        gc.enable()
    ratios = [eager / ours for ours, eager in zip(*times, strict=True)]
    ours, eager = (1e6 * statistics.median(each) for each in times)
    return Figures(ours, eager, statistics.median(ratios), turns)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.small_calls",
        description="Time every operator on few rows against eager PyTorch on the CPU, in turns.",
        epilog="example: python -m benchmarks.small_calls swiglu --rows 1 2 4 --threads 1",
    )
    result.add_argument("operators", nargs="*", metavar="OPERATOR", help="begin of a name (default: all)")
    result.add_argument("--rows", nargs="+", type=int, default=list(ROWS), metavar="R", help=f"default: {ROWS}")
    threads = sorted({1, torch.get_num_threads()})
    result.add_argument("--threads", nargs="+", type=int, default=threads, metavar="N", help=f"default: {threads}")
    columns = [sizes.columns for sizes in SIZES]
    result.add_argument("--columns", nargs="+", type=int, default=columns, choices=columns, help=f"default: {columns}")
    result.add_argument("--seconds", type=float, default=1.0, help="of a figure, both contenders together (default: 1)")
    result.add_argument("--json", type=Path, metavar="FILE", help="keep all figures")
    result.add_argument("--output", type=Path, metavar="FILE", help="keep the table")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and return the exit code."""
    options = parser().parse_args(arguments)
    names = [name for name in OPERATORS if not options.operators or name.startswith(tuple(options.operators))]
    if not names:
        parser().error(f"expected the begin of one of {', '.join(OPERATORS)}; got {', '.join(options.operators)}")
    records, rows, lowest = [], [], math.inf
    for sizes, name, threads in itertools.product(SIZES, names, options.threads):
        if sizes.columns not in options.columns:
            continue
        torch.set_num_threads(threads)
        for direction in ("forward", "forward + backward"):
            cells = []
            for count in options.rows:
                torch.manual_seed(0)
                problem = OPERATORS[name](count, sizes)
                if direction != "forward" and not problem.leaves:
                    break
                figures = measure(problem, direction, options.seconds)
                labels = {"operator": name, "columns": sizes.columns, "direction": direction, "threads": threads}
                records.append({**labels, "rows": count, **figures._asdict()})
                cells.append(f"{figures.ratio:.2f} ({figures.ours:.4g} / {figures.eager:.4g})")
                lowest = min(lowest, figures.ratio)
            if cells:
                rows.append([name, sizes.columns, direction, threads, *cells])
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    table = markdown_table(["operator", "C", "passes", "threads", *map(str, options.rows)], rows)
    machine = {"device": device(), "torch": torch.__version__, "python": platform.python_version()}
    text = f"# Small calls\n\n{machine['device'].split(', ')[0]}, PyTorch {machine['torch']}.\n\n"
    text += "Columns are rows: eager's time over ours (ours / eager, microseconds).\n\n"
    text += f"{table}\n\nLowest: {lowest:.2f}; goal: {GOAL}.\n"
    print(text)
    if options.json:
        options.json.write_text(json.dumps({"machine_info": machine, "figures": records}, indent=1), encoding="utf-8")
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    return 0 if lowest >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
