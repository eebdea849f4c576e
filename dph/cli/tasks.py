"""``dph tasks``: the known data sets, and their records as a model reads them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from dph.cli import common

if TYPE_CHECKING:
    from dph.chat import Encoded
    from dph.tasks import Task

HELP = "list the known data sets, or show records of one as a model reads them"
EXAMPLE = """dph tasks
dph tasks glue/sst2 --show 3 --directory data
dph tasks questions.jsonl --show 3 --tokenizer MODEL"""
COLOURS = {"learnt": "\033[32m", "reward": "\033[1;7m"}  # green; bold and inverse
MARKS = {"learnt": ("{", "}"), "reward": ("[", "]")}  # where there are no colours
END = "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph tasks``."""
    parser.description = f"""{HELP}.

Tokens that are learnt are green, or in braces where there are no colours. The reward is read at the inverse token, or
the one in brackets."""
    parser.add_argument("task", nargs="?", metavar="TASK", help="such as glue/sst2, or a file (dph.tasks.own)")
    parser.add_argument("--show", type=common.COUNT, default=1, metavar="N", help="number of records (default: 1)")
    parser.add_argument("--directory", metavar="DIR", help="read DIR/<task>/<split>.jsonl; without it, an example")
    parser.add_argument("--split", help="split to read (default: the one that the paper reports)")
    parser.add_argument("--tokenizer", metavar="DIR", help="model or tokenizer (default: bytes in the paper's format)")


def run(args: argparse.Namespace) -> None:
    """List all tasks, or print records of one."""
    from dph import tasks
    from dph.evaluate.tables import table

    if args.task is None:
        rows = []
        for task in map(tasks.load, tasks.names()):
            rows.append([task.name, _answers(task), task.metric, ", ".join(task.splits), task.hub])
        print(table(["task", "answers", "metric", "splits", "hub"], rows))
        return

    from dph.chat import encode

    task, tokenizer = tasks.load(args.task), _tokenizer(args.tokenizer)
    colours = sys.stdout.isatty()
    for i, document in enumerate(islice(_documents(task, args), args.show)):
        right, wrong = task.answers(document)
        for kind, conversations in (("right answer", right), ("wrong answer", wrong)):
            for messages in conversations:
                common.print_text(f"--- record {i}, {kind}")
                print(_rendered(encode(messages, tokenizer, last_only=True), tokenizer, colours))


def _answers(task: Task) -> str:
    """Return what the answers of a task are, for the table."""
    if task.options is None:
        return "free, with wrong ones" if task.paired else "free"
    return "a choice" if callable(task.options) else f"one of {', '.join(task.options)}"


def _documents(task: Task, args: argparse.Namespace) -> Iterator[Any]:
    """Return the documents of the task's file or split; without one its example."""
    from dph.data.dataset import task_documents

    if task.file is None and args.directory is None and task.example:
        return iter([task.example])
    return iter(task_documents(task, args.split or task.evaluated, args.directory))


def _tokenizer(name: str | None) -> Any:
    """Return a tokenizer; without a name one of bytes."""
    if name is not None:
        from dph.model.loading import load_tokenizer

        return load_tokenizer(name)
    from dph.data.tokenizer import MIN_VOCABULARY, from_iterator

    return from_iterator(["a"], MIN_VOCABULARY)


def _rendered(encoded: Encoded, tokenizer: Any, colours: bool) -> str:
    """Return the text of a conversation with the learnt tokens and the judged one marked."""
    kinds = [None, *("learnt" if learnt else None for learnt in encoded.loss_mask)][: len(encoded)]
    if encoded.reward_position is not None:
        kinds[encoded.reward_position] = "reward"
    parts, start = [], 0
    for i in range(1, len(encoded) + 1):
        if i < len(encoded) and kinds[i] == kinds[start]:
            continue
        text = common.printable(tokenizer.decode(encoded.tokens[start:i], skip_special_tokens=False), keep="\n")
        if kinds[start] is not None:
            before, after = (COLOURS[kinds[start]], END) if colours else MARKS[kinds[start]]
            text = f"{before}{text}{after}"
        parts.append(text)
        start = i
    return "".join(parts)
