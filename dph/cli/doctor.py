"""What this installation has, which backend runs each operator and why, and the command that brings what is missing."""

import importlib.metadata as metadata
import os
import platform
from collections.abc import Iterator

import torch
from packaging.requirements import Requirement

from dph.evaluate.tables import table
from dph_kernels import dispatch

PACKAGES = ("dph", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
DEVICES = ("cpu", "cuda")


def report() -> str:
    """Four tables as text: versions, devices, operators (what ``auto`` takes on each device, and why), missing."""
    missing = list(_missing())
    sections = {
        "Versions": table(("what", "version"), _versions()),
        "Devices": table(("device", "what"), _devices()),
        "Operators": table(("operator", "device", "auto takes", "why"), _operators()),
        "Missing": table(("what", "how to get it"), missing) if missing else "nothing",
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items())


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in PACKAGES:
        yield name, _version(name) or "not installed"
    yield from dispatch.toolchain().items()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{_processor()}, {os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()}"
    if not torch.cuda.is_available():
        built = f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch is a CPU build"
        yield "cuda", f"none ({built})"
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"


def _processor() -> str:
    """The processor's name with the widest vectors it has, as PyTorch sees them."""
    return f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def _operators() -> Iterator[tuple[str, str, str | None, str]]:
    for operator in dispatch.AUTO:
        for device in DEVICES:
            if device == "cuda" and not torch.cuda.is_available():
                yield operator, device, None, "needs a CUDA device: none is here"
                continue
            choice = dispatch.choose(operator, device)
            yield operator, device, choice.backend, choice.reason


def _missing() -> Iterator[tuple[str, str]]:
    """(what is missing, why and the command that brings it): the native kernels and the packages of each extra."""
    for device in DEVICES if torch.cuda.is_available() else ("cpu",):
        if reason := dispatch.missing("laprop", device, device):
            yield "C++ kernels" if device == "cpu" else "CUDA kernels", reason
    try:
        distribution = metadata.distribution("dph")
    except metadata.PackageNotFoundError:
        yield "dph", "not installed, only importable from this folder: pip install -e ."
        return
    for extra in distribution.metadata.get_all("Provides-Extra") or ():
        if absent := _absent(distribution.requires or (), extra):
            yield ", ".join(absent), f"pip install -e '.[{extra}]'"


def _absent(requirements: list[str] | tuple[str, ...], extra: str) -> list[str]:
    """The packages that ``extra`` adds on this platform and that are not installed in the version it asks for."""
    absent = []
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            absent.append(requirement.name)
    return absent
