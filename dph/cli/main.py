"""The ``dph`` command: arguments and errors. What the commands do is in ``dph.commands``, imported when one runs.

Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted by Ctrl-C, 143 ended by SIGTERM (training has then saved
its state). An error is one line on stderr; ``--debug`` adds the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

from dph.errors import Elsewhere, UserError
from dph.infer import sampling


class Parser(argparse.ArgumentParser):
    """Shows an example in its help, and raises UserError where the standard one exits."""

    def __init__(self, *args: Any, example: str | None = None, **kwargs: Any) -> None:
        if example is not None:
            title = "examples" if "\n" in example else "example"
            kwargs["epilog"] = f"{title}:\n  " + example.replace("\n", "\n  ")
        kwargs["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self.set_defaults(parser=self)  # of a subcommand's, which is parsed last, that one

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        help: one line.
        example: one or several command lines.
        arguments: adds its own to a parser; called only for the subcommand that was asked for.
        module: holds a function of the subcommand's name that runs it (the quickstart's is ``run``).
    """

    help: str
    example: str
    arguments: Callable[[Parser], None]
    module: str


def _quickstart(parser: Parser) -> None:
    _load("dph.demo.quickstart").add_arguments(parser)


def _train(parser: Parser) -> None:
    _cache(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what it would take (parameters, memory, tokens, hours), and no more"
    )


def _cache(parser: Parser) -> None:
    parser.add_argument(
        "recipe",
        help="a YAML file, or a shipped recipe's name: pretrain, vocab, sft, align or head (the paper's stages), with "
        "a100- or h200- before it for one GPU of that kind, or mini- for two CPU cores",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="values that replace the recipe's"
    )
    parser.add_argument("--output", metavar="DIR", help="run directory, in place of the recipe's")


def _evaluate(parser: Parser) -> None:
    _add_model(parser)
    parser.add_argument("--task", required=True, nargs="+", metavar="TASK", help="such as glue/sst2")
    parser.add_argument("--directory", metavar="DIR", help="read DIR/<task>/<split>.jsonl in place of the hub")
    parser.add_argument("--split", help="which split (default: the one that the paper reports)")
    parser.add_argument("--limit", type=_count, metavar="N", help="only the first N records")
    _add_judging(parser)
    _add_json(parser)


def _generate(parser: Parser) -> None:
    _add_model(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", help="what the user says")
    asked.add_argument(
        "--file", metavar="PROMPTS.jsonl", help="one object a line: prompt (text or messages) or messages"
    )
    _add_sampling(parser)
    _add_json(parser)


def _chat(parser: Parser) -> None:
    _add_model(parser)
    _add_sampling(parser)


def _score(parser: Parser) -> None:
    parser.description += """.

The sum is the log-probability of the final answer, its <|im_end|> included, in nats. The mean is per content token
and leaves out the <|im_end|>; an empty answer has none (-)."""
    _add_model(parser)
    parser.add_argument(
        "file", metavar="CONVERSATIONS.jsonl", help="one object a line: messages, or chosen and rejected (TRL's forms)"
    )
    parser.add_argument("--output", metavar="FILE", help="write every line's scores to a JSONL file")
    _add_judging(parser)
    _add_json(parser)


def _plot(parser: Parser) -> None:
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE", parser_class=Parser)
    text = "loss landscapes of both reward objectives (the paper's figure 1)"
    landscape = figures.add_parser(
        "landscape", help=text, description=text, example="dph plot landscape --epsilon 0.1 0.25 -o landscape.png"
    )
    landscape.add_argument("--epsilon", type=float, nargs="+", default=[0.1], help="label smoothing (default: 0.1)")
    text = "curves of one or several training runs"
    run = figures.add_parser(
        "run", help=text, description=text, example="dph plot run runs/align runs/head -o curves.png"
    )
    run.add_argument("directories", nargs="+", metavar="DIR", help="run directory, which holds metrics.jsonl")
    for figure in (landscape, run):
        figure.add_argument("-o", "--output", required=True, metavar="FILE", help="PNG, PDF or SVG, by its suffix")


def _convert(parser: Parser) -> None:
    parser.add_argument(
        "input", metavar="IN", help="model directory, hub name, or a run's checkpoint (RUN/checkpoints/step-NNNNNNNN)"
    )
    parser.add_argument("output", metavar="OUT", help="directory to write; must be new or empty")
    parser.add_argument("--to", required=True, choices=("own", "official"), help="layout of OUT")


def _tokenizer(parser: Parser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help=".txt, or .jsonl, of which all text but the roles of messages is read"
    )
    parser.add_argument("--vocab-size", type=_count, default=4096, metavar="V", help="upper bound (default: 4096)")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")


def _doctor(parser: Parser) -> None:
    """No arguments."""


def _number(kind: Callable[[str], float], fits: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """An argument's type: the text as ``kind`` reads it, where that ``fits``; else an error that says what would."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return read


_count = _number(*sampling.COUNT)


def _add_model(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model or run directory, or a hub name (OWNER/NAME)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: the GPU where there is one)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the weights (default: bfloat16 on a GPU, float32 on the CPU)",
    )


def _add_judging(parser: Parser) -> None:
    parser.add_argument("--head", default="default", help="reward head that judges")
    parser.add_argument("--logprob-only", action="store_true", help="no rewards: for a model without a reward head")


def _add_sampling(parser: Parser) -> None:
    kinds = {name: _number(*rule) for name, rule in sampling.RULES.items()}
    parser.add_argument("-n", "--n", type=kinds["n"], default=16, help="answers to choose from (default: 16)")
    parser.add_argument("--rank", choices=("reward", "logprob"), default="reward", help="what the best is best by")
    parser.add_argument("--head", default="default", help="reward head that judges")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    for name, default, metavar, text in (
        ("max_new_tokens", 256, "N", "(default: 256)"),
        ("temperature", 1.0, None, "0 takes the likeliest token (default: 1)"),
        ("top_k", 0, "K", "sample among the K likeliest; 0 for all"),
        ("top_p", 1.0, "P", "sample among the likeliest P of the mass"),
        ("seed", None, None, "of the sampling, for the same answers again"),
    ):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kinds[name], default=default, metavar=metavar, help=text)


def _add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON lines in place of a table")


COMMANDS = {
    "quickstart": Command(
        "train a small model that tells truth from a popular falsehood, and show it",
        "dph quickstart",
        _quickstart,
        "dph.demo.quickstart",
    ),
    "train": Command(
        "train one stage from a recipe",
        "dph train align model.path=runs/sft optimiser.steps=200 --output runs/align\n"
        "dph train recipe.yaml --resume\ndph train sft model.path=runs/vocab --dry-run\n"
        "torchrun --nproc-per-node 8 -m dph.cli train sft model.path=runs/vocab",
        _train,
        "dph.cli.files",
    ),
    "cache": Command(
        "compute what stage align or head keeps of a frozen model (reference log-probabilities, hidden states) ahead",
        "dph cache align model.path=runs/sft objective.reference=cache --output runs/align\ndph cache head",
        _cache,
        "dph.cli.files",
    ),
    "evaluate": Command(
        "answer a task's questions by log-probability and by reward",
        "dph evaluate runs/align --task glue/sst2 --directory data --limit 500",
        _evaluate,
        "dph.cli.judging",
    ),
    "generate": Command(
        "sample several answers to a prompt and rank them",
        'dph generate runs/align --prompt "Name a prime number." -n 8\n'
        "dph generate runs/align --file prompts.jsonl --json > answers.jsonl",
        _generate,
        "dph.cli.answering",
    ),
    "chat": Command(
        "talk with a model that keeps the best of N answers (/candidates shows all of them, /quit ends)",
        'dph chat runs/align -n 8 --system "Answer in one sentence."',
        _chat,
        "dph.cli.answering",
    ),
    "score": Command(
        "rewards and log-probabilities of conversations, and how often they prefer the chosen answer of a pair",
        "dph score runs/align conversations.jsonl --json\ndph score runs/align preferences.jsonl --output scores.jsonl",
        _score,
        "dph.cli.judging",
    ),
    "plot": Command(
        "draw the loss landscapes, or the curves of training runs",
        "dph plot landscape -o landscape.png\ndph plot run runs/align -o curves.png",
        _plot,
        "dph.cli.files",
    ),
    "convert": Command(
        "turn a released lsw_transformer model, or a run's checkpoint into the own format, or back",
        "dph convert released-model own-model --to own\ndph convert runs/align/checkpoints/step-00004096 best --to own",
        _convert,
        "dph.cli.files",
    ),
    "tokenizer": Command(
        "train a byte-level BPE with the chat tokens on text",
        "dph tokenizer corpus.txt chats.jsonl --vocab-size 4096 --output tokenizer",
        _tokenizer,
        "dph.cli.files",
    ),
    "doctor": Command("show versions, devices, backends and what is missing", "dph doctor", _doctor, "dph.cli.files"),
}


def build(name: str | None = None) -> Parser:
    """The parser; only the subcommand ``name`` gets its arguments."""
    import dph

    parser = Parser(prog="dph", description="Direct Preference Heads: a model that picks its own best answer.")
    parser.add_argument("--version", action="version", version=f"dph {dph.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for key, command in COMMANDS.items():
        sub = commands.add_parser(key, help=command.help, description=command.help, example=command.example)
        if key == name:
            command.arguments(sub)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of one call. Raises UserError where they are wrong."""
    name = next((word for word in argv if not word.startswith("-")), None)
    parser = build(name)
    args, rest = parser.parse_known_args(argv)
    overridden = args.command in ("train", "cache")
    if overridden:
        # argparse takes positional arguments in one run only: overrides that stand behind an option are left over.
        late = [word for word in rest if "=" in word and not word.startswith("-")]
        args.overrides, rest = args.overrides + late, [word for word in rest if word not in late]
    if rest:
        hint = "; a recipe's values are given as key.name=value" if overridden else ""
        args.parser.error(f"unknown arguments: {' '.join(rest)}{hint}")
    if args.command is None:
        parser.error(f"expected a command: {', '.join(COMMANDS)}")
    return args


def _load(module: str) -> ModuleType:
    """A module of the package that needs PyTorch, behind what the package else imports before and beside it."""
    for needed in ("dph._openmp", "dph.model.auto_classes"):
        importlib.import_module(needed)
    return importlib.import_module(module)


def run(args: argparse.Namespace) -> int:
    """Do what was asked; the exit code."""
    module = _load(COMMANDS[args.command].module)
    return getattr(module, "run" if args.command == "quickstart" else args.command)(args) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = run(parse(argv))
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # --help, or a run that was told to end
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("dph: interrupted", file=sys.stderr)
        return 130
    except Elsewhere:
        return 1
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"dph: error: {explain(error)}", file=sys.stderr)
        return 2 if isinstance(error, USERS) else 1


# Errors that the user can mend; the others are failures.
USERS = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def explain(error: Exception) -> str:
    """One line that says what went wrong."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError | RuntimeError | ImportError) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
