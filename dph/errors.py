"""Errors that the command line prints as one line, without a traceback, and values of unknown origin in them."""

import itertools
import re
import reprlib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input; the message names it, what was expected and what came."""


class RunLost(RuntimeError):
    """The run directory was deleted or moved while the run trained there: nothing can be saved."""


class OtherRankFailed(RuntimeError):
    """Raised on the ranks that did not fail; the failing rank reports the error."""


def add_note(error: BaseException, text: str) -> None:
    """Add a note to an exception, as its method ``add_note`` of Python 3.11 does."""
    error.__notes__ = [*getattr(error, "__notes__", ()), text]


# Control characters (C0 and C1), the marks that reorder text or end a line, and halves of surrogate pairs, which no
# encoding can write.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "\n\t") -> str:
    r"""Return text of unknown origin with its control characters escaped (``\x1b``), but for those in ``keep``.

    A terminal obeys them: a record or a file's name could move the cursor, change colours or hide what follows.
    """

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        return character if character in keep else character.encode("unicode_escape", "surrogatepass").decode()

    return UNPRINTABLE.sub(escape, text)


_SHORT = reprlib.Repr()  # bounded in length and depth, so that neither a huge nor a deep value is rendered whole
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlong = 40
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 4


def shown(value: object) -> str:
    """Return the repr of a value of unknown origin for a message: on one line, without control characters, and cut."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # an integer with more digits than Python converts to text
        text = "an integer of thousands of digits"
    text = printable(text, keep="")
    return text if len(text) <= 120 else f"{text[:80]}...{text[-20:]}"


def one_line(text: object, most: int = 120) -> str:
    """Return a name, message or exception from outside on one line of bounded length, without control characters."""
    line = printable(" ".join(str(text).split()), keep="")
    return line if len(line) <= most else f"{line[:most]}..."


def shown_names(names: Iterable[object], most: int = 12) -> str:
    """Return keys of unknown origin as a list for a message, cut; "(none)" if there are none."""
    words = []
    for name in itertools.islice(names, most + 1):
        text = printable(str(name)[:41], keep="")
        words.append(text if len(text) <= 40 else f"{text[:40]}...")
    if len(words) > most:
        words[most] = "..."
    return ", ".join(words) or "(none)"


def check_text(text: object, where: str) -> None:
    """Raise UserError unless ``text`` is a string that has a UTF-8 form."""
    if not isinstance(text, str):
        raise UserError(f"{where}: expected text, got {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: expected valid Unicode, got a lone surrogate at character {error.start}") from None
