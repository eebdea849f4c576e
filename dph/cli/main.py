"""The ``dph`` command: parsing, exit codes and errors.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | wrong input |
| 130 | interrupted by Ctrl-C |
| 143 | ended by SIGTERM (training has written a checkpoint); 129 by SIGHUP, 152 by SIGXCPU |

An error is one line on stderr; ``--debug`` adds the traceback. A closed or full stdout is an error (of a pipe without a
reader no more is said), a closed or full stderr is none (:mod:`dph.cli.streams`).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import dph
from dph._openmp import sleeping_when_contended
from dph.cli import streams
from dph.errors import OtherRankFailed, UserError, printable

# Modules of dph.cli, each with HELP (one line), EXAMPLE (command lines), add_arguments(parser) and run(args), which
# returns an exit code or None. PyTorch, transformers and the like are imported in run: --help and errors are fast.
COMMANDS = (
    "quickstart", "data", "train", "improve", "ablate", "cache", "evaluate", "generate", "chat", "serve", "score",
    "heads", "card", "tasks", "plot", "convert", "tokenizer", "doctor",
)  # fmt: skip

# Errors of the user's input (exit code 2); all others are failures (exit code 1).
INPUT_ERRORS = (
    ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError,
)  # fmt: skip

INPUT_ERRNOS = (errno.ENAMETOOLONG, errno.ELOOP)  # of a plain OSError: a path that no file can have

MAX_WORD, MAX_LINE = 300, 2000  # characters of an error


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
    streams.install()
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _run(argv)
        if code == 0:  # an error of the command is reported before one of its output
            streams.flush()
        return code
    except KeyboardInterrupt as stop:
        print("; ".join(["dph: interrupted", *_notes(stop)]), file=sys.stderr)
        return 130
    except OtherRankFailed:
        return 1
    except Exception as error:
        is_output = isinstance(error, OSError) and error.filename == streams.STDOUT
        if is_output and isinstance(error, BrokenPipeError):  # the reader, such as `head`, has enough
            return 1
        if "--debug" in argv:
            print(printable(traceback.format_exc()), end="", file=sys.stderr)
        print(f"dph: error: {explain(error)}", file=sys.stderr)
        is_input = isinstance(error, INPUT_ERRORS) or (isinstance(error, OSError) and error.errno in INPUT_ERRNOS)
        return 2 if is_input and not is_output else 1
    finally:
        with contextlib.suppress(OSError):
            streams.flush()


def _run(argv: Sequence[str]) -> int:
    """Run one command; the exit code."""
    try:
        args = parse(argv)
        with sleeping_when_contended():
            return _load(args.command).run(args) or 0
    except SystemExit as stop:  # --help, or a run that was stopped
        if isinstance(stop.code, str):
            raise RuntimeError(stop.code) from None
        return stop.code or 0


def explain(error: Exception) -> str:
    """Return an error with its notes as one line without control characters; very long words and lines are cut."""
    return "; ".join([_explain_alone(error), *_notes(error)])


def _notes(error: BaseException) -> list[str]:
    return [printable(note, keep="") for note in getattr(error, "__notes__", ())]


def _explain_alone(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        name = printable(str(error.filename), keep="") or "''"
        return _cut(f"{name}: {error.strerror}", MAX_LINE)
    words = [_cut(word, MAX_WORD) for word in str(error).split()]
    text = _cut(printable(" ".join(words), keep=""), MAX_LINE)
    if isinstance(error, ValueError | OSError | RuntimeError | ImportError) and text:
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ") + " (--debug shows where)"


def _cut(text: str, length: int) -> str:
    """Return the text without its middle if it is longer than ``length``."""
    if len(text) <= length:
        return text
    return f"{text[: length * 3 // 4]}...{text[-length // 4 :]}"
