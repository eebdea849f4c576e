"""``dph heads``: reward heads in directories of their own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.cli import common

if TYPE_CHECKING:
    from dph.model.head_file import HeadFile

HELP = "list reward heads that were saved alone, or take one out of a model"
EXAMPLE = """dph heads runs/head heads/*
dph heads --save heads/harmless --model runs/head --head default"""
COLUMNS = ("directory", "name", "backbone", "layer", "pooler", "trained on", "accuracy", "size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph heads``."""
    parser.add_argument("directories", nargs="*", metavar="DIR", help="directories of heads, or of runs, to list")
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
    if args.save is None and args.head is not None:
        raise UserError("--head: expected it together with --save, got it alone")
    if args.save is None and not args.directories:
        raise UserError("DIR: expected the directory of a head, got none")
    directories = list(args.directories)
    if args.save is not None:
        from dph.model.loading import load_model

        load_model(args.model).save_head(args.save, args.head)
        directories.append(args.save)
    rows = []
    for directory in directories:
        for path in head_file.head_directories(directory) or [Path(directory)]:
            rows.append(_row(path, head_file.read(path)))
    if args.json:
        for row in rows:
            common.print_json(row)
        return
    from dph.evaluate.tables import table

    print(table(COLUMNS, [[row[column] for column in COLUMNS] for row in rows]))


def _row(path: Path, head: HeadFile) -> dict[str, Any]:
    """Return the cells of a head, and its other fields for JSON; None for what its description lacks."""
    from dph.model.head_file import WEIGHTS

    sources, pairs = head.about.get("sources"), head.about.get("pairs")
    trained_on = None
    if isinstance(sources, list):
        trained_on = f"{', '.join(map(str, sources))} ({pairs} pairs)"
    accuracy = head.about.get("accuracy")
    return {
        "directory": str(path),
        "name": head.name,
        "backbone": head.backbone["name"],
        "layer": head.form["layer"],
        "pooler": head.form["pooler"],
        "trained on": trained_on,
        "accuracy": float(accuracy) if isinstance(accuracy, int | float) else None,
        "size": _size(path / WEIGHTS),
        "standardised": head.form["standardised"],
        "digest": head.backbone["digest"][:8],
        "about": head.about,
    }


def _size(path: Path) -> str | None:
    """Return the size of a file in kB or MB; None if it is missing."""
    if not path.is_file():
        return None
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
