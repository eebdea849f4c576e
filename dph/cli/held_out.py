"""Held-out records of a run, and their results by its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.cli import results
from dph.errors import UserError

if TYPE_CHECKING:
    from dph.chat import Encoded
    from dph.evaluate.card import Judgements
    from dph.model.judging import Judged, JudgingModel


def held_out_of_run(directory: Path) -> dict[str, Sequence[Any]]:
    """Return the held-out records of a run, by names."""
    from dph._folder import read_json
    from dph.data import dataset
    from dph.train import recipe as recipes

    path = directory / "config.json"
    fields = read_json(path) if path.is_file() else {}
    if "stage" not in fields:
        raise UserError(f"{directory}: expected a run, whose held-out records are known, or PAIRS; got another model")
    recipe = recipes.from_dict(fields)
    if recipe.kind != "preference":
        raise UserError(f"{directory}: expected a run of stage head or align, got {recipe.stage}: give PAIRS")
    data, evaluation = recipe.data, recipe.evaluation
    found = dataset.open_held_out(evaluation.sources, recipe.kind, directory=evaluation.directory, seed=recipe.seed)
    if evaluation.share:
        _, development = dataset.open_training(
            data.sources, recipe.kind, directory=data.directory, seed=recipe.seed, consecutive=data.consecutive,
            share=evaluation.share, redraw=data.redraw,
        )  # fmt: skip
        found[f"{evaluation.share:.0%} of the run's prompts, which also chose its best step"] = development
    if not found:
        raise UserError(f"{directory}: expected a run with held-out records, or PAIRS; got evaluation.sources=[]")
    return dict(found)


def judge_records(model: JudgingModel, tokenizer: Any, records: Sequence[Any]) -> Callable[[str], Judgements]:
    """Judge held-out pairs or labelled answers by all heads, and return the function from a head to its judgements."""
    from dph.data.formats import Encoder
    from dph.data.labels import labels_of
    from dph.data.sources import prompt_key
    from dph.evaluate.card import gather

    answers = list(map(Encoder(tokenizer), records))
    judged = judge(model, answers, "held-out answers")
    return partial(gather, answers, list(map(labels_of, answers)), judged, list(map(prompt_key, records)))


def judge(model: JudgingModel, groups: Sequence[Sequence[Encoded]], name: str) -> list[Judged]:
    """Return the results of groups of answers. Raises RuntimeError if a score is NaN or infinite."""
    from dph.evaluate.metrics import check_finite

    judged: list[Judged] = []
    place = f"{name}: record {{}}".format

    def line(index: int, result: Judged) -> dict[str, Any]:
        for what, values in (*result.rewards.items(), ("log-probability", result.logprobs)):
            check_finite(values, f"{place(index)}: {what}")
        judged.append(result)
        return {}

    def rest(start: int) -> Iterator[Sequence[Encoded]]:
        return iter(groups[start:])

    with results.written(results.judging(name, len(groups), model, rest, line, place)) as lines:
        for _ in lines:
            pass
    return judged
