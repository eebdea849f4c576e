"""Plain English in comments and docstrings, names that were retired, and the density of statements."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("dph", "dph_kernels")

# Pattern and bound per 1,000 words of comments and docstrings.
WORDS = {
    "where as a conjunction": (r"\bwhere\b(?! is\b)", 2.0),
    "lie, lay": (r"\b(lie|lies|lay|lain|lying)\b", 0.2),
    "beside, anew, somebody": (r"\b(beside|anew|nobody|somebody|whoever|whatever)\b", 0.2),
    "code that says, asks, knows": (
        r"\b(tells?|told|says?|said|asks?|asked|knows?|known to|looks? on|looks? into)\b",
        0.8,
    ),
    "first lines with What, Which, How": (r"^(What|Which|How) ", 0.0),
}

RETIRED_CLASSES = {
    "Amounts", "Elsewhere", "Filled", "Given", "Kept", "Lane", "Launched", "Material", "Reading", "Road", "Window",
    "Work", "_Once",
}  # fmt: skip
RETIRED_FUNCTIONS = {
    "_go_through", "_settle", "_tell", "attend_anew", "deal", "lower", "of", "recall", "restore", "run_whole", "spread",
    "untouched", "weights_of",
}  # fmt: skip
RETIRED_FILES = {
    "ahead", "bar", "best", "captured", "compiled", "dense", "direct", "footprint", "guard", "host_rings", "interrupts",
    "loop", "order", "outcomes", "pair_cache", "pair_stage", "pretrained", "readers", "records", "rings", "runs",
    "settings", "shared_run", "shares", "start", "stream_stage", "threads", "whole_block",
}  # fmt: skip

COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
DENSITY = {COMPREHENSIONS: 3.0, ast.IfExp: 2.5}  # per 100 lines of dph


def python_files(root, folders):
    paths = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    assert paths, f"no Python files in {root}"
    return paths


def texts(source):
    """Every docstring and comment of a file."""
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (docstring := ast.get_docstring(node)):
            yield docstring
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.lstrip("# ")


def words_per_thousand(root, folders):
    """Kind of word -> occurrences per 1,000 words."""
    total, counts = 0, dict.fromkeys(WORDS, 0)
    for path in python_files(root, folders):
        for text in texts(path.read_text(encoding="utf-8")):
            total += len(re.findall(r"[A-Za-z']+", text))
            for kind, (pattern, _) in WORDS.items():
                counts[kind] += len(re.findall(pattern, text))
    return {kind: 1000 * count / total for kind, count in counts.items()}


def retired(root, folders):
    """Definitions with a retired name, and files."""
    for path in python_files(root, folders):
        if path.stem in RETIRED_FILES:
            yield f"{path.relative_to(root)}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if (is_function and node.name in RETIRED_FUNCTIONS) or (
                isinstance(node, ast.ClassDef) and node.name in RETIRED_CLASSES
            ):
                yield f"{path.relative_to(root)}:{node.lineno} {node.name}"


def density(root, folder, kinds):
    """Nodes of these kinds per 100 lines."""
    nodes = lines = 0
    for path in python_files(root, [folder]):
        source = path.read_text(encoding="utf-8")
        lines += source.count("\n")
        nodes += sum(isinstance(node, kinds) for node in ast.walk(ast.parse(source)))
    return 100 * nodes / lines


@pytest.mark.parametrize("kind", WORDS)
def test_comments_and_docstrings_are_plain_english(kind):
    assert words_per_thousand(ROOT, SOURCES)[kind] <= WORDS[kind][1]


def test_retired_names_stay_away():
    assert list(retired(ROOT, [*SOURCES, "benchmarks", "tests"])) == []


@pytest.mark.parametrize("kinds", DENSITY)
def test_statements_are_not_dense(kinds):
    assert density(ROOT, "dph", kinds) <= DENSITY[kinds]


def test_each_rule_can_fail(tmp_path):
    (tmp_path / "dph").mkdir()
    (tmp_path / "dph/ahead.py").write_text(
        '"""What lies here, where nobody asks."""\n\n\n'
        "class Material:\n    @classmethod\n    def of(cls, x):\n        return [y for y in x] if x else None\n"
    )
    assert all(rate > WORDS[kind][1] for kind, rate in words_per_thousand(tmp_path, ["dph"]).items())
    assert list(retired(tmp_path, ["dph"])) == ["dph/ahead.py", "dph/ahead.py:4 Material", "dph/ahead.py:6 of"]
    assert all(density(tmp_path, "dph", kinds) > bound for kinds, bound in DENSITY.items())
