"""Picture of a head card: reliability, rewards, accuracy by length, and the right answers among N candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that the colour-blind can tell apart (Okabe and Ito 2008); markers and lines tell them apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
CURVES = ("random", "log-probability (mean)", "reward", "oracle")  # rules that are drawn, besides votes by reward


def figure(card: Mapping[str, Any], rewards: np.ndarray, is_good: np.ndarray) -> Figure:
    """Draw a card; ``rewards`` [A] and ``is_good`` [A] are those of its answers."""
    from matplotlib.figure import Figure

    panels = [_rewards]
    if card["calibration"] is not None:
        panels.insert(0, _reliability)
    if card["length"]["bins"]:
        panels.append(_length)
    names = list(card["candidates"])
    count = len(panels) + len(names)
    rows = -(-count // 2)
    drawn = Figure(figsize=(11, 4.2 * rows), layout="constrained")
    grid = drawn.subplots(rows, 2, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes, card, rewards, is_good)
    for axes, name in zip(grid[len(panels) :], names, strict=False):
        _candidates(axes, name, card["candidates"][name])
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        axes.grid(alpha=0.3)
    drawn.suptitle(f"Reward head {card['head']}")
    return drawn


def _reliability(axes: Axes, card: Mapping[str, Any], *_: np.ndarray) -> None:
    axes.plot([0, 1], [0, 1], color="#000000", linewidth=0.8, label="perfect")
    for i, name in enumerate(("before", "after")):
        errors = card["calibration"][name]
        x, y, spread = _points([(point["probability"], point["good"]) for point in errors["bins"]])
        label = f"{name} calibration, error {errors['ece']:.3f}"
        axes.errorbar(
            x, y, spread, fmt=f"{MARKERS[i]}{LINES[i]}", color=COLOURS[i], label=label, capsize=2, markersize=4
        )
    axes.set(title="reliability", xlabel="probability", ylabel="share of good answers", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize="small", loc="upper left")


def _rewards(axes: Axes, card: Mapping[str, Any], rewards: np.ndarray, is_good: np.ndarray) -> None:
    edges = np.histogram_bin_edges(rewards, bins=30)
    for i, (name, own) in enumerate((("good", is_good), ("bad", ~is_good))):
        if own.any():
            options = {"color": COLOURS[i], "linestyle": LINES[i], "linewidth": 1.6}
            axes.hist(rewards[own], edges, histtype="step", density=True, label=f"{name} answers", **options)
    axes.set(title="rewards", xlabel="reward", ylabel="density")
    axes.legend(fontsize="small")


def _length(axes: Axes, card: Mapping[str, Any], *_: np.ndarray) -> None:
    bins = card["length"]["bins"]
    _, y, spread = _points([(0, one["accuracy"]) for one in bins])
    axes.errorbar(range(len(bins)), y, spread, fmt="o-", color=COLOURS[0], capsize=2, markersize=4)
    labels = [f"{one['shortest']:+d} to {one['longest']:+d}\n{one['n']} pairs" for one in bins]
    axes.set_xticks(range(len(bins)), labels, fontsize="small")
    axes.axhline(0.5, color="#000000", linewidth=0.8)
    axes.set(
        title="accuracy by length", xlabel="better answer longer by, in tokens", ylabel="pair accuracy", ylim=(0, 1)
    )


def _candidates(axes: Axes, name: str, curves: Sequence[Mapping[str, Any]]) -> None:
    kept = [curve for curve in curves if curve["rule"] in CURVES or curve["rule"].startswith("vote by")]
    for i, curve in enumerate(kept):
        _, y, spread = _points([(0, right) for right in curve["right"]])
        style = f"{MARKERS[i % len(MARKERS)]}{LINES[i % len(LINES)]}"
        options = {"color": COLOURS[i % len(COLOURS)], "label": curve["rule"], "capsize": 2, "markersize": 4}
        axes.errorbar(curve["ns"], y, spread, fmt=style, **options)
    axes.set_xscale("log", base=2)
    axes.set_xticks(kept[0]["ns"], kept[0]["ns"])
    axes.set(title=f"best of N: {name}", xlabel="candidates N", ylabel="share of right answers", ylim=(0, 1))
    axes.legend(fontsize="small")


def _points(rows: Sequence[tuple[float, Mapping[str, float]]]) -> tuple[list[float], list[float], np.ndarray]:
    """Return x, y and the lengths of the error bars below and above."""
    x, y = [x for x, _ in rows], [figure["value"] for _, figure in rows]
    spread = [[figure["value"] - figure["low"], figure["high"] - figure["value"]] for _, figure in rows]
    return x, y, np.maximum(np.array(spread).T, 0.0)
