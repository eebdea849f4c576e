"""Arguments, models and output that several commands share. PyTorch is imported when a model is opened."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import decimal
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.data import atomic
from dph.errors import UNPRINTABLE, UserError, printable, shown
from dph.infer import sampling

if TYPE_CHECKING:
    from dph.model.model import Model
    from dph.train.recipe import Recipe, Source


# Arguments


def number_type(kind: Callable[[str], float], fits: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """Return an argparse type that reads a ``kind`` and refuses numbers that do not fit, naming ``expected``."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return read


COUNT = number_type(*sampling.COUNT)
SHOTS = number_type(int, lambda value: 0 <= value <= 1000, "a number from 0 to 1000")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model with its device and dtype."""
    parser.add_argument("model", metavar="MODEL", help="model or run directory, or a hub name (OWNER/NAME)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the weights (default: bfloat16 on a GPU, float32 on the CPU, where bfloat16 takes half of the memory)",
    )


def add_judging(parser: argparse.ArgumentParser) -> None:
    """Add the reward heads, or the choice of none."""
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument(
        "--head",
        action="append",
        help="reward head to score with: its name, a head's directory, or a run's for all of its heads; may be "
        "repeated, all score in one pass; of equal names the second becomes NAME-2 (default: the model's first head)",
    )
    heads.add_argument("--logprob-only", action="store_true", help="no rewards: for a model without a reward head")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of best-of-N sampling."""
    types = {name: number_type(*rule) for name, rule in sampling.RULES.items()}
    parser.add_argument("-n", "--n", type=types["n"], default=16, help="answers to choose from (default: 16)")
    parser.add_argument(
        "--rank",
        choices=("reward", "logprob", "lower_bound", "vote"),
        default="reward",
        help="score that ranks the answers; lower_bound: the reward less --risk times its spread, for an ensemble; "
        "vote: the sum of the probabilities that equal answers are good",
    )
    parser.add_argument("--risk", type=types["risk"], default=1.0, help="weight of the spread (default: 1)")
    parser.add_argument(
        "--head",
        help="reward head to score with: its name, or the directory of a head or its run (default: the model's first)",
    )
    add_normalise(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="an answer ends before this text; may be repeated"
    )
    for name, default, metavar, text in (
        ("confidence", None, "P", "sample no more once the best answer is good with this probability (dph card)"),
        ("round_size", 4, "N", "answers between two such decisions (default: 4)"),
        ("prune_every", None, "TOKENS", "drop the weaker half of the answers after so many tokens, again and again"),
        ("max_new_tokens", 256, "N", "(default: 256)"),
        ("temperature", 1.0, None, "0 takes the likeliest token (default: 1)"),
        ("top_k", 0, "K", "sample among the K likeliest; 0 for all"),
        ("top_p", 1.0, "P", "sample among the likeliest P of the mass"),
        ("min_p", 0.0, "P", "sample among tokens of at least P times the likeliest one's probability"),
        ("typical_p", 1.0, "P", "sample among the most typical P of the mass"),
        ("repetition_penalty", 1.0, "R", "divides the logits of tokens that were said (default: 1)"),
        ("seed", None, None, "of the sampling, for reproducible answers"),
    ):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=types[name], default=default, metavar=metavar, help=text)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the switch to JSON lines."""
    parser.add_argument("--json", action="store_true", help="JSON lines in place of a table")


def add_field(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the name of the field that the output adds to the rows of the input."""
    parser.add_argument("--field", default=default, metavar="NAME", help=f"field that is added (default: {default})")


def add_normalise(
    parser: argparse.ArgumentParser, rule: str = "candidates count as one answer in a vote if they have"
) -> None:
    """Add the choice of what makes two candidates the same answer; ``rule`` is the beginning of its help."""
    parser.add_argument(
        "--normalise",
        choices=("words", "number"),
        default="words",
        help=f"{rule} equal words, or equal last numbers (default: words)",
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the recipe, its overrides and the run directory."""
    parser.add_argument(
        "recipe",
        help="a YAML file, or a shipped recipe's name: pretrain, vocab, sft, align or head (the paper's stages), with "
        "a100- or h200- before it for one GPU of that kind, or mini- for two CPU cores",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="values that replace the recipe's"
    )
    parser.add_argument("--output", metavar="DIR", help="run directory, in place of the recipe's")


# Input

SOURCE = (
    "a file or folder as of dph train, task:NAME, hub:NAME, or one with options as in a recipe: {source: x.csv, "
    "columns: {prompt: question}, filter: {lang: en}, limit: 100}"
)
SOURCE_OPTIONS = ("split", "directory", "limit", "text_field", "columns", "filter", "format")


def parse_source(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a source and its options, which ``dph.data.rows.open_source`` takes.

    Raises UserError for an option that has no meaning in a command, and for wrong values.
    """
    if not text.lstrip().startswith("{"):
        return text, {}
    from dph.train import config_schema, recipe, yaml_values

    values = yaml_values.parse(text, "source", numbered=False)
    for name in values:
        if name not in ("source", *SOURCE_OPTIONS):
            raise UserError(f"source: expected the options {', '.join(SOURCE_OPTIONS)}, got {shown(name)}")
    source = config_schema.build(recipe.Source, values)
    config_schema.check_ranges(source)
    return source.source, {name: getattr(source, name) for name in SOURCE_OPTIONS if values.get(name) is not None}


def parse_sources(texts: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return names and options of sources, by their texts: one file may be given with several options."""
    return {text: parse_source(text) for text in texts}


def load_recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe with its overrides. Raises UserError if the file, a key or a value is wrong."""
    from dph.train import recipe

    overrides = list(args.overrides)
    if args.output is not None:
        overrides.append(f"output.directory={json.dumps(args.output)}")
    return recipe.load(args.recipe, overrides)


def check_recipe_paths(recipe: Recipe) -> None:
    """Raise UserError, as training would, if the recipe's model, tokenizer or a data file does not exist.

    Of several ranks each would report it, so there the check is left to training.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return
    from dph.data import dataset
    from dph.model.directories import model_path, tokenizer_path

    if recipe.model.path is not None:
        model_path(recipe.model.path)
    if recipe.model.tokenizer is not None:
        tokenizer_path(recipe.model.tokenizer)
    data, evaluation = recipe.data, recipe.evaluation
    if _lacks_file(data.sources):
        dataset.open_training(
            data.sources, recipe.kind, directory=data.directory, seed=recipe.seed, consecutive=data.consecutive
        )
    if _lacks_file(evaluation.sources):
        dataset.open_held_out(evaluation.sources, recipe.kind, directory=evaluation.directory, seed=recipe.seed)


def check_run_directory(recipe: Recipe, resume: bool) -> None:
    """Raise UserError if a new run's directory would mix with a folder that it reads; OSError if it cannot be made.

    Of several ranks each would report it, so there the check is left to training.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return
    directory = recipe.output.directory
    own = Path(os.path.realpath(directory))
    for key, name in () if resume else _folders(recipe):
        folder = Path(os.path.realpath(name))
        if folder.is_relative_to(own):
            raise UserError(
                f"output.directory: expected a directory that neither is nor contains that of {key} ({name}), got "
                f"{directory}"
            )
        if key.endswith("sources") and own.is_relative_to(folder):  # all text files in it are read as records
            raise UserError(
                f"output.directory: expected a directory outside of that of {key} ({name}), got {directory}"
            )
    atomic.check_new_files(directory)


def _folders(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (key, path) of the folders that a run reads."""
    named = [("model.path", recipe.model.path), ("model.tokenizer", recipe.model.tokenizer)]
    for key, part in (("data", recipe.data), ("evaluation", recipe.evaluation)):
        named.append((f"{key}.directory", part.directory))
        named += [(f"{key}.sources", source.source) for source in part.sources]
    for key, name in named:
        if name is not None and os.path.isdir(name):
            yield key, name


def _lacks_file(sources: Sequence[Source]) -> bool:
    """Whether one of the sources is a file or folder that does not exist."""
    for source in sources:
        if not source.source.startswith(("task:", "hub:")) and not Path(source.source).exists():
            return True
    return False


def check_model(args: argparse.Namespace) -> None:
    """Raise UserError if the device or the model does not exist; only a GPU's name needs PyTorch for that."""
    from dph.model.directories import model_path

    if args.device not in ("auto", "cpu"):
        from dph import devices

        devices.choose(args.device, "--device")
    model_path(args.model)


def heads_of(args: argparse.Namespace) -> list[str] | None:
    """Return the values of the options of :func:`add_judging`, as :func:`open_model` takes them."""
    return None if args.logprob_only else args.head or []


def open_model(args: argparse.Namespace, heads: Sequence[str] | None, alternative: str) -> tuple[Model, Any, list[str]]:
    """Return the model in evaluation mode, on ``--device`` in ``--dtype``, its tokenizer, and names of its heads.

    ``heads`` are values of ``--head``: empty for the model's first head, None if none is needed. Raises UserError if
    the model lacks one of them or its weights; ``alternative`` names an option that needs no head.
    """
    import torch

    from dph import devices
    from dph.model.loading import check_tokenizer, load_model, load_tokenizer

    device = devices.choose(args.device, "--device")
    dtype = devices.inference_dtype(args.dtype, device)
    model = load_model(args.model, dtype=getattr(torch, dtype))
    tokenizer = load_tokenizer(args.model)
    check_tokenizer(model, tokenizer)
    names: list[str] = []
    if heads is not None:
        for value in heads:
            names += add_heads(model, value)
        names = list(dict.fromkeys(names if heads else model.head_names[:1]))
        try:
            model.check_heads(*names)
        except ValueError as error:
            raise UserError(f"{error}; {alternative}") from None
    return model.to(device).eval(), tokenizer, names


def add_heads(model: Model, value: str) -> list[str]:
    """Return the names in a model of the heads of a value of ``--head``; those of directories are added.

    A head whose name is taken becomes NAME-2, NAME-3, ...
    """
    from dph.model import head_file

    directories, names = head_file.head_directories(value), []
    digest = head_file.backbone_digest(model.backbone) if directories else None
    for directory in directories:
        name, number = head_file.read(directory).name, 1
        free = name
        while free in model.head_names:
            number += 1
            free = f"{name}-{number}"
        names.append(head_file.load(model, directory, free, digest=digest))
    if not names and value not in model.head_names and "/" in value:
        known = f"one of {', '.join(model.head_names)} or the directory" if model.head_names else "the directory"
        raise UserError(f"--head: expected {known} of a head or a run with heads, got {value}, where none is")
    return names or [value]


# Output


def check_output(path: str | None, *inputs: str | Path, option: str = "--output") -> None:
    """Raise UserError if ``path`` or stdout is one of the inputs, and the OSError that writing to ``path`` would raise.

    An input is a file, or a directory of files; None stands for no output but stdout. ``option`` is the name of the
    path's option, for the error.
    """
    files: list[Path] = []
    for name in map(Path, inputs):
        files += filter(Path.is_file, name.iterdir()) if name.is_dir() else [name]
    for file in files:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = file.stat()
            if stat.S_ISREG(status.st_mode) and _is_stdout(status):
                raise UserError(f"stdout: expected another file than the input {file}, got the same file")
            if path is not None and os.path.samestat(os.stat(path), status):
                raise UserError(f"{option}: expected another file than the input {file}, got {path}, the same file")
    if path is not None:
        atomic.check_writable(path)


def _is_stdout(status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(1), status)
    except OSError:  # closed
        return False


def print_text(text: str) -> None:
    """Print text with names from outside; control characters are escaped."""
    print(printable(text))


def print_json(value: Any, *, flush: bool = False) -> None:
    """Print one line of JSON; characters that stdout's encoding lacks are written as JSON's escapes."""
    line = json_line(value)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(json.loads(line))
    print(line, flush=flush)


def json_line(value: Any) -> str:
    """Return one line of JSON. Numbers that are not finite, which JSON lacks, become null.

    Characters that end a line, control a terminal or are half of a pair are written as JSON's escapes.
    """
    text = json.dumps(_finite(value), ensure_ascii=False, default=_as_json)
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _as_json(value: Any) -> Any:
    """Return a value of a table that JSON lacks. Raises UserError for one that is neither a time nor a number."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    raise UserError(f"output: expected values that JSON has, times or decimal numbers, got {type(value).__name__}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
