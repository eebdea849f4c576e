"""``dph card``: what a reward head is worth on held-out answers, as text, JSON and a picture beside the head."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.cli import common
from dph.cli.held_out import held_out_of_run, judge, judge_records
from dph.data import atomic
from dph.errors import UserError

if TYPE_CHECKING:
    from dph.model.judging import JudgingModel

HELP = "write a reward head's card: accuracy, calibration, label noise, length, and best of N, on held-out answers"
EXAMPLE = """dph card runs/head
dph card runs/head heldout.jsonl --candidates samples.jsonl --normalise number
dph card MODEL heldout.jsonl --head heads/helpful"""
FIGURE = "card.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph card``."""
    parser.description = f"""{HELP}.

The card is written beside the head (RUN/heads/NAME), or to --output: card.md, card.json and card.png. The head's file
keeps the calibration, by which model.probability(rewards, head) reads rewards as probabilities."""
    common.add_model(parser)
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="PAIRS",
        help="held-out pairs or labelled answers: sources as of dph train (default: the run's held-out records)",
    )
    parser.add_argument(
        "--head",
        action="append",
        help="reward head: its name, a head's directory, or a run's for all of its heads; may be repeated (default: "
        "the model's first head)",
    )
    parser.add_argument(
        "--candidates",
        action="append",
        default=[],
        metavar="FILE",
        help="rows of prompt, candidates and correct, or of prompt and lists of chosen and rejected, for best of N; "
        "may be repeated",
    )
    common.add_normalise(parser)
    parser.add_argument("--output", metavar="DIR", help="folder for the card (several heads: DIR/NAME)")


def run(args: argparse.Namespace) -> None:
    """Judge the held-out records and candidates once with all heads, and write a card for each."""
    from dph.data.candidates import read_candidates

    if args.normalise != "words" and not args.candidates:
        raise UserError("--normalise: expected --candidates with it, got none")
    candidate_sources = common.parse_sources(args.candidates)
    sets = {text: read_candidates(name, **options) for text, (name, options) in candidate_sources.items()}
    titles = {text: Path(text).name for text in sets}
    if len(set(titles.values())) < len(titles):
        titles = dict(zip(sets, sets, strict=True))
    records, sources = _held_out(args)
    common.check_model(args)
    model, tokenizer, names = common.open_model(args, args.head or [], "dph train head trains one")
    files = _head_files(args, names)
    folders = _folders(args, names, files)

    from dph.evaluate import best_of, card, card_figure

    judgements_of = judge_records(model, tokenizer, records)
    judged_sets = {}
    for name, rows in sets.items():
        judged_sets[name] = judge(model, [row.encode(tokenizer) for row in rows], name)
    for head in names:
        judgements = judgements_of(head)
        candidates = {}
        for name, rows in sets.items():
            pairs = zip(rows, judged_sets[name], strict=True)
            candidates[titles[name]] = []
            for row, result in pairs:
                scores = {"reward": result.rewards[head], card.RULES["mean"]: result.mean_logprobs}
                candidates[titles[name]].append(best_of.scored(row.texts, row.correct, scores))
        about = _about(model, head, files.get(head), sources)
        found = card.card(head, about, judgements, candidates, best_of.NORMALISERS[args.normalise])
        figure = card_figure.figure(found, judgements.rewards, judgements.is_good)
        _write(folders[head], found, card.markdown(found, FIGURE), figure)
        print(card.markdown(found))
        if head in files:
            if _keep_calibration(files[head], found):
                common.print_text(f"head {head} has no calibration any more: the notes of its card say why")
        else:
            common.print_text(f"model.probability lacks the calibration, as there is no file of head {head} to keep it")
        common.print_text(f"written to {folders[head]}")


def _held_out(args: argparse.Namespace) -> tuple[list[Any], list[str]]:
    """Return the held-out records, and names of where they are from: the sources given, or those of the run."""
    from dph.data import dataset
    from dph.data.formats import LABELLED

    if args.sources:
        found = {}
        for text, (name, options) in common.parse_sources(args.sources).items():
            found[text] = dataset.load(name, LABELLED, **{"split": "validation", **options})
    else:
        found = held_out_of_run(Path(args.model))
    records = [record for part in found.values() for record in part if record is not None]
    if not records:
        raise UserError(f"{', '.join(found)}: expected at least one held-out record, got none")
    return records, list(found)


def _head_files(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Path]:
    """Return the directories of the heads' files, by the heads' names in the model: of --head, or of the run."""
    from dph.model import head_file

    found, own = {}, {head_file.read(path).name: path for path in head_file.head_directories(args.model)}
    loaded = iter(names)
    for value in args.head or [None]:
        directories = [] if value is None else head_file.head_directories(value)
        for path in directories or [None]:
            head = next(loaded, None)
            if head is not None and (path or own.get(head)) is not None:
                found[head] = path or own[head]
    return found


def _folders(args: argparse.Namespace, names: Sequence[str], files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the folder of each head's card."""
    if args.output is not None:
        if Path(args.output).exists() and not Path(args.output).is_dir():
            raise UserError(f"--output: expected a folder for the card, got the file {args.output}")
        return {name: Path(args.output, name) if len(names) > 1 else Path(args.output) for name in names}
    if missing := [name for name in names if name not in files]:
        raise UserError(
            f"--output: expected a folder for the card, as {args.model} has no file of head {', '.join(missing)} "
            "beside which it is written, got none"
        )
    return dict(files)


def _about(model: JudgingModel, head: str, path: Path | None, sources: Sequence[str]) -> dict[str, Any]:
    """Return what is known of a head, and of the held-out data."""
    from dph.model import head_file

    (group,) = (key for key, heads in model.heads.items() if head in heads.reward)
    backbone = str(model.name_or_path) if path is None else head_file.read(path).backbone["name"]
    form = model.config.head_form(group)
    known = {name: value for name, value in model.head_records.get(head, {}).items() if name != "calibration"}
    return {
        **known,
        "backbone": backbone,
        "layer": form["layer"],
        "pooler": form["pooler"],
        "held_out": ", ".join(sources),
    }


def _write(folder: Path, found: Mapping[str, Any], text: str, figure: Any) -> None:
    """Write the card's three files."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(folder / "card.json", json.dumps(found, indent=1) + "\n")
    atomic.write_text(folder / "card.md", text)
    with atomic.atomic_file(folder / FIGURE) as file:
        figure.savefig(file, dpi=130, format="png")


def _keep_calibration(path: Path, found: Mapping[str, Any]) -> bool:
    """Write the calibration into a head's file, or remove an older one; return whether one was removed."""
    from dph.model import head_file

    calibration = found["calibration"]
    if calibration is not None:
        calibration = {key: calibration[key] for key in ("temperature", "midpoint")}
    is_removed = calibration is None and head_file.read(path).about.get("calibration") is not None
    head_file.update(path, {"calibration": calibration})
    return is_removed
