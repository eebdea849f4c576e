"""One preference file in every format, folders, filters and columns, and files that are not what they seem."""

import bz2
import csv
import gzip
import json
import logging
import lzma
import pickle
import sys

import pytest
from helpers import stages
from helpers.texts import message, small_tokenizer, write_lines

from dph.cli.generate import read_prompts
from dph.cli.score import alternatives
from dph.data import dataset, tokenizer
from dph.data.formats import Encoder, Text
from dph.data.rows import open_source
from dph.data.sources import fingerprint
from dph.errors import UserError
from dph.train import recipe
from dph.train.entry import train

ROWS = []
for i in range(12):
    chosen, rejected = f'yes, "{i}"\nindeed', ("ü", "no; no")[i % 2]
    ROWS.append({"prompt": f"question\t{i}?", "chosen": chosen, "rejected": rejected, "score": i % 3, "id": f"r{i}"})
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table(rows=ROWS):
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


def write_csv(path, dialect, rows=ROWS):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], dialect=dialect)
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(path, new_file):
    with new_file(path, table().schema) as writer:
        writer.write_table(table())


def write_parquet(path):
    from pyarrow import parquet

    parquet.write_table(table(), path)


def compress_zstd(content):
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def save_dataset(path, splits):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    (datasets.DatasetDict(train=rows, test=rows.select([0])) if splits else rows).save_to_disk(path)


def pyarrow_ipc():
    import pyarrow

    return pyarrow.ipc


RENDERED = [
    {"chosen": f"\n\nHuman: {row['prompt']}\n\nAssistant: {row['chosen']}",
     "rejected": f"\n\nHuman: {row['prompt']}\n\nAssistant: {row['rejected']}"} for row in ROWS
]  # fmt: skip
OPENAI = [
    {"input": {"messages": [message("user", row["prompt"])]}, "preferred_output": [message("assistant", row["chosen"])],
     "non_preferred_output": [message("assistant", row["rejected"])]} for row in ROWS
]  # fmt: skip
SHAREGPT = [
    {"conversations": [{"from": "human", "value": row["prompt"]}], "chosen": {"from": "gpt", "value": row["chosen"]},
     "rejected": {"from": "gpt", "value": row["rejected"]}} for row in ROWS
]  # fmt: skip
RENAMED = [{"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"], "prompt": "x"} for row in ROWS]
COLUMNS = {"prompt": "question", "chosen": "good", "rejected": "bad"}

# Name of the file -> what writes it, and the package that this needs.
FORMATS = {
    "a.jsonl": (lambda path: path.write_bytes(LINES), None),
    "a.NDJSON": (lambda path: path.write_bytes(LINES), None),
    "a.json": (lambda path: path.write_text(json.dumps(ROWS, indent=1)), None),
    "lines.json": (lambda path: path.write_bytes(LINES), None),
    "a": (lambda path: path.write_bytes(LINES), None),
    "a.jsonl.gz": (lambda path: path.write_bytes(gzip.compress(LINES)), None),
    "misnamed.jsonl": (lambda path: path.write_bytes(gzip.compress(LINES)), None),
    "a.jsonl.bz2": (lambda path: path.write_bytes(bz2.compress(LINES)), None),
    "a.JSONL.XZ": (lambda path: path.write_bytes(lzma.compress(LINES)), None),
    "a.json.gz": (lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())), None),
    "a.csv": (lambda path: write_csv(path, "excel"), None),
    "a.tsv": (lambda path: write_csv(path, "excel-tab"), None),
    "a.jsonl.zst": (lambda path: path.write_bytes(compress_zstd(LINES)), "pyarrow"),
    "a.parquet": (write_parquet, "pyarrow"),
    "parquet.jsonl": (write_parquet, "pyarrow"),
    "a.arrow": (lambda path: write_arrow(path, pyarrow_ipc().new_file), "pyarrow"),
    "stream.arrow": (lambda path: write_arrow(path, pyarrow_ipc().new_stream), "pyarrow"),
    "saved": (lambda path: save_dataset(path, splits=False), "datasets"),
    "splits": (lambda path: save_dataset(path, splits=True), "datasets"),
    "hh.jsonl": (lambda path: write_lines(path, *RENDERED), None),
    "openai.jsonl": (lambda path: write_lines(path, *OPENAI), None),
    "sharegpt.jsonl": (lambda path: write_lines(path, *SHAREGPT), None),
    "columns.csv": (lambda path: write_csv(path, "excel", RENAMED), None),
}


@pytest.mark.parametrize("name", FORMATS)
def test_one_preference_file_in_every_format_gives_the_same_records_tokens_and_head(name, tmp_path):
    write, package = FORMATS[name]
    if package is not None:
        pytest.importorskip(package)
    expected = dataset.load(write_lines(tmp_path / "expected.jsonl", *ROWS), "preference")
    write(tmp_path / name)
    columns = COLUMNS if name == "columns.csv" else None
    records = dataset.load(tmp_path / name, "preference", columns=columns)
    assert list(records) == list(expected)
    assert [records[-1]] == [expected[11]] == list(pickle.loads(pickle.dumps(records)))[-1:]
    encode = Encoder(small_tokenizer())
    assert list(map(encode, records)) == list(map(encode, expected))
    assert fingerprint(records) == fingerprint(dataset.load(tmp_path / name, "preference", columns=columns))
    if "jsonl" in name.lower() and name.startswith("a."):
        assert fingerprint(records) == fingerprint(expected)
    if columns is None and name not in ("hh.jsonl", "openai.jsonl", "sharegpt.jsonl"):
        some = dataset.load(tmp_path / name, "preference", filter={"score": [0, 2], "id": ["r0", "r1", "r2", "r3"]})
        assert list(some) == [expected[i] for i in (0, 2, 3)]
        assert len(dataset.load(tmp_path / name, "preference", filter={"score": 1}, limit=2)) == 2
        assert fingerprint(some) != fingerprint(records)
    trained = head_of(tmp_path / "expected.jsonl", None, tmp_path)
    assert trained != parameters_of_head(stages.tiny())
    assert head_of(tmp_path / name, columns, tmp_path) == trained


def head_of(path, columns, directory):
    """What a head learns from a file in three steps."""
    source = {"source": str(path), "columns": columns}
    changes = {"data__sources": [source], "optimiser__steps": 3, "evaluation__every": 0}
    settings = stages.settings("head", directory / f"run of {path.name}", **changes)
    return parameters_of_head(train(settings, model=stages.tiny(), tokenizer=small_tokenizer(), quiet=True).model)


def parameters_of_head(model):
    return {name: values.numpy().tobytes() for name, values in stages.weights(model).items() if "reward" in name}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"columns": {"prompt": "ask"}},
            r"a\.jsonl:1: columns\.prompt: expected the field ask, got the fields prompt",
        ),
        ({"columns": {"question": "ask"}}, "columns: expected own names of text, messages, .*, got 'question'"),
        ({"columns": {"prompt": 3}}, r"columns\.prompt: expected the name of a field of the data, got 3"),
        ({"filter": {"scor": 1}}, r"a\.jsonl: expected at least one record that fits the filter {'scor': 1}, got none"),
        ({"filter": {"score": True}}, "expected at least one record that fits the filter"),
        ({"format": "chatml"}, "format: expected rendered or none, got 'chatml'"),
        ({"format": "rendered"}, r"a\.jsonl:1: chosen: expected a rendered conversation"),
    ],
)
def test_options_that_do_not_fit_the_data_are_refused(options, error, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *ROWS)
    with pytest.raises(UserError, match=error):
        dataset.load(path, "preference", **options)
    if "format" not in options or options["format"] == "rendered":
        with pytest.raises(UserError, match=f"{next(iter(options))}: expected none for task:boolq"):
            dataset.load("task:boolq", "preference", **{name: {"prompt": "a"} for name in options if name != "format"},
                         **({"format": "rendered"} if "format" in options else {}))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        (
            "a.jsonl",
            b"PAR1....",
            r"a\.jsonl: a parquet file, which needs .* pyarrow: pip install 'dph\[data\]'",
        ),
        ("a.arrow", b"ARROW1..", r"a\.arrow: an arrow file, which needs the package pyarrow: pip install"),
        ("a.zst", b"\x28\xb5\x2f\xfd", r"a\.zst: a zstd file, which needs the package pyarrow: pip install"),
        ("a.xlsx", b"PK\x03\x04", r"a\.xlsx: expected \.jsonl, .*, got a zip file"),
        ("a.jsonl", b"\xff\xfe{\0", r"a\.jsonl: expected \.jsonl, .*, got a UTF-16 file"),
        (
            "a.tgz",
            gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar"),
            "expected compressed text, got a tar file in",
        ),
        ("a.csv", b"text;id\nthree;1;2\n", r"a\.csv:2: expected 2 cells, got 3"),
        ("a.txt", b"%PDF-1.4", r"a\.txt: expected .*, got a PDF file"),
        ("a.jsonl.gz", gzip.compress(LINES)[:40], r"a\.jsonl\.gz: a gzip file that cannot be decompressed"),
        ("a.gz", gzip.compress(b"PAR1"), r"a\.gz: expected compressed text, got a parquet file in it"),
        ("a.gz", gzip.compress(b'{"text": 3}'), r"a\.gz:1: text: expected text, got 3"),
        ("a.json", b'{\n"text": "a"\n}', r"a\.json:1: not JSON.*an array of objects, or one object a line"),
        ("a.json", b'[{"text": "a"},\n{"text": NaN}]', r"a\.json: not JSON: NaN is no JSON number"),
        ("a.json", b'[{"text": "a"},\n{"text": ]', r"a\.json:2: not JSON: Expecting value at column 10"),
        ("a.json", b'[{"text": "a"}, 3]', r"a\.json: item 1: expected a JSON object, got int"),
        ("a.json", b'[{"text": "a"}, {"text": 3}]', r"a\.json: item 1: text: expected text, got 3"),
        ("a.csv", b'text,id\n"two\nlines",1\nonly one\n', r"a\.csv:4: expected 2 cells, got 1"),
        ("a.csv", b"text,text\na,b\n", r"a\.csv:1: expected names that differ, got text, text"),
        ("a.csv", b'text\n"open', r"a\.csv:2: unexpected end of data"),
        ("a.tsv", b"text\n\xff", r"a\.tsv:2: not UTF-8 at byte 0"),
        ("a.csv", b"sentence\na\n", r"a\.csv:2: expected a text: .*got the fields sentence"),
        ("a.csv", b"", r"a\.csv: expected at least one record, got none"),
        ("a.txt", b"<|im_start|>user\nhi<|im_end|>", r"a\.txt: expected plain text or messages, got a rendered"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_a_file_is_named_as_what_it_is(name, content, error, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=error):
        dataset.load(tmp_path / name, "text")


def test_a_table_of_a_spreadsheet_is_separated_by_semicolons(tmp_path):
    (tmp_path / "a.csv").write_text('prompt;completion\n"a; b";1,5\n')
    (record,) = dataset.load(tmp_path / "a.csv", "conversation")
    assert record.messages == [message("user", "a; b"), message("assistant", "1,5")]


def test_a_damaged_table_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a\.parquet: a parquet file that cannot be read: "):
        dataset.load(tmp_path / "a.parquet", "preference")


def test_a_folder_reads_visible_data_and_says_what_it_read_and_skipped(tmp_path, caplog):
    for name in ("a.jsonl", "B.JSONL", "sub/c.ndjson"):
        write_lines(tmp_path / name, {"text": name, "url": "x"})
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"d.txt"))
    write_csv(tmp_path / "e.csv", "excel", [{"text": "e.csv"}])
    for name in ("._a.jsonl", ".ipynb_checkpoints/a.jsonl", ".git/x/a.jsonl", "LICENSE.txt", "README.md", "state.json",
                 "notes.docx"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("not data")
    with caplog.at_level(logging.WARNING):
        records = dataset.load(tmp_path, "text")
    assert list(records) == [Text(name) for name in ("B.JSONL", "a.jsonl", "d.txt", "e.csv", "sub/c.ndjson")]
    read, ignored = (record.getMessage() for record in caplog.records)
    assert read == (
        f"{tmp_path}: reads 5 files (B.JSONL, a.jsonl, d.txt.gz, e.csv, sub/c.ndjson), skips 7 (._a.jsonl, .git, "
        ".ipynb_checkpoints, LICENSE.txt, README.md, notes.docx, state.json)"
    )
    assert ignored == f"{tmp_path}: ignored fields: url"


def test_a_split_of_a_saved_dataset_is_chosen(tmp_path):
    pytest.importorskip("datasets")
    save_dataset(tmp_path / "splits", splits=True)
    assert len(dataset.load(tmp_path / "splits", "preference", split="test")) == 1
    with pytest.raises(UserError, match="split: expected one of train, test, got 'validation'"):
        dataset.load(tmp_path / "splits", "preference", split="validation")


def test_ignored_fields_are_reported_once_per_source_by_the_first_rank(tmp_path, caplog, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", *ROWS)
    with caplog.at_level(logging.WARNING):
        dataset.load(path, "preference")
        monkeypatch.setenv("RANK", "1")
        dataset.load(path, "preference")
    assert [record.getMessage() for record in caplog.records] == [f"{path}: ignored fields: id, score"]


def test_commands_take_the_sources_of_training(tmp_path):
    (tmp_path / "pairs").mkdir()
    write_csv(tmp_path / "pairs/a.csv", "excel")
    write_lines(tmp_path / "chats.json", {"conversations": [{"from": "human", "value": "hi"}]})
    pairs = open_source(tmp_path / "pairs")
    alike = dataset.load(tmp_path / "pairs", "preference")
    assert [alternatives(dict(row), "") for row in pairs] == [[pair.chosen, pair.rejected] for pair in alike]
    assert pairs.location(0) == f"{tmp_path / 'pairs/a.csv'}:2"
    (tmp_path / "asked.csv").write_text("prompt,system\nwhy?,Be brief.\nhow?,\n")
    system = message("system", "Be brief.")
    assert read_prompts(str(tmp_path / "asked.csv"))[1] == [
        [system, message("user", "why?")],
        [message("user", "how?")],
    ]
    assert read_prompts(str(tmp_path / "chats.json"))[1] == [[message("user", "hi")]]
    assert list(tokenizer.read_texts(tmp_path / "asked.csv")) == ["why?", "Be brief.", "how?", ""]
    assert list(tokenizer.read_texts(tmp_path / "chats.json")) == ["hi"]
    assert list(tokenizer.read_texts(tmp_path / "asked.csv", ["system"])) == ["Be brief.", ""]
    write_lines(tmp_path / "openai.jsonl", {"input": {"messages": [system]}, "preferred_output": json.dumps([system])})
    assert list(tokenizer.read_texts(tmp_path / "openai.jsonl")) == ["Be brief.", "Be brief."]


def test_a_recipe_renames_filters_and_parses(tmp_path):
    write_csv(tmp_path / "a.csv", "excel", [row | {"score": i} for i, row in enumerate(RENAMED)])
    options = "columns: {prompt: question, chosen: good, rejected: bad}, filter: {score: [1, 2, 3]}, limit: 2"
    loaded = recipe.load("align", [f"data.sources=[{{source: {tmp_path / 'a.csv'}, {options}}}]"])
    opened, _ = dataset.open_training(loaded.data.sources, loaded.kind, directory=None, seed=0, consecutive=1)
    assert {next(opened).chosen[0]["content"] for _ in range(2)} == {ROWS[1]["prompt"], ROWS[2]["prompt"]}
    write_lines(tmp_path / "hh.jsonl", {"text": "\n\nHuman: hi\n\nAssistant: hello"})
    loaded = recipe.load("sft", [f"data.sources=[{{source: {tmp_path / 'hh.jsonl'}, format: rendered}}]"])
    opened, _ = dataset.open_training(loaded.data.sources, loaded.kind, directory=None, seed=0, consecutive=1)
    assert next(opened).messages == [message("user", "hi"), message("assistant", "hello")]
    assert recipe.from_dict(json.loads(json.dumps(loaded.as_dict()))) == loaded
