"""Ahead-of-time compilation of every GPU kernel, as it would be launched, and a report of the compiler's output.

No GPU is needed. Triton kernels are found through ``launches(capability)`` of each ``dph_kernels/<operator>/triton.py``
and compiled with Triton; CUDA kernels are those of csrc/**/*.cu, compiled with nvcc. Registers, spilled bytes and
static shared memory are those of ``ptxas -v``; instructions are counted in the disassembled machine code of CUDA
kernels, and of Triton's if a launch requires some.

    python -m dph_kernels.audit --arch 80 --only rope_attention
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dph_kernels import native
from dph_kernels.dispatch import interpreted
from dph_kernels.launcher import Launch

# Compute capability -> bytes of shared memory per thread block, at most (CUDA programming guide, table of technical
# specifications): A100, and H100 or H200.
SHARED = {80: 163 * 1024, 90: 227 * 1024}

# The same options as in setup.py.
CUDA_COMPILE = ["-std=c++17", "-O3"]

# Machine instructions: tensor cores; asynchronous copies to shared memory, by threads and in bulk.
KINDS = {"hmma": ["HMMA"], "hgmma": ["HGMMA"], "ldgsts": ["LDGSTS"], "bulk": ["UBLKCP", "UTMALDG"]}


@dataclass(frozen=True)
class Row:
    """Measurements of one kernel on one architecture: resources, instruction counts and problems.

    ``spilled`` are the bytes per thread that spill instructions store or load, the larger number; ``shared`` the bytes
    per block. None: not measured.
    """

    kernel: str
    arch: int
    registers: int | None = None
    spilled: int | None = None
    shared: int | None = None
    hmma: int | None = None
    hgmma: int | None = None
    ldgsts: int | None = None
    bulk: int | None = None
    problems: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """One word for the table."""
        return "FAILS" if self.problems else "ok"


@dataclass(frozen=True)
class TritonJob:
    """Launch number ``index`` of a module with ``launches``. Workers look it up, as kernels cannot be pickled."""

    module: str
    index: int
    name: str
    arch: int


@dataclass(frozen=True)
class CudaJob:
    """One CUDA source file, all of its kernels."""

    source: Path
    arch: int

    @property
    def name(self) -> str:
        """Path under csrc/, without the suffix."""
        return self.source.relative_to(native.CSRC).with_suffix("").as_posix()


Job = TritonJob | CudaJob


def operators() -> list[str]:
    """Return the names of this package's modules with Triton kernels."""
    paths = sorted(Path(__file__).parent.glob("*/triton.py"))
    names = [f"dph_kernels.{path.parent.name}.triton" for path in paths]
    return [name for name in names if hasattr(importlib.import_module(name), "launches")]


@functools.cache
def launches(module: str, arch: int) -> list[Launch]:
    """Return the launches of a module on an architecture."""
    return importlib.import_module(module).launches(arch)


def triton_jobs(modules: Iterable[str], archs: Sequence[int]) -> list[TritonJob]:
    """Return every launch of ``modules`` on every architecture."""
    return [
        TritonJob(module, index, launch.name, arch)
        for module in modules
        for arch in archs
        for index, launch in enumerate(launches(module, arch))
    ]


def cuda_jobs(archs: Sequence[int]) -> list[CudaJob]:
    """Return every CUDA source on every architecture."""
    return [CudaJob(source, arch) for source in sorted(native.CSRC.rglob("*.cu")) for arch in archs]


def audit(job: Job) -> list[Row]:
    """Compile one job and return a row for each of its kernels."""
    return _audit_triton(job) if isinstance(job, TritonJob) else _audit_cuda(job)


def _audit_triton(job: TritonJob) -> list[Row]:
    launch = launches(job.module, job.arch)[job.index]
    row = Row(job.name, job.arch)
    try:
        cubin, log, shared = compile_triton(launch, job.arch)
    except Exception as error:  # any error of the compiler is reported in the row
        return [replace(row, problems=(f"does not compile: {_one_line(error)}",))]
    measured = measure(log)
    if len(measured) != 1:
        raise RuntimeError(f"{job.name}: expected ptxas to report one kernel, got {list(measured)} in:\n{log}")
    [(symbol, figures)] = measured.items()
    row = replace(row, **{**figures, "shared": shared})
    if launch.matrix or launch.copies:  # to disassemble takes longer than to compile
        row = replace(row, **instructions(cubin, _cuobjdump_of_triton())[symbol])
    problems = judge(row, launch.spill_budget, launch.matrix, launch.copies) + losses(log)
    return [replace(row, problems=problems)]


def compile_triton(launch: Launch, arch: int) -> tuple[bytes, str, int]:
    """Return the machine code of a launch, the output of ptxas, and its bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    names, aligned = launch.kernel.arg_names, [path.split(".") for path in launch.aligned]
    given = {*launch.signature, *launch.constants, *(name for name, *_ in aligned)}
    if unknown := sorted(given.symmetric_difference(names)):
        raise ValueError(f"signature: expected the arguments of {launch.kernel.__name__}, and these differ: {unknown}")
    attributes = {(names.index(name), *map(int, indices)): [["tt.divisibility", 16]] for name, *indices in aligned}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    if launch.maxnreg:
        options["maxnreg"] = launch.maxnreg
    target = GPUTarget("cuda", arch, 32)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), triton.knobs.nvidia.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=target, options=options)
        if "spill stores" not in output.getvalue():  # the kernel is from Triton's cache: only ptxas has to run again
            backend = make_backend(target)
            backend.make_cubin(compiled.asm["ptx"], {}, backend.parse_options(options), arch)
    return compiled.asm["cubin"], output.getvalue(), compiled.metadata.shared


def _cuobjdump_of_triton() -> str:
    import triton

    return triton.knobs.nvidia.cuobjdump.path


def _audit_cuda(job: CudaJob) -> list[Row]:
    target = f"-gencode=arch=compute_{job.arch},code=sm_{job.arch}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [native.nvcc(), *CUDA_COMPILE, target, "-Xptxas=-v", "-cubin", str(job.source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return [Row(job.name, job.arch, problems=(f"does not compile: {_one_line(done.stderr)}",))]
        code = cubin.read_bytes()
    measured = measure(done.stderr)
    tool = cuobjdump()
    counted = instructions(code, tool) if tool and measured else {}
    names = [short_name(symbol) for symbol in measured]
    rows = []
    for symbol, figures in measured.items():
        name = short_name(symbol) if names.count(short_name(symbol)) == 1 else symbol  # templates share one
        row = Row(f"{job.name} {name}", job.arch, **figures, **counted.get(symbol, {}))
        rows.append(replace(row, problems=judge(row) + losses(done.stderr)))
    return rows


def cuobjdump() -> str | None:
    """Return the disassembler for nvcc's machine code: nvcc's own, else one on the PATH, else Triton's."""
    toolkit = str(Path(native.nvcc()).resolve().parent)
    if tool := shutil.which("cuobjdump", path=os.pathsep.join([toolkit, os.environ.get("PATH", os.defpath)])):
        return tool
    return _cuobjdump_of_triton() if importlib.util.find_spec("triton") else None


def measure(log: str) -> dict[str, dict[str, int]]:
    """Parse the output of ``ptxas -v``: kernel symbol -> registers, spilled and (static) shared bytes.

    Spills of functions that are not inlined are added to every kernel, since any kernel may call them.
    """
    entries = re.findall(r"Compiling entry function '(\w+)'", log)
    spills = {
        name: max(int(stores), int(loads))
        for name, stores, loads in re.findall(
            r"Function properties for (\w+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads", log
        )
    }
    uses = re.findall(r"Used (\d+) registers(.*)", log)
    if not len(entries) == len(uses) <= len(spills):
        raise RuntimeError(f"ptxas -v: expected registers and spills of {entries}, got:\n{log}")
    called = sum(spilled for name, spilled in spills.items() if name not in entries)
    figures = {}
    for name, (registers, rest) in zip(entries, uses, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        figures[name] = {
            "registers": int(registers),
            "spilled": spills[name] + called,
            "shared": int(shared[1]) if shared else 0,
        }
    return figures


def losses(log: str) -> tuple[str, ...]:
    """Return the performance losses that ptxas reports, such as serialized wgmma instructions."""
    reported = re.findall(r"Potential Performance Loss: (.*?)(?: in the function .*)?$", log, re.M)
    return tuple(dict.fromkeys(reported))


def instructions(cubin: bytes, tool: str) -> dict[str, dict[str, int]]:
    """Count the instructions of each kind in machine code, by kernel symbol."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    counted = {}
    for section in re.split(r"^\s*Function : ", listing, flags=re.M)[1:]:
        symbol, code = section.split("\n", 1)
        operations = Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)", code, re.M))
        counted[symbol.strip()] = {kind: sum(operations[n] for n in names) for kind, names in KINDS.items()}
    return counted


def judge(row: Row, spill_budget: int = 0, matrix: str = "", copies: bool = False) -> tuple[str, ...]:
    """Return the problems of a kernel, given the requirements of its launch (fields of Launch)."""
    problems = []
    if row.spilled > spill_budget:
        problems.append(f"spills {row.spilled} bytes, the budget is {spill_budget}")
    if row.shared > SHARED[row.arch]:
        problems.append(f"shared memory of {row.shared} bytes, sm_{row.arch} has {SHARED[row.arch]}")
    if matrix == "HGMMA" and not row.hgmma:
        problems.append("no HGMMA (wgmma) instruction")
    if matrix == "HMMA" and not (row.hmma or row.hgmma):
        problems.append("no tensor-core instruction (HMMA)")
    if copies and not (row.ldgsts or row.bulk):
        problems.append("no asynchronous copy (LDGSTS, UBLKCP, UTMALDG)")
    return tuple(problems)


def short_name(symbol: str) -> str:
    """Return the function's own name in a mangled C++ name: ``_ZN3dph6kernelEf`` -> ``kernel``."""
    name, rest = symbol, re.sub("^_ZN?", "", symbol)
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
        if not symbol.startswith("_ZN"):  # the types of its arguments follow
            break
    return name


def _one_line(error: Any) -> str:
    """Return one line of a compiler's message: the first with "error" in it, else the last."""
    lines = [line.strip() for line in f"{error}".splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error" in line.lower()), lines[-1])


# Columns of the table: the fields of Row, and the verdict.
HEADERS = ("kernel", "arch", "registers", "spilled", "shared", "HMMA", "HGMMA", "LDGSTS", "bulk", "verdict", "problems")


def table(rows: Iterable[Row]) -> str:
    """Format the rows in aligned columns, numbers to the right, "-" for None."""
    lines = [list(HEADERS)]
    for row in rows:
        figures = (row.registers, row.spilled, row.shared, row.hmma, row.hgmma, row.ldgsts, row.bulk)
        cells = ["-" if value is None else str(value) for value in figures]
        lines.append([row.kernel, f"sm_{row.arch}", *cells, row.verdict, "; ".join(row.problems)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADERS) - 1)]
    widths.append(len(HEADERS[-1]))  # the last column is not padded
    lines.insert(1, ["-" * width for width in widths])
    right = [2 <= i <= 8 for i in range(len(HEADERS))]
    return "\n".join(_line(line, widths, right) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    aligned = zip(cells, widths, right, strict=True)
    return "  ".join(text.rjust(width) if end else text.ljust(width) for text, width, end in aligned).rstrip()


def plan(
    modules: Sequence[str] | None, archs: Sequence[int], only: Sequence[str] | None
) -> tuple[list[Job], list[str]]:
    """Return the jobs that can be compiled on this machine, and a note for each part that cannot."""
    jobs, notes = [], []
    if importlib.util.find_spec("triton"):
        jobs += triton_jobs(operators() if modules is None else modules, archs)
    else:
        notes.append("Triton's kernels are left out: triton is not installed (pip install triton)")
    if modules is None:
        if not native.CSRC.is_dir():
            notes.append("the CUDA kernels are left out: csrc/ is not next to the package")
        elif native.nvcc() is None:
            notes.append("the CUDA kernels are left out: nvcc was not found (on the PATH or in CUDA_HOME/bin)")
        else:
            jobs += cuda_jobs(archs)
            if cuobjdump() is None:
                notes.append("the instructions of CUDA kernels are not counted: cuobjdump was not found")
    return [job for job in jobs if only is None or any(part in job.name for part in only)], notes


def run(jobs: Sequence[Job]) -> list[Row]:
    """Compile all jobs on all cores and return their rows, in order."""
    rows = {}
    # Spawned processes: Triton's state and PyTorch's threads do not survive a fork.
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(audit, job): job for job in jobs}
        for done in tqdm(as_completed(running), total=len(jobs), unit="kernel", disable=None):
            rows[running[done]] = done.result()
    return [row for job in jobs for row in rows[job]]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m dph_kernels.audit",
        description="Compile every GPU kernel ahead of time (no GPU needed) and report registers, spilled bytes, "
        "shared memory, tensor-core instructions and asynchronous copies. Exit code 0: all is well; 1: a kernel "
        "fails; 2: nothing could be audited.",
        epilog="example: python -m dph_kernels.audit --arch 80 --only rope_attention cuda --json audit.json",
    )
    result.add_argument("--arch", nargs="+", type=int, choices=sorted(SHARED), default=sorted(SHARED), help="sm_...")
    result.add_argument(
        "--only", nargs="+", metavar="NAME", help="only kernels with one of these in the name or file name"
    )
    result.add_argument("--module", nargs="+", help="audit launches() of these Python modules, not the package")
    result.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the audit, print the table and the kernels that fail, and return the exit code."""
    options = parser().parse_args(arguments)
    if interpreted():
        print("audit: TRITON_INTERPRET makes Triton interpret its kernels, not compile them: unset it", file=sys.stderr)
        return 2
    began = time.perf_counter()
    jobs, notes = plan(options.module, options.arch, options.only)
    rows = run(jobs) if jobs else []
    for note in notes:
        print(f"audit: {note}", file=sys.stderr)
    if not rows:
        named = f"; names with one of: {', '.join(options.only)}" if options.only else ""
        print(f"audit: nothing to compile{named}", file=sys.stderr)
        return 2
    print(table(rows))
    failing = [row for row in rows if row.problems]
    names = ", ".join(f"{row.kernel} (sm_{row.arch})" for row in failing)
    verdict = f"{len(failing)} fail: {names}" if failing else "all are well"
    print(f"\n{len(rows)} kernels in {time.perf_counter() - began:.0f} s: {verdict}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
