"""``pip install -e .`` in pip's isolated build environment, with and without compilers, each in a copy of the tree.

The fresh environment can import this one's packages (PyTorch is large), so only the build is fresh. It needs PyPI for
setuptools and pybind11; the tests skip if that cannot be reached.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "constraints.txt",
    "csrc",
    "dph",
    "dph_kernels",
    "tests",
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names Linux's /bin/false and g++"),
]

STEP = """
import torch
from dph_kernels import dispatch, laprop, native
x = [torch.ones(5) for _ in range(4)]
laprop([x[0]], [x[1]], [x[2]], [x[3]], lr=1e-3)
assert x[0].max() < 1
print("backend:", dispatch.choose("laprop", "cpu").backend)
print("cpu:", native.missing("cpu"))
print("cuda:", native.missing("cuda"))
print("module:", native.toolchain()["C++ module"])
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources, without anything that was built."""
    target = tmp_path / "tree"
    target.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "build"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a fresh environment in which this one's packages can be imported too."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    outside = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (folder / "lib" / version / "site-packages" / "outside.pth").write_text("\n".join(sorted(outside)))
    return folder / "bin" / "python"


def path_without(program):
    """The PATH without the folders that have ``program``."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not (Path(folder) / program).exists())


def environment(**changes):
    """This process's environment without CXX, CUDA_HOME and the like, and with ``changes``."""
    unwanted = ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH", "PYTHONHOME")
    return {**{k: v for k, v in os.environ.items() if k not in unwanted}, "OMP_NUM_THREADS": "1", **changes}


def run(command, cwd, env):
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def pip(python, tree, env, *arguments):
    """Run pip and return its output. Skips if the build requirements cannot be downloaded."""
    code, output = run([python, "-m", "pip", *arguments], tree, env)
    if code and re.search(r"No matching distribution found for (setuptools|pybind11)", output):
        pytest.skip("PyPI (setuptools, pybind11) cannot be reached for an isolated build")
    assert code == 0, output[-3000:]
    return output


def install(python, tree, env):
    """Install the copy; return pip's output, and the backends that one step of the optimizer reports."""
    output = pip(python, tree, env, "install", "-v", "--no-deps", "--no-cache-dir", "-e", ".")
    assert (python.parent / "dph").exists(), "the dph command is missing"
    code, said = run([python, "-c", STEP], tree.parent, env)
    assert code == 0, said
    return output, dict(line.split(": ", 1) for line in said.strip().splitlines()[-4:])


@pytest.mark.parametrize("case", ["CXX=/bin/false", "CXX=/bin/false, no nvcc", "nothing on the PATH"])
def test_without_a_compiler_it_is_pure_python(python, tree, case):
    env = {
        "CXX=/bin/false": environment(CXX="/bin/false"),
        "CXX=/bin/false, no nvcc": environment(CXX="/bin/false", PATH=path_without("nvcc")),
        "nothing on the PATH": environment(PATH=str(python.parent)),
    }[case]
    output, said = install(python, tree, env)
    assert "no working C++ compiler" in output
    assert "installs as pure Python" in output
    assert "install g++ (apt install g++), then run `pip install -e .` again" in output
    assert list((tree / "dph_kernels").glob("*.so")) == []
    assert said["backend"] == "reference"
    assert said["cpu"].startswith("the C++ module is not built")
    assert "`pip install --no-deps -e .`" in said["cpu"]
    assert said["cuda"] == said["cpu"]


def test_tests_of_the_pure_python_road_pass(python, tree):
    env = environment(CXX="/bin/false")
    install(python, tree, env)
    tests = ["tests/kernels/test_laprop.py", "tests/kernels/test_native.py", "tests/test_imports.py"]
    code, output = run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], tree, env)
    assert code == 0, output[-3000:]
    assert "the C++ module is not built" in output, "the native backend should have been skipped"


@pytest.fixture
def compiler(tmp_path):
    """A C++ compiler that does not optimise, in a third of the time: these tests are about what is built."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return script(tmp_path / "compiler", 'exec g++ "$@" -O0')


def script(path, *lines):
    """A program of the shell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def test_without_nvcc_it_is_for_the_cpu(python, tree, compiler):
    output, said = install(python, tree, environment(CXX=compiler, PATH=path_without("nvcc")))
    assert "building without the CUDA kernels: nvcc was not found" in output
    assert len(list((tree / "dph_kernels").glob("_native*.so"))) == 1
    assert said["backend"] == "cpu"
    assert said["cpu"] == "None"
    assert said["cuda"].startswith("the C++ module was built without CUDA: put nvcc on the PATH")


def test_clang_builds_it_too(python, tree, tmp_path):
    if shutil.which("clang++") is None:
        pytest.skip("needs clang++ (apt install clang)")
    compiler = script(tmp_path / "compiler", 'exec clang++ "$@" -O0')
    output, said = install(python, tree, environment(CXX=compiler, PATH=path_without("nvcc")))
    assert said["backend"] == "cpu"
    assert said["cpu"] == "None"
    assert said["module"].startswith("built by clang++ ")
    # Without the package libomp-dev.
    assert ("the C++ kernels will use one core" in output) is (", one thread, " in said["module"])


def test_nvcc_that_fails_costs_the_cuda_kernels_only(python, tree, compiler, tmp_path):
    script(tmp_path / "cuda" / "bin" / "nvcc", "echo unsupported host compiler >&2", "exit 1")
    output, said = install(python, tree, environment(CXX=compiler, CUDA_HOME=str(tmp_path / "cuda")))
    assert "building without the CUDA kernels: " in output
    assert "unsupported host compiler" in output
    assert said["backend"] == "cpu"
    assert said["cpu"] == "None"


def test_wheel_holds_the_packages_and_the_recipes_and_nothing_else(python, tree, tmp_path):
    env = environment(CXX="/bin/false")
    pip(python, tree, env, "wheel", "--no-deps", "--no-cache-dir", "-w", tmp_path / "wheels", ".")
    (wheel,) = (tmp_path / "wheels").glob("dph-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for folder in ("dph", "dph_kernels") for path in (tree / folder).rglob("*")]
    sources = [path for path in files if path.suffix in (".py", ".yaml", ".html")]
    assert {p.relative_to(tree).as_posix() for p in sources if p.parent.name != "build"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"dph", "dph_kernels"}


def test_sdist_holds_all_that_is_built(tree):
    """The native module can be built from it: headers and CUDA sources too, which setuptools does not look for."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    code, output = run([sys.executable, "setup.py", "-q", "sdist"], tree, environment())
    assert code == 0, output[-3000:]
    (archive,) = (tree / "dist").glob("dph-*.tar.gz")
    with tarfile.open(archive) as file:
        names = {member.name.partition("/")[2] for member in file if member.isfile()}
    csrc = {path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in csrc} == {".cpp", ".cu", ".h"}
    recipes = {path.relative_to(tree).as_posix() for path in (tree / "dph" / "train" / "recipes").glob("*.yaml")}
    others = {"setup.py", "pyproject.toml", "constraints.txt", "dph/model/model.py", "dph/serve/page.html"}
    assert csrc | recipes | others <= names


def test_build_needs_no_pytorch():
    requires = re.search(r"\[build-system\]\s*requires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)
    assert sorted(re.findall(r'"([\w-]+)', requires[1])) == ["pybind11", "setuptools"]
