"""The run directory: written whole or not at all, read back exactly, continued without a seam."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from dph.data import atomic
from dph.errors import UserError
from dph.train import checkpointing, run_dir

CONFIG = {"stage": "sft", "optimiser": {"lr": 1e-4}, "output": {"keep": 2}}


def opened(directory, config=CONFIG, **options):
    """A run directory that has begun, as the trainer begins it when all is checked."""
    run = run_dir.RunDirectory(directory, config, **options)
    run.begin()
    return run


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(4, generator=generator).bfloat16()}


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_checkpoint_comes_back_bit_for_bit(tmp_path):
    run = opened(tmp_path / "run")
    state = {"position": 7, "mean": 0.1 + 0.2, "none": None}
    run.save(12, {"weights": tensors(), "memory": {}}, state)
    run.close()
    found = opened(tmp_path / "run", resume=True).checkpoint
    assert found.step == 12
    assert found.state() == state
    assert found.tensors("memory") == {}
    for key, value in tensors().items():
        assert torch.equal(found.tensors("weights")[key], value)
        assert found.tensors("weights")[key].dtype == value.dtype


def test_transposed_and_expanded_tensors(tmp_path):
    run = opened(tmp_path / "run")
    values = {"t": torch.arange(6.0).view(2, 3).t(), "e": torch.ones(1).expand(4), "z": torch.zeros(0, 3)}
    run.save(1, {"weights": values}, {})
    found = checkpointing.newest_checkpoint(tmp_path / "run" / "checkpoints").tensors("weights")
    assert all(torch.equal(found[k], v) for k, v in values.items())


def test_keeps_the_newest(tmp_path):
    run = opened(tmp_path / "run", keep=2)
    for step in (5, 99_999_999, 100_000_000):
        run.save(step, {}, {})
    run.close()
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-100000000", "step-99999999"]
    assert opened(tmp_path / "run", resume=True).step == 100_000_000


@pytest.mark.parametrize("harm", ["truncate", "flip", "missing", "no manifest", "half a manifest"])
def test_incomplete_checkpoint_is_passed_over(tmp_path, harm, caplog):
    run = opened(tmp_path / "run")
    run.save(10, {"weights": tensors()}, {})
    path = run.save(20, {"weights": tensors(1)}, {})
    run.close()
    file = path / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if harm == "truncate":
        file.write_bytes(data[:-1])
    elif harm == "flip":
        file.write_bytes(data)
    elif harm == "missing":
        file.unlink()
    elif harm == "no manifest":
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text('{"step": 20, "fil')
    assert opened(tmp_path / "run", resume=True).step == 10
    assert "step-00000020 is not complete" in caplog.text


def test_damaged_checkpoints_are_set_aside_and_count_for_nothing(tmp_path, caplog):
    """Their steps come again, and what is saved then stays."""
    run = opened(tmp_path / "run")
    saved = [run.save(step, {"weights": tensors()}, {}) for step in (10, 20)]
    run.close()
    (saved[1] / "weights.safetensors").write_bytes(b"")
    for begun in (10, 12):
        run = opened(tmp_path / "run", resume=True)
        assert run.step == begun
        for step in (begun + 1, begun + 2):
            run.save(step, {"weights": tensors()}, {})
        run.close()
        there = sorted(path.name for path in saved[0].parent.iterdir())
        assert there == [f"step-{begun + 1:08}", f"step-{begun + 2:08}", "step-00000020.damaged"]
    assert "step-00000020 is kept as step-00000020.damaged" in caplog.text


FORMS = ["null", "[]", "{}", '{"files": {"state.json": 3}}', '{"files": {"a": {"size": 1}}}', "{"]


@pytest.mark.parametrize("text", FORMS)
def test_a_manifest_of_another_form_is_damage(text, tmp_path):
    path = opened(tmp_path / "run").save(10, {"weights": tensors()}, {})
    (path / "manifest.json").write_text(text)
    assert checkpointing.damage(path) == "no readable manifest.json"


def test_a_state_of_another_version_is_named(tmp_path):
    path = opened(tmp_path / "run").save(10, {}, {"window": {}})
    state = checkpointing.Checkpoint(10, path).state()
    assert (state, state["window"], state.get("best")) == ({"window": {}}, {}, None)
    with pytest.raises(
        UserError, match=r"step-00000010/state\.json: best: expected what this version of dph saves, got "
    ):
        state["best"]


def test_a_run_with_nothing_but_damaged_checkpoints_is_not_begun_again(tmp_path):
    run = opened(tmp_path / "run")
    saved = [run.save(step, {"weights": tensors()}, {}) for step in (10, 20)]
    run.close()
    for path in saved:
        (path / "manifest.json").unlink()
    message = "checkpoints: expected a complete checkpoint, got step-00000010, step-00000020, all damaged; delete them"
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "run", resume=True)
    assert all(path.is_dir() for path in saved)


def test_a_failed_write_leaves_the_old_one(tmp_path):
    run = opened(tmp_path / "run")
    run.save(10, {"weights": tensors()}, {"try": 1})
    with pytest.raises(TypeError):
        run.save(10, {"weights": tensors(1)}, {"try": object()})
    assert checkpointing.newest_checkpoint(tmp_path / "run" / "checkpoints").state() == {"try": 1}
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000010"]


def test_leavings_of_a_killed_process(tmp_path):
    run = opened(tmp_path / "run")
    path = run.save(10, {"weights": tensors()}, {})
    run.close()
    path.rename(path.with_name(".step-00000010.old"))  # killed between the two renames
    (path.with_name(".step-00000010.partial")).mkdir()
    assert opened(tmp_path / "run", resume=True).step == 10
    assert [p.name for p in path.parent.iterdir()] == ["step-00000010"]


def test_metrics_go_on_from_the_checkpoint(tmp_path):
    run = opened(tmp_path / "run")
    for step in range(1, 6):
        run.log(step, {"loss": 1 / step, "off": float("nan")})
        if step == 3:
            run.save(3, {}, {})
    run.close()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    again = opened(tmp_path / "run", resume=True)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]
    again.log(4, {"loss": 0.25})
    again.close()
    assert lines(tmp_path / "run")[-2:] == [{"step": 3, "loss": 1 / 3}, {"step": 4, "loss": 0.25}]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_tensorboard_holds_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = opened(tmp_path / "run")
    run.log(1, {"loss": 0.5})
    run.log(2, {"loss": 0.25})
    run.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_a_directory_is_not_taken_twice(tmp_path):
    opened(tmp_path / "run").close()
    run = opened(tmp_path / "run")  # a run without a step may begin again
    run.log(1, {"loss": 1.0})
    run.close()
    with pytest.raises(UserError, match="holds a run already"):
        opened(tmp_path / "run")
    with pytest.raises(UserError, match=r"^optimiser\.lr: expected 0.0001, got 0.0002: a resumed run must not differ"):
        opened(tmp_path / "run", {**CONFIG, "optimiser": {"lr": 2e-4}}, resume=True)
    opened(tmp_path / "run", {**CONFIG, "output": {"keep": 9}}, resume=True).close()


def test_a_resumed_run_names_the_fields_that_differ_and_no_others(tmp_path):
    config = {**CONFIG, "data": {"sources": [{"source": "a.jsonl", "limit": None}, {"source": "b.jsonl", "limit": 3}]}}
    run = opened(tmp_path / "run", config)
    run.log(1, {"loss": 1.0})
    run.close()
    sources = [*config["data"]["sources"], {"source": "c.jsonl", "limit": None}]
    sources[1] = {"source": "b.jsonl", "limit": 4}
    changed = {**config, "data": {"sources": sources}}
    message = (
        r"^data\.sources\.1\.limit: expected 3, got 4; data\.sources\.2\.source: expected nothing, got c\.jsonl: a "
        r"resumed run must not differ from how the one in .*run began$"
    )
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "run", changed, resume=True)
    with pytest.raises(UserError, match=r"^stage: expected sft, got align: a resumed"):
        run_dir.RunDirectory(tmp_path / "run", {**changed, "stage": "align"}, resume=True)


@pytest.mark.parametrize(("stored", "kept"), [({}, False), ({"redraw": False}, False), ({"redraw": True}, True)])
def test_a_run_keeps_the_way_of_drawing_that_it_began_with(stored, kept, tmp_path):
    """One that began before ``data.redraw`` continues without it; the choice of a later one may not change."""
    run = opened(tmp_path / "run", {**CONFIG, "data": stored})
    run.log(1, {"loss": 1.0})
    run.close()
    resume = lambda value: opened(tmp_path / "run", {**CONFIG, "data": {"redraw": value}}, resume=True)  # noqa: E731
    if stored.get("redraw") is False:
        with pytest.raises(UserError, match=r"data\.redraw: expected False, got True"):
            resume(True)
        return
    for _ in range(2):
        run = resume(True)
        assert run.config["data"]["redraw"] is kept
        run.log(1, {"loss": 1.0})
        run.close()


@pytest.mark.parametrize("names", [("model/weights",), ("config.json",), ("checkpoints/step-1/x", "start/x")])
def test_a_directory_of_the_users_is_left_alone(names, tmp_path):
    """A run would overwrite config.json, and replace folders of these names."""
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"model_type": "dph"}')
    for resume in (False, True):
        with pytest.raises(UserError, match=r"expected a new directory or a run's, got one with .* that no run made"):
            opened(tmp_path, resume=resume)
    assert all((tmp_path / name).read_text() == '{"model_type": "dph"}' for name in names)


def test_only_leavings_of_runs_are_removed(tmp_path):
    run = opened(tmp_path)
    run.save(10, {}, {})
    run.close()
    foreign = [
        ".bashrc.old",
        ".photos.partial",
        ".step-00000001.old",
        "checkpoints/.model.old",
        "checkpoints/.x.partial",
    ]
    own = [".model.partial", ".start.partial", "checkpoints/.step-00000020.partial"]
    for name in foreign + own:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="holds a run already"):
        opened(tmp_path)
    assert all((tmp_path / name).exists() for name in foreign + own)  # nothing is touched before the check
    opened(tmp_path, resume=True).close()
    assert all((tmp_path / name).exists() for name in foreign)
    assert not any((tmp_path / name).exists() for name in own)


def test_a_second_process_is_kept_out_until_the_first_ends(tmp_path):
    code = (
        "import sys, time; from dph.train import run_dir; run = run_dir.RunDirectory(sys.argv[1], {'stage': 'sft'});"
        "print('ready', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match="another process trains there"):
            run_dir.RunDirectory(tmp_path / "run", {"stage": "sft"}, resume=True)
    finally:
        other.kill()
        other.communicate()
    run_dir.RunDirectory(tmp_path / "run", {"stage": "sft"}, resume=True).close()


def test_resume_without_a_run_begins_one(tmp_path):
    run = opened(tmp_path / "run", resume=True)
    assert (run.checkpoint, run.step) == (None, 0)


def test_start_weights(tmp_path):
    run = opened(tmp_path / "run")
    run.save_start(tensors())
    assert torch.equal(run.load_start()["a"], tensors()["a"])
    (tmp_path / "run" / "start" / "start.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"start\.safetensors is damaged"):
        run.load_start()


def test_generators_come_back():
    random.seed(1)
    random.gauss(0, 1)  # leaves half a pair behind
    saved = checkpointing.random_states()
    saved = saved[0], json.loads(json.dumps(saved[1]))
    draw = lambda: (torch.rand(3).tolist(), random.gauss(0, 1), np.random.rand(), np.random.randn())  # noqa: E731
    first = draw()
    draw()
    checkpointing.set_random_states(*saved)
    assert draw() == first


def test_what_is_written_can_be_read_by_whom_the_umask_lets(tmp_path):
    """As every other file; safetensors' are the owner's alone."""
    before = os.umask(0o027)
    try:
        with atomic.atomic_directory(tmp_path / "made") as folder:
            checkpointing.write_tensors(folder / "a.safetensors", {"x": torch.ones(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "made" / "a.safetensors").stat().st_mode & 0o777 == 0o640
