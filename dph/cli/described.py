"""Description of the command that made results, a JSON object: only the same command goes on with them."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dph.errors import UserError


def parse(line: bytes) -> dict[str, Any]:
    """Return the object of a line of JSON; {} for any other line."""
    with contextlib.suppress(ValueError):
        value = json.loads(line)
        if isinstance(value, dict):
            return value
    return {}


def differing(saved: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """Return the keys of two descriptions whose values differ as JSON."""
    about = json.loads(json.dumps(about))
    return [key for key in {**saved, **about} if saved.get(key) != about.get(key)]


def check_same(saved: Mapping[str, Any], about: Mapping[str, Any], path: Path) -> None:
    """Raise UserError if the results in ``path``, whose description is ``saved``, are those of another command."""
    if keys := differing(saved, about):
        raise UserError(f"--resume: expected the command that began {path}, got another {', '.join(keys)}")


def lock(file: BinaryIO, path: Path) -> None:
    """Lock an open file until it is closed. Raises UserError, which names ``path``, if another process has locked it.

    On file systems without locks nothing happens.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another process is writing these results") from None
    except OSError:
        pass
