"""Triton's interpreter without what it does over and over: for tests, which it takes most of the time of.

At every call of a function within a kernel it puts its own operators into triton.language anew, although they are
there since the launch: a third of all its time.
"""

import functools
import inspect


@functools.cache
def quicken():
    """Let a launch patch each language module once; without effect where the interpreter works otherwise."""
    try:
        from triton.runtime import interpreter

        patch, languages = interpreter._patch_lang, (interpreter.tl, interpreter.tl.core)
    except (ImportError, AttributeError):
        return
    found, patched = {}, set()  # by function the modules that it sees; those that the launch under way has patched

    class Launch:
        """What a launch restores in the end."""

        def __init__(self, scope):
            self.scope = scope

        def restore(self):
            patched.clear()
            self.scope.restore()

    def once(function):
        if function not in found:
            modules = filter(inspect.ismodule, function.__globals__.values())
            found[function] = {module.__name__ for module in modules if module in languages}
        if patched and found[function] <= patched:
            return None  # to a call within a kernel, which restores nothing
        outermost = not patched
        patched.update(found[function])
        scope = patch(function)
        return Launch(scope) if outermost else scope

    interpreter._patch_lang = once
