"""A resume that is refused changes nothing in the run's folder, whatever the reason, and names what changed first."""

import json
import shutil
import sys

import pytest
import torch
from helpers.stages import Killed, Trap, die, go, records, same, settings, taken, tiny
from helpers.texts import small_tokenizer, write_lines
from safetensors.torch import load_file

from dph.data import tokenizer
from dph.errors import UserError
from dph.train import checkpointing, recipe
from dph.train.entry import train

CHANGES = {"output__log_every": 1, "output__best": "loss", "output__keep": 2, "evaluation__every": 2}


def content(folder):
    """Every name in a folder, hidden ones too -> what it holds, and when it was last written."""
    found = {}
    for path in folder.rglob("*"):
        status = path.stat()
        found[str(path.relative_to(folder))] = (status.st_mtime_ns, status.st_ino, path.is_file() and path.read_bytes())
    return found


@pytest.fixture
def killed(tmp_path):
    """A run killed in step 6, after checkpoints 3 and 4 and metrics of step 5, with what a killed process leaves."""
    made = settings("sft", tmp_path / "run", **CHANGES)
    with pytest.raises(Killed):
        go(made, Trap(records("sft"), taken(made, 5) + 1, die))
    run = tmp_path / "run"
    (run / "checkpoints" / "best.json").unlink()
    (run / "checkpoints" / ".step-00000006.partial").mkdir()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    return run


def saved(run, index=-1):
    return checkpointing.saved_checkpoints(run / "checkpoints")[index]


def rewrite(path, change=None, **parts):
    """Write a checkpoint again, with a valid manifest."""
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    state = json.loads((path / "state.json").read_text())
    if change is not None:
        change(state)
    checkpointing.write_checkpoint(path, checkpointing.step_of(path), tensors | parts, state)


def damage(run, index=-1):
    (saved(run, index) / "weights.safetensors").write_bytes(b"")


def replaced(run):
    """Killed between the two renames that replace the newest checkpoint."""
    path = saved(run)
    path.rename(path.with_name(f".{path.name}.old"))


# How the folder is changed, and what is given to the resume: records, and changes of the recipe.
KINDS = {
    "records": (None, 22, {}, "records: other records (22 in place of 23)"),
    "damaged newest": (damage, 22, {}, "records: other records"),
    "half replaced": (replaced, 22, {}, "records: other records"),
    "all damaged": (lambda run: (damage(run), damage(run, 0)), 23, {}, "expected a complete checkpoint, got"),
    "option": (damage, 23, {"optimiser__lr": 0.02}, "optimiser.lr: expected 0.01, got 0.02"),
    "metric": (damage, 23, {"output__best": "nothing"}, "output.best: expected one of"),
    "state": (lambda run: rewrite(saved(run), lambda s: s.update(best=3)), 23, {}, "state.json: best: expected null"),
    "weights": (lambda run: rewrite(saved(run), weights={}), 23, {}, "weights.safetensors: expected the model's"),
    "start": (lambda run: (run / "start" / "state.json").unlink(), 23, {}, "start: state.json is missing"),
    "generators": (lambda run: rewrite(saved(run), generators={}), 23, {}, "generators.safetensors: expected what"),
    "package": (damage, 23, {"output__tracker": "wandb", "output__project": "x"}, "needs the wandb package"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_resume_changes_no_file(kind, killed, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    harm, count, changes, message = KINDS[kind]
    if harm is not None:
        harm(killed)
    before = content(killed)
    with pytest.raises(UserError) as caught:
        go(settings("sft", killed, **{**CHANGES, **changes}), records("sft", count), resume=True)
    assert message in str(caught.value)
    assert content(killed) == before


def test_a_tracker_that_refuses_a_resume_changes_no_file(killed, monkeypatch):
    class Refusing:
        def init(self, **_):
            torch.rand(3)
            raise RuntimeError("no account")

    monkeypatch.setitem(sys.modules, "wandb", Refusing())
    damage(killed)
    before = content(killed)
    with pytest.raises(UserError, match="wandb cannot begin a run: no account"):
        go(settings("sft", killed, **CHANGES, output__tracker="wandb", output__project="x"), resume=True)
    assert content(killed) == before


@pytest.mark.parametrize("harm", [None, damage, replaced])
def test_the_resume_after_a_refused_one_is_that_of_the_killed_run(harm, killed, tmp_path):
    if harm is not None:
        harm(killed)
    with pytest.raises(UserError):
        go(settings("sft", killed, **CHANGES), records("sft", 22), resume=True)
    same(go(settings("sft", tmp_path / "whole", **CHANGES)), go(settings("sft", killed, **CHANGES), resume=True))
    names = {path.name for path in (killed / "checkpoints").iterdir()}
    assert not any(name.endswith((".partial", ".old")) for name in names)
    assert ("step-00000004.damaged" in names) == (harm is damage)
    assert "best.json" in names


def test_a_start_that_fails_leaves_the_folder_of_a_run_without_a_checkpoint(tmp_path):
    """Lines of metrics, but no checkpoint: a resume that begins again may be refused as well."""
    made = settings("sft", tmp_path / "run", output__save_every=0, output__log_every=1, evaluation__every=0)
    with pytest.raises(Killed):
        go(made, Trap(records("sft"), taken(made, 3) + 1, die))
    before = content(tmp_path / "run")
    assert "metrics.jsonl" in before
    with pytest.raises(UserError, match="expected at least one source"):
        train(made, model=tiny(), tokenizer=small_tokenizer(), resume=True, quiet=True)
    assert content(tmp_path / "run") == before


# The order of the checks


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run on files that was killed after step 7; options -> result of training as far as it goes."""
    monkeypatch.chdir(tmp_path)
    small_tokenizer().save_pretrained("model")
    tiny().save_pretrained("model")
    lengths = {"a": 23, "b": 11}
    for name, count in lengths.items():
        write_lines(tmp_path / f"{name}.jsonl", *({"messages": r.messages} for r in records("sft", count)))

    def run(steps=8, sources=("a.jsonl", "b.jsonl"), **options):
        values = settings("sft", "run", output__save_every=1, output__keep=3, evaluation__every=0).as_dict()
        values["data"]["sources"] = [{"source": source} for source in sources]
        values["model"] = {"path": "model"}
        done = train(recipe.from_dict(values), quiet=True, **options)
        for number in range(steps + 1, 9):
            shutil.rmtree(checkpointing.checkpoint_path(done.run, number))
        return done

    run(steps=7)
    return run


def test_a_smaller_vocabulary_is_named_and_not_the_state(stopped, tmp_path):
    """The state holds tokens that the new vocabulary lacks; forced, the resume says so."""
    small = tokenizer.from_iterator(["a b"], 262)
    small.save_pretrained("model")
    tiny(vocab_size=len(small)).save_pretrained("model")
    rewrite(saved(tmp_path / "run"), lambda state: state["data"]["tokens"][0].append(len(small_tokenizer()) - 1) or
            state["data"]["targets"][0].append(-100))  # fmt: skip
    before = content(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        stopped(resume=True)
    changed = "model.tokenizer: another tokenizer; model: another configuration: "
    assert str(caught.value).startswith(changed + "expected what the run in run began with; ")
    assert "--force-resume" in str(caught.value)
    with pytest.raises(UserError) as caught:
        stopped(force_resume=True)
    assert str(caught.value).startswith(changed + "does not fit the run: run/checkpoints/step-00000007/state.json: ")
    assert content(tmp_path / "run") == before


def test_several_sources_that_changed_can_be_forced(stopped, tmp_path):
    for name, count in {"a": 19, "b": 13}.items():
        write_lines(tmp_path / f"{name}.jsonl", *({"messages": r.messages} for r in records("sft", count)))
    with pytest.raises(UserError) as caught:
        stopped(resume=True)
    assert "(19 in place of 23); data.sources.1 (b.jsonl): other records (13 in place of 11)" in str(caught.value)
    assert "--force-resume" in str(caught.value)
    assert stopped(force_resume=True).step == 8


def test_another_number_of_sources_cannot_be_forced_and_force_is_not_advised(stopped, tmp_path):
    before = content(tmp_path / "run")
    for options in ({"resume": True}, {"force_resume": True}):
        with pytest.raises(UserError) as caught:
            stopped(records=records("sft"), **options)
        assert str(caught.value) == (
            "data: 1 sources in place of 2: a resumed run must have as many as the one in run began with"
        )
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize("first", ["file", "memory"])
def test_one_source_may_be_replaced_by_records_in_memory(first, stopped):
    """A sampler of one source in memory has another state than one of sources in files."""
    shutil.rmtree("run")
    in_memory = {"records": records("sft", 17)}
    stopped(steps=7, sources=["a.jsonl"], **({} if first == "file" else in_memory))
    then = in_memory if first == "file" else {}
    with pytest.raises(UserError, match=r"other records \(.*--force-resume"):
        stopped(sources=["a.jsonl"], resume=True, **then)
    assert stopped(sources=["a.jsonl"], force_resume=True, **then).step == 8
