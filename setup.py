"""Build ``dph_kernels._native`` from csrc/ if a C++ compiler is found, with CUDA kernels if nvcc is found.

Both are optional: without a compiler the package installs as pure Python, without nvcc for the CPU only. Skipped
components and the reasons are printed here (``pip install -v``) and later by ``dph doctor``. The build does not require
PyTorch.
"""

import copy
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
COMPILE = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",  # g++'s default; clang's contracts products and sums of the same expression only
]
CUDA_COMPILE = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_TARGETS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
]
CUDA_LIBRARIES = ["cudart_static", "dl", "rt", "pthread"]
INSTALL_COMPILER = "Apple's compiler (xcode-select --install)" if sys.platform == "darwin" else "g++ (apt install g++)"
PROBE = """
#include <cstdint>
int probe() {
  int sum = 0;
#pragma omp parallel for num_threads(2) reduction(+ : sum)
  for (int i = 0; i < 2; ++i) sum += i;
  return sum;
}
"""
FAILURES = (BaseError, CCompilerError)  # all exceptions that setuptools raises if a compiler or linker fails


# python.org's interpreters for macOS compile for Intel too, for which there is no PyTorch any more.
if sys.platform == "darwin":
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")


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


def openmp():
    """Return pairs of compiler and linker flags, best first: OpenMP, its vector loops without threads, neither.

    On macOS no OpenMP runtime is linked: a process with two copies of libomp is aborted, and PyTorch, which is imported
    first (dph_kernels/native.py), has loaded one. Its symbols are found when the module is loaded.
    """
    if sys.platform != "darwin":
        threads = [(["-fopenmp"], ["-fopenmp"])]
    elif pytorch_loads_libomp():
        # Apple's clang rejects -fopenmp, but passes it on.
        threads = [(["-Xpreprocessor", "-fopenmp"], ["-Wl,-undefined,dynamic_lookup"])]
    else:
        threads = []
    return [*threads, (["-fopenmp-simd"], []), ([], [])]


def pytorch_loads_libomp():
    """Whether PyTorch for macOS loads libomp: its wheels do, so also if it is not installed yet."""
    library = Path(sysconfig.get_path("platlib"), "torch", "lib", "libtorch_cpu.dylib")
    if not library.exists() or shutil.which("otool") is None:
        return True
    return "libomp" in subprocess.run(["otool", "-L", str(library)], capture_output=True, text=True).stdout


class BuildNative(build_ext):
    def build_extension(self, ext):
        """Build with CUDA, else for the CPU, else raise (setuptools then continues: the extension is optional)."""
        compiler_flags, linker_flags = self.probe()
        flags = {"compile": [*COMPILE, *compiler_flags], "link": linker_flags}
        try:
            objects, folders = build_cuda(Path(self.build_temp).resolve() / "cuda")
            self.build(ext, flags, objects, folders)
        except (CudaUnavailable, *FAILURES) as reason:
            say(f"building without the CUDA kernels: {reason}")
            self.build(ext, flags)

    def probe(self):
        """Return the first flags of ``openmp`` that work; raise if there is no working compiler."""
        for compiler_flags, linker_flags in openmp():
            try:
                self.build_probe(compiler_flags, linker_flags)
            except FAILURES as error:
                reason = error
                continue
            if not linker_flags:
                say("the C++ kernels will use one core: no OpenMP (`dph doctor` shows how to get it)")
            return compiler_flags, linker_flags
        say(f"no working C++ compiler ({reason}), so this installs as pure Python, without the C++ and CUDA kernels")
        say(f"to build them, install {INSTALL_COMPILER}, then run `pip install -e .` again")
        raise reason

    def build_probe(self, compiler_flags, linker_flags):
        """Compile and link a function that uses two threads."""
        source = Path(self.build_temp).resolve() / "probe.cpp"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(PROBE)
        extra = [*COMPILE, *compiler_flags]
        objects = self.compiler.compile([str(source)], output_dir=self.build_temp, extra_postargs=extra)
        target = str(source.with_suffix(".so"))
        self.compiler.link_shared_object(objects, target, extra_postargs=linker_flags, target_lang="c++")

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
