"""Triton's interpreter without what it does over and over: for tests, which it takes most of the time of.

At every call of a function within a kernel it puts its own operators into triton.language anew, although they are
there since the launch: a third of all its time.
"""

import contextlib
import functools
import inspect
import threading

_launch = threading.local()  # .patched: modules that the launch under way has patched; None where there is none


@functools.cache
def quicken():
    """Let a launch patch each language module once; calls outside of launches stay as they are."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages = interpreter.tl, interpreter.tl.core

    @functools.cache
    def seen_by(function):
        modules = filter(inspect.ismodule, function.__globals__.values())
        return frozenset(module.__name__ for module in modules if module in languages)

    def once(function):
        patched = getattr(_launch, "patched", None)
        if patched is None:
            return patch(function)
        if patched and seen_by(function) <= patched:
            return None  # to a call within a kernel, which restores nothing
        patched |= seen_by(function)
        return patch(function)

    def launched(*args, **kwargs):
        _launch.patched = None if getattr(_launch, "stock", False) else set()
        try:
            return launch(*args, **kwargs)
        finally:
            _launch.patched = None

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched


@contextlib.contextmanager
def stock():
    """A block whose launches patch all over again."""
    _launch.stock = True
    try:
        yield
    finally:
        _launch.stock = False
