"""``dph evaluate``: a task's questions, answered by log-probability and by reward."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from dph.cli import common

if TYPE_CHECKING:
    from dph.evaluate.choices import Report

HELP = "answer a task's questions by log-probability and by reward"
EXAMPLE = "dph evaluate runs/align --task glue/sst2 --directory data --limit 500"
WITHOUT_HEAD = "--logprob-only needs no rewards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph evaluate``."""
    common.add_model(parser)
    parser.add_argument("--task", required=True, nargs="+", metavar="TASK", help="such as glue/sst2")
    parser.add_argument("--directory", metavar="DIR", help="read DIR/<task>/<split>.jsonl in place of the hub")
    parser.add_argument("--split", help="split to read (default: the one that the paper reports)")
    parser.add_argument("--limit", type=common.COUNT, metavar="N", help="only the first N records")
    common.add_judging(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Read every task's documents, then open the model and print a report per task."""
    from tqdm import tqdm

    from dph import tasks
    from dph.data.dataset import task_documents

    sources = []
    for task in [tasks.load(name) for name in args.task]:
        sources.append((task, task_documents(task, args.split or task.evaluated, args.directory)))
    common.check_model(args)

    from dph.evaluate.choices import evaluate

    model, tokenizer = common.open_model(args, None if args.logprob_only else args.head, WITHOUT_HEAD)
    head = None if args.logprob_only else args.head  # in place of a head's directory, by now its name
    reports = []
    for task, documents in sources:
        total = min(len(documents), args.limit or len(documents))
        progress = tqdm(islice(documents, total), task.name, total, disable=None)
        reports.append(evaluate(model, tokenizer, task, progress, head=head))
        if args.json:
            common.print_json(reports[-1].as_dict(), flush=True)
    if not args.json:
        print(_report_table(reports))
    common.check_nans(sum(report.nans for report in reports))


def _report_table(reports: Sequence[Report]) -> str:
    from dph.evaluate.tables import table

    rows = []
    for report in reports:
        for row in report.rows:
            for name, interval in row.metrics.items():
                figures = [name, interval.value, interval.range, row.ties, row.nans]
                rows.append([report.task, row.method, *figures, report.n])
    return table(["task", "method", "metric", "value", "95% interval", "ties", "NaN", "n"], rows)
