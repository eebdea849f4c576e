"""Scaling of the rotary embedding, described in the form of transformers' ``rope_parameters``."""

import math
from numbers import Real
from typing import Any

from dph.errors import UserError, shown
from dph_kernels.layout import LinearScaling, Llama3Scaling, YarnScaling

CONTEXT = "original_max_position_embeddings"

# Settings of each rope_type, and arguments of its class.
SCALINGS: dict[str, tuple[type, dict[str, str]]] = {
    "linear": (LinearScaling, {"factor": "factor"}),
    "llama3": (
        Llama3Scaling,
        {"factor": "factor", CONTEXT: "context", "low_freq_factor": "low", "high_freq_factor": "high"},
    ),
    "yarn": (
        YarnScaling,
        {
            "factor": "factor",
            CONTEXT: "context",
            "beta_fast": "fast",
            "beta_slow": "slow",
            "attention_factor": "amplitude",
            "truncate": "truncate",
        },
    ),
}


def scaling_of(fields: Any) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    """Return the scaling that a dictionary with ``rope_type`` and its settings describes; None for None.

    Raises UserError, which begins with ``rotary_scaling``, for another type or setting.
    """
    if fields is None:
        return None
    kind = fields.get("rope_type") if isinstance(fields, dict) else fields
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise UserError(f"rotary_scaling: expected rope_type {', '.join(SCALINGS)}, or none, got {shown(kind)}")
    scaling, names = SCALINGS[kind]
    arguments = {}
    for key, value in fields.items():
        if key == "rope_type" or value is None:
            continue
        name = f"rotary_scaling.{key}"
        if key not in names:
            raise UserError(f"{name}: expected one of {', '.join(names)}, got another setting of {kind}")
        if key == "truncate":
            if not isinstance(value, bool):
                raise UserError(f"{name}: expected true or false, got {shown(value)}")
        elif not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or not value > 0:
            raise UserError(f"{name}: expected a finite number above 0, got {shown(value)}")
        arguments[names[key]] = value
    required = [key for key in ("factor", CONTEXT) if key in names]
    if missing := [key for key in required if names[key] not in arguments]:
        raise UserError(f"rotary_scaling: expected {' and '.join(missing)} of {kind}, got none")
    result = scaling(**arguments)
    if isinstance(result, Llama3Scaling) and result.low > result.high:
        raise UserError(
            f"rotary_scaling.low_freq_factor: expected at most high_freq_factor = {result.high}, got {result.low}"
        )
    return result
