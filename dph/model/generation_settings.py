"""Settings of generation that come with a model."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from dph._folder import find_file, read_json, refuse_code
from dph.errors import UserError, shown

# Settings of generation_config.json that transformers uses without a check of their type.
GENERATION_NUMBERS = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "max_length", "max_new_tokens", "min_length",
    "min_new_tokens", "num_beams", "num_return_sequences", "repetition_penalty", "length_penalty",
)  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation_config(path: str | os.PathLike, hub: Mapping[str, Any]) -> GenerationConfig | None:
    """Return the settings of a model's generation_config.json, on disk or hub; None if there is none.

    Raises UserError, which begins with the file, if transformers cannot use them.
    """
    file = find_file("generation_config.json", path, hub)
    if file is None:
        return None
    fields = read_json(file)
    refuse_code(fields, str(file))
    for name in TOKEN_IDS:
        ids = fields.get(name)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and (not isinstance(token, int) or isinstance(token, bool)):
                raise UserError(f"{file}: {name}: expected a whole number, got {shown(token)}")
    for name in GENERATION_NUMBERS:
        value = fields.get(name)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise UserError(f"{file}: {name}: expected a number, got {shown(value)}")
    try:
        return GenerationConfig.from_dict(fields)
    except Exception as error:  # of any kind, from transformers' checks of its settings
        raise UserError(f"{file}: expected settings of generation, got: {shown(str(error))}") from error


def allow_saving(config: GenerationConfig) -> None:
    """Mark settings as those of a file: transformers saves these even if it warns about them.

    It raises for others, which would end a run without its model: released files have a temperature without do_sample
    (Vicuna), and trainers change settings of tokens.
    """
    config._original_object_hash = hash(config)
