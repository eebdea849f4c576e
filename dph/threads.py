"""How OpenMP's threads wait; imported before PyTorch, which loads OpenMP.

By default a thread that has finished its part spins until the others have. Where another process wants the core, the
spinning takes it from the thread that is waited for: with one busy neighbour on two cores, training fell from 8,500 to
580 tokens a second, and asleep they lose nothing that could be measured. Whoever sets the variable has the last word.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
