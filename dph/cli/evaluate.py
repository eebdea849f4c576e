"""``dph evaluate``: a task's questions, answered by log-probability and by reward."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.cli import common, results
from dph.errors import UserError

if TYPE_CHECKING:
    from dph.chat import Encoded
    from dph.data.dataset import Documents
    from dph.evaluate.choices import Report
    from dph.model.judging import Judged
    from dph.tasks import Task

HELP = "answer a task's questions by log-probability and by reward"
EXAMPLE = """dph evaluate runs/align --task glue/sst2 --directory data --limit 500
dph evaluate runs/align --task arc/easy boolq --output answers.jsonl"""
WITHOUT_HEAD = "--logprob-only needs no rewards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph evaluate``."""
    common.add_model(parser)
    parser.add_argument(
        "--task",
        required=True,
        nargs="+",
        metavar="TASK",
        help="such as glue/sst2 (dph tasks lists them), or a file (dph.tasks.own)",
    )
    parser.add_argument("--directory", metavar="DIR", help="read DIR/<task>/<split>.jsonl in place of the hub")
    parser.add_argument("--split", help="split to read (default: the one that the paper reports)")
    parser.add_argument("--limit", type=common.COUNT, metavar="N", help="only the first N records")
    results.add_output(parser, "every record with its reference and the scores of its choices")
    common.add_judging(parser)
    common.add_json(parser)


class _Questions:
    """Records of several tasks, end to end; index i is the i-th record of all. All are checked at once."""

    def __init__(self, sources: Sequence[tuple[Task, Documents]], limit: int | None) -> None:
        from dph.evaluate.choices import references

        self._sources, self._places = sources, []
        self.gold: list[list[float]] = []  # by task
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
        number, i = self._places[index]
        task, documents = self._sources[number]
        return {"task": task.name, "record": dict(documents[i]), "gold": self.gold[number][i], "scores": scores}


def run(args: argparse.Namespace) -> None:
    """Read and check every task's documents, then open the model and print a report per task."""
    folders = [] if args.directory is None else [Path(args.directory) / name for name in args.task]
    common.check_output(args.output, args.model, Path(args.model) / "model", *folders)

    from dph import tasks
    from dph.data.dataset import task_documents

    sources = []
    for task in [tasks.load(name) for name in args.task]:
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


def _report_table(reports: Sequence[Report]) -> str:
    from dph.evaluate.tables import table

    rows = []
    for report in reports:
        for row in report.rows:
            for name, interval in row.metrics.items():
                figures = [None, None] if interval is None else [interval.value, interval.range]
                rows.append([report.task, row.method, name, *figures, row.ties, row.n])
    return table(["task", "method", "metric", "value", "95% interval", "ties", "n"], rows)
