"""Resolution of the names that users give for models and tokenizers: a directory, a run directory or a hub name."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path

from dph.errors import UserError

MANIFEST = "manifest.json"  # of a run's checkpoint: sizes and hashes of its files
log = logging.getLogger(__name__)

TOKENIZER_MARKERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json")  # a tokenizer's directory has one of them


def model_path(name: str) -> str:
    """Return the directory of a model (of a run directory: its ``model`` folder), or a hub name unchanged.

    Raises UserError if ``name`` is neither.
    """
    return _resolve(name, "a model", ("config.json",))


def tokenizer_path(name: str) -> str:
    """Return the directory of a tokenizer (a model's or its own), or a hub name; otherwise as :func:`model_path`."""
    return _resolve(name, "a tokenizer", TOKENIZER_MARKERS)


def _resolve(name: str, kind: str, files: tuple[str, ...]) -> str:
    """Only OWNER/NAME outside ``runs`` and outside existing folders can be a hub name; others use no network."""
    path = Path(name)
    if path.is_dir():
        for directory in (path / "model", path):  # a run directory has a config.json of its own
            for file in files:
                if (directory / file).is_file():
                    return str(directory)
        raise UserError(f"{name}: expected the directory of {kind}, got one without {files[0]}")
    may_be_on_hub = re.fullmatch(r"(?!runs/)\w[\w.-]*/[\w.-]+", name) and not path.parent.is_dir()
    if path.exists():
        raise UserError(f"{name}: expected the directory of {kind}, got a file there")
    if not may_be_on_hub:
        raise UserError(f"{name}: expected the directory of {kind}, got nothing there")
    _announce(name)
    return name


@functools.cache  # once per name, although both model and tokenizer are resolved
def _announce(name: str) -> None:
    """Warn that the hub is used, in place of a dozen lines that its client logs for each retry."""
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()
    log.warning("%s: no such directory here; asking the hub, which may take half a minute", name)
