"""Models and tokenizers from a directory, a run directory or a hub name; every error is one line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, PreTrainedModel

from dph._folder import describe_other, find_file, read_json, refuse_code
from dph.chat import end_of_turn, tokenizer_name
from dph.errors import UserError, one_line, shown
from dph.model.attached import AttachedConfig, AttachedModel
from dph.model.config import HUB_ARGUMENTS, ModelConfig, check_fields, hub_arguments, list_of_names, read_fields
from dph.model.directories import model_path, tokenizer_path
from dph.model.judging import JudgingModel
from dph.model.model import LAYOUTS, Model

_reason = partial(one_line, most=300)  # the message of another library's error

# Files whose keys transformers reads for a tokenizer; those of processors are read by others who open the folder.
SETTINGS = (
    "config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json")


def load_model(name: str | os.PathLike, **options: Any) -> Model | AttachedModel:
    """Load a model of any type, without progress bars.

    Those of :meth:`dph.Model.from_pretrained` by it, other causal language models of transformers attached, without
    heads of their own. ``options``: ``dtype``, arguments for downloads, and fields of the configuration.

    Raises UserError if there is no model, one of another kind, or a file that is broken or lacks weights.
    """
    from transformers.utils.logging import disable_progress_bar

    path = model_path(str(name))
    disable_progress_bar()
    try:
        kind = read_fields(path, **hub_arguments(options)).get("model_type")
        if kind == AttachedConfig.model_type:
            return AttachedModel.from_pretrained(path, **options)
        if kind in LAYOUTS or kind not in CONFIG_MAPPING:
            return Model.from_pretrained(path, **options)
        return AttachedModel.from_transformers(path, **options)
    except SafetensorError as error:
        raise UserError(f"{path}: expected whole safetensors files, got a damaged one: {_reason(error)}") from error
    except OSError as error:
        raise _user_error(str(name), "a model", error) from error


def attach(
    model: str | os.PathLike | PreTrainedModel,
    heads: Sequence[str] = ("default",),
    pooler: str = "swiglu_bert",
    layer: int = -1,
    *,
    dropout: float = 0.1,
    standardised: bool = False,
    **options: Any,
) -> Model | AttachedModel:
    """Return a language model with reward heads, for any causal language model of transformers.

    A directory or name of a type that :meth:`dph.Model.from_pretrained` opens (Llama, Mistral, Qwen2, Qwen3 and our
    own) becomes a :class:`dph.Model`. All others, such as GPT-2, GPT-NeoX, OPT, Gemma or Phi, become an
    ``AttachedModel`` around transformers' own network, which is frozen: ``judge``, ``score``, ``rewards``,
    :func:`dph.best_of_n` and stage ``head`` work alike. New heads are untrained, and raise if they are used to score.

    Args:
        model: directory or name of a model with safetensors, or a transformers model, of whatever type, with its
            weights: it is frozen in place.
        heads: names of the heads; those that a directory has already are kept as they are.
        pooler: of new heads, one of ``dph.model.config.POOLERS``.
        layer: number of the block whose input new heads judge; -1 for the states after the final norm.
        dropout, standardised: of new heads, as ``reward_dropout`` and ``reward_standardised`` of ``ModelConfig``.
        options: ``dtype`` of the weights (by default that of the file), and arguments for downloads.

    The tokenizer needs a chat template, or the paper's format two tokens for which the embedding has unused rows (OPT
    and GPT-NeoX have some, GPT-2 has none). A family's model with settings that ours cannot compute, such as a sliding
    window, can be given as a transformers model. No code that comes with a model runs.

    Raises UserError for broken files, code, models of another kind, such as encoders, and unknown options.
    """
    heads = list_of_names("heads", heads)
    is_network = isinstance(model, PreTrainedModel) and not isinstance(model, JudgingModel)
    if unknown := sorted(options.keys() - (() if is_network else {"dtype", *HUB_ARGUMENTS})):
        raise UserError(f"attach: expected no {', '.join(unknown)}{' with a network in memory' * is_network}")
    form = {"pooler": pooler, "layer": layer, "dropout": dropout, "standardised": standardised}
    fields = {f"reward_{name}": value for name, value in form.items()}
    if is_network:
        return AttachedModel.from_network(model, reward_heads=heads, **fields)
    if not isinstance(model, str | os.PathLike):
        raise UserError(
            f"model: expected a directory, a name or a model of transformers, got {type(model).__name__}: a dph model "
            "has heads of its own (load_head adds one)"
        )
    path, hub = model_path(str(model)), hub_arguments(options)
    kind = read_fields(path, **hub).get("model_type")
    if kind in LAYOUTS or kind == AttachedConfig.model_type:
        config = (ModelConfig if kind in LAYOUTS else AttachedConfig).from_pretrained(path, **hub)
        new = [name for name in heads if name not in (*config.reward_heads, *config.task_heads)]
        fields |= {"reward_heads": heads}
        if config.reward_heads or config.task_heads:
            forms = dict(config.task_head_forms)
            for name in new:
                forms[name] = {**form, "intermediate_size": config.intermediate_size}
            fields = {"task_heads": [*config.task_heads, *new], "task_head_forms": forms}
        return load_model(model, **fields, **options)
    attached = load_model(model, reward_heads=heads, **fields, **options)
    with contextlib.suppress(UserError):  # no tokenizer, or one without a chat format
        attached.config.im_end_token_id = end_of_turn(load_tokenizer(str(model), **hub))
    return attached


def load_tokenizer(name: str, **hub: Any) -> Any:
    """Load the tokenizer of a directory (a model's or its own) or of a hub name (``hub`` for downloads).

    Raises UserError if there is none, if one of its files is broken, or if one names code to run.
    """
    from transformers import AutoTokenizer

    path = tokenizer_path(name)
    try:
        check_settings(path, hub)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **hub)
        tokenizer.encode("")  # fails if settings that are only used later have the wrong type
        size = len(tokenizer)
    except UserError:
        raise
    except OSError as error:
        if not os.path.isdir(path):
            raise _user_error(name, "a tokenizer", error) from error
        raise _broken_tokenizer(path, error) from error
    except Exception as error:  # of any kind: the files' content goes through many parsers
        raise _broken_tokenizer(path, error) from error
    if not size:
        raise UserError(f"{path}: expected a tokenizer with tokens, got an empty one")
    return tokenizer


def check_settings(path: str, hub: Mapping[str, Any] | None = None) -> None:
    """Raise UserError if a settings file of a tokenizer or processor is broken or names code to run.

    ``path`` is a folder, or the name of a model on the hub (``hub`` for downloads), of which the files that
    AutoTokenizer reads are checked.
    """
    for name in SETTINGS:
        if name == "config.json" and os.path.isdir(path):
            if os.path.lexists(os.path.join(path, name)):
                check_fields(read_fields(path), path)
        elif file := find_file(name, path, hub):
            fields = read_json(file)
            refuse_code(fields, str(file))
            _check_tokens(name, fields, str(file))


def _check_tokens(name: str, fields: dict[str, Any], where: str) -> None:
    """Raise UserError for special tokens that are neither text nor described, ids that are no numbers, and lengths."""
    if name == "added_tokens.json":
        for token, number in fields.items():
            if not isinstance(number, int) or isinstance(number, bool):
                raise UserError(f"{where}: {shown(token)}: expected the token's id, got {shown(number)}")
    elif name in ("tokenizer_config.json", "special_tokens_map.json"):
        for key in (f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")):
            value = fields.get(key)
            described = isinstance(value, dict) and isinstance(value.get("content"), str)
            if not (value is None or isinstance(value, str) or described):
                raise UserError(f"{where}: {key}: expected text, or an object with content, got {shown(value)}")
        length = fields.get("model_max_length")
        if length is not None and (not isinstance(length, int | float) or not length >= 1):
            raise UserError(f"{where}: model_max_length: expected a number of at least 1, got {shown(length)}")


def _broken_tokenizer(path: str, error: Exception) -> UserError:
    """Return an error in one line that names the file to blame for ``error``."""
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

    folder = Path(path)
    vocabularies = [name for name in VOCABULARIES if os.path.lexists(folder / name)]
    if folder.is_dir() and not vocabularies:
        return UserError(f"{path}: expected the vocabulary of a tokenizer, such as tokenizer.json, got none")
    file = folder / "tokenizer.json"
    if os.path.lexists(file):
        if got := describe_other(file):
            return UserError(f"{file}: expected a tokenizer, got {got}")
        try:
            Tokenizer.from_file(str(file))
        except Exception as reason:
            return UserError(f"{file}: expected a tokenizer, got a file that cannot be read: {_reason(reason)}")
        try:
            if not isinstance(read_json(file).get("added_tokens"), list):  # tokenizers does not need it
                return UserError(f"{file}: added_tokens: expected a list, got none")
        except UserError as reason:
            return reason
    if (folder / "config.json").is_file():
        try:
            PretrainedConfig.from_dict(read_json(folder / "config.json"))  # as AutoTokenizer does
        except Exception as reason:
            return UserError(f"{folder / 'config.json'}: expected settings of a model, got: {_reason(reason)}")
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    where = ", ".join(str(folder / name) for name in names if (folder / name).is_file()) or path
    got = f"{type(error).__name__}: {_reason(error)}"
    return UserError(f"{where}: expected settings of a tokenizer that fit its other files, got {got}")


def check_tokenizer(model: JudgingModel, tokenizer: Any) -> None:
    """Raise UserError if the tokenizer does not match the model's vocabulary and its end-of-turn token."""
    size, vocabulary = model.config.vocab_size, tokenizer.get_vocab()
    where = tokenizer_name(tokenizer)
    if len(tokenizer) > size:
        raise UserError(f"{where}: expected at most {size} tokens, got {len(tokenizer)}")
    last = max(vocabulary, key=vocabulary.get)
    if vocabulary[last] >= size:
        raise UserError(f"{where}: expected ids below {size}, got {vocabulary[last]} for {shown(last)}")
    end = end_of_turn(tokenizer)
    if end is not None and model.config.im_end_token_id is None:
        model.config.im_end_token_id = end
    if end is not None and end != model.config.im_end_token_id:
        (name,) = tokenizer.convert_ids_to_tokens([end])
        expected = model.config.im_end_token_id
        raise UserError(f"{where}: expected its end-of-turn token {shown(name)} as id {expected}, got {end}")


def check_vocabulary(model_name: str, tokenizer: Any) -> None:
    """Raise UserError if an id stands for another token than in the model's own tokenizer, if the model has one.

    Tokens that only one of them has do not count.
    """
    try:
        own = load_tokenizer(model_name)
    except UserError:  # the model has no tokenizer, or a broken one: nothing to compare with
        return
    own_tokens = {token_id: token for token, token_id in own.get_vocab().items()}
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=itemgetter(1)):
        expected = own_tokens.get(token_id, token)
        if token != expected:
            raise UserError(
                f"{tokenizer_name(tokenizer)}: expected the vocabulary of {model_name}, whose token {token_id} is "
                f"{shown(expected)}, got {shown(token)}: the model was trained with another tokenizer"
            )


def _user_error(name: str, kind: str, error: OSError) -> UserError:
    """``error`` in one line; for a name that is no directory, with the two possibilities."""
    if Path(name).is_dir():
        return UserError(f"{name}: {kind}: {_reason(error)}")
    return UserError(f"{name}: expected {kind} in a directory (nothing is there) or on the hub, got {_reason(error)}")
