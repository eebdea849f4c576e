"""Peak memory of a process that takes training steps on a Llama-family model, beyond that of its libraries.

    python -m benchmarks.peak_memory MODEL_DIRECTORY
    python -m benchmarks.peak_memory MODEL_DIRECTORY --who TRL
    python -m benchmarks.peak_memory MODEL_DIRECTORY --override lora.rank=16

prints JSON with bytes on the CPU: ``baseline``, the peak after a step of a tiny model, which has loaded all libraries;
``peak``, that after steps of the model; and ``estimate``, that of ``dph.train.budget`` for the model and its step, null
for a rival.
"""

import argparse
import json
import re
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.llama import TINY_LLAMA, save_llama
from benchmarks.train_step import FAMILY, FAMILY_TINY, FEW_PAIRS, Job, Ours, contenders

STEPS = 2


def resident() -> int:
    """Return the largest number of bytes that this process has had in memory.

    Linux's getrusage includes the process that started this one.
    """
    if Path("/proc/self/status").exists():
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.peak_memory",
        description="Print the peak memory of steps of stage align on a Llama-family model, as JSON.",
        epilog="example: python -m benchmarks.peak_memory models/SmolLM2-135M --who TRL",
    )
    result.add_argument("model", metavar="MODEL_DIRECTORY", help="a Llama-family model of transformers")
    result.add_argument("--who", default="ours", metavar="NAME", help="a contender of stage align, or its start")
    result.add_argument(
        "--override", metavar="KEY=VALUE", action="append", default=[], help="option of the recipe, for ours"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Take steps, print the figures and return the exit code."""
    options = parser().parse_args(arguments)
    contender = next((c for c in contenders("align", FAMILY.pad) if c.who.startswith(options.who)), None)
    if contender is None or contender.missing:
        got = options.who if contender is None else contender.missing
        print(f"benchmarks.peak_memory: --who: expected a contender of stage align, got {got}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        tiny = save_llama(Path(folder), TINY_LLAMA, torch.float32)
        adapters = [override for override in options.override if override.startswith("lora.")]  # another library
        contender.make(Job(stage="align", shape=FAMILY_TINY, model=tiny).with_overrides(*adapters)).step()
    baseline = resident()
    job = Job(stage="align", shape=FAMILY, model=options.model).with_overrides(*options.override)
    training = contender.make(job if contender.kind == "ours" else job.with_overrides(FEW_PAIRS))
    for _ in range(STEPS):
        training.step()
    peak = resident()
    estimate = training.estimated_peak() if isinstance(training, Ours) else None
    print(json.dumps({"baseline": baseline, "peak": peak, "estimate": estimate}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
