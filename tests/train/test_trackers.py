"""Trackers get every line once, also of a run that goes on; nothing reaches them unless it is asked for."""

import json
import subprocess
import sys
import types

import pytest
from helpers.stages import Killed, Trap, records, settings, tiny
from helpers.texts import small_tokenizer

from dph.errors import UserError
from dph.train import run_dir, trackers
from dph.train.entry import train


class Package(types.ModuleType):
    """What both have in common."""

    def __init__(self, name):
        super().__init__(name)
        self.runs, self.calls, self.current = {}, [], None

    def begin(self, key):
        run = self.current = self.runs[key] = self.runs.get(key) or Run()
        run.finished = False
        return run

    def finish(self):
        self.current.finished, self.current = True, None


class Wandb(Package):
    """As ``wandb``, with the arguments of its 0.31 that are used here, and what it does with a step that is past."""

    def __init__(self):
        super().__init__("wandb")

    def init(
        self, *, project=None, dir=None, id=None, name=None, config=None, allow_val_change=None, resume=None
    ):  # fmt: skip
        self.calls.append({"project": project, "dir": dir, "id": id, "name": name, "config": config, "resume": resume})
        if resume == "never" and id in self.runs:
            raise RuntimeError(f"run {id} exists")
        return self.begin(id)


class Trackio(Package):
    """As ``trackio``, with the arguments of its 0.43: runs are found again by name."""

    def __init__(self):
        super().__init__("trackio")

    def init(self, project, name=None, config=None, resume="never"):
        print("* Trackio project initialized")
        self.calls.append({"project": project, "id": name, "name": name, "config": config, "resume": resume})
        assert resume == ("allow" if name in self.runs else "never")
        return self.begin(name)


class Run:
    """What ``init`` of both gives."""

    def __init__(self):
        self.lines, self.finished = [], False

    def log(self, data, step=None):
        assert not self.finished
        assert not self.lines or step >= self.lines[-1]["step"], "a step that is past is dropped"
        self.lines.append({"step": step, **data})


STANDS_IN = {"wandb": Wandb, "trackio": Trackio}


@pytest.fixture(params=STANDS_IN)
def tracker(request, monkeypatch):
    """A stand-in for the package."""
    module = STANDS_IN[request.param]()
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def go(directory, resume=False, **changes):
    changes = {"output__project": "trials", "output__log_every": 1, **changes}
    return train(
        settings("sft", directory, **changes), model=tiny(), tokenizer=small_tokenizer(), records=records("sft"),
        held_out=records("sft", 3), resume=resume, quiet=True,
    )  # fmt: skip


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def bare(found):
    return [{key: value for key, value in line.items() if key not in run_dir.MACHINE_METRICS} for line in found]


def test_a_tracker_gets_what_the_file_gets(tracker, tmp_path, capsys):
    go(tmp_path / "run", output__tracker=tracker.__name__)
    (run,) = tracker.runs.values()
    assert run.lines == lines(tmp_path / "run")
    assert any("eval/loss" in line for line in run.lines)
    assert run.finished
    (call,) = tracker.calls
    assert call["project"] == "trials"
    assert call["name"].startswith("run")
    assert call["config"] == json.loads((tmp_path / "run/config.json").read_text())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("seen", [4, 5])
def test_a_resumed_run_goes_on_in_its_place(seen, tracker, tmp_path, monkeypatch):
    """Killed after step 4 (before its evaluation is logged) or 5, it goes on from 3: no line is missing or doubled."""
    name = tracker.__name__
    go(tmp_path / "whole", output__tracker=name)
    log = run_dir.RunDirectory.log

    def killed(self, step, values):
        if (step, "eval/loss" in values) >= (seen, seen == 4):
            raise Killed
        log(self, step, values)

    monkeypatch.setattr(run_dir.RunDirectory, "log", killed)
    with pytest.raises(Killed):
        go(tmp_path / "parts", output__tracker=name)
    monkeypatch.setattr(run_dir.RunDirectory, "log", log)
    go(tmp_path / "parts", resume=True, output__tracker=name)
    whole, parts = tracker.runs.values()
    assert bare(parts.lines) == bare(whole.lines) == bare(lines(tmp_path / "parts"))
    assert [call["resume"] for call in tracker.calls] == ["never", "never", "allow"]
    assert tracker.calls[1]["id"] == tracker.calls[2]["id"] != tracker.calls[0]["id"]


def test_a_tracker_that_comes_later_gets_what_is_logged_from_then_on(tracker, tmp_path):
    go(tmp_path / "run", optimiser__steps=8)
    (tmp_path / "run/checkpoints/step-00000008").rename(tmp_path / "gone")
    (tmp_path / "run" / trackers.FILE).write_text('{"tracker": "another", "id": "1"}')
    go(tmp_path / "run", resume=True, output__tracker=tracker.__name__)
    (run,) = tracker.runs.values()
    assert run.lines == [line for line in lines(tmp_path / "run") if line["step"] > 6]
    assert tracker.calls[0]["resume"] == "never"


def test_a_directory_that_begins_anew_is_another_run(tracker, tmp_path):
    """A run that failed before its first line has left an id behind; a start that is refused begins no run there."""
    name = tracker.__name__
    options = {"model": tiny(), "tokenizer": small_tokenizer(), "quiet": True}
    with pytest.raises(UserError, match="expected at least one source"):
        train(settings("sft", tmp_path / "run", output__tracker=name), **options)
    assert tracker.calls == []

    def fail():
        raise UserError("line 1 changed")

    with pytest.raises(UserError, match="line 1 changed"):
        train(
            settings("sft", tmp_path / "run", output__tracker=name, output__project="trials"),
            records=Trap(records("sft"), 1, fail), **options,
        )  # fmt: skip
    go(tmp_path / "run", output__tracker=name)
    assert [len(run.lines) > 0 for run in tracker.runs.values()] == [False, True]
    assert all(run.finished for run in tracker.runs.values())


@pytest.mark.parametrize("name", STANDS_IN)
def test_a_missing_package_is_said_first(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"output\.tracker: needs the {name} package: pip install {name}"):
        go(tmp_path / "run", output__tracker=name)


def test_a_tracker_that_refuses_is_quoted(tracker, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("api_key not configured\n\x1b[1m(no-tty)" + "x" * 9000)

    monkeypatch.setattr(tracker, "init", refuse, raising=False)
    with pytest.raises(
        UserError, match=r"cannot begin a run: api_key not configured \\x1b\[1m\(no-tty\)x+\.\.\.$"
    ) as caught:
        go(tmp_path / "run", output__tracker=tracker.__name__)
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "run" / trackers.FILE).exists()
    go(tmp_path / "run")


def test_nothing_is_imported_unless_asked_for():
    code = (
        "import sys; from dph.train import run_dir, trainer; import tempfile, pathlib;"
        "config = {'stage': 'sft', 'output': {'tracker': None}};"
        "run = run_dir.RunDirectory(pathlib.Path(tempfile.mkdtemp()) / 'run', config);"
        "run.begin(); run.log(1, {'loss': 1.0}); run.close();"
        "print([n for n in ('wandb', 'trackio') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
