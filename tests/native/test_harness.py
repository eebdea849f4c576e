"""The CPU kernels for Arm, without Python: compiled by a cross compiler, run by qemu and compared with fp64."""

import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import native_cases, neon
from helpers.build import setup_script

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
TRIPLE = "aarch64-linux-gnu"
COMPILERS = {  # with the line tables that binutils read
    "g++": [f"{TRIPLE}-g++", "-fopenmp", "-g1"],
    "clang++": ["clang++", f"--target={TRIPLE}", "-fopenmp-simd", "-Wno-pass-failed", "-gdwarf-4"],  # one thread
}
pytestmark = pytest.mark.slow

# Loops that need no NEON multiply-adds: some of their text, and why.
OTHERS = {
    "total += x[m * a.x_row + j] * value(": "the last columns, fewer than a vector",
    "largest = x[i] > largest": "a maximum",
    "philox(seed, place, stream": "integers",
    "pairs += int64_t": "integers",
    "parts[k * job.lanes + n] += job.reward": "one product per feature, whose own sum has as many as there are columns",
}


def require(*programs):
    """Skip the test if a program is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            packages = {f"{TRIPLE}-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user", "clang++": "clang"}
            pytest.skip(f"needs {program} (apt install {packages[program]})")


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """Compile the harness for Arm, as a statically linked program."""

    @functools.cache
    def build(compiler):
        command = COMPILERS[compiler]
        require(f"{TRIPLE}-g++", "qemu-aarch64", command[0])
        folder = tmp_path_factory.mktemp("harness")
        flags = [*setup_script().COMPILE, *command[1:], f"-I{ROOT / 'csrc'}"]

        def compile_one(source):
            target = folder / f"{source.stem}.o"
            run([command[0], *flags, "-c", source, "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, [*KERNELS, Path(__file__).with_name("harness.cpp")]))
        program = folder / "harness"
        run([*command, "-static", *objects, "-o", program])
        return program

    return build


def run(command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"[-3000:]


def results(program, cases, threads=1):
    """The exit code of the harness, and what it prints: a line per result."""
    command = ["qemu-aarch64", str(program), str(threads), str(cases)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # emulated threads that spin are slow
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@functools.cache
def cases():
    torch.manual_seed(0)
    return native_cases.all_cases()


@pytest.mark.parametrize(("compiler", "threads"), [("g++", 1), ("g++", 3), ("clang++", 1)])
def test_every_operator_gives_what_fp64_gives(harness, tmp_path, compiler, threads):
    program = harness(compiler)
    native_cases.write(tmp_path / "cases", cases())
    code, lines = results(program, tmp_path / "cases", threads)
    assert [line for line in lines if not line.startswith("ok ")] == []
    assert code == 0
    assert len(lines) == sum(len(case.results) for case in cases())
    assert {line.split()[1] for line in lines} == {path.stem for path in KERNELS}


def test_wrong_results_are_found(harness, tmp_path):
    """Each result of the last case of an operator in turn, moved by twice what it may be off."""
    program = harness("g++")
    last = {case.title.split()[0]: case for case in cases()}
    changed = []
    for case in last.values():
        for name, values in case.results.items():
            if not values.numel():
                continue
            moved = values.clone().reshape(-1)
            moved[-1] += 2 * case.bounds[name] + 1e-6
            changed.append(native_cases.Case(case.title, case.inputs, {**case.results, name: moved}, case.bounds))
    native_cases.write(tmp_path / "cases", changed)
    code, lines = results(program, tmp_path / "cases")
    assert code == 1
    wrong = [line for line in lines if line.startswith("WRONG ")]
    assert len(wrong) == len(changed)
    assert lines[-1] == f"{len(changed)} results are out of bounds"


@pytest.mark.parametrize("compiler", COMPILERS)
def test_inner_loops_are_multiply_adds_of_neon(harness, compiler):
    loops, instructions = neon.source_loops(), neon.multiply_adds(harness(compiler), f"{TRIPLE}-")
    missing = neon.without_neon(instructions, loops)
    wrong = [loop for loop in missing if not any(text in loop.text for text in OTHERS)]
    assert [f"{loop}: {missing[loop]}" for loop in wrong] == []
    assert sum(loop.adds_products for loop in loops) > 35
    assert all(any(text in loop.text for loop in loops) for text in OTHERS)


def test_loops_without_neon_are_found():
    """An instruction that is repeated and scalar, in a loop of its own and in one that has vectors elsewhere."""
    loops = [loop for loop in neon.source_loops() if loop.file == "linear_kernels.h" and loop.adds_products]
    loops = vectors, rest = loops[:2]
    place = (vectors.file, vectors.first)
    called = (("linear_kernels.h", 1),)
    fused = neon.MultiplyAdd(True, True, (place, *called), ())
    assert set(neon.without_neon([fused], loops)) == {rest}
    scalar = neon.MultiplyAdd(False, True, (place, ("linear_kernels.h", 2)), ())
    assert "called from (('linear_kernels.h', 2),)" in neon.without_neon([fused, scalar], loops)[vectors]
    assert set(neon.without_neon([], loops)) == {vectors, rest}


def test_flags_are_those_of_an_aarch64_build():
    """No option that only one of the compilers understands, and none of an instruction set."""
    assert all(re.fullmatch(r"-(std=|O|g|f)[\w+=-]+", flag) for flag in setup_script().COMPILE)
