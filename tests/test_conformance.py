"""The public names against numbers that the paper's own code produced, where those lie beside the repository."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SECTIONS = ("model", "memory", "hidden_memory", "gradients", "poolers", "roundtrip", "losses", "optimizer", "align",
            "chat", "tasks")  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def report(shared):
    """What the script prints for each section, all run by one process."""
    script = shared / "conformance/check.py"
    if not script.is_file():
        pytest.skip("../shared/conformance/check.py is not there")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(script), *SECTIONS], capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    parts = re.split(r"^== (\w+)$", done.stdout, flags=re.MULTILINE)[1:]
    assert parts, done.stderr
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("section", SECTIONS)
def test_section(section, report):
    lines = [line for line in report[section].splitlines() if line.startswith(("ok ", "FAIL"))]
    assert lines, "nothing was compared"
    assert not [line for line in lines if line.startswith("FAIL")]
