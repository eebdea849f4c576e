"""Direct Preference Heads: one model speaks and judges (arXiv 2405.20053).

Public names and submodules are loaded at their first use (PEP 562): ``import dph`` imports neither PyTorch nor
transformers. It installs import hooks by which transformers' Auto classes open our directories.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dph import _import_hooks

if TYPE_CHECKING:
    from dph import chat, checkpoint, devices, errors, losses, optim, tasks
    from dph.data.packing import PackedBatch, pack
    from dph.infer.best_of_n import best_of_n
    from dph.model.config import ModelConfig
    from dph.model.heads import RewardHead
    from dph.model.loading import attach
    from dph.model.memory import Memory
    from dph.model.model import Model
    from dph.optim import LaProp

__version__ = "0.1.0"
__all__ = [
    "LaProp",
    "Memory",
    "Model",
    "ModelConfig",
    "PackedBatch",
    "RewardHead",
    "attach",
    "best_of_n",
    "chat",
    "checkpoint",
    "devices",
    "errors",
    "losses",
    "optim",
    "pack",
    "tasks",
]

# The module of each public name; the other names of __all__ are submodules.
_MODULES = {
    "LaProp": "dph.optim",
    "Memory": "dph.model.memory",
    "Model": "dph.model.model",
    "ModelConfig": "dph.model.config",
    "PackedBatch": "dph.data.packing",
    "RewardHead": "dph.model.heads",
    "attach": "dph.model.loading",
    "best_of_n": "dph.infer.best_of_n",
    "pack": "dph.data.packing",
}

_import_hooks.install()


def __getattr__(name: str) -> Any:
    """Import a public name or submodule and store it here, so that this runs once per name."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        value = importlib.import_module(f"dph.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names of the module, those that are not loaded yet included."""
    return sorted({*globals(), *__all__})
