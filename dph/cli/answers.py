"""Best-of-N answers in the terminal, for ``dph generate`` and ``dph chat``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from dph import chat
from dph.chat import Message
from dph.cli import common, results
from dph.errors import UserError
from dph.evaluate.tables import table
from dph.infer.best_of_n import Candidate, best_of_n, check_rank

WITHOUT_HEAD = "--rank logprob, or -n 1, needs no rewards"
CUT_OFF = "not finished: cut off by --max-new-tokens, so without a reward and ranked last"


class Answerer:
    """Best-of-N sampling with the options of the command line; opens the model.

    Candidates have rewards if the model has a head. A single answer, and answers ranked by log-probability, need none.

    Attributes:
        head: name of the head; None for none.
        system: the message of ``--system``, as a list of at most one.

    Raises UserError for a head that the model lacks, and if the options need one that it lacks.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        needs_head = args.n > 1 and args.rank != "logprob"
        values = [] if args.head is None else [args.head]
        self.model, self.tokenizer, names = common.open_model(
            args, values if values or needs_head else None, WITHOUT_HEAD
        )
        if len(names) > 1:
            raise UserError(f"--head: expected one head, got a run of {', '.join(names)}: give {args.head}/heads/NAME")
        if not names:  # none is needed
            names = [name for name in self.model.head_names[:1] if name not in self.model.untrained_heads]
        self.head = names[0] if names else None
        self.n, self.rank, self.risk, self.seed = args.n, args.rank, args.risk, args.seed
        self.system = [] if args.system is None else [Message(role="system", content=args.system)]
        self.sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
        if self.rank == "lower_bound" and self.n > 1:
            try:
                check_rank(self.model, self.head, self.rank)
            except ValueError as error:
                raise UserError(f"--rank: {error}") from None
        else:
            self.rank = "reward" if self.rank == "lower_bound" else self.rank

    def check(self, messages: Sequence[Message], where: str) -> None:
        """Raise UserError, which begins with ``where``, for a prompt that the format refuses or that is too long."""
        try:
            size = len(chat.prompt(messages, self.tokenizer))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        context, room = getattr(self.model.backbone, "context", None), self.sampling["max_new_tokens"]
        if context is not None and size + room > context:
            raise UserError(
                f"{where}: expected at most {context} tokens, the model's context, with --max-new-tokens {room}, "
                f"got a prompt of {size}"
            )

    def about(self) -> dict[str, Any]:
        """Return what the answers depend on, as JSON."""
        model = results.about_model(self.model, self.tokenizer, [] if self.head is None else [self.head])
        return {**model, "n": self.n, "rank": self.rank, "risk": self.risk, "seed": self.seed, **self.sampling}

    def candidates(self, messages: Sequence[Message]) -> list[Candidate]:
        """Return N answers, best first."""
        return best_of_n(
            self.model, self.tokenizer, messages, self.n,
            head=self.head, rank=self.rank, risk=self.risk, seed=self.seed, **self.sampling,
        )  # fmt: skip


def candidate_table(candidates: Sequence[Candidate]) -> str:
    """Return a table of candidates; without a reward the cell is "-", and a last line explains the cut-off ones."""
    rows, has_spread = [], any(candidate.spread > 0 for candidate in candidates)
    for rank, candidate in enumerate(candidates, 1):
        reward = None if math.isnan(candidate.reward) else candidate.reward
        finished = "yes" if candidate.finished else "no"
        spread = [None if math.isnan(candidate.spread) else candidate.spread] if has_spread else []
        rows.append([rank, reward, *spread, candidate.logprob, finished, candidate.text])
    titles = ["rank", "reward", *(["spread"] if has_spread else []), "log-probability", "finished", "text"]
    text = table(titles, rows)
    if not all(candidate.finished for candidate in candidates):
        text += f"\n{CUT_OFF}"
    return text
