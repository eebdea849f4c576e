"""A reward model trained in four ways on the same backbone and pairs: time, memory and held-out accuracy.

    python -m benchmarks.reward_rival MODEL pairs.jsonl --pairs 400 --held-out 300

    ours, frozen    recipe ``head``: the states are computed once, up to 500 steps on them
    ours, LoRA      stage align without the language-model loss: adapters and a head
    TRL, LoRA       TRL's RewardTrainer with the same adapters, on transformers' sequence classifier
    TRL, full       the same, all weights

Adapters and weights see each pair once, ``--micro`` pairs at a time, with one learning rate per way (``RATES``). Each
way is a process of its own, one after the other; its time includes reading the model, its peak memory is that beyond
the libraries'. Pairs are drawn from the file by prompt, so that no held-out prompt is trained on. Needs trl and peft.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peak_memory import resident
from dph.data.formats import parse_record
from dph.data.json_lines import read_jsonl
from dph.data.sampler import draw
from dph.data.sources import prompt_key
from dph.evaluate.metrics import wilson
from dph.evaluate.tables import table

ROOT = Path(__file__).resolve().parents[1]
# Peak learning rates: the recipe's, PEFT's usual one for both LoRAs, and TRL's for all weights a tenth of its default,
# with which the loss rises here.
RATES = {"ours, frozen": 1e-3, "ours, LoRA": 2e-4, "TRL, LoRA": 2e-4, "TRL, full": 1e-5}
RANK = 16
STEP = 8  # pairs of an optimizer step


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every way in a process of its own, and print the table and then the figures as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reward_rival",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a Llama-family directory of transformers")
    parser.add_argument("source", metavar="PAIRS", help="JSON lines with prompt, chosen and rejected")
    parser.add_argument("--pairs", type=int, default=400, metavar="N", help="pairs to train on (default: 400)")
    parser.add_argument("--held-out", type=int, default=300, metavar="N", help="pairs to judge (default: 300)")
    parser.add_argument("--micro", type=int, default=2, metavar="N", help="pairs of a forward pass (default: 2)")
    parser.add_argument("--rate", type=float, metavar="LR", help="peak learning rate (default: RATES of the way)")
    parser.add_argument("--ways", nargs="+", default=list(RATES), metavar="WAY", help="(default: all four)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one is not None:
        print(json.dumps(train(args)))
        return 0
    rows = []
    for way in args.ways:
        own = [args.model, args.source, f"--pairs={args.pairs}", f"--held-out={args.held_out}", f"--micro={args.micro}"]
        command = [sys.executable, "-m", "benchmarks.reward_rival", *own, "--one", way]
        command += [f"--rate={RATES[way] if args.rate is None else args.rate}"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"way": way, **json.loads(done.stdout.splitlines()[-1])})
    fields = ["way", "seconds", "peak MB", "accuracy"]
    print(table([*fields, "95% interval"], [[*(row[key] for key in fields), row["interval"]] for row in rows]))
    print(json.dumps(rows))
    return 0


def split(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows to train on and those to judge, in an order that is the same in every run."""
    keyed = []
    for i, row in enumerate(read_jsonl(args.source)):
        key = prompt_key(parse_record(row, "preference", f"record {i}"))
        keyed.append((draw(2**32, "held out", key) < 2**32 // 5, draw(2**32, "order", str(i)), row))
    keyed.sort(key=lambda entry: entry[:2])
    trained, judged = ([row for is_held, _, row in keyed if is_held == held] for held in (False, True))
    if len(trained) < args.pairs or len(judged) < args.held_out:
        sys.exit(
            f"{args.source}: expected {args.pairs} and {args.held_out} pairs, got {len(trained)} and {len(judged)}"
        )
    return trained[: args.pairs], judged[: args.held_out]


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train in one way, and return its figures."""
    trained, judged = split(args)
    who, form = args.one.split(", ")
    load_libraries(who)
    with tempfile.TemporaryDirectory() as folder:
        before, began = resident(), time.perf_counter()
        right = (ours if who == "ours" else trl)(args, form, Path(folder), trained, judged)
    found = wilson(right, len(judged))
    figures = {"seconds": time.perf_counter() - began, "peak MB": (resident() - before) / 1e6}
    return {**figures, "accuracy": found.value, "interval": found.range, "rate": args.rate}


def load_libraries(who: str) -> None:
    """Import what training needs, so that its memory is not counted."""
    if who == "ours":
        import peft

        import dph.model.model
        import dph.train.trainer  # noqa: F401
    else:
        import datasets  # noqa: F401
        import peft  # noqa: F401
        import trl  # noqa: F401


def ours(args: argparse.Namespace, form: str, folder: Path, trained: list[Any], judged: list[Any]) -> float:
    """Train by a recipe, and return how many held-out pairs are judged right; a tie is half right."""
    from dph import chat
    from dph.train import recipe
    from dph.train.entry import train as run

    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trained), encoding="utf-8")
    changes = [f"model.path={args.model}", f"data.sources=[{folder / 'train.jsonl'}]", f"output.directory={folder}/run"]
    changes.append(f"optimiser.lr={args.rate}")
    if form == "LoRA":
        steps = args.pairs // STEP
        changes += [
            f"lora.rank={RANK}", f"optimiser.steps={steps}", f"optimiser.warmup={steps // 10}",
            "optimiser.prior_decay=0", f"batch={{size: {STEP}, micro: {args.micro}, tokens: null}}",
            "objective.dpo_weight=0", "objective.pooler=identity", "evaluation={every: 0, sources: []}",
            "output.save_every=0",
        ]  # fmt: skip
    result = run(recipe.load("head" if form == "frozen" else "align", changes), quiet=True)
    groups = []
    for i, row in enumerate(judged):
        record = parse_record(row, "preference", f"record {i}")
        groups.append(
            [chat.encode(side, result.tokenizer, last_only=True) for side in (record.chosen, record.rejected)]
        )
    right = 0.0
    for found in result.model.eval().judge(groups, 8192, logprobs=False):
        chosen, rejected = found.rewards["default"]
        right += (chosen > rejected) + (chosen == rejected) / 2
    return right


def trl(args: argparse.Namespace, form: str, folder: Path, trained: list[Any], judged: list[Any]) -> float:
    """Train by TRL's RewardTrainer, and return how many held-out pairs are judged right; a tie is wrong."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    def conversations(rows: list[Any]) -> Dataset:
        records = [parse_record(row, "preference", f"record {i}") for i, row in enumerate(rows)]
        return Dataset.from_list([{"chosen": record.chosen, "rejected": record.rejected} for record in records])

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    adapters = LoraConfig(
        "SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", modules_to_save=["score"]
    )
    config = RewardConfig(
        str(folder), learning_rate=args.rate, per_device_train_batch_size=args.micro, num_train_epochs=1,
        gradient_accumulation_steps=STEP // args.micro, per_device_eval_batch_size=args.micro, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", logging_steps=10, seed=0,
        warmup_steps=args.pairs // STEP // 10, lr_scheduler_type="cosine", disable_tqdm=True, max_length=None,
    )  # fmt: skip
    trainer = RewardTrainer(
        model, config, train_dataset=conversations(trained), eval_dataset=conversations(judged),
        processing_class=tokenizer, peft_config=adapters if form == "LoRA" else None,
    )  # fmt: skip
    trainer.train()
    return trainer.evaluate()["eval_accuracy"] * len(judged)


if __name__ == "__main__":
    sys.exit(main())
