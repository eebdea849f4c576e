"""Best-of-N answers in the terminal, for ``dph generate`` and ``dph chat``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from dph.chat import Message
from dph.cli import common, results
from dph.errors import UserError
from dph.evaluate.best_of import NORMALISERS
from dph.evaluate.tables import table
from dph.infer.best_of_n import Candidate, Choice, best_of_n_each, prompt_tokens
from dph.infer.sampling import Sampling

WITHOUT_HEAD = "--rank logprob, or -n 1, needs no rewards"
CUT_OFF = "not finished: cut off by --max-new-tokens, so without a reward and ranked last"
ADAPTIVE = ("confidence", "round_size", "prune_every")
PRUNED = "dropped: by --prune-every, before its end"


class Answerer:
    """Best-of-N sampling with the options of the command line; opens the model.

    Candidates have rewards if the model has a head. A single answer, and answers ranked by log-probability, need none.

    Attributes:
        choice: how many answers are sampled, and how they are ranked.
        system: the message of ``--system``, as a list of at most one.

    Raises UserError for a head that the model lacks, and if the options need one that it lacks.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        needs_head = (args.n > 1 and args.rank != "logprob") or not (args.confidence is args.prune_every is None)
        values = [] if args.head is None else [args.head]
        self.model, self.tokenizer, names = common.open_model(
            args, values if values or needs_head else None, WITHOUT_HEAD
        )
        if len(names) > 1:
            raise UserError(f"--head: expected one head, got a run of {', '.join(names)}: give {args.head}/heads/NAME")
        if not names:  # none is needed
            names = [name for name in self.model.head_names[:1] if name not in self.model.untrained_heads]
        self.normalise, self.seed = args.normalise, args.seed
        self.system = [] if args.system is None else [Message(role="system", content=args.system)]
        self.sampling = {field.name: getattr(args, field.name) for field in fields(Sampling)}
        self.choice = Choice(
            n=args.n, head=names[0] if names else None, rank=args.rank if args.n > 1 else "reward", risk=args.risk,
            normalise=NORMALISERS[args.normalise], confidence=args.confidence, round_size=args.round_size,
            prune_every=args.prune_every,
        )  # fmt: skip
        try:
            self.choice.check(self.model)
        except ValueError as error:
            raise UserError(f"--{error}") from None

    def check(self, messages: Sequence[Message], where: str) -> None:
        """Raise UserError, which begins with ``where``, for a prompt that the format refuses or that is too long."""
        prompt_tokens(self.model, self.tokenizer, messages, self.sampling["max_new_tokens"], where)

    def about(self) -> dict[str, Any]:
        """Return what the answers depend on, as JSON."""
        choice = self.choice
        model = results.about_model(self.model, self.tokenizer, [] if choice.head is None else [choice.head])
        ranking = {name: getattr(choice, name) for name in ("n", "rank", "risk", *ADAPTIVE)}
        return {**model, **ranking, "normalise": self.normalise, "seed": self.seed, **self.sampling}

    def candidates(self, conversations: Sequence[Sequence[Message]]) -> Iterator[list[Candidate]]:
        """Yield N answers to each conversation, best first."""
        return best_of_n_each(self.model, self.tokenizer, conversations, self.choice, seed=self.seed, **self.sampling)


def candidate_table(candidates: Sequence[Candidate]) -> str:
    """Return a table of candidates; without a reward the cell is "-", and a last line explains the cut-off ones."""
    rows, has_spread = [], any(candidate.spread > 0 for candidate in candidates)
    for rank, candidate in enumerate(candidates, 1):
        reward = None if math.isnan(candidate.reward) else candidate.reward
        finished = "dropped" if candidate.pruned else "yes" if candidate.finished else "no"
        spread = [None if math.isnan(candidate.spread) else candidate.spread] if has_spread else []
        rows.append([rank, reward, *spread, candidate.logprob, finished, candidate.text])
    titles = ["rank", "reward", *(["spread"] if has_spread else []), "log-probability", "finished", "text"]
    text = table(titles, rows)
    if not all(candidate.finished or candidate.pruned for candidate in candidates):
        text += f"\n{CUT_OFF}"
    if any(candidate.pruned for candidate in candidates):
        text += f"\n{PRUNED}"
    return text
