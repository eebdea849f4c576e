"""``dph quickstart``: a small model trained end to end."""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path

from dph.data.atomic import check_new_files
from dph.errors import UserError

HELP = "train a small model that distinguishes truth from a popular falsehood, and show the results"
EXAMPLE = "dph quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph quickstart``."""
    parser.add_argument("--output", metavar="DIR", default="runs/quickstart", help="directory to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and sampling (%(default)s)")
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts (%(default)s)")
    parser.add_argument("--pairs-from", type=int, default=8000, metavar="P", help="prompts of the pairs (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of every stage's steps (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")


def run(args: argparse.Namespace) -> None:
    """Check the options, then train, compare and print."""
    for option, value in (("prompts", args.prompts), ("pairs-from", args.pairs_from), ("scale", args.scale)):
        if not 0 < value < math.inf:
            raise UserError(f"--{option}: expected a finite number above 0, got {value}")
    if Path(args.output).exists() and not args.resume:
        raise UserError(f"{args.output}: exists already; give --resume to continue it, or another --output")
    check_new_files(args.output)

    from dph.demo import quickstart

    quickstart.run(
        Path(args.output),
        seed=args.seed,
        prompts=args.prompts,
        pairs_from=args.pairs_from,
        scale=args.scale,
        resume=args.resume,
        resume_command=resume_command(args),
    )


def resume_command(args: argparse.Namespace) -> str:
    """Return the command that continues a run: the options that differ from their defaults, quoted for a shell."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["dph quickstart"]
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(args, name)
        if name != "resume" and value != default:
            words.append(f"--{name.replace('_', '-')} {shlex.quote(str(value))}")
    return " ".join([*words, "--resume"])
