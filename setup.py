"""Build ``dph_kernels._native`` from csrc/ if a C++ compiler is found, with CUDA kernels if nvcc is found.

Both are optional: without a compiler the package installs as pure Python, without nvcc for the CPU only. Skipped
components and the reasons are printed here (``pip install -v``) and later by ``dph doctor``. The build does not require
PyTorch.
"""

import copy
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
COMPILE = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
CUDA_COMPILE = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_TARGETS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
]
CUDA_LIBRARIES = ["cudart_static", "dl", "rt", "pthread"]
FAILURES = (BaseError, CCompilerError)  # all exceptions that setuptools raises if a compiler or linker fails


class CudaUnavailable(Exception):
    """Reason why the CUDA kernels are not built."""


def say(message):
    print(f"dph_kernels: {message}", file=sys.stderr, flush=True)


def sources(suffix):
    return sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob(f"*{suffix}"))


def digest():
    """Digest of csrc/, compiled into the module to detect one built from older sources (dph_kernels/native.py)."""
    total = hashlib.sha256()
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu")):
        total.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def run(command):
    """Run a compiler and return its output; raise CudaUnavailable with the end of the output if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise CudaUnavailable(f"{command[0]} cannot be started: {error.strerror}") from error
    if done.returncode != 0:
        tail = (done.stderr or done.stdout).strip()[-2000:] or "no output"
        raise CudaUnavailable(f"`{shlex.join(command)}` failed with exit code {done.returncode}:\n{tail}")
    return done.stdout + done.stderr


def find_nvcc():
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    if found := shutil.which("nvcc"):
        return found
    raise CudaUnavailable("nvcc was not found (on the PATH or in CUDA_HOME/bin)")


def build_cuda(folder):
    """Compile csrc/**/*.cu; return the object files and the directories of the CUDA runtime library."""
    nvcc = find_nvcc()
    folder.mkdir(parents=True, exist_ok=True)
    # nvcc may be a wrapper script, so the library directories are read from its dry run.
    plan = run([nvcc, "--dryrun", "-c", sources(".cu")[0], "-o", str(folder / "unused.o")])
    libraries = re.findall(r'"-L([^"]+)"', next((line for line in plan.splitlines() if "LIBRARIES=" in line), ""))
    objects = [str(folder / (Path(name).stem + ".cu.o")) for name in sources(".cu")]
    commands = [
        [nvcc, *CUDA_COMPILE, *CUDA_TARGETS, "-c", source, "-o", target]
        for source, target in zip(sources(".cu"), objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    return objects, libraries


class BuildNative(build_ext):
    def build_extension(self, ext):
        """Build with CUDA, else for the CPU, else raise (setuptools then continues: the extension is optional)."""
        openmp = self.probe()
        flags = {"compile": [*COMPILE, *openmp], "link": openmp}
        try:
            objects, folders = build_cuda(Path(self.build_temp).resolve() / "cuda")
            self.build(ext, flags, objects, folders)
        except (CudaUnavailable, *FAILURES) as reason:
            say(f"building without the CUDA kernels: {reason}")
            self.build(ext, flags)

    def probe(self):
        """Return the OpenMP flag if the compiler supports it; raise if there is no working compiler."""
        source = Path(self.build_temp).resolve() / "probe.cpp"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("#include <cstdint>\nint probe() { return 0; }\n")
        try:
            self.compiler.compile([str(source)], output_dir=self.build_temp, extra_postargs=[*COMPILE, "-fopenmp"])
            return ["-fopenmp"]
        except FAILURES:
            pass
        try:
            self.compiler.compile([str(source)], output_dir=self.build_temp, extra_postargs=COMPILE)
        except FAILURES as error:
            say(f"no working C++ compiler ({error}), so this installs as pure Python, without the C++ and CUDA kernels")
            say("to build them, install g++ (apt install g++), then run `pip install -e .` again")
            raise
        say("the compiler does not support OpenMP: the C++ kernels will use one core")
        return []

    def build(self, ext, flags, cuda_objects=(), cuda_folders=()):
        ext = copy.copy(ext)
        macros = [*ext.define_macros, *([("DPH_CUDA", "1")] if cuda_objects else [])]

        def compile_one(source):
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=ext.include_dirs,
                extra_postargs=flags["compile"],
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compile_one, ext.sources))
        ext.sources = []
        ext.extra_objects = [name for names in made for name in names] + list(cuda_objects)
        ext.extra_link_args = flags["link"]
        ext.library_dirs = list(cuda_folders)
        ext.libraries = CUDA_LIBRARIES if cuda_objects else []
        super().build_extension(ext)


native = Extension(
    "dph_kernels._native",
    sources(".cpp"),
    include_dirs=[str(CSRC), pybind11.get_include()],
    define_macros=[("DPH_SOURCE", f'"{digest()}"')],
    language="c++",
    optional=True,
)

# The result depends on the compilers that are installed, so the extension is always rebuilt.
setup(ext_modules=[native], cmdclass={"build_ext": BuildNative}, options={"build_ext": {"force": True}})
