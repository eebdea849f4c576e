"""Records of every format, reproducible samplers, batches without losses, and states that continue exactly."""

import json
import os
import pickle
from array import array
from collections import Counter
from functools import partial

import pytest
import torch
from helpers.hub import fake_hub
from helpers.texts import conversation, message, small_tokenizer, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from dph import chat
from dph.data import dataset, files, formats
from dph.data.batching import Streams
from dph.data.formats import Conversation, Encoder, Preference, Text, parse_record
from dph.data.json_lines import JsonLines, read_jsonl
from dph.data.packing import PairBatches
from dph.data.row_format import RowFormat
from dph.data.sampler import InOrder, Interleaved, Shuffled
from dph.data.sources import Limited, Selected, fingerprint
from dph.errors import UserError

ASK, YES, NO = message("user", "hello?"), message("assistant", "yes"), message("assistant", "no")
PAIR = Preference([ASK, YES], [ASK, NO])


# ------------------------------------------------------------------------------------------------ files and formats


def test_jsonl_is_read_line_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xc3\xbc"}')
    lines = JsonLines(path)
    assert list(lines) == [{"a": 1}, {"a": "ü"}] == [lines[0], lines[-1]]
    assert lines.location(1) == f"{path}:4"


def in_place(change):
    """A change of a file that keeps its times."""

    def apply(path):
        times = path.stat()
        content = change(path.read_bytes())
        with path.open("r+b") as file:
            file.write(content)
            file.truncate()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    return apply


def replace(path):
    (path.parent / "new").write_bytes(path.read_bytes().replace(b"record", b"silent"))
    os.replace(path.parent / "new", path)


CHANGES = {
    "emptied": in_place(lambda content: b""),
    "cut off": in_place(lambda content: content[:-20]),
    "rewritten": in_place(lambda content: content.replace(b"record", b"silent")),
    "shifted": in_place(lambda content: b"\n" + content),
    "deleted": os.unlink,
    "replaced": replace,
    "grown": in_place(lambda content: content + b'{"text": "more"}\n'),
}


@pytest.mark.parametrize("keep_open", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_during_a_run_gives_the_records_it_had_or_an_error(tmp_path, change, keep_open):
    """In the process that opened it and in one that receives the records; a mapped file would kill both."""
    path = write_lines(tmp_path / "a.jsonl", *({"text": f"record {i} " * 500} for i in range(50)))
    records = formats.RowRecords(partial(files.open_rows, path, keep_open), RowFormat("text"))
    before, pickled = list(records), pickle.dumps(records)
    CHANGES[change](path)
    read_by_both = {"grown": True, "deleted": keep_open, "replaced": keep_open}.get(change, False)
    if read_by_both:
        assert list(records) == before
    else:
        with pytest.raises(UserError, match=r"a\.jsonl:50: .*(changed during the run|No such file)"):
            records[49]
    if change == "grown":
        assert list(pickle.loads(pickled)) == before
    else:
        with pytest.raises(UserError, match=r"a\.jsonl(:50)?: .*(changed during the run|No such file)"):
            pickle.loads(pickled)[49]


def test_a_folder_has_a_bounded_number_of_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("dph.data.folders.MAX_OPEN", 2)
    for i in range(3):
        write_lines(tmp_path / f"{i}.jsonl", {"text": f"{i}"})
    before = len(os.listdir("/dev/fd"))
    records = dataset.load(tmp_path, "text")
    assert [record.text for record in records] == ["0", "1", "2"]
    assert len(os.listdir("/dev/fd")) == before


def test_a_fingerprint_depends_on_content_alone(tmp_path):
    def digest(*lines, name="a.jsonl", limit=None):
        return fingerprint(dataset.load(write_lines(tmp_path / name, *lines), "text", limit=limit))

    one, two = {"text": "one"}, {"text": "two"}
    files = [digest(one, two), digest(two, one), digest(one), digest(one, two, limit=1), digest(one, {"text": "twO"})]
    assert len(set(files)) == 5
    again = write_lines(tmp_path / "folder/other.jsonl", one, two)
    again.write_bytes(again.read_bytes().replace(b"\n", b"\r\n\n"))
    os.utime(again, (1, 1))
    assert fingerprint(dataset.load(again, "text")) == files[0]
    (tmp_path / "folder/text.txt").write_text("text")
    folder = fingerprint(dataset.load(tmp_path / "folder", "text"))
    (tmp_path / "folder/text.txt").write_text("tent")
    assert fingerprint(dataset.load(tmp_path / "folder", "text")) != folder

    def of_task(*labels):
        write_lines(tmp_path / "boolq/train.jsonl", *({"passage": "a", "question": "b", "label": i} for i in labels))
        return fingerprint(dataset.load("task:boolq", "preference", directory=tmp_path))

    assert of_task(0, 1) == of_task(0, 1) != of_task(1, 0)
    many = texts(1000)
    in_memory = [texts(2), texts(3), [PAIR], [None], [object()], many, [*many[:-1], Text("other")]]
    assert len({fingerprint(records) for records in in_memory}) == len(in_memory)
    assert fingerprint(texts(2)) == fingerprint(tuple(texts(2)))
    assert fingerprint([object()]) == fingerprint([object()])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b'{"a": 1}\n\n{"a": \n', r"a\.jsonl:3: not JSON: .* at column"),
        (b'{"a": 1}\n[1]\n', r"a\.jsonl:2: expected a JSON object, got list"),
        (b'{"a": "\xff"}\n', r"a\.jsonl:1: not UTF-8 at byte 7"),
        (b'{"a": "1"}\n{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", r"a\.jsonl:2: .* nested too deeply"),
        (b'{"a": ' + b"9" * 4301 + b"}", r"a\.jsonl:1: expected numbers of at most 4300 digits"),
        (b'{"a": "1", "b": NaN}', r"a\.jsonl:1: not JSON: NaN is no JSON number"),
        (b'{"a": "1", "b": [-Infinity]}', r"a\.jsonl:1: not JSON: -Infinity is no JSON number"),
        (b'{"a": "1", "b": [{"c\\n": 1, "c\\n": 1}]}', r"a\.jsonl:1: not JSON: the key 'c\\n' is there twice"),
        (b'{"a": "1"}\n\xef\xbb\xbf{"a": "1"}', r"a\.jsonl:2: not JSON: Expecting value at column 1"),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_a_malformed_line_is_named(tmp_path, content, error):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=error):
        list(read_jsonl(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match=r"a\.jsonl:\d"):
        dataset.load(tmp_path / "a.jsonl", "text", text_field="a")


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_long_text_is_several_records(tmp_path, monkeypatch, suffix):
    """Split after lines, else after words, else anywhere; nothing is lost."""
    monkeypatch.setattr(formats, "MAX_TEXT", 10)
    texts = ["one two\nthree four five", "short", "0123456789012345678901", "0123456789", "a" * 9 + "\n", ""]
    if suffix == "jsonl":
        write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
        expected = ["one two\n", "three ", "four five", "short", "0123456789", "0123456789", "01", *texts[3:]]
    else:
        (tmp_path / "a.txt").write_text("".join(texts[:3]))
        expected = ["one two\n", "three ", "four ", "fiveshort0", "1234567890", "1234567890", "1"]
    records = dataset.load(tmp_path / f"a.{suffix}", "text")
    assert [found.text for found in records] == [
        text for part in expected for text in ([part], part)[type(part) is list]
    ]
    assert [records[i] for i in range(len(records))] == list(records)
    ends = [Encoder(small_tokenizer())(found).loss_mask[-1] for found in records]
    assert ends.count(False) == {"jsonl": 4, "txt": 6}[suffix]
    assert ends[-1]
    assert all(Encoder(small_tokenizer())(records[0]).loss_mask[:-1])


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: expected a JSONL file, got nothing there"):
        read_jsonl(tmp_path / "none.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(
        UserError, match=r"pipe\.jsonl: expected a JSONL file, got something that is not a regular file"
    ):
        read_jsonl(tmp_path / "pipe.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: expected at least one record"):
        dataset.load(tmp_path / "empty.jsonl", "text")
    with pytest.raises(UserError, match="did you mean task:glue/sst2"):
        dataset.load("glue/sst2", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"expected \.jsonl, .*, \.txt files in the folder, got none"):
        dataset.load(tmp_path / "folder", "text")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "hello?", "chosen": "yes", "rejected": "no"},
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
        {"prompt": None, "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"prompt": "hello?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"prompt": " hello? ", "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"prompt": [ASK], "chosen": "yes", "rejected": [{**NO, "name": "x"}], "other": 1},
    ],
)
def test_preferences_in_every_format(fields):
    assert parse_record(fields, "preference") == PAIR
    assert parse_record(fields, "conversation") == Conversation([ASK, YES])
    assert parse_record(fields, "text") == Text("hello?\n\nyes")


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [ASK, YES]},
        {"prompt": "hello?", "completion": "yes"},
        {"prompt": "hello?", "completion": "yes", "label": True},
        {"prompt": "hello?", "completion": "yes", "label": None},
        {"prompt": "hello?", "completion": "yes", "label": "true"},
        {"messages": conversation("hello?", "yes"), "label": 1, "labels": {"x": True, "y": None}},
    ],
)
def test_conversations_in_every_format(fields):
    assert parse_record(fields, "conversation") == Conversation([ASK, YES])
    assert parse_record(fields, "text") == Text("hello?\n\nyes")


def test_a_system_prompt_stays_before_a_side_that_begins_with_the_user():
    system = message("system", "late")
    got = parse_record({"prompt": [system], "chosen": [ASK, YES], "rejected": [ASK, NO]}, "preference")
    assert got == Preference([system, ASK, YES], [system, ASK, NO])


@pytest.mark.parametrize(
    ("kind", "fields", "error"),
    [
        (
            "preference",
            {"messages": [ASK, YES]},
            r"x\.jsonl:1: expected a preference: prompt, chosen.*fields messages$",
        ),
        ("preference", {"prompt": "a", "chosen": "b"}, "got the fields prompt, chosen$"),
        ("preference", {"chosen": "a", "rejected": "b"}, "chosen: expected a prompt with an answer in plain text"),
        (
            "preference",
            {"chosen": [ASK], "rejected": [ASK, NO]},
            "expected the assistant's answer at the end, got a user",
        ),
        (
            "preference",
            {"prompt": "a", "chosen": 3, "rejected": "b"},
            "chosen: expected text or a list of messages, got 3",
        ),
        ("conversation", {"messages": [ASK]}, "expected an assistant message"),
        ("conversation", {"messages": [ASK, {"role": "assistant"}]}, r"messages\[1\]: expected role and content"),
        ("conversation", {"text": "a"}, "expected a conversation: messages, or prompt and completion"),
        ("conversation", {"prompt": "a", "completion": "b", "label": False}, "label: expected true .*, got False$"),
        ("conversation", {"prompt": "a", "completion": "b", "label": 0}, "label: expected true .*, got 0$"),
        ("text", {"prompt": "a", "completion": "b", "label": False}, "label: expected true .*, got False$"),
        ("conversation", {"prompt": "a", "completion": "b", "label": "x"}, "label: expected true .*, got 'x'$"),
        ("conversation", {"messages": conversation("a", "b"), "label": "false"}, "label: expected true .*, got False$"),
        ("text", {"messages": conversation("a", "b"), "label": 0}, "label: expected true .*, got 0$"),
        ("conversation", {"messages": conversation("a", "b"), "labels": {"x": 1, "y": 0}}, r"labels\.y: expected true"),
        ("text", {"sentence": "a"}, "expected a text: text, or .*got the fields sentence$"),
        ("text", {"text": 3}, "text: expected text, got 3"),
        ("text", {}, r"got the fields \(none\)"),
        ("text", {"text": None}, r"got the fields text \(null\)$"),
    ],
)
def test_missing_and_malformed_fields_are_named_with_their_line(tmp_path, kind, fields, error):
    path = write_lines(tmp_path / "x.jsonl", fields)
    with pytest.raises(UserError, match=error) as caught:
        dataset.load(path, kind)
    assert str(caught.value).startswith(f"{path}:1: ")


def test_folders_text_files_limits_and_other_fields(tmp_path):
    write_lines(tmp_path / "b/2.jsonl", {"text": "two"}, {"text": "three"})
    (tmp_path / "b/1.txt").write_text("one\n\nand more")
    source = dataset.load(tmp_path / "b", "text")
    assert [record.text for record in source] == ["one\n\nand more", "two", "three"]
    assert [source[i].text for i in (0, 1, 2, -1)] == ["one\n\nand more", "two", "three", "three"]
    assert source.location(0) == str(tmp_path / "b/1.txt")
    assert source.location(2) == source.location(-1)
    assert source.location(2).endswith(":2")
    with pytest.raises(IndexError):
        source[3]
    assert len(dataset.load(tmp_path / "b", "text", limit=2)) == 2
    with pytest.raises(UserError, match=r"1\.txt: expected a conversation"):
        dataset.load(tmp_path / "b", "conversation")
    field = write_lines(tmp_path / "c.jsonl", {"sentence": "four"})
    assert dataset.load(field, "text", text_field="sentence")[0] == Text("four")
    with pytest.raises(UserError, match=r"kind: expected preference, labelled preference, .*, got 'pairs'"):
        dataset.load(field, "pairs")
    with pytest.raises(UserError, match="limit: expected at least 1, got 0"):
        dataset.load(field, "text", limit=0)


class FakeRows(list):
    """Rows of a hub data set."""

    _fingerprint = "a version"


def test_the_hub_gives_records_too(monkeypatch):
    rows = {("me/pairs", "main", "test"): [{"prompt": "hello?", "chosen": "yes", "rejected": "no"}, {"prompt": "a"}]}
    fake_hub(monkeypatch, lambda name, config, split: FakeRows(rows[name, config, split]))
    source = dataset.load("hub:me/pairs:main", "preference", split="test")
    assert (len(source), source[0], source.location(1)) == (2, PAIR, "hub:me/pairs:main, test record 1")
    with pytest.raises(UserError, match="hub:me/pairs:main, test record 1: expected a preference"):
        source[1]
    same = fingerprint(dataset.load("hub:me/pairs:main", "preference", split="test"))
    monkeypatch.setattr(FakeRows, "_fingerprint", "another version")
    assert fingerprint(source) != same


# ------------------------------------------------------------------------------------------------ tasks as data

OPTIONS = {"question": "2+2?", "choices": ["3", "4", "5", "6"], "answer": 1}


def test_a_task_sets_the_right_answer_against_wrong_ones_drawn_uniformly(tmp_path):
    write_lines(tmp_path / "mmlu/all/train.jsonl", *[OPTIONS] * 600)
    source = dataset.load("task:mmlu/all", "preference", directory=tmp_path, seed=1)
    assert {record.chosen[-1]["content"] for record in source} == {"B. 4"}
    assert source.location(-1) == f"{tmp_path / 'mmlu/all/train.jsonl'}:600"
    drawn = [record.rejected[-1]["content"] for record in source]
    counts = Counter(drawn)
    assert counts.keys() == {"A. 3", "C. 5", "D. 6"}
    assert min(counts.values()) > 150
    again = dataset.load("task:mmlu/all", "preference", directory=tmp_path, seed=1)
    assert [again[i].rejected[-1]["content"] for i in reversed(range(600))] == drawn[::-1]
    other = dataset.load("task:mmlu/all", "preference", directory=tmp_path, seed=2)
    assert [record.rejected[-1]["content"] for record in other] != drawn


def wrong_answers(path, passes, wrap=lambda records: records, skip=0, **options):
    """Wrong answers by record and visit, of a shuffled task of 20 records; the first ``skip`` are not read."""
    write_lines(path / "mmlu/all/train.jsonl", *[{**OPTIONS, "question": f"{i}?"} for i in range(20)])
    source = wrap(dataset.load("task:mmlu/all", "preference", directory=path, **options))
    order, drawn = dataset.mixture([source], 0), {}
    order.load_state_dict({"position": skip, "sources": [{"position": skip, "size": len(source)}]})
    for position in range(skip, passes * len(source)):
        record = next(order)
        drawn[record.chosen[-2]["content"], position // len(source)] = record.rejected[-1]["content"]
    return drawn


def test_a_wrong_answer_is_drawn_anew_at_each_visit(tmp_path):
    drawn, fixed = wrong_answers(tmp_path, 4), wrong_answers(tmp_path, 4, redraw=False)
    questions = {question for question, _ in drawn}
    assert len(questions) == 20
    for question in questions:
        assert {fixed[question, visit] for visit in range(4)} == {drawn[question, 0]}
    assert sum(len({drawn[question, visit] for visit in range(4)}) > 1 for question in questions) > 15
    assert wrong_answers(tmp_path, 4, skip=50).items() <= drawn.items()  # as a resumed run
    halves = (lambda records: Limited(records, 10), lambda records: Selected(records, array("q", range(10))))
    for wrap in halves:  # the samplers of fewer records have another order, but each visit draws the same
        assert wrong_answers(tmp_path, 4, wrap).items() <= drawn.items()


def test_a_task_gives_conversations_and_texts(tmp_path):
    write_lines(tmp_path / "boolq/train.jsonl", {"passage": "Cats purr.", "question": "do cats purr", "label": 1})
    turns = dataset.load("task:boolq", "conversation", directory=tmp_path)[0].messages
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"]
    assert turns[-1]["content"] == "yes"
    assert dataset.load("task:boolq", "text", directory=tmp_path)[0].text.endswith("Answer:\n\nyes")


def test_a_task_that_cannot_give_what_is_asked_says_so(tmp_path):
    write_lines(tmp_path / "boolq/test.jsonl", {"passage": "a", "question": "b", "label": -1})
    with pytest.raises(UserError, match=r"boolq/test\.jsonl:1: task boolq: expected a label, got none"):
        dataset.load("task:boolq", "conversation", split="test", directory=tmp_path)
    with pytest.raises(UserError, match="task alpaca/cleaned: has no wrong answers"):
        dataset.load("task:alpaca/cleaned", "preference", directory=tmp_path)
    write_lines(tmp_path / "copa/train.jsonl", {"premise": "a"})
    with pytest.raises(UserError, match="task copa: expected the fields"):
        dataset.load("task:copa", "text", directory=tmp_path)


# ------------------------------------------------------------------------------------------------ samplers


def texts(n, prefix=""):
    return [Text(f"{prefix}{i}") for i in range(n)]


@given(st.integers(1, 40), st.integers(0, 5))
def test_every_epoch_is_a_permutation_of_its_own(n, seed):
    order = Shuffled(texts(n), seed)
    epochs = [[next(order).text for _ in range(n)] for _ in range(3)]
    assert all(sorted(epoch) == sorted(r.text for r in texts(n)) for epoch in epochs)
    assert [order.source[order.index(i)].text for i in range(3 * n)] == [text for epoch in epochs for text in epoch]
    if n > 12:
        assert len({tuple(epoch) for epoch in epochs}) == 3
        other = Shuffled(texts(n), seed + 1)
        assert epochs[0] != [next(other).text for _ in range(n)]


def three_sources(seed=0):
    return [Shuffled(texts(n, name), seed) for n, name in ((7, "a"), (3, "b"), (11, "c"))]


def test_sources_are_interleaved_in_runs_and_uniformly():
    order = Interleaved(three_sources(), seed=0, run=5)
    names = [next(order).text[0] for _ in range(3000)]
    runs = [names[i : i + 5] for i in range(0, 3000, 5)]
    assert all(len(set(run)) == 1 for run in runs)
    counts = Counter(run[0] for run in runs)
    assert all(150 < counts[name] < 250 for name in "abc")
    weighted = Interleaved(three_sources(), seed=0, run=1, weights=[0, 1, 3])
    counts = Counter(next(weighted).text[0] for _ in range(1000))
    assert counts["a"] == 0
    assert 650 < counts["c"] < 850


def test_bad_samplers_are_refused():
    with pytest.raises(UserError, match="source: expected at least one record"):
        Shuffled([], 0)
    with pytest.raises(UserError, match="sources: expected at least one"):
        Interleaved([], 0)
    with pytest.raises(UserError, match="run: expected at least 1, got 0"):
        Interleaved(three_sources(), 0, run=0)
    for weights in ([1], [0, 0, 0], [-1, 1, 1]):
        with pytest.raises(UserError, match="weights: expected 3"):
            Interleaved(three_sources(), 0, weights=weights)
    with pytest.raises(UserError, match="expected the 7 records of the interrupted run, got 8"):
        Shuffled(texts(8), 0).load_state_dict(Shuffled(texts(7), 0).state_dict())
    with pytest.raises(UserError, match="expected the 3 sources of the interrupted run, got 2"):
        Interleaved(three_sources()[:2], 0).load_state_dict(Interleaved(three_sources(), 0).state_dict())


def through_json(state):
    return json.loads(json.dumps(state))


@given(st.integers(0, 60), st.integers(1, 6), st.integers(0, 3))
def test_a_sampler_continues_from_its_state(before, run, seed):
    whole = Interleaved(three_sources(seed), seed, run)
    for _ in range(before):
        next(whole)
    resumed = Interleaved(three_sources(seed), seed, run)
    resumed.load_state_dict(through_json(whole.state_dict()))
    assert [next(resumed) for _ in range(30)] == [next(whole) for _ in range(30)]


# ------------------------------------------------------------------------------------------------ streams


def encode(record):
    return Encoder(small_tokenizer())(record)


def talk(n):
    return [Conversation(conversation(f"hello {i}" * (i % 4), f"world {i}" * (i % 7))) for i in range(n)]


def joined(encoded):
    tokens = [t for e in encoded for t in e.tokens]
    targets = [t if on else -100 for e in encoded for t, on in zip(e.targets, e.loss_mask, strict=True)]
    return tokens, targets


def test_text_is_all_targets_with_eos_between_documents():
    got = encode(Text("hello </s>"))
    eos = small_tokenizer().eos_token_id
    assert got.tokens.count(eos) == 1
    assert (got.tokens[0], got.targets[-1], all(got.loss_mask)) == (eos, eos, True)
    assert got.targets[:-1] == got.tokens[1:]
    assert got.reward_position is None


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 50))
def test_streams_hold_every_record_once_from_end_to_end(n, batch, length):
    segments = list(Streams(InOrder(talk(n)), encode, batch, length, pad_token=1))
    tokens, targets = (torch.cat([segment[i] for segment in segments], 1).tolist() for i in (0, 1))
    assert all(segment[0].shape == segment[1].shape == (batch, length) for segment in segments)
    wanted = [encode(record) for record in talk(n)]
    seen = []
    for row, marks in zip(tokens, targets, strict=True):
        while 1 in row and row[-1] == 1:  # padding at the end of a stream
            assert marks.pop() == -100
            row.pop()
        mine = []
        while sum(map(len, mine)) < len(row):  # records of a row follow each other, whole
            at = sum(map(len, mine))
            found = next(e for e in wanted if e not in seen + mine and row[at : at + len(e)] == e.tokens)
            mine.append(found)
        assert (row, marks) == joined(mine)
        seen += mine
    assert len(seen) == n


def test_a_stream_takes_whole_runs():
    talks = {name: [Conversation(conversation(name, "x" * 3)) for _ in range(9)] for name in "abc"}
    order = Interleaved([Shuffled(records, 0) for records in talks.values()], seed=3, run=5)
    length = 3 * len(encode(talks["a"][0]))  # a segment holds three records, so runs are cut across segments
    streams = Streams(order, encode, 2, length, pad_token=1)
    for row in torch.cat([next(streams)[0] for _ in range(20)], 1):
        asked = [text[0] for text in small_tokenizer().decode(row.tolist()).split("user\n")[1:]]
        runs = [asked[i : i + 5] for i in range(0, 60, 5)]
        assert all(len(run) == 5 and len(set(run)) == 1 for run in runs)
        assert len({run[0] for run in runs}) == 3


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 8), st.integers(1, 3), st.integers(1, 60), st.integers(1, 5))
def test_streams_go_on_from_their_state(before, batch, length, run):
    def make():
        halves = [Shuffled(talk(9)[:4], 1), Shuffled(talk(9)[4:], 2)]
        return Streams(Interleaved(halves, 0, run), encode, batch, length, pad_token=1)

    whole, resumed = make(), make()
    for _ in range(before):
        next(whole)
    state = whole.state_dict()
    saved = through_json(state)
    rest = [next(whole) for _ in range(4)]
    assert through_json(state) == saved  # continuing does not change a state that was returned before
    resumed.load_state_dict(saved)
    for got, wanted in zip((next(resumed) for _ in range(4)), rest, strict=True):
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])


def test_streams_refuse_another_batch_size():
    two, three = (Streams(Shuffled(talk(3), 0), encode, batch, 8, 1) for batch in (2, 3))
    with pytest.raises(UserError, match="batch: expected the interrupted run's 2, got 3"):
        three.load_state_dict(two.state_dict())
    with pytest.raises(UserError, match="expected at least 1 each"):
        Streams(Shuffled(talk(3), 0), encode, 0, 8, 1)


# ------------------------------------------------------------------------------------------------ pairs


def pairs(n):
    def answer(text):
        return [
            message("user", "hello"),
            message("assistant", "late"),
            message("user", "?"),
            message("assistant", text),
        ]

    return [Preference(answer("yes " * (i % 5)), answer("no " * (i % 9))) for i in range(n)]


def test_pairs_are_masked_to_the_final_answer():
    chosen, rejected = encode(pairs(4)[3])
    tok = small_tokenizer()
    for side, text in ((chosen, "yes yes yes <|im_end|>"), (rejected, "no no no <|im_end|>")):
        assert tok.decode([t for t, on in zip(side.targets, side.loss_mask, strict=True) if on]) == text
        assert side.tokens[side.reward_position] == chat.markup(tok).end_of_turn


def test_pairs_are_refused_whole_and_counted():
    records = [*pairs(10), None, pairs(1)[0]]
    limit = max(len(side) for record in pairs(6) for side in encode(record))
    batches = PairBatches(InOrder(records), encode, pairs=3, max_length=limit)
    got = [pair for batch in batches for pair in batch]
    assert got == [encode(record) for record in [*pairs(6)[1:], pairs(10)[9]]]
    assert batches.refused == {"identical": 2, f"longer than {limit} tokens": 3, "no wrong answer": 1}
    assert all(side.reward_position is not None and len(side) <= limit for pair in got for side in pair)
    assert [len(batch) for batch in PairBatches(InOrder(records), encode, 4, limit)] == [4, 2]


def test_no_usable_pair_is_an_error_rather_than_an_endless_search():
    with pytest.raises(UserError, match=r"got none in two passes over the records: longer than 3 tokens \(\d+\)"):
        next(PairBatches(Shuffled(pairs(5)[1:], 0), encode, pairs=1, max_length=3))
    with pytest.raises(UserError, match="pairs: expected at least 1, got 0"):
        PairBatches(Shuffled(pairs(5), 0), encode, pairs=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 8), st.integers(1, 5), st.integers(0, 3))
def test_pairs_go_on_from_their_state(before, size, seed):
    whole, resumed = (PairBatches(Shuffled(pairs(12), seed), encode, size, max_length=40) for _ in range(2))
    for _ in range(before):
        next(whole)
    resumed.load_state_dict(through_json(whole.state_dict()))
    assert [next(resumed) for _ in range(4)] == [next(whole) for _ in range(4)]
    assert resumed.refused == whole.refused


def test_the_sample_data_loads(shared):
    source = dataset.load(shared / "data/preferences/math_solutions.jsonl", "preference")
    assert len(source) == 967
    batches = PairBatches(InOrder(source), encode, pairs=64)
    assert sum(map(len, batches)) + batches.refused.total() == 967
    for task, sizes in {"glue/sst2": (20000, 1000), "glue/cola": (7500, 800), "boolq": (1200, 400)}.items():
        for split, size in zip(("train", "validation"), sizes, strict=True):
            loaded = dataset.load(f"task:{task}", "preference", split=split, directory=shared / "data")
            assert len(loaded) == size
            assert loaded[size - 1].chosen[:-1] == loaded[size - 1].rejected[:-1]
