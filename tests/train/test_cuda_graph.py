"""The step of stage head as a CUDA graph: the same weights and figures, whatever else happens in a run."""

import math
from typing import NamedTuple

import pytest
import torch
from helpers.stages import Killed, Trap, die, figures, go, records, same, settings, taken, tiny
from helpers.tape import Tape

from dph.errors import UserError
from dph.model.heads import RewardHead
from dph.train import build, cuda_graph, recipe
from dph.train.cuda_graph import WARMUP_CALLS, GraphedFunction, GraphRecorder
from dph.train.stages.preference import PreferenceStage

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


class Inputs(NamedTuple):
    """Inputs of a function under test."""

    x: torch.Tensor
    y: torch.Tensor | None = None


@pytest.fixture
def tapes(monkeypatch):
    """Recordings of runs on the CPU, which are tapes."""
    made = []

    def make(device):
        if device.type == "cuda":
            return GraphRecorder(device)
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(cuda_graph, "GraphRecorder", make)
    monkeypatch.setattr(cuda_graph, "require", lambda device, processes: None)
    return made


def head(directory, graph=True, **changes):
    return settings("head", directory, cuda_graph=graph, data__cache=str(directory.parent / "cache"), **changes)


def run(recipe, *arguments, **options):
    return go(recipe, *arguments, model=build.with_heads(tiny(reward_dropout=0.3), recipe.objective), **options)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__cache_states": False, "batch__micro": 2},
        {"batch__tokens": 90, "guard__spike": 3.0},
        {"objective__pooler": "swiglu_t5", "objective__heads": ["default", "other"], "objective__dropout": 0.3},
        {"objective__pooler": "bert", "objective__objective": "contrastive"},
    ],
)
def test_the_same_as_without(changes, precision, device, tmp_path, tapes):
    changes = {**changes, "precision": precision, "device": device, "optimiser__steps": 12, "output__log_every": 1}
    plain, replayed = (run(head(tmp_path / str(graph), graph, **changes)) for graph in (False, True))
    same(plain, replayed)
    assert figures(tmp_path / "False") == figures(tmp_path / "True")
    for tape in tapes:
        assert (tape.side_streams, tape.replays) == (WARMUP_CALLS, 12 - WARMUP_CALLS)
    assert len(tapes) == (device == "cpu")


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_resumed_run_is_recorded_anew_or_not(device, tmp_path, tapes):
    whole = run(head(tmp_path / "whole", False, device=device, optimiser__steps=11))
    asked = head(tmp_path / "parts", device=device, optimiser__steps=11)
    with pytest.raises(Killed):
        run(asked, Trap(records("head"), taken(asked, 6), die))
    asked = head(tmp_path / "parts", device=device, optimiser__steps=11, output__save_every=1)
    with pytest.raises(Killed):
        run(asked, Trap(records("head"), 22, die), resume=True)  # in step 9
    same(whole, run(head(tmp_path / "parts", False, device=device, optimiser__steps=11), resume=True))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("step", [WARMUP_CALLS, WARMUP_CALLS + 1, WARMUP_CALLS + 3])
def test_a_step_that_is_not_finite_is_skipped_and_told(step, device, tmp_path, tapes, monkeypatch, capsys):
    """Its states are not: the guard and the explanation read what that step has computed, not the next one."""
    original = PreferenceStage.prepare

    def spoilt(self, part, at):
        inputs = original(self, part, at)
        if at == step:
            inputs.frozen_outputs[5] = math.nan
        return inputs

    monkeypatch.setattr(PreferenceStage, "prepare", spoilt)
    changes = {"device": device, "optimiser__steps": 9, "output__log_every": 1}
    plain, replayed = (run(head(tmp_path / str(g), g, **changes), quiet=False) for g in (False, True))
    same(plain, replayed)
    assert figures(tmp_path / "False") == figures(tmp_path / "True")
    said = [line for line in capsys.readouterr().err.splitlines() if "was skipped" in line]
    assert len(said) == 2
    assert all(f"step {step} was skipped" in line and "for pair 2 of the batch" in line for line in said)


def test_what_is_not_like_what_was_recorded_is_refused():
    double = GraphedFunction(lambda inputs: inputs.x * 2, Tape())
    for value in range(6):
        assert double(Inputs(torch.full((3,), float(value)))).tolist() == [2.0 * value] * 3
    with pytest.raises(ValueError, match=r"^x: expected \(\[3\], torch.float32\) as it was recorded, got \(\[4\]"):
        double(Inputs(torch.zeros(4)))
    with pytest.raises(ValueError, match=r"^x: expected .*, got \(\[3\], torch.float64\)"):
        double(Inputs(torch.zeros(3, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"^y: expected None as it was recorded, got"):
        double(Inputs(torch.zeros(3), torch.zeros(3)))


def test_a_tape_keeps_the_host_s_numbers():
    """What the tests above rest on: a seed that changes on the host would be the same in every replay."""
    head, inputs, seeds = (
        RewardHead(["a"], "bert", 8, 8, dropout=0.5).train(),
        Inputs(torch.randn(4, 8)),
        iter(range(99)),
    )
    drop = GraphedFunction(lambda inputs: head(inputs.x, next(seeds))["a"].detach().clone(), Tape())
    found = [drop(inputs).clone() for _ in range(WARMUP_CALLS + 3)]
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[-1], found[-2])


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x * float(x.sum()),
        lambda x: x * x.tolist()[0],
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x * torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x if torch.equal(x, x) else -x,
    ],
)
def test_a_tape_refuses_what_waits(wait):
    waits = GraphedFunction(lambda inputs: wait(inputs.x), Tape())
    for _ in range(WARMUP_CALLS):
        waits(Inputs(torch.ones(3)))
    with pytest.raises(AssertionError, match="waits for the device"):
        waits(Inputs(torch.ones(3)))


def test_what_cannot_be_recorded_is_said(tmp_path):
    with pytest.raises(UserError, match="cuda_graph: expected false in stage align, whose steps differ in shape, got"):
        recipe.load("align", ["cuda_graph=true"])
    with pytest.raises(UserError, match="cuda_graph: expected one process on a GPU, got 1 on cpu"):
        run(head(tmp_path / "run"))
    with pytest.raises(UserError, match="cuda_graph: expected one process on a GPU, got 2 on cuda"):
        cuda_graph.require(torch.device("cuda"), 2)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="cuda_graph: expected the CUDA kernels of laprop, got none: "):
            cuda_graph.require(torch.device("cuda"), 1)
