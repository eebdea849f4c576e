"""Runs of an earlier version of dph, interrupted after step 4 of 6, resume to that version's metrics.

``interrupted_runs/NAME-metrics.jsonl`` holds the metrics of that version's undisturbed run.
"""

import json
import shutil
from pathlib import Path

import pytest

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
