"""Direct Preference Heads: one model speaks and judges (arXiv 2405.20053)."""

import dph.threads  # noqa: F401  (before PyTorch, whose threads it is about)
from dph import auto, chat, checkpoint, losses, optim, tasks
from dph.config import ModelConfig
from dph.generate import best_of_n
from dph.heads import RewardHead
from dph.memory import Memory
from dph.model import Model
from dph.optim import LaProp
from dph.packing import PackedBatch, pack

__version__ = "0.1.0"
__all__ = [
    "LaProp",
    "Memory",
    "Model",
    "ModelConfig",
    "PackedBatch",
    "RewardHead",
    "auto",
    "best_of_n",
    "chat",
    "checkpoint",
    "losses",
    "optim",
    "pack",
    "tasks",
]
