"""Multiply-adds of a program for Arm: which loops of csrc/cpu they are in, and whether they are NEON's.

The disassembly gives the instructions, the line table their places: the line of the source, and the lines of the calls
that were inlined down to it.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cpu"
SCALAR = {"fmadd", "fmsub", "fnmadd", "fnmsub"}
VECTOR = {"fmla", "fmls"}
BRANCHES = {"b", "cbz", "cbnz", "tbz", "tbnz"}


@dataclass(frozen=True)
class Loop:
    """A ``for`` statement of csrc/cpu."""

    file: str
    first: int  # lines
    last: int
    text: str
    adds_products: bool  # a line of its own is a ``+=`` of a product, or OpenMP vectorises the loop

    def __str__(self) -> str:
        return f"{self.file}:{self.first}: {self.text.splitlines()[0].strip()}"


@dataclass(frozen=True)
class MultiplyAdd:
    """An instruction."""

    vector: bool
    repeated: bool  # within an innermost loop of the machine code
    lines: tuple[tuple[str, int], ...]  # file of csrc/ and line, innermost first
    functions: tuple[str, ...]


def source_loops() -> list[Loop]:
    """All loops of csrc/cpu, which is formatted by clang-format: a body ends at a brace of the same indentation."""
    found = []
    for path in sorted(SOURCES.iterdir()):
        lines = path.read_text().splitlines()
        spans = {}
        for first, line in enumerate(lines):
            if not re.match(r" *for \(", line):
                continue
            last, indent = first, re.match(" *", line)[0]
            if code_of(line).endswith("{"):
                while not lines[last].startswith(f"{indent}}}"):
                    last += 1
            else:
                while not code_of(lines[last]).endswith(";"):
                    last += 1
            spans[first] = last
        owners = {n: max((f for f, last in spans.items() if f <= n <= last), default=None) for n in range(len(lines))}
        for first, last in spans.items():
            own = [lines[n] for n in range(first + 1, last + 1) if owners[n] == first]
            own = [re.sub(r"\[.*?\]", "", line) for line in (after_header(lines[first]), *own)]
            products = any(re.search(r"\+= .*\*", line) for line in own)
            vectorised = lines[first - 1].strip().startswith("#pragma omp simd")
            text = "\n".join(lines[first : last + 1])
            found.append(Loop(path.name, first + 1, last + 1, text, products or vectorised))
    return found


def code_of(line: str) -> str:
    """The line without its comment."""
    return line.partition("//")[0].rstrip()


def after_header(line: str) -> str:
    """The part of the first line of a loop after ``for (...)``."""
    depth = 0
    for place, character in enumerate(line):
        depth += (character == "(") - (character == ")")
        if character == ")" and depth == 0:
            return line[place + 1 :]
    return ""


def multiply_adds(program: Path, prefix: str) -> list[MultiplyAdd]:
    """All multiply-adds of the functions of namespace dph, by the binutils whose names start with ``prefix``."""
    command = [f"{prefix}objdump", "-d", "-C", "--no-show-raw-insn", str(program)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for function in re.finditer(r"^[0-9a-f]+ <dph::.*>:\n((?:.+\n)+)", listing, re.M):
        code = re.findall(r"^ *([0-9a-f]+):\t(\S+)[ \t]*(.*)$", function[1], re.M)
        code = [(int(address, 16), name, operands) for address, name, operands in code]
        spans = list(innermost(code))
        for address, name, operands in code:
            vector = name in VECTOR and re.search(r"\.(4s|2d)\b", operands) is not None
            if vector or name in SCALAR:
                found[address] = vector, any(start <= address <= end for start, end in spans)
    command = [f"{prefix}addr2line", "-a", "-i", "-f", "-C", "-e", str(program)]
    addresses = "\n".join(map(hex, found))
    output = subprocess.run(command, input=addresses, capture_output=True, text=True, check=True).stdout
    result = []
    for block in re.split(r"^0x(?=[0-9a-f]{16}$)", output, flags=re.M)[1:]:
        address, *frames = block.splitlines()
        places = re.findall(r"/csrc/(?:cpu/)?(?:\.\./)?(\S+):(\d+)", "\n".join(frames[1::2]))
        lines = tuple((file, int(line)) for file, line in places)
        result.append(MultiplyAdd(*found[int(address, 16)], lines, tuple(frames[::2])))
    assert len(result) == len(found)
    return result


def innermost(code: list[tuple[int, str, str]]) -> Iterator[tuple[int, int]]:
    """Yield the address ranges of a function's loops without loops in them: those are jumped back in."""
    spans = set()
    for address, name, operands in code:
        target = re.search(r"\b([0-9a-f]+) <", operands)
        if (name in BRANCHES or name.startswith("b.")) and target and code[0][0] <= int(target[1], 16) <= address:
            spans.add((int(target[1], 16), address))
    for start, end in spans:
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in spans):
            yield start, end


def without_neon(instructions: list[MultiplyAdd], loops: list[Loop]) -> dict[Loop, str]:
    """Return the loops that should have NEON multiply-adds and lack them, and the reason."""
    vector = set()  # loops, and instances of loops: each call that was inlined
    scalar = {}
    for instruction in instructions:
        enclosing = [  # innermost first
            (depth, loop)
            for depth, (file, line) in enumerate(instruction.lines)
            for loop in sorted(loops, key=lambda loop: -loop.first)
            if loop.file == file and loop.first <= line <= loop.last
        ]
        bf16 = any("short" in name for name in instruction.functions)
        keys = [(loop, instruction.lines[depth + 1 :], bf16) for depth, loop in enclosing]
        if instruction.vector:
            vector |= {*keys, *(loop for _, loop in enclosing)}
        elif instruction.repeated and enclosing:
            scalar[keys[0]] = enclosing[0][1]
    missing = {loop: "no multiply-add of NEON" for loop in loops if loop.adds_products and loop not in vector}
    for key, loop in scalar.items():
        if key not in vector:
            missing[loop] = f"scalar multiply-adds only, as called from {key[1]}"
    return missing
