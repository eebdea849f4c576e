"""Parts of gpu_check.sh in Python: the tests of what changed, the folder of the results, and the summary.

python -m benchmarks.gpu_check tests --since REVISION         # test files, one per line
python -m benchmarks.gpu_check device                         # name of the folder in benchmarks/results
python -m benchmarks.gpu_check summary FOLDER --steps STEPS   # FOLDER/check.json and FOLDER/check.md
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import report
from dph.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results/nvidia-h200"
EVERYTHING = "tests"
# Files that every test depends on, or the build of every kernel.
COMMON = ("tests/conftest.py", "tests/helpers/", "pyproject.toml", "setup.py", "dph/__init__.py", "dph/_")
# Operators of sources in csrc/ that have another name.
OPERATOR_OF_SOURCE = {"attention": "rope_attention"}
COLUMNS = ("operator", "by", "ms", "tokens/s", "rate", "of the limit", "of the bf16 peak", "peak MB", "of the estimate",
           "speed of ours")  # fmt: skip
STATUS = {0: "passed", 5: "nothing to run", 124: "out of time", 137: "out of time"}  # exit statuses of pytest, timeout


# Tests of what changed


def git(*arguments: str) -> list[str] | None:
    """Return the lines that git prints for this tree; None without git or a repository, or if git fails."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None


def is_repository() -> bool:
    """Return whether this tree is a repository of its own: a copy may be inside of another one."""
    top = git("rev-parse", "--show-toplevel")
    return bool(top) and Path(top[0]).resolve() == ROOT


def last_measured() -> str | None:
    """Return the newest commit that changed the stored results of the H200, or None."""
    lines = git("log", "-1", "--format=%H", "--", RESULTS)
    return lines[0] if lines else None


def changed_files(revision: str) -> list[str]:
    """Return files that differ from a revision, or are not tracked; UserError if the revision is unknown."""
    differing = git("diff", "--name-only", revision, "--")
    if differing is None:
        raise UserError(f"--since: expected a revision of this repository, got {revision}")
    return differing + (git("ls-files", "--others", "--exclude-standard") or [])


def map_to_tests(files: Iterable[str], root: Path = ROOT) -> list[str]:
    """Return the test files of changed files, or ["tests"] if one of these concerns every test.

    | changed file | test files |
    |---|---|
    | dph_kernels/OPERATOR/..., csrc/OPERATOR.h, csrc/cuda/OPERATOR.cu | those that name the operator |
    | another file of dph_kernels/ or csrc/ | tests/kernels |
    | csrc/cpu/... | none: these kernels need no GPU |
    | dph/ROOM/... | tests/ROOM, tests/test_ROOM*.py |
    | dph/FILE.py | tests/test_FILE*.py |
    | tests/.../test_*.py | itself |
    | the tests' helpers and fixtures, what all of dph imports, the build | all |
    """
    operators = {path.parent.name for path in root.glob("dph_kernels/*/reference.py")}
    found: set[Path] = set()
    for name in files:
        if name.startswith(COMMON):
            return [EVERYTHING]
        place, *rest = Path(name).parts
        if name.startswith("csrc/cpu/") or Path(name).suffix == ".md":
            continue
        if place in ("dph_kernels", "csrc"):
            operator = rest[0] if place == "dph_kernels" else OPERATOR_OF_SOURCE.get(Path(name).stem, Path(name).stem)
            found |= _naming(operator, root) if operator in operators else set(root.glob("tests/kernels/test_*.py"))
        elif place == "dph":
            room = Path(rest[0]).stem
            found |= {*root.glob(f"tests/{room}/test_*.py"), *root.glob(f"tests/test_{room}*.py")}
        elif place == "tests":
            path = root / name
            is_test = path.name.startswith("test_")
            found |= ({path} if path.exists() else set()) if is_test else set(path.parent.glob("**/test_*.py"))
    return sorted(str(path.relative_to(root)) for path in found)


def _naming(operator: str, root: Path) -> set[Path]:
    """Return the test files that contain the operator's name."""
    word = re.compile(rf"\b{operator}\b|test_{operator}")
    return {path for path in root.glob("tests/**/test_*.py") if word.search(path.name + path.read_text("utf-8"))}


def tests_since(revision: str | None) -> list[str]:
    """Return the test files of what changed since a revision, by default the last results of the H200.

    Without a repository, or without such results, all.
    """
    if not is_repository():
        return [EVERYTHING]
    revision = revision or last_measured()
    return [EVERYTHING] if revision is None else map_to_tests(changed_files(revision))


# The summary


class Step(NamedTuple):
    """One line of gpu_check.sh's file of steps."""

    name: str
    code: int
    seconds: int
    limit: int
    note: str

    @property
    def status(self) -> str:
        """The exit status in words."""
        return STATUS.get(self.code, "failed")


def read_steps(path: Path) -> list[Step]:
    """Return the steps in a file of tab-separated lines."""
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines():
        name, code, seconds, limit, note = line.split("\t", 4)
        steps.append(Step(name, int(code), int(seconds), int(limit), note))
    return steps


def summarise(folder: Path, steps: Sequence[Step], revision: str | None) -> str:
    """Write check.json and check.md with the steps and the results in ``folder``; return the text."""
    results, devices = [], []
    for step in steps:
        file = folder / f"{step.name}.json"
        if file.exists():
            try:
                device, measured = report.read(file, step.name)
            except UserError as error:
                print(f"gpu_check: {error}", file=sys.stderr)
                continue
            results += measured
            devices.append(device)
    lines = ["| step | status | s | of at most | last line |", "| --- | --- | ---: | ---: | --- |"]
    lines += [f"| {s.name} | {s.status} | {s.seconds} | {s.limit} | {s.note.replace('|', '/')} |" for s in steps]
    parts = [f"# GPU check, {devices[0] if devices else device_name()}", "\n".join(lines)]
    if results:
        parts.append(report.markdown(results, COLUMNS))
    left_out = left_out_of(folder / "check.log")
    if left_out:
        parts.append("Left out:\n\n" + "\n".join(f"- {line}" for line in left_out))
    text = "\n\n".join(parts) + "\n"
    (folder / "check.md").write_text(text, encoding="utf-8")
    content = {
        "device": devices[0] if devices else device_name(),
        "revision": revision,
        "steps": [{**step._asdict(), "status": step.status} for step in steps],
        "left_out": left_out,
        "results": [dataclasses.asdict(result) for result in results],
    }
    (folder / "check.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return text


def left_out_of(log: Path) -> list[str]:
    """Return the benchmarks that pytest skipped, each with the reason."""
    if not log.exists():
        return []
    return re.findall(r"^SKIPPED \[\d+\] benchmarks/(.*)$", log.read_text(encoding="utf-8", errors="replace"), re.M)


def device_name() -> str:
    """Return the GPU's name, or "CPU"."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def slug(name: str) -> str:
    """Return a name in the form of the folders of benchmarks/results."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# The command


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Parts of benchmarks/gpu_check.sh.",
        epilog="example: python -m benchmarks.gpu_check tests --since HEAD~3",
    )
    commands = result.add_subparsers(dest="command", required=True)
    tests = commands.add_parser("tests", help="print the test files of what changed")
    tests.add_argument("--since", metavar="REVISION", help="default: the newest commit with results of the H200")
    commands.add_parser("device", help="print the name of the GPU's folder in benchmarks/results")
    summary = commands.add_parser("summary", help="write check.json and check.md, and print the latter")
    summary.add_argument("folder", type=Path, metavar="FOLDER", help="holds STEP.json of each benchmark")
    summary.add_argument("--steps", type=Path, required=True, metavar="FILE", help="name, status, s, limit, note")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "tests":
            print("\n".join(tests_since(options.since)))
        elif options.command == "device":
            print(slug(device_name()))
        else:
            revision = git("rev-parse", "HEAD") if is_repository() else None
            print(summarise(options.folder, read_steps(options.steps), revision[0] if revision else None))
    except UserError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
