"""JSON files of a model's folder, read within bounds; keys that name code to run or kernels to fetch are refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dph.errors import UserError, shown, shown_names

MAX_JSON = 64 * 2**20  # bytes of one file; the largest in use, settings of tokenizers, have a tenth of that

# Keys that make transformers import Python or other formats than safetensors from a folder or the hub.
CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate", "use_kernels", "kernel_config", "gguf_file")
# The classes of this package, as our folders name them for programs that were not told of it; nothing reads them here.
MODULE = "modeling_dph"
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.ModelConfig",
    "AutoModel": f"{MODULE}.BaseModel",
    "AutoModelForCausalLM": f"{MODULE}.Model",
    "AutoModelForSequenceClassification": f"{MODULE}.RewardModel",
}

# Keys that hold the name of an implementation: of transformers, or OWNER/NAME for a kernel of the hub.
IMPLEMENTATION_KEYS = re.compile(r"_?(attn|experts)_implementation(_internal)?")


def find_file(
    name: str, path: str | os.PathLike, hub: Mapping[str, Any] | None = None, *, offline: bool = False
) -> Path | None:
    """Return the path of a file of a model, None if there is none.

    Args:
        name: of the file.
        path: folder, or the name of a model on the hub, from which the file is downloaded.
        hub: arguments for downloads; ``subfolder`` also counts in a folder.
        offline: whether a file that is not in the cache while the hub cannot be reached counts as none.
    """
    hub = hub or {}
    if os.path.isdir(path):
        file = Path(path, hub.get("subfolder") or "", name)
        return file if os.path.lexists(file) else None
    from transformers.utils import cached_file

    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": not offline}
    found = cached_file(path, name, **hub, **optional)
    return None if found is None else Path(found)


def describe_other(path: Path) -> str | None:
    """Return what there is in place of a regular file, for a message; None if ``path`` is a regular file."""
    if path.is_file():
        return None
    if path.is_dir():
        return "a folder"
    if path.is_symlink():
        return f"a link to {shown(str(path.readlink()))}, which does not exist"
    return "a pipe or device" if path.exists() else "nothing there"


def read_text(path: str | Path, kind: str = "a text file") -> str:
    """Return the text of a file of a folder.

    Raises UserError, which begins with the path, for anything else: no regular file, unreadable, larger than 64 MiB, or
    not UTF-8; ``kind`` names what was expected.
    """
    path = Path(path)
    if got := describe_other(path):
        raise UserError(f"{path}: expected {kind}, got {got}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON + 1)
        if len(content) > MAX_JSON:
            raise UserError(f"{path}: expected {kind} of at most {MAX_JSON >> 20} MiB, got a larger one")
        return content.decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, got: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8, got another byte at position {error.start}") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file of a folder.

    Raises UserError, which begins with the path, for anything else: no regular file, unreadable, larger than 64 MiB,
    not UTF-8, not JSON, nested too deeply, numbers of thousands of digits, or a value that is no object.
    """
    text = read_text(path, "a JSON file")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: expected JSON, got: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{path}: expected JSON of a usual depth, got hundreds of nested lists or objects") from None
    except ValueError:
        raise UserError(f"{path}: expected numbers of a usual size, got an integer of thousands of digits") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {shown(value)}")
    return value


def refuse_code(fields: dict[str, Any], where: str) -> None:
    """Raise UserError, which begins with ``where``, if a key at any depth names code to run or a kernel to fetch."""
    for name, key, value in _entries(fields):
        names_code = key in CODE_KEYS and value not in (None, False, "", [], {}, AUTO_MAP)
        if names_code or (IMPLEMENTATION_KEYS.fullmatch(key) and _names_kernel(value)):
            raise UserError(
                f"{where}: {name}: expected no code or kernel to load (dph runs none that comes with a model), "
                f"got {shown(value)}"
            )


def _entries(fields: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted name, key, value) of all entries of nested objects."""
    pending: list[tuple[str, Any]] = [("", fields)]  # a list in place of recursion: JSON may be nested deeply
    while pending:
        prefix, value = pending.pop()
        if isinstance(value, list):
            pending += [(prefix, item) for item in value]
        elif isinstance(value, dict):
            for key, item in value.items():
                yield f"{prefix}{shown_names([key])}", str(key), item
                if isinstance(item, dict | list):
                    pending.append((f"{prefix}{shown_names([key])}.", item))


def _names_kernel(value: Any) -> bool:
    """Whether an implementation, or one of those by part of the model, is OWNER/NAME of the hub."""
    if isinstance(value, dict | list):
        return any(map(_names_kernel, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and "/" in value
