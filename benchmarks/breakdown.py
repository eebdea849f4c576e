"""Time per part of a training step: attention, matrix products, heads, optimiser, the rest.

    python -m benchmarks.breakdown align                        # ours, at the shape that bench_train_step.py times
    python -m benchmarks.breakdown sft --who paper_layout

Source is PyTorch's profiler: each operation's own time, on the device that computes. The time between operations is
Python and waiting. Products with the vocabulary count as heads.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import bench_train_step as bench
from benchmarks.train_step import Job, Stepping, contenders
from dph.evaluate.tables import table
from dph.train.cuda_graph import WARMUP_CALLS

STEPS = 3
PROFILERS_OWN = ("Command Buffer Full", "Activity Buffer Request", "Buffer Flush")  # events of the profiler itself
PARTS = {  # words of an operation's name; the first part that has one takes it
    "heads": ("linear_logprob", "swiglu_reward", "preference_loss", "log_softmax", "nll_loss", "cross_entropy"),
    "attention": ("rope_attention", "scaled_dot_product", "flash", "efficient_attention"),
    "optimiser": ("laprop", "gradient_norm", "_foreach", "addcdiv", "addcmul", "lerp", "linalg_vector_norm"),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "linear_pointwise", "mkldnn_linear", "gemm"),
}


def part_of(name: str, shapes: Sequence[Any], vocabulary: int) -> str:
    """Return the part of a step that an operation of this name and these input shapes belongs to."""
    part = next((part for part, words in PARTS.items() if any(word in name for word in words)), "other")
    with_vocabulary = any(isinstance(shape, list | tuple) and vocabulary in shape for shape in shapes)
    return "heads" if part == "products" and with_vocabulary else part


def split(events: Iterable[Any], vocabulary: int, cuda: bool) -> tuple[Counter[str], Counter[str]]:
    """Return microseconds of each part, and of each operation in "other"."""
    parts, rest = Counter(), Counter()
    for event in events:
        if event.device_type != DeviceType.CPU or event.key in PROFILERS_OWN:
            continue  # the time of a kernel is included in its operation
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        part = part_of(event.key, event.input_shapes, vocabulary)
        parts[part] += spent
        if part == "other":
            rest[event.key] += spent
    return parts, rest


def measure(training: Stepping, vocabulary: int) -> tuple[float, Counter[str], Counter[str]]:
    """Return seconds per step, and ``split`` of ``STEPS`` steps, after warming up."""
    cuda = bench.DEVICE == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(max(STEPS, WARMUP_CALLS + 1)):
        training.step()
    wait()
    began = time.perf_counter()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(STEPS):
            training.step()
        wait()
        seconds = (time.perf_counter() - began) / STEPS
    return seconds, *split(profiler.key_averages(group_by_input_shape=True), vocabulary, cuda)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.breakdown",
        description="Split a training step's time into its parts, by PyTorch's profiler.",
        epilog="example: python -m benchmarks.breakdown align --who ours",
    )
    result.add_argument("stage", choices=bench.STAGES, metavar="STAGE", help=", ".join(bench.STAGES))
    result.add_argument(
        "--who", default="ours", metavar="NAME", help="a contender of bench_train_step.py, or its start"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the parts and return the exit code."""
    options = parser().parse_args(arguments)
    available = contenders(options.stage, bench.SHAPE.pad)
    contender = next((c for c in available if c.who.startswith(options.who)), None)
    if contender is None:
        names = ", ".join(c.who for c in available)
        print(f"benchmarks.breakdown: --who: expected one of {names}; got {options.who}", file=sys.stderr)
        return 2
    if contender.missing:
        print(f"benchmarks.breakdown: {contender.who}: {contender.missing}", file=sys.stderr)
        return 2
    job = Job(stage=options.stage, shape=bench.SHAPE, device=bench.DEVICE, lowered=bench.LOWERED)
    seconds, parts, rest = measure(contender.make(job), job.config().vocab_size)
    parts["between"] = max(seconds * 1e6 * STEPS - parts.total(), 0)
    rows = [(part, spent / STEPS / 1e3, f"{100 * spent / parts.total():.0f}%") for part, spent in parts.most_common()]
    rows += [(f"  {name}", spent / STEPS / 1e3, f"{100 * spent / parts.total():.0f}%") for name, spent in
             rest.most_common(6)]  # fmt: skip
    print(f"{bench.title(options.stage)}, {contender.who}: {1e3 * seconds:.1f} ms a step, profiled")
    print(table(("part", "ms", "share"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
