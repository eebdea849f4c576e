"""Worker processes: the same records in the same order as without them, exact states, clean ends."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
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
    """Processes that this one has started."""
    started = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == os.getpid():
                started.append(int(stat.parent.name))
    return sorted(started)


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


def test_workers_draw_a_task_s_wrong_answers_anew_at_each_visit(opened, tmp_path):
    options = {"question": "late?", "choices": ["a", "b", "c", "d"], "answer": 1}
    write_lines(tmp_path / "mmlu/all/train.jsonl", *[options] * 5)
    source = dataset.load("task:mmlu/all", "preference", directory=tmp_path)
    assert [next(reader) for reader in [opened(Shuffled(source, 3), 2)] for _ in range(20)] == inline(
        Shuffled(source, 3), 20
    )


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
    size = len(read_ahead.Pickler.dumps(expected))
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


@pytest.mark.parametrize("first", [False, True])
def test_a_killed_worker_is_an_error(first, opened):
    """At once when its record is next; also while the parent waits for another worker, which is stopped."""
    reader = opened(Shuffled(records("sft"), 0), 2)
    next(reader)
    one, two = (worker.process.pid for worker in reader._workers)
    if first:
        os.kill(one, signal.SIGSTOP)
    os.kill(two, signal.SIGKILL)
    message = rf"^data\.workers: worker 1 \(process {two}\) was killed by SIGKILL; the kernel does so when memory runs"
    with pytest.raises(UserError, match=message):
        list(itertools.islice(reader, 3 * read_ahead.MAX_PREFETCHED))
    position = reader.state_dict()["position"]
    assert position == reader.position < 2 * read_ahead.MAX_PREFETCHED


class Ending(list):
    """Records that end the process that reads them."""

    def __getitem__(self, index):
        os._exit(3)


def test_a_worker_that_ends_is_an_error(opened):
    with pytest.raises(UserError, match=r"^data\.workers: worker 0 \(process \d+\) ended with exit code 3$"):
        next(opened(InOrder(Ending(records("sft", 9))), 1))


def test_waiting_for_a_stopped_worker_is_said(opened, monkeypatch, caplog):
    monkeypatch.setattr(read_ahead, "PATIENCE", 1)
    reader = opened(Shuffled(records("sft"), 0), 1)
    next(reader)
    pid = reader._workers[0].process.pid
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(1.5, os.kill, (pid, signal.SIGCONT)).start()
    expected = inline(Shuffled(records("sft"), 0), 2 * read_ahead.MAX_PREFETCHED)[1:]
    assert list(itertools.islice(reader, len(expected))) == expected
    said = f"data.workers: no record from worker 0 (process {pid}) for 1 s; it hangs or is stopped"
    assert caplog.messages[:1] == [said]


def test_no_interpreter_and_no_process_are_errors(opened, monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(UserError, match=r"^data\.workers: expected 0 in a program without a Python interpreter"):
        opened(Shuffled(records("sft"), 0), 2)
    monkeypatch.delattr(sys, "frozen")
    start, before = subprocess.Popen, children()

    def second_fails(*arguments, **options):
        if len(children()) > len(before):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", second_fails)
    with pytest.raises(UserError, match=r"^data\.workers: expected 3 processes, got 1: .*Resource temporarily unavail"):
        next(opened(Shuffled(records("sft"), 0), 3))
    assert children() == before


def test_workers_are_deaf_to_signals_and_end_with_close(opened):
    """From their start on."""
    reader = opened(Shuffled(records("sft"), 0), 2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    reader._start()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    processes = [worker.process.pid for worker in reader._workers]
    for number in read_ahead.SIGNALS:
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


# A module beside the scripts below: a tokenizer without transformers, which takes seconds to import, and data sets.
PARTS = """
import os, re, signal, time
from dph.data.formats import Text

class Bytes:
    is_fast, eos_token_id = False, 256
    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}

class Busy:
    def __init__(self, work):
        self.work = work
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        if index:
            time.sleep(0.1)  # the first one is sent meanwhile, by a thread
            if self.work == "full pipe":
                return Text("a" * 100_000)
            if self.work == "asleep":
                time.sleep(1000)
            if self.work == "in C":
                re.match("(a+)+$", "a" * 50 + "b")  # for hours, with the interpreter's lock
            if self.work == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
        return Text("one")
"""

SCRIPT = """
import os, sys, threading, time
from dph.data.sampler import InOrder
from dph.data.workers import WorkerPool
import parts
with open("started", "a") as file:
    print(__name__, file=file)
reader = WorkerPool(InOrder(parts.Busy({work!r})), parts.Bytes(), 1)
record = None
def take():
    global record
    record = next(reader)
if {thread}:
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
else:
    take()
assert bytes(record.targets[:-1]) == b"one"
with open("workers", "w") as file:
    print(*(worker.process.pid for worker in reader._workers), file=file)
time.sleep({seconds})
{end}
"""


def run_script(folder, *arguments, shell=False, **values):
    """The finished script, run in one of Python's ways, and the pids of its workers."""
    (folder / "parts.py").write_text(PARTS)
    (folder / "pack").mkdir()
    values = {"work": "nothing", "thread": False, "end": "pass", "seconds": 0, **values}
    for name in ("script.py", "pack/__main__.py", "pack/module.py"):
        (folder / name).write_text(SCRIPT.format(**values))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    given = (folder / "script.py").read_text()
    if shell:
        command = ["sh", "-c", f"exec {sys.executable} script.py {arguments[0]}"]
    else:
        command = [sys.executable, *(given if word == "SOURCE" else word for word in arguments)]
    done = subprocess.run(command, cwd=folder, env=env, input=given, capture_output=True, text=True, timeout=120)
    return done, [int(pid) for pid in (folder / "workers").read_text().split()]


WAYS = {
    "file": ("script.py",), "-c": ("-c", "SOURCE"), "stdin": ("-",), "package": ("-m", "pack"),
    "module": ("-m", "pack.module"), "isolated": ("-X", "utf8", "-W", "error", "script.py"),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_script_without_a_guard_runs_once(way, tmp_path):
    """The workers do not run the script again, in whatever way it was started."""
    done, processes = run_script(tmp_path, *way)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "started").read_text() == "__main__\n"
    assert len(processes) == 1
    assert all(gone(pid, 1) for pid in processes)


def test_closed_standard_streams_do_not_become_pipes_of_workers(tmp_path):
    done, processes = run_script(tmp_path, "<&- >&- 2>&-", shell=True)
    assert done.returncode == 0
    assert all(gone(pid, 1) for pid in processes)


ENDS = {
    "killed": {"end": "os.kill(os.getpid(), 9)"},
    "killed, pipe full": {"end": "os.kill(os.getpid(), 9)", "work": "full pipe", "seconds": 0.3},
    "killed, worker asleep": {"end": "os.kill(os.getpid(), 9)", "work": "asleep", "seconds": 0.3},
    "killed, worker in C": {"end": "os.kill(os.getpid(), 9)", "work": "in C", "seconds": 0.3},
    "killed, worker stopped": {"end": "os.kill(os.getpid(), 9)", "work": "stopped", "seconds": 0.3},
    "killed, started by a thread": {"end": "os.kill(os.getpid(), 9)", "thread": True, "work": "asleep"},
    "raised": {"end": "raise KeyError('broken')"},
    "raised, worker in C": {"end": "raise KeyError('broken')", "work": "in C", "seconds": 0.3},
    "left": {"end": "os._exit(0)"},
}


@pytest.mark.parametrize("values", ENDS.values(), ids=ENDS)
def test_workers_end_with_the_main_process(values, tmp_path):
    """In every case, and without any output of their own."""
    done, processes = run_script(tmp_path, "script.py", **values)
    assert len(processes) == 1
    assert all(gone(pid, 3) for pid in processes)
    assert done.stderr.count("Traceback") == ("raise" in values["end"]), done.stderr


def test_a_thread_that_ends_leaves_its_workers(tmp_path):
    """Linux's signal at the death of a parent means the thread that started the process."""
    done, _ = run_script(tmp_path, "script.py", thread=True, seconds=1, end="assert next(reader) == record")
    assert (done.returncode, done.stderr) == (0, "")


def test_classes_of_the_script_are_named(tmp_path):
    own = "class Own(parts.Busy): pass\ntry: next(WorkerPool(InOrder(Own('')), parts.Bytes(), 1))"
    done, _ = run_script(tmp_path, "script.py", end=f"{own}\nexcept ValueError as error: print(error)")
    assert re.match(
        r"data\.workers: expected records and .* got 'Own' of the script or notebook itself, which", done.stdout
    )
    assert done.stderr == ""


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
    said = [process.stderr.readline() for _ in range(6)]
    assert said[0].startswith("sft: batch.size: 48 streams take"), said  # of few records
    assert said[1].startswith("sft: source"), said  # four lines of the data
    assert said[5].startswith("sft 1/1000000"), said
    os.killpg(process.pid, number)
    rest = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 128 + number
    assert "is saved; a resumed run continues" in rest[-1]
    assert all(line.startswith("sft") for line in rest), rest
    assert emptied(process.pid)
