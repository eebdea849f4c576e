"""The road of a preference pair from its line to the optimizer step stays short enough to be read."""

import re
import subprocess
import sys

from helpers.trace import MOST_FILES, MOST_FUNCTIONS, ROOT


def test_one_preference_step_runs_few_functions_in_few_files():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/helpers/trace.py")], capture_output=True, text=True, check=True
    )
    functions, files = map(int, re.fullmatch(r"(\d+) functions in (\d+) files", done.stdout.splitlines()[-1]).groups())
    assert 20 < functions <= MOST_FUNCTIONS, done.stdout
    assert 5 < files <= MOST_FILES, done.stdout
