"""Multiple-choice tasks of the user: rows with questions, or a YAML file that describes other rows.

A file or folder of rows (``dph.data.files``), or a hub data set (hub:NAME or hub:NAME:CONFIG), has in each row

    question or prompt   a question is followed by its choices as "A. ...", a prompt is used as it is
    choices              list of texts, or JSON of one
    label or answer      the right one: its number from 0, its letter (A, B, ...) or its text; a value that names
                         different choices in two of these ways is an error
    system               system message, in place of the paper's for choices

A YAML file has

    data: questions.jsonl       # a file or folder of rows, relative to this one, or hub:NAME
    prompt: "{passage}\\n{question}"   # over the fields of a row
    system: Answer the question.      # default: that of the paper's choices
    choices: options            # a field with a list of texts (or JSON of one), or a list of texts: [yes, no]
    gold: answer                # the field with the right one, as above
    first: 1                    # number of the first choice (default: 0)
    listed: true                # whether the prompt ends with the choices as "A. ..." (default: false)
    metric: accuracy            # or f1, matthews (default: accuracy)
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dph.errors import UserError, shown, shown_names
from dph.tasks.base import CHOOSE, LETTERS, SPLITS, Doc, Label, Reference, Task, lettered, listed, text, texts

YAML = (".yaml", ".yml")
KEYS = ("data", "prompt", "system", "choices", "gold", "first", "listed", "metric")
ASKED = ("question", "prompt")
METRICS = ("accuracy", "f1", "matthews")
READ = frozenset(("question", "prompt", "choices", "label", "answer", "system"))


def from_hub(name: str) -> Task:
    """Return the task of a hub data set, NAME or NAME:CONFIG, whose rows have questions."""
    return _of_rows(name, **_place(f"hub:{name}", Path()))


def from_file(path: Path) -> Task:
    """Return the task of a file or folder of rows, or of a YAML file. Raises UserError for a malformed YAML file."""
    status = path.stat()
    return _from_file(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _from_file(path: Path, *_version: int) -> Task:
    """Return the task of a version of a file; records ask for it one by one."""
    if path.suffix.lower() in YAML:
        return _from_yaml(path)
    return _of_rows(path.stem, file=path, hub="")


def _place(data: str, folder: Path) -> dict[str, Any]:
    """Return the fields of a task that name its rows, a path in a folder or hub:NAME."""
    if not data.startswith("hub:"):
        return {"file": folder / data, "hub": ""}
    _, name, *config = data.split(":", 2)
    return {"hub": name, "config": config[0] if config else None}


def _listed(value: Any) -> Any:
    """Return the choices of a row; JSON, as in CSV, as a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _choices(value: Any, name: str) -> None:
    """Check the choices of a row."""
    texts(2, len(LETTERS))(_listed(value), name)


def _of_rows(name: str, **place: Any) -> Task:
    """Return the task of rows with questions."""

    def prompt(doc: Doc) -> str:
        if _field(doc, ASKED) == "prompt":
            return doc["prompt"]
        return f"Question: {doc['question']}\n\n{listed(_listed(doc['choices']))}"

    def options(doc: Doc) -> Sequence[str]:
        choices = _listed(doc["choices"])
        return choices if _field(doc, ASKED) == "prompt" else lettered(choices)

    def gold(doc: Doc) -> Label:
        return right_choice(doc, _field(doc, ("label", "answer"), required=False), _listed(doc["choices"]), 0)

    def check(doc: Doc) -> None:
        name = _field(doc, ASKED)
        text(doc[name], name)
        if doc.get("system") is not None:
            text(doc["system"], "system")

    example = {"question": "Which is a gas?", "choices": ["ice", "steam"], "answer": 1}
    return Task(
        name=name,
        **place,
        splits=SPLITS,
        metric="accuracy",
        fields={"choices": _choices},
        read=READ,
        rule=check,
        system=lambda doc: doc.get("system") or CHOOSE,
        prompt=prompt,
        options=options,
        label=Reference("answer", gold),
        example=example,
    )


def _from_yaml(path: Path) -> Task:
    """Return the task that a YAML file describes; all its values are text or lists of texts."""
    settings = _read_yaml(path)
    first = settings.get("first", "0")
    if first not in ("0", "1"):
        raise UserError(f"{path}: first: expected 0 or 1, got {shown(first)}")
    is_listed = settings.get("listed", "false")
    if is_listed not in ("true", "false"):
        raise UserError(f"{path}: listed: expected true or false, got {shown(is_listed)}")
    metric = settings.get("metric", "accuracy")
    if metric not in METRICS:
        raise UserError(f"{path}: metric: expected {', '.join(METRICS)}, got {shown(metric)}")
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(settings["prompt"]) if name is not None}
    except ValueError as error:
        raise UserError(
            f"{path}: prompt: expected fields in braces, got {shown(settings['prompt'])}: {error}"
        ) from None
    if unusual := sorted(name for name in names if not name.isidentifier()):
        raise UserError(f"{path}: prompt: expected names of fields in braces, got {shown(unusual[0])}")
    fields, choices, gold = dict.fromkeys(sorted(names), text), settings["choices"], settings["gold"]
    answers: tuple[str, ...] | Callable[[Doc], Sequence[str]]
    if isinstance(choices, str):
        fields[choices] = _choices

        def answers(doc: Doc) -> Sequence[str]:
            return _listed(doc[choices])
    else:
        texts(2, len(LETTERS))(choices, f"{path}: choices")
        answers = tuple(choices)

    def contents(doc: Doc) -> Sequence[str]:
        return answers(doc) if callable(answers) else answers

    def prompt(doc: Doc) -> str:
        asked = settings["prompt"].format_map(doc)
        return f"{asked}\n\n{listed(contents(doc))}" if is_listed == "true" else asked

    return Task(
        name=path.stem,
        **_place(settings["data"], path.parent),
        definition=blake2b(path.read_bytes(), digest_size=16).hexdigest(),
        splits=SPLITS,
        metric=metric,
        fields=fields,
        read=frozenset((*fields, gold)),
        system=settings.get("system", CHOOSE),
        prompt=prompt,
        options=(lambda doc: lettered(contents(doc))) if is_listed == "true" else answers,
        label=Reference(gold, lambda doc: right_choice(doc, gold, contents(doc), int(first)), int(first)),
        example={},
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    """Return the settings of a YAML file, all of whose scalars are text. Raises UserError if it is malformed."""
    import yaml

    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # which makes text only
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: expected YAML, got what it cannot be: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected the settings of a task ({', '.join(KEYS)}), got {shown(settings)}")
    if unknown := sorted(settings.keys() - set(KEYS)):
        raise UserError(f"{path}: {unknown[0]}: expected one of {', '.join(KEYS)}")
    for key in ("data", "prompt", "choices", "gold"):
        if key not in settings:
            raise UserError(f"{path}: expected {key}, got {shown_names(settings)}")
    for key, value in settings.items():
        if not isinstance(value, str) and key != "choices":
            raise UserError(f"{path}: {key}: expected text, got {shown(value)}")
    return settings


def right_choice(doc: Doc, key: str, choices: Sequence[str], first: int) -> Label:
    """Return the index of the right choice: a number, a letter, or the text of one; None if it is hidden.

    Raises UserError for anything else.
    """
    value = doc.get(key)
    if value is None or value == "" or (value == -1 and not isinstance(value, bool)):
        return None
    named = {i for i, choice in enumerate(choices) if choice == value}
    others = range(len(choices))
    if isinstance(value, int) and not isinstance(value, bool):
        named.update(others[value - first : value - first + 1] if value >= first else ())
    elif isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        named.update(others[int(value) - first : int(value) - first + 1] if int(value) >= first else ())
    elif isinstance(value, str) and len(value) == 1 and (letter := LETTERS.find(value.upper())) >= 0:
        named.update(others[letter : letter + 1])
    if len(named) != 1:
        expected = f"a number from {first} to {first + len(choices) - 1}, a letter, or the text of one choice"
        numbers = ", ".join(str(index + first) for index in sorted(named))
        got = f"{shown(value)}, which is the text, number or letter of the choices {numbers}" if named else shown(value)
        raise UserError(f"{key}: expected {expected}, got {got}")
    return named.pop()


def _field(doc: Doc, names: Sequence[str], required: bool = True) -> str:
    """Return which of two fields a row has, the first if it has none and need not have one.

    Raises UserError if it has both, or none of two of which it needs one.
    """
    given = [name for name in names if doc.get(name) is not None]
    if len(given) == 2:
        raise UserError(f"expected either {' or '.join(names)}, got both")
    if not given and required:
        raise UserError(f"expected {' or '.join(names)}, got the fields {shown_names(doc)}")
    return given[0] if given else names[0]
