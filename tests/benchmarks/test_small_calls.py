"""The table of small calls: every operator's results equal eager PyTorch's, and a ratio below the goal is an error."""

import json

import pytest
import torch

from benchmarks import small_calls
from benchmarks.small_calls import Problem, Sizes

SIZES = Sizes(64, 96, 130)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", small_calls.OPERATORS)
def test_both_compute_the_same(name, rows):
    problem = small_calls.OPERATORS[name](rows, SIZES)
    with torch.no_grad():
        small_calls.check(problem, [])
    if problem.leaves:
        results = small_calls.step(problem.eager, problem, [])
        upstream = [torch.randn_like(x) for x in results[: problem.differentiable]]
        small_calls.check(problem, upstream)


def test_another_result_is_an_error():
    x = torch.randn(3)
    with pytest.raises(AssertionError, match=r"off by 1\.00e"):
        small_calls.check(Problem(lambda: x + 1, lambda: x), [])


def test_table_and_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(small_calls, "TURN", 1e-6)
    figures, table = tmp_path / "small.json", tmp_path / "small.md"
    arguments = ["swiglu, bias", "laprop", "--rows", "1", "3", "--threads", "1", "--columns", "256"]
    arguments += ["--seconds", "0.001"]
    outputs = ["--json", str(figures), "--output", str(table)]
    monkeypatch.setattr(small_calls, "GOAL", 0.0)
    assert small_calls.main([*arguments, *outputs]) == 0
    monkeypatch.setattr(small_calls, "GOAL", 1e9)
    assert small_calls.main(arguments) == 1
    content = json.loads(figures.read_text())
    assert {"device", "torch", "python"} == content["machine_info"].keys()
    found = [(x["operator"], x["direction"], x["rows"]) for x in content["figures"]]
    both = [("swiglu, bias", direction, rows) for direction in ("forward", "forward + backward") for rows in (1, 3)]
    assert found == [*both, ("laprop", "forward", 1), ("laprop", "forward", 3)]
    assert all(x["ratio"] > 0 for x in content["figures"])
    lines = [line for line in table.read_text().splitlines() if line.startswith("| ")]
    assert lines[0] == "| operator | C | passes | threads | 1 | 3 |"
    assert len(lines) == 2 + 3
    assert lines[2].startswith("| swiglu, bias | 256 | forward | 1 | ")
    assert "swiglu" in capsys.readouterr().out


def test_an_unknown_operator_is_refused(capsys):
    with pytest.raises(SystemExit):
        small_calls.main(["no_such_operator"])
    assert "expected the begin of one of residual_norm" in capsys.readouterr().err
