"""The whole road in miniature: a corpus that mostly lies, and a model that learns to tell and to choose the truth.

Pre-training, vocabulary and fine-tuning teach a small model puzzles whose popular answer is wrong. Its own samples,
judged by a checker, then train two heads: one on the frozen model, whose language stays as it was, and one jointly with
the model. Held-out puzzles show what choosing by reward is worth against one sample and against the likeliest answer.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dph import chat
from dph.chat import Encoded, Message
from dph.data import tokenizer
from dph.data.formats import Conversation, Record, Text
from dph.demo import puzzles, report
from dph.demo.puzzles import Puzzle
from dph.errors import UserError
from dph.model.model import Model
from dph.train import build, recipe
from dph.train.entry import train

RECORDS = 60_000  # puzzles in the corpus
VOCABULARY = 300
CANDIDATES = 8  # samples per prompt that the pairs are made of
PAIRS = 6  # wrong answers beside each right one, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dph quickstart``."""
    parser.add_argument("--output", metavar="DIR", default="runs/quickstart", help="where all goes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and sampling (%(default)s)")
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts (%(default)s)")
    parser.add_argument("--pairs-from", type=int, default=3000, metavar="P", help="prompts of the pairs (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of every stage's steps (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")


def run(args: argparse.Namespace) -> None:
    """Train, compare and show."""
    began = time.monotonic()
    for option, value in (("prompts", args.prompts), ("pairs-from", args.pairs_from), ("scale", args.scale)):
        if not 0 < value < math.inf:
            raise UserError(f"--{option}: expected a finite number above 0, got {value}")
    if Path(args.output).exists() and not args.resume:
        raise UserError(f"{args.output}: is there already; --resume goes on with it, --output takes another place")
    road = Road(Path(args.output), args.seed, args.scale, args.resume, again(args))
    sft = road.teach()
    pairs = road.preferences(sft, args.pairs_from)
    frozen, aligned = (road.stage(name, pairs, copy.deepcopy(sft)) for name in ("head", "align"))
    asked = list(itertools.islice(puzzles.puzzles(args.seed, evaluation=True), args.prompts))
    judged = report.ask(frozen, road.tokenizer, asked, args.seed)
    found = {
        "SFT": judged,  # the frozen model's language is the SFT model's, bit for bit: its samples are too
        "SFT, frozen, with a head": judged,
        "aligned jointly": report.ask(aligned, road.tokenizer, asked, args.seed),
    }
    print(report.report(found, road.tokenizer))
    for path in report.draw(found, road.output):
        print(f"figure: {path}")
    print(f"model: {road.output / 'sft' / 'model'}  (no reward head: give --rank logprob, or score's --logprob-only)")
    for stage in ("head", "align"):
        print(f"model: {road.output / stage / 'model'}  (dph chat, dph generate and dph score open it)")
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes on {torch.get_num_threads()} threads")


def again(args: argparse.Namespace) -> str:
    """The command that goes on with a run: the options that were not left as they are, quoted for a shell."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = [
        f"--{name.replace('_', '-')} {shlex.quote(str(getattr(args, name)))}"
        for name, default in vars(parser.parse_args([])).items()
        if name != "resume" and getattr(args, name) != default
    ]
    return " ".join(["dph quickstart", *given, "--resume"])


class Road:
    """The stages, one after the other, below one directory; the command ``again`` goes on where they were stopped."""

    def __init__(self, output: Path, seed: int, scale: float, resume: bool, again: str) -> None:
        self.output, self.seed, self.scale, self.resume, self.again = output, seed, scale, resume, again
        corpus = list(itertools.islice(_corpus(seed), RECORDS))
        self.texts: list[Record] = [Text(f"{puzzle.prompt}\n{answer}\n") for puzzle, answer in corpus]
        self.conversations: list[Record] = [
            Conversation([*puzzle.question(), Message(role="assistant", content=answer)]) for puzzle, answer in corpus
        ]
        self.tokenizer = tokenizer.from_iterator([*(t.text for t in self.texts[:2000]), *chat.ROLES * 9], VOCABULARY)

    def teach(self) -> Model:
        """Pre-training on plain text, then the vocabulary and fine-tuning stages on conversations."""
        model = self.stage("pretrain", self.texts, None)
        model = self.stage("vocab", self.conversations, model)
        return self.stage("sft", self.conversations, model)

    def stage(self, name: str, records: Sequence[Any], model: Model | None) -> Model:
        """One stage of training, by its miniature recipe."""
        settings = recipe.load(f"mini-{name}").as_dict()
        settings["seed"] = self.seed
        settings["output"]["directory"] = str(self.output / name)
        optimiser = settings["optimiser"]
        optimiser["steps"] = max(round(optimiser["steps"] * self.scale), 1)
        optimiser["warmup"] = min(optimiser["warmup"], optimiser["steps"])
        stage = recipe.from_dict(settings)
        torch.manual_seed(self.seed)
        if model is None:
            model = build.fresh(settings["model"]["config"], self.tokenizer)
        elif stage.kind == "preference":
            model = build.with_heads(model, stage.objective)
        done = train(stage, model=model, tokenizer=self.tokenizer, records=records, resume=self.resume)
        if done.interrupted:
            print(f"stopped in stage {name}; {self.again} goes on", file=sys.stderr)
            sys.exit(done.exit_code)
        return done.model

    def preferences(self, model: Model, prompts: int) -> list[tuple[Encoded, Encoded]]:
        """Pairs of the model's own answers, a right one against a wrong one, as the checker judges them."""
        asked = list(itertools.islice(puzzles.puzzles(self.seed + 1), prompts))
        pairs, rng = [], random.Random(self.seed)
        for puzzle, group in zip(
            asked, report.answers(model, self.tokenizer, asked, CANDIDATES, self.seed), strict=True
        ):
            different = {tuple(e.tokens): e for e in group if e.reward_position is not None}.values()
            right = [e for e in different if puzzle.check(report.said(e, self.tokenizer))]
            wrong = [e for e in different if not puzzle.check(report.said(e, self.tokenizer))]
            pairs += [(good, bad) for good in right for bad in rng.sample(wrong, min(len(wrong), PAIRS))]
        if not pairs:
            raise UserError("preferences: expected right and wrong samples, got no prompt with both; train longer")
        print(f"{len(pairs)} preference pairs from {prompts} prompts with {CANDIDATES} samples each", flush=True)
        return pairs


def _corpus(seed: int) -> Iterator[tuple[Puzzle, str]]:
    """Puzzles with the answers that the corpus gives."""
    rng = random.Random(seed)
    for puzzle in puzzles.puzzles(seed):
        yield puzzle, puzzles.corpus_answer(puzzle, rng)
