"""Real multiple-choice records answered by ours and by lm-evaluation-harness: choices, time and memory.

    python -m benchmarks.task_rival MODEL --directory DIR --tasks arc/easy boolq --limit 200

The prompts are the same tokens (``dph.chat``), the score is the summed log-probability of the answer with its
end-of-turn token, in fp32. Each way is a process of its own, one after the other: ``model.judge``, and the
harness's ``HFLM`` on transformers' model by batch. The time is that of judging alone; the peak memory is that beyond
the libraries'. A record on which they choose differently is printed with the difference of its two best scores. DIR has
TASK/SPLIT.jsonl; of the splits test, validation and train the first that is there. Needs lm-eval.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_judging import Harness, Ours
from benchmarks.peak_memory import resident
from dph.evaluate.tables import table

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ("test", "validation", "train")
OURS = "ours"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every way in a process of its own, and print the table, the differing records and the figures as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.task_rival",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a Llama-family directory of transformers with a chat template")
    parser.add_argument("--directory", required=True, metavar="DIR", help="folder of TASK/SPLIT.jsonl")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="such as arc/easy")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="first records of each (default: 200)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="B", help="of the harness")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one is not None:
        print(json.dumps(judge(args)))
        return 0
    found = {}
    for way in (OURS, *map(str, args.batches)):
        command = [sys.executable, "-m", "benchmarks.task_rival", args.model, "--directory", args.directory]
        command += ["--tasks", *args.tasks, "--limit", str(args.limit), "--one", way]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    rows = []
    for way, figures in found.items():
        differing = differences(found[OURS]["scores"], figures["scores"])
        name = OURS if way == OURS else f"harness, batches of {way}"
        speed = figures["records"] / figures["seconds"]
        rows.append({"way": name, "records/s": speed, "peak MB": figures["peak MB"], "other choices": len(differing)})
        for place, margin in differing:
            print(f"{name}: record {place} is answered otherwise; its two best scores differ by {margin:.1e} nats")
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    print(json.dumps({"tasks": args.tasks, "limit": args.limit, "rows": rows}))
    return 0


def judge(args: argparse.Namespace) -> dict[str, Any]:
    """Judge all records in one way, and return the scores and figures."""
    from dph import chat, tasks
    from dph.data.dataset import task_documents
    from dph.model.loading import load_tokenizer

    tokenizer, groups = load_tokenizer(args.model), []
    for name in args.tasks:
        split = next(split for split in SPLITS if Path(args.directory, name, f"{split}.jsonl").is_file())
        task, documents = tasks.load(name), task_documents(tasks.load(name), split, args.directory)
        for i in range(min(args.limit, len(documents))):
            groups.append([chat.encode(one, tokenizer, last_only=True) for one in task.choices(documents[i])])
    model = Ours(args.model, torch.float32) if args.one == OURS else Harness(args.model, torch.float32, int(args.one))
    before, began = resident(), time.perf_counter()
    scores = model.logprobs(groups)
    seconds = time.perf_counter() - began
    return {"scores": scores, "seconds": seconds, "records": len(groups), "peak MB": (resident() - before) / 1e6}


def differences(expected: Sequence[Sequence[float]], got: Sequence[Sequence[float]]) -> list[tuple[int, float]]:
    """Return index and difference of the two best scores of each record whose best choice is another."""
    found = []
    for index, (one, other) in enumerate(zip(expected, got, strict=True)):
        if one.index(max(one)) != other.index(max(other)):
            best = sorted(one)
            found.append((index, best[-1] - best[-2]))
    return found


if __name__ == "__main__":
    sys.exit(main())
