"""``dph tokenizer``: a byte-level BPE with the chat tokens."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from dph.cli import common
from dph.data import atomic
from dph.errors import UserError, shown_names

HELP = "train a byte-level BPE with the chat tokens on text"
EXAMPLE = "dph tokenizer corpus.txt chats.jsonl --vocab-size 4096 --output tokenizer"

WRITTEN = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph tokenizer``."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="SOURCE",
        help="text, or the texts, prompts, answers and messages of rows: " + common.SOURCE,
    )
    parser.add_argument(
        "--field", action="append", metavar="NAME", help="read only this field of rows (may be repeated; not of tasks)"
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
    trained = tokenizer.from_iterator(_texts(args.files, args.field), args.vocab_size)
    with atomic.new_files(args.output, last="tokenizer.json") as folder:
        trained.save_pretrained(folder)
    common.print_text(f"{args.output}: {len(trained)} tokens")


def _texts(sources: Sequence[str], fields: Sequence[str] | None) -> Iterator[str]:
    """Yield the texts of files and folders, of the rows of hub data sets, and of the records of tasks."""
    from dph.data import dataset, tokenizer
    from dph.data.rows import open_source, text_options

    for text in sources:
        source, options = common.parse_source(text)
        if source.startswith("task:"):
            if fields:
                raise UserError(
                    f"--field: expected none for {source}, whose fields are known, got {shown_names(fields)}"
                )
            for record in dataset.load(source, "text", **options):
                yield record.text
        elif options or source.startswith("hub:"):
            rows, form = open_source(source, **options), text_options(**options)
            names = fields or dict.fromkeys((*tokenizer.FIELDS, form["text_field"]))
            for i in range(len(rows)):
                yield from tokenizer.texts_of(rows.fields(i), list(names), rows.location(i), form["rendered"])
        else:
            yield from tokenizer.read_texts(source, fields or tokenizer.FIELDS)
