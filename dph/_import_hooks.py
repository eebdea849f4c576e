"""Hooks that run when PyTorch and transformers' Auto classes are imported, so that ``import dph`` needs neither.

| imported module | hook |
|---|---|
| ``torch`` | bounds the spinning of OpenMP's threads (:mod:`dph._openmp`) |
| ``transformers.models.auto.configuration_auto`` | registers the configurations with ``AutoConfig`` |
| ``transformers.models.auto.modeling_auto`` | registers the models with the ``AutoModelFor...`` classes |

transformers has no entry point for third-party models: its registry takes classes, and these derive from its own
classes, which need PyTorch. Registering at ``import dph`` would therefore cost seconds. The hooks cost a dictionary
lookup per imported module; after ``import dph``, the first import of an Auto class also imports ``dph.model`` (about
two seconds of CPU). If an Auto class has been imported before, ``import dph`` registers at once.
"""

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from dph._openmp import bounded_spinning

# Importing the value registers what the key's registry needs. The modules that ``dph.model`` takes from transformers
# import ``configuration_auto`` themselves, so its hook must stay free of models.
REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": "dph.model.config",
    "transformers.models.auto.modeling_auto": "dph.model.auto_classes",
}


class HookFinder:
    """Finder on ``sys.meta_path`` that wraps the execution of the modules above and leaves all others alone."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the ordinary spec with a hook around the module's execution; None for any other module."""
        if name != "torch" and name not in REGISTRATIONS:
            return None
        spec = None
        for finder in sys.meta_path:
            if finder is not HookFinder:
                spec = finder.find_spec(name, path, target)
            if spec is not None:
                break
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if name == "torch":
                with bounded_spinning():
                    execute(module)
            else:
                execute(module)
                _register(REGISTRATIONS[name])

        spec.loader.exec_module = exec_module  # the loader belongs to this spec alone
        return spec


def _register(module: str) -> None:
    """Import a module that registers classes; an error is a warning, as the caller imports transformers, not us."""
    try:
        importlib.import_module(module)
    except Exception as error:
        message = f"dph: transformers' Auto classes do not open our models, as {module} failed: {error!r}"
        warnings.warn(message, stacklevel=2)


def install() -> None:
    """Install the hooks once; register at once with those of the registries that have been imported before."""
    if HookFinder in sys.meta_path:
        return
    sys.meta_path.insert(0, HookFinder)
    for registry, module in REGISTRATIONS.items():
        if registry in sys.modules:
            importlib.import_module(module)
