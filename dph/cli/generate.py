"""``dph generate``: several answers to each prompt, ranked."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.cli import common
from dph.errors import UserError, printable, shown_names

if TYPE_CHECKING:
    from dph.chat import Message

HELP = "sample several answers to a prompt and rank them"
EXAMPLE = """dph generate runs/align --prompt "Name a prime number." -n 8
dph generate runs/align --file prompts.jsonl --json > answers.jsonl"""
JSON_FIELDS = ("text", "reward", "spread", "logprob", "mean_logprob", "finished")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph generate``."""
    common.add_model(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the user's message")
    prompts.add_argument(
        "--file",
        metavar="PROMPTS",
        help="file or folder of rows, as of dph train: prompt (text or messages) or messages",
    )
    common.add_sampling(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Check the prompts, then print each one's candidates, best first."""
    if args.file is not None:
        common.check_output(None, args.file)
    prompts = [to_messages(args.prompt, "--prompt")] if args.file is None else read_prompts(args.file)
    common.check_model(args)

    from dph.cli.answers import WITHOUT_HEAD, Answerer, candidate_table, required_head

    model, tokenizer = common.open_model(args, required_head(args), WITHOUT_HEAD)
    answerer = Answerer(model, tokenizer, args)
    for i, messages in enumerate(prompts):
        if messages[0]["role"] != "system":
            messages = answerer.system + messages
        candidates = answerer.candidates(messages)
        if args.json:
            fields = [{key: getattr(candidate, key) for key in JSON_FIELDS} for candidate in candidates]
            common.print_json({"messages": messages, "candidates": fields}, flush=True)
            continue
        if i:
            print("\n")
        if len(prompts) > 1:
            print(printable(messages[-1]["content"]) + "\n")
        print(candidate_table(candidates), flush=True)


def read_prompts(path: str) -> list[list[Message]]:
    """Return the conversations of a file or folder of rows, each with ``prompt`` (text or messages) or ``messages``."""
    from dph.data.conversions import own_fields, turn, with_system
    from dph.data.files import files_in, open_rows

    prompts = []
    for file in files_in(Path(path)) if Path(path).is_dir() else [Path(path)]:
        rows = open_rows(file)
        for i, row in enumerate(rows):
            location = rows.location(i)
            fields = own_fields(row, location)
            prompt = fields.get("messages") if fields.get("prompt") is None else fields["prompt"]
            if prompt is None:
                raise UserError(f"{location}: expected prompt or messages, got the fields {shown_names(row)}")
            if isinstance(prompt, list):
                prompt = [turn(message, f"{location}: message {k}", None) for k, message in enumerate(prompt)]
            messages = to_messages(prompt, location)
            if fields.get("system") not in (None, ""):
                messages = with_system(fields["system"], messages, location)
            prompts.append(messages)
    if not prompts:
        raise UserError(f"{path}: expected at least one prompt, got none")
    return prompts


def to_messages(prompt: str | Sequence[Mapping[str, Any]], location: str) -> list[Message]:
    """Return a prompt as messages. Raises UserError if they are malformed or end with an assistant's message."""
    from dph import chat

    messages = [chat.Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    chat.check(messages, location)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{location}: expected a message to answer at the end, got the assistant's own")
    return [chat.Message(role=message["role"], content=message["content"]) for message in messages]
