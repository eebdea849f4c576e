"""The whole method in miniature: a corpus of mostly wrong answers, and a model that learns to choose the right ones.

Pre-training, vocabulary and fine-tuning teach a small model puzzles whose popular answer is wrong. A checker judges the
model's own samples, in two rounds of ``dph.improve``: the second one is about answers that mislead the head of the
first. They train two reward heads: one on the frozen model, whose language stays the same, and one jointly with the
model. Held-out puzzles compare the choice by reward with one sample and with the likeliest answer.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dph import chat
from dph.chat import Message
from dph.data import tokenizer
from dph.data.formats import Conversation, Record, Text
from dph.demo import puzzles, report
from dph.errors import printable
from dph.improve import rounds
from dph.improve.checkers import FunctionChecker
from dph.improve.figures import describe
from dph.improve.plan import Improvement
from dph.improve.prompts import Prompt
from dph.improve.selection import Selection
from dph.model.model import Model
from dph.train import build, recipe
from dph.train.entry import train

RECORDS = 60_000  # puzzles in the corpus
VOCABULARY = 300
CANDIDATES = (8, 32)  # samples of a prompt in each round of improvement
PAIRS = 1  # of a right and a wrong answer of a prompt and round: the hardest one
# More samples have more answers unlike those of training: the head compares them, on many pairs, without a margin.
HEAD = (
    "objective.objective=contrastive", "objective.dph_epsilon=0.02", "objective.dropout=0", "batch.size=256",
)  # fmt: skip


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
    frozen, head = stages.improve(pairs_from)
    aligned = stages.train_stage("align", None, sft)
    held_out = list(itertools.islice(puzzles.puzzles(seed, evaluation=True), prompts))
    frozen_samples = report.sample_and_check(frozen, stages.tokenizer, held_out, seed)
    results = {
        "SFT": frozen_samples,  # the frozen model's language equals the SFT model's, bit for bit: so do its samples
        "SFT, frozen, with a head": frozen_samples,
        "aligned jointly": report.sample_and_check(aligned, stages.tokenizer, held_out, seed),
    }
    figures = report.save_figures(results, output)  # before the first print, which a closed stdout ends
    lines = [report.report(results, stages.tokenizer), *(f"figure: {path}" for path in figures)]
    lines.append(f"model: {output / 'sft' / 'model'}  (no reward head: give --rank logprob, or score's --logprob-only)")
    for directory in (head, output / "align"):
        lines.append(f"model: {directory / 'model'}  (dph chat, dph generate and dph score open it)")
    print(printable("\n".join(lines)))
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes on {torch.get_num_threads()} threads")


class Quickstart:
    """The stages of one quickstart, each a run directory below ``output``."""

    def __init__(self, output: Path, seed: int, scale: float, resume: bool, resume_command: str) -> None:
        self.output, self.seed, self.scale = output, seed, scale
        self.resume, self.resume_command = resume, resume_command
        self.texts: list[Record] = []
        self.conversations: list[Record] = []
        self.pairs: list[Path] = []  # files of the rounds of improvement
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

    def recipe_of(self, name: str, *overrides: str) -> recipe.Recipe:
        """Return the miniature recipe of a stage with this quickstart's seed, directory and number of steps."""
        settings = recipe.load(f"mini-{name}", [f"seed={self.seed}", *overrides]).as_dict()
        settings["output"]["directory"] = str(self.output / name)
        optimiser = settings["optimiser"]
        optimiser["steps"] = max(round(optimiser["steps"] * self.scale), 1)
        optimiser["warmup"] = min(optimiser["warmup"], optimiser["steps"])
        return recipe.from_dict(settings)

    def train_stage(self, name: str, records: Sequence[Any] | None, model: Model | None) -> Model:
        """Train one stage by its miniature recipe, on ``records`` or on the pairs of all rounds."""
        sources = [{"source": str(path), "weight": "size"} for path in self.pairs] if records is None else []
        stage_recipe = self.recipe_of(name, f"data.sources={json.dumps(sources)}")
        torch.manual_seed(self.seed)
        if model is None:
            model = build.new_model(stage_recipe.model.config, self.tokenizer)
        elif stage_recipe.kind == "preference":
            model = build.with_heads(model, stage_recipe.objective)
        return self._train(stage_recipe, model=model, tokenizer=self.tokenizer, records=records).model

    def _train(self, stage_recipe: recipe.Recipe, **options: Any) -> Any:
        """Train a recipe, or continue its run; exits with the resume command if it is interrupted."""
        result = train(stage_recipe, resume=self.resume, **options)
        if result.interrupted:
            name = Path(stage_recipe.output.directory).relative_to(self.output)
            print(printable(f"stopped in stage {name}; {self.resume_command} continues it"), file=sys.stderr)
            sys.exit(result.exit_code)
        return result

    def improve(self, prompts: int) -> tuple[Model, Path]:
        """Train the frozen model's head on its own answers to ``prompts`` prompts; return it and its run directory."""
        asked = {puzzle.prompt: puzzle for puzzle in itertools.islice(puzzles.puzzles(self.seed + 1), prompts)}
        plan = Improvement(
            model=str(self.output / "sft" / "model"),
            prompts=[Prompt(puzzle.question(), {"puzzle": puzzle.prompt}, puzzle.prompt) for puzzle in asked.values()],
            checker=FunctionChecker(lambda row, answer: asked[row["puzzle"]].check(answer), "puzzle"),
            judge="puzzles",
            recipe=self.recipe_of("head", *HEAD),
            directory=self.output / "improve",
            n=CANDIDATES,
            selection=Selection(most=PAIRS, seed=self.seed),
            sampling={"max_new_tokens": report.ANSWER_TOKENS},
            seed=self.seed,
        )
        for metrics in rounds.improve(plan, len(CANDIDATES), self._train):
            if metrics["round"]:  # on stderr, since a closed stdout must not end a run of minutes
                print(describe(metrics), file=sys.stderr)
        self.pairs = [plan.records(i + 1) for i in range(len(CANDIDATES))]
        model, _ = plan.open(len(CANDIDATES))
        return model, plan.folder(len(CANDIDATES)) / "run"
