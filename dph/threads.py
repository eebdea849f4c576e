"""How OpenMP's threads wait; imported before PyTorch, which loads OpenMP.

By default a thread that has finished its part spins until the others have. Where another process wants the core, the
spinning takes it from the thread that is waited for: with one busy neighbour on two cores, training fell from 8,500 to
580 tokens a second. OpenMP reads the variable as it is loaded; it is taken back at once, so that no child process
inherits it. Whoever has set it, or has imported PyTorch before, has the last word.
"""

import os
import sys

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    import torch  # noqa: F401

    del os.environ["OMP_WAIT_POLICY"]
