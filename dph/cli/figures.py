"""Figures of ``dph plot``: the paper's loss landscapes (figure 1), and the curves of training runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dph.data.json_lines import JsonLines
from dph.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIMIT = 6.0  # of the rewards on the landscapes' axes


def check_suffix(path: str | Path) -> None:
    """Raise UserError if matplotlib cannot write files with the suffix of ``path``."""
    suffix = Path(path).suffix[1:].lower()
    if suffix in ("png", "pdf", "svg"):  # no need to import matplotlib
        return
    from matplotlib.backend_bases import FigureCanvasBase

    supported = FigureCanvasBase.get_supported_filetypes()
    if suffix not in supported:
        raise UserError(f"--output: expected a file that ends in .{', .'.join(sorted(supported))}, got {path}")


# Loss landscapes


def separable(chosen: np.ndarray, rejected: np.ndarray, epsilon: float) -> np.ndarray:
    """Return the separable loss of every pair of rewards; ``dph.losses.dph_loss`` gives its mean."""
    return (
        (1 - epsilon) * _softplus(-chosen)
        + epsilon * _softplus(chosen)
        + epsilon * _softplus(-rejected)
        + (1 - epsilon) * _softplus(rejected)
    )


def contrastive(chosen: np.ndarray, rejected: np.ndarray, epsilon: float) -> np.ndarray:
    """Return the contrastive loss of every pair of rewards."""
    margin = chosen - rejected
    return (1 - epsilon) * _softplus(-margin) + epsilon * _softplus(margin)


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


OBJECTIVES = {"separable": separable, "contrastive": contrastive}


def landscape(epsilons: Sequence[float] = (0.1,)) -> Figure:
    """Draw both objectives over (r_w, r_l), one row per epsilon, and mark their minima (theorems 1 and 2)."""
    for epsilon in epsilons:
        if not 0 < epsilon < 0.5:
            raise UserError(f"epsilon: expected 0 < epsilon < 0.5 (at 0 the optimum is at infinity), got {epsilon}")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.5 * len(epsilons)), layout="constrained")
    grid = figure.subplots(len(epsilons), len(OBJECTIVES), squeeze=False)
    for row, epsilon in zip(grid, epsilons, strict=True):
        for axes, name in zip(row, OBJECTIVES, strict=True):
            _draw_landscape(figure, axes, name, epsilon)
    return figure


def _draw_landscape(figure: Figure, axes: Axes, name: str, epsilon: float) -> None:
    optimum = math.log((1 - epsilon) / epsilon)
    limit = max(LIMIT, 1.25 * optimum)
    ticks = np.linspace(-limit, limit, 201)
    chosen, rejected = np.meshgrid(ticks, ticks)
    loss = OBJECTIVES[name](chosen, rejected, epsilon)
    contours = axes.contourf(chosen, rejected, loss, levels=40, cmap="viridis")
    axes.contour(chosen, rejected, loss, levels=12, colors="white", linewidths=0.4, alpha=0.6)
    figure.colorbar(contours, ax=axes, label="loss (nats)")
    if name == "separable":
        label = f"optimum ({optimum:.2f}, {-optimum:.2f})"
        axes.plot([optimum], [-optimum], "*", color="red", markersize=14, label=label)
    else:
        axes.plot(ticks, ticks - optimum, "--", color="red", label=f"optimum: margin {optimum:.2f}")
    axes.set(
        title=f"{name}, ε = {epsilon:g}", xlabel="reward of the preferred answer $r_w$",
        ylabel="reward of the dispreferred answer $r_l$", xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal",
    )  # fmt: skip
    axes.legend(loc="upper left")


# Curves of runs

# Title, axis label, and words of metric names; a metric is drawn in the first panel that has one of its words.
PANELS = (
    ("losses", "nats", ("loss", "entropy")),
    ("accuracies", "share that is right", ("accuracy",)),
    ("rewards", "reward", ("reward", "implicit")),
    ("learning rate", "learning rate", ("lr",)),
)
STYLES = ("-", "--", ":", "-.")

Curve = tuple[list[float], list[float]]  # steps, values


def curves(directories: Sequence[str | Path]) -> Figure:
    """Draw the metrics.jsonl of runs: a colour per metric, a line style per run.

    Raises UserError if a directory has no metrics, or if a line is malformed.
    """
    runs = {str(directory): read_metrics(directory) for directory in directories}
    names: dict[str, None] = {}  # of all runs, in the order of their first appearance
    for metrics in runs.values():
        names |= dict.fromkeys(metrics)
    panels = []
    for (title, label, _), panel_names in zip(PANELS, group(names), strict=True):
        if panel_names:
            panels.append((title, label, panel_names))
    if not panels:
        raise UserError(f"{', '.join(runs)}: expected losses, accuracies or learning rates in metrics.jsonl, got none")

    from matplotlib.figure import Figure

    columns, rows = min(len(panels), 2), math.ceil(len(panels) / 2)
    figure = Figure(figsize=(6.5 * columns, 4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, label, panel_names) in zip(grid, panels, strict=False):
        _draw_curves(axes, runs, panel_names)
        axes.set(title=title, xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in grid[len(panels) :]:
        axes.remove()
    return figure


def _draw_curves(axes: Axes, runs: dict[str, dict[str, Curve]], names: Sequence[str]) -> None:
    for (run, metrics), style in zip(runs.items(), itertools.cycle(STYLES), strict=False):
        for i, name in enumerate(names):
            if name in metrics:
                label = name if len(runs) == 1 else f"{name}, {run}"
                marker = "o" if len(metrics[name][0]) < 20 else None
                axes.plot(*metrics[name], style, color=f"C{i}", label=label, marker=marker, markersize=3)


def read_metrics(directory: str | Path) -> dict[str, Curve]:
    """Return every metric of a run: the steps that logged it, and its values."""
    metrics: dict[str, Curve] = {}
    path = Path(directory) / "metrics.jsonl"
    if not path.is_file():
        got = "a folder without metrics.jsonl" if path.parent.is_dir() else "nothing"
        raise UserError(f"{directory}: expected a run, got {got} there")
    lines = JsonLines(path)
    for i, line in enumerate(lines):
        if "step" not in line:
            got = ", ".join(line) or "nothing"
            raise UserError(f"{lines.location(i)}: expected a step among the metrics, got {got}")
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = metrics.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return metrics


def group(names: Iterable[str]) -> list[list[str]]:
    """Return the metric names of each panel."""
    panels: list[list[str]] = [[] for _ in PANELS]
    for name in names:
        words = set(name.replace("/", "_").split("_"))
        for panel, (_, _, panel_words) in zip(panels, PANELS, strict=True):
            if words & set(panel_words):
                panel.append(name)
                break
    return panels
