"""The native module: loaded once, shares PyTorch's threads, and says what is missing in words that help."""

import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from dph_kernels import dispatch, native

ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(native.missing("cpu") is not None, reason=f"needs the C++ module: {native.missing('cpu')}")


@pytest.fixture(autouse=True)
def forget():
    """Answers are remembered; each test here changes what they depend on."""
    yield
    native.missing.cache_clear()
    dispatch.missing.cache_clear()
    dispatch.choose.cache_clear()


def pretend(monkeypatch, module, error="cannot import name '_native' from 'dph_kernels'"):
    monkeypatch.setattr(native, "_native", module)
    monkeypatch.setattr(native, "_import_error", error, raising=False)
    for cached in (native.missing, dispatch.missing, dispatch.choose):
        cached.cache_clear()


def fake(**attributes):
    source = native.source_digest(native.CSRC)
    built = {"source": source, "cuda": 13000, "compiler": "g++ 12.2.0", "openmp": True, "vector_floats": 8}
    return types.SimpleNamespace(**(built | attributes))


@built
def test_module_is_what_the_sources_say():
    assert native.module().source == native.source_digest(native.CSRC)
    assert re.match(r"built by (g|clang)\+\+ \d+", native.toolchain()["C++ module"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@built
def test_one_openmp_runtime():
    """PyTorch and the module must not have a thread pool each."""
    code = (
        "import dph_kernels.native, re, pathlib\n"
        "assert dph_kernels.native.missing('cpu') is None\n"
        "print(len(set(re.findall(r'\\S*/lib(?:gomp|omp|iomp5)\\S*', pathlib.Path('/proc/self/maps').read_text()))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@built
@pytest.mark.parametrize("name", native.CPU_CAPABILITIES)
def test_instruction_sets_that_the_environment_permits(name):
    """Of every operator that has kernels for several."""
    code = (
        "from dph_kernels import native\n"
        "lanes = [f(16) for n, f in vars(native.module()).items() if n.endswith('_lanes')]\n"
        "print(native.cpu_capability(), *lanes, '|', native.toolchain()['C++ module'])"
    )
    environment = os.environ | {"DPH_CPU_CAPABILITY": name}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    words, _, description = done.stdout.strip().partition(" | ")
    capability, *lanes = words.split()
    floats = native.CPU_CAPABILITIES[capability]
    assert floats == min(native.CPU_CAPABILITIES[name], native.CPU_CAPABILITIES[native.cpu_capability()])
    assert len(lanes) >= 4
    assert set(lanes) == {str(floats)}
    assert description.endswith(f"CPU kernels for {capability} (DPH_CPU_CAPABILITY is {name})")


def test_an_instruction_set_that_does_not_exist():
    environment = os.environ | {"DPH_CPU_CAPABILITY": "AVX2"}
    code = "from dph.cli.main import main; raise SystemExit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    error = "DPH_CPU_CAPABILITY: expected one of baseline, avx2, avx512, got 'AVX2'"
    assert done.stderr == f"dph: error: {error}\n"


def test_without_module_and_compiler(monkeypatch):
    pretend(monkeypatch, None)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    for backend in ("cpu", "cuda"):
        assert "no C++ compiler; install g++ (apt install g++), then run `pip install" in native.missing(backend)
    with pytest.raises(RuntimeError, match="the C\\+\\+ module is not built"):
        native.module()
    assert native.toolchain() == {"C++ module": "not built", "C++ compiler": "not found", "nvcc": "not found"}


def test_without_module_though_there_is_a_compiler(monkeypatch):
    pretend(monkeypatch, None)
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setenv("CXX", "clang++ -m64")
    assert "though /usr/bin/clang++ is here: run `pip install" in native.missing("cpu")


def test_module_that_cannot_be_loaded(monkeypatch):
    pretend(monkeypatch, None, "_native.so: libgomp.so.1: cannot open shared object file")
    assert "cannot be loaded (_native.so: libgomp.so.1" in native.missing("cpu")
    assert native.toolchain()["C++ module"].startswith("broken: _native.so: libgomp.so.1")


def test_module_of_other_sources(monkeypatch):
    pretend(monkeypatch, fake(source="0123"))
    assert "built from other sources than csrc/ holds now: run `pip install" in native.missing("cpu")
    assert dispatch.choose("laprop", "cpu").backend == "reference"
    assert native.toolchain()["C++ module"].endswith("from other sources than csrc/ holds")


def test_installed_without_sources(monkeypatch, tmp_path):
    """A wheel has no csrc/ beside it: nothing to compare with."""
    pretend(monkeypatch, fake(source="0123"))
    monkeypatch.setattr(native, "CSRC", tmp_path / "csrc")
    assert native.missing("cpu") is None


def test_built_without_cuda(monkeypatch):
    pretend(monkeypatch, fake(cuda=0))
    assert native.missing("cpu") is None
    assert "built without CUDA: put nvcc on the PATH or set CUDA_HOME" in native.missing("cuda")
    assert native.toolchain()["C++ module"].endswith("without CUDA, CPU kernels for avx2")


def test_built_without_openmp(monkeypatch):
    pretend(monkeypatch, fake())
    assert dispatch.one_thread() is None
    pretend(monkeypatch, fake(openmp=False, cuda=0))
    assert native.missing("cpu") is None
    assert native.toolchain()["C++ module"] == "built by g++ 12.2.0, without CUDA, one thread, CPU kernels for avx2"
    monkeypatch.setattr(sys, "platform", "linux")
    assert "one thread, as its compiler had no OpenMP: unset CXX" in dispatch.one_thread()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "PyTorch had no OpenMP when it was built: install PyTorch's wheel" in dispatch.one_thread()


def test_no_gpu(monkeypatch):
    pretend(monkeypatch, fake())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch sees no CUDA device" in native.missing("cuda")


def test_driver_too_old(monkeypatch):
    pretend(monkeypatch, fake(cuda_probe=lambda: 35, cuda_error_text=lambda code: f"text of {code}"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert native.missing("cuda").startswith("CUDA runtime 13.0: text of 35; update the driver")


def test_gpu_too_old(monkeypatch):
    pretend(monkeypatch, fake(cuda_probe=lambda: 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "need compute capability 8.0 or later, this GPU has 7.5" in native.missing("cuda")
    native.missing.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert native.missing("cuda") is None


def test_auto_falls_back_and_says_so(monkeypatch):
    pretend(monkeypatch, None)
    choice = dispatch.choose("laprop", "cpu")
    assert choice.backend == "reference"
    assert choice.reason.startswith("not cpu: the C++ module is not built")
    with pytest.raises(RuntimeError, match="laprop: backend 'cpu' cannot run: the C\\+\\+ module is not built"):
        dispatch.choose("laprop", "cpu", "cpu")


def test_compiler_that_does_not_run(monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("false"))
    assert "does not run" in native.toolchain()["C++ compiler"]


def test_cuda_home_comes_before_the_path(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools'\necho 'Build cuda_1.2'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert dispatch.toolchain()["nvcc"] == f"{nvcc}: Build cuda_1.2"


def test_digest_sees_content_and_names(tmp_path):
    (tmp_path / "a.h").write_text("1")
    first = native.source_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("not a source")
    assert native.source_digest(tmp_path) == first
    (tmp_path / "a.h").rename(tmp_path / "b.h")
    assert native.source_digest(tmp_path) != first


def test_pointer():
    x = torch.arange(4.0)
    assert native.pointer(None) == 0
    assert native.pointer(x[1:]) == x.data_ptr() + 4
