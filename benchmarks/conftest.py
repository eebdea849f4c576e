"""What every benchmark shares: measured limits of the machine, and one table at the end of the run.

A benchmark says what it moved or computed, after it has shown that the result is right::

    def bench_mine(benchmark, record, limits):
        check_against_reference()
        benchmark(step)
        record("laprop", "C++", bytes_moved=32 * n, limit=limits.bandwidth())

    def bench_rival(benchmark, record):
        benchmark(rival_step)
        record("laprop", "eager", bytes_moved=32 * n, rival=True)
"""

import statistics
import time
from dataclasses import dataclass

import pytest
import torch

from dph.tables import table


def _median_seconds(run, rounds):
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@dataclass(frozen=True)
class Limits:
    """What this machine's CPU can do, measured with all cores that PyTorch may use."""

    def bandwidth(self, elements=20_000_000, rounds=20):
        """Bytes per second of ``a += s * b`` in fp32: two reads to one write, none wasted."""
        a, b = torch.zeros(elements), torch.ones(elements)
        return 12 * elements / _median_seconds(lambda: a.add_(b, alpha=0.5), rounds)

    def matmul(self, size=1536, rounds=10):
        """Floating-point operations per second of a square fp32 matrix product."""
        a, b = torch.randn(size, size), torch.randn(size, size)
        return 2 * size**3 / _median_seconds(lambda: a @ b, rounds)


@pytest.fixture(scope="session")
def limits():
    return Limits()


@pytest.fixture
def record(benchmark):
    """Notes for the final table: who ran what, and how much work that was; rates are per second."""

    def note(operator, who, *, bytes_moved=None, flops=None, limit=None, rival=False, target=None):
        if (bytes_moved is None) == (flops is None):
            raise ValueError("record: expected exactly one of bytes_moved and flops")
        unit, work = ("GB/s", bytes_moved / 1e9) if flops is None else ("TFLOP/s", flops / 1e12)
        scale = 1e9 if flops is None else 1e12
        benchmark.extra_info.update(
            operator=operator,
            who=who,
            unit=unit,
            work=work,
            limit=None if limit is None else limit / scale,
            rival=rival,
            target=target,
        )

    return note


def _row(bench, rivals):
    info, seconds = bench.extra_info, bench.stats.median
    rate = info["work"] / seconds
    share = f"{100 * rate / info['limit']:.0f}% of {info['limit']:.0f}" if info["limit"] else ""
    against = []
    if not info["rival"]:
        for rival in sorted(rivals, key=lambda r: r.stats.median):
            ratio, goal = rival.stats.median / seconds, (info["target"] or {}).get(rival.extra_info["who"])
            against.append(f"{ratio:.2f}× {rival.extra_info['who']}" + (f" (goal {goal}×)" if goal else ""))
    columns = (info["operator"], info["who"], 1e3 * seconds, 1e3 * bench.stats.min)
    return (*columns, f"{rate:.3g} {info['unit']}", share, ", ".join(against))


def summary(benches):
    """The table: operators together, ours first; the speed of ours over each rival's, the best rival first."""
    headers = ("operator", "by", "ms (median)", "ms (min)", "rate", "of the limit", "speed against rivals")
    rows = []
    for operator in dict.fromkeys(b.extra_info["operator"] for b in benches):
        mine = [b for b in benches if b.extra_info["operator"] == operator]
        rivals = [b for b in mine if b.extra_info["rival"]]
        rows += [_row(b, rivals) for b in sorted(mine, key=lambda b: (b.extra_info["rival"], b.stats.median))]
    return table(headers, rows)


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    benches = [b for b in getattr(session, "benchmarks", []) if b.extra_info.get("operator") and b.stats.rounds]
    if not benches:
        return
    terminalreporter.section(f"speed, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    terminalreporter.write_line(summary(benches))
