"""Results of benchmarks as tables and pictures.

    python -m benchmarks.report benchmarks/results/*.json

reads files of ``pytest benchmarks/ --benchmark-only --benchmark-json=FILE``, prints one Markdown table, and writes it
to report.md, with a picture for each benchmark and file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADERS = (
    "operator",
    "by",
    "ms",
    "20% - 80%",
    "tokens/s",
    "rate",
    "of the limit",
    "of the bf16 peak",
    "MB",
    "rate",
    "of the limit",
    "peak MB",
    "of the estimate",
    "speed of ours",
)
COLUMNS = 3  # of pictures
OURS, RIVAL = "C1", "C7"  # colours of their bars


@dataclass(frozen=True)
class Result:
    """The fields of ``record`` (benchmarks/conftest.py) for one benchmark, with its median and quantiles in seconds.

    source: the file and the benchmark's module, whose results were measured together.
    data_sheet: bf16 operations per second of a GPU's data sheet.
    estimate: of ``peak`` before the run, in bytes.
    """

    operator: str
    who: str
    seconds: float
    quantiles: tuple[float, float]
    source: tuple[str, str] = ("", "")
    bytes_moved: float | None = None
    flops: float | None = None
    limit: float | None = None
    bandwidth: float | None = None
    peak: float | None = None
    data_sheet: float | None = None
    estimate: float | None = None
    tokens: float | None = None
    rival: bool = False
    kind: str | None = None
    target: dict[str, float] | None = None
    memory_target: dict[str, float] | None = None

    @classmethod
    def from_record(cls, info: dict[str, Any], seconds: float, source: tuple[str, str] = ("", "")) -> Result:
        """Return a result from the fields that ``record`` stored."""
        fields = {name: value for name, value in info.items() if name in cls.__dataclass_fields__}
        return cls(**{**fields, "seconds": seconds, "quantiles": tuple(info["quantiles"]), "source": source})


# The table


def cells(results: Sequence[Result]) -> tuple[list[str], list[list[Any]]]:
    """Return headers and rows: grouped by operator, ours first, then the fastest rival; without empty columns."""
    rows = []
    for group in _groups(results, lambda r: (r.source, r.operator)):
        ranked = sorted(group, key=lambda r: r.seconds)
        mine, rivals = [r for r in ranked if not r.rival], [r for r in ranked if r.rival]
        rows += [_row(r, mine, rivals) for r in mine + rivals]
    kept = [i for i in range(len(HEADERS)) if any(row[i] not in (None, "") for row in rows)]
    return [HEADERS[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _groups(results: Iterable[Result], key: Any) -> list[list[Result]]:
    """Return lists of results with the same key, in the order of their first results."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return list(groups.values())


def _row(result: Result, mine: Sequence[Result], rivals: Sequence[Result]) -> tuple:
    unit, scale = ("TFLOP/s", 1e12) if (result.limit or 0) >= 1e13 else ("GFLOP/s", 1e9)
    return (
        result.operator,
        result.who,
        1e3 * result.seconds,
        " - ".join(f"{1e3 * q:.3f}" for q in result.quantiles),
        None if result.tokens is None else f"{result.tokens / result.seconds:,.0f}",
        *_rate(result.flops, result.seconds, result.limit, unit, scale),
        _percentage(result.flops and result.flops / result.seconds, result.data_sheet),
        None if result.bytes_moved is None else result.bytes_moved / 1e6,
        *_rate(result.bytes_moved, result.seconds, result.bandwidth, "GB/s", 1e9),
        None if result.peak is None else result.peak / 1e6,
        _percentage(result.peak, result.estimate),
        _compared(result, mine, rivals),
    )


def _rate(work: float | None, seconds: float, limit: float | None, unit: str, scale: float) -> tuple[str, str]:
    """Return the rate with its unit, and its share of the limit."""
    if work is None:
        return "", ""
    rate = work / seconds
    share = f"{100 * rate / limit:.0f}% of {limit / scale:.3g}" if limit else ""
    return f"{rate / scale:.3g} {unit}", share


def _percentage(value: float | None, whole: float | None) -> str:
    return f"{100 * value / whole:.0f}%" if value and whole else ""


def _compared(result: Result, mine: Sequence[Result], rivals: Sequence[Result]) -> str:
    """Return our speed as a multiple of a rival's; for ours the multiple of the best rival, and the goals."""
    if result.rival:
        return f"{result.seconds / mine[0].seconds:.2f}×" if mine else ""
    if not rivals:
        return ""
    parts, goals = [], {"best rival": None} | (result.target or {})
    for name, goal in goals.items():
        met = [r for r in rivals if name in ("best rival", r.who, r.kind)]
        if met:
            ratio = met[0].seconds / result.seconds
            parts.append(f"{ratio:.2f}× {name}" + (f" (goal {goal}×)" if goal else ""))
    for name, goal in (result.memory_target or {}).items():
        peaks = [r.peak for r in rivals if name in (r.who, r.kind) and r.peak]
        if peaks and result.peak:
            parts.append(f"1/{peaks[0] / result.peak:.0f} of {name}'s memory (goal 1/{goal})")
    return ", ".join(parts)


def markdown(results: Sequence[Result], columns: Sequence[str] | None = None) -> str:
    """Return one table, with a column for the file if there are several; ``columns``: only those of HEADERS."""
    headers, rows = cells(results)
    if columns is not None:
        kept = [headers.index(name) for name in columns if name in headers]  # the first column of a name
        headers, rows = [headers[i] for i in kept], [[row[i] for i in kept] for row in rows]
    sources = [group[0].source[0] for group in _groups(results, lambda r: (r.source, r.operator)) for _ in group]
    if len(set(sources)) > 1:
        headers, rows = ["file", *headers], [[source, *row] for source, row in zip(sources, rows, strict=True)]
    numbers = [bool(rows) and all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(headers))]
    rule = ["---:" if number else "---" for number in numbers]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in [headers, rule, *rows])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")


# Pictures


def picture(results: Sequence[Result], title: str) -> Figure:
    """Draw milliseconds as bars, a panel for each operator, the fastest on top."""
    from matplotlib.figure import Figure

    panels = _groups(results, lambda r: r.operator)
    rows = math.ceil(len(panels) / COLUMNS)
    height = max(map(len, panels)) * 0.28 + 0.9
    figure = Figure(figsize=(5.5 * min(len(panels), COLUMNS), height * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, min(len(panels), COLUMNS), squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, sorted(panel, key=lambda r: -r.seconds))
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.suptitle(title)
    return figure


def _draw(axes: Axes, panel: Sequence[Result]) -> None:
    times = [1e3 * r.seconds for r in panel]
    low, high = ([abs(1e3 * r.quantiles[i] - t) for r, t in zip(panel, times, strict=True)] for i in range(2))
    colours = [RIVAL if r.rival else OURS for r in panel]
    bars = axes.barh([r.who for r in panel], times, xerr=(low, high), color=colours, ecolor="black")
    axes.bar_label(bars, labels=[f"{t:.3g}" for t in times], padding=3, fontsize="small")
    axes.set(title=panel[0].operator, xlabel="ms", xlim=(0, 1.15 * max(times)))
    axes.title.set_fontsize("medium")


# The command


def read(path: Path, label: str) -> tuple[str, list[Result]]:
    """Return the machine, and the results of a file of pytest-benchmark under the name ``label``.

    Raises UserError if the file holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        benches, machine = content["benchmarks"], content["machine_info"]
        device = machine.get("device", "an unknown device")
        results = [
            Result.from_record(bench["extra_info"], bench["stats"]["median"], (label, _module(bench["fullname"])))
            for bench in benches
            if bench["extra_info"].get("operator")
        ]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected JSON that pytest --benchmark-json wrote, got {error!r}") from error
    if not results:
        raise UserError(f"{path}: expected benchmarks of this project, got {len(benches)} others")
    return device, results


def _module(name: str) -> str:
    """Return "attention" for benchmarks/bench_attention.py::bench_attention[...]."""
    return Path(name.split("::")[0]).stem.removeprefix("bench_")


def _labels(files: Sequence[Path]) -> list[str]:
    """Return short names for files: as many trailing parts of their paths as make them unique."""
    parts = [path.resolve().with_suffix("").parts[1:] for path in files]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return labels


def write(files: Sequence[Path], output: Path) -> str:
    """Write report.md and the pictures to a folder; return the table."""
    runs = [read(path, label) for path, label in zip(files, _labels(files), strict=True)]
    table = markdown([result for _, results in runs for result in results])
    output.mkdir(parents=True, exist_ok=True)
    links, devices = [], []
    for device, results in runs:
        devices.append(f"- `{results[0].source[0]}`: {device}")
        for group in _groups(results, lambda r: r.source):
            file, module = group[0].source
            name = f"{file.replace('/', '-')}-{module}.png"
            picture(group, f"{module}, {device}").savefig(output / name, dpi=110)
            links.append(f"![{module}, {device}]({name})")
    text = "\n\n".join(["# Results", "\n".join(devices), table, *links]) + "\n"
    (output / "report.md").write_text(text, encoding="utf-8")
    return table


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Turn results of pytest-benchmark into one Markdown table (printed, and kept as report.md) and a "
        "picture for each benchmark.",
        epilog="example: python -m benchmarks.report benchmarks/results/*.json --output report",
    )
    result.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="from pytest --benchmark-json=FILE")
    result.add_argument("--output", type=Path, metavar="DIR", help="output folder (default: the first file's)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write it and the pictures, and return the exit code."""
    options = parser().parse_args(arguments)
    output = options.output or options.files[0].parent
    try:
        print(write(options.files, output))
    except UserError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    print(f"\n{output / 'report.md'} and pictures are written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
