"""State files made by hand are refused in one line that names file and key, or ignored if they are only logs."""

import json

import pytest
import torch
from helpers.stages import Trap, figures, go, records, settings, strike, taken
from safetensors.torch import load_file

from dph.errors import UserError
from dph.train import checkpointing, run_dir, trackers


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each kind, stopped after step 2: stage -> recipe."""
    stopped = {}
    for stage in ("sft", "align"):
        recipe = settings(stage, tmp_path_factory.mktemp("runs") / stage, evaluation__every=1, output__best=BEST[stage])
        go(recipe, Trap(records(stage), taken(recipe, 1) + 1, strike))
        stopped[stage] = recipe
    return stopped


BEST = {"sft": "loss", "align": "logprob_accuracy"}


@pytest.fixture
def restored(runs):
    """The runs; their checkpoints are as they were afterwards."""
    kept = {path: path.read_bytes() for recipe in runs.values() for path in files(recipe)}
    yield runs
    for path, content in kept.items():
        path.write_bytes(content)


def checkpoint(recipe):
    return checkpointing.newest_checkpoint(run_dir.Path(recipe.output.directory) / "checkpoints").path


def files(recipe):
    return [path for path in run_dir.Path(recipe.output.directory).rglob("*") if path.is_file() and path.name != "lock"]


def rewrite(path, state=None, **parts):
    """Write a checkpoint again, with a valid manifest."""
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    state = json.loads((path / "state.json").read_text()) if state is None else state
    checkpointing.write_checkpoint(path, int(path.name.removeprefix("step-")), tensors | parts, state)


def resume_error(recipe):
    with pytest.raises(UserError) as caught:
        go(recipe, resume=True)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


GONE = ...
VALUES = [
    ("sft", "window", [1], "a section with keys, got [1]"),
    ("sft", "window.sums", [0.0], "4 numbers or null, got [0.0]"),
    ("sft", "window.steps", -1, "a whole number from 0, got -1"),
    ("sft", "window.tokens", 1.5, "a whole number from 0, got 1.5"),
    ("sft", "window.flops", float("nan"), "a finite number from 0, got nan"),
    ("sft", "window.seconds", GONE, "what this version of dph saves, got nothing"),
    ("sft", "guard", ["0", 0, 0, 0], "4 numbers, the first and the last from 0, got ['0', 0, 0, 0]"),
    ("sft", "guard", [0, 0, 0, -1], "4 numbers, the first and the last from 0, got [0, 0, 0, -1]"),
    ("sft", "forget", None, "a step, got None"),
    ("sft", "evaluation", {"loss": "low"}, "numbers by name, got {'loss': 'low'}"),
    ("sft", "evaluation_due", 1, "true or false, got 1"),
    ("sft", "best", {"step": 1}, "null, or step, figure and value, got {'step': 1}"),
    ("sft", "fingerprints", {}, "digests of sources, tokenizer, model and held-out records, got {}"),
    ("sft", "data.records", 7, "a section with keys, got 7"),
    ("sft", "data.records.position", 10**30, f"a whole number from 0, got {10**30}"),
    ("sft", "data.tokens", [[1], [True]], "lists of tokens below"),
    ("sft", "data.tokens", [[10**6]] * 4, "lists of tokens below"),
    ("sft", "data.targets", [[-1]] * 4, "lists of tokens below"),
    ("sft", "data.targets", [[]] * 3, "as many as data.tokens, got other numbers"),
    ("align", "data.refused", {"identical": -1}, "counts by reason, got {'identical': -1}"),
    ("align", "data.refused", [], "counts by reason, got []"),
]


@pytest.mark.parametrize(("stage", "key", "value", "expected"), VALUES, ids=lambda value: str(value)[:30])
def test_a_value_that_no_run_saves_is_named(stage, key, value, expected, restored):
    path = checkpoint(restored[stage])
    state = json.loads((path / "state.json").read_text())
    *sections, last = key.split(".")
    section = state
    for name in sections:
        section = section[name]
    if value is GONE:
        del section[last]
    else:
        section[last] = value
    rewrite(path, state)
    assert resume_error(restored[stage]).startswith(f"{path / 'state.json'}: {key}: expected {expected}")


PARTS = [
    ("sft", "generators", {}, "generators.safetensors: expected what a run of this version of dph saves, got KeyError"),
    ("sft", "generators", {"cpu": torch.zeros(3), "numpy": torch.zeros(3)}, "generators.safetensors: expected what"),
    ("sft", "data", {}, ": expected what a run of this version of dph saves, got "),
    ("sft", "optimiser", {"nothing": torch.zeros(3)}, "optimiser.safetensors: "),
    ("sft", "weights", {}, "weights.safetensors: "),
    ("align", "optimiser", {}, "optimiser.safetensors: "),
]


@pytest.mark.parametrize(("stage", "part", "tensors", "message"), PARTS)
def test_a_part_that_no_run_saves_is_named(stage, part, tensors, message, restored):
    path = checkpoint(restored[stage])
    rewrite(path, **{part: tensors})
    text = resume_error(restored[stage])
    assert text.startswith(str(path))
    assert message in text


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("[" * 100_000, "maximum recursion depth|RecursionError|nesting"),
        ('{"stage": ', "Expecting value"),
        ('"stage"', "'stage'"),
        ("\xff", "utf-8|Expecting value|codec"),
        ('{"stage": ["sft"]}', r"stage: expected the name of a stage, got \['sft'\]"),
    ],
    ids=["deep", "cut", "text", "bytes", "stage"],
)
def test_a_damaged_recipe_of_a_run_is_named(text, got, restored):
    path = run_dir.Path(restored["sft"].output.directory) / "config.json"
    path.write_bytes(text.encode("latin-1"))
    message = resume_error(restored["sft"])
    assert message.startswith(f"{path}: ")
    assert run_dir.re.search(got, message)


def test_a_checkpoint_under_another_name_is_damaged(restored, caplog):
    """The step counts the schedule and the data."""
    path = checkpoint(restored["sft"])
    renamed = path.rename(path.with_name("step-00000009"))
    assert checkpointing.damage(renamed) == "manifest.json is that of step 2"
    renamed.rename(path)


def test_lines_of_the_log_that_are_not_a_runs_are_left_out(restored, caplog):
    directory = run_dir.Path(restored["sft"].output.directory)
    before = figures(directory)
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(
            b'[1]\n{"loss": 1}\n{"step": "3"}\n3\nnull\n\xff\xfe\n'
            + b"[" * 100_000
            + b'\n{"step": 1'
            + b"0" * 5000
            + b"}\n"
        )
    run = run_dir.RunDirectory(directory, restored["sft"].as_dict(), resume=True)
    run.begin()
    run.close()
    assert figures(directory) == before
    assert "metrics.jsonl: 8 lines that are not a run's are left out" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"tracker": "wandb", "id": 3}', "[" * 100_000, '{"tracker": "wandb"}'],
    ids=["list", "empty", "number", "deep", "nothing"],
)
def test_a_damaged_id_of_a_tracker_is_none(text, tmp_path):
    (tmp_path / trackers.FILE).write_text(text)
    assert trackers._saved_id(tmp_path / trackers.FILE, "wandb") is None


def test_a_lock_that_is_no_file_is_named(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match="lock: expected the lock of a run, a regular file, got something else"):
        run_dir.RunDirectory(tmp_path, {"stage": "sft"})
