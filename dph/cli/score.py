"""``dph score``: rewards and log-probabilities of conversations and preferences."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.cli import common
from dph.data.atomic import atomic_file

if TYPE_CHECKING:
    from dph.chat import Encoded
    from dph.data.formats import Conversation, Preference
    from dph.model.judging import Judged

HELP = "rewards and log-probabilities of conversations, and how often they prefer the chosen answer of a pair"
EXAMPLE = """dph score runs/align conversations.jsonl --json
dph score runs/align preferences.jsonl --output scores.jsonl
dph score MODEL preferences.jsonl --head runs/helpful --head runs/harmless"""
WITHOUT_HEAD = "--logprob-only needs no rewards"
SIDES = ("chosen", "rejected")
TITLES = {"reward": "reward", "logprob": "log-probability (sum)", "mean_logprob": "log-probability (mean)"}

# Keys of TITLES, and reward_NAME, with their values; log-probabilities in nats, None for the mean of an empty answer.
Scores = dict[str, float | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph score``."""
    parser.description = f"""{HELP}.

The sum is the log-probability of the final answer, its end-of-turn token included, in nats. The mean is per content
token and leaves out the end-of-turn token; an empty answer has none (-)."""
    common.add_model(parser)
    parser.add_argument(
        "file",
        metavar="CONVERSATIONS",
        help="a source as of dph train: a file or folder of rows with messages, or with chosen and rejected, task:NAME "
        "or hub:NAME",
    )
    parser.add_argument("--output", metavar="FILE", help="write every line's scores to a JSONL file")
    common.add_judging(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Print a line per conversation, or a summary of preferences; write both to ``--output`` as JSON lines."""
    common.check_output(args.output, args.file, args.model, Path(args.model) / "model")

    from tqdm import tqdm

    from dph.data import dataset

    kind = dataset.answered_kind(args.file)
    records = dataset.load(args.file, kind)
    common.check_model(args)

    model, tokenizer = common.open_model(args, common.heads_of(args), WITHOUT_HEAD)
    scored = []
    empty: list[list[bool]] = []
    groups = _encode(tqdm(records, "score", disable=None), tokenizer, empty)
    for judged, empty_sides in zip(model.judge(groups), empty, strict=True):
        scored.append(_scores(judged, empty_sides, args.head))
    if args.output is not None:
        _write(args.output, scored)
    show = _show_pairs if kind == "preference" else _show_conversations
    common.check_nans(show(scored, args.json))


def _title(key: str) -> str:
    """Return the title of a score; that of ``reward_NAME`` is "reward NAME"."""
    return TITLES.get(key, key.replace("_", " ", 1))


def _write(path: str, scored: Iterable[Sequence[Scores]]) -> None:
    """Write the scores of each record as a line of JSON."""
    with atomic_file(path) as file:
        for sides in scored:
            line = sides[0] if len(sides) == 1 else dict(zip(SIDES, sides, strict=True))
            file.write(common.json_line(line).encode() + b"\n")


def _encode(
    records: Iterable[Conversation | Preference], tokenizer: Any, empty: list[list[bool]]
) -> Iterator[list[Encoded]]:
    """Yield each record's alternatives, masked to their final answers.

    Appends to ``empty``, for each record, a flag per alternative: its answer has no content token.
    """
    from dph import chat
    from dph.data.formats import Conversation

    for record in records:
        sides = [record.messages] if isinstance(record, Conversation) else [record.chosen, record.rejected]
        alternatives = [chat.encode(messages, tokenizer, last_only=True) for messages in sides]
        empty.append([not any(encoded.score_mask) for encoded in alternatives])
        yield alternatives


def _scores(judged: Judged, empty: Sequence[bool], heads: Sequence[str]) -> list[Scores]:
    """Return the scores of each alternative of one record: ``reward``, or ``reward_NAME`` for each of several heads."""
    scores = []
    for i, is_empty in enumerate(empty):
        one: Scores = {}
        for head in heads:
            one["reward" if len(heads) == 1 else f"reward_{head}"] = judged.rewards[head][i]
        one["logprob"] = judged.logprobs[i]
        one["mean_logprob"] = None if is_empty else judged.mean_logprobs[i]
        scores.append(one)
    return scores


def _show_conversations(scored: Sequence[Sequence[Scores]], as_json: bool) -> int:
    """Print the scores; return how many are NaN."""
    from dph.evaluate.tables import table

    lines = [scores for (scores,) in scored]
    if as_json:
        for line in lines:
            common.print_json(line)
    else:
        headers = ["record", *map(_title, lines[0])]
        print(table(headers, [[i, *scores.values()] for i, scores in enumerate(lines)]))
    nans = 0
    for scores in lines:
        nans += sum(value is not None and math.isnan(value) for value in scores.values())
    return nans


def _show_pairs(scored: Sequence[Sequence[Scores]], as_json: bool) -> int:
    """Print how often each score prefers the chosen answer; return how many comparisons have a NaN.

    The mean log-probability compares no pair with an empty answer, which has none.
    """
    from dataclasses import asdict

    from dph.evaluate.choices import prefer
    from dph.evaluate.tables import table

    rows = []
    for key in scored[0][0]:
        chosen, rejected = [], []
        for chosen_scores, rejected_scores in scored:
            if chosen_scores[key] is not None and rejected_scores[key] is not None:
                chosen.append(chosen_scores[key])
                rejected.append(rejected_scores[key])
        rows.append(prefer(_title(key), chosen, rejected))
    nans = sum(row.nans for row in rows)
    if as_json:
        for row in rows:
            common.print_json(asdict(row))
        return nans
    cells = []
    for row in rows:
        accuracy = [None, None] if row.accuracy is None else [row.accuracy.value, row.accuracy.range]
        margin = None if row.margin is None else f"{row.margin:.3g}"  # rewards may be very small
        cells.append([row.method, *accuracy, margin, row.ties, row.nans, row.n])
    print(table(["method", "pair accuracy", "95% interval", "mean margin", "ties", "NaN", "n"], cells))
    return nans
