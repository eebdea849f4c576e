"""Records of a data source, of the sources that a recipe lists, and of tasks.

    records = load("task:glue/sst2", "preference", directory="data")     # a sized, indexable sequence of Preference
    batches = PairBatches(Shuffled(records, seed=0), Encoder(tokenizer), pairs=64, max_length=2048)
    state = batches.state_dict()                                         # plain JSON, continues exactly

Records are defined in ``dph.data.formats``, samplers in ``dph.data.sampler``, batches of streams and of pairs in
``dph.data.batching`` and ``dph.data.packing``.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dph import tasks
from dph.data import files, folders
from dph.data.conversions import check_columns
from dph.data.files import Documents
from dph.data.formats import (
    EXPECTED_FIELDS,
    LABELLED,
    PAIRED,
    Preference,
    Record,
    Records,
    RowRecords,
    from_messages,
)
from dph.data.json_lines import combined_fingerprint
from dph.data.labels import Label, Labelled
from dph.data.row_format import RowFormat
from dph.data.sampler import Interleaved, Shuffled, draw, read
from dph.data.sources import (
    Concatenated,
    HubRecords,
    Limited,
    Selected,
    TextRecords,
    fingerprint,
    location,
    prompt_key,
    read_hub,
    rows_fingerprint,
)
from dph.errors import UserError, shown
from dph.tasks import Task


def load(
    spec: str | Path,
    kind: str,
    *,
    split: str = "train",
    directory: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    text_field: str = "text",
    columns: Mapping[str, str] | None = None,
    filter: Mapping[str, Any] | None = None,
    format: str | None = None,
    redraw: bool = True,
) -> Sequence[Record]:
    """Return the records of one source. Every row of a file is checked at once.

    Args:
        spec: ``task:NAME``, ``hub:NAME[:CONFIG]``, a file of rows (``dph.data.files``: JSON lines, JSON, CSV, TSV,
            parquet, arrow), a .txt file (one document, text only), a folder of such files, or one written by
            ``save_to_disk`` of the package datasets. A text of a file that is longer than ``MAX_TEXT`` characters is
            several records.
        kind: "preference", "labelled preference" (or answers with other labels, ``dph.data.label_fields``),
            "conversation" or "text". A task's conversation ends in the right answer; its preference pairs that with a
            wrong answer drawn by ``seed``, index and visit.
        split: of a task, hub data set or folder of ``save_to_disk``.
        directory: folder of tasks' local files, ``directory/<task>/<split>.jsonl``; None: the hub.
        limit: use only the first records.
        seed: of the wrong answers.
        text_field: field that holds plain text.
        columns: own name -> name in the data, of fields to rename (not of tasks).
        filter: name in the data -> value or list of values of the rows that are used (not of tasks).
        format: "rendered": texts are conversations in the markup of a chat format (not of tasks).
        redraw: whether a sampler's later visits to a task's pair draw other wrong answers; False: that of the first.

    Raises UserError if the source is missing, empty or malformed, or cannot give records of ``kind``.
    """
    if kind not in EXPECTED_FIELDS:
        raise UserError(f"kind: expected {', '.join(EXPECTED_FIELDS)}, got {shown(kind)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit: expected at least 1, got {shown(limit)}")
    if format not in (None, "rendered"):
        raise UserError(f"format: expected rendered or none, got {shown(format)}")
    check_columns(columns or {})
    row_format = RowFormat(kind, text_field, columns, filter, format == "rendered")
    origin, _, name = str(spec).partition(":")
    if origin == "task":
        for option, value in (("columns", columns), ("filter", filter), ("format", format)):
            if value:
                raise UserError(f"{option}: expected none for {spec}, whose fields are known, got {shown(value)}")
        records = TaskRecords(name, kind, split, directory, seed, redraw)
    elif origin == "hub":
        records = HubRecords(name, split, row_format)
    else:
        records = _load_files(Path(spec), kind, split, row_format)
    if not len(records):
        fitting = f" that fits the filter {shown(dict(filter))}" if filter else ""
        raise UserError(f"{spec}: expected at least one record{fitting}, got none")
    files.report_ignored(spec, row_format.ignored - row_format.filter.keys())
    if origin in ("task", "hub"):
        records[0]  # hidden labels, missing fields and the wrong kind are errors now rather than at the first batch
    return records if limit is None else Limited(records, limit)


def _load_files(path: Path, kind: str, split: str, row_format: RowFormat) -> Sequence[Record]:
    """Return the records of a file, or of all files of a folder in the order of their names."""
    paths = [path]
    if path.is_dir():
        if folders.is_saved_dataset(path):
            return RowRecords(partial(folders.open_saved_dataset, path, split), row_format)
        paths = folders.files_in(path)
        if not paths:
            raise UserError(f"{path}: expected {', '.join((*files.ROWS, *files.TEXT))} files in the folder, got none")
    else:
        check_is_no_task(path)
    parts: list[Sequence[Record]] = []
    for file in paths:
        if files.is_text(file):
            parts.append(TextRecords(file, kind))
        else:
            open_rows = partial(files.open_rows, file, len(paths) <= folders.MAX_OPEN)
            parts.append(RowRecords(open_rows, row_format))
    return parts[0] if len(parts) == 1 else Concatenated(parts)


def check_is_no_task(path: Path) -> None:
    """Raise UserError if a path is the name of a task, and no folder."""
    if str(path) in tasks.names() and not path.is_dir():
        raise UserError(f"{path}: expected a file, task:NAME or hub:NAME; did you mean task:{path}?")


class TaskRecords(Records):
    """Records of a task's split, made from its documents when they are read."""

    def __init__(
        self, spec: str, kind: str, split: str, directory: str | Path | None, seed: int, redraw: bool = True
    ) -> None:
        task = tasks.load(spec)
        if kind in PAIRED and not task.paired:
            raise UserError(
                f"task {task.name}: has no wrong answers, so it gives text and conversations but no preferences"
            )
        self._documents, self._definition = task_documents(task, split, directory), task.definition
        # By its name or file: its functions cannot be pickled for worker processes.
        self._spec, self._kind, self._seed, self._redraw = spec, kind, seed, redraw

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._documents)

    def __getitem__(self, index: int) -> Record | None:
        """Return one record at its first visit, as :meth:`at_visit`."""
        return self.at_visit(index, 0)

    def at_visit(self, index: int, visit: int) -> Record | None:
        """Return one record; None is a pair without a wrong answer. Raises UserError if the right one is hidden.

        The wrong answer of a pair is drawn again at each visit.
        """
        index = range(len(self))[index]
        task, document = tasks.load(self._spec), self._documents[index]
        if task.definition != self._definition:
            raise UserError(f"{self._spec}: the file changed during the run: expected the task as it was at the start")
        try:
            right, wrong = task.answers(document, with_wrong=self._kind in PAIRED)
        except UserError as error:
            raise UserError(f"{self._documents.location(index)}: {error}") from error
        if not right:
            reason = f"task {task.name}: expected a label, got none; the answers of this split are hidden"
            raise UserError(f"{self._documents.location(index)}: {reason}")
        if self._kind not in PAIRED:
            return from_messages(right[0], self._kind, "")
        if not wrong:
            return None
        key = (self._seed, task.name, index)
        drawn = draw(len(wrong), *key, visit) if visit and self._redraw else draw(len(wrong), *key)
        return Preference(right[0], wrong[drawn])

    def location(self, index: int) -> str:
        """Return FILE:LINE of a document, or the task, split and number of a record of the hub."""
        return self._documents.location(range(len(self))[index])

    def fingerprint(self) -> str:
        """Return a digest of the documents."""
        return self._documents.fingerprint()


def task_documents(task: Task, split: str, directory: str | Path | None = None) -> Documents:
    """Return the documents of a task's split: of ``directory/<task>/<split>.jsonl``, or of the hub if None.

    Raises UserError if the split is unknown, the file is missing, the hub cannot be read, or a document of the file is
    malformed.
    """
    if split not in task.splits:
        raise UserError(f"task {task.name}: expected split {', '.join(task.splits)}, got {split!r}")
    if task.file is not None:
        return _read_documents(task, task.file, split)
    if directory is not None:
        return _read_documents(task, Path(directory) / task.name / f"{split}.jsonl", split)
    rows = read_hub(task.hub, task.config, task.splits[split])
    place = f"task {task.name}, {split} record "
    digest = _with_definition(
        task, combined_fingerprint(task.hub, task.config, task.splits[split], rows_fingerprint(rows))
    )
    if task.keep is None:
        return Documents(rows, digest, place)
    indices = array("q")
    for i, document in enumerate(rows):
        if _uses(task, document, f"{place}{i}"):
            indices.append(i)
    return Documents(rows, digest, place, numbers=indices, indices=indices)


def _read_documents(task: Task, path: Path, split: str) -> Documents:
    """Return the documents of a file or folder, in memory and checked, but for those that the task leaves out."""
    documents: list[Mapping[str, Any]] = []
    locations: list[str] = []
    ignored: set[str] = set()

    def visit(place: str) -> Callable[[int, Mapping[str, Any]], None]:
        def take(number: int, document: Mapping[str, Any]) -> None:
            if _uses(task, document, f"{place}{number}"):
                documents.append(document)
                locations.append(f"{place}{number}")
            if task.read:
                ignored.update(name for name in document.keys() - task.read if document[name] is not None)

        return take

    digest = folders.open_path(path, visit, split).fingerprint()
    files.report_ignored(path, ignored)
    if not documents:
        raise UserError(f"{path}: expected at least one record that the task uses, got none")
    return Documents(documents, _with_definition(task, digest), "", locations)


def _with_definition(task: Task, digest: str) -> str:
    """Return the fingerprint of documents, given that of their rows."""
    return combined_fingerprint(digest, task.definition) if task.definition else digest


def _uses(task: Task, document: Mapping[str, Any], location: str) -> bool:
    """Check a document, and return whether the task uses it."""
    try:
        task.check(document)
    except UserError as error:
        raise UserError(f"{location}: {error}") from error
    return task.keep is None or task.keep(document)


class Source(Protocol):
    """One source of a recipe: arguments of :func:`load`, and its ``weight`` in a mixture, a number or "size"."""

    source: str
    split: str | None
    directory: str | None
    weight: float | str
    limit: int | None
    text_field: str
    columns: Mapping[str, Any] | None
    filter: Mapping[str, Any] | None
    format: str | None
    head: str | None


def mixture(
    datasets: Sequence[Sequence[Record]], seed: int, run: int = 5, weights: Sequence[float] | None = None
) -> Interleaved:
    """Return a sampler over several sources, each shuffled by a seed of its own (see :class:`Interleaved`)."""
    shuffled = [Shuffled(records, draw(2**63, seed, i)) for i, records in enumerate(datasets)]
    return Interleaved(shuffled, seed, run, weights)


def open_training(
    sources: Sequence[Source],
    kind: str,
    *,
    directory: str | None,
    seed: int,
    consecutive: int,
    share: float = 0.0,
    redraw: bool = True,
) -> tuple[Interleaved, Sequence[Record]]:
    """Return the sampler of the training records, and the development records, which are not among them.

    Args:
        sources, kind, directory, seed, redraw: see :func:`load`.
        consecutive: records of one source that follow each other.
        share: of the prompts, those of the development records (kind "preference").

    Raises UserError, which begins with the source's key ``data.sources.N``, if a source cannot be read, or if a share
    leaves it no training records.
    """
    if not sources:
        raise UserError("data.sources: expected at least one source, got none")
    datasets, development = [], []
    for i, source in enumerate(sources):
        try:
            records = _open_source(source, kind, "train", directory, seed, redraw)
        except UserError as error:
            raise UserError(f"data.sources.{i}: {error}") from error
        if share:
            records, kept = split_by_prompt(records, share, seed)
            development += kept
        if not len(records):
            raise UserError(f"data.sources.{i}: expected records besides the share {share} of evaluation, got none")
        datasets.append(records)
    weights = []
    for source, records in zip(sources, datasets, strict=True):
        weights.append(float(len(records)) if source.weight == "size" else source.weight)
    return mixture(datasets, seed, consecutive, weights), development


def split_by_prompt(
    records: Sequence[Preference | Labelled | None], share: float, seed: int
) -> tuple[Records, list[Preference | Labelled]]:
    """Return the records to train on, and those of a ``share`` of the prompts, drawn by ``seed`` and prompt alone."""
    train, kept = array("q"), []
    for i in range(len(records)):
        record = records[i]
        if record is not None and draw(2**32, seed, "development", prompt_key(record)) < share * 2**32:
            kept.append(record)
        else:
            train.append(i)
    return Selected(records, train), kept


def open_held_out(
    sources: Sequence[Source], kind: str, *, directory: str | None, seed: int
) -> dict[str, Sequence[Record]]:
    """Return the held-out records of each source, by unique names.

    Raises UserError, which begins with the source's key ``evaluation.sources.N``, if a source cannot be read.
    """
    held_out: dict[str, Sequence[Record]] = {}
    for i, source in enumerate(sources):
        try:
            records = _open_source(source, kind, "validation", directory, seed)
        except UserError as error:
            raise UserError(
                f"evaluation.sources.{i}: {error}; evaluation.sources=[] trains without evaluation"
            ) from error
        name = source.source.removeprefix("task:")
        if name in held_out:
            name = f"{name}, {source.split or len(held_out)}"
        held_out[name] = records
    return held_out


def _open_source(
    source: Source, kind: str, split: str, directory: str | None, seed: int, redraw: bool = True
) -> Sequence[Record]:
    """Load a recipe's source; ``split`` and ``directory`` apply if it names none."""
    records = load(
        source.source,
        LABELLED if kind == "preference" else kind,
        split=source.split or split,
        directory=source.directory or directory,
        limit=source.limit,
        seed=seed,
        text_field=source.text_field,
        columns=source.columns,
        filter=source.filter,
        format=source.format,
        redraw=redraw,
    )
    return records if source.head is None else ForHead(records, source.head, source.source)


class ForHead(Records):
    """Records whose labels are for one head; ``name`` of the source for messages."""

    def __init__(self, records: Sequence[Record], head: str, name: str) -> None:
        self._records, self._head, self._name = records, head, name

    def __len__(self) -> int:
        """Number of records."""
        return len(self._records)

    def __getitem__(self, index: int) -> Labelled | None:
        """Return one record."""
        return self.at_visit(index, 0)

    def at_visit(self, index: int, visit: int) -> Labelled | None:
        """Return one record at a visit."""
        return for_head(read(self._records, index, visit), self._head, self._name)

    def location(self, index: int) -> str:
        """Return the place of a record."""
        return location(self._records, index)

    def fingerprint(self) -> str:
        """Return a digest of the records and the head."""
        return combined_fingerprint(fingerprint(self._records), self._head)


def for_head(record: Any, head: str, where: str) -> Labelled | None:
    """Return a record with its labels for one head: a ``Labelled``, or a pair with chosen and rejected.

    Raises UserError, which begins with ``where``, if a label names a head itself.
    """
    if record is None:
        return None
    if not isinstance(record, Labelled):
        return Labelled([record.chosen, record.rejected], (Label(0, 1, head),))
    labels = []
    for label in record.labels:
        if label.head is not None:
            raise UserError(f"{where}: expected records without heads in a source of head {head}, got {label.head}")
        labels.append(Label(label.better, label.worse, head, label.weight, label.margin))
    return Labelled(record.answers, tuple(labels))
