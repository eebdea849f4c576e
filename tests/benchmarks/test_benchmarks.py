"""What the benchmarks count and compare: necessary work, plans that give the layout's result, the table."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.attention import dense

from benchmarks import attention, attention_rivals, conftest, report
from benchmarks.attention_rivals import Plan

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    attention.documents("equal", [7, 7], 2),
    attention.documents("unequal", [5, 9, 1], 2),
    attention.memory("memory", 2, 5, 3, 2),
    attention.branches("branches", [4, 6], [[3, 1], [2, 5]], 2, pad=12),
    attention.decode("decode", 6, [2, 1, 4], 2, fresh=0),
]


@pytest.mark.parametrize("work", SMALL, ids=lambda work: work.name)
def test_necessary_work_is_counted_from_who_sees_whom(work):
    seen = work.layout.visible()
    products = 2 * seen.sum() + 5 * seen.sum() - 2 * seen[:, : work.layout.memory].sum()
    assert work.flops("forward") == 2 * 64 * 2 * 2 * seen.sum()
    assert work.flops("both") == 2 * 64 * 2 * products
    queries, keys, used = work.layout.queries, work.layout.keys, seen.any(0).sum()
    assert work.bytes_moved("forward", 2) == 2 * 64 * 2 * (2 * queries + 2 * used)
    assert work.bytes_moved("both", 2) == 2 * 64 * 2 * (6 * queries + 4 * used + 2 * keys)


@pytest.mark.parametrize("make", [attention_rivals.eager, attention_rivals.sdpa])
@pytest.mark.parametrize(("work", "name"), [(work, name) for work in SMALL for name in work.plans])
def test_every_plan_computes_its_layout(work, name, make, monkeypatch):
    monkeypatch.setattr(attention_rivals, "compiled_rotation", lambda device: attention_rivals.rotate)
    layout = work.layout
    sizes = (layout.queries, layout.keys, layout.keys, layout.memory, layout.memory)
    q, k, v, *memory = (torch.randn(n, 2, 64) for n in sizes)
    plan = Plan.from_batches(work.plans[name], layout)
    got = make(plan)(plan.lay_out(q, k, v, tuple(memory), torch.zeros_like(q)))
    expected = dense(q, k, v, layout, memory=memory, rope=attention_rivals.ROPE)
    real = plan.rows >= 0
    torch.testing.assert_close(got[real], expected[plan.rows[real]], rtol=1e-5, atol=1e-5)


def test_copies_of_a_query_share_its_gradient():
    work = SMALL[3]
    plan = Plan.from_batches(work.plans["padded"], work.layout)
    grad = torch.randn(work.layout.queries, 2, 64)
    laid = plan.lay_out(grad, grad, grad, (grad[:0], grad[:0]), grad).grad
    real = plan.rows >= 0
    total = torch.zeros_like(grad).index_add_(0, plan.rows[real], laid[real])
    torch.testing.assert_close(total, grad)
    assert not laid[~real].any()


def results(source=("", "")):
    shared = {"operator": "attention", "rival": True, "flops": 3e9, "limit": 2e11}
    benches = [
        (0.09, {"who": "slow", "kind": "padded"}),
        (0.03, {"who": "fast"}),
        (0.02, {"who": "mine", "rival": False, "target": {"padded": 4}}),
    ]
    return [report.Result.from_record({**shared, **info, "quantiles": (s, s)}, s, source) for s, info in benches]


def test_the_table_ranks_and_compares():
    headers, rows = report.cells(results())
    assert headers == ["operator", "by", "ms", "20% - 80%", "rate", "of the limit", "speed of ours"]
    assert [row[1] for row in rows] == ["mine", "fast", "slow"]
    assert rows[0][-3:] == ["150 GFLOP/s", "75% of 200", "1.50× best rival, 4.50× padded (goal 4×)"]
    assert [row[-1] for row in rows[1:]] == ["1.50×", "4.50×"]


def test_files_are_compared_each_for_itself():
    table = report.markdown(results(("a", "x")) + results(("b", "x"))).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0][:4] == ["file", "operator", "by", "ms"]
    assert rows[1][:4] == ["---", "---", "---", "---:"]
    assert [row[0] for row in rows[2:]] == ["a"] * 3 + ["b"] * 3
    assert [row[-1] for row in rows[3:5]] == [row[-1] for row in rows[6:8]] == ["1.50×", "4.50×"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The JSON of a real run of one small benchmark."""
    file = tmp_path_factory.mktemp("measured") / "laptop.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "benchmarks/bench_preference_loss.py",
        "-k",
        "64-1 and not compiled",
    ]
    command += ["--benchmark-only", f"--benchmark-json={file}", "-p", "no:cacheprovider"]
    # Within a worker of pytest-xdist nothing would be timed.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    return file, done.stdout


def test_a_run_becomes_a_table_and_pictures(measured, tmp_path, capsys):
    file, said = measured
    assert report.main([str(file), "--output", str(tmp_path)]) == 0
    table = capsys.readouterr().out.strip()
    written = (tmp_path / "report.md").read_text()
    assert table in written
    assert "preference_loss, 64 pairs" in table
    assert "eager" in table
    assert "preference_loss, 64 pairs" in said  # the run's own table
    assert "![preference_loss, " in written
    assert (tmp_path / "laptop-preference_loss.png").read_bytes().startswith(b"\x89PNG")
    machine = json.loads(file.read_text())["machine_info"]
    assert {"device", "python", "torch"} <= machine.keys()
    assert platform.node() not in json.dumps(machine)


def test_files_of_one_name_are_told_apart(measured, tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.json").write_bytes(measured[0].read_bytes())
    files = [str(tmp_path / folder / "run.json") for folder in ("a", "b")]
    assert report.main([*files, "--output", str(tmp_path / "out")]) == 0
    assert {line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:] if line} == {
        "a/run",
        "b/run",
    }
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_goals_of_memory():
    def result(who, peak, **more):
        return report.Result("a", who, 1.0, (1.0, 1.0), flops=1.0, peak=peak, **more)

    rows = [result("ours", 2e6, memory_target={"dense": 20}), result("dense", 1e8, rival=True)]
    assert report.cells(rows)[1][0][-1] == "1.00× best rival, 1/50 of dense's memory (goal 1/20)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("no JSON", "expected JSON that pytest --benchmark-json wrote"),
        ("[]", "expected JSON that pytest --benchmark-json wrote"),
        ('{"benchmarks": [], "machine_info": {}}', "expected benchmarks of this project, got 0 others"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, capsys, content, message):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    assert report.main([str(file)]) == 2
    assert f"{file}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()


def test_quantiles_of_times():
    assert conftest._quantiles([1, 2, 3, 4, 5, 6]) == (2, 5)
    assert conftest._quantiles([7]) == (7, 7)
