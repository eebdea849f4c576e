"""Best-of-N answers in the terminal, for ``dph generate`` and ``dph chat``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from dph.chat import Message
from dph.errors import UserError
from dph.evaluate.tables import table
from dph.infer.best_of_n import Candidate, best_of_n, check_rank
from dph.model.model import Model

WITHOUT_HEAD = "--rank logprob, or -n 1, needs no rewards"
CUT_OFF = "not finished: cut off by --max-new-tokens, so without a reward and ranked last"


class Answerer:
    """Best-of-N sampling with the options of the command line.

    Candidates have rewards if the model has the head. A single answer, and answers ranked by log-probability, do not
    need it.

    Attributes:
        system: the message of ``--system``, as a list of at most one.
    """

    def __init__(self, model: Model, tokenizer: Any, args: argparse.Namespace) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.n, self.rank, self.risk, self.seed = args.n, args.rank, args.risk, args.seed
        self.system = [] if args.system is None else [Message(role="system", content=args.system)]
        self.sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
        has_head = args.head in model.head_names and args.head not in model.untrained_heads
        self.head = args.head if has_head else None
        if self.rank == "lower_bound" and self.n > 1:
            try:
                check_rank(model, self.head, self.rank)
            except ValueError as error:
                raise UserError(f"--rank: {error}") from None
        else:
            self.rank = "reward" if self.rank == "lower_bound" else self.rank

    def candidates(self, messages: Sequence[Message]) -> list[Candidate]:
        """Return N answers, best first."""
        return best_of_n(
            self.model, self.tokenizer, messages, self.n,
            head=self.head, rank=self.rank, risk=self.risk, seed=self.seed, **self.sampling,
        )  # fmt: skip


def required_head(args: argparse.Namespace) -> str | None:
    """Return the head that the options need, or None."""
    return args.head if args.n > 1 and args.rank != "logprob" else None


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
