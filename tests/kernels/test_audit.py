"""The audit: the package's GPU kernels are well on sm_80 and sm_90, and kernels that are not are reported."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dph_kernels import audit, native

ROOT = Path(__file__).resolve().parents[2]
TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="needs triton, which is not installed")
needs_nvcc = pytest.mark.skipif(native.nvcc() is None, reason="needs nvcc, which was not found")

# Launches of one product of matrices: one that is well, and one for each thing that can be wrong.
TOY = """
import triton
import triton.language as tl

from dph_kernels.launcher import Launch


@triton.jit
def product(a, b, c, K, row_a, row_b, row_c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, P: tl.constexpr):
    m, n, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for i in range(0, K, BK):
        x = tl.load(a + m[:, None] * row_a + (i + k)[None, :])
        y = tl.load(b + (i + k)[:, None] * row_b + n[None, :])
        total = tl.dot(x, y, total, input_precision=P)
    tl.store(c + m[:, None] * row_c + n[None, :], total.to(c.dtype.element_ty))


@triton.jit
def grouped(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, P: tl.constexpr):
    product(a[0], b[0], c[0], K, a[1], b[1], c[1], BM, BN, BK, P)


TENSORS, SIZES, CONSTANTS = ("a", "b", "c"), ("K", "row_a", "row_b", "row_c"), ("BM", "BN", "BK", "P")


def launch(name, tile, dtype="*bf16", warps=4, stages=2, aligned=TENSORS + SIZES, precision="ieee", **needs):
    types = dict.fromkeys(TENSORS, dtype) | dict.fromkeys(SIZES, "i32") | dict.fromkeys(CONSTANTS, "constexpr")
    values = dict(zip(CONSTANTS, (*tile, precision)))
    return Launch(name, product, types, values, aligned, warps, stages, **needs)


def launch_grouped(name, tile, **needs):
    types = dict.fromkeys(TENSORS, ("*bf16", "i32")) | {"K": "i32"} | dict.fromkeys(CONSTANTS, "constexpr")
    aligned = ("K", *(f"{tensor}.{i}" for tensor in TENSORS for i in range(2)))
    return Launch(name, grouped, types, dict(zip(CONSTANTS, (*tile, "ieee"))), aligned, 4, 2, **needs)


def launches(capability):
    matrix = {80: "HMMA", 90: "HGMMA"}[capability]
    return [
        launch("well", (64, 64, 32), matrix=matrix, copies=True),
        launch("spilling", (64, 128, 32), warps=1),
        launch("spilling as it may", (64, 128, 32), warps=1, spill_budget=10**6),
        launch("single precision", (16, 16, 16), dtype="*fp32", matrix="HMMA"),
        launch("narrow", (16, 16, 16), warps=1, matrix=matrix),
        launch("unaligned", (64, 64, 32), aligned=(), matrix=matrix, copies=True),
        launch("deep", (64, 64, 128), warps=8, stages=9),
        launch("odd", (16, 16, 24)),
        launch("misnamed", (16, 16, 16), aligned=("z",)),
        launch_grouped("grouped", (64, 64, 32), matrix=matrix, copies=True),
    ]
"""


def run(*arguments, **changed):
    """The audit in a process of its own, which compiles: in this one Triton may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "dph_kernels.audit", *map(str, arguments)],
        cwd=ROOT,
        env={**environment, **changed},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Audits the toy module; gives the finished process and the rows."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_kernels.py").write_text(TOY)

    def audited(*arguments):
        found = folder / "rows.json"
        paths = os.pathsep.join([str(ROOT), str(folder)])
        changed = {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(folder / "cache")}
        done = run("--module", "toy_kernels", "--json", found, *arguments, **changed)
        assert found.exists(), done.stdout + done.stderr
        return done, {(row["kernel"], row["arch"]): row for row in json.loads(found.read_text())}

    return audited


@pytest.fixture(scope="module")
def toys(toy):
    return toy()


@pytest.mark.slow
@needs_triton
@needs_nvcc
def test_every_kernel_of_the_package_is_well():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all are well" in done.stdout
    for arch in ("sm_80", "sm_90"):
        lines = [line for line in done.stdout.splitlines() if f" {arch} " in line]
        for module in audit.operators():
            operator = module.split(".")[1]
            assert any(line.startswith(operator) for line in lines), f"{operator} on {arch}:\n{done.stdout}"
        assert any(line.startswith("cuda/laprop laprop_kernel ") for line in lines), done.stdout


@needs_triton
def test_what_is_well_passes(toys):
    done, rows = toys
    assert rows["well", 80]["hmma"] > 0
    assert rows["well", 80]["hgmma"] == 0
    assert rows["well", 90]["hgmma"] > 0
    for arch in (80, 90):
        row = rows["well", arch]
        assert row["problems"] == []
        assert row["ldgsts"] > 0
        assert row["spilled"] == 0
        assert 0 < row["registers"] <= 255
        assert row["shared"] >= (64 * 32 + 32 * 64) * 2  # two tiles of bf16
        [line] = [line for line in done.stdout.splitlines() if line.startswith("well") and f"sm_{arch}" in line]
        assert line.split()[2:] == [str(row[name]) for name in list(row)[2:-1]] + ["ok"]


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("spilling", "spills "),
        ("single precision", "no tensor-core instruction (HMMA)"),
        ("unaligned", "no asynchronous copy (LDGSTS, UBLKCP, UTMALDG)"),
        ("deep", "shared memory of "),
        ("odd", "does not compile: arange's range must be a power of 2"),
        ("misnamed", "does not compile: signature: expected the arguments of product, and these differ: ['z']"),
    ],
)
def test_what_is_wrong_fails(toys, arch, name, problem):
    done, rows = toys
    assert done.returncode == 1
    [found] = rows[name, arch]["problems"]
    assert found.startswith(problem)
    assert f"{name} (sm_{arch})" in done.stdout.splitlines()[-1]
    assert any(line.startswith(name) and "FAILS" in line and found in line for line in done.stdout.splitlines())


@needs_triton
def test_budget_and_limits(toys):
    done, rows = toys
    assert rows["spilling as it may", 80]["spilled"] == rows["spilling", 80]["spilled"] > 0
    assert rows["spilling as it may", 80]["problems"] == []
    for arch, limit in ((80, 163 * 1024), (90, 227 * 1024)):
        assert rows["deep", arch]["shared"] > limit
    assert rows["narrow", 80]["problems"] == []
    assert rows["narrow", 90]["problems"] == ["no HGMMA (wgmma) instruction"]  # HMMA will not do
    assert rows["narrow", 90]["hmma"] > 0
    assert "well (" not in done.stdout.splitlines()[-1]


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
def test_arguments_in_tuples_keep_their_alignment(toys, arch):
    _, rows = toys
    assert rows["grouped", arch] | {"kernel": "well"} == rows["well", arch]


@needs_triton
def test_what_triton_has_cached_is_measured_too(toys, toy):
    done, rows = toy("--arch", "80", "--only", "well")
    assert done.returncode == 0
    assert rows == {("well", 80): toys[1]["well", 80]}


@needs_triton
def test_an_interpreting_triton_is_refused():
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET makes Triton interpret its kernels, not compile them: unset it" in done.stderr


def test_nothing_to_audit(monkeypatch, capsys):
    monkeypatch.setattr(audit, "interpreted", lambda: False)
    monkeypatch.setattr(audit, "operators", list)
    assert audit.main(["--only", "no such kernel", "nor this"]) == 2
    assert "nothing to compile; names with one of: no such kernel, nor this" in capsys.readouterr().err


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(native, "nvcc", lambda: None)
    jobs, notes = audit.plan(None, [80, 90], None)
    assert jobs == []
    assert notes == [
        "Triton's kernels are left out: triton is not installed (pip install triton)",
        "the CUDA kernels are left out: nvcc was not found (on the PATH or in CUDA_HOME/bin)",
    ]


LOG = """ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized \
in the function 'first' in line 12
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
    1024 bytes stack frame, 1536 bytes spill stores, 1196 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes cumulative stack size
ptxas info    : Compiling entry function '_ZN3dph6secondEPf' for 'sm_90'
ptxas info    : Function properties for _ZN3dph6secondEPf
    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Function properties for helper
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
"""


def test_what_ptxas_says_is_read():
    assert audit.measure(LOG) == {
        "first": {"registers": 255, "spilled": 1544, "shared": 0},
        "_ZN3dph6secondEPf": {"registers": 40, "spilled": 8, "shared": 2048},
    }
    assert audit.losses(LOG) == ("wgmma.mma_async instructions are serialized",)
    with pytest.raises(RuntimeError, match="expected registers and spills of \\['first'"):
        audit.measure(LOG.replace("Used 40 registers", ""))


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("plain", "plain"),
        ("_Z6kernelPf", "kernel"),
        ("_Z6kernel3Foo", "kernel"),
        ("_ZN3dph6kernelENS_9ArgumentsE", "kernel"),
        ("_ZN3dph41_GLOBAL__N__6996a10b_9_laprop_cu_3b54529813laprop_kernelENS_15LapropArgumentsE", "laprop_kernel"),
        ("_ZN3dph6kernelILi4EEEvPf", "kernel"),
    ],
)
def test_short_names(symbol, name):
    assert audit.short_name(symbol) == name
