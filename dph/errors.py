"""Errors that are the user's to mend: the command line prints them as one line, without a traceback."""


class UserError(ValueError):
    """Bad input: says what was expected, what came, and where."""


class Elsewhere(RuntimeError):
    """Another process of the run has failed, and says why: this one ends without a word."""
