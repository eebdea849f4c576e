"""Direct Preference Heads: one model speaks and judges (arXiv 2405.20053)."""

import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "LaProp",
    "Memory",
    "Model",
    "ModelConfig",
    "PackedBatch",
    "RewardHead",
    "best_of_n",
    "chat",
    "checkpoint",
    "losses",
    "optim",
    "pack",
    "tasks",
]


def _is_the_command() -> bool:
    """Whether this process is ``dph`` or ``python -m dph.cli``."""
    started = sys.argv[0] if sys.argv else ""
    if started == "-m":  # the module is being looked for
        return "dph.cli" in sys.orig_argv
    path = Path(started).resolve()
    return path.stem == "dph" and path.parent == Path(sysconfig.get_path("scripts")).resolve()


# The command answers `--help` and mistyped options at once: PyTorch and transformers take seconds to import. It imports
# what it runs, by its place in the package.
if TYPE_CHECKING or not _is_the_command():
    import dph._openmp  # noqa: F401  (before PyTorch, whose threads it is about)
    from dph import chat, checkpoint, losses, optim, tasks
    from dph.data.packing import PackedBatch, pack
    from dph.infer.best_of_n import best_of_n
    from dph.model import auto_classes  # noqa: F401  (registers the Auto classes)
    from dph.model.config import ModelConfig
    from dph.model.heads import RewardHead
    from dph.model.memory import Memory
    from dph.model.model import Model
    from dph.optim import LaProp
