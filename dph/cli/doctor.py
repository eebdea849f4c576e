"""``dph doctor``: installed versions, devices, backends, and commands that install what is missing."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterable

from dph.errors import printable

HELP = "show versions, devices, backends and what is missing"
EXAMPLE = "dph doctor"
PACKAGES = ("dph", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
DEVICES = ("cpu", "cuda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: ``dph doctor`` has no arguments."""


def run(args: argparse.Namespace) -> None:
    """Print the report."""
    print(printable(report()))


def report() -> str:
    """Return four tables: versions, devices, operators (the backend that ``auto`` takes, and why), missing."""
    import torch

    from dph.evaluate.tables import table
    from dph_kernels import dispatch

    gpus = torch.cuda.is_available()

    versions = [("python", platform.python_version())]
    for name in PACKAGES:
        versions.append((name, _version(name) or "not installed"))
    versions += dispatch.toolchain().items()

    processor = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    devices = [("cpu", f"{processor}, {os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()}")]
    if not gpus:
        build = f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch is a CPU build"
        devices.append(("cuda", f"none ({build})"))
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        gib = gpu.total_memory / 2**30
        devices.append((f"cuda:{i}", f"{gpu.name}, {gib:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"))

    operators = []
    for operator in dispatch.AUTO:
        for device in DEVICES:
            if device == "cuda" and not gpus:
                operators.append((operator, device, None, "needs a CUDA device: none is here"))
                continue
            choice = dispatch.choose(operator, device)
            operators.append((operator, device, choice.backend, choice.reason))

    missing = []
    for device, kernels in zip(DEVICES, ("C++ kernels", "CUDA kernels"), strict=True):
        if device == "cpu" or gpus:
            reason = dispatch.missing("laprop", device, device)
            if reason:
                missing.append((kernels, reason))
    if reason := dispatch.one_thread():
        missing.append(("threads of C++ kernels", reason))
    missing += _missing_packages()

    sections = {
        "Versions": table(("what", "version"), versions),
        "Devices": table(("device", "what"), devices),
        "Operators": table(("operator", "device", "auto takes", "why"), operators),
        "Missing": table(("what", "how to get it"), missing) if missing else "nothing",
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items())


def _version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _missing_packages() -> list[tuple[str, str]]:
    """Return the missing packages of each extra and the command that installs them."""
    from importlib import metadata

    try:
        distribution = metadata.distribution("dph")
    except metadata.PackageNotFoundError:
        return [("dph", "not installed, only importable from this folder: pip install -e .")]
    missing = []
    for extra in distribution.metadata.get_all("Provides-Extra") or ():
        packages = _absent(distribution.requires or (), extra)
        if packages:
            missing.append((", ".join(packages), f"pip install -e '.[{extra}]'"))
    return missing


def _absent(requirements: Iterable[str], extra: str) -> list[str]:
    """Return the packages that ``extra`` adds on this platform and that are missing or have another version."""
    from packaging.requirements import Requirement

    absent = []
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            absent.append(requirement.name)
    return absent
