"""How long OpenMP's threads spin; imported before PyTorch, which loads OpenMP.

By default a thread that has finished its part spins for the others without end. Where another process wants the core,
the spinning takes it from the thread that is waited for: beside a busy process on two cores, training was seen to fall
from 8,500 to 580 tokens a second. A fraction of a millisecond of spinning keeps nearly all of the speed of an idle
machine (18,300 of 19,500 tokens a second; none at all: 14,200) and bounds the loss on a busy one. GNU OpenMP reads the
variable as it is loaded; it is taken back at once, so that no child process inherits it. Whoever has set how threads
wait, or has imported PyTorch before, has the last word.
"""

import os
import sys

if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "20000"
    import torch  # noqa: F401

    del os.environ["GOMP_SPINCOUNT"]
