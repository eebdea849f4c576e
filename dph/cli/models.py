"""The model that a command was given, and JSON lines out."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch

from dph import devices
from dph.errors import UserError
from dph.model.loading import load_model, load_tokenizer
from dph.model.model import Model
from dph.train.build import check_tokenizer


def open_model(args: argparse.Namespace) -> tuple[Model, Any]:
    """Model in evaluation mode, where and as ``--device`` and ``--dtype`` say, and its tokenizer."""
    device = devices.choose(args.device, "--device")
    dtype = ("float32" if device == "cpu" else "bfloat16") if args.dtype == "auto" else args.dtype
    model = load_model(args.model, dtype=getattr(torch, dtype))
    tokenizer = load_tokenizer(args.model)
    check_tokenizer(model, tokenizer)
    return model.to(device).eval(), tokenizer


def check_head(model: Model, head: str, instead: str) -> None:
    """Raise UserError where the head cannot judge; ``instead`` says how to do without."""
    try:
        model.check_heads(head)
    except ValueError as error:
        raise UserError(f"{error}; {instead}") from None


def dumps(value: Any) -> str:
    """One line of JSON; what is not finite, which JSON does not have, becomes null."""
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
