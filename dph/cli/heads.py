"""``dph heads``: reward heads in directories of their own."""

from __future__ import annotations

import argparse

from dph.cli import common

HELP = "list reward heads that were saved alone, or take one out of a model"
EXAMPLE = """dph heads heads/*
dph heads --save heads/harmless --model runs/head --head default"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph heads``."""
    parser.add_argument("directories", nargs="*", metavar="DIR", help="directories of heads to list")
    parser.add_argument("--save", metavar="DIR", help="directory to write a head of --model to")
    parser.add_argument("--model", metavar="MODEL", help="model or run directory, or a hub name")
    parser.add_argument("--head", default=None, help="name of the head to save (default: the only one)")
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Save a head if that is asked for, and list the directories."""
    from dph.errors import UserError
    from dph.model import head_file

    if (args.save is None) != (args.model is None):
        raise UserError("--save, --model: expected both or neither, got one")
    if args.save is None and not args.directories:
        raise UserError("DIR: expected the directory of a head, got none")
    directories = list(args.directories)
    if args.save is not None:
        from dph.model.loading import load_model

        load_model(args.model).save_head(args.save, args.head)
        directories.append(args.save)
    rows = []
    for directory in directories:
        head = head_file.read(directory)
        rows.append(
            {
                "directory": directory,
                "name": head.name,
                "pooler": head.form["pooler"],
                "layer": head.form["layer"],
                "standardised": head.form["standardised"],
                "backbone": head.backbone["name"],
                "digest": head.backbone["digest"][:8],
            }
        )
    if args.json:
        for row in rows:
            common.print_json(row)
        return
    from dph.evaluate.tables import table

    print(table(list(rows[0]), [list(row.values()) for row in rows]))
