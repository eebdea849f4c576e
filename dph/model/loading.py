"""Opening what the user names: a model directory, a run, a tokenizer directory or a hub name. Errors are one line."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dph.checkpoint import RELEASED
from dph.errors import UserError
from dph.model.config import ModelConfig
from dph.model.model import Model

log = logging.getLogger(__name__)

KINDS = (ModelConfig.model_type, RELEASED)
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json")  # a tokenizer's directory has one of them


def model_path(name: str) -> str:
    """The directory that ``name`` stands for (that of a run: its ``model`` folder), or a hub name as it is."""
    return _find(name, "a model", ("config.json",), "config.json")


def _find(name: str, what: str, files: tuple[str, ...], missing: str) -> str:
    """Only OWNER/NAME can be a hub name, and not in runs or a folder that is here: no other reaches the network."""
    path = Path(name)
    if path.is_dir():
        for place in (path / "model", path):  # a run has a config.json of its own
            if any((place / file).is_file() for file in files):
                return str(place)
        raise UserError(f"{name}: expected the directory of {what}, got one without {missing}")
    on_hub = re.fullmatch(r"(?!runs/)\w[\w.-]*/[\w.-]+", name) and not path.parent.is_dir()
    if path.exists() or not on_hub:
        raise UserError(
            f"{name}: expected the directory of {what}, got {'a file' if path.exists() else 'nothing'} there"
        )
    _announce(name)
    return name


@functools.cache  # once for a name, which model and tokenizer are both asked for by
def _announce(name: str) -> None:
    """Say that the hub is asked, in place of a dozen lines of its client on each try that it repeats."""
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()
    log.warning("%s: no such directory here; asking the hub, which may take half a minute", name)


def _unread(name: str, what: str, error: OSError) -> UserError:
    """``error`` in one line; of a name that the hub was asked for, with what it could have been."""
    if Path(name).is_dir():
        return UserError(f"{name}: {what}: {error}")
    return UserError(f"{name}: expected {what} in a directory (nothing is there) or on the hub, got {error}")


def load_model(name: str, **options: Any) -> Model:
    """``Model.from_pretrained`` without progress bars.

    Raises UserError where there is no model, or one of another kind.
    """
    from transformers.utils.logging import disable_progress_bar

    path = model_path(name)
    disable_progress_bar()
    try:
        kind = ModelConfig.get_config_dict(path)[0].get("model_type")
        if kind not in KINDS:
            got = kind or "a config.json without a model_type (a run that is not finished holds no model)"
            raise UserError(f"{name}: expected a model of type {' or '.join(KINDS)}, got {got}")
        return Model.from_pretrained(path, **options)
    except SafetensorError as error:
        raise UserError(f"{path}: expected whole safetensors files, got a damaged one: {error}") from error
    except OSError as error:
        raise _unread(name, "a model", error) from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a directory (a model's or its own) or of a hub name. UserError where there is none."""
    from transformers import AutoTokenizer

    path = _find(name, "a tokenizer", TOKENIZERS, "tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise _unread(name, "a tokenizer", error) from error
