"""``dph doctor``: everything in one page, and the way out of what is missing."""

import importlib.metadata as metadata
import types

import pytest
import torch

from dph.cli import doctor
from dph_kernels import dispatch


def lines(title):
    """The rows of one section of the report."""
    sections = doctor.report().split("\n\n")
    return sections[sections.index(title) + 1].splitlines()[2:]


@pytest.mark.parametrize("gpu", [False, True])
def test_report_has_versions_devices_and_every_operator(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(dispatch, "missing", lambda *_: None)  # they remember what they find, and this GPU is a tale
    monkeypatch.setattr(dispatch, "choose", lambda *words: dispatch.Choice("some", f"{' on '.join(words)} is fast"))
    assert any(line.startswith("torch ") and torch.__version__ in line for line in lines("Versions"))
    assert any(line.startswith("C++ module") for line in lines("Versions"))
    assert lines("Devices")[0].startswith("cpu ")
    rows = [(operator, device) for operator in dispatch.AUTO for device in ("cpu", "cuda")]
    for line, (operator, device) in zip(lines("Operators"), rows, strict=True):
        here = gpu or device == "cpu"
        taken, why = ("some", f"{operator} on {device} is fast") if here else ("-", "needs a CUDA device: none is here")
        assert line.split()[:3] == [operator, device, taken]
        assert line.endswith(f"  {why}")


@pytest.fixture
def installed(monkeypatch):
    """Pretend that dph is installed with two extras, one of which has a package that is not here."""
    requires = [
        "torch>=2",
        "pytest>=1; extra == 'test'",
        "no-such-package; extra == 'serve'",
        "pytest>=9999; extra == 'serve'",
        "elsewhere; sys_platform == 'plan9' and extra == 'serve'",
    ]
    message = types.SimpleNamespace(get_all=lambda name: ["test", "serve"])
    found = types.SimpleNamespace(metadata=message, requires=requires, version="0")
    original = metadata.distribution
    monkeypatch.setattr(metadata, "distribution", lambda name: found if name == "dph" else original(name))


@pytest.mark.usefixtures("installed")
def test_missing_packages_come_with_their_command(monkeypatch):
    monkeypatch.setattr(dispatch, "missing", lambda *_: None)
    assert lines("Missing") == ["no-such-package, pytest  pip install -e '.[serve]'"]


@pytest.mark.usefixtures("installed")
def test_missing_compiler_comes_with_its_command(monkeypatch):
    monkeypatch.setattr(dispatch, "missing", lambda *_: "no C++ compiler; install g++")
    row = lines("Missing")[0]
    assert row.startswith("C++ kernels ")
    assert row.endswith(" no C++ compiler; install g++")


@pytest.mark.usefixtures("installed")
def test_one_thread_comes_with_its_command(monkeypatch):
    monkeypatch.setattr(dispatch, "missing", lambda *_: None)
    monkeypatch.setattr(dispatch, "one_thread", lambda: "no OpenMP; install libomp")
    row = lines("Missing")[0]
    assert row.startswith("threads of C++ kernels ")
    assert row.endswith(" no OpenMP; install libomp")


def test_not_installed(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    assert any("pip install -e ." in line for line in lines("Missing"))
