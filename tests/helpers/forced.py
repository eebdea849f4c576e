"""Run a script with one backend first in line for every operator that has it, and tell which were used in the end.

python tests/helpers/forced.py triton ../shared/conformance/check.py model losses

triton:100000 leaves cheap operators on up to so many elements to plain PyTorch, as "auto" does.
"""

import contextlib
import copy
import os
import runpy
import sys

from helpers.quick import quicken


def force(backend, few=0):
    """Put ``backend`` first, for more than ``few`` elements where an operator is cheap.

    Returns the set that gathers (operator, backend) as operators are called.
    """
    if backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"  # read as the kernels are defined
        quicken()
    from dph_kernels import dispatch

    for operator, devices in dispatch.AUTO.items():
        for device, line in devices.items():
            if backend in dispatch.implemented(operator):
                devices[device] = {backend: "forced", "reference": line["reference"]}
    dispatch.FEW = few
    used, find = set(), dispatch._module

    def noted(operator, backend):
        used.add((operator, backend))
        return find(operator, backend)

    dispatch._module = noted
    return used


@contextlib.contextmanager
def forced(backend):
    """``force`` for a block of this process; the caller has made sure that the backend runs here."""
    from dph_kernels import dispatch

    lines, find, few = copy.deepcopy(dispatch.AUTO), dispatch._module, dispatch.FEW
    dispatch.choose.cache_clear()
    try:
        yield force(backend)
    finally:
        dispatch.AUTO.update(lines)
        dispatch._module, dispatch.FEW = find, few
        dispatch.choose.cache_clear()


def main():
    where, script, *arguments = sys.argv[1:]
    backend, _, few = where.partition(":")
    used = force(backend, int(few or 0))
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        print("== used", *sorted(f"{operator}:{backend}" for operator, backend in used), sep="\n")


if __name__ == "__main__":
    main()
