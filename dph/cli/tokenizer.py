"""``dph tokenizer``: a byte-level BPE with the chat tokens."""

from __future__ import annotations

import argparse
from pathlib import Path

from dph.cli import common
from dph.data import atomic
from dph.errors import UserError

HELP = "train a byte-level BPE with the chat tokens on text"
EXAMPLE = "dph tokenizer corpus.txt chats.jsonl --vocab-size 4096 --output tokenizer"

WRITTEN = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph tokenizer``."""
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help=".txt, or .jsonl (its texts, prompts, answers and messages)"
    )
    parser.add_argument(
        "--field", action="append", metavar="NAME", help="read only this field of .jsonl rows (may be repeated)"
    )
    parser.add_argument(
        "--vocab-size", type=common.COUNT, default=4096, metavar="V", help="upper bound (default: 4096)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")


def run(args: argparse.Namespace) -> None:
    """Train and save a tokenizer."""
    from dph.data import tokenizer

    for name in WRITTEN:
        if (Path(args.output) / name).exists():
            raise UserError(f"{args.output}: expected a directory without a tokenizer, got one with {name}")
    atomic.check_new_files(args.output)
    trained = tokenizer.train(args.files, args.vocab_size, fields=args.field or tokenizer.FIELDS)
    with atomic.new_files(args.output, last="tokenizer.json") as folder:
        trained.save_pretrained(folder)
    common.print_text(f"{args.output}: {len(trained)} tokens")
