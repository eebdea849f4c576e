"""Every ending saves the state after the last whole step, and the run that resumes is the undisturbed one."""

import errno
import math
import shutil
import signal
import sys

import pytest
import torch
from helpers.stages import Trap, figures, go, records, same, settings, strike, taken, tiny

from dph.cli import main
from dph.data import workers
from dph.errors import RunLost, UserError
from dph.train import checkpointing, entry, run_dir, signals, trackers
from dph.train.entry import Diverged, Trainer
from dph.train.stages.held_out import HeldOut
from dph.train.stages.lm import LanguageModelStage
from dph.train.stages.preference import PreferenceStage

# Nothing is saved but what an ending saves; lines of every step.
QUIET = {"output__save_every": 0, "output__log_every": 1, "evaluation__every": 0}


def raising(error):
    def action():
        raise error

    return action


def newest(directory):
    found = checkpointing.newest_checkpoint(directory / "checkpoints")
    return None if found is None else found.step


def assert_resumes(stage, directory, whole, **changes):
    """The run in ``directory`` resumes to the undisturbed one, in weights and figures."""
    same(whole, go(settings(stage, directory, **QUIET, **changes), resume=True))
    assert figures(directory) == figures(whole.run)


ERRORS = [
    UserError("data.jsonl: line 7 changed"),
    OSError(errno.EIO, "Input/output error", "data.jsonl"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
]


@pytest.mark.parametrize(
    ("stage", "changes", "error"),
    [
        ("sft", {}, ERRORS[0]),
        ("sft", {"data__memory_kind": "hidden", "batch__micro": 2}, ERRORS[1]),
        ("pretrain", {}, ERRORS[2]),
        ("align", {}, ERRORS[0]),
        ("head", {"precision": "bf16"}, ERRORS[1]),
    ],
)
@pytest.mark.parametrize("within", [1, 2])
def test_an_error_of_the_data_saves_the_last_whole_step(within, stage, changes, error, tmp_path):
    """At the first record of a batch or a later one: what the failed batch has taken is taken again."""
    whole = go(settings(stage, tmp_path / "whole", **QUIET, **changes))
    recipe = settings(stage, tmp_path / "parts", **QUIET, **changes)
    with pytest.raises(type(error)) as caught:
        go(recipe, Trap(records(stage), taken(recipe, 5) + within, raising(error)))
    assert caught.value is error
    assert main.explain(error).endswith(f"; step 5 is saved in {tmp_path / 'parts'}, --resume continues from it")
    del error.__notes__
    assert newest(tmp_path / "parts") == 5
    assert_resumes(stage, tmp_path / "parts", whole, **changes)


@pytest.mark.parametrize(
    ("stage", "changes", "saved"),
    [("align", {"batch__micro": 1}, 5), ("sft", {"data__memory": 0, "batch__micro": 2}, 5), ("sft", {}, None)],
)
def test_an_error_within_a_step_saves_the_step_before_it(stage, changes, saved, tmp_path, monkeypatch):
    """Unless the step has changed the memory: then nothing is saved, rather than another state."""
    whole = go(settings(stage, tmp_path / "whole", **QUIET, **changes))
    kind = PreferenceStage if stage == "align" else LanguageModelStage
    loss, left = kind.loss, [6 if "batch__micro" not in changes else 5 * (4 if stage == "align" else 2) + 2]

    def fail(self, inputs):
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("out of memory")
        return loss(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "loss", fail)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            go(settings(stage, tmp_path / "parts", **QUIET, **changes))
    assert newest(tmp_path / "parts") == saved
    if saved is None:
        assert main.explain(caught.value) == "out of memory; no checkpoint was saved"
    else:
        assert_resumes(stage, tmp_path / "parts", whole, **changes)


def test_the_death_of_a_worker_saves_the_last_whole_step(tmp_path, monkeypatch):
    whole = go(settings("sft", tmp_path / "whole", **QUIET))
    recipe = settings("sft", tmp_path / "parts", **QUIET, data__workers=2)
    train_step = Trainer.train_step

    def kill(self, step):
        if step == 6:
            for worker in self.stage.batches.records._workers:
                worker.process.kill()
        return train_step(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "MAX_PREFETCHED", 2)
        patch.setattr(Trainer, "train_step", kill)
        with pytest.raises((UserError, RuntimeError), match="killed by SIGKILL"):
            go(recipe)
    assert 5 <= newest(tmp_path / "parts") <= 6  # a record may have been received before its worker died
    assert_resumes("sft", tmp_path / "parts", whole, data__workers=1)


@pytest.mark.parametrize("step", [4, 8])
def test_an_error_of_an_evaluation_is_repeated_by_the_resumed_run(step, tmp_path, monkeypatch):
    """Also after the last step."""
    changes = {"output__save_every": 0, "output__best": "loss", "evaluation__every": 4}
    whole = go(settings("sft", tmp_path / "whole", **changes))
    evaluate, calls = HeldOut.evaluate, [step // 4]

    def fail(self):
        calls[0] -= 1
        if calls[0] == 0:
            raise ERRORS[0]
        return evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "evaluate", fail)
        with pytest.raises(UserError):
            go(settings("sft", tmp_path / "parts", **changes))
    assert newest(tmp_path / "parts") == step
    resumed = go(settings("sft", tmp_path / "parts", **changes), resume=True)
    same(whole, resumed)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    marks = [(tmp_path / name / "checkpoints" / run_dir.BEST).read_text() for name in ("whole", "parts")]
    assert marks[0] == marks[1]


@pytest.mark.parametrize("during", [False, True])
def test_a_signal_does_not_wait_for_an_evaluation(during, tmp_path, monkeypatch):
    """The resumed run makes up for it; a signal during an evaluation ends the run after it."""
    changes = {"output__save_every": 0, "output__log_every": 1, "evaluation__every": 4}
    whole = go(settings("sft", tmp_path / "whole", **changes))
    recipe, evaluate, calls = settings("sft", tmp_path / "parts", **changes), HeldOut.evaluate, []

    def count(self):
        calls.append(1)
        if during:
            strike()
        return evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "evaluate", count)
        given = records("sft") if during else Trap(records("sft"), taken(recipe, 3) + 1, strike)
        stopped = go(recipe, given)
    assert (stopped.interrupted, stopped.step, len(calls)) == (True, 4, int(during))
    same(whole, go(recipe, resume=True))
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")


def test_divergence_is_saved_and_a_resumed_run_tries_what_follows(tmp_path):
    model = tiny()
    hook = model.backbone.input_norm.register_forward_hook(lambda _, inputs, states: states * math.nan)
    recipe = settings("align", tmp_path / "run", **QUIET, guard__stop_after=2)
    with pytest.raises(Diverged) as caught:
        go(recipe, model=model, held_out={})
    hook.remove()
    assert "; step 3 is saved in " in main.explain(caught.value)
    assert go(recipe, resume=True).step == 8
    assert figures(tmp_path / "run")[-2]["skipped"] == 3


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGXCPU])
def test_signals_of_terminals_and_batch_systems_save_and_stop(number, tmp_path):
    whole = go(settings("sft", tmp_path / "whole", **QUIET))
    recipe = settings("sft", tmp_path / "parts", **QUIET)
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    try:
        stopped = go(recipe, Trap(records("sft"), taken(recipe, 4) + 1, lambda: strike(number)))
    finally:
        signal.signal(number, before)
    assert (stopped.interrupted, stopped.step, stopped.exit_code) == (True, 5, 128 + number)
    assert_resumes("sft", tmp_path / "parts", whole)


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stop_signals(lambda text: None) as received:
            strike(signal.SIGHUP)
            assert received() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_that_fails_is_reported_with_the_first_error(tmp_path, monkeypatch):
    """The checkpoint before it stays, and the run resumes from it."""
    changes = {**QUIET, "output__save_every": 3}
    recipe = settings("sft", tmp_path / "run", **changes)

    def fail():
        monkeypatch.setattr(checkpointing, "save_file", full)
        raise UserError("line 7 changed")

    with pytest.raises(UserError) as caught:
        go(recipe, Trap(records("sft"), taken(recipe, 5) + 1, fail))
    monkeypatch.undo()
    path = tmp_path / "run" / "checkpoints"
    assert main.explain(caught.value) == (
        f"line 7 changed; saving step 5 failed, too: {path / 'step-00000005'}: No space left on device; step 3 "
        f"is saved in {tmp_path / 'run'}, --resume continues from it"
    )
    assert [entry.name for entry in path.iterdir()] == ["step-00000003"]
    same(go(settings("sft", tmp_path / "whole", **changes)), go(recipe, resume=True))


def test_metrics_wait_for_room_on_the_disk(tmp_path, monkeypatch, caplog):
    """No line is lost, and none is torn, in a run on whose disk there is no room for a while."""
    go(settings("sft", tmp_path / "whole", **QUIET))
    flush, calls = run_dir.MetricsFile._flush, []

    def sometimes(self):
        calls.append(None)
        if 2 < len(calls) < 6:
            self._unwritten = self._unwritten[self._file.write(self._unwritten[:3]) :]
            full()
        flush(self)

    monkeypatch.setattr(run_dir.MetricsFile, "_flush", sometimes)
    go(settings("sft", tmp_path / "run", **QUIET))
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert caplog.text.count("metrics.jsonl: No space left on device; its lines wait") == 1


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_run_directory_that_goes_ends_the_run(how, tmp_path, capfd):
    """Nothing is made in its place, and no thread reports an error of its own."""

    def go_away():
        if how == "deleted":
            shutil.rmtree(tmp_path / "run")
        else:
            (tmp_path / "run").rename(tmp_path / "other")

    recipe = settings("sft", tmp_path / "run", **QUIET)
    with pytest.raises(RunLost) as caught:
        go(recipe, Trap(records("sft"), taken(recipe, 4) + 1, go_away))
    assert main.explain(caught.value).startswith(f"{tmp_path / 'run'}: the run directory was deleted or moved while")
    assert not isinstance(caught.value, main.INPUT_ERRORS)  # exit code 1
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr().err == ""


class Failing:
    """A stream that fails from the ``after``-th write on."""

    encoding = "utf-8"

    def __init__(self, error, after=0):
        self.error, self.left, self.text = error, after, ""

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise self.error
        self.text += text
        return len(text)

    def flush(self):
        if self.left < 0:
            raise self.error

    def isatty(self):
        return self.left > 0


@pytest.mark.parametrize(
    "stream",
    [
        None,
        Failing(BrokenPipeError(errno.EPIPE, "Broken pipe"), 3),
        Failing(OSError(errno.ENOSPC, "No space left on device")),
        Failing(OSError(errno.EIO, "Input/output error"), 9),
        Failing(ValueError("I/O operation on closed file")),
    ],
    ids=["none", "pipe", "full", "terminal", "closed"],
)
def test_output_never_ends_a_run(stream, tmp_path, monkeypatch):
    """Progress, bar, warnings and logging: to no stream, or to one that fails."""
    import logging
    import warnings

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)

    def say():
        print("a library")
        logging.lastResort.emit(logging.makeLogRecord({"msg": "a library"}))
        warnings.showwarning("a library", UserWarning, "file", 1)

    monkeypatch.setattr(entry, "describe_data", lambda stage: [])  # which reads records before the first step
    recipe = settings("sft", tmp_path / "run", **QUIET)
    assert go(recipe, Trap(records("sft"), taken(recipe, 4) + 1, say), quiet=False).step == 8
    assert sys.stderr is stream


@pytest.mark.parametrize("fault", ["import", "open", "write", "close"])
def test_tensorboard_never_ends_a_run(fault, tmp_path, monkeypatch, caplog):
    if fault == "import":
        monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.summary_pb2", None)
    elif fault == "open":
        monkeypatch.setattr(trackers.TensorBoard, "_open", full)
    elif fault == "write":
        monkeypatch.setattr(trackers.TensorBoard, "_write", full)
    else:
        monkeypatch.setattr(trackers.TensorBoard, "close", full)
    assert go(settings("sft", tmp_path / "run", **QUIET)).step == 8
    assert caplog.text.count("TensorBoard is left out for the rest of the run: ") == 1
    assert len(figures(tmp_path / "run")) == 9
