"""A server in this process, over the small model of the command line's tests."""

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx2"):
    pytest.importorskip(package, reason="the server's tests need the extra test")

LIMITS = {"tokens": 64, "candidates": 16, "documents": 20, "body_bytes": 20_000}


@pytest.fixture(scope="session")
def opened(models):
    """Model and tokenizer."""
    from dph.model.loading import load_model, load_tokenizer

    return load_model(models / "judge").eval(), load_tokenizer(models / "judge")


@pytest.fixture(scope="session")
def served(opened):
    """Make a client of a new server; arguments of ``dph.serve.server.make``, and ``limits``."""
    from fastapi.testclient import TestClient

    from dph.serve import server
    from dph.serve.limits import Limits

    model, tokenizer = opened

    def make(limits=None, heads=("default", "short"), model=model, **options):
        options = {"cache_bytes": 1 << 20, **options}
        app = server.make(model, tokenizer, "judge", heads, Limits(**{**LIMITS, **(limits or {})}), **options)
        return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)

    return make


@pytest.fixture(scope="session")
def client(served):
    """A client of one server for all tests."""
    with served() as client:
        yield client
