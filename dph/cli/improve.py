"""``dph improve``: rounds of sampling, checking and training on the answers that mislead the model's head."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.cli import common, results
from dph.errors import UserError, printable
from dph.infer import sampling

if TYPE_CHECKING:
    from dph.improve.prompts import Prompt
    from dph.model.judging import JudgingModel
    from dph.train.endings import Result
    from dph.train.recipe import Recipe

HELP = "sample answers, check them and train a reward head on them, round by round"
EXAMPLE = """dph improve MODEL --prompts questions.jsonl --judge reference --normalise number --output runs/better
dph improve MODEL --prompts prompts.jsonl --judge checks:is_right --rounds 3 -n 8,32 --output runs/better
dph improve MODEL --prompts prompts.jsonl --judge './check --strict' --recipe align optimiser.lr=1e-5 --output runs/x"""
# Values of the recipe that the command itself has.
OWN = {"model.path": "MODEL", "output.directory": "--output", "seed": "--seed"}
SAMPLING = (
    ("max_new_tokens", 256, "N", "(default: 256)"),
    ("temperature", 1.0, None, "(default: 1)"),
    ("top_k", 0, "K", "sample among the K likeliest; 0 for all"),
    ("top_p", 1.0, "P", "sample among the likeliest P of the mass"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph improve``."""
    parser.description = f"""{HELP}.

In each round the model of the round before answers every prompt N times, and the checker judges the answers. Records
are made from them, those that mislead the present head first: wrong answers with a high reward, right ones with a low
one. A head is trained on the records of all rounds. Everything is kept in OUTPUT/roundK; OUTPUT/roundK/run is a run of
dph train, which other commands open. The same command continues one that was interrupted."""
    common.add_model(parser)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="values that replace the recipe's"
    )
    parser.add_argument(
        "--prompts", required=True, metavar="SOURCE", help=f"rows with prompt or messages: {common.SOURCE}"
    )
    parser.add_argument(
        "--judge",
        required=True,
        metavar="CHECKER",
        help="reference (the rows have the right answers), module:function of (row, answer), head:DIR, or a program "
        "that reads lines of JSON (dph/improve/checkers.py)",
    )
    common.add_normalise(parser, "an answer is that of the reference, and answers count as one in a vote, if they have")
    parser.add_argument(
        "--judge-timeout", type=common.number_type(float, lambda value: 0 < value < 1e9, "a number above 0"),
        default=60.0, metavar="SECONDS", help="for an answer, of a program (default: 60)",
    )  # fmt: skip
    parser.add_argument(
        "--recipe", default="improve", help="improve, head, align or a preference recipe's file (default: improve)"
    )
    parser.add_argument("--rounds", type=common.COUNT, default=2, metavar="R", help="(default: 2)")
    parser.add_argument(
        "-n", "--n", type=_counts, default=(8, 32), metavar="N[,N...]",
        help="answers to a prompt in the first round, the second, ...; the last number is that of all later ones "
        "(default: 8,32)",
    )  # fmt: skip
    parser.add_argument(
        "--records", choices=("pairs", "labels"), default="pairs",
        help="what the head learns: pairs of a right and a wrong answer, or each answer as good or bad alone, which "
        "needs --recipe head (default: pairs)",
    )  # fmt: skip
    parser.add_argument(
        "--most", type=common.COUNT, default=2, metavar="K",
        help="pairs, or right and wrong answers each, of a prompt and round (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", default="0.1", metavar="SOURCE",
        help="prompts for the figures, or a share of --prompts, which is not trained on (default: 0.1)",
    )  # fmt: skip
    parser.add_argument("--held-out-n", type=common.COUNT, default=16, metavar="N", help="their answers (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the answers and of training (default: 0)")
    types = {name: common.number_type(*rule) for name, rule in sampling.RULES.items()}
    for name, default, metavar, text in SAMPLING:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=types[name], default=default, metavar=metavar, help=text)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of all rounds")
    common.add_json(parser)


def _counts(text: str) -> tuple[int, ...]:
    """Return the numbers of ``-n``."""
    return tuple(int(common.COUNT(part)) for part in text.split(","))


def run(args: argparse.Namespace) -> None:
    """Check the options, then print the figures of each round, and draw them."""
    common.check_model(args)
    recipe = _recipe(args)

    from dph.data import atomic
    from dph.evaluate.best_of import NORMALISERS
    from dph.improve import checkers, figures, rounds, selection
    from dph.improve.plan import Improvement, open_model

    train_prompts, held_out = _prompts(args)
    normalise = NORMALISERS[args.normalise]
    atomic.check_new_files(args.output)

    def opened(path: str) -> tuple[JudgingModel, Any]:
        return open_model(path, args.device, args.dtype)

    completed: list[dict[str, Any]] = []
    with contextlib.closing(Progress()) as progress, checkers.open_checker(
        args.judge, [*train_prompts, *held_out], normalise=normalise, backbone=args.model, open_model=opened,
        timeout=args.judge_timeout,
    ) as checker:  # fmt: skip
        plan = Improvement(
            model=args.model,
            prompts=train_prompts,
            held_out=held_out,
            checker=checker,
            judge=f"{args.judge} ({args.normalise})",
            judge_files=checkers.content_of(args.judge),
            recipe=recipe,
            directory=Path(args.output),
            n=args.n,
            held_out_n=args.held_out_n,
            selection=selection.Selection(args.records, args.most, args.seed),
            sampling={name: getattr(args, name) for name, *_ in SAMPLING},
            normalise=normalise,
            seed=args.seed,
            device=args.device,
            dtype=args.dtype,
            note=lambda text: print(printable(text), file=sys.stderr, flush=True),
            progress=progress,
        )
        for metrics in rounds.improve(plan, args.rounds, _train):
            completed.append(metrics)
            if args.json:
                common.print_json(metrics, flush=True)
            elif metrics["round"] or held_out:
                print(figures.describe(metrics) + "\n", flush=True)
    if held_out:
        with atomic.atomic_file(Path(args.output) / "improve.png") as file:
            figures.picture(completed).savefig(file, dpi=130, format="png")
    if not args.json:
        common.print_text(f"model: {plan.folder(args.rounds) / 'run'}")


class Progress:
    """Progress of the files of answers, one after another: as of other commands, with a line for a file's ends."""

    def __init__(self) -> None:
        self._shown: results.Progress | None = None
        self._done = 0

    def __call__(self, name: str, done: int, total: int) -> None:
        """Show the progress of the file ``name``."""
        is_new = self._shown is None
        if self._shown is None:
            self._shown = results.Progress(name, total)
            self._shown.begin(done)
        else:
            self._shown.advance(done - self._done)
        self._done = done
        if (is_new or done == total) and not sys.stderr.isatty():
            print(f"{name}: {done:,} of {total:,}", file=sys.stderr, flush=True)
        if done == total:
            self.close()

    def close(self) -> None:
        """Leave the bar of the present file, if there is one."""
        if self._shown is not None:
            self._shown.close()
            self._shown = None


def _recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe, without sources, which are the records of the rounds."""
    from dph.train import recipe as recipes

    for override in args.overrides:
        if option := OWN.get(override.partition("=")[0].strip()):
            raise UserError(f"{override}: expected {option} in its place, got both")
    own = ["data.sources=[]", "evaluation.sources=[]", "model.path=null", f"seed={args.seed}"]
    if args.device != "auto":  # which leaves it to the recipe
        own.append(f"device={args.device}")
    return recipes.load(args.recipe, [*own, *args.overrides])


def _prompts(args: argparse.Namespace) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts of training and the held-out ones."""
    from dph.improve.prompt_files import read_prompts
    from dph.improve.prompts import split

    source, options = common.parse_source(args.prompts)
    all_prompts = read_prompts(source, **options)
    try:
        share = float(args.held_out)
    except ValueError:
        source, options = common.parse_source(args.held_out)
        return all_prompts, read_prompts(source, **options)
    if not 0 <= share < 1:
        raise UserError(f"--held-out: expected a source, or a share of at least 0 and below 1, got {args.held_out}")
    train, held_out = split(all_prompts, share, args.seed)
    if not train or (share and not held_out):
        raise UserError(
            f"--held-out: expected prompts on both sides of the share {share:g}, got {len(train)} of "
            f"{len(all_prompts)} to train on: give another share, a source, or 0 for none"
        )
    return train, held_out


def _train(recipe: Recipe) -> Result:
    """Train a round, or continue its run; a note if a signal stops it, with a checkpoint written."""
    from dph.train import entry

    result = entry.train(recipe, resume=os.path.isdir(recipe.output.directory))
    if result.exit_code:
        print(printable(f"stopped in {recipe.output.directory}; the same command continues"), file=sys.stderr)
    return result
