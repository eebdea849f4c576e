"""Overview of the data at the start of a run: sources, passes, tokens, and records that are held out as well."""

import dataclasses
import json

import pytest
from helpers.stages import go, records, settings, tiny
from helpers.texts import conversation, small_tokenizer, write_lines

from dph.data import dataset
from dph.data.formats import Conversation, Encoder, Text
from dph.data.overlap import find_overlap
from dph.data.packing import packed_length
from dph.train.build import make_stage
from dph.train.entry import train
from dph.train.overview import describe_data


def stage_of(recipe, data=None, held_out=None):
    return make_stage(recipe, tiny(), small_tokenizer(), data, held_out)


def pair(number, prompt="hello"):
    return {"prompt": f"{prompt} {number}", "chosen": f"world {number}", "rejected": "late"}


def cells(lines):
    """The table's rows by source."""
    found = {}
    for line in lines[2:]:
        name, *values = line.split()
        if len(values) == 3:
            found[name] = [int(values[0]), *map(float, values[1:])]
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_records_shares_and_passes_of_pairs(workers, tmp_path):
    """Of records of one length; half of a source's are left out, and others are drawn in their place."""
    one = str(write_lines(tmp_path / "one.jsonl", *[pair(1)] * 10))
    two = str(write_lines(tmp_path / "two.jsonl", *[pair(1), pair(1) | {"rejected": "world 1"}] * 20))
    listed = [one, {"source": two, "weight": 3}]
    recipe = settings("align", tmp_path / "run", data__sources=listed, data__workers=workers)
    stage = stage_of(recipe)
    *_, tokens = lines = describe_data(stage)
    assert lines[0].split() == ["source", "records", "share", "passes"]
    drawn = 8 * 4 / (0.25 + 0.75 / 2)
    assert cells(lines) == {
        one: [10, 0.25, pytest.approx(0.25 * drawn / 10, abs=1e-3)],
        two: [40, 0.75, pytest.approx(0.75 * drawn / 40, abs=1e-3)],
    }
    length = packed_length(Encoder(small_tokenizer())(dataset.load(one, "preference")[0]))
    assert tokens == f"about {4 * length} tokens in a step, by a sample of 50 records"
    assert stage.batches.records.position == 0
    stage.close()


def test_passes_of_streams_depend_on_the_lengths_of_records(tmp_path):
    rows = [{"messages": conversation("hello " * (1 + 5 * i), "world")} for i in range(2)]
    paths = [str(write_lines(tmp_path / f"{i}.jsonl", *[row] * 6)) for i, row in enumerate(rows)]
    stage = stage_of(settings("sft", tmp_path / "run", data__sources=paths))
    lengths = [len(Encoder(small_tokenizer())(Conversation(row["messages"]))) for row in rows]
    *lines, tokens = describe_data(stage)
    passes = 8 * 4 * 24 / (sum(lengths) / 2) / 2 / 6
    assert cells(lines) == {path: [6, 0.5, pytest.approx(passes, abs=1e-3)] for path in paths}
    assert tokens == "96 tokens in a step"
    taken = [0, 0]
    for _ in range(8):
        stage.next_batch()
    for number, source in enumerate(stage.batches.records.sources):
        taken[number] = source.position / 6
    assert sum(taken) == pytest.approx(2 * passes, rel=0.5)  # 4 streams take runs of 5 records ahead


def test_records_in_memory_and_none_that_fits(tmp_path):
    lines = describe_data(stage_of(settings("head", tmp_path), records("head"), {}))
    assert lines[2].split() == ["records", "in", "memory", "23", "1.000", "1.391"]
    lines = describe_data(stage_of(settings("head", tmp_path, data__context=2), records("head"), {}))
    assert lines[2].split()[-1] == "-"
    assert len(lines) == 3


def test_prompts_that_are_held_out_are_counted_with_the_first_place(tmp_path):
    """Through filters, limits and folders, whatever the answers; of plain texts the whole counts."""
    folder = tmp_path / "train"
    write_lines(folder / "a.jsonl", *[pair(i) for i in range(5)])
    write_lines(folder / "b.jsonl", *[pair(i) | {"lang": "en" if i % 2 else "de"} for i in range(5, 12)])
    held_out = write_lines(tmp_path / "held-out.jsonl", *[pair(i) | {"chosen": "other"} for i in (7, 8, 9, 99)])
    source = {"source": str(folder / "b.jsonl"), "filter": {"lang": "en"}, "head": "default", "limit": 3}
    for listed, count, place in ((str(folder), "3 of 12", "b.jsonl:3"), (source, "2 of 3", "b.jsonl:3")):
        recipe = settings("head", tmp_path / "run", data__sources=[listed], evaluation__sources=[str(held_out)])
        assert describe_data(stage_of(recipe))[-1] == (
            f"warning: {count} training records have the prompt of one of 4 held-out records, first {folder / place}"
        )
    lines = describe_data(stage_of(settings("pretrain", tmp_path), [Text("a"), Text("b")], {"x": [Text("b")]}))
    warning = "warning: 1 of 2 training records has the text of one of 1 held-out records, first record 1"
    assert lines[-1] == warning


def test_large_sources_are_compared_by_samples():
    training, held_out = [Text(str(i)) for i in range(1000)], [Text(str(i)) for i in range(0, 2000, 2)]
    overlap = find_overlap([training[:900], training[900:]], [held_out], 100)
    assert (overlap.compared, overlap.records, overlap.held_out, overlap.all_held_out) == (100, 1000, 100, 1000)
    assert 0 < overlap.shared < 100
    assert "of a sample of 100 of 1,000 training records have the text of one of a sample of 100 of 1,000 held-out" in (
        overlap.describe("text")
    )
    assert find_overlap([training], [], 100) is None
    assert find_overlap([training], [[Text("x")]], 100) is None


def test_a_run_prints_its_overview_once(tmp_path, capsys):
    """A new run on rank 0; none that resumes, and none that is quiet."""
    path = write_lines(tmp_path / "a.jsonl", *[pair(i) for i in range(9)])
    recipe = settings("head", tmp_path / "run", data__sources=[str(path)], optimiser__steps=2, evaluation__every=0)
    train(recipe, model=tiny(), tokenizer=small_tokenizer())
    printed = capsys.readouterr().err.splitlines()
    assert printed[0].split() == ["head:", "source", "records", "share", "passes"]
    assert printed[2].split()[2:] == ["9", "1.000", "0.889"]
    assert sum("tokens in a step" in line for line in printed) == 1
    longer = dataclasses.replace(recipe, output=dataclasses.replace(recipe.output, directory=str(tmp_path / "quiet")))
    train(longer, model=tiny(), tokenizer=small_tokenizer(), quiet=True)
    train(recipe, model=tiny(), tokenizer=small_tokenizer(), resume=True)
    assert "passes" not in capsys.readouterr().err
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    go(settings("head", tmp_path / "memory", optimiser__steps=2), quiet=False)
    assert "head: records in memory" in capsys.readouterr().err
