"""``dph evaluate``: a task's questions, answered by log-probability and by reward."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.cli import common, results
from dph.errors import UserError, printable

if TYPE_CHECKING:
    from dph.chat import Encoded
    from dph.data.dataset import Documents
    from dph.evaluate.choices import Report
    from dph.model.judging import Judged
    from dph.tasks import Task

HELP = "answer a task's questions by log-probability and by reward"
NO_LABELS = "no labels"
EXAMPLE = """dph evaluate runs/align --task glue/sst2 --directory data --limit 500
dph evaluate runs/align --task glue/ax --output predictions.jsonl
dph evaluate runs/align --task arc/easy boolq --output answers.jsonl"""
WITHOUT_HEAD = "--logprob-only needs no rewards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph evaluate``."""
    parser.description = f"""{HELP}.

A line of the output has the task, the index of the record, from 0, the record itself, the index of the right choice
(gold, null if it is hidden), and by each method the scores of all choices, and the index and text of the chosen one.
Records without a label have no part in the metrics."""
    common.add_model(parser)
    parser.add_argument(
        "--task",
        required=True,
        nargs="+",
        metavar="TASK",
        help="such as glue/sst2 (dph tasks lists them), or a file, a folder or hub:NAME (dph.tasks.own)",
    )
    parser.add_argument("--directory", metavar="DIR", help="read DIR/<task>/<split>.jsonl in place of the hub")
    parser.add_argument("--split", help="split to read (default: the one that the paper reports)")
    parser.add_argument("--limit", type=common.COUNT, metavar="N", help="only the first N records")
    results.add_output(parser, "every record with its reference, the scores of its choices and the chosen one")
    common.add_judging(parser)
    common.add_json(parser)


class _Questions:
    """Records of several tasks, end to end; index i is the i-th record of all. All are checked at once."""

    def __init__(self, sources: Sequence[tuple[Task, Documents]], limit: int | None) -> None:
        from dph.evaluate.choices import references

        self._sources, self._places = sources, []
        self.gold: list[list[float | None]] = []  # by task
        for number, (task, documents) in enumerate(sources):
            used = range(min(len(documents), limit or len(documents)))
            self.gold.append(references(task, [documents[i] for i in used], documents.location))
            self._places += [(number, i) for i in used]

    def __len__(self) -> int:
        """Number of records."""
        return len(self._places)

    def location(self, index: int) -> str:
        """Return FILE:LINE of a record, or what names a record of the hub."""
        number, i = self._places[index]
        return self._sources[number][1].location(i)

    def groups(self, tokenizer: Any) -> Callable[[int], Iterator[list[Encoded]]]:
        """Return a function that yields the encoded choices of each record from an index on."""
        from dph.evaluate.choices import encoded_choices

        def encoded(start: int) -> Iterator[list[Encoded]]:
            for index in range(start, len(self)):
                number, i = self._places[index]
                task, documents = self._sources[number]
                try:
                    yield from encoded_choices(task, [documents[i]], tokenizer)
                except UserError as error:
                    raise UserError(f"{self.location(index)}: {error}") from error

        return encoded

    def line(self, index: int, scores: dict[str, Any]) -> dict[str, Any]:
        """Return a record's line of the output."""
        from dph.evaluate.choices import predictions

        number, i = self._places[index]
        task, documents = self._sources[number]
        return {
            "task": task.name,
            "index": i,
            "record": dict(documents[i]),
            "gold": self.gold[number][i],
            "scores": scores,
            "predictions": predictions(task, documents[i], scores),
        }


def run(args: argparse.Namespace) -> None:
    """Read and check every task's documents, then open the model and print a report per task."""
    from dph import tasks
    from dph.data.dataset import task_documents

    names = [name.removeprefix("task:") for name in args.task]
    chosen = [tasks.load(name) for name in names]
    inputs = [*names, *(task.file for task in chosen if task.file is not None)]
    if args.directory is not None:
        inputs += [Path(args.directory) / name for name in names]
    common.check_output(args.output, args.model, Path(args.model) / "model", *inputs)
    sources = []
    for task in chosen:
        sources.append((task, task_documents(task, args.split or task.evaluated, args.directory)))
    questions = _Questions(sources, args.limit)
    common.check_model(args)

    from dph.evaluate.choices import choice_scores, report

    model, tokenizer, heads = common.open_model(args, common.heads_of(args), WITHOUT_HEAD)
    about = {
        "command": "evaluate",
        "tasks": args.task,
        "input": [documents.fingerprint() for _, documents in sources],
        "limit": args.limit,
    }
    if args.output is not None:
        about |= results.about_model(model, tokenizer, heads)

    def line(index: int, judged: Judged) -> dict[str, Any]:
        return questions.line(index, choice_scores(judged, heads, questions.location(index)))

    reports: list[Report] = []
    with (
        results.Results(args.output, about, args.resume) as output,
        results.Progress("evaluate", len(questions)) as progress,
    ):
        groups = questions.groups(tokenizer)
        lines = results.judged_lines(model, groups, line, questions.location, output, progress)
        for (task, _), gold in zip(sources, questions.gold, strict=True):
            scores = [written["scores"] for written in islice(lines, len(gold))]
            reports.append(report(task, scores, gold))
            if args.json:
                common.print_json(reports[-1].as_dict(), flush=True)
    if not args.json:
        print(_report_table(reports))
    for report_of_task in reports:
        _note_hidden(report_of_task, args.output)


def _note_hidden(report: Report, output: str | None) -> None:
    """Print to stderr how many records have no label, and what became of them."""
    if report.labels < report.n:
        found = f"{report.task}: {report.n - report.labels} of {report.n} records have no label"
        written = "their predictions are in --output" if output else "--output FILE writes their predictions"
        print(printable(f"{found} and no part in the metrics; {written}"), file=sys.stderr)


def _report_table(reports: Sequence[Report]) -> str:
    from dph.evaluate.tables import table

    rows = []
    for report in reports:
        for row in report.rows:
            for name, interval in row.metrics.items():
                figures = [None, None] if interval is None else [interval.value, interval.range]
                if not report.labels:
                    figures[0] = NO_LABELS
                rows.append([report.task, row.method, name, *figures, row.ties, row.n])
    return table(["task", "method", "metric", "value", "95% interval", "ties", "n"], rows)
