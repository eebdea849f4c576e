"""Predictions on GLUE's hidden test sets, as the files and the archive that its server (gluebenchmark.com) takes."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dph.data.atomic import atomic_file, write_text
from dph.errors import UserError, shown

ARCHIVE = "submission.zip"
HEADER = ("index", "prediction")
ENTAILMENT, NOT_ENTAILMENT = "entailment", "not_entailment"
THREE_WAY = (ENTAILMENT, "neutral", "contradiction")


class ServerFile(NamedTuple):
    """A file of a submission: its name, the text of each choice (empty: its number is a score), and its rows."""

    name: str
    labels: tuple[str, ...]
    rows: int


FILES = {
    "glue/cola": ServerFile("CoLA.tsv", ("0", "1"), 1063),
    "glue/sst2": ServerFile("SST-2.tsv", ("0", "1"), 1821),
    "glue/mrpc": ServerFile("MRPC.tsv", ("0", "1"), 1725),
    "glue/stsb": ServerFile("STS-B.tsv", (), 1379),
    "glue/qqp": ServerFile("QQP.tsv", ("0", "1"), 390_965),
    "glue/mnli_matched": ServerFile("MNLI-m.tsv", THREE_WAY, 9796),
    "glue/mnli_mismatched": ServerFile("MNLI-mm.tsv", THREE_WAY, 9847),
    "glue/qnli": ServerFile("QNLI.tsv", (ENTAILMENT, NOT_ENTAILMENT), 5463),
    "glue/rte": ServerFile("RTE.tsv", (ENTAILMENT, NOT_ENTAILMENT), 3000),
    "glue/wnli": ServerFile("WNLI.tsv", ("0", "1"), 146),
    "glue/ax": ServerFile("AX.tsv", THREE_WAY, 1104),
}


def check_counts(counts: Mapping[str, int]) -> None:
    """Raise UserError if a task is missing, or has another number of records than the server's test set."""
    for task, file in FILES.items():
        if counts.get(task) != file.rows:
            got = f"{counts[task]:,}" if task in counts else "none"
            raise UserError(f"{task}: expected the {file.rows:,} records of the test set, got {got}")


def write(directory: str | Path, predictions: Mapping[str, Sequence[int]]) -> Path:
    """Write the eleven files and the archive with all of them; return the archive's path.

    Args:
        directory: is created.
        predictions: task -> the chosen option of each record of the test split, in its order.

    Raises UserError as :func:`check_counts`.
    """
    check_counts({task: len(choices) for task, choices in predictions.items()})
    texts = {}
    for task, file in FILES.items():
        rows = [f"{index}\t{_label(file, choice)}" for index, choice in enumerate(predictions[task])]
        texts[file.name] = "\n".join(["\t".join(HEADER), *rows]) + "\n"
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in texts.items():
            file.writestr(zipfile.ZipInfo(name), text)  # no time of writing: the same bytes for the same predictions
    with atomic_file(folder / ARCHIVE) as file:
        file.write(archive.getvalue())
    check(folder / ARCHIVE)
    return folder / ARCHIVE


def _label(file: ServerFile, choice: int) -> str:
    return file.labels[choice] if file.labels else f"{choice:.3f}"


def check(archive: str | Path) -> None:
    """Raise UserError unless an archive is one that the server takes: its files, headers, indices, labels and rows."""
    with zipfile.ZipFile(archive) as opened:
        names = {file.name for file in FILES.values()}
        if set(opened.namelist()) != names:
            raise UserError(
                f"{archive}: expected {', '.join(sorted(names))}, got {', '.join(sorted(opened.namelist()))}"
            )
        for file in FILES.values():
            where = f"{archive}: {file.name}"
            lines = csv.reader(io.StringIO(opened.read(file.name).decode()), delimiter="\t")
            header, *rows = [tuple(line) for line in lines] or [()]
            if header != HEADER or len(rows) != file.rows:
                raise UserError(
                    f"{where}: expected {HEADER} and {file.rows:,} rows, got {shown(header)} and {len(rows):,}"
                )
            for index, row in enumerate(rows):
                fits = len(row) == 2 and row[0] == str(index)
                if fits and (row[1] in file.labels or (not file.labels and _is_score(row[1]))):
                    continue
                raise UserError(f"{where}:{index + 2}: expected {index} and a label of the task, got {shown(row)}")


def _is_score(text: str) -> bool:
    try:
        return 0 <= float(text) <= 5
    except ValueError:
        return False
