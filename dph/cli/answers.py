"""Best-of-N answers in the terminal, for ``dph generate`` and ``dph chat``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from dph.chat import Message
from dph.evaluate.tables import table
from dph.infer.best_of_n import Candidate, best_of_n
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
        self.n, self.rank, self.seed = args.n, args.rank, args.seed
        self.system = [] if args.system is None else [Message(role="system", content=args.system)]
        self.sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
        has_head = args.head in model.head_names and args.head not in model.untrained_heads
        self.head = args.head if has_head else None

    def candidates(self, messages: Sequence[Message]) -> list[Candidate]:
        """Return N answers, best first."""
        ranked = best_of_n(
            self.model, self.tokenizer, messages, self.n, head=self.head, seed=self.seed, **self.sampling
        )
        if self.rank == "logprob":
            ranked = sorted(ranked, key=lambda candidate: (candidate.finished, candidate.logprob), reverse=True)
        return ranked


def required_head(args: argparse.Namespace) -> str | None:
    """Return the head that the options need, or None."""
    return args.head if args.n > 1 and args.rank == "reward" else None


def candidate_table(candidates: Sequence[Candidate]) -> str:
    """Return a table of candidates; without a reward the cell is "-", and a last line explains the cut-off ones."""
    rows = []
    for rank, candidate in enumerate(candidates, 1):
        reward = None if math.isnan(candidate.reward) else candidate.reward
        finished = "yes" if candidate.finished else "no"
        rows.append([rank, reward, candidate.logprob, finished, candidate.text])
    text = table(["rank", "reward", "log-probability", "finished", "text"], rows)
    if not all(candidate.finished for candidate in candidates):
        text += f"\n{CUT_OFF}"
    return text
