"""The check on a GPU: a dry run on the CPU writes its table, a failing step is shown, tests follow what changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check

ROOT = Path(__file__).resolve().parents[2]


def run(folder, *options):
    """Exit status of the script, and its output."""
    # Within a worker of pytest-xdist nothing would be timed.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh"), "--python", sys.executable, *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**alone, "OUT": str(folder)})
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs the program timeout of GNU coreutils")
def test_a_dry_run_is_green(tmp_path):
    code, output = run(tmp_path, "--dry-run")
    assert code == 0, output + (tmp_path / "check.log").read_text()
    content = json.loads((tmp_path / "check.json").read_text())
    names = ["build", "tests", "attention", "train_step", "family", "best_of_n"]
    assert [step["name"] for step in content["steps"]] == names
    assert {step["status"] for step in content["steps"]} <= {"passed", "nothing to run"}
    ours = {result["operator"] for result in content["results"] if not result["rival"]}
    for start in ("dense", "4 pairs", "sft", "align", "prefill", "step of stage align", "step of stage sft", "3 c"):
        assert any(name.startswith(start) for name in ours), start
    table = (tmp_path / "check.md").read_text()
    assert "| step | status | s | of at most | last line |" in table
    assert "| family | prefill of 2048 tokens" in table
    assert table in output
    assert len(list(tmp_path.iterdir())) == 7


@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs the program timeout of GNU coreutils")
def test_a_failing_step_is_in_the_table_and_in_the_status(tmp_path):
    code, output = run(tmp_path, "--dry-run", "--only", "tests", "--since", "no-such-revision")
    content = json.loads((tmp_path / "check.json").read_text())
    if not gpu_check.is_repository():
        pytest.skip("this tree is no repository: all tests are run, whatever the revision")
    assert (code, content["steps"][0]["status"], content["results"]) == (1, "failed", [])
    assert "--since: expected a revision of this repository, got no-such-revision" in output
    assert "| tests | failed |" in (tmp_path / "check.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quick"], "expected an option of --help, got --quick"),
        (["--only", "tea"], "--only: expected build, tests, attention, train_step, family or best_of_n, got tea"),
        (["--since"], "--since: expected a value, got none"),
    ],
)
def test_wrong_options_are_refused(options, message, tmp_path):
    code, output = run(tmp_path, *options)
    assert (code, output) == (2, f"gpu_check.sh: {message}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "some", "others"),
    [
        ("dph_kernels/swiglu/triton.py", "tests/kernels/test_swiglu.py", "tests/kernels/test_laprop.py"),
        ("csrc/attention.h", "tests/kernels/test_rope_attention.py", "tests/kernels/test_laprop.py"),
        ("csrc/cuda/laprop.cu", "tests/kernels/test_laprop_norm.py", "tests/kernels/test_layout.py"),
        ("csrc/cuda/runtime.cu", "tests/kernels/test_layout.py", "tests/test_optim.py"),
        ("dph_kernels/launcher.py", "tests/kernels/test_swiglu.py", "tests/test_optim.py"),
        ("dph/model/fused_block.py", "tests/model/test_fused_block.py", "tests/train/test_trainer.py"),
        ("dph/optim.py", "tests/test_optim.py", "tests/test_losses.py"),
        ("dph/chat/templates.py", "tests/test_chat_templates.py", "tests/test_losses.py"),
        ("tests/train/test_trainer.py", "tests/train/test_trainer.py", "tests/train/test_compile.py"),
        ("tests/kernels/conftest.py", "tests/kernels/test_swiglu.py", "tests/test_optim.py"),
    ],
)
def test_tests_follow_what_changed(changed, some, others):
    files = gpu_check.map_to_tests([changed])
    assert some in files
    assert others not in files
    assert all((ROOT / name).is_file() for name in files)


def test_common_files_concern_every_test_and_others_none():
    assert gpu_check.map_to_tests(["dph/optim.py", "tests/helpers/numerics.py"]) == ["tests"]
    assert gpu_check.map_to_tests(["README.md", "csrc/cpu/laprop.cpp", "benchmarks/report.py"]) == []
    assert gpu_check.map_to_tests(["tests/test_gone.py"]) == []


def test_a_tree_without_git_runs_all_tests(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    assert gpu_check.tests_since(None) == gpu_check.tests_since("HEAD") == ["tests"]


def test_steps_are_read_with_their_status(tmp_path):
    file = tmp_path / "steps"
    lines = ["build\t0\t3\t90\tbuilt", "tests\t124\t150\t150\t", "family\t1\t2\t9\ta | b", "tests\t5\t1\t2\tx"]
    file.write_text("\n".join(lines) + "\n")
    (tmp_path / "check.log").write_text("SKIPPED [3] benchmarks/bench_x.py:7: no y\nSKIPPED [1] tests/test_z.py: no\n")
    steps = gpu_check.read_steps(file)
    assert [step.status for step in steps] == ["passed", "out of time", "failed", "nothing to run"]
    text = gpu_check.summarise(tmp_path, steps, None)
    assert "| family | failed | 2 | 9 | a / b |" in text
    assert text.endswith("Left out:\n\n- bench_x.py:7: no y\n")
    assert json.loads((tmp_path / "check.json").read_text())["steps"][1]["limit"] == 150
