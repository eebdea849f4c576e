"""Text of an answer while it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"  # decoders put it in place of bytes that are not, or not yet, a character


class TextStream:
    """Pieces of an answer's text that no later token changes.

    Half characters wait for their other bytes, and the beginning of a stop text waits until it is none.

    Args:
        tokenizer: of the model.
        end: id of the end-of-turn token.
        stop: stop texts.
    """

    def __init__(self, tokenizer: Any, end: int, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._end, self._stop = tokenizer, end, stop
        self._sent = ""

    def add(self, tokens: Sequence[int]) -> str:
        """Return what the tokens so far add to the text."""
        content = tokens[:-1] if tokens and tokens[-1] == self._end else tokens
        text = self._tokenizer.decode(content, skip_special_tokens=False).rstrip(HALF)
        text = text[: len(text) - self._held(text)]
        if not text.startswith(self._sent):
            return ""
        piece = text[len(self._sent) :]
        self._sent = text
        return piece

    def finish(self, text: str) -> str:
        """Return what the whole text adds. Raises RuntimeError if it does not begin with what was sent."""
        if not text.startswith(self._sent):
            raise RuntimeError("expected a tokenizer whose text only grows with further tokens, got another")
        return text[len(self._sent) :]

    def _held(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that may begin a stop text."""
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop), len(text)), held, -1):
                if text.endswith(stop[:size]):
                    held = size
                    break
        return held
