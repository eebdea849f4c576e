"""Fixtures of the operators' tests."""

import importlib
import importlib.util

import pytest


@pytest.fixture
def small_tiles(monkeypatch):
    """linear_logprob takes tiles of at most 16 rows and 32 tokens: small problems have several in each direction."""
    reference, native = (
        importlib.import_module(f"dph_kernels.linear_logprob.{name}") for name in ("reference", "native")
    )
    monkeypatch.setattr(reference, "CHUNK", 32)
    monkeypatch.setattr(native, "MOST_ROWS", 16)
    monkeypatch.setattr(native, "MOST_COLUMNS", 32)
    if importlib.util.find_spec("triton"):
        triton = importlib.import_module("dph_kernels.linear_logprob.triton")
        monkeypatch.setattr(triton.Engine, "side", 16)
        monkeypatch.setitem(triton.COMBINE, "BLOCKS", 2)
    return monkeypatch
