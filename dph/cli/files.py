"""The commands that read and write files: train, cache, tokenizer, convert, plot, doctor."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dph.errors import UserError

if TYPE_CHECKING:
    from dph.model.model import Model
    from dph.train.recipe import Recipe

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def train(args: argparse.Namespace) -> int:
    """``dph train``; the exit code is 143 where SIGTERM ended it and 130 where Ctrl-C did, with its state saved."""
    from dph.train import distributed, entry

    if args.dry_run:
        from dph.train.budget.estimate import estimate

        if distributed.told().rank == 0:
            print(estimate(_recipe(args)).table())
        return 0
    return entry.train(_recipe(args), resume=args.resume).exit_code


def cache(args: argparse.Namespace) -> None:
    """``dph cache``."""
    from dph.train.precompute.fill import fill

    found = fill(_recipe(args))
    print(f"{found.directory}: {found.stored:,} pairs, {found.computed:,} of them new")


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that was asked for, with its overrides."""
    from dph.train import recipe

    output = [] if args.output is None else [f"output.directory={json.dumps(args.output)}"]
    return recipe.load(args.recipe, [*args.overrides, *output])


def tokenizer(args: argparse.Namespace) -> None:
    """``dph tokenizer``."""
    from dph.data.tokenizer import train

    if (Path(args.output) / "tokenizer.json").exists():
        raise UserError(f"{args.output}: expected a directory without a tokenizer, got one with tokenizer.json")
    print(f"{args.output}: {len(train(args.files, args.vocab_size, args.output))} tokens")


def convert(args: argparse.Namespace) -> None:
    """``dph convert``: weights and configuration in the other layout, tokenizer files as they are."""
    from dph.model.loading import load_tokenizer, model_path
    from dph.train.build import open_checkpoint
    from dph.train.run_dir import MANIFEST, make_readable

    saved = (Path(args.input) / MANIFEST).is_file()
    source, target = args.input if saved else model_path(args.input), Path(args.output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: expected a new or empty directory, got one that exists with files in it")
    model, tokenizer = open_checkpoint(source) if saved else (_trained(source), None)
    if args.to == "own":
        model.save_pretrained(target)
    else:
        model.save_official(target)
    if tokenizer is None and Path(source).is_dir():
        copied = [name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
        for name in copied:
            shutil.copyfile(Path(source) / name, target / name)
    else:
        kept = load_tokenizer(source) if tokenizer is None else tokenizer
        copied = [Path(name).name for name in kept.save_pretrained(target)]
    make_readable(target)
    print(f"{target}: {model.num_parameters():,} parameters, tokenizer files: {', '.join(copied) or 'none'}")


def _trained(source: str) -> Model:
    """The model without the heads that it holds no weights of; it says which these are."""
    from dph.model.loading import load_model

    model = load_model(source)
    if model.untrained_heads:  # what was never trained is not to look as if it had been
        names = ", ".join(sorted(model.untrained_heads))
        heads = {
            key: [name for name in getattr(model.config, key) if name not in model.untrained_heads]
            for key in ("reward_heads", "task_heads")
        }
        print(f"reward heads without weights are left out: {names}", file=sys.stderr)
        model = load_model(source, **heads)
    return model


def plot(args: argparse.Namespace) -> None:
    """``dph plot``."""
    from dph.cli import plot as plots

    plots.check_output(args.output)  # before the work
    figure = plots.landscape(args.epsilon) if args.figure == "landscape" else plots.curves(args.directories)
    figure.savefig(args.output, dpi=130)
    print(args.output)


def doctor(args: argparse.Namespace) -> None:
    """``dph doctor``."""
    from dph.cli.doctor import report

    print(report())
