"""``dph data``: a look at data before training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dph.cli import common

if TYPE_CHECKING:
    from dph.data.survey import Survey

HELP = "what a data set holds, what training would refuse in it, and what is suspicious"
EXAMPLE = """dph data preferences.jsonl --tokenizer MODEL --held-out held-out.jsonl
dph data conversations/ --json"""
EVERY = 10_000  # rows between updates of the progress
SHOWN = 8  # names on a line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph data``."""
    parser.description = f"""{HELP}.

The exit code is 1 if training would refuse a row, with --strict also if one is suspicious."""
    parser.add_argument("files", nargs="+", metavar="SOURCE", help=common.SOURCE)
    parser.add_argument("--tokenizer", metavar="DIR", help="model or tokenizer, for lengths in tokens")
    parser.add_argument(
        "--max-tokens", type=common.COUNT, default=2048, metavar="T", help="longest record (default: 2048)"
    )
    parser.add_argument(
        "--held-out", action="append", default=[], metavar="SOURCE", help="data whose prompts must not be here"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a row is suspicious, too")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Read all sources and print what they hold."""
    from tqdm import tqdm

    from dph.data.survey import Surveyor

    tokenizer = None
    if args.tokenizer is not None:
        from dph.model.loading import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer)
    sources = [common.parse_source(text) for text in args.files]
    held_out = [common.parse_source(text) for text in args.held_out]
    surveyor = Surveyor(tokenizer, args.max_tokens)
    with tqdm(desc="data", unit=" rows", disable=None, file=sys.stderr) as progress:
        for source, options in sources:
            for count in surveyor.read(source, **options):
                if count % EVERY == 0:
                    progress.update(EVERY)
    survey = surveyor.finish(held_out)
    if args.json:
        common.print_json({**vars(survey), "refused": survey.refused})
    else:
        _show(survey)
    return int(survey.refused > 0 or (args.strict and bool(survey.suspicions)))


def _show(survey: Survey) -> None:
    """Print a survey as tables."""
    from dph.data.survey import SUSPICIONS
    from dph.evaluate.tables import table

    rows = [["rows", _counts(survey.forms)]]
    if survey.roles:
        rows += [["messages by role", _counts(survey.roles)], ["messages in a row", _counts(survey.turns, sort=True)]]
    if survey.labels:
        rows.append(["label", _counts(survey.labels)])
    for name, quantiles in (("characters", survey.characters), ("tokens (of a sample)", survey.tokens)):
        if quantiles is not None:
            rows.append([name, ", ".join(f"{key} {value:,}" for key, value in quantiles.items())])
    if pairs := sum(survey.longer_chosen.values()):
        rows.append(["chosen answer", _counts({key: f"{n / pairs:.0%}" for key, n in survey.longer_chosen.items()})])
    if survey.ignored:
        rows.append(["ignored fields", _counts(survey.ignored)])
    print(table(["", f"{survey.rows:,} rows"], rows))
    for title, found in (("refused by training", survey.problems), ("suspicious", survey.suspicions)):
        if found:
            print()
            cells = []
            for reason, (count, places) in sorted(found.items(), key=lambda item: -item[1][0]):
                cells.append(
                    [count, f"{reason}: {SUSPICIONS[reason]}" if reason in SUSPICIONS else reason, _first(places)]
                )
            print(table(["rows", title, "first places"], cells))


def _counts(values: Mapping[Any, Any], sort: bool = False) -> str:
    """Return names and numbers on one line, the most frequent first or, with ``sort``, in the order of the names."""
    pairs: Iterable[tuple[Any, Any]] = values.items()
    if sort:
        pairs = sorted(pairs)
    elif values and all(isinstance(value, int) for value in values.values()):
        pairs = sorted(pairs, key=lambda item: -item[1])
    shown = [f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in pairs]
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")


def _first(places: list[str]) -> str:
    return ", ".join(places[:3]) + (" ..." if len(places) > 3 else "")
