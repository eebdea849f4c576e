"""Options of sampling and their ranges, for the API and the command line, which checks them without PyTorch."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

from dph.errors import UserError

# Below this temperature the softmax is one-hot in fp32; the division of logits by it overflows only at about 1e-36.
COLD = 1e-20


class Rule(NamedTuple):
    """Values of one option.

    Attributes:
        kind: int or float; converts text too.
        fits: whether a number is allowed.
        expected: the allowed values in words.
    """

    kind: Callable[[Any], float]
    fits: Callable[[float], bool]
    expected: str


INT64 = 2**63
COUNT = Rule(int, lambda n: 1 <= n < INT64, "a whole number of at least 1")
RULES = {
    "n": COUNT,
    "max_new_tokens": COUNT,
    "temperature": Rule(float, lambda t: 0 <= t < math.inf, "a finite number of at least 0"),
    "risk": Rule(float, lambda r: 0 <= r < math.inf, "a finite number of at least 0"),
    "top_k": Rule(int, lambda k: 0 <= k < INT64, "a whole number of at least 0"),
    "top_p": Rule(float, lambda p: 0 < p <= 1, "a number above 0 and at most 1"),
    "seed": Rule(int, lambda s: -INT64 <= s < INT64, "a whole number of at least -2**63 and below 2**63"),
}


def checked(name: str, value: Any) -> Any:
    """Return the option's value as a plain int or float; raises UserError for another type or out of range."""
    rule = RULES[name]
    number = numbers.Integral if rule.kind is int else numbers.Real
    with contextlib.suppress(OverflowError):  # an int may be larger than any float
        if isinstance(value, number) and not isinstance(value, bool) and rule.fits(plain := rule.kind(value)):
            return plain
    raise UserError(f"{name}: expected {rule.expected}, got {value!r}")
