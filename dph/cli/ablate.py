"""``dph ablate``: one stage with every combination of some options and several seeds, as a table and a picture."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.cli import common
from dph.cli.held_out import held_out_of_run, judge_records
from dph.data import atomic
from dph.errors import UserError, printable, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dph.evaluate.metrics import Interval
    from dph.train.recipe import Recipe

HELP = "train and judge a stage with every combination of some options, over several seeds"
EXAMPLE = """dph ablate mini-align 'data.sources=[pairs.jsonl]' evaluation.share=0.1 \\
    --vary 'objective.pooler=[identity, bert, swiglu_bert]' \\
    --vary 'objective.objective=[separable, contrastive]' --output runs/table4
dph ablate head model.path=MODEL --vary 'data.sources=[[task:boolq], [task:glue/sst2]]' --output runs/table5
dph ablate head data.sources=[pairs.jsonl] --vary 'model.path=[MODEL, OTHER]' --seeds 1 --output runs/table6"""
RESULT = "judged.json"  # of a run: by score, for each held-out pair its prompt and its share of right choices
OWN_KEYS = {"seed": "--seeds", "output.directory": "--output"}  # options that the command sets itself


@dataclass(frozen=True)
class Cell:
    """One combination of values: its name, its overrides, and the figures of its seeds."""

    name: str
    values: tuple[str, ...]
    overrides: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph ablate``."""
    parser.description = f"""{HELP}.

Each combination and seed is a run in a folder of its own, OUTPUT/NAME/seedN. It is judged on its held-out records with
the weights that it keeps. A command that was interrupted goes on where it stopped. The table has the share of held-out
pairs in which the chosen answer scores higher: the mean over the pairs of all seeds, its 95% interval over prompts, and
the lowest and the highest seed. With evaluation.share the held-out prompts may also have chosen a run's best step;
evaluation.sources gives others."""
    common.add_recipe(parser)
    parser.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="key.sub=[A, B]",
        help="an option and a list of its values, in YAML; repeated, every combination is trained",
    )
    parser.add_argument("--seeds", type=common.COUNT, default=3, metavar="K", help="seeds 0 to K - 1 (default: 3)")
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Train and judge what is not there yet, and write the table."""
    if args.output is None:
        raise UserError("--output: expected a folder for the runs, got none")
    folder = Path(args.output)
    cells = _cells(args.vary)
    for option in (*args.overrides, *args.vary):
        if (key := option.partition("=")[0]) in OWN_KEYS:
            raise UserError(f"{key}: expected {OWN_KEYS[key]} in its place, got {shown(option)}")
    recipes = {}
    for cell, seed in itertools.product(cells, range(args.seeds)):
        recipe = recipes[cell.name, seed] = _recipe(args, cell, seed, folder)
        _saved(recipe)  # one of another recipe is an error before anything is trained
    names = [value.partition("=")[0] for value in args.vary]
    judged: dict[str, list[dict[str, Any]]] = {cell.name: [] for cell in cells}
    for (name, seed), recipe in recipes.items():
        judged[name].append(_judged(recipe, f"{name}, seed {seed}"))
    rows = []
    for cell in cells:
        rows += _rows(cell, judged[cell.name])
    _report(folder, names, rows, args.json)


def _cells(options: Sequence[str]) -> list[Cell]:
    """Return every combination of the options' values."""
    from dph.train import yaml_values

    choices: list[list[tuple[str, Any]]] = []
    for option in options:
        key, _, text = option.partition("=")
        if key in [other.partition("=")[0] for other in options[: len(choices)]]:
            raise UserError(f"--vary {key}: expected all values in one list, got two")
        value = yaml_values.parse(text, key, numbered=False)
        if not isinstance(value, list) or not value:
            raise UserError(f"--vary {key}: expected a list of values, as {key}=[A, B], got {text!r}")
        choices.append([(key, item) for item in value])
    cells = []
    for combination in itertools.product(*choices):
        values = tuple(item if isinstance(item, str) else json.dumps(item) for _, item in combination)
        overrides = tuple(f"{key}={json.dumps(item)}" for key, item in combination)
        cells.append(Cell(", ".join(values), values, overrides))
    if len({cell.name for cell in cells}) < len(cells):
        raise UserError(f"--vary: expected different values, got {shown(list(options))}")
    return cells


def _recipe(args: argparse.Namespace, cell: Cell, seed: int, folder: Path) -> Recipe:
    """Return the recipe of one run. Raises UserError if an option or a value is wrong, or nothing is held out."""
    from dph.train import recipe as recipes

    directory = folder / _folder_name(cell.name) / f"seed{seed}"
    own = [f"seed={seed}", f"output.directory={json.dumps(str(directory))}"]
    recipe = recipes.load(args.recipe, [*args.overrides, *cell.overrides, *own])
    if recipe.kind != "preference":
        raise UserError(f"{args.recipe}: expected a recipe of stage head or align, got {recipe.stage}")
    if not recipe.objective.dph_weight:
        raise UserError("objective.dph_weight: expected more than 0, as rewards are compared, got 0")
    if not recipe.evaluation.sources and not recipe.evaluation.share:
        raise UserError("evaluation.sources, evaluation.share: expected held-out records, got none")
    common.check_recipe_paths(recipe)
    return recipe


def _folder_name(name: str) -> str:
    """Return a name of a folder for a combination: its own, or its beginning with a digest if it does not fit one."""
    plain = re.sub(r"[^\w ,.=+\[\]-]", "_", name).strip(". ")[:100]
    return plain if plain == name else f"{plain}-{blake2b(name.encode(), digest_size=4).hexdigest()}"


def _saved(recipe: Recipe) -> dict[str, Any] | None:
    """Return the shares of right choices of a run that was judged before. Raises UserError if its recipe is another."""
    from dph.train import recipe as recipes

    path = Path(recipe.output.directory) / RESULT
    if not path.is_file():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    if recipes.from_dict(saved["recipe"]) != recipe:
        raise UserError(f"{path}: expected the result of this recipe, got one of another: give another --output")
    return saved


def _judged(recipe: Recipe, name: str) -> dict[str, Any]:
    """Return the shares of right choices of a run, which is trained and judged unless that was done before."""
    from dph.train import entry

    if (saved := _saved(recipe)) is not None:
        return saved
    directory = Path(recipe.output.directory)
    print(printable(f"{name}: training"), file=sys.stderr)
    result = entry.train(recipe, resume=directory.is_dir())
    if result.exit_code:
        raise SystemExit(result.exit_code)
    saved = {"recipe": recipe.as_dict(), "scores": _judge(directory, recipe.objective.heads)}
    atomic.write_text(directory / RESULT, json.dumps(saved) + "\n")
    return saved


def _judge(directory: Path, heads: Sequence[str]) -> dict[str, list[tuple[str, float]]]:
    """Return by score, for each of a run's held-out pairs, its prompt and the share of right choices.

    Each of several heads has scores of its own, as its pairs may be others.

    Pairs that a score cannot compare, by the mean log-probability of an empty answer, are left out. Raises UserError if
    a head has no held-out pairs.
    """
    import numpy as np

    from dph.evaluate.card import RULES
    from dph.evaluate.metrics import chosen_shares
    from dph.model.loading import load_model, load_tokenizer

    model, tokenizer = load_model(str(directory)).eval(), load_tokenizer(str(directory))
    records = [record for part in held_out_of_run(directory).values() for record in part if record is not None]
    judgements_of, scores = judge_records(model, tokenizer, records), {}
    for head in heads:
        judgements = judgements_of(head)
        if not judgements.pair_prompts:
            raise UserError(f"{directory}: head {head}: expected held-out pairs, got labels of single answers alone")
        for rule, pairs in judgements.pairs.items():
            kept = np.flatnonzero(~np.isnan(pairs).any(1))
            shares = chosen_shares(pairs[kept])[:, 0]
            name = RULES[rule] if len(heads) == 1 else f"{RULES[rule]} {head}"
            scores[name] = [(judgements.pair_prompts[i], float(share)) for i, share in zip(kept, shares, strict=True)]
    return scores


def _rows(cell: Cell, seeds: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the figures of one combination, by each score that compares some pairs of every seed."""
    import numpy as np

    for rule in seeds[0]["scores"]:
        pairs = [seed["scores"][rule] for seed in seeds]
        if all(pairs):
            yield {
                "values": list(cell.values),
                "score": rule,
                "accuracy": asdict(_mean(pairs)),
                "seeds": [float(np.mean([share for _, share in own])) for own in pairs],
                "pairs": list(map(len, pairs)),
            }


def _mean(seeds: Sequence[Sequence[tuple[str, float]]]) -> Interval:
    """Return the mean over all pairs of seeds, each of (prompt, share) of its pairs, with its interval over prompts.

    Seeds may hold out different prompts.
    """
    import numpy as np

    from dph.evaluate.metrics import wilson_of_groups

    prompts, shares = zip(*itertools.chain.from_iterable(seeds), strict=True)
    return wilson_of_groups(np.array(shares), prompts)


def _report(folder: Path, names: Sequence[str], rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print the table, and write it as Markdown and JSON, with a picture."""
    from dph.evaluate.tables import markdown_table, table

    headers = [*names, "score", "pair accuracy", "95% interval", "seeds", "pairs of a seed"]
    cells = []
    for row in rows:
        figure, seeds = row["accuracy"], row["seeds"]
        interval = f"{figure['low']:.3f} to {figure['high']:.3f}"
        spread = f"{min(seeds):.3f} to {max(seeds):.3f}"
        fewest, most = min(row["pairs"]), max(row["pairs"])
        count = fewest if fewest == most else f"{fewest} to {most}"
        cells.append([*row["values"], row["score"], figure["value"], interval, spread, count])
    atomic.write_text(folder / "ablation.md", markdown_table(headers, cells) + "\n")
    atomic.write_text(folder / "ablation.json", json.dumps({"options": list(names), "rows": rows}, indent=1) + "\n")
    with atomic.atomic_file(folder / "ablation.png") as file:
        _figure(names, rows).savefig(file, dpi=130, format="png")
    if as_json:
        for row in rows:
            common.print_json(row)
        return
    print(table(headers, cells))
    common.print_text(f"written to {folder}: ablation.md, ablation.json, ablation.png")


def _figure(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw the accuracies by reward, with their intervals and each seed."""
    from matplotlib.figure import Figure

    from dph.evaluate.card_figure import COLOURS

    kept = [row for row in rows if row["score"].startswith("reward")]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(kept)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(kept):
        value, low, high = (row["accuracy"][key] for key in ("value", "low", "high"))
        axes.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=COLOURS[0], capsize=3)
        axes.plot(row["seeds"], [place] * len(row["seeds"]), "|", color=COLOURS[1], markersize=9)
    labels = [", ".join(row["values"]) + row["score"].removeprefix("reward") for row in kept]
    axes.set_yticks(range(len(kept)), labels)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set(xlabel="pair accuracy by reward: mean and 95% interval, and each seed", title=", ".join(names))
    return figure
