"""Figures show what they claim: the objectives' landscapes and optima, and the curves of runs."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from dph import losses
from dph.cli.figures import OBJECTIVES, curves, group, landscape, read_metrics
from dph.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.4])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_landscapes_are_the_training_objectives(name, epsilon):
    ticks = [-6.0, -3.5, -1.0, 0.0, 0.5, 2.0, 6.0]
    for chosen, rejected in [*itertools.product(ticks, ticks), (50.0, -50.0), (-1e4, 1e4)]:
        want = losses.dph_loss(torch.tensor([chosen]), torch.tensor([rejected]), epsilon, name).item()
        got = OBJECTIVES[name](np.array(chosen), np.array(rejected), epsilon)
        assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_the_marked_optima_are_the_least_losses(epsilon):
    separable, contrastive = landscape([epsilon]).axes[:2]  # the colour bars' axes come behind
    ticks = np.linspace(-5, 5, 401)
    chosen, rejected = np.meshgrid(ticks, ticks)
    ((x,), (y,)) = separable.lines[0].get_data()
    least = np.unravel_index(np.argmin(OBJECTIVES["separable"](chosen, rejected, epsilon)), chosen.shape)
    assert (x, y) == pytest.approx((chosen[least], rejected[least]), abs=0.025)
    margins = np.subtract(*contrastive.lines[0].get_data())
    best = ticks[np.argmin(OBJECTIVES["contrastive"](ticks, 0.0, epsilon))]
    assert margins == pytest.approx(np.full(len(margins), best), abs=0.025)
    assert "r_w" in separable.get_xlabel()
    assert "r_l" in separable.get_ylabel()


def test_landscape_is_drawn(tmp_path):
    figure = landscape([0.1, 0.25])
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [f"{name}, ε = {e}" for e in (0.1, 0.25) for name in ("separable", "contrastive")]
    figure.savefig(tmp_path / "landscape.png")
    assert (tmp_path / "landscape.png").read_bytes().startswith(PNG)
    for epsilon in (0.0, 0.5, -1.0, math.nan):
        with pytest.raises(UserError, match=r"expected 0 < epsilon < 0\.5"):
            landscape([epsilon])


def write(directory, lines):
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_curves_of_several_runs(tmp_path):
    align = write(
        tmp_path / "align",
        [
            {"step": 10, "loss": 2.0, "dph_loss": 1.5, "reward_accuracy": 0.5, "lr": 1e-5, "grad_norm": 9.0},
            {"step": 20, "loss": 1.0, "reward_accuracy": 0.75, "lr": 2e-5, "eval/loss": 1.25},
        ],
    )
    sft = write(tmp_path / "sft", [{"step": 5, "loss": 3.0, "lr": 1e-4}])
    assert read_metrics(align)["loss"] == ([10, 20], [2.0, 1.0])
    assert read_metrics(align)["eval/loss"] == ([20], [1.25])
    figure = curves([align, sft])
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["losses", "accuracies", "learning rate"]
    drawn = {line.get_label(): [list(part) for part in line.get_data()] for line in panels["losses"].lines}
    assert set(drawn) == {f"{name}, {align}" for name in ("loss", "dph_loss", "eval/loss")} | {f"loss, {sft}"}
    assert drawn[f"loss, {align}"] == [[10, 20], [2.0, 1.0]]
    assert drawn[f"loss, {sft}"] == [[5], [3.0]]
    for axes in panels.values():
        assert axes.get_xlabel() == "step"
        assert axes.get_ylabel()
        assert axes.get_legend() is not None
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_one_run_is_not_named_in_the_legend(tmp_path):
    (axes,) = curves([write(tmp_path / "run", [{"step": 1, "loss": 2.0}])]).axes
    assert [line.get_label() for line in axes.lines] == ["loss"]


def test_panels():
    names = ["dpo_loss", "eval/rte/reward_accuracy", "implicit_accuracy", "reward_margin", "lr", "seconds", "loss"]
    names += ["entropy", "eval/token_accuracy"]
    assert group(names) == [
        ["dpo_loss", "loss", "entropy"],
        ["eval/rte/reward_accuracy", "implicit_accuracy", "eval/token_accuracy"],
        ["reward_margin"],
        ["lr"],
    ]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"expected a run, got a folder without metrics.jsonl there"):
        curves([tmp_path])
    with pytest.raises(UserError, match=r"nowhere: expected a run, got nothing there"):
        curves([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"metrics.jsonl:2: expected a step"):
        curves([write(tmp_path / "a", [{"step": 1, "loss": 2.0}, {"loss": 1.0}])])
    with pytest.raises(UserError, match="expected losses, accuracies or learning rates"):
        curves([write(tmp_path / "b", [{"step": 1, "seconds": 2.0}])])
