"""``dph evaluate`` and ``dph score``."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from tqdm import tqdm

from dph import chat, tasks
from dph.chat import Encoded
from dph.cli.models import check_head, dumps, open_model
from dph.data import dataset
from dph.evaluate.choices import PairRow, Report, prefer
from dph.evaluate.choices import evaluate as evaluate_task
from dph.evaluate.tables import table
from dph.model.model import Judged

HINT = "--logprob-only does without rewards"


def evaluate(args: argparse.Namespace) -> None:
    """``dph evaluate``."""
    wanted = [tasks.load(name) for name in args.task]
    sources = [(task, task.documents(args.split or task.evaluated, args.directory)) for task in wanted]
    model, tokenizer = open_model(args)
    head = _head(model, args)
    reports = []
    for task, docs in sources:
        total = min(len(docs), args.limit or len(docs))
        bar = tqdm(islice(docs, total), task.name, total, disable=None)
        reports.append(evaluate_task(model, tokenizer, task, bar, head=head))
        if args.json:
            print(dumps(reports[-1].as_dict()), flush=True)
    if not args.json:
        print(_report_table(reports))
    _complain(sum(report.nans for report in reports))


def _head(model: Any, args: argparse.Namespace) -> str | None:
    if args.logprob_only:
        return None
    check_head(model, args.head, HINT)
    return args.head


def _report_table(reports: Sequence[Report]) -> str:
    headers = ["task", "method", "metric", "value", "95% interval", "ties", "NaN", "n"]
    return table(
        headers,
        [
            [report.task, row.method, name, x.value, x.range, row.ties, row.nans, report.n]
            for report in reports
            for row in report.rows
            for name, x in row.metrics.items()
        ],
    )


def _complain(nans: int) -> None:
    """Raise RuntimeError where there were NaNs, so that the exit code tells."""
    if nans:
        raise RuntimeError(f"{nans} scores are not a number (NaN); where there was a choice they count as wrong")


def score(args: argparse.Namespace) -> None:
    """``dph score``: a line for each conversation, or a summary of the preferences; both to a file as JSON lines."""
    kind = _kind(args.file)
    records = dataset.load(args.file, kind)
    model, tokenizer = open_model(args)
    head = _head(model, args)
    with open(args.output or os.devnull, "w", encoding="utf-8") as file:
        empty: list[list[bool]] = []
        groups = _encoded(tqdm(records, "score", disable=None), tokenizer, empty)
        scored = [_scores(judged, none, head) for judged, none in zip(model.judge(groups), empty, strict=True)]
        for sides in scored:
            file.write(dumps(dict(zip(SIDES, sides, strict=True)) if len(sides) > 1 else sides[0]) + "\n")
    _complain((_show_pairs if kind == "preference" else _show_conversations)(scored, args.json))


SIDES = ("chosen", "rejected")
NAMES = {"reward": "reward", "logprob": "log-probability (sum)", "mean_logprob": "log-probability (mean)"}
Scores = dict[str, float | None]  # some of NAMES' keys; log-probabilities in nats; None: the mean of an empty answer


def _kind(path: str) -> str:
    first = next(dataset.read_jsonl(path), {})
    return "conversation" if None in map(first.get, SIDES) else "preference"


def _encoded(
    records: Iterable[dataset.Conversation | dataset.Preference], tokenizer: Any, empty: list[list[bool]]
) -> Iterator[list[Encoded]]:
    """Each record's alternatives, masked to their final answers; ``empty`` is told which have no content token."""
    for record in records:
        sides = [record.messages] if isinstance(record, dataset.Conversation) else [record.chosen, record.rejected]
        group = [chat.encode(side, tokenizer, last_only=True) for side in sides]
        empty.append([not any(side.score_mask) for side in group])
        yield group


def _scores(judged: Judged, empty: Sequence[bool], head: str | None) -> list[Scores]:
    columns = {} if head is None else {"reward": judged.rewards[head]}
    means = [None if nothing else mean for mean, nothing in zip(judged.mean_logprobs, empty, strict=True)]
    columns |= {"logprob": judged.logprobs, "mean_logprob": means}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _show_conversations(scored: Sequence[Sequence[Scores]], as_json: bool) -> int:
    """Print the scores; return how many are NaN."""
    lines = [scores for (scores,) in scored]
    if as_json:
        print("\n".join(map(dumps, lines)))
    else:
        print(table(["record", *(NAMES[key] for key in lines[0])], [[i, *x.values()] for i, x in enumerate(lines)]))
    return sum(math.isnan(value) for line in lines for value in line.values() if value is not None)


def _show_pairs(scored: Sequence[Sequence[Scores]], as_json: bool) -> int:
    """Print how often each score prefers the chosen answer; return how many comparisons have a NaN.

    A pair with an empty answer, which has no mean, is not compared by it.
    """
    rows = []
    for key in scored[0][0]:
        pairs = [(c[key], r[key]) for c, r in scored if None not in (c[key], r[key])]
        rows.append(prefer(NAMES[key], [c for c, _ in pairs], [r for _, r in pairs]))
    if as_json:
        print("\n".join(dumps(asdict(row)) for row in rows))
    else:
        print(
            table(["method", "pair accuracy", "95% interval", "mean margin", "ties", "NaN", "n"], map(_pair_row, rows))
        )
    return sum(row.nans for row in rows)


def _pair_row(row: PairRow) -> list[Any]:
    margin = None if row.margin is None else f"{row.margin:.3g}"  # rewards may be very small
    share, interval = (None, None) if row.accuracy is None else (row.accuracy.value, row.accuracy.range)
    return [row.method, share, interval, margin, row.ties, row.nans, row.n]
