"""Runs of an earlier version of dph, interrupted after step 4 of 6, resume to that version's metrics.

``interrupted_runs/NAME-metrics.jsonl`` holds the metrics of that version's undisturbed run; the last evaluation of sft
is this version's, which computes each document alone.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dph.train import run_dir

RUNS = Path(__file__).parent / "interrupted_runs"
NAMES = ("sft", "align", "head")


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A copy of the runs, as the current directory."""
    shutil.copytree(RUNS, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics(path):
    """Lines of a metrics.jsonl file after step 4, without the metrics of the machine."""
    lines = []
    for line in path.read_text().splitlines():
        values = json.loads(line)
        if values["step"] > 4:
            lines.append({key: value for key, value in values.items() if key not in run_dir.MACHINE_METRICS})
    return lines


def cache_files(folder):
    return {path: path.stat().st_size for path in (folder / "trained" / "cache").rglob("*.safetensors")}


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_resumes_to_the_metrics_of_the_undisturbed_one(name, interrupted, dph_command):
    directory, caches = interrupted / "trained" / name, cache_files(interrupted)
    assert len(caches) == 4
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["step-00000004"]
    code, out, err = dph_command("train", f"{name}.yaml", "--resume")
    assert code == 0, err
    assert out == ""
    expected, resumed = metrics(interrupted / f"{name}-metrics.jsonl"), metrics(directory / "metrics.jsonl")
    assert {line["step"] for line in expected} == {5, 6}
    assert len(resumed) == len(expected)
    for line, want in zip(resumed, expected, strict=True):
        assert line.keys() == want.keys()
        assert line == pytest.approx(want, rel=1e-4)
    assert (directory / "model" / "model.safetensors").is_file()
    assert cache_files(interrupted) == caches, "a cached output was computed again"


def change_tensors(folder, part, change):
    """Change the tensors of one file, and its size and hash in the manifest."""
    file = folder / f"{part}.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    content = file.read_bytes()
    manifest["files"][file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


WEIGHT, HEAD = "backbone.blocks.0.ffn.fc1.weight", "heads.shared.pooler.0.bias"
OTHER_TENSORS = {
    "missing": ("weights", lambda t: t.pop(WEIGHT), f"1 missing (the first is {WEIGHT})"),
    "unexpected": ("weights", lambda t: t.update(x=t[WEIGHT].clone()), "1 not of this model (the first is x)"),
    "shape": ("weights", lambda t: t.update({WEIGHT: torch.zeros(1)}), f"of another shape (the first is {WEIGHT}: [1]"),
    "integers": (
        "weights",
        lambda t: t.update({WEIGHT: t[WEIGHT].long()}),
        f"another type (the first is {WEIGHT}: int",
    ),
    "start": ("start", lambda t: t.pop(HEAD), f"1 missing (the first is {HEAD})"),
    "moment": ("optimiser", lambda t: t.pop(f"{WEIGHT}/exp_avg"), f"1 missing (the first is {WEIGHT}/exp_avg)"),
}


@pytest.mark.parametrize("kind", OTHER_TENSORS)
def test_a_checkpoint_with_other_tensors_is_refused(kind, interrupted, refused):
    """Although its manifest is right: neither a resume nor a conversion takes a weight from elsewhere."""
    part, change, text = OTHER_TENSORS[kind]
    run = interrupted / "trained" / "sft"
    checkpoint = run / "checkpoints" / "step-00000004"
    change_tensors(run / "start" if part == "start" else checkpoint, part, change)
    line = refused("train", "sft.yaml", "--resume")
    assert f"{part}.safetensors: expected the model's" in line
    assert text in line
    if part != "optimiser":
        line = refused("convert", checkpoint, interrupted / "converted", "--to", "own")
        assert f"{part}.safetensors" in line
        assert text in line
    assert not (interrupted / "converted").exists()
