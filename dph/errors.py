"""Errors that the command line prints as one line, without a traceback, and text made safe to print."""

import re


class UserError(ValueError):
    """Wrong input; the message names it, what was expected and what came."""


class OtherRankFailed(RuntimeError):
    """Raised on the ranks that did not fail; the failing rank reports the error."""


# Control characters (C0 and C1), the marks that reorder text or end a line, and halves of surrogate pairs, which no
# encoding can write.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "\n\t") -> str:
    r"""Return text of unknown origin with its control characters escaped (``\x1b``), but for those in ``keep``.

    A terminal obeys them: a record or a file's name could move the cursor, change colours or hide what follows.
    """

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        return character if character in keep else character.encode("unicode_escape", "surrogatepass").decode()

    return _UNPRINTABLE.sub(escape, text)
