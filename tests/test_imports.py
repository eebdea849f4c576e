"""Import rules (csrc <- dph_kernels <- dph, and the floors inside dph), and the oldest Python the sources run on."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The floor of each room of dph: a module imports its own room and lower floors. Modules at the root are on floor 0.
FLOORS = {
    "tasks": 1,
    "data": 2,
    "model": 3,
    "train": 4, "infer": 4, "evaluate": 4,
    "demo": 5, "serve": 5, "improve": 5,
    "cli": 6,
}  # fmt: skip
ROOT_FOLDERS = {"chat"}  # packages that are modules of the root
SAME_FLOOR = {("train", "evaluate"), ("demo", "improve")}  # training computes held-out metrics; the quickstart improves
LONGEST_CHAIN = 9
MOST_ROOT_FILES = 12


def module_name(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path, root, at_runtime=False):
    """Every dotted name that the file imports, at any depth; for ``from a import b`` both ``a`` and ``a.b``.

    ``at_runtime``: without what stands below ``if TYPE_CHECKING``.
    """
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    typing_only = {node for block in blocks for statement in block.body for node in ast.walk(statement)}
    for node in ast.walk(tree):
        if at_runtime and node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def within(name, package):
    return name == package or name.startswith(package + ".")


def operators(root):
    return sorted(path.parent.name for path in (root / "dph_kernels").glob("*/reference.py"))


def rules(importer, root):
    """Pairs (forbidden name, why) for one importing module."""
    if within(importer, "dph_kernels"):
        yield "dph", "dph_kernels knows nothing of models or data"
        parts = importer.split(".")
        if len(parts) > 1 and parts[1] in operators(root):
            for other in operators(root):
                if other != parts[1]:
                    yield f"dph_kernels.{other}", "operators never import each other"
    if within(importer, "dph"):
        yield "triton", "dph never imports triton"
        yield "dph_kernels._native", "dph never imports the native module"
        yield "dph_kernels.native", "dph never imports the native module"
        if importer != "dph":  # the package itself lists what users import, lazily
            yield from floor_rules(importer)
    yield "pickle", "files from elsewhere must not be able to run code"


def room(module):
    """The room of a module of dph; "" for the modules at the root."""
    name = module.split(".")[1]
    return name if name in FLOORS else ""


def floor_rules(importer):
    """Pairs (forbidden room, why) for one module of dph."""
    own = room(importer)
    floor = FLOORS.get(own, 0)
    for other, level in FLOORS.items():
        if other == own or (own, other) in SAME_FLOOR:
            continue
        if level > floor:
            yield f"dph.{other}", f"{other} is on a higher floor than {own or 'the root'}"
        elif level == floor:
            yield f"dph.{other}", f"{other} is on the same floor as {own}"


def graph(root, package):
    """Module -> modules of the package that it imports at run time; without the package's own ``__init__``."""
    paths = {module_name(path, root): path for path in (root / package).rglob("*.py")}
    edges = {
        name: {other for other in imported(path, root, at_runtime=True) if other in paths}
        for name, path in paths.items()
    }
    del edges[package]
    return {name: others - {name, package} for name, others in edges.items()}


def longest_chain(edges):
    """The longest chain of imports. Raises AssertionError with the modules of a circle."""
    chains = {}

    def chain(module, above):
        assert module not in above, f"circular imports: {' -> '.join([*above, module])}"
        if module not in chains:
            below = [chain(other, [*above, module]) for other in sorted(edges[module])]
            chains[module] = [module, *max(below, key=len, default=[])]
        return chains[module]

    return max((chain(module, []) for module in edges), key=len)


def violations(root):
    for path in sorted([*(root / "dph").rglob("*.py"), *(root / "dph_kernels").rglob("*.py")]):
        importer = module_name(path, root)
        for name in imported(path, root):
            for forbidden, why in rules(importer, root):
                if within(name, forbidden):
                    yield f"{importer} imports {name}: {why}"


def includes(root):
    """Pairs (file, included header) of everything under csrc."""
    for path in sorted(p for p in (root / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu")):
        for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.M):
            yield path.relative_to(root / "csrc").as_posix(), header


def test_imports_point_one_way():
    assert list(violations(ROOT)) == []


def test_every_folder_of_dph_has_a_floor():
    rooms = {path.parent.name for path in (ROOT / "dph").glob("*/__init__.py")}
    assert rooms <= set(FLOORS) | ROOT_FOLDERS
    assert {"tasks", "data", "model", "train", "infer", "evaluate", "demo", "cli"} <= rooms


def test_few_files_at_the_root():
    assert len(list((ROOT / "dph").glob("*.py"))) <= MOST_ROOT_FILES


@pytest.mark.parametrize("package", ["dph", "dph_kernels"])
def test_chains_of_imports_are_short_and_never_circular(package):
    chain = longest_chain(graph(ROOT, package))
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


def test_a_circle_and_a_long_chain_are_found(tmp_path):
    (tmp_path / "dph").mkdir()
    for name, line in {
        "__init__": "from dph import a",
        "a": "from dph import b",
        "b": "def f():\n    from dph.c import x",
        "c": "",
    }.items():
        (tmp_path / f"dph/{name}.py").write_text(line)
    assert longest_chain(graph(tmp_path, "dph")) == ["dph.a", "dph.b", "dph.c"]
    (tmp_path / "dph/c.py").write_text("import dph.a")
    with pytest.raises(AssertionError, match=r"circular imports: dph\.a -> dph\.b -> dph\.c -> dph\.a"):
        longest_chain(graph(tmp_path, "dph"))


def test_all_of_the_house_is_read():
    names = {module_name(path, ROOT) for path in ROOT.glob("dph*/**/*.py")}
    assert {"dph_kernels", "dph_kernels.dispatch", "dph_kernels.laprop.native"} <= names
    assert set(operators(ROOT)) == {
        "laprop",
        "linear_logprob",
        "preference_loss",
        "residual_norm",
        "rope_attention",
        "swiglu",
        "swiglu_reward",
    }


def test_only_the_bindings_know_python_and_nothing_knows_pytorch():
    found = list(includes(ROOT))
    assert ("bindings.cpp", "laprop.h") in found
    for path, header in found:
        assert not re.match(r"(torch|ATen|c10)/", header), f"{path} includes {header}"
        if path not in ("bindings.cpp", "tensors.h"):
            assert not re.match(r"pybind11/|Python\.h", header), f"{path} includes {header}"


def test_torch_load_is_never_called():
    for path in [*ROOT.glob("dph/**/*.py"), *ROOT.glob("dph_kernels/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
                assert node.value.id != "torch", f"{path.relative_to(ROOT)}:{node.lineno} calls torch.load"


def test_notes_are_added_to_errors_as_every_python_can():
    """BaseException.add_note is of Python 3.11, and no tool finds calls of it."""
    for path in ROOT.glob("dph/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_method = isinstance(node, ast.Attribute) and node.attr == "add_note"
            assert not is_method, f"{path.relative_to(ROOT)}:{node.lineno}: expected dph.errors.add_note"


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("dph_kernels/one/triton.py", "from dph_kernels.two import reference", "operators never import each other"),
        ("dph_kernels/one/__init__.py", "from dph_kernels import two", "operators never import each other"),
        ("dph_kernels/one/__init__.py", "from ..two import forward", "operators never import each other"),
        ("dph_kernels/checks.py", "import dph.model.model", "knows nothing of models"),
        ("dph/model/model.py", "def f():\n    import triton.language as tl", "dph never imports triton"),
        ("dph/model/model.py", "from dph_kernels import _native", "dph never imports the native module"),
        ("dph/model/model.py", "from dph_kernels.native import module", "dph never imports the native module"),
        ("dph/train/trainer.py", "from dph import cli", "cli is on a higher floor than train"),
        ("dph/tasks/glue.py", "from .. import cli", "cli is on a higher floor than tasks"),
        ("dph/tasks/base.py", "from dph.data.sources import read_jsonl", "data is on a higher floor than tasks"),
        ("dph/chat.py", "if TYPE_CHECKING:\n    from dph.model.model import Model", "higher floor than the root"),
        ("dph/model/model.py", "def f():\n    from dph.train import recipe", "train is on a higher floor than model"),
        ("dph/infer/best_of_n.py", "from dph.train.trainer import Trainer", "train is on the same floor as infer"),
        ("dph/evaluate/choices.py", "import dph.train.trainer", "train is on the same floor as evaluate"),
        ("dph/train/trainer.py", "from dph.infer import sampling", "infer is on the same floor as train"),
        ("dph/data/dataset.py", "from pickle import loads", "run code"),
    ],
)
def test_the_rules_catch_what_they_forbid(tmp_path, path, line, complaint):
    for file in (path, "dph_kernels/one/reference.py", "dph_kernels/two/reference.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    assert list(violations(tmp_path)) == []
    (tmp_path / path).write_text(line)
    assert any(complaint in found for found in violations(tmp_path))


def test_the_rules_allow_what_they_should(tmp_path):
    for file, line in {
        "dph_kernels/one/__init__.py": "from dph_kernels import checks\nfrom dph_kernels.one import reference",
        "dph_kernels/one/reference.py": "import torch",
        "dph_kernels/one/triton.py": "import triton",
        "dph_kernels/__init__.py": "from dph_kernels.one import one",
        "dph/__init__.py": "def __getattr__(name):\n    from dph.model.model import Model",
        "dph/model/model.py": "from dph_kernels import one\nfrom dph.model.heads import RewardHead",
        "dph/train/trainer.py": "from dph.evaluate import choices\nfrom dph import chat\nimport dph",
        "dph/cli/main.py": "from dph.train.entry import train",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(line)
    assert list(violations(tmp_path)) == []


@pytest.mark.parametrize(("line", "code"), [(None, 0), ("from typing import Self", 1)])
def test_the_oldest_python_that_is_promised_has_all(line, code, tmp_path):
    """Of the language and of its own library; what is too new is named."""
    pytest.importorskip("vermin")
    paths = [ROOT / name for name in ("dph", "dph_kernels", "benchmarks", "tests", "setup.py")]
    if line:
        paths = [tmp_path / "new.py"]
        paths[0].write_text(line)
    (oldest,) = re.findall(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    command = [
        sys.executable,
        "-c",
        "import vermin; vermin.main()",
        f"-t={oldest}-",
        "--violations",
        "--no-tips",
        *map(str, paths),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stdout
