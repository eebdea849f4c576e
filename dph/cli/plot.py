"""``dph plot``: the objectives' loss landscapes, or the curves of training runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from dph.cli import common
from dph.data.atomic import atomic_file

HELP = "draw the loss landscapes, or the curves of training runs"
EXAMPLE = """dph plot landscape -o landscape.png
dph plot run runs/align -o curves.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two figures and their arguments."""
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    text = "loss landscapes of both reward objectives (the paper's figure 1)"
    landscape = figures.add_parser(
        "landscape", help=text, description=text, example="dph plot landscape --epsilon 0.1 0.25 -o landscape.png"
    )
    landscape.add_argument("--epsilon", type=float, nargs="+", default=[0.1], help="label smoothing (default: 0.1)")
    text = "curves of one or several training runs"
    run = figures.add_parser(
        "run", help=text, description=text, example="dph plot run runs/align runs/head -o curves.png"
    )
    run.add_argument("directories", nargs="+", metavar="DIR", help="run directory, which holds metrics.jsonl")
    for figure in (landscape, run):
        figure.add_argument("-o", "--output", required=True, metavar="FILE", help="PNG, PDF or SVG, by its suffix")


def run(args: argparse.Namespace) -> None:
    """Draw a figure into a file."""
    from dph.cli import figures

    figures.check_suffix(args.output)
    inputs = [] if args.figure == "landscape" else [Path(directory) / "metrics.jsonl" for directory in args.directories]
    common.check_output(args.output, *inputs)
    figure = figures.landscape(args.epsilon) if args.figure == "landscape" else figures.curves(args.directories)
    with atomic_file(args.output) as file:
        figure.savefig(file, dpi=130, format=Path(args.output).suffix[1:].lower())
    common.print_text(args.output)
