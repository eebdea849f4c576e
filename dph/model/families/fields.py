"""Conversion of a family's config.json to fields of ``ModelConfig``, and back."""

import copy
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from dph.errors import UserError, one_line, shown
from dph.model.families import Family

ACTIVATIONS = ("silu", "swish")  # names of the same function
FACTOR, CONTEXT = "factor", "original_max_position_embeddings"


def own_fields(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``ModelConfig`` for a config.json of the family.

    Raises UserError, which begins with the key, for settings that transformers refuses or this model lacks.
    """
    theirs = _their_config(family, fields)
    own: dict[str, Any] = {}
    for key, name in family.fields.items():
        if hasattr(theirs, key):
            own[name] = getattr(theirs, key)
    for key, names in family.switches.items():
        own |= dict.fromkeys(names, getattr(theirs, key))
    if own.get("dtype") is not None:
        own["dtype"] = str(own["dtype"]).removeprefix("torch.")
    if isinstance(own.get("pad_token_id"), int) and own["pad_token_id"] < 0:  # means none in old files
        own["pad_token_id"] = None
    base, scaling = _rotary(theirs)
    context = _context(theirs, scaling)
    _check_supported(theirs, context)
    return {
        **own,
        "max_position_embeddings": context,
        **family.constants,
        "embedding_size": own["hidden_size"],
        "embedding_projection": False,
        "rope_base": base,
        "rope_reversed": False,
        "rotary_scaling": scaling,
        "reward_heads": [],
        "family": family.model_type,
        "family_fields": dict(fields),
    }


def their_fields(family: Family, config: Any) -> dict[str, Any]:
    """Return a config.json of the family: that which the model comes from, with the settings that have changed since.

    Raises UserError for a change of a setting that the family lacks.
    """
    fields = copy.deepcopy(config.family_fields)
    before = own_fields(family, fields)
    for key, name in family.fields.items():
        value = getattr(config, name)
        if name == "dtype" or name not in before or value == before[name]:  # the dtype is that of the weights
            continue
        fields[key] = value
    for name, value in before.items():
        if name in family.fields.values() or name in ("reward_heads", "family", "family_fields"):
            continue
        expected = config.hidden_size if name == "embedding_size" else value
        if getattr(config, name) != expected:
            raise UserError(
                f"{name}: expected {shown(expected)}, as in the {family.model_type} model that this one comes from, "
                f"got {shown(getattr(config, name))}"
            )
    return {**fields, "architectures": [family.architecture], "model_type": family.model_type}


def _their_config(family: Family, fields: Mapping[str, Any]) -> Any:
    """Return transformers' configuration, which has the defaults of settings and reads forms of earlier versions."""
    from transformers import AutoConfig

    known = {key: value for key, value in fields.items() if key not in ("model_type", "transformers_version")}
    try:
        return AutoConfig.for_model(family.model_type, **copy.deepcopy(known))
    except Exception as error:  # of any kind, from transformers' checks
        got = one_line(f"{type(error).__name__}: {error}", most=300)
        raise UserError(f"expected settings of a {family.model_type} model, got: {got}") from error


def _check_supported(theirs: Any, context: int) -> None:
    """Raise UserError for settings that change the result within ``context`` tokens, and that this model lacks."""
    if theirs.hidden_act not in ACTIVATIONS:
        raise UserError(f"hidden_act: expected {ACTIVATIONS[0]}, got {shown(theirs.hidden_act)}")
    if theirs.attention_dropout:
        raise UserError(f"attention_dropout: expected 0, got {shown(theirs.attention_dropout)}")
    window = getattr(theirs, "sliding_window", None)
    layers = set(getattr(theirs, "layer_types", None) or ["sliding_attention"])
    if window is not None and window < context and "sliding_attention" in layers:
        raise UserError(
            f"sliding_window: expected none, or one of at least the context of {context} tokens "
            f"(max_position_embeddings), got {shown(window)}"
        )
    if other := layers - {"sliding_attention", "full_attention"}:
        raise UserError(f"layer_types: expected full_attention, got {shown(sorted(map(str, other)))}")


def _rotary(theirs: Any) -> tuple[float, dict[str, Any] | None]:
    """Return the base and the scaling, None without one, of the rotary embedding."""
    theirs.standardize_rope_params()  # again, as their model does: other settings of the configuration are known now
    given = dict(theirs.rope_parameters or {})
    base, kind = given.pop("rope_theta", theirs.default_theta), given.pop("rope_type", "default")
    for key in ("type", "finetuned"):  # an earlier name of rope_type, and a remark of the first YaRN models
        given.pop(key, None)
    partial = given.pop("partial_rotary_factor", None)
    _check_number("rope_theta", base)
    for key, value in given.items():
        if isinstance(value, dict):
            raise UserError(f"rope_parameters: expected the same for all layers, got others for {shown(key)}")
    if partial not in (None, 1.0):
        raise UserError(f"partial_rotary_factor: expected 1 (the whole head is rotated), got {shown(partial)}")
    if kind == "default":
        return float(base), None
    if kind == "yarn":
        _resolve_yarn(given, theirs)
    return float(base), {"rope_type": kind, **{key: value for key, value in given.items() if value is not None}}


def _context(theirs: Any, scaling: Mapping[str, Any] | None) -> int:
    """Return the tokens that the rotary embedding is made for, of which ``max_position_embeddings`` may be a part."""
    longest = theirs.max_position_embeddings
    if scaling is None or scaling["rope_type"] not in ("linear", "yarn"):  # Llama 3's counts all of them
        return longest
    factor, before = scaling.get(FACTOR), scaling.get(CONTEXT, longest)
    _check_number(f"rope_parameters.{FACTOR}", factor)
    _check_number(f"rope_parameters.{CONTEXT}", before)
    _check_number(f"rope_parameters.{FACTOR} * {CONTEXT}", factor * before)
    return max(longest, int(factor * before))


def _resolve_yarn(given: dict[str, Any], theirs: Any) -> None:
    """Compute settings of YaRN that others imply, as transformers does: the factor, and that of the amplitude."""
    for key in (FACTOR, CONTEXT, "mscale", "mscale_all_dim"):
        if given.get(key) is not None:
            _check_number(f"rope_parameters.{key}", given[key])
    if "truncate" in given and given["truncate"] is None:
        given["truncate"] = False
    if given.get(FACTOR) is None and given[CONTEXT]:
        given[FACTOR] = theirs.max_position_embeddings / given[CONTEXT]
    _check_number(f"rope_parameters.{FACTOR}", given.get(FACTOR))
    scale, of_all = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if given.get("attention_factor") is None and scale and of_all and given[FACTOR] > 1:
        logarithm = 0.1 * math.log(given[FACTOR])
        given["attention_factor"] = (scale * logarithm + 1) / (of_all * logarithm + 1)


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{name}: expected a finite number, got {shown(value)}")
