"""Results in shards: the lines of one process, resumed by shard; the workers are called here, without Ray."""

import argparse
import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
from helpers.command_line import ANSWER, USER
from helpers.texts import write_lines

from dph.cli import cluster, shards
from dph.errors import UserError
from dph.model import judging

WORDS = ["a", "gripping", "film", "is", "watchable", "or", "negative"]


@pytest.fixture(autouse=True)
def workers(monkeypatch):
    """Workers in this process in place of Ray, a few records in a batch; the names of the shards that they got."""
    fake, calls = ModuleType("ray"), []
    fake.__spec__ = ModuleSpec("ray", None)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(judging, "MAX_TOKENS", 300)

    def mapped(parts, arguments, args):
        worker = cluster.Worker(*json.loads(json.dumps(arguments)))
        for part in reversed(parts):
            calls.append(part.name)
            results = worker({name: np.array([value]) for name, value in part._asdict().items()})
            yield {name: values[0] for name, values in results.items()}

    monkeypatch.setattr(cluster, "_mapped", mapped)
    return calls


@pytest.fixture
def command(models, tmp_path, request):
    """The words of a command without --output."""
    kind, texts = getattr(request, "param", "score"), [" ".join(WORDS[: 1 + i % 7]) for i in range(30)]
    if kind == "generate":
        file = write_lines(tmp_path / "in/rows.jsonl", *({"prompt": text, "id": i} for i, text in enumerate(texts)))
        return [
            kind,
            models / "judge",
            "--file",
            file,
            "-n",
            2,
            "--max-new-tokens",
            4,
            "--seed",
            5,
            "--system",
            "brief",
        ]
    pairs = [{"prompt": "a film?", "chosen": text, "rejected": text[1:], "id": i} for i, text in enumerate(texts)]
    others = [{"messages": [USER, {"role": "assistant", "content": text}]} for text in texts]
    return [kind, models / "judge", write_lines(tmp_path / "in/rows.jsonl", *pairs, *others)]


@pytest.mark.parametrize(
    ("sizes", "count", "bounds"),
    [([3, 1, 2], 2, [0, 3, 6]), ([3, 1, 2], 9, [0, 3, 4, 6]), ([1] * 10, 4, [0, 2, 5, 7, 10]), ([5], 1, [0, 5])],
)
def test_shards_are_whole_batches(sizes, count, bounds):
    parts = shards.split(sizes, count)
    assert [part.start for part in parts] + [parts[-1].stop] == bounds
    assert [part.stop for part in parts] == bounds[1:]
    assert parts[-1].name == f"part-{len(parts) - 1:05}-of-{len(parts):05}.jsonl"


@pytest.mark.parametrize("command", ["score", "generate"], indirect=True)
def test_shards_have_the_lines_of_one_process_and_are_resumed(dph_command, refused, command, tmp_path, workers):
    whole, folder = tmp_path / "whole.jsonl", tmp_path / "out"
    code, shown, _ = dph_command(*command, "--output", whole)
    assert code == 0
    words = [*command, "--output", folder, "--ray", "local"]
    assert dph_command(*words, "--shards", 4) == (0, shown, "")
    parts = sorted(folder.glob("*.jsonl"))
    assert [part.name for part in parts] == [f"part-{i:05}-of-00004.jsonl" for i in range(4)]
    assert b"".join(part.read_bytes() for part in parts) == whole.read_bytes()
    assert f"{folder}: results of a command are there: continue it with --resume" in refused(*words, "--shards", 4)

    workers.clear()
    parts[2].unlink()
    (folder / f".{parts[2].stem}.0123abcd.partial").write_text("{")  # of a worker that was killed
    assert dph_command(*words, "--shards", 4, "--resume") == (0, shown, "")
    assert workers == [parts[2].name]
    assert b"".join(part.read_bytes() for part in parts) == whole.read_bytes()
    assert {path.name for path in folder.iterdir()} == {shards.COMMAND, *(part.name for part in parts)}

    assert f"expected the command that began {folder}, got another shards" in refused(*words, "--resume")
    other = refused(*words, "--shards", 4, "--resume", "--field", "other")
    assert other.endswith(f"expected the command that began {folder}, got another field")
    write_lines(
        tmp_path / "in/rows.jsonl", {"prompt": "x"} if command[0] == "generate" else {"messages": [USER, ANSWER]}
    )
    assert "got another input" in refused(*words, "--shards", 4, "--resume")
    (folder / shards.COMMAND).write_text("my own file\n")
    assert f"{shards.COMMAND}: expected the description of a command" in refused(*words, "--shards", 4, "--resume")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("a wrong row"), RuntimeError("no memory")])
def test_results_of_an_interrupted_cluster_are_kept(dph_command, command, tmp_path, monkeypatch, workers, error):
    folder, write = tmp_path / "out", shards.write

    def failing(job, path, *bounds):
        if len(workers) == 3:
            raise error
        write(job, path, *bounds)

    words = [*command, "--output", folder, "--ray", "local", "--shards", 5]
    with monkeypatch.context() as patched:
        patched.setattr(shards, "write", failing)
        code, _, err = dph_command(*words)
    assert code == {KeyboardInterrupt: 130, UserError: 2, RuntimeError: 1}[type(error)]
    text = "dph: interrupted" if code == 130 else f"dph: error: {error}"
    assert err == f"{text}; the results so far are in {folder}: --resume continues\n"
    assert len(list(folder.glob("*.jsonl"))) == 2
    workers.clear()
    assert dph_command(*words, "--resume")[0] == 0
    assert len(workers) == 3


def test_a_directory_without_results_goes_with_an_error(dph_command, command, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "write", lambda *arguments: pytest.fail("written"))
    row = {"error": "no", "is_input": True, "trace": ""}
    monkeypatch.setattr(cluster, "_mapped", lambda *arguments: (row for _ in "a"))
    assert dph_command(*command, "--output", tmp_path / "out", "--ray", "local") == (2, "", "dph: error: no\n")
    assert not (tmp_path / "out").exists()


def test_a_worker_has_the_same_input_and_the_same_disk(refused, command, tmp_path, monkeypatch):
    words = [*command, "--output", tmp_path / "out", "--ray", "local"]
    mapped = cluster._mapped

    def elsewhere(parts, arguments, args):
        write_lines(tmp_path / "in/rows.jsonl", {"messages": [USER, ANSWER]})
        return mapped(parts, arguments, args)

    with monkeypatch.context() as patched:
        patched.setattr(cluster, "_mapped", lambda parts, *_: ({"error": "", "records": 1} for _ in parts))
        assert "expected a directory that all machines share" in refused(*words)
    monkeypatch.setattr(cluster, "_mapped", elsewhere)
    assert "expected the same input as in the process that started it" in refused(*words)


def test_a_shard_whose_workers_are_killed_is_given_up(tmp_path):
    path = tmp_path / "part-00000-of-00002.jsonl"
    for i in range(shards.TRIES):
        (tmp_path / f".{path.name[:24]}.0123abc{i}.partial").touch()
    with pytest.raises(RuntimeError, match=f"{path}: expected a worker that completes it, got 4 that were killed"):
        shards.write(lambda: pytest.fail("opened"), path, 0, 1)
    other = tmp_path / "part-00001-of-00002.jsonl"
    job = argparse.Namespace(lines=lambda start, stop: iter([[{"a": start}], [{"a": stop}]]))
    shards.write(lambda: job, other, 3, 4)
    assert other.read_text() == '{"a": 3}\n{"a": 4}\n'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", 2], "--workers: expected --ray with it, got none"),
        (["--shards", 2], "--shards: expected --ray with it, got none"),
        (["--ray", "local"], "--ray: expected --output DIR with it, got none"),
        (["--ray", "local", "--output", "x", "--json"], "--ray: expected no --json with it"),
        (["--ray", "local", "--output", "x", "--device", "cuda:1"], "--device: expected auto, cpu or cuda with --ray"),
        (["--ray", "local", "--output", "in/out"], "--output: expected a directory outside of in, got in/out"),
        (["--ray", "local", "--output", "in"], "--output: expected a directory outside of in, got in"),
        (["--ray", "local", "--output", "own"], "expected a new or empty directory, or one of an interrupted command"),
        (["--ray", "local", "--output", "own/a"], "own/a: Not a directory"),
        (["--ray", "local", "--output", "no/where"], "no/where: No such file or directory"),
    ],
)
def test_options_that_do_not_fit(refused, command, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "own/a", {})
    assert message in refused(*command[:2], "in", *words)


def test_generate_needs_a_seed_and_a_file(refused, models):
    words = ["generate", models / "judge", "--output", "x", "--ray", "local"]
    assert "--ray: expected --seed with it" in refused(*words, "--file", "prompts.jsonl")
    assert "--output: expected --file with it" in refused(*words, "--prompt", "x")


def test_a_missing_package_is_named(refused, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "--ray: needs the ray package: pip install" in refused(
        *command, "--ray", "local", "--output", tmp_path / "x"
    )


CPUS, GPUS = {"CPU": 8.0, "memory": 1.0}, {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "expected"),
    [
        ([CPUS], "cpu", None, (1, 8, 0)),
        ([CPUS, GPUS], "cpu", None, (2, 8, 0)),
        ([CPUS, CPUS], "cpu", 3, (3, 4, 0)),
        ([CPUS, CPUS], "cpu", 16, (16, 1, 0)),
        ([CPUS, GPUS], "cuda", None, (4, 4, 1)),
        ([CPUS, GPUS], "cuda", 1, (1, 16, 1)),
        ([CPUS, GPUS], "cuda", 5, "expected at most 4, the number of GPUs of the cluster, got 5"),
        ([CPUS], "cuda", None, "expected at most 0, the number of GPUs of the cluster, got 0"),
        ([CPUS], "cpu", 9, "expected at most 8, the number of cores of the cluster, got 9"),
    ],
)
def test_cores_of_a_worker(nodes, device, workers, expected):
    args = argparse.Namespace(worker_device=device, workers=workers)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            cluster._resources(nodes, args)
    else:
        assert tuple(cluster._resources(nodes, args).values()) == expected


def test_nothing_at_an_address_is_found_at_once():
    with pytest.raises(OSError, match="refused"):
        cluster._check_reachable("127.0.0.1:1")
    for address in ("auto", "local", "ray://127.0.0.1:1"):
        cluster._check_reachable(address)
