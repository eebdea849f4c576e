"""``dph generate``: several answers to each prompt, ranked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.cli import common, results
from dph.errors import UserError, printable

if TYPE_CHECKING:
    from dph.chat import Message
    from dph.data.rows import SourceRows

HELP = "sample several answers to a prompt and rank them"
EXAMPLE = """dph generate runs/align --prompt "Name a prime number." -n 8
dph generate runs/align --file prompts.jsonl --json
dph generate runs/align --file prompts.jsonl --seed 0 --output answers.jsonl"""
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


def run(args: argparse.Namespace) -> None:
    """Check the prompts, then print each one's candidates, best first, or write them to ``--output``."""
    if args.output is not None and (args.file is None or args.json):
        raise UserError(f"--output: expected --file with it, and no --json, got {args.output} without")
    from dph.chat import check

    if args.file is None:
        lines = [{"prompt": args.prompt}]
        prompts = [[{"role": "user", "content": args.prompt}]]
        check(prompts[0], "--prompt")
    else:
        source, _ = common.parse_source(args.file)
        common.check_output(args.output, source, args.model, Path(args.model) / "model")
        lines, prompts = read_prompts(args.file, args.field)
    common.check_model(args)

    from dph.cli.answers import Answerer, candidate_table

    def place(index: int) -> str:
        return "--prompt" if args.file is None else lines.location(index)

    answerer = Answerer(args)
    prompts = [messages if messages[0]["role"] == "system" else answerer.system + messages for messages in prompts]
    for i, messages in enumerate(prompts):
        answerer.check(messages, place(i))
    quiet = args.file is None or (args.output is None and sys.stdout.isatty())  # a bar would mix with the answers
    about = {"command": "generate"}
    if args.output is not None:
        about |= {"input": lines.fingerprint(), "system": args.system, "field": args.field, **answerer.about()}
    with (
        results.Results(args.output, about, args.resume) as output,
        results.Progress("generate", len(prompts), quiet) as progress,
    ):
        first = output.keep([1] * len(prompts))
        progress.begin(first)
        found = answerer.candidates(prompts[first:])
        for i in range(first, len(prompts)):
            try:
                candidates = next(found)
            except (ValueError, RuntimeError) as error:  # such as a reward that is no number
                error.add_note(f"answering {place(i)}")
                raise
            fields = [{key: getattr(candidate, key) for key in JSON_FIELDS} for candidate in candidates]
            written = {**({} if args.file is None else lines[i]), "messages": prompts[i], args.field: fields}
            output.add([written])
            if args.json:
                common.print_json(written, flush=True)
            elif args.output is None:
                heading = f"{printable(prompts[i][-1]['content'])}\n\n" if len(prompts) > 1 else ""
                print("\n\n" * bool(i) + heading + candidate_table(candidates), flush=True)
            progress.advance(1)


def read_prompts(text: str, added: str | None = None) -> tuple[SourceRows, list[list[Message]]]:
    """Return the rows of a source and their conversations: ``prompt`` (text or messages) or ``messages``.

    ``added`` is a field that no row may have.
    """
    from dph.data.files import report_ignored
    from dph.data.formats import parse_prompt
    from dph.data.rows import open_source, text_options

    source, options = common.parse_source(text)
    prompts: list[list[Message]] = []
    ignored: set[str] = set()
    rendered = text_options(**options)["rendered"]

    def visit(place: str) -> Callable[[int, Mapping[str, Any]], None]:
        return lambda number, row: prompts.append(parse_prompt(row, f"{place}{number}", rendered, ignored))

    rows = open_source(source, visit, with_answers=False, added=added, **options)
    report_ignored(source, ignored - options.get("filter", {}).keys())
    return rows, prompts
