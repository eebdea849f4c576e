"""Results that grow batch by batch: killed at any moment and resumed, they are those of an undisturbed command."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers.command_line import ANSWER, USER
from helpers.texts import write_lines

from dph.cli import main, results
from dph.infer.pooled_engine import PooledEngine
from dph.model import judging

ROWS = {"score": 300, "evaluate": 60, "generate": 40}
WORDS = ["a", "gripping", "film", "is", "watchable", "the", "film", "is", "not", "positive", "or", "negative"]


@pytest.fixture
def small_batches(monkeypatch):
    """A few records in a batch."""
    monkeypatch.setattr(judging, "MAX_TOKENS", 1500)


def answer(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(0, 12)))


def rows_of(kind, rng):
    rows = []
    for i in range(ROWS[kind]):
        if kind == "evaluate":
            texts = {key: answer(rng) for key in ("sentence", "sentence1", "sentence2")}
            rows.append({**texts, "label": rng.randrange(2), "id": f"row {i}"})
        elif kind == "generate":
            rows.append({"prompt": answer(rng), "id": f"row {i}"})
        elif i % 3:
            rows.append({"id": f"row {i}", "messages": [USER, {"role": "assistant", "content": answer(rng)}]})
        else:
            rows.append({"id": i, "prompt": "a film?", "chosen": answer(rng), "rejected": answer(rng)})
    return rows


@pytest.fixture
def command(models, tmp_path, request):
    """(words of a command without --output, its input rows)"""
    kind = request.param
    rows = rows_of(kind, random.Random(0))
    if kind == "evaluate":
        write_lines(tmp_path / "data/glue/sst2/validation.jsonl", *rows[:40])
        write_lines(tmp_path / "data/glue/rte/validation.jsonl", *rows[40:])
        words = ["--task", "glue/sst2", "glue/rte", "--directory", tmp_path / "data"]
    else:
        words = [write_lines(tmp_path / "rows.jsonl", *rows)]
    if kind == "generate":
        words = ["--file", *words, "-n", 2, "--max-new-tokens", 4, "--seed", 5, "--system", "be brief"]
    return [kind, models / "judge", *words], rows


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed(words, partial, lines, number):
    """Run the command in a fork and end it by a signal when ``partial`` has so many lines; whether it met the fork."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        add = results.Results.add
        results.Results.add = lambda self, lines: (add(self, lines), time.sleep(0.02))  # time for the signal
        os._exit(main.main([str(word) for word in words]))
    running = lambda: os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None  # noqa: E731
    while running() and count_lines(partial) < lines:
        time.sleep(0.001)
    met = running()
    os.kill(process, number)
    os.waitpid(process, 0)
    return met


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("command", ["score", "evaluate", "generate"], indirect=True)
def test_killed_and_resumed_is_the_same_byte_for_byte(dph_command, command, tmp_path):
    words, rows = command
    whole, ended = tmp_path / "whole.jsonl", tmp_path / "ended.jsonl"
    code, shown, err = dph_command(*words, "--output", whole)
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    kept = [line["record"] if words[0] == "evaluate" else line for line in lines]
    assert [line["id"] for line in kept] == [row["id"] for row in rows]
    ended.write_text("old")
    rng, partial, resume = random.Random(1), tmp_path / "ended.jsonl.partial", ["--output", ended, "--resume"]
    met, ways = 0, (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    for part, number in enumerate(ways):
        lines = len(rows) * (part + 0.5 + 0.5 * rng.random()) / len(ways)
        met += killed([*words, *resume], partial, int(lines), number)
        if not partial.exists():  # it ended before the signal came
            break
        assert ended.read_bytes() in (b"old", whole.read_bytes())
    assert met
    if partial.exists():
        with partial.open("r+b") as file:  # a line that was being written
            file.seek(0, os.SEEK_END)
            file.truncate(max(file.tell() - 9, 0))
    assert dph_command(*words, *resume) == (0, shown, "")
    assert ended.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def interrupted(dph_command, words, output, monkeypatch, error, batches=3):
    """Run a command that fails after some batches; its exit code and stderr."""
    judge, count = judging.JudgingModel.judge_batches, iter(range(batches))

    def stopping(*args, **options):
        for batch in judge(*args, **options):
            yield batch
            if next(count, None) is None:
                raise error

    with monkeypatch.context() as patched:
        patched.setattr(judging.JudgingModel, "judge_batches", stopping)
        code, _, err = dph_command(*words, "--output", output)
    return code, err


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("command", ["score"], indirect=True)
def test_what_is_resumed_is_not_computed_again(dph_command, command, tmp_path, monkeypatch):
    words, _ = command
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    for error, code, line in (
        (RuntimeError("stopped"), 1, "dph: error: stopped"),
        (KeyboardInterrupt(), 130, "dph: interrupted"),
    ):
        partial.unlink(missing_ok=True)
        note = f"; the results so far are in {partial}: --resume continues\n"
        assert interrupted(dph_command, words, output, monkeypatch, error) == (code, line + note)
    done = len(partial.read_text().splitlines()) - 1
    assert 0 < done < ROWS["score"]
    judged = []
    scores = main._load("score")._scores
    monkeypatch.setattr("dph.cli.score._scores", lambda *args: judged.append(args) or scores(*args))
    assert dph_command(*words, "--output", output, "--resume")[0] == 0
    assert len(judged) == ROWS["score"] - done


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("command", ["score"], indirect=True)
def test_results_of_another_command_are_neither_continued_nor_replaced(
    dph_command, refused, command, models, tmp_path, monkeypatch
):
    words, rows = command
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    interrupted(dph_command, words, output, monkeypatch, RuntimeError("stopped"))
    before = partial.read_bytes()
    line = refused(*words, "--output", output)
    assert f"{partial}: results of an interrupted command are there: continue it with --resume, or delete" in line
    resume = ["--output", output, "--resume"]
    assert "got another heads" in refused(*words, "--head", "short", *resume)
    assert "got another model, configuration, heads" in refused(
        "score", models / "mute", words[2], "--logprob-only", *resume
    )
    write_lines(tmp_path / "rows.jsonl", *rows[1:])
    assert "got another input" in refused(*words, *resume)
    assert partial.read_bytes() == before
    partial.write_text("my own file\n")
    assert f"{partial}: expected results of an interrupted command, got another file" in refused(*words, *resume)
    assert partial.read_text() == "my own file\n"
    assert "--resume: expected --output with a regular file, got none" in refused(*words, "--resume")


def test_two_commands_do_not_write_the_same_results(tmp_path):
    output = str(tmp_path / "out.jsonl")
    with results.Results(output, {"command": "x"}, False) as first:
        first.add([{"a": 1}])
        with (
            pytest.raises(ValueError, match="another process is writing these results"),
            results.Results(output, {"command": "x"}, True),
        ):
            pass
        first.add([{"a": 2}])
    assert Path(output).read_text() == '{"a": 1}\n{"a": 2}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_an_output_that_is_no_file_is_written_directly(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with results.Results(str(tmp_path / "pipe"), {"command": "x"}, False) as output:
        output.add([{"a": 1}])
        assert os.read(reader, 99) == b'{"a": 1}\n'
    os.close(reader)
    with pytest.raises(ValueError, match="--resume: expected --output with a regular file"):
        results.Results(str(tmp_path / "pipe"), {"command": "x"}, True)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("command", ["score", "evaluate"], indirect=True)
def test_without_a_terminal_progress_is_a_line_a_minute(dph_command, command, monkeypatch):
    words, _ = command
    assert dph_command(*words)[2] == ""
    monkeypatch.setattr(results, "LINE_EVERY", 0.0)
    lines = dph_command(*words)[2].splitlines()
    assert 3 < len(lines) < ROWS[words[0]]
    assert lines[0].startswith(f"{words[0]}: ")
    assert f" of {ROWS[words[0]]} records, " in lines[0]
    assert lines[-1].endswith(" a second, 0:00:00 left")


@pytest.mark.parametrize("command", ["score", "evaluate", "generate"], indirect=True)
def test_all_records_are_checked_before_the_first_is_judged(refused, command, models, tmp_path, monkeypatch):
    words, rows = command
    for owner, name in ((judging.JudgingModel, "judge_batches"), (PooledEngine, "step")):
        monkeypatch.setattr(owner, name, lambda *args, **options: pytest.fail("judged"))
    if words[0] == "evaluate":
        file = tmp_path / "data/glue/rte/validation.jsonl"
        write_lines(file, *rows[:30], rows[0] | {"label": 7})
    else:
        file = write_lines(words[-1] if words[0] == "score" else words[3], *rows, {"messages": [USER, ANSWER, ANSWER]})
        if words[0] == "score":
            write_lines(file, *rows, {"messages": [ANSWER, USER]})
    number = 31 if words[0] == "evaluate" else len(rows) + 1
    assert f"{file}:{number}: " in refused(*words)


def test_generate_writes_the_fields_of_its_prompts(dph_command, refused, models, tmp_path):
    rows = [{"prompt": "a film?", "id": 3}, {"messages": [USER], "tag": None}]
    file, output = write_lines(tmp_path / "p.jsonl", *rows), tmp_path / "out.jsonl"
    argv = ["generate", models / "judge", "-n", 2, "--max-new-tokens", 3, "--seed", 1]
    assert dph_command(*argv, "--file", file, "--output", output) == (0, "", "")
    assert output.read_text() == dph_command(*argv, "--file", file, "--json")[1]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [list(line) for line in lines] == [
        ["prompt", "id", "messages", "candidates"],
        ["messages", "tag", "candidates"],
    ]
    assert [line["messages"] for line in lines] == [[USER], [USER]]
    assert "--output: expected --file with it" in refused(*argv, "--prompt", "x", "--output", output)
    write_lines(file, {"prompt": "x", "candidates": []})
    assert f"{file}:1: candidates: expected no such field" in refused(*argv, "--file", file)
    assert '"answers": [{"text"' in dph_command(*argv, "--file", file, "--json", "--field", "answers")[1]
    write_lines(file, {"prompt": "x", "messages": [USER]})
    assert f"{file}:1: expected prompt or messages, got the fields prompt, messages" in refused(*argv, "--file", file)
