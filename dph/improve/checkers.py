"""Checkers: whether an answer is right, by a function, a program, reference answers or another reward head.

| ``--judge`` | an answer is right if |
|---|---|
| ``reference`` | it equals one of the row's ``reference`` answers (a text, a number or a list) after a normaliser |
| ``head:DIR`` | its probability by the head in DIR (of the same backbone, or of a model or run) is at least 0.5 |
| ``module:function`` | ``function(row, answer)`` is true, or a share of at least 0.5 |
| a program and its arguments | the program, started once, says so |

Rewards of a head become probabilities by its calibration (``dph card``), else by the logistic function, which fits the
separable objective. A program reads a line of JSON for each answer, the row with its ``messages`` and the ``answer``,
and writes a line for each: true, false, a number from 0 to 1, or an object with such a value in ``correct``. It has to
flush its output.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import select
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dph.errors import UserError, one_line, shown

if TYPE_CHECKING:
    from dph.improve.prompts import Prompt
    from dph.model.judging import JudgingModel

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
TIMEOUT = 60.0  # seconds in which a program has to judge an answer
PATIENCE = 5.0  # seconds in which a program has to end after the end of its input


class Checker(Protocol):
    """Function from a prompt and answers to how right each is, from 0 to 1."""

    def __call__(self, prompt: Prompt, answers: Sequence[str]) -> list[float]:
        """Return a number for each answer. Raises UserError, which names the answer, if there is none."""


@contextlib.contextmanager
def open_checker(
    name: str,
    prompts: Sequence[Prompt],
    *,
    normalise: Callable[[str], str] = str.strip,
    backbone: str | None = None,
    open_model: Callable[[str], tuple[JudgingModel, Any]] | None = None,
    timeout: float = TIMEOUT,
) -> Iterator[Checker]:
    """Context with the checker ``name``, a value of ``--judge``.

    Args:
        name: see the table of the module.
        prompts: all that will be checked.
        normalise: answers and references that become equal count as equal; for "reference".
        backbone: path of the model that a head belongs to whose directory holds the head alone.
        open_model: returns the model and tokenizer of a path; for heads.
        timeout: seconds in which a program has to judge an answer.

    Raises UserError if there is no such checker, or if a row lacks what it needs.
    """
    if name == "reference":
        yield ReferenceChecker(prompts, normalise)
    elif name.startswith("head:"):
        yield HeadChecker(name.removeprefix("head:"), backbone, open_model or _opened)
    elif FUNCTION.fullmatch(name):
        yield FunctionChecker(imported(name), name)
    else:
        checker = ProgramChecker(name, timeout)
        try:
            yield checker
        finally:
            checker.close()


def content_of(name: str) -> dict[str, str]:
    """Return digests of the files of the checker ``name`` by path: another content may judge in another way.

    These are the module of a function, those among a program's words, and those of a head or its model.
    """
    if name.startswith("head:"):
        folder = Path(name.removeprefix("head:"))
        folder = folder / "model" if (folder / "model").is_dir() else folder  # of a run
        files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    elif FUNCTION.fullmatch(name):
        files = [Path(inspect.getfile(imported(name)))]
    elif name == "reference":
        files = []
    else:
        files = [Path(word) for word in shlex.split(name) if Path(word).is_file()]
    digests = {}
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for block in iter(functools.partial(file.read, 1 << 20), b""):
                digest.update(block)
        digests[str(path)] = digest.hexdigest()
    return digests


class ReferenceChecker:
    """Comparison with the reference answers of the rows."""

    def __init__(self, prompts: Sequence[Prompt], normalise: Callable[[str], str]) -> None:
        self._normalise = normalise
        for prompt in prompts:
            self._references(prompt)

    def _references(self, prompt: Prompt) -> set[str]:
        value = prompt.row.get("reference")
        values = value if isinstance(value, list) else [value]
        for one in values or [None]:
            if isinstance(one, bool) or not isinstance(one, str | int | float):
                raise UserError(
                    f"{prompt.place}: reference: expected the right answer (a text or a number) or a list of them, got "
                    f"{shown(value)}"
                )
        return {self._normalise(str(one)) for one in values}

    def __call__(self, prompt: Prompt, answers: Sequence[str]) -> list[float]:
        """Return 1 for each answer that equals a reference."""
        references = self._references(prompt)
        return [float(self._normalise(answer) in references) for answer in answers]


class FunctionChecker:
    """A function from a row, with its ``messages``, and an answer to a bool or a number from 0 to 1.

    ``name`` is that of the function in errors.
    """

    def __init__(self, function: Callable[[Mapping[str, Any], str], Any], name: str) -> None:
        self._function, self._name = function, name

    def __call__(self, prompt: Prompt, answers: Sequence[str]) -> list[float]:
        """Return what the function returns, as numbers."""
        row, values = row_of(prompt), []
        for answer in answers:
            where = f"{self._name}: answer {shown(answer)} to {prompt.place}"
            try:
                value = self._function(row, answer)
            except Exception as error:
                raise UserError(f"{where}: raised {type(error).__name__}: {one_line(error, 300)}") from error
            values.append(checked(value, where))
        return values


class ProgramChecker:
    """A program that reads and writes lines of JSON; it is started once.

    Raises UserError if it cannot be started.
    """

    def __init__(self, command: str, timeout: float = TIMEOUT) -> None:
        self._command, self._timeout, self._unread = command, timeout, b""
        try:
            words = shlex.split(command)
            self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except (OSError, ValueError, IndexError) as error:
            raise UserError(
                f"--judge: expected reference, head:DIR, module:function or a program, got {shown(command)}: "
                f"{one_line(error, 200)}"
            ) from None

    def __call__(self, prompt: Prompt, answers: Sequence[str]) -> list[float]:
        """Return the program's judgements of the answers."""
        row = row_of(prompt)
        self._check_no_more(f"{self._command}: before {prompt.place}")
        lines = [json.dumps({**row, "answer": answer}, default=str) + "\n" for answer in answers]
        writer = threading.Thread(target=self._write, args=("".join(lines).encode(),), daemon=True)
        writer.start()  # while answers are read: neither side may wait for the other's full pipe
        values = []
        for answer in answers:
            where = f"{self._command}: answer {shown(answer)} to {prompt.place}"
            line = self._read_line(where)
            try:
                value = json.loads(line)
            except ValueError:
                value = line.decode(errors="replace")
            values.append(checked(value.get("correct") if isinstance(value, dict) else value, where))
        writer.join()
        self._check_no_more(where)
        return values

    def _check_no_more(self, where: str) -> None:
        """Raise UserError for a line that no answer belongs to: all later ones would be those of other answers."""
        output = self._process.stdout
        if not self._unread and select.select([output], [], [], 0)[0]:
            self._unread = os.read(output.fileno(), 1 << 16)
        if self._unread:
            line = self._unread.decode(errors="replace").splitlines()[0]
            raise UserError(f"{where}: expected one line of JSON, got more: {shown(line)}")

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a program that has ended: reading reports it
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def _read_line(self, where: str) -> bytes:
        """Return the next line. Raises UserError if the program ends or writes none in time."""
        output, end = self._process.stdout, time.monotonic() + self._timeout
        while b"\n" not in self._unread:
            ready, _, _ = select.select([output], [], [], max(end - time.monotonic(), 0.0))
            if not ready:
                raise UserError(
                    f"{where}: expected a line of JSON within {self._timeout:g} s, got none: does the program flush "
                    "its output after each line?"
                )
            data = os.read(output.fileno(), 1 << 16)
            if not data:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(PATIENCE)
                raise UserError(
                    f"{where}: expected a line of JSON, got the end of the program's output (exit code "
                    f"{self._process.poll()})"
                )
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def close(self) -> None:
        """End the program: its input ends, and it is killed if it does not end by itself."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class HeadChecker:
    """Another reward head, whose rewards are read as probabilities: those of its calibration, if it has one.

    Args:
        path: a model or run directory, or the directory of a head of ``backbone``.
        backbone, open_model: see :func:`open_checker`.
    """

    def __init__(self, path: str, backbone: str | None, open_model: Callable[[str], tuple[JudgingModel, Any]]) -> None:
        from dph.infer.best_of_n import probabilities
        from dph.model import head_file

        self._probabilities = probabilities
        if Path(path, head_file.DESCRIPTION).is_file():
            if backbone is None:
                raise UserError(f"--judge: expected a model or run, got the head {path} without its backbone")
            self._model, self._tokenizer = open_model(backbone)
            self._head = self._model.load_head(path, "judge")
        else:
            self._model, self._tokenizer = open_model(path)
            self._head = next(iter(self._model.head_names), "default")
            try:
                self._model.check_heads(self._head)
            except ValueError as error:
                raise UserError(f"--judge: {path}: {error}") from None
        self._model.eval()

    def __call__(self, prompt: Prompt, answers: Sequence[str]) -> list[float]:
        """Return the probabilities that the answers are good."""
        conversations = [[*prompt.messages, {"role": "assistant", "content": answer}] for answer in answers]
        rewards = self._model.score(self._tokenizer, conversations, self._head).tolist()
        return self._probabilities(self._model, self._head)(rewards)


def _opened(path: str) -> tuple[JudgingModel, Any]:
    from dph.model.loading import load_model, load_tokenizer

    return load_model(path), load_tokenizer(path)


def imported(name: str) -> Callable[[Mapping[str, Any], str], Any]:
    """Return the function ``module:function``; the current directory is searched first.

    Raises UserError if there is none.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:  # as with python -m
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise UserError(
            f"--judge: expected a module that can be imported, got {module}: {type(error).__name__}: "
            f"{one_line(error, 300)}"
        ) from error
    if not callable(found):
        raise UserError(f"--judge: expected a function of {module}, got {function}, which is none")
    return found


def row_of(prompt: Prompt) -> dict[str, Any]:
    """Return what functions and programs get: the fields of the row, and the ``messages`` of the conversation."""
    return {**prompt.row, "messages": prompt.messages}


def checked(value: Any, where: str) -> float:
    """Return a judgement as a number. Raises UserError, which begins with ``where``, for another value."""
    if not isinstance(value, bool | int | float) or not (math.isfinite(value) and 0 <= value <= 1):
        raise UserError(f"{where}: expected true, false or a number from 0 to 1, got {shown(value)}")
    return float(value)
