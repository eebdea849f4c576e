"""The C++/CUDA module that setup.py builds from csrc/, and the reasons why it cannot run.

PyTorch is imported first: it loads the OpenMP runtime, which the module then shares instead of starting a second pool.
"""

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CPU_CAPABILITIES = {"baseline": 4, "avx2": 8, "avx512": 16}
"""Instruction set of the CPU's kernels -> floats per vector. The environment variable DPH_CPU_CAPABILITY, read once,
names the widest one that they may use, if the CPU has it, as ATEN_CPU_CAPABILITY does for PyTorch."""


def _check_capability(name: str) -> None:
    """Raise ValueError for a value of DPH_CPU_CAPABILITY that the module would ignore."""
    if name and name not in CPU_CAPABILITIES:
        expected = ", ".join(CPU_CAPABILITIES)
        raise ValueError(f"DPH_CPU_CAPABILITY: expected one of {expected}, got {name!r}")


_check_capability(os.environ.get("DPH_CPU_CAPABILITY", ""))

try:
    from dph_kernels import _native
except ImportError as error:
    _native, _import_error = None, str(error)

CSRC = Path(__file__).resolve().parents[1] / "csrc"
REBUILD = "`pip install --no-deps -e .` in the source folder"
INSTALL_COMPILER = (  # as in setup.py
    "Apple's compiler (xcode-select --install)" if sys.platform == "darwin" else "g++ (apt install g++)"
)
threads = torch.get_num_threads  # of a CPU kernel
CAPABILITY = (8, 0)  # the oldest GPU that setup.py compiles for


def module() -> ModuleType:
    """Return the native module; raises RuntimeError with the reason if it cannot run."""
    if reason := missing("cpu"):
        raise RuntimeError(reason)
    return _native


def function(name: str) -> Callable[..., Any] | None:
    """Return a function of the native module, None if the module is not built or has no such function."""
    return getattr(_native, name, None)


@functools.cache
def missing(backend: str) -> str | None:
    """Return what the native ``backend`` ("cpu" or "cuda") lacks and the command that installs it, or None."""
    if _native is None:
        return _not_built()
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        return f"the C++ module needs PyTorch 2.11 or later, got {torch.__version__}"
    if _stale():
        return f"the C++ module was built from other sources than csrc/ holds now: run {REBUILD}"
    return None if backend == "cpu" else _missing_cuda()


def toolchain() -> dict[str, str]:
    """Return how the native module was built, and the compilers that a build would find: name -> description."""
    return {
        "C++ module": _description(),
        "C++ compiler": _version(compiler(), 0),
        "nvcc": _version(nvcc(), -1),
    }


def cpu_capability() -> str:
    """Return the name in CPU_CAPABILITIES of the instruction set that the CPU's kernels use."""
    return next(name for name, floats in CPU_CAPABILITIES.items() if floats == _native.vector_floats)


def one_thread() -> str | None:
    """Return why the C++ kernels use one thread and the command that changes it, or None."""
    if missing("cpu") or _native.openmp:
        return None
    if sys.platform == "darwin":
        reason = "PyTorch had no OpenMP when it was built: install PyTorch's wheel (pip install torch)"
    else:
        reason = "its compiler had no OpenMP: unset CXX to use g++, or install clang's (apt install libomp-dev)"
    return f"the C++ module uses one thread, as {reason}, then run {REBUILD}"


def _description() -> str:
    if _native is None:
        return "not built" if _import_error.startswith("cannot import name") else f"broken: {_import_error}"
    cuda = f"CUDA {_cuda_version()}" if _native.cuda else "without CUDA"
    threads = "" if getattr(_native, "openmp", True) else ", one thread"  # older modules lack it
    built = f"built by {_native.compiler}, {cuda}{threads}"
    if _stale():
        return f"{built}, from other sources than csrc/ holds"
    limit = os.environ.get("DPH_CPU_CAPABILITY")
    return f"{built}, CPU kernels for {cpu_capability()}" + (f" (DPH_CPU_CAPABILITY is {limit})" if limit else "")


def _cuda_version() -> str:
    return f"{_native.cuda // 1000}.{_native.cuda % 1000 // 10}"


def _version(command: str | None, line: int) -> str:
    """Return one line of the output of ``command --version``."""
    if command is None:
        return "not found"
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command} does not run: {error}"
    lines = done.stdout.strip().splitlines()
    return f"{command}: {lines[line].strip()}" if lines else command


def compiler() -> str | None:
    """Return the path of the C++ compiler that a build would use, or None."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(shlex.split(os.environ.get("CXX") or default)[0])


def nvcc() -> str | None:
    """Return the path of the CUDA compiler that a build would use, or None."""
    folders = [str(Path(os.environ[name]) / "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)]))


def _not_built() -> str:
    if not _import_error.startswith("cannot import name"):  # the file is there
        return f"the C++ module cannot be loaded ({_import_error}): run {REBUILD}"
    if compiler() is None:
        return f"the C++ module is not built: no C++ compiler; install {INSTALL_COMPILER}, then run {REBUILD}"
    return f"the C++ module is not built, though {compiler()} is here: run {REBUILD} (with -v for its output)"


def _stale() -> bool:
    """Whether csrc/ next to the package (an editable install) differs from the sources of the compiled module."""
    return CSRC.is_dir() and _native.source != source_digest(CSRC)


def source_digest(folder: Path) -> str:
    """Return the digest of the C++ and CUDA sources, as setup.py computes and compiles it in."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def _missing_cuda() -> str | None:
    if not _native.cuda:
        return (
            "the C++ module was built without CUDA: put nvcc on the PATH or set CUDA_HOME "
            f"(apt install nvidia-cuda-toolkit, or conda install -c nvidia cuda-toolkit), then run {REBUILD}"
        )
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device: needs a GPU, its driver (see `nvidia-smi`) and a CUDA build of PyTorch"
    if code := _native.cuda_probe():
        text = _native.cuda_error_text(code)
        return f"CUDA runtime {_cuda_version()}: {text}; update the driver, or rebuild with an older nvcc"
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        return f"the CUDA kernels need compute capability 8.0 or later, this GPU has {capability[0]}.{capability[1]}"
    return None


def pointer(tensor: Tensor | None) -> int:
    """Return the address of a tensor's data; 0 for no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(device: torch.device) -> int:
    """Return the handle of PyTorch's current CUDA stream on ``device``."""
    return torch.cuda.current_stream(device).cuda_stream


def device_guard(device: torch.device) -> AbstractContextManager:
    """Return a context manager that makes ``device`` current for CUDA launches, if it is not already."""
    current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if current else torch.cuda.device(device)
