"""Fingerprints of what a run is made of: training and held-out records, tokenizer, configuration of the model.

A checkpoint holds them, and a resumed run compares them with its own: data or a tokenizer that changed under the same
name would continue as another run. Places do not count, only contents.
"""

import dataclasses
import hashlib
import json
from typing import Any

from dph import chat
from dph.data.sources import fingerprint
from dph.train.config_schema import model_fields, plain
from dph.train.stages.base import Stage


def of_stage(stage: Stage) -> dict[str, Any]:
    """Return the fingerprints as JSON: of each training source, the tokenizer, the model, each held-out source."""
    sampler = stage.batches.records
    sampler = getattr(sampler, "sampler", sampler)  # of a pool of workers
    held_out = {name: fingerprint(records) for name, records in stage.held_out.sources.items()}
    evaluation = [plain(dataclasses.asdict(source)) for source in stage.recipe.evaluation.sources]
    for source in evaluation:
        if source["head"] is None:  # not an option of earlier versions, whose runs are compared too
            del source["head"]
    return {
        "sources": [fingerprint(records) for records in sampler.datasets],
        "sizes": [len(records) for records in sampler.datasets],
        "tokenizer": of_tokenizer(stage.tokenizer),
        "model": of_config(stage.model.config),
        "held_out": held_out,
        "evaluation": evaluation,
    }


def of_tokenizer(tokenizer: Any) -> str:
    """Return a digest of vocabulary, merges, processing, special tokens and a chat template of the tokenizer's own.

    Padding and truncation do not count, and neither does the template of the paper's format.
    """
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    template = chat.own_template(tokenizer)
    special += tokenizer.convert_tokens_to_ids([chat.START, chat.END]) if template is None else [template]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts: Any = [type(tokenizer).__name__, tokenizer.get_vocab()]
    else:
        parts = json.loads(backend.to_str())
        parts = {key: value for key, value in parts.items() if key not in ("version", "padding", "truncation")}
    return _digest([special, _without_defaults(parts)])


def of_config(config: Any) -> str:
    """Return a digest of a ``ModelConfig``: all that the network is made of."""
    return _digest(plain(model_fields(config)))


def _without_defaults(value: Any) -> Any:
    """Return JSON without null and false: an option that a later version adds changes nothing while it is off."""
    if isinstance(value, dict):
        kept = {}
        for key, item in value.items():
            if item is not None and item is not False:
                kept[key] = _without_defaults(item)
        return kept
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
