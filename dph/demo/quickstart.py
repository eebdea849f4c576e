"""The whole method in miniature: a corpus of mostly wrong answers, and a model that learns to choose the right ones.

Pre-training, vocabulary and fine-tuning teach a small model puzzles whose popular answer is wrong. A checker judges the
model's own samples, and these train two reward heads: one on the frozen model, whose language stays the same, and one
jointly with the model. Held-out puzzles compare the choice by reward with one sample and with the likeliest answer.
"""

from __future__ import annotations

import copy
import itertools
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dph import chat
from dph.chat import Encoded, Message
from dph.data import tokenizer
from dph.data.formats import Conversation, Record, Text
from dph.demo import puzzles, report
from dph.errors import UserError, printable
from dph.model.model import Model
from dph.train import build, recipe
from dph.train.entry import train

RECORDS = 60_000  # puzzles in the corpus
VOCABULARY = 300
CANDIDATES = 8  # samples per prompt for the preference pairs
PAIRS = 6  # wrong answers per right one, at most


def run(
    output: Path, *, seed: int, prompts: int, pairs_from: int, scale: float, resume: bool, resume_command: str
) -> None:
    """Train all stages below ``output``, compare the models and print the results.

    Args:
        output: directory of all runs and figures.
        seed: of weights, data and sampling.
        prompts: number of held-out prompts.
        pairs_from: number of prompts that the preference pairs are sampled for.
        scale: factor of every stage's steps.
        resume: continue interrupted stages.
        resume_command: command that is printed if a stage is interrupted.
    """
    began = time.monotonic()
    stages = Quickstart(output, seed, scale, resume, resume_command)
    sft = stages.train_language_model()
    pairs = stages.sample_preferences(sft, pairs_from)
    frozen = stages.train_stage("head", pairs, copy.deepcopy(sft))
    aligned = stages.train_stage("align", pairs, copy.deepcopy(sft))
    held_out = list(itertools.islice(puzzles.puzzles(seed, evaluation=True), prompts))
    frozen_samples = report.sample_and_check(frozen, stages.tokenizer, held_out, seed)
    results = {
        "SFT": frozen_samples,  # the frozen model's language equals the SFT model's, bit for bit: so do its samples
        "SFT, frozen, with a head": frozen_samples,
        "aligned jointly": report.sample_and_check(aligned, stages.tokenizer, held_out, seed),
    }
    figures = report.save_figures(results, output)  # before the first print: nobody may read the output
    lines = [report.report(results, stages.tokenizer), *(f"figure: {path}" for path in figures)]
    lines.append(f"model: {output / 'sft' / 'model'}  (no reward head: give --rank logprob, or score's --logprob-only)")
    for name in ("head", "align"):
        lines.append(f"model: {output / name / 'model'}  (dph chat, dph generate and dph score open it)")
    print(printable("\n".join(lines)))
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes on {torch.get_num_threads()} threads")


class Quickstart:
    """The stages of one quickstart, each a run directory below ``output``."""

    def __init__(self, output: Path, seed: int, scale: float, resume: bool, resume_command: str) -> None:
        self.output, self.seed, self.scale = output, seed, scale
        self.resume, self.resume_command = resume, resume_command
        self.texts: list[Record] = []
        self.conversations: list[Record] = []
        rng = random.Random(seed)
        for puzzle in itertools.islice(puzzles.puzzles(seed), RECORDS):
            answer = puzzles.corpus_answer(puzzle, rng)
            self.texts.append(Text(f"{puzzle.prompt}\n{answer}\n"))
            self.conversations.append(Conversation([*puzzle.question(), Message(role="assistant", content=answer)]))
        vocabulary_texts = [record.text for record in self.texts[:2000]]
        self.tokenizer = tokenizer.from_iterator([*vocabulary_texts, *chat.ROLES * 9], VOCABULARY)

    def train_language_model(self) -> Model:
        """Pre-train on plain text, then train the vocabulary and fine-tune on conversations."""
        model = self.train_stage("pretrain", self.texts, None)
        model = self.train_stage("vocab", self.conversations, model)
        return self.train_stage("sft", self.conversations, model)

    def train_stage(self, name: str, records: Sequence[Any], model: Model | None) -> Model:
        """Train one stage by its miniature recipe; exits with the resume command if it is interrupted."""
        settings = recipe.load(f"mini-{name}").as_dict()
        settings["seed"] = self.seed
        settings["output"]["directory"] = str(self.output / name)
        optimiser = settings["optimiser"]
        optimiser["steps"] = max(round(optimiser["steps"] * self.scale), 1)
        optimiser["warmup"] = min(optimiser["warmup"], optimiser["steps"])
        stage_recipe = recipe.from_dict(settings)
        torch.manual_seed(self.seed)
        if model is None:
            model = build.new_model(settings["model"]["config"], self.tokenizer)
        elif stage_recipe.kind == "preference":
            model = build.with_heads(model, stage_recipe.objective)
        result = train(stage_recipe, model=model, tokenizer=self.tokenizer, records=records, resume=self.resume)
        if result.interrupted:
            print(printable(f"stopped in stage {name}; {self.resume_command} continues it"), file=sys.stderr)
            sys.exit(result.exit_code)
        return result.model

    def sample_preferences(self, model: Model, prompts: int) -> list[tuple[Encoded, Encoded]]:
        """Return pairs (right, wrong) of the model's own answers, by the checker's judgement."""
        asked = list(itertools.islice(puzzles.puzzles(self.seed + 1), prompts))
        groups = report.sample_answers(model, self.tokenizer, asked, CANDIDATES, self.seed)
        pairs, rng = [], random.Random(self.seed)
        for puzzle, answers in zip(asked, groups, strict=True):
            right, wrong = [], []
            finished = [answer for answer in answers if answer.reward_position is not None]
            for answer in {tuple(answer.tokens): answer for answer in finished}.values():  # without duplicates
                correct = puzzle.check(report.answer_text(answer, self.tokenizer))
                (right if correct else wrong).append(answer)
            for answer in right:
                pairs += [(answer, other) for other in rng.sample(wrong, min(len(wrong), PAIRS))]
        if not pairs:
            raise UserError("preferences: expected right and wrong samples, got no prompt with both; train longer")
        # On stderr, since a closed stdout must not end a run of minutes.
        print(f"{len(pairs)} preference pairs from {prompts} prompts with {CANDIDATES} samples each", file=sys.stderr)
        return pairs
