"""Fixtures of the whole suite: seeds, poisoned memory, shared numbers, commands; skips of GPU tests."""

import dataclasses
import getpass
import importlib
import importlib.util
import io
import os
import random
import sys
import tempfile
from pathlib import Path

import numpy
import pytest
import torch
from helpers.quick import quicken

# Without a GPU Triton's kernels are interpreted. Triton reads the variable when they are defined, so it is set first.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    quicken()

# Code that Inductor has compiled for other instructions than PyTorch uses here (ATEN_CPU_CAPABILITY) gives NaN, and its
# cache does not tell them apart.
_CAPABILITY = torch.backends.cpu.get_cpu_capability().replace(" ", "-")
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"inductor-{getpass.getuser()}-{_CAPABILITY}")
)

# All tensors are tiny: one thread is the fastest, and other processes cannot stall it.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a file on one worker, so that its fixtures are made once; idle workers take from others."""
    from xdist.scheduler import WorkStealingScheduling

    if config.getoption("dist") != "load":  # another mode was given
        return None
    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` if PyTorch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and PyTorch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a test over all backends on a layout that another library's attention cannot express, with its reason."""
    from dph_kernels.rope_attention.contiguous import InexpressibleError

    try:
        return (yield)
    except Exception as error:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("backend") not in ("sdpa", "flash"):
            raise
        while error.__cause__ and not isinstance(error, InexpressibleError):  # opcheck wraps errors
            error = error.__cause__
        if not isinstance(error, InexpressibleError):
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run and every order of tests."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def _poison(tensor):
    with torch.no_grad():
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(torch.nan)
        return tensor.fill_(torch.iinfo(tensor.dtype).min)


def _poisoned(original):
    return lambda *args, **kwargs: _poison(original(*args, **kwargs))


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fill `torch.empty`, `empty_like`, `empty_strided` and `Tensor.new_empty` with NaN (integers: minimum).

    An element that a kernel forgot to write then shows in its result, instead of old memory.
    """
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(scope="module")
def every_kernel():
    """Compute the tests' small models with the kernels of large ones, which otherwise are left to plain PyTorch."""
    from dph_kernels import dispatch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "SMALL_ELEMENTS", 0)
        yield


@pytest.fixture
def overflow_is_an_error(monkeypatch):
    """Make Triton's interpreter, if it is on, report int32 overflow, on masked lanes too."""
    from dph_kernels import dispatch

    if dispatch.interpreted() and importlib.util.find_spec("triton"):
        builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))


@pytest.fixture(scope="session")
def shared():
    """The folder next to the repository with golden numbers and sample data; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("../shared (golden numbers and sample data) is not next to the repository")
    return SHARED


@pytest.fixture
def inductor():
    """PyTorch's compiler with nothing compiled yet; skips, with the reason, if it does not work."""
    from dph.errors import UserError
    from dph.train import compile

    torch.compiler.reset()
    try:
        compile.require(torch.device("cpu"))
    except UserError as error:
        pytest.skip(str(error))
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Directories: a model with a head, one without, and one whose checkpoint lacks its head."""
    from helpers.command_line import save_models

    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def dph_command(capsys, monkeypatch):
    """Run one command line; (exit code, stdout, stderr)."""
    from dph.cli import main

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()  # what the test itself has printed, such as the bar of a model that it loads
        code = main.main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(dph_command):
    """Run one command line that must end with exit code 2 and a single line; that line."""

    def run(*argv):
        code, out, err = dph_command(*argv)
        assert (code, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith("dph: error: ")
        return line

    return run
