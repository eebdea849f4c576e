"""setup.py as a module."""

import importlib.util
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

SETUP = Path(__file__).resolve().parents[2] / "setup.py"


def setup_script() -> ModuleType:
    """Run setup.py without building anything, and return its names."""
    setuptools = pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    spec = importlib.util.spec_from_file_location("setup_script", SETUP)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(setuptools, "setup"):
        spec.loader.exec_module(module)
    return module
