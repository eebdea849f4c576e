"""Commands take the sources of ``dph train``: files of every format, folders, the hub and tasks, with their options."""

import datetime
import decimal
import json

import pytest
from helpers.command_line import ANSWER, USER
from helpers.hub import fake_hub
from helpers.texts import write_lines

from dph.cli import common
from dph.errors import UserError
from dph.model import loading

PAIRS = [{"q": "a film?", "good": "is gripping", "bad": "is not", "lang": lang, "n": i} for i, lang in enumerate("eed")]
COLUMNS = "columns: {prompt: q, chosen: good, rejected: bad}"
QUESTIONS = [{"prompt": "The film is", "choices": ["gripping", "not"], "answer": i} for i in (0, 1)]


class Hub(list):
    """Rows of a hub data set."""

    _fingerprint = "a version"


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Pairs in sources of every kind; their names."""
    from pyarrow import Table, parquet

    (tmp_path / "folder/sub").mkdir(parents=True)
    (tmp_path / "a.json").write_text(json.dumps(PAIRS))
    lines = [",".join(PAIRS[0]), *(",".join(map(str, row.values())) for row in PAIRS)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    parquet.write_table(Table.from_pylist(PAIRS), tmp_path / "a.parquet")
    write_lines(tmp_path / "folder/a.jsonl", *PAIRS[:1])
    write_lines(tmp_path / "folder/sub/b.jsonl", *PAIRS[1:])
    (tmp_path / "folder/notes.txt").write_text("no rows")
    hub = {("me/pairs", None, "train"): Hub(PAIRS), ("me/asked", "easy", "validation"): Hub(QUESTIONS)}
    fake_hub(monkeypatch, lambda name, config, split: hub[name, config, split])
    return [str(tmp_path / name) for name in ("a.json", "a.csv", "a.parquet", "folder")] + ["hub:me/pairs"]


def with_options(source, options):
    return f"{{source: {json.dumps(source)}, {options}}}"


def test_score_and_generate_take_every_source_with_its_options(dph_command, refused, models, sources, tmp_path, caplog):
    pytest.importorskip("pyarrow")
    scored, answered = [], []
    sampling = ["-n", 1, "--max-new-tokens", 1, "--seed", 0]
    for i, source in enumerate(sources):
        pairs, out = with_options(source, COLUMNS + ", filter: {lang: e}, limit: 1"), tmp_path / f"{i}.jsonl"
        code, _, err = dph_command("score", models / "judge", pairs, "--output", out)
        assert (code, err) == (0, "")
        assert caplog.messages[-1] == f"{source}: ignored fields: n"
        (line,) = map(json.loads, out.read_text().splitlines())
        scored.append(line.pop("scores"))
        assert {key: str(value) for key, value in line.items()} == {key: str(value) for key, value in PAIRS[0].items()}
        prompts = with_options(source, "columns: {prompt: q}, filter: {lang: [d]}")
        code, out, _ = dph_command("generate", models / "judge", "--file", prompts, *sampling, "--json")
        (line,) = map(json.loads, out.splitlines())
        answered.append(line["candidates"])
        assert (code, line["messages"], str(line["n"])) == (0, [USER], "2")
    assert scored == scored[:1] * len(sources)
    assert answered == answered[:1] * len(sources)
    line = refused("score", models / "judge", with_options(sources[0], COLUMNS + ", filter: {lang: x}"))
    assert line.endswith("expected at least one record that fits the filter {'lang': 'x'}, got none")
    line = refused("score", models / "judge", with_options(sources[0], "columns: {prompt: p}"))
    assert "item 0: columns.prompt: expected the field p, got the fields q, good" in line


def test_tokenizer_and_data_take_the_options_of_a_source(dph_command, sources, tmp_path):
    pytest.importorskip("pyarrow")
    texts = write_lines(tmp_path / "t.jsonl", *({"body": word * 9, "lang": word} for word in ("zebra ", "quokka ")))
    source = with_options(str(texts), "columns: {text: body}, filter: {lang: 'zebra '}")
    assert dph_command("tokenizer", source, "--vocab-size", 300, "--output", tmp_path / "tok")[0] == 0
    words = loading.load_tokenizer(str(tmp_path / "tok")).get_vocab()
    assert any("zeb" in word for word in words)
    assert not any("quo" in word for word in words)
    for source in sources:
        code, out, _ = dph_command("data", with_options(source, COLUMNS + ", limit: 2"), "--json")
        assert (code, json.loads(out)["forms"]) == (0, {"preference": 2})


def test_commands_parse_rendered_conversations_and_refuse_them_otherwise(dph_command, refused, models, tmp_path):
    prompt = f"\n\nHuman: {USER['content']}\n\nAssistant:"
    files = {
        "data": [{"prompt": prompt, "chosen": " is gripping", "rejected": " is not"}, {"body": prompt + " is"}],
        "score": [{"body": f"{prompt} {ANSWER['content']}"}],
        "generate": [{"prompt": prompt}, {"prompt": json.dumps([USER])}],
        "tokenizer": [{"body": f"{prompt} {ANSWER['content']}"}],
        "evaluate": [{"prompt": prompt, "candidates": [" is gripping", " is"], "correct": [1, 0]}],
    }
    judge, rest = models / "judge", ["-n", 1, "--max-new-tokens", 1, "--json"]
    words = {
        "data": ("data", "--json"),
        "score": ("score", judge, "--logprob-only", "--json"),
        "generate": ("generate", judge, *rest, "--file"),
        "tokenizer": ("tokenizer", "--vocab-size", 300),
        "evaluate": ("evaluate", judge, "--json", "--candidates"),
    }
    printed = {}
    for name, rows in files.items():
        path = write_lines(tmp_path / f"{name}.jsonl", *rows)
        source = with_options(str(path), "format: rendered, text_field: body")
        outputs = [["--output", tmp_path / folder] if name == "tokenizer" else [] for folder in ("a", "b")]
        code, printed[name], _ = dph_command(*words[name], source, *outputs[0])
        assert code == 0
        if name != "data":
            line = refused(*words[name], with_options(str(path), "text_field: body"), *outputs[1])
            assert "got a rendered conversation (HH)" in line or "expected messages, prompt and" in line
    assert json.loads(printed["data"])["forms"] == {"preference": 1, "conversation": 1}
    assert [json.loads(line)["messages"] for line in printed["generate"].splitlines()] == [[USER], [USER]]
    plain = write_lines(tmp_path / "plain.jsonl", {"messages": [USER, ANSWER]})
    _, out, _ = dph_command("score", judge, "--logprob-only", "--json", plain)
    assert json.loads(out)["scores"] == json.loads(printed["score"])["scores"]


def test_questions_come_from_every_source(dph_command, models, sources, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    parquet.write_table(Table.from_pylist(QUESTIONS), tmp_path / "q.parquet")
    rows = ["prompt,choices,answer", *(f'The film is,"[""gripping"", ""not""]",{i}' for i in (0, 1))]
    (tmp_path / "q.csv").write_text("\n".join(rows))
    write_lines(tmp_path / "questions/a.jsonl", QUESTIONS[0])
    write_lines(tmp_path / "questions/b.jsonl", QUESTIONS[1])
    (tmp_path / "q.yaml").write_text("data: hub:me/asked:easy\nprompt: '{prompt}'\nchoices: choices\ngold: answer\n")
    found = []
    files = ["q.parquet", "q.csv", "questions", "q.yaml"]
    for task in [*(tmp_path / name for name in files), f"task:{tmp_path / 'q.csv'}", "hub:me/asked:easy"]:
        code, out, _ = dph_command("evaluate", models / "judge", "--task", task, "--json", "--logprob-only")
        report = json.loads(out)
        assert (code, report["n"]) == (0, 2)
        found.append(report["rows"] if "yaml" not in str(task) else found[0])
    assert found == found[:1] * len(found)


def test_a_task_is_scored_with_its_answers_and_asked_without(dph_command, models, tmp_path):
    docs = [{"sentence": "a gripping film", "label": 1}, {"sentence": "is it", "label": 0}]
    write_lines(tmp_path / "glue/sst2/validation.jsonl", *docs)
    source = with_options("task:glue/sst2", f"split: validation, directory: {tmp_path}, limit: 1")
    code, out, _ = dph_command("score", models / "judge", source, "--logprob-only", "--json")
    assert (code, [json.loads(line)["n"] for line in out.splitlines()]) == (0, [1, 1])
    write_lines(tmp_path / "glue/sst2/validation.jsonl", *(doc | {"label": -1} for doc in docs))
    sampling = ["-n", 1, "--max-new-tokens", 1, "--json"]
    code, out, _ = dph_command("generate", models / "judge", "--file", source, *sampling)
    (line,) = map(json.loads, out.splitlines())
    assert (code, line["record"]) == (0, docs[0] | {"label": -1})
    assert [message["role"] for message in line["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "{source: a.csv, weight: 2}",
            "source: expected the options split, directory, limit, text_field, columns, .*, got",
        ),
        ("{limit: 2}", "source: expected text, got nothing"),
        ("{source: a.csv, limit: 0}", "limit: expected 1 <= limit"),
        ("{source: a.csv", "source: expected YAML"),
    ],
)
def test_a_source_with_wrong_options_is_refused(text, error):
    with pytest.raises(UserError, match=error):
        common.parse_source(text)
    assert common.parse_source("{source: a.csv, limit: 3}") == ("a.csv", {"limit": 3})
    assert common.parse_source("a.csv") == ("a.csv", {})


def test_rows_that_mark_their_answer_are_scored_all_the_same(dph_command, models, tmp_path):
    row = {"messages": [USER, {**ANSWER, "weight": 0}], "labels": {"safe": 0}, "label": None}
    code, out, _ = dph_command("score", models / "judge", write_lines(tmp_path / "a.jsonl", row), "--json")
    assert (code, json.loads(out)["labels"]) == (0, {"safe": 0})


def test_values_of_tables_that_json_lacks(dph_command, models, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    row = {"prompt": "a film?", "completion": "is", "day": datetime.date(2026, 1, 31), "cost": decimal.Decimal("1.50")}
    parquet.write_table(Table.from_pylist([row]), tmp_path / "a.parquet")
    code, out, _ = dph_command("score", models / "judge", tmp_path / "a.parquet", "--json")
    line = json.loads(out)
    assert (code, line["day"], line["cost"]) == (0, "2026-01-31", "1.50")
    parquet.write_table(Table.from_pylist([row | {"digest": b"\x00"}]), tmp_path / "a.parquet")
    code, out, err = dph_command("score", models / "judge", tmp_path / "a.parquet", "--json")
    assert (code, out) == (2, "")
    assert "expected values that JSON has, times or decimal numbers, got bytes" in err
