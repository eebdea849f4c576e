"""Run a script with one backend preferred for every operator that has it, then print the backends that were used.

python tests/helpers/forced.py triton ../shared/conformance/check.py model losses

With triton:100000 cheap operators on up to that many elements are computed in plain PyTorch, as "auto" does.
"""

import contextlib
import copy
import os
import runpy
import sys
from pathlib import Path


def force(backend, few=0):
    """Prefer ``backend``, for cheap operators only on more than ``few`` elements.

    Returns a set to which (operator, backend) is added for each operator that is called.
    """
    if backend == "triton":
        from helpers.quick import quicken

        os.environ["TRITON_INTERPRET"] = "1"  # read as the kernels are defined
        quicken()
    from dph_kernels import dispatch

    for operator, devices in dispatch.AUTO.items():
        for device, line in devices.items():
            if backend in dispatch.implemented(operator):
                devices[device] = {backend: "forced", "reference": line["reference"]}
    dispatch.SMALL_ELEMENTS = few
    used, find = set(), dispatch.implementation

    def noted(operator, device, backend="auto", dtype=None):
        used.add((operator, dispatch.choose(operator, device, backend, dtype).backend))
        return find(operator, device, backend, dtype)

    dispatch.implementation = noted
    dispatch.usual_call.cache_clear()
    return used


@contextlib.contextmanager
def forced(backend):
    """``force`` within a context; the backend has to run on this machine."""
    from dph_kernels import dispatch

    lines, find, few = copy.deepcopy(dispatch.AUTO), dispatch.implementation, dispatch.SMALL_ELEMENTS
    dispatch.choose.cache_clear()
    find.cache_clear()
    try:
        yield force(backend)
    finally:
        dispatch.AUTO.update(lines)
        dispatch.implementation, dispatch.SMALL_ELEMENTS = find, few
        for cached in (dispatch.choose, find, dispatch.usual_call):
            cached.cache_clear()


def main():
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    preferred, script, *arguments = sys.argv[1:]
    backend, _, few = preferred.partition(":")
    used = force(backend, int(few or 0))
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        print("== used", *sorted(f"{operator}:{backend}" for operator, backend in used), sep="\n")


if __name__ == "__main__":
    main()
