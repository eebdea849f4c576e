"""Worker processes: the same records in the same order as without them, exact states, clean ends."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.stages import STAGES, figures, records, settings, tiny, weights
from helpers.texts import small_tokenizer, write_lines

from dph.data import dataset
from dph.data import workers as read_ahead
from dph.data.formats import Encoder, Text
from dph.data.sampler import InOrder, Shuffled
from dph.data.workers import WorkerPool
from dph.errors import UserError
from dph.train import recipe, run_dir
from dph.train.entry import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def opened():
    """Factory of worker pools, which are closed after the test."""
    made = []

    def make(order, workers):
        made.append(WorkerPool(order, small_tokenizer(), workers))
        return made[-1]

    yield make
    for reader in made:
        reader.close()


def children():
    """Processes that the fork server of this one has started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    return sorted(pid for pid, parent in parents.items() if parents.get(parent) == os.getpid())


def gone(pid, seconds=10):
    """Whether a process ends in time; a zombie has ended."""
    for _ in range(seconds * 20):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def emptied(group, seconds=10):
    """Whether a process group has no process left in time."""
    for _ in range(seconds * 20):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def mixed(*counts, seed=0, run=3):
    return dataset.mixture([records("align", n) for n in counts], seed, run, range(1, len(counts) + 1))


def inline(order, count):
    """Encoded records without workers."""
    encode = Encoder(small_tokenizer())
    return [encode(record) for record, _ in zip(order, range(count), strict=False)]


def test_the_same_records_and_states_at_every_place(opened):
    """Over several epochs of three sources; the state is always that of a sampler without workers."""
    plain, reader = mixed(5, 3, 11), opened(mixed(5, 3, 11), 2)
    encode = Encoder(small_tokenizer())
    states = []
    for _ in range(60):
        assert next(reader) == encode(next(plain))
        assert reader.state_dict() == plain.state_dict()
        states.append((json.loads(json.dumps(reader.state_dict())), plain.position))
    assert (reader.size, reader.run) == (plain.size, plain.run)
    for state, position in states[::17]:  # the same processes continue from an earlier state
        reader.load_state_dict(state)
        again = mixed(5, 3, 11)
        again.load_state_dict(state)
        assert again.position == position
        assert [next(reader) for _ in range(9)] == inline(again, 9)


def test_a_pass_ends(opened):
    source = records("sft", 7)
    reader = opened(InOrder(source), 3)
    assert list(reader) == inline(InOrder(source), 7)
    assert next(reader, "end") == "end"
    assert reader.state_dict() == {"position": 7, "size": 7}


def test_large_records_come_through_and_are_not_piled_up(opened, monkeypatch):
    """Each is larger than a pipe; no more are prefetched than the byte limit allows."""
    monkeypatch.setattr(read_ahead, "MAX_PREFETCHED_BYTES", 1 << 20)
    source = [Text("The quick brown fox. " * 4000)] * 30
    reader = opened(InOrder(source), 2)
    expected = inline(InOrder(source), 1)[0]
    size = len(read_ahead.ForkingPickler.dumps(expected))
    assert size > 1 << 17
    for _ in range(30):
        assert next(reader) == expected
        assert len(reader._prefetched) <= max(4, (1 << 20) // size)


def files(folder, stage):
    """The stage's sources on disk: a file of its own, a task's, and for text a folder."""
    kind = recipe.KINDS[stage]
    fields = {
        "text": lambda r: {"text": r.text},
        "conversation": lambda r: {"messages": r.messages},
        "preference": lambda r: {"chosen": r.chosen, "rejected": r.rejected},
    }[kind]
    write_lines(folder / "own.jsonl", *map(fields, records(stage)))
    questions = [{"sentence": f"quick {i} fox", "label": i % 2, "idx": i} for i in range(9)]
    write_lines(folder / "glue/sst2/train.jsonl", *questions)
    (folder / "texts").mkdir(exist_ok=True)
    (folder / "texts/one.txt").write_text("hello world, late. " * 9)
    rest = [str(folder / "texts")] if stage == "pretrain" else []
    return [str(folder / "own.jsonl"), "task:glue/sst2", *rest]


def run(folder, stage, workers, steps=8, resume=False, **changes):
    changes = {"data__workers": workers, "optimiser__steps": steps, "evaluation__every": 0, **changes}
    values = settings(stage, folder / "run", **changes).as_dict()
    values["data"] |= {"sources": files(folder, stage), "directory": str(folder), "context": 200, "memory": 20}
    return train(recipe.from_dict(values), model=tiny(), tokenizer=small_tokenizer(), resume=resume, quiet=True)


@pytest.mark.parametrize("stage", STAGES)
def test_workers_change_no_weight(stage, tmp_path):
    before = children()
    results = {workers: run(tmp_path / f"{workers}", stage, workers) for workers in (0, 1, 3)}
    assert children() == before
    for workers in (1, 3):
        assert figures(tmp_path / f"{workers}" / "run") == figures(tmp_path / "0" / "run")
        pairs = zip(weights(results[0].model).items(), weights(results[workers].model).values(), strict=True)
        assert all(torch.equal(a, b) for (_, a), b in pairs)


@pytest.mark.parametrize("stage", ["sft", "align"])
def test_a_run_goes_on_with_another_number(stage, tmp_path, monkeypatch):
    """In the middle of an epoch, also without workers."""
    whole = run(tmp_path / "whole", stage, 0, 9)
    before = children()
    save = run_dir.RunDirectory.save

    def killed(self, step, *rest):
        save(self, step, *rest)
        if step == stop:
            raise InterruptedError

    monkeypatch.setattr(run_dir.RunDirectory, "save", killed)
    for step, workers in ((3, 2), (6, 0)):
        stop = step
        with pytest.raises(InterruptedError):
            run(tmp_path / "parts", stage, workers, 9, resume=True)
        assert children() == before
    stop = None
    resumed = run(tmp_path / "parts", stage, 1, 9, resume=True)
    assert figures(tmp_path / "parts" / "run") == figures(tmp_path / "whole" / "run")
    assert all(
        torch.equal(a, b) for a, b in zip(weights(whole.model).values(), weights(resumed.model).values(), strict=True)
    )


def test_a_cache_is_filled_ahead(tmp_path):
    """One pass, no more, and nothing is left running."""
    from dph.train.precompute import fill

    before = children()
    values = settings("align", tmp_path / "run", objective__reference="cache", data__workers=2)
    options = {"model": tiny(), "tokenizer": small_tokenizer(), "records": records("align"), "quiet": True}
    found = fill.fill_cache(values, **options)
    assert (found.pairs, found.stored) == (24, 23)  # the sixth batch of four is the first that the pass ends in
    assert children() == before


class Bad(list):
    """Records, some of which raise an error."""

    def __getitem__(self, index):
        if index == 5:
            raise UserError("bad.jsonl:6: expected a text, got none")
        if index == 7:
            raise KeyError("seven")
        return super().__getitem__(index)


def test_errors_come_when_their_record_is_taken(opened):
    reader = opened(InOrder(Bad(records("sft", 9))), 2)
    expected = inline(InOrder(records("sft", 9)), 9)
    assert [next(reader) for _ in range(5)] == expected[:5]
    with pytest.raises(UserError, match=r"^bad\.jsonl:6: expected a text, got none$"):
        next(reader)
    assert reader.state_dict()["position"] == 6
    assert next(reader) == expected[6]
    with pytest.raises(RuntimeError, match=r"^KeyError: 'seven'$") as caught:
        next(reader)
    assert "in __getitem__" in str(caught.value.__cause__)
    assert next(reader) == expected[8]


def test_a_pair_that_could_not_be_made_is_none(opened):
    reader = opened(InOrder([None, *records("align", 1)]), 1)
    assert [next(reader) is None for _ in range(2)] == [True, False]


class Unsendable(list):
    """Records that cannot be pickled."""

    def __init__(self, records):
        super().__init__(records)
        self.read = lambda i: self[i]


def test_what_cannot_be_sent_is_said(tmp_path):
    source = Unsendable([Text("hello")] * 3)
    with pytest.raises(UserError, match=r"data\.workers: expected records .* got .*lambda.*; data\.workers=0 reads"):
        train(
            settings("pretrain", tmp_path, data__workers=1),
            model=tiny(), tokenizer=small_tokenizer(), records=source, quiet=True,
        )  # fmt: skip


class Unopened(list):
    """Records that cannot be unpickled."""

    def __reduce__(self):
        return int, ("no number",)


def test_what_cannot_be_opened_is_said(opened):
    with pytest.raises(RuntimeError, match=r"^ValueError: invalid literal for int"):
        next(opened(InOrder(Unopened(records("sft", 9))), 1))


def test_a_killed_worker_is_an_error(opened):
    reader = opened(Shuffled(records("sft"), 0), 2)
    next(reader)
    os.kill(reader._workers[1].process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"a process that reads records ended \(exit code -9\)"):
        list(itertools.islice(reader, 3 * read_ahead.MAX_PREFETCHED))


def test_workers_are_deaf_to_signals_and_end_with_close(opened):
    """From their start on."""
    reader = opened(Shuffled(records("sft"), 0), 2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    reader._start()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    processes = [worker.process.pid for worker in reader._workers]
    for number in (signal.SIGINT, signal.SIGTERM):
        for pid in processes:
            os.kill(pid, number)
    expected = inline(Shuffled(records("sft"), 0), 20)
    assert [next(reader) for _ in range(20)] == expected
    reader.close()
    assert all(gone(pid, 1) for pid in processes)


def test_deleted_pools_end():
    reader = WorkerPool(Shuffled(records("sft"), 0), small_tokenizer(), 1)
    next(reader)
    pid = reader._workers[0].process.pid
    del reader
    assert gone(pid, 1)


SCRIPT = """
import os, sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
if __name__ == "__main__":
    from helpers.stages import records
    from helpers.texts import small_tokenizer
    from dph.data.sampler import Shuffled
    from dph.data.workers import WorkerPool
    reader = WorkerPool(Shuffled(records("sft"), 0), small_tokenizer(), 2)
    next(reader)
    print(*(worker.process.pid for worker in reader._workers), flush=True)
    {end}
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "raise KeyError('broken')", "pass"])
def test_workers_end_with_the_main_process(end, tmp_path):
    """In every case, and without any output of their own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests"), root=str(ROOT), end=end))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    processes = [int(pid) for pid in done.stdout.split()]
    assert len(processes) == 2
    assert all(map(gone, processes))
    assert done.stderr.count("Traceback") == ("raise" in end), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves_and_stops(number, tmp_path):
    """As a terminal or a batch system sends it; the workers print nothing, and none is left."""
    sources = files(tmp_path, "sft")
    small_tokenizer().save_pretrained(tmp_path / "model")
    tiny().save_pretrained(tmp_path / "model")
    command = [
        sys.executable, "-m", "dph.cli", "train", "mini-sft", f"model.path={tmp_path / 'model'}",
        f"data.sources=[{sources[0]}]", "data.workers=2", "optimiser.steps=1000000", "device=cpu",
        "output.log_every=1", f"--output={tmp_path / 'run'}",
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env)
    said = [process.stderr.readline(), process.stderr.readline()]
    assert said[0].startswith("sft: batch.size: 48 streams take"), said  # of few records
    assert said[1].startswith("sft 1/1000000"), said
    os.killpg(process.pid, number)
    rest = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 128 + number
    assert "is saved; a resumed run continues" in rest[-1]
    assert all(line.startswith("sft") for line in rest), rest
    assert emptied(process.pid)
