"""Options of sampling and their ranges, for the API and the command line, which checks them without PyTorch."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from dph.errors import UserError, shown

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
WHOLE = Rule(int, lambda k: 0 <= k < INT64, "a whole number of at least 0")
SHARE = Rule(float, lambda p: 0 < p <= 1, "a number above 0 and at most 1")
RULES = {
    "n": COUNT,
    "max_new_tokens": COUNT,
    "temperature": Rule(float, lambda t: 0 <= t < math.inf, "a finite number of at least 0"),
    "risk": Rule(float, lambda r: 0 <= r < math.inf, "a finite number of at least 0"),
    "top_k": WHOLE,
    "top_p": SHARE,
    "min_p": Rule(float, lambda p: 0 <= p <= 1, "a number from 0 to 1"),
    "typical_p": SHARE,
    "repetition_penalty": Rule(float, lambda r: 0 < r < math.inf, "a finite number above 0"),
    "seed": Rule(int, lambda s: -INT64 <= s < INT64, "a whole number of at least -2**63 and below 2**63"),
    "confidence": Rule(float, lambda p: 0 < p < 1, "a number between 0 and 1"),
    "round_size": COUNT,
    "prune_every": COUNT,
}


def checked(name: str, value: Any) -> Any:
    """Return the option's value as a plain int or float; raises UserError for another type or out of range."""
    rule = RULES[name]
    number = numbers.Integral if rule.kind is int else numbers.Real
    with contextlib.suppress(OverflowError):  # an int may be larger than any float
        if isinstance(value, number) and not isinstance(value, bool) and rule.fits(plain := rule.kind(value)):
            return plain
    raise UserError(f"{name}: expected {rule.expected}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The way in which the tokens of an answer are chosen, in the order in which the options apply.

    Attributes:
        max_new_tokens: an answer that reaches it without the end-of-turn token is cut off.
        repetition_penalty: logits of tokens of the prompt and the answer are divided by it if positive, else
            multiplied (arXiv 1909.05858).
        temperature: of the softmax; below ``COLD`` the most probable token is taken.
        top_k: sample from the k most probable tokens; 0 for all.
        top_p: sample from the most probable tokens that hold this share of the probability.
        min_p: sample from tokens of at least this share of the most probable one's probability (arXiv 2407.01082).
        typical_p: sample from the most typical tokens that hold this share of the probability (arXiv 2202.00666).
        stop: an answer ends before the first of these texts that it says.

    Raises UserError with the option's name if one is not a number or out of range (``RULES``).
    """

    max_new_tokens: int = 256
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the options."""
        for field in fields(self):
            if field.name in RULES:
                object.__setattr__(self, field.name, checked(field.name, getattr(self, field.name)))
        stop = self.stop
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop: expected a list of texts that are not empty, got {shown(stop)}")
        object.__setattr__(self, "stop", tuple(stop))

    def stop_place(self, text: str) -> int | None:
        """Return where the first stop text in ``text`` begins; None without one."""
        return min((place for stop in self.stop if (place := text.find(stop)) >= 0), default=None)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, so that all answers to a prompt are equal."""
        return self.temperature < COLD
