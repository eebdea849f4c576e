"""``dph generate``: several answers to each prompt, ranked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dph.cli import cluster, common, results
from dph.errors import UserError, add_note, printable

if TYPE_CHECKING:
    from dph.chat import Message
    from dph.data.rows import SourceRows

HELP = "sample several answers to a prompt and rank them"
EXAMPLE = """dph generate runs/align --prompt "Name a prime number." -n 8
dph generate runs/align --file prompts.jsonl --json
dph generate runs/align --file prompts.jsonl --seed 0 --output answers.jsonl
dph generate runs/align --file prompts.jsonl --seed 0 --output answers --ray auto --workers 8"""
JSON_FIELDS = ("text", "reward", "spread", "logprob", "mean_logprob", "finished", "pruned")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph generate``."""
    common.add_model(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the user's message")
    prompts.add_argument(
        "--file",
        metavar="PROMPTS",
        help="rows with prompt (text or messages) or messages: " + common.SOURCE,
    )
    results.add_output(parser, "every line of --file with its messages and candidates, in place of printing them,")
    common.add_field(parser, "candidates")
    common.add_sampling(parser)
    common.add_json(parser)
    cluster.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Check the prompts, then print each one's candidates, best first, or write them to ``--output``."""
    if args.output is not None and (args.file is None or args.json):
        raise UserError(f"--output: expected --file with it, and no --json, got {args.output} without")
    args = cluster.prepared(args)
    job = open_job(args)

    from dph.cli.answers import candidate_table
    from dph.infer.best_of_n import Candidate

    quiet = args.file is None or (args.output is None and sys.stdout.isatty())  # a bar would mix with the answers
    with cluster.written(job, args, quiet) as lines:
        for i, written in enumerate(lines):
            if args.json:
                common.print_json(written, flush=True)
            elif args.output is None:
                heading = f"{printable(written['messages'][-1]['content'])}\n\n" if job.total > 1 else ""
                candidates = [Candidate(**fields, tokens=()) for fields in written[args.field]]
                print("\n\n" * bool(i) + heading + candidate_table(candidates), flush=True)


def open_job(args: argparse.Namespace) -> results.Job:
    """Check the prompts, open the model, and return the job that answers them."""
    from dph.chat import check

    if args.file is None:
        rows: SourceRows | list[dict[str, Any]] = [{}]
        prompts = [[{"role": "user", "content": args.prompt}]]
        check(prompts[0], "--prompt")
    else:
        cluster.check_output(args, common.parse_source(args.file)[0])
        rows, prompts = read_prompts(args.file, args.field)
    common.check_model(args)

    from dph.cli.answers import Answerer

    def place(index: int) -> str:
        return "--prompt" if args.file is None else rows.location(index)

    answerer = Answerer(args)
    prompts = [messages if messages[0]["role"] == "system" else answerer.system + messages for messages in prompts]
    for i, messages in enumerate(prompts):
        answerer.check(messages, place(i))
    about = {"command": "generate"}
    if args.output is not None:
        about |= {"input": rows.fingerprint(), "system": args.system, "field": args.field, **answerer.about()}

    def lines(start: int, stop: int) -> Iterator[list[dict[str, Any]]]:
        answers = answerer.candidates(prompts[start:stop])
        for i in range(start, stop):
            try:
                candidates = next(answers)
            except (ValueError, RuntimeError) as error:  # such as a reward that is no number
                add_note(error, f"answering {place(i)}")
                raise
            fields = [{key: getattr(candidate, key) for key in JSON_FIELDS} for candidate in candidates]
            yield [{**rows[i], "messages": prompts[i], args.field: fields}]

    return results.Job("generate", len(prompts), lambda: [1] * len(prompts), lines, about)


def read_prompts(text: str, added: str | None = None) -> tuple[SourceRows, list[list[Message]]]:
    """Return the rows of a source and their conversations: ``prompt`` (text or messages) or ``messages``.

    ``added`` is a field that no row may have.
    """
    from dph.data.files import report_ignored
    from dph.data.rows import open_prompts

    source, options = common.parse_source(text)
    ignored: set[str] = set()
    rows, prompts = open_prompts(source, ignored, added=added, **options)
    report_ignored(source, ignored - options.get("filter", {}).keys())
    return rows, prompts
