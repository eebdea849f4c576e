"""Figures of sampled answers: the share of right ones by rule and by N, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from dph.evaluate.best_of import curves, scored
from dph.evaluate.card_figure import COLOURS, LINES, MARKERS
from dph.evaluate.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLE, PROBABLE, REWARD, VOTE, ORACLE = RULES = ("one sample", "most probable", "by reward", "vote", "oracle")
NAMES = {"random": SAMPLE, "vote": VOTE, "oracle": ORACLE}  # names of ``dph.evaluate.best_of`` -> those here


def share_right(lines: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of right answers among all."""
    return float(np.mean([np.mean(line["correct"]) for line in lines]))


def figures(lines: Sequence[Mapping[str, Any]], normalise: Callable[[str], str]) -> dict[str, Any]:
    """Return by rule, for each N, the share of right answers with its 95% interval, as JSON.

    Args:
        lines: of sampled answers (``dph.improve.rounds``), at least one.
        normalise: answers that become equal count as one in a vote, which is among the finished ones.
    """
    prompts = []
    for line in lines:
        scores = {PROBABLE: _of_finished(line, "logprobs")}
        if any(reward is not None for other in lines for reward in other["rewards"]):
            scores[REWARD] = line["rewards"]
        prompts.append(scored(line["candidates"], line["correct"], scores, line["finished"]))
    by_rule, ns = {}, ()
    for curve in curves(prompts, normalise, {}):
        ns = curve.ns
        by_rule[NAMES.get(curve.rule, curve.rule)] = [asdict(interval) for interval in curve.right]
    return {"n": list(ns), "rules": by_rule}


def _of_finished(line: Mapping[str, Any], column: str) -> list[float | None]:
    """Return a column with None for answers that were cut off: they are chosen last."""
    return [value if ended else None for value, ended in zip(line[column], line["finished"], strict=True)]


def describe(metrics: Mapping[str, Any]) -> str:
    """Return the figures of a round as text with a table."""
    number, lines = metrics["round"], []
    if number:
        parts = [f"round {number}: {metrics['prompts']:,} prompts with {metrics['n']} answers each"]
        parts.append(f"{100 * metrics['right']:.1f} % right")
        if "cut_off" in metrics:  # not in those of earlier versions
            parts.append(f"{100 * metrics['cut_off']:.1f} % cut off")
        parts.append(f"{metrics['records']:,} records")
        if metrics["refused"]:
            parts.append(f"{metrics['refused']:,} answers left out, which the chat format changes")
        lines.append(", ".join(parts))
    else:
        lines.append("the model itself")
    if "figures" in metrics:
        lines += [f"right answers on {metrics['held_out']:,} held-out prompts", figure_table(metrics["figures"])]
    return "\n".join(lines)


def figure_table(values: Mapping[str, Any]) -> str:
    """Return a table of figures: a row for each N."""
    rules = [rule for rule in RULES if rule in values["rules"]]
    shown, headers = REWARD if REWARD in rules else SAMPLE, ["N"]  # the rule that has its interval in the table
    for rule in rules:
        headers += [rule, "95% interval"] if rule == shown else [rule]
    rows = []
    for i, n in enumerate(values["n"]):
        row: list[Any] = [n]
        for rule in rules:
            figure = values["rules"][rule][i]
            row += [figure["value"]] + ([f"{figure['low']:.3f} to {figure['high']:.3f}"] if rule == shown else [])
        rows.append(row)
    return table(headers, rows)


def picture(rounds: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the share of right answers over N by the reward of each round, between one sample and the oracle."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 4.6), layout="constrained")
    axes, last = drawn.subplots(), rounds[-1]["figures"]
    ns = last["n"]
    for i, metrics in enumerate(metrics for metrics in rounds if REWARD in metrics["figures"]["rules"]):
        points = metrics["figures"]["rules"][REWARD]
        spread = [[p["value"] - p["low"] for p in points], [p["high"] - p["value"] for p in points]]
        label = f"by reward, round {metrics['round']}" if metrics["round"] else "by reward, the model itself"
        style = {"color": COLOURS[i % len(COLOURS)], "label": label, "capsize": 2, "markersize": 4}
        axes.errorbar(
            ns, [p["value"] for p in points], np.maximum(spread, 0.0), fmt=f"{MARKERS[i % len(MARKERS)]}-", **style
        )
    for i, rule in enumerate((SAMPLE, PROBABLE, VOTE, ORACLE)):
        axes.plot(ns, [p["value"] for p in last["rules"][rule]], color="#777777", linestyle=LINES[i], label=rule)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ns, ns)
    axes.grid(alpha=0.3)
    axes.set(xlabel="candidates N", ylabel="share of right answers", ylim=(0, 1.02), title="held-out prompts")
    axes.legend(fontsize="small")
    return drawn
