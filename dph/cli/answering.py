"""``dph generate`` and ``dph chat``: best-of-N in the terminal."""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dph import chat as chats
from dph.chat import Message
from dph.cli.models import check_head, dumps, open_model
from dph.data.sources import JsonLines
from dph.errors import UserError
from dph.evaluate.tables import printable, table
from dph.infer.best_of_n import Candidate, best_of_n
from dph.model.model import Model

HINT = "--rank logprob, or -n 1, does without rewards"
CUT_OFF = "not finished: cut off by --max-new-tokens, so without a reward and ranked last"


class Answerer:
    """Samples N answers to a conversation, best first, as the command line asked for.

    Rewards are there where the model has the head. A single answer, and answers ranked by log-probability, need none.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.model, self.tokenizer = open_model(args)
        self.n, self.head, self.rank, self.seed = args.n, args.head, args.rank, args.seed
        self.start = [] if args.system is None else [Message(role="system", content=args.system)]
        self.sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
        if self.n > 1 and self.rank == "reward":
            check_head(self.model, self.head, HINT)
        self.judged = can_judge(self.model, self.head)

    def __call__(self, messages: Sequence[Message]) -> list[Candidate]:
        """The candidates, best first."""
        head = self.head if self.judged else None
        found = best_of_n(self.model, self.tokenizer, messages, self.n, head=head, seed=self.seed, **self.sampling)
        return found if self.rank == "reward" else sorted(found, key=lambda c: (c.finished, c.logprob), reverse=True)


def can_judge(model: Model, head: str) -> bool:
    """Whether the model has the head, with weights."""
    return head in model.head_names and head not in model.untrained_heads


def show(candidates: Sequence[Candidate]) -> str:
    """The candidates as a table; a reward that is not there is "-", and a line below says why of those cut off."""
    headers = ["rank", "reward", "log-probability", "finished", "text"]
    shown = table(headers, [[i, *_row(c)] for i, c in enumerate(candidates, 1)])
    return shown if all(c.finished for c in candidates) else f"{shown}\n{CUT_OFF}"


def _row(c: Candidate) -> list[Any]:
    return [None if math.isnan(c.reward) else c.reward, c.logprob, "yes" if c.finished else "no", c.text]


def generate(args: argparse.Namespace) -> None:
    """``dph generate``."""
    prompts = [asked(args.prompt, "--prompt")] if args.file is None else read_prompts(args.file)
    answer = Answerer(args)
    for i, messages in enumerate(prompts):
        candidates = answer(messages if messages[0]["role"] == "system" else answer.start + messages)
        if args.json:
            kept = ("text", "reward", "logprob", "mean_logprob", "finished")
            lines = [{key: value for key, value in asdict(c).items() if key in kept} for c in candidates]
            print(dumps({"messages": messages, "candidates": lines}), flush=True)
        else:
            title = printable(messages[-1]["content"], "\n\t") + "\n\n" if len(prompts) > 1 else ""
            print(("\n\n" if i else "") + title + show(candidates), flush=True)


def read_prompts(path: str) -> list[list[Message]]:
    """The conversations of a JSONL file, each with ``prompt`` (text or messages) or ``messages``."""
    prompts, lines = [], JsonLines(path)
    for i, fields in enumerate(lines):
        where = lines.where(i)
        found = fields.get("prompt", fields.get("messages"))
        if found is None:
            raise UserError(f"{where}: expected prompt or messages, got the fields {', '.join(fields) or '(none)'}")
        prompts.append(asked(found, where))
    if not prompts:
        raise UserError(f"{path}: expected at least one prompt, got none")
    return prompts


def asked(prompt: str | Sequence[Mapping[str, Any]], where: str) -> list[Message]:
    """Messages that an answer can follow."""
    messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    chats.check(messages, where)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: expected a message to answer at the end, got the assistant's own")
    return [Message(role=m["role"], content=m["content"]) for m in messages]


def chat(args: argparse.Namespace) -> None:
    """``dph chat``: every line of stdin is a turn. Ctrl-C in a terminal stops an answer, and takes its turn back."""
    answer = Answerer(args)
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"best of {args.n}; /candidates shows all of the last turn, Ctrl-C stops an answer, /quit ends")
    if isinstance(sys.stdin, io.TextIOWrapper):  # else an error would take more than its line along
        sys.stdin.reconfigure(errors="surrogateescape")
    messages, candidates = list(answer.start), []
    while (line := read_line("you> " if interactive else "")) is not None and line != "/quit":
        if line == "/candidates":
            print(show(candidates) if candidates else "no answers yet", flush=True)
        elif not is_unicode(line):
            print(f"expected text in UTF-8, got {printable(line)}", flush=True)
        elif line.startswith("/"):
            print(f"expected /candidates or /quit, got {printable(line)}", flush=True)
        elif line:
            question = Message(role="user", content=line)
            try:
                candidates = answer([*messages, question])
            except KeyboardInterrupt:
                if not interactive:  # the turns are a file's or a program's: who stops one means them all
                    raise
                print("\ninterrupted: no answer", flush=True)
                continue
            messages += [question, Message(role="assistant", content=candidates[0].text)]
            print(spoken(candidates[0]), flush=True)


def read_line(prompt: str) -> str | None:
    """A line of stdin without the space around it; None at its end."""
    try:
        return input(prompt).strip()
    except EOFError:
        return None


def is_unicode(text: str) -> bool:
    """Whether the text came from valid UTF-8: bytes that did not are lone surrogates in it."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def spoken(c: Candidate) -> str:
    """One answer, with what is to be known about it."""
    notes = ([] if math.isnan(c.reward) else [f"reward {c.reward:.3f}"]) + ([] if c.finished else ["cut off"])
    return printable(c.text, "\n\t") + (f"  [{', '.join(notes)}]" if notes else "")
