"""A faster interpreter of Triton for tests.

At every call of a function within a kernel the interpreter patches triton.language again, although the launch has
patched it already: a third of its time.
"""

import contextlib
import functools
import inspect
import threading

_launch = threading.local()  # .patched: modules that the current launch has patched; None outside of launches


@functools.cache
def quicken():
    """Let a launch patch each language module once; calls outside of launches are unchanged."""
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
            return None  # for a call within a kernel, which restores nothing
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
    """Context in which launches patch at every call, as Triton does."""
    _launch.stock = True
    try:
        yield
    finally:
        _launch.stock = False
