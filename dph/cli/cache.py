"""``dph cache``: the outputs of a frozen model, computed ahead of training."""

from __future__ import annotations

import argparse

from dph.cli.common import add_recipe, check_recipe_paths, load_recipe, print_text

HELP = "precompute outputs of a frozen model for stage align (reference log-probabilities) or head (hidden states)"
EXAMPLE = """dph cache align model.path=runs/sft objective.reference=cache --output runs/align
dph cache head"""

add_arguments = add_recipe


def run(args: argparse.Namespace) -> None:
    """Compute the outputs that the cache lacks."""
    recipe = load_recipe(args)
    check_recipe_paths(recipe)

    from dph.train.precompute.fill import fill_cache

    filled = fill_cache(recipe)
    print_text(f"{filled.directory}: {filled.stored:,} pairs, {filled.computed:,} of them new")
