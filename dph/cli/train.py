"""``dph train``: one stage from a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dph.cli.common import add_recipe, check_recipe_paths, check_run_directory, load_recipe, print_text

HELP = "train one stage from a recipe"
EXAMPLE = """dph train align model.path=runs/sft optimiser.steps=200 --output runs/align
dph train recipe.yaml --resume
dph train sft model.path=runs/vocab --dry-run
dph train --options
torchrun --nproc-per-node 8 -m dph.cli train sft model.path=runs/vocab"""


class PrintOptions(argparse.Action):
    """Flag that prints every option of a recipe and exits, as ``--help`` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print and exit."""
        from dph.train import recipe

        print(recipe.describe())
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph train``."""
    add_recipe(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint of the run; data, tokenizer and model may have moved (give the new "
        "place, as data.sources=[...]), but not changed",
    )
    parser.add_argument(
        "--force-resume", action="store_true", help="the same, although data, tokenizer or model configuration changed"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print estimated parameters, memory, tokens and hours, then exit",
    )
    parser.add_argument(
        "--options",
        action=PrintOptions,
        nargs=0,
        help="print every option of a recipe with its type, default, range and help, then exit",
    )


def run(args: argparse.Namespace) -> int:
    """Train; the exit code is 128 and the number of the signal that ended the run, with a checkpoint written."""
    recipe = load_recipe(args)
    resume = args.resume or args.force_resume
    # A run holds what it needs of a model and a tokenizer that are gone.
    if not (resume and (Path(recipe.output.directory) / "start" / "config.json").is_file()):
        check_recipe_paths(recipe)
    if args.dry_run:
        from dph.train import distributed
        from dph.train.budget.estimate import estimate

        if distributed.torchrun_world().rank == 0:
            print_text(estimate(recipe).table())
        return 0
    check_run_directory(recipe, resume)

    from dph.train import entry

    return entry.train(recipe, resume=resume, force_resume=args.force_resume).exit_code
