"""setup.py: how the C++ module is compiled with threads, on Linux and macOS, and without."""

import os
import shutil
import subprocess
import sys
import sysconfig
import types

import pytest
from helpers.build import setup_script

SIMD = (["-fopenmp-simd"], [])
NEITHER = ([], [])


@pytest.fixture
def build():
    return setup_script()


@pytest.fixture
def mac(build, monkeypatch, tmp_path):
    """Pretend that this is macOS, with an empty folder of packages."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return build


def test_openmp_where_it_is_linked(build, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert build.openmp() == [(["-fopenmp"], ["-fopenmp"]), SIMD, NEITHER]


def test_openmp_of_pytorch_on_macos(mac):
    """No libomp is linked, as PyTorch's must be the only one of the process."""
    best, *others = mac.openmp()
    assert best == (["-Xpreprocessor", "-fopenmp"], ["-Wl,-undefined,dynamic_lookup"])
    assert others == [SIMD, NEITHER]


@pytest.mark.parametrize("libraries", [["@rpath/libomp.dylib"], ["/opt/homebrew/opt/libomp/lib/libomp.dylib"], []])
def test_one_thread_on_macos_if_pytorch_has_no_openmp(mac, libraries, monkeypatch, tmp_path):
    library = tmp_path / "torch" / "lib" / "libtorch_cpu.dylib"
    library.parent.mkdir(parents=True)
    library.touch()

    def otool(command, **_):
        assert command == ["otool", "-L", str(library)]
        lines = [f"{library}:", *(f"\t{name} (compatibility version 5.0.0)" for name in libraries)]
        return types.SimpleNamespace(stdout="\n".join([*lines, "\t/usr/lib/libSystem.B.dylib"]))

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", otool)
    flags = mac.openmp()
    assert (flags[0] == SIMD) is (not libraries)
    assert flags[-2:] == [SIMD, NEITHER]


class Compiler:
    """A compiler or linker that rejects some flags."""

    def __init__(self, error, rejected, link_rejected=()):
        self.error, self.rejected, self.link_rejected = error, set(rejected), set(link_rejected)

    def compile(self, sources, *, output_dir, extra_postargs):
        if self.rejected & {*extra_postargs, "everything"}:
            raise self.error("compiler: no")
        return ["probe.o"]

    def link_shared_object(self, objects, target, *, extra_postargs, target_lang):
        if self.link_rejected & set(extra_postargs):
            raise self.error("linker: no")


@pytest.fixture
def probe(build, monkeypatch, tmp_path):
    """The probe of setup.py, with the compiler that is given."""
    monkeypatch.setattr(sys, "platform", "linux")

    def run(**compiler):
        own = build.BuildNative.__new__(build.BuildNative)
        own.build_temp, own.compiler = str(tmp_path), Compiler(build.CCompilerError, **compiler)
        return own.probe()

    return run


def test_probe_takes_the_first_flags_that_work(probe, capsys):
    assert probe(rejected=[]) == (["-fopenmp"], ["-fopenmp"])
    assert capsys.readouterr().err == ""
    for compiler in ({"rejected": ["-fopenmp"]}, {"rejected": [], "link_rejected": ["-fopenmp"]}):
        assert probe(**compiler) == SIMD
        assert "the C++ kernels will use one core: no OpenMP" in capsys.readouterr().err
    assert probe(rejected=["-fopenmp", "-fopenmp-simd"]) == NEITHER


def test_probe_without_a_compiler(build, probe, capsys):
    with pytest.raises(build.CCompilerError, match="compiler: no"):
        probe(rejected=["everything"])
    assert "no working C++ compiler (compiler: no), so this installs as pure Python" in capsys.readouterr().err


def test_architecture_is_the_machines_on_macos(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setenv("ARCHFLAGS", "-arch arm64 -arch x86_64")
    setup_script()
    assert os.environ["ARCHFLAGS"] == "-arch arm64 -arch x86_64"
    del os.environ["ARCHFLAGS"]
    setup_script()
    assert os.environ["ARCHFLAGS"] == "-arch arm64"
