"""Fixtures of all benchmarks: measured limits of the machine, timing, and one table at the end of the run.

A benchmark records its bytes or operations after a check of its result::

    def bench_mine(benchmark, record, limits):
        check_against_reference()
        benchmark(step)
        record("laprop", "C++", bytes_moved=32 * n, limit=limits.bandwidth())

    def bench_rival(benchmark, record):
        benchmark(rival_step)
        record("laprop", "eager", bytes_moved=32 * n, rival=True)

On CUDA the clock synchronises with the device, so that any way of timing is correct; ``timed`` also keeps its queue
filled.
"""

import functools
import math
import platform
import statistics
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import cpuinfo
import pytest
import torch

from benchmarks.report import Result, cells
from dph.evaluate.tables import table
from dph.train.budget.flops import peak_flops
from dph_kernels import native
from dph_kernels.linear_logprob.native import mkl_is_faster
from dph_kernels.torch_private import linear_pointwise


def clock():
    """Return seconds, after a GPU that is in use has finished its queue."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of dph")
    group.addoption("--quick", action="store_true", help="time each row in the fewest rounds, to try the benchmarks")
    group.addoption(
        "--llama",
        metavar="DIR",
        help="a Llama-family model of transformers for bench_family.py (default: a random one)",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "brief: timed by gpu_check.sh")


def pytest_collection_modifyitems(items):
    """Time every benchmark with ``clock``."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=clock))


def _median_seconds(run, rounds):
    run()
    times = []
    for _ in range(rounds):
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times)


class Limits:
    """Measured limits of a device: the CPU with PyTorch's threads, or the current GPU. Measured once per run."""

    @functools.cache  # noqa: B019 (there is one instance)
    def bandwidth(self, device="cpu"):
        """Return bytes per second of ``a += s * b`` in fp32: two reads per write."""
        elements = 20_000_000 if device == "cpu" else 400_000_000
        a, b = torch.zeros(elements, device=device), torch.ones(elements, device=device)
        return 12 * elements / _median_seconds(lambda: a.add_(b, alpha=0.5), 20)

    @functools.cache  # noqa: B019
    def matmul(self, device="cpu", dtype=torch.float32):
        """Return floating-point operations per second of a square matrix product.

        The product is PyTorch's or, in fp32 on some CPUs, oneDNN's if it is faster.
        """
        size = 1536 if device == "cpu" else 8192
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = _median_seconds(lambda: a @ b, 10)
        if device == "cpu" and dtype == torch.float32 and native.missing("cpu") is None and not mkl_is_faster():
            seconds = min(seconds, _median_seconds(lambda: linear_pointwise(a, b, None, "none", [], ""), 10))
        return 2 * size**3 / seconds


@pytest.fixture(scope="session")
def limits():
    return Limits()


@pytest.fixture
def timed(benchmark, request):
    """Time a warm function for about ``seconds``, in 5 to 100 rounds of at least ``least`` seconds (3 if over 1 s).

    In a round of many calls the host runs ahead of a GPU, as it does in a model. On a GPU, which no other process uses,
    a third of the time suffices. ``before`` runs untimed before every round, which then is a single call: a rival takes
    turns with the function, so that both are timed in the same minutes.
    """
    quick = request.config.getoption("--quick")

    def run(function, seconds=1.0, least=2e-3, before=None):
        if not benchmark.enabled:
            return benchmark(function)
        if quick:
            seconds, least = 0.0, 0.0
        once = _median_seconds(function, 1)
        iterations = 1 if before else max(math.ceil(least / once), 1)
        seconds /= 3 if torch.cuda.is_initialized() else 1
        rounds = min(max(int(seconds / (once * iterations)), 5 if once * iterations < 1 else 3), 100)
        setup = None if before is None else lambda: before() and None
        benchmark.pedantic(function, setup=setup, rounds=rounds, iterations=iterations)  # warm: called twice above
        return None

    return run


@pytest.fixture(scope="session")
def peak_memory():
    """Return the peak bytes that a call allocates in addition to its inputs; None on the CPU, which does not count."""

    def measure(function):
        if not torch.cuda.is_initialized():
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before

    return measure


@pytest.fixture
def record(benchmark):
    """Record a row of the final table: the implementation and its necessary work.

    Args:
        operator: rows with the same text are compared with each other.
        who: name of the implementation.
        bytes_moved: necessary bytes of a call.
        flops: necessary floating-point operations of a call.
        tokens: useful tokens of a call.
        limit: the machine's limit per second, of ``flops`` if given, else of ``bytes_moved``.
        bandwidth: the machine's bytes per second, if ``limit`` is one of ``flops``.
        peak: peak bytes allocated by a call.
        estimate: estimate of ``peak`` before the run.
        rival: whether the implementation is not ours.
        kind: rivals of one kind share a goal.
        target: for ours: a rival, a kind, or "best rival" -> goal for our speed as a multiple of its speed.
        memory_target: likewise -> goal for its peak memory as a multiple of ours.
    """

    def note(operator, who, *, bytes_moved=None, flops=None, limit=None, bandwidth=None, peak=None, estimate=None,
             tokens=None, rival=False, kind=None, target=None, memory_target=None):  # fmt: skip
        if bytes_moved is None and flops is None:
            raise ValueError("record: expected bytes_moved or flops or both, got neither")
        if flops is None:
            limit, bandwidth = None, limit if bandwidth is None else bandwidth
        info = {"bytes_moved": bytes_moved, "flops": flops, "limit": limit, "bandwidth": bandwidth, "peak": peak}
        info |= {"operator": operator, "who": who, "rival": rival, "kind": kind, "tokens": tokens}
        info |= {"target": target, "memory_target": memory_target, "estimate": estimate}
        if torch.cuda.is_available() and flops is not None:
            info["data_sheet"] = peak_flops(torch.device("cuda"))
        if benchmark.stats:  # None if timing is disabled
            info["quantiles"] = _quantiles(benchmark.stats.stats.sorted_data)
        benchmark.extra_info.update(info)

    return note


def _quantiles(times):
    """Return the 20% and 80% quantiles of sorted times."""
    return times[(len(times) - 1) // 5], times[-1 - (len(times) - 1) // 5]


# Summary


def device():
    """Return the machine's name in results: the GPU's, or the processor's with threads and instruction set."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = cpuinfo.get_cpu_info().get("brand_raw", platform.machine())
    return f"{name}, {torch.get_num_threads()} threads, {instruction_set()}"


def instruction_set():
    """Return the name of the widest instruction set in use, that of PyTorch and ours if they differ (avx2.sh)."""
    pytorch = torch.backends.cpu.get_cpu_capability()
    ours = native.cpu_capability() if native.missing("cpu") is None else None
    return pytorch if ours in (pytorch.lower(), None) else f"{pytorch} (ours: {ours})"


def pytest_benchmark_update_machine_info(config, machine_info):
    """Keep what matters for speed, and drop private data such as the host's name."""
    packages = {name: version(name) for name in ("torch", "triton") if find_spec(name)}
    kept = {"device": device(), "system": platform.system(), "python": platform.python_version(), **packages}
    machine_info.clear()
    machine_info.update(kept)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Drop parameters, which are whole workloads, and single times: the name and the quantiles suffice."""
    for bench in output_json["benchmarks"]:
        bench.pop("params", None)
        bench["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    benches = [b for b in getattr(session, "benchmarks", []) if b.extra_info.get("operator") and b.stats.rounds]
    if not benches:
        return
    results = [Result.from_record(bench.extra_info, bench.stats.median) for bench in benches]
    terminalreporter.section(f"speed, {device()}, PyTorch {torch.__version__}")
    terminalreporter.write_line(table(*cells(results)))
