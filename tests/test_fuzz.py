"""Hostile files end in a result or in one line; ``python tests/helpers/fuzz.py --cases 200000`` does more of it."""

import pytest
from helpers import fuzz

CASES = {
    "records": 500, "documents": 500, "recipes": 400, "configurations": 200, "tokenizers": 150,
    "tokenizer configurations": 100, "weights": 150,
}  # fmt: skip


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_every_case_ends_in_a_result_or_in_one_line(target, tmp_path):
    folder = fuzz.save_models(tmp_path)
    counts, _ = fuzz.run(target, folder, CASES[target])
    assert counts["refused"] > 0
    assert counts["result"] > 0
