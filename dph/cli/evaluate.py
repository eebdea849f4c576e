"""``dph evaluate``: a task's questions, answered by log-probability and by reward."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.cli import candidate_sets, common, results
from dph.errors import UserError, printable

if TYPE_CHECKING:
    from dph.chat import Encoded
    from dph.data.dataset import Documents
    from dph.evaluate.choices import Report
    from dph.evaluate.metrics import Interval
    from dph.model.judging import Judged
    from dph.tasks import Task

HELP = "answer a task's questions by log-probability and by reward"
NO_LABELS = "no labels"
EXAMPLE = """dph evaluate runs/align --task glue/sst2 --directory data --limit 500
dph evaluate runs/align --suite gpt4all --table gpt4all.md
dph evaluate runs/align --task mmlu/all --shots 5
dph evaluate runs/align --glue-submission submission
dph evaluate runs/align --candidates samples.jsonl --normalise number
dph evaluate runs/align --task glue/ax --output predictions.jsonl
dph evaluate runs/align --task arc/easy boolq --output answers.jsonl"""
HEADERS = ("task", "method", "metric", "value", "95% interval", "ties", "n")
CSV_HEADERS = (*HEADERS[:4], "low", "high", *HEADERS[5:])  # numbers in place of the interval's text
TABLES = (".md", ".csv", ".json")
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
        nargs="+",
        default=[],
        metavar="TASK",
        help="such as glue/sst2 (dph tasks lists them), or a file, a folder or hub:NAME (dph.tasks.own)",
    )
    parser.add_argument(
        "--suite",
        choices=("glue", "gpt4all", "race", "mmlu", "all"),
        help="the tasks of a table of the paper, and their averages; with --directory those that are there",
    )
    parser.add_argument(
        "--candidates",
        nargs="+",
        metavar="FILE",
        help="in place of tasks: rows of prompt, candidates and correct, or of prompt and lists of chosen and rejected "
        "(RewardBench 2, with subset); best of N by each rule",
    )
    common.add_normalise(parser)
    parser.add_argument(
        "--glue-submission",
        metavar="DIR",
        help="in place of tasks: predictions on GLUE's hidden test sets, as files and zip for its server, in a folder "
        "of DIR for each method",
    )
    parser.add_argument("--directory", metavar="DIR", help="read DIR/<task>/<split>.jsonl in place of the hub")
    parser.add_argument(
        "--shots",
        type=common.SHOTS,
        default=0,
        metavar="K",
        help="answered records in front of each question (default: 0)",
    )
    parser.add_argument(
        "--logprob",
        nargs="+",
        choices=("mean", "sum", "bytes"),
        default=["mean"],
        help="log-probabilities that choose: mean per token, sum, or sum per byte of the answer (default: mean)",
    )
    parser.add_argument(
        "--table", metavar="FILE", help="write the table and the averages to a .md, .csv or .json file, by its suffix"
    )
    parser.add_argument("--split", help="split to read (default: the one that the paper reports)")
    parser.add_argument("--limit", type=common.COUNT, metavar="N", help="only the first N records")
    results.add_output(parser, "every record with its reference, the scores of its choices and the chosen one")
    common.add_judging(parser)
    common.add_json(parser)


class _Questions:
    """Records of several tasks, end to end; index i is the i-th record of all. All are checked at once."""

    def __init__(self, sources: Sequence[tuple[Task, Documents]], args: argparse.Namespace) -> None:
        from dph.evaluate.choices import references
        from dph.evaluate.few_shot import Demonstrations

        self._sources, self._places = sources, []
        self._demonstrations = [Demonstrations(task, args.shots, args.directory) for task, _ in sources]
        self.gold: list[list[float | None]] = []  # by task
        for number, (task, documents) in enumerate(sources):
            used = range(min(len(documents), args.limit or len(documents)))
            self.gold.append(references(task, [documents[i] for i in used], documents.location))
            self._places += [(number, i) for i in used]

    def __len__(self) -> int:
        """Number of records."""
        return len(self._places)

    def location(self, index: int) -> str:
        """Return FILE:LINE of a record, or what names a record of the hub."""
        number, i = self._places[index]
        return self._sources[number][1].location(i)

    def fingerprints(self) -> list[str]:
        """Return digests of each task's records, and of those that are demonstrations."""
        found = [documents.fingerprint() for _, documents in self._sources]
        return found + [shown.fingerprint() for shown in self._demonstrations]

    def groups(self, tokenizer: Any) -> Callable[[int], Iterator[list[Encoded]]]:
        """Return a function that yields the encoded choices of each record from an index on."""
        from dph import chat

        def encoded(start: int) -> Iterator[list[Encoded]]:
            for index in range(start, len(self)):
                number, i = self._places[index]
                task, documents = self._sources[number]
                try:
                    choices = self._demonstrations[number].before(documents[i], task.choices(documents[i]))
                    yield [chat.encode(choice, tokenizer, last_only=True) for choice in choices]
                except UserError as error:
                    raise UserError(f"{self.location(index)}: {error}") from error

        return encoded

    def answers(self, index: int) -> list[str]:
        """Return the texts of a record's choices."""
        number, i = self._places[index]
        task, documents = self._sources[number]
        return [choice[-1]["content"] for choice in task.choices(documents[i])]

    def line(self, index: int, answers: Sequence[str], scores: dict[str, Any]) -> dict[str, Any]:
        """Return a record's line of the output, given the texts and scores of its choices."""
        from dph.evaluate.choices import predictions

        number, i = self._places[index]
        task, documents = self._sources[number]
        return {
            "task": task.name,
            "index": i,
            "record": dict(documents[i]),
            "gold": self.gold[number][i],
            "scores": scores,
            "predictions": predictions(answers, scores),
        }


def run(args: argparse.Namespace) -> None:
    """Read and check every task's documents, then open the model and print a report per task."""
    if args.candidates:
        candidate_sets.run(args)
        return
    if args.normalise != "words":
        raise UserError("--normalise: expected --candidates with it, got none")

    from dph import tasks
    from dph.data.dataset import task_documents
    from dph.evaluate import glue_server

    splits = _splits(args)
    names = list(splits)
    loaded = [tasks.load(name) for name in names]
    inputs = [*names, *(task.file for task in loaded if task.file is not None)]
    if args.directory is not None:
        inputs += [Path(args.directory) / name for name in names]
    for option, output in (("--output", args.output), ("--table", args.table)):
        common.check_output(output, args.model, Path(args.model) / "model", *inputs, option=option)
    if args.table is not None and Path(args.table).suffix not in TABLES:
        raise UserError(f"--table: expected a file that ends in {', '.join(TABLES)}, got {args.table}")
    if None not in (args.output, args.table) and Path(args.output).resolve() == Path(args.table).resolve():
        raise UserError(f"--table: expected another file than --output, got {args.table} for both")
    sources = []
    for name, task in zip(names, loaded, strict=True):
        sources.append((task, task_documents(task, splits[name] or task.evaluated, args.directory)))
    if args.glue_submission:
        glue_server.check_counts({task.name: len(documents) for task, documents in sources})
    questions = _Questions(sources, args)
    common.check_model(args)

    from dph.evaluate import suites
    from dph.evaluate.choices import choice_scores, report

    model, tokenizer, heads = common.open_model(args, common.heads_of(args), WITHOUT_HEAD)
    about = {
        "command": "evaluate",
        "tasks": names,
        "input": questions.fingerprints(),
        "limit": args.limit,
        "shots": args.shots,
        "logprob": args.logprob,
    }
    if args.output is not None:
        about |= results.about_model(model, tokenizer, heads)

    def line(index: int, judged: Judged) -> dict[str, Any]:
        place, answers = questions.location(index), questions.answers(index)
        return questions.line(index, answers, choice_scores(judged, heads, place, args.logprob, answers))

    reports: list[Report] = []
    submissions: dict[str, dict[str, list[int]]] = {}  # method -> task -> choices
    groups = questions.groups(tokenizer)
    job = results.judging("evaluate", len(questions), model, groups, line, questions.location, about)
    with results.written(job, args.output, args.resume) as lines:
        for (task, _), gold in zip(sources, questions.gold, strict=True):
            scores = []
            for written in islice(lines, len(gold)):
                scores.append(written["scores"])
                for method, chosen in written["predictions"].items() if args.glue_submission else ():
                    submissions.setdefault(method, {}).setdefault(task.name, []).append(chosen["choice"])
            reports.append(report(task, scores, gold))
            if args.json:
                common.print_json(reports[-1].as_dict(), flush=True)
    averages = suites.averages(reports, suites.SUITES[args.suite].averages if args.suite else ())
    if args.json:
        for name, method, figure in averages:
            common.print_json({"average": name, "method": method, **asdict(figure)})
    else:
        print(_table(reports, averages))
    if args.table is not None:
        _write_table(args.table, reports, averages)
    for method, choices in submissions.items():
        _note(f"written: {glue_server.write(Path(args.glue_submission) / method, choices)}")
    for report_of_task in reports:
        _note_hidden(report_of_task, args.output)
    if args.suite:
        for name, lacks in suites.missing(reports, suites.SUITES[args.suite].averages).items():
            _note(f"no average {name}, for want of records with labels of {', '.join(lacks)}")


def _splits(args: argparse.Namespace) -> dict[str, str | None]:
    """Return the tasks to evaluate, by name, and the split of each; None for the one that the paper reports.

    Of a suite's tasks in --directory those without any file are left out, and those without the file of that split have
    another one evaluated; a note says so.
    """
    from dph import tasks
    from dph.evaluate.suites import SUITES

    if args.glue_submission:
        from dph.evaluate.glue_server import FILES

        if args.task or args.suite or args.limit or args.split or args.shots:
            raise UserError("--glue-submission: expected no --task, --suite, --limit, --split or --shots, got one")
        return dict.fromkeys(FILES, "test")
    splits = {name.removeprefix("task:"): args.split for name in args.task}
    if args.suite is None and not splits:
        raise UserError("--task, --suite, --candidates, --glue-submission: expected one of them, got none")
    lacking = []
    for name in SUITES[args.suite].tasks if args.suite else ():
        if name in splits:
            continue
        task = tasks.load(name)
        wanted = args.split or task.evaluated
        there = [wanted]
        if args.directory is not None:
            order = [wanted] if args.split else dict.fromkeys((wanted, "validation", "test", "train"))
            there = [split for split in order if (Path(args.directory) / name / f"{split}.jsonl").is_file()]
        if not there:
            lacking.append(name)
            continue
        splits[name] = there[0]
        if there[0] != wanted:
            _note(f"{name}: {there[0]} records are evaluated, as {args.directory} has none of the split {wanted}")
    if not splits:
        raise UserError(f"--directory: expected DIR/TASK/SPLIT.jsonl of a task of {args.suite}, got none there")
    if lacking:
        _note(f"left out, as {args.directory} has no file: {', '.join(lacking)}")
    return splits


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr)


def _note_hidden(report: Report, output: str | None) -> None:
    """Print to stderr how many records have no label, and what became of them."""
    if report.labels < report.n:
        found = f"{report.task}: {report.n - report.labels} of {report.n} records have no label"
        written = "their predictions are in --output" if output else "--output FILE writes their predictions"
        _note(f"{found} and no part in the metrics; {written}")


def _cells(reports: Sequence[Report], averages: Sequence[tuple[str, str, Interval]]) -> list[list[Any]]:
    """Return the rows of CSV_HEADERS of the table of tasks, and of the averages below it."""
    rows = []
    for report in reports:
        for row in report.rows:
            for name, interval in row.metrics.items():
                figures = [None] * 3 if interval is None else [interval.value, interval.low, interval.high]
                if not report.labels:
                    figures[0] = NO_LABELS
                rows.append([report.task, row.method, name, *figures, row.ties, row.n])
    for name, method, figure in averages:
        rows.append([name, method, "average", figure.value, figure.low, figure.high, None, None])
    return rows


def _shown(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Return rows of HEADERS from those of :func:`_cells`: the ends of an interval in one cell."""
    shown = []
    for row in rows:
        *before, low, high, ties, n = row
        shown.append([*before, None if low is None else f"{low:.3f} to {high:.3f}", ties, n])
    return shown


def _table(reports: Sequence[Report], averages: Sequence[tuple[str, str, Interval]]) -> str:
    from dph.evaluate.tables import table

    return table(HEADERS, _shown(_cells(reports, averages)))


def _write_table(path: str, reports: Sequence[Report], averages: Sequence[tuple[str, str, Interval]]) -> None:
    """Write the table in the format of the file's suffix."""
    import csv
    import io

    from dph.data.atomic import write_text
    from dph.evaluate.tables import markdown_table

    cells = _cells(reports, averages)
    if path.endswith(".md"):
        text = markdown_table(HEADERS, _shown(cells)) + "\n"
    elif path.endswith(".csv"):
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([CSV_HEADERS, *cells])
        text = file.getvalue()
    else:
        rows = [{"average": name, "method": method, **asdict(figure)} for name, method, figure in averages]
        text = common.json_line({"tasks": [report.as_dict() for report in reports], "averages": rows}) + "\n"
    write_text(path, text)
