"""The best checkpoint: judged by one figure, kept beside the last ones, found again, and made a model."""

import errno
import json

import pytest
import torch
from helpers.stages import Killed, records, settings, tiny, weights
from helpers.texts import small_tokenizer, write_lines

import dph
from dph.cli import main
from dph.data import atomic
from dph.errors import UserError
from dph.train import best_checkpoint, checkpointing, recipe, run_dir
from dph.train.best_checkpoint import BestCheckpoint
from dph.train.build import make_stage
from dph.train.entry import train
from dph.train.stages.held_out import HeldOutStreams

LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0}  # what held-out records are made to say after each step


@pytest.mark.parametrize(
    ("figure", "values", "steps"),
    [
        ("loss", [3.0, 2.0, 2.0, 2.5, 1.0], [1, 2, 5]),
        ("entropy/glue/rte", [3.0, float("nan"), 2.0], [1, 3]),
        ("reward_accuracy", [0.5, 0.4, 0.5, 0.6], [1, 4]),
        ("token_accuracy/own", [float("nan"), 0.0, 0.1], [2, 3]),
        (None, [1.0, 2.0], []),
    ],
)
def test_what_is_best(figure, values, steps):
    """Less of losses, more of accuracies; of equal ones the first; never NaN."""
    judge = BestCheckpoint(figure)
    seen = [step for step, value in enumerate(values, 1) if judge.update(step, {figure: value, "other": 0.0})]
    assert seen == steps
    assert judge.state == ({"step": steps[-1], "figure": figure, "value": values[steps[-1] - 1]} if steps else None)
    again, other = BestCheckpoint(figure), BestCheckpoint("another")
    for one in (again, other):
        one.load(judge.state)
    assert (again.state, other.state) == (judge.state, None)


def test_figures_are_those_that_an_evaluation_gives(tmp_path):
    for stage in ("sft", "align", "head"):
        for held_out in ({"a": records(stage, 3)}, {"a": records(stage, 3), "b": records(stage, 2)}, {}):
            heads = ["default", "other"]
            values = settings(stage, tmp_path, objective__heads=heads)
            made = make_stage(values, tiny(reward_heads=heads), small_tokenizer(), records(stage), held_out)
            assert made.held_out.names() == list(made.held_out.evaluate())


@pytest.mark.parametrize(
    ("changes", "held_out", "message"),
    [
        ({"output__best": "acuracy"}, 3, r"output\.best: expected one of loss, token_accuracy, entropy, got 'acuracy'"),
        ({"output__best": "loss"}, 0, r"output\.best: expected evaluation\.sources to judge loss by, got none"),
    ],
)
def test_wrong_figures_are_said_before_training(changes, held_out, message, tmp_path):
    with pytest.raises(UserError, match=message):
        go(tmp_path / "run", held_out=records("sft", held_out), **changes)
    assert not (tmp_path / "run/checkpoints").exists()


def test_without_evaluations_there_is_no_best(tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.every: expected at least 1 with output\.best loss, got 0"):
        settings("sft", tmp_path, output__best="loss", evaluation__every=0)


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations give ``LOSSES``, one after another; the dictionary says where they stand."""
    at = {"step": 0}

    def evaluate(self):
        at["step"] += 2
        return {"loss": LOSSES[at["step"]], "token_accuracy": 0.0, "entropy": 0.0}

    monkeypatch.setattr(HeldOutStreams, "evaluate", evaluate)
    return at


def go(directory, resume=False, held_out=None, quiet=True, **changes):
    changes = {"evaluation__every": 2, "output__save_every": 3, "output__keep": 1, "output__best": "loss", **changes}
    return train(
        settings("sft", directory, **changes), model=tiny(), tokenizer=small_tokenizer(), records=records("sft"),
        held_out=records("sft", 3) if held_out is None else held_out, resume=resume, quiet=quiet,
    )  # fmt: skip


def kept(directory):
    """Steps of the checkpoints, and what best.json says."""
    found = {path.name for path in (directory / "checkpoints").iterdir()}
    mark = directory / "checkpoints" / run_dir.BEST
    said = json.loads(mark.read_text()) if mark.exists() else None
    return sorted(int(name.removeprefix("step-")) for name in found - {run_dir.BEST}), said


BEST = {"checkpoint": "step-00000004", "step": 4, "figure": "loss", "value": 1.0}


def test_the_best_stays_beside_the_last(tmp_path, scripted, capsys):
    go(tmp_path / "run", quiet=False)
    assert kept(tmp_path / "run") == ([4, 8], BEST)
    said = capsys.readouterr().err.splitlines()[-1]
    path = tmp_path / "run/checkpoints/step-00000004"
    assert said == f"sft: the best by loss (1) is {path}, which dph convert makes a model"
    assert checkpointing.damage(path) is None


def test_it_is_saved_when_it_is_evaluated_and_no_worse_one_is(tmp_path, scripted, monkeypatch):
    saved = []
    save = run_dir.RunDirectory.save
    monkeypatch.setattr(
        run_dir.RunDirectory, "save", lambda self, step, *rest: saved.append(step) or save(self, step, *rest)
    )
    go(tmp_path / "run", output__save_every=0)
    assert saved == [2, 4, 8]


@pytest.mark.parametrize("stop", [3, 4, 6])
@pytest.mark.parametrize("where", ["before the mark", "after the mark"])
def test_kills_change_nothing(stop, where, tmp_path, scripted, monkeypatch):
    """Killed once step ``stop`` is on disk, with the best one marked and the old ones dropped, or not yet."""
    whole = go(tmp_path / "whole")
    mark = run_dir.RunDirectory._mark_best

    def killed(self, state):
        found = mark(self, state) if where == "after the mark" else None
        if checkpointing.newest_checkpoint(self.directory / "checkpoints").step == stop:
            raise Killed
        return found or mark(self, state)

    scripted["step"] = 0
    monkeypatch.setattr(run_dir.RunDirectory, "_mark_best", killed)
    with pytest.raises(Killed):
        go(tmp_path / "parts")
    monkeypatch.setattr(run_dir.RunDirectory, "_mark_best", mark)
    scripted["step"] = stop // 2 * 2
    resumed = go(tmp_path / "parts", resume=True)
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole") == ([4, 8], BEST)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(whole.model).values(), weights(resumed.model).values(), strict=True)
    )


def test_a_finished_run_is_marked_again(tmp_path, scripted):
    go(tmp_path / "run")
    (tmp_path / "run/checkpoints" / run_dir.BEST).unlink()
    go(tmp_path / "run", resume=True)
    assert kept(tmp_path / "run") == ([4, 8], BEST)


@pytest.mark.parametrize("part", ["weights", "state.json", run_dir.BEST])
def test_a_full_disk_leaves_the_old_ones(part, tmp_path, scripted, monkeypatch):
    """While the better step 4 is written, after 2 (the best) and 3 (the last)."""
    save_file, write_text, atomic_write_text = checkpointing.save_file, type(tmp_path).write_text, atomic.write_text
    full = lambda path: "step-00000004" in str(path) or run_dir.BEST in str(path)  # noqa: E731

    def check(path, name):
        if filled and part in name and full(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def save(tensors, path):
        check(path, path.name)
        save_file(tensors, path)

    def write(path, text, *rest, **options):
        check(path, path.name)
        return write_text(path, text, *rest, **options)

    def write_atomically(path, text):
        check(path, path.name)
        atomic_write_text(path, text)

    filled = False
    monkeypatch.setattr(checkpointing, "save_file", save)
    monkeypatch.setattr(type(tmp_path), "write_text", write)
    monkeypatch.setattr(atomic, "write_text", write_atomically)
    run_save = run_dir.RunDirectory.save

    def at_four(self, step, *rest):
        nonlocal filled
        filled = step == 4
        return run_save(self, step, *rest)

    monkeypatch.setattr(run_dir.RunDirectory, "save", at_four)
    with pytest.raises(OSError, match="No space left"):
        go(tmp_path / "run")
    steps, said = kept(tmp_path / "run")
    assert [step for step in steps if step < 4] == [2, 3]
    assert said["step"] == 2
    assert all(checkpointing.damage(checkpointing.checkpoint_path(tmp_path / "run", step)) is None for step in steps)
    monkeypatch.undo()
    monkeypatch.setattr(HeldOutStreams, "evaluate", lambda self: {"loss": 1.0, "token_accuracy": 0.0, "entropy": 0.0})
    go(tmp_path / "run", resume=True)
    assert kept(tmp_path / "run") == ([4, 8], BEST)


@pytest.mark.parametrize("whole", [False, True])
def test_a_best_one_that_is_gone_is_forgotten(whole, tmp_path, scripted, monkeypatch, caplog):
    """Killed after step 6, whose best is 4; that is deleted, or damaged: of those to come, 8 is the best."""
    save = run_dir.RunDirectory.save

    def killed(self, step, *rest):
        save(self, step, *rest)
        if step == 6:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(run_dir.RunDirectory, "save", killed)
        with pytest.raises(Killed):
            go(tmp_path / "run")
    assert kept(tmp_path / "run") == ([4, 6], BEST)
    best = checkpointing.checkpoint_path(tmp_path / "run", 4)
    if whole:
        best.rename(tmp_path / "gone")
    else:
        (best / "weights.safetensors").write_bytes(b"")
    go(tmp_path / "run", resume=True)
    reason = "no readable manifest.json" if whole else "weights.safetensors is damaged"
    assert f"step-00000004, the best, is not complete ({reason}): the next to be" in caplog.text
    assert kept(tmp_path / "run") == ([8], {**BEST, "checkpoint": "step-00000008", "step": 8})


def test_without_a_best_one_none_is_marked(tmp_path, scripted):
    """A run that goes on without keeps the last ones only."""
    go(tmp_path / "run")
    (tmp_path / "run/checkpoints/step-00000008").rename(tmp_path / "gone")
    scripted["step"] = 4
    go(tmp_path / "run", resume=True, output__best=None)
    assert kept(tmp_path / "run") == ([8], None)


@pytest.mark.parametrize("stage", ["vocab", "align", "head"])
@pytest.mark.parametrize("layout", ["own", "official"])
def test_a_checkpoint_becomes_a_model(stage, layout, tmp_path, capsys):
    small_tokenizer().save_pretrained(tmp_path / "model")
    tiny().save_pretrained(tmp_path / "model")
    pair = lambda r: {"chosen": r.chosen, "rejected": r.rejected}  # noqa: E731
    fields = (lambda r: {"messages": r.messages}) if stage == "vocab" else pair
    values = settings(stage, tmp_path / "run", evaluation__every=0, output__save_every=4).as_dict()
    values["data"]["sources"] = [{"source": str(write_lines(tmp_path / "own.jsonl", *map(fields, records(stage))))}]
    values["model"] = {"path": str(tmp_path / "model")}
    done = train(recipe.from_dict(values), quiet=True)
    for step in (4, 8):
        path = checkpointing.checkpoint_path(tmp_path / "run", step)
        assert main.main(["convert", str(path), str(tmp_path / f"{step}"), "--to", layout]) == 0
    found = {step: dph.Model.from_pretrained(tmp_path / f"{step}") for step in (4, 8)}
    ended = weights(done.model)
    assert all(torch.equal(p, ended[name]) for name, p in found[8].named_parameters())
    assert not all(torch.equal(p, ended[name]) for name, p in found[4].named_parameters())
    assert not found[4].untrained_heads
    assert (tmp_path / "4/tokenizer.json").is_file()
    (checkpointing.checkpoint_path(tmp_path / "run", 4) / "weights.safetensors").write_bytes(b"")
    assert (
        main.main(
            ["convert", str(checkpointing.checkpoint_path(tmp_path / "run", 4)), str(tmp_path / "x"), "--to", layout]
        )
        == 2
    )
    assert "weights.safetensors is damaged" in capsys.readouterr().err


def test_a_run_of_a_model_in_memory_has_nothing_to_open(tmp_path, capsys):
    go(tmp_path / "run")
    path = checkpointing.checkpoint_path(tmp_path / "run", 8)
    assert main.main(["convert", str(path), str(tmp_path / "x"), "--to", "own"]) == 2
    assert "model: expected either path or config, got neither" in capsys.readouterr().err


def test_every_figure_is_of_a_known_kind(tmp_path):
    """What is no accuracy stands in the list of what is better lower."""
    for stage in ("sft", "align"):
        made = make_stage(settings(stage, tmp_path), tiny(), small_tokenizer(), records(stage), {})
        assert all(("accuracy" in name) != (name in best_checkpoint.LOWER_IS_BETTER) for name in made.held_out.metrics)
