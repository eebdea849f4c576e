"""Records from files, the hub and tasks, and the batches that training takes. All of it resumes exactly.

    source = load("task:glue/sst2", "preference", directory="data")      # a sized, indexable sequence of Preference
    batches = PairBatches(Shuffled(source, seed=0), encoder(tokenizer), pairs=64, max_length=2048)
    state = batches.state_dict()                                         # plain JSON

``dph.data.formats`` says what a record is, ``dph.data.sampler`` which comes next, ``dph.data.batching`` what training takes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from dph import chat, tasks
from dph.data.batching import PairBatches, Streams
from dph.data.formats import FORMS, Conversation, Preference, Record, Text, encoder, lower, record
from dph.data.sampler import InOrder, Interleaved, Shuffled, draw
from dph.data.sources import JsonLines, read_hub, read_jsonl, read_text
from dph.errors import UserError

__all__ = [
    "Conversation",
    "InOrder",
    "Interleaved",
    "PairBatches",
    "Preference",
    "Records",
    "Shuffled",
    "Streams",
    "Text",
    "encoder",
    "load",
    "mixture",
    "read_jsonl",
    "record",
]


# Characters of a text beyond which it is cut. Parallel streams take whole records, so a corpus in one would be read by
# all of them at once, and be what a checkpoint has to hold of each.
PIECE = 2**16


class Records(Sequence):
    """A sized, indexable sequence of records: what ``read`` makes of index i.

    Worker processes (``dph.data.workers``) take it over, so ``read`` is no closure here but a ``partial`` of a function.
    """

    def __init__(self, size: int, read: Callable[[int], Record | None]) -> None:
        self._size, self._read = size, read

    def __len__(self) -> int:
        """How many records."""
        return self._size

    def __iter__(self) -> Iterator[Record | None]:
        """All records; an IndexError inside ``read`` is not taken for the end."""
        return map(self._read, range(self._size))

    def __getitem__(self, index: int) -> Record | None:
        """One record; None is a pair that could not be made, since the document has no wrong answer."""
        return self._read(range(self._size)[index])


def load(
    spec: str | Path,
    kind: str,
    *,
    split: str = "train",
    directory: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    text_field: str = "text",
) -> Records:
    """The records of one source.

    ``spec`` is ``task:NAME``, ``hub:NAME[:CONFIG]``, a JSONL file, a .txt file (a document; text only) or a folder of
    such files. ``split`` applies to tasks and the hub; ``directory`` holds tasks' local files
    (``directory/<task>/<split>.jsonl``); ``limit`` keeps the first records. A text of a file that is longer than
    ``PIECE`` characters is several records, cut behind a line or a word; the last alone teaches a document's end. A
    task's conversation is the right answer's, its preference sets that against a wrong one drawn by ``seed`` and index.
    Every line of a file is checked now.

    Raises UserError where the source is missing, empty or malformed, or cannot give records of ``kind``.
    """
    if kind not in FORMS:
        raise UserError(f"kind: expected {', '.join(FORMS)}, got {kind!r}")
    if limit is not None and limit < 1:
        raise UserError(f"limit: expected at least 1, got {limit}")
    origin, _, name = str(spec).partition(":")
    if origin == "task":
        records = _from_task(tasks.load(name), kind, split, directory, seed)
    elif origin == "hub":
        records = _from_hub(name, kind, split, text_field)
    else:
        records = _from_files(Path(spec), kind, text_field)
    if not len(records):
        raise UserError(f"{spec}: expected at least one record, got none")
    if origin in ("task", "hub"):
        records[0]  # hidden labels, missing fields and the wrong kind are errors now rather than at the first batch
    return records if limit is None else Records(min(limit, len(records)), records.__getitem__)


def _from_files(path: Path, kind: str, text_field: str) -> Records:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".jsonl", ".txt"))
        if not files:
            raise UserError(f"{path}: expected .jsonl or .txt files in the folder, got none")
    elif str(path) in tasks.names():
        raise UserError(f"{path}: expected a file, task:NAME or hub:NAME; did you mean task:{path}?")
    return _joined([_from_text(f, kind) if f.suffix == ".txt" else _from_lines(f, kind, text_field) for f in files])


def _from_lines(path: Path, kind: str, text_field: str) -> Records:
    lines = JsonLines(path)
    records = Records(len(lines), partial(_line, lines, kind, text_field))
    # All are read: a malformed line is an error now rather than hours into training.
    long = {i: _pieces(r.text) for i, r in enumerate(records) if isinstance(r, Text) and len(r.text) > PIECE}
    if not long:
        return records
    ends = list(accumulate(len(long.get(i, "1")) for i in range(len(records))))
    return Records(ends[-1], partial(_piece, records, long, ends))


def _piece(records: Records, long: Mapping[int, Sequence[Text]], ends: Sequence[int], index: int) -> Record | None:
    line = bisect_right(ends, index)
    return long[line][index - (ends[line - 1] if line else 0)] if line in long else records[line]


def _pieces(text: str) -> list[Text]:
    """A text in parts of at most PIECE characters, each as long as can be, cut behind a line, else behind a space."""
    found, start = [], 0
    while len(text) - start > PIECE:
        end = start + PIECE
        cut = next((at for sign in "\n " if (at := text.rfind(sign, start, end)) > start), end - 1) + 1
        found.append(Text(text[start:cut], goes_on=True))
        start = cut
    return [*found, Text(text[start:])]


def _line(lines: JsonLines, kind: str, text_field: str, index: int) -> Record:
    return record(lines[index], kind, lines.where(index), text_field)


def _from_text(path: Path, kind: str) -> Records:
    if kind != "text":
        raise UserError(f"{path}: expected a {kind}: {FORMS[kind]}; got plain text")
    pieces = _pieces(read_text(path))
    return Records(len(pieces), pieces.__getitem__)


def _joined(parts: Sequence[Records]) -> Records:
    """Sequences end to end."""
    ends = list(accumulate(map(len, parts)))
    return Records(ends[-1], partial(_part, parts, ends))


def _part(parts: Sequence[Records], ends: Sequence[int], index: int) -> Record | None:
    part = bisect_right(ends, index)
    return parts[part][index - (ends[part - 1] if part else 0)]


def _from_hub(name: str, kind: str, split: str, text_field: str) -> Records:
    path, _, config = name.partition(":")
    rows = read_hub(path, config or None, split)
    return Records(len(rows), partial(_row, rows, kind, f"hub:{name}, {split}", text_field))


def _row(rows: Sequence[Any], kind: str, where: str, text_field: str, index: int) -> Record:
    return record(rows[index], kind, f"{where} record {index}", text_field)


def _from_task(task: tasks.Task, kind: str, split: str, directory: str | Path | None, seed: int) -> Records:
    if kind == "preference" and not task.paired:
        raise UserError(
            f"task {task.name}: has no wrong answers, so it gives text and conversations but no preferences"
        )
    docs = task.documents(split, directory)
    return Records(len(docs), partial(_doc, docs, task.name, kind, split, seed))


def _doc(docs: Sequence[Any], name: str, kind: str, split: str, seed: int, index: int) -> Record | None:
    """A task's record; the task goes by its name, since its functions can go to no other process."""
    task, where, doc = tasks.load(name), f"task {name}, {split} record {index}", docs[index]
    try:
        right = task.targets(doc)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not right:
        raise UserError(f"{where}: expected a label, got none; the answers of this split are hidden")
    chat.check(right[0], where)
    if kind != "preference":
        return lower(right[0], kind, where)
    wrong = task.distractors(doc)
    return Preference(right[0], wrong[draw(len(wrong), seed, name, index)]) if wrong else None


def mixture(
    sources: Sequence[Sequence[Record]], seed: int, run: int = 5, weights: Sequence[float] | None = None
) -> Interleaved:
    """Several loaded sources, each shuffled by a seed of its own, interleaved."""
    shuffled = [Shuffled(source, draw(2**63, seed, i)) for i, source in enumerate(sources)]
    return Interleaved(shuffled, seed, run, weights)
