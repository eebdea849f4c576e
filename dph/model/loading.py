"""Models and tokenizers from a directory, a run directory or a hub name; every error is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dph.chat import END
from dph.checkpoint import RELEASED
from dph.errors import UserError
from dph.model.config import ModelConfig
from dph.model.directories import model_path, tokenizer_path
from dph.model.model import Model

KINDS = (ModelConfig.model_type, RELEASED)


def load_model(name: str, **options: Any) -> Model:
    """Load a model with ``Model.from_pretrained``, without progress bars.

    Raises UserError if there is no model, one of another kind, or a damaged file.
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
        raise _user_error(name, "a model", error) from error


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a directory (a model's or its own) or of a hub name; raises UserError if there is none."""
    from transformers import AutoTokenizer

    path = tokenizer_path(name)
    try:
        return AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise _user_error(name, "a tokenizer", error) from error


def check_tokenizer(model: Model, tokenizer: Any) -> None:
    """Raise UserError if the tokenizer does not match the model's vocabulary and its token ``<|im_end|>``."""
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"tokenizer: expected at most {model.config.vocab_size} tokens, got {len(tokenizer)}")
    end = tokenizer.get_vocab().get(END)
    if end is not None and model.config.im_end_token_id is None:
        model.config.im_end_token_id = end
    if end is not None and end != model.config.im_end_token_id:
        raise UserError(f"tokenizer: expected {END} as id {model.config.im_end_token_id}, got {end}")


def _user_error(name: str, kind: str, error: OSError) -> UserError:
    """``error`` in one line; for a name that is no directory, with the two possibilities."""
    if Path(name).is_dir():
        return UserError(f"{name}: {kind}: {error}")
    return UserError(f"{name}: expected {kind} in a directory (nothing is there) or on the hub, got {error}")
