"""Errors that the command line prints as one line, without a traceback."""


class UserError(ValueError):
    """Wrong input; the message names it, what was expected and what came."""


class OtherRankFailed(RuntimeError):
    """Raised on the ranks that did not fail; the failing rank reports the error."""
