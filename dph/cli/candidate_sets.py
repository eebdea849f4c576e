"""``dph evaluate --candidates``: files of candidates, the best of N by each rule, and the figures of subsets."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.cli import common, results
from dph.errors import UserError

if TYPE_CHECKING:
    from dph.chat import Encoded
    from dph.data.candidates import Candidates
    from dph.evaluate.best_of import Curve, Probability
    from dph.model.judging import Judged

SIZES = (4, 16)  # candidates N in the table, besides 1 and all


def run(args: argparse.Namespace) -> None:
    """Judge every file's candidates, print a table of each, and write the scores to ``--output``."""
    from dph.data.candidates import read_candidates

    for name in ("task", "suite", "glue_submission", "table", "split", "directory", "shots"):
        if getattr(args, name):
            raise UserError(f"--candidates: expected no --{name.replace('_', '-')} with it, got one")
    sources = common.parse_sources(args.candidates)
    sets = {text: read_candidates(name, **options) for text, (name, options) in sources.items()}
    common.check_output(args.output, args.model, Path(args.model) / "model", *(name for name, _ in sources.values()))
    common.check_model(args)

    from dph.evaluate.calibration import recorded
    from dph.evaluate.choices import choice_scores, reward_method

    model, tokenizer, heads = common.open_model(args, common.heads_of(args), "--logprob-only needs no rewards")
    rows = [(name, number, row) for name, part in sets.items() for number, row in enumerate(part[: args.limit])]
    about = {
        "command": "evaluate --candidates",
        "candidates": args.candidates,
        "rows": _fingerprint(rows),
        "logprob": args.logprob,
    }
    if args.output is not None:
        about |= results.about_model(model, tokenizer, heads)

    def place(index: int) -> str:
        return f"{rows[index][0]}, row {rows[index][1]}"

    def groups(start: int) -> Iterator[list[Encoded]]:
        for _, _, row in rows[start:]:
            yield row.encode(tokenizer)

    def line(index: int, judged: Judged) -> dict[str, Any]:
        name, number, row = rows[index]
        scores = choice_scores(judged, heads, place(index), args.logprob, row.texts)
        return {"candidates": name, "index": number, "correct": row.correct, "scores": scores}

    job = results.judging("evaluate", len(rows), model, groups, line, place, about)
    with results.written(job, args.output, args.resume) as lines:
        votes = {reward_method(head, heads): recorded(model.head_records.get(head, {})).probability for head in heads}
        for name, part in sets.items():
            own = part[: args.limit]
            _report(args, name, own, [written["scores"] for written in islice(lines, len(own))], votes)


def _fingerprint(rows: Sequence[tuple[str, int, Candidates]]) -> str:
    from dph.data.json_lines import combined_fingerprint

    return combined_fingerprint(*rows)


def _report(
    args: argparse.Namespace,
    name: str,
    rows: Sequence[Candidates],
    scores: Sequence[Mapping[str, Any]],
    votes: Mapping[str, Probability],
) -> None:
    """Print the figures of one file; ``votes`` as ``probabilities`` of ``best_of.curves``."""
    from dph.evaluate import best_of, reward_bench
    from dph.evaluate.tables import table

    prompts = [best_of.scored(row.texts, row.correct, own) for row, own in zip(rows, scores, strict=True)]
    curves = best_of.curves(prompts, best_of.NORMALISERS[args.normalise], votes)
    subsets: dict[str, list[reward_bench.Subset]] = {}
    if any(row.subset is not None for row in rows):
        for method in scores[0]:
            own = [
                reward_bench.Prompt(prompt.scores[method], prompt.correct, row.subset or "", row.id)
                for prompt, row in zip(prompts, rows, strict=True)
            ]
            subsets[method] = reward_bench.by_subset(own)
    if args.json:
        for curve in curves:
            common.print_json({"candidates": name, **asdict(curve)})
        for method, figures in subsets.items():
            for figure in figures:
                interval = None if figure.interval is None else asdict(figure.interval)
                common.print_json({"candidates": name, "method": method, **figure._asdict(), "interval": interval})
        return
    common.print_text(f"{name}: {len(rows)} prompts, right answers among the chosen ones of N")
    print(_curve_table(curves))
    if subsets:
        cells = []
        for method, figures in subsets.items():
            for figure in figures:
                interval = None if figure.interval is None else figure.interval.range
                cells.append([figure.name, method, figure.value, interval, figure.n])
        print()
        print(table(["subset", "method", "value", "95% interval", "n"], cells))


def _curve_table(curves: Sequence[Curve]) -> str:
    from dph.evaluate.tables import table

    ns = curves[0].ns
    shown = [n for n in ns if n in (ns[0], *SIZES, ns[-1])]
    cells = []
    for curve in curves:
        figures = dict(zip(ns, curve.right, strict=True))
        cells.append([curve.rule, *(figures[n].value for n in shown), figures[ns[-1]].range, curve.enough])
    return table(["chosen by", *(f"N = {n}" for n in shown), f"95% interval, N = {ns[-1]}", "enough at N"], cells)
