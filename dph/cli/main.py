"""The ``dph`` command: parsing, exit codes and errors.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | wrong input |
| 130 | interrupted by Ctrl-C |
| 143 | ended by SIGTERM (training has written a checkpoint) |

An error is one line on stderr; ``--debug`` adds the traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import dph
from dph.errors import OtherRankFailed, UserError

# Modules of dph.cli, each with HELP (one line), EXAMPLE (command lines), add_arguments(parser) and run(args), which
# returns an exit code or None. PyTorch, transformers and the like are imported in run: --help and errors are fast.
COMMANDS = (
    "quickstart", "train", "cache", "evaluate", "generate", "chat", "score", "plot", "convert", "tokenizer", "doctor",
)  # fmt: skip

# Errors of the user's input (exit code 2); all others are failures (exit code 1).
INPUT_ERRORS = (
    ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError,
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Argument parser with an example in its help; raises UserError instead of exiting."""

    def __init__(self, *args: Any, example: str | None = None, **kwargs: Any) -> None:
        if example is not None:
            title = "examples" if "\n" in example else "example"
            kwargs["epilog"] = f"{title}:\n  " + example.replace("\n", "\n  ")
        kwargs["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self.set_defaults(parser=self)  # a subcommand, which is parsed later, replaces it with its own

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of one call. Raises UserError if they are wrong."""
    parser = Parser(prog="dph", description="Direct Preference Heads: a model that picks its own best answer.")
    parser.add_argument("--version", action="version", version=f"dph {dph.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    called = next((word for word in argv if not word.startswith("-")), None)
    for name in COMMANDS:
        command = _load(name)
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.HELP, example=command.EXAMPLE)
        if name == called:
            command.add_arguments(subparser)
    args, unknown = parser.parse_known_args(argv)
    hint = ""
    if "overrides" in args:
        # argparse reads positional arguments in one run only: overrides behind an option are unknown to it.
        late = [word for word in unknown if "=" in word and not word.startswith("-")]
        args.overrides += late
        unknown = [word for word in unknown if word not in late]
        hint = "; a recipe's values are given as key.name=value"
    if unknown:
        args.parser.error(f"unknown arguments: {' '.join(unknown)}{hint}")
    if args.command is None:
        parser.error(f"expected a command: {', '.join(COMMANDS)}")
    return args


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"dph.cli.{name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        code = _load(args.command).run(args) or 0
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # --help, or a run that was stopped
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("dph: interrupted", file=sys.stderr)
        return 130
    except OtherRankFailed:
        return 1
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"dph: error: {explain(error)}", file=sys.stderr)
        return 2 if isinstance(error, INPUT_ERRORS) else 1


def explain(error: Exception) -> str:
    """Return an error as one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError | RuntimeError | ImportError) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"
