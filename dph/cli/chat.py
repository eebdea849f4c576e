"""``dph chat``: a conversation in the terminal, answered with the best of N."""

from __future__ import annotations

import argparse
import io
import math
import sys
from typing import TYPE_CHECKING

from dph.cli import common
from dph.errors import printable, shown

if TYPE_CHECKING:
    from dph.infer.best_of_n import Candidate

HELP = "talk with a model that keeps the best of N answers (/candidates shows all of them, /quit ends)"
EXAMPLE = 'dph chat runs/align -n 8 --system "Answer in one sentence."'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph chat``."""
    common.add_model(parser)
    common.add_sampling(parser)


def run(args: argparse.Namespace) -> None:
    """Answer every line of stdin. In a terminal, Ctrl-C stops an answer and removes its question."""
    common.check_model(args)

    from dph.chat import Message
    from dph.cli.answers import Answerer, candidate_table

    answerer = Answerer(args)
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"best of {args.n}; /candidates shows all of the last turn, Ctrl-C stops an answer, /quit ends")
    if isinstance(sys.stdin, io.TextIOWrapper):  # a byte that is not UTF-8 must not affect more than its line
        sys.stdin.reconfigure(errors="surrogateescape")
    messages, candidates = list(answerer.system), []
    while (line := _read_line("you> " if interactive else "")) is not None and line != "/quit":
        if line == "/candidates":
            print(candidate_table(candidates) if candidates else "no answers yet", flush=True)
        elif not _is_unicode(line):
            print(f"expected text in UTF-8, got {shown(line)}", flush=True)
        elif line.startswith("/"):
            print(f"expected /candidates or /quit, got {shown(line)}", flush=True)
        elif line:
            question = Message(role="user", content=line)
            try:
                (candidates,) = answerer.candidates([[*messages, question]])
            except KeyboardInterrupt:
                if not interactive:  # lines of a file or a program: Ctrl-C ends the command
                    raise
                print("\ninterrupted: no answer", flush=True)
                continue
            messages += [question, Message(role="assistant", content=candidates[0].text)]
            print(_answer_line(candidates[0]), flush=True)


def _read_line(prompt: str) -> str | None:
    """Return a line of stdin without surrounding space; None at its end."""
    try:
        return input(prompt).strip()
    except EOFError:
        return None
    except OSError as error:
        error.filename = error.filename or "stdin"
        raise


def _is_unicode(text: str) -> bool:
    """Return whether the text came from valid UTF-8: other bytes became lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _answer_line(candidate: Candidate) -> str:
    """Return the text of an answer with its reward, and a note if it was cut off."""
    notes = []
    if not math.isnan(candidate.reward):
        notes.append(f"reward {candidate.reward:.3f}")
    if not candidate.finished:
        notes.append("cut off")
    text = printable(candidate.text)
    return f"{text}  [{', '.join(notes)}]" if notes else text
