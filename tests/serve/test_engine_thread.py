"""The engine's thread: what is left after many requests, and a network of another library."""

import pytest
import torch
import transformers
from helpers.serving import CHAT, QUESTION, RERANK, answered, events, refused

import dph
from dph.errors import UserError
from dph.serve import server
from dph.serve.limits import Limits


def test_nothing_is_left_of_requests_with_different_options(client):
    thread = client.app._app.state.api.service.engine
    for i in range(150):
        answered(client, {**CHAT, "temperature": 1 + i / 100, "seed": i, "best_of": 2, "max_tokens": 2})
    engine = thread._engine
    assert len(engine._samplings) <= 66
    assert (engine.requests, len(engine._candidates), engine.prompts.opened) == ([], 0, {})
    assert len(engine.pool._taken) == 1  # the row of padding tokens
    assert thread.jobs == 0


@pytest.fixture
def attached(opened):
    """A network of transformers with heads."""
    config = transformers.GPT2Config(
        vocab_size=len(opened[1]), n_embd=32, n_layer=2, n_head=2, n_positions=48, eos_token_id=0, bos_token_id=0
    )
    model = dph.attach(transformers.GPT2LMHeadModel(config).eval(), heads=("default",))
    with torch.no_grad():
        for name, parameter in model.heads.named_parameters():
            if "standardise" not in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def test_an_attached_network(served, opened, attached):
    tokenizer = opened[1]
    with served(model=attached, heads=("default",)) as client:
        whole = answered(client, {**CHAT, "best_of": 3, "return_candidates": True})
        expected = dph.best_of_n(attached, tokenizer, QUESTION, 3, seed=3, max_new_tokens=8)
        assert [one["text"] for one in whole["candidates"]] == [one.text for one in expected]
        found = events(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
        text = "".join(choice["delta"].get("content", "") for event in found for choice in event["choices"])
        assert text == answered(client, CHAT)["choices"][0]["message"]["content"]
        assert len(answered(client, RERANK, "/v1/rerank")["results"]) == 3
        response = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 40})
        assert "at most 48 tokens in all" in refused(response, 400)["message"]  # its context
        response = client.post("/v1/chat/completions", json={**CHAT, "prune_every": 2})
        assert refused(response, 400)["param"] == "prune_every"


def test_limits_that_do_not_fit(opened):
    with pytest.raises(UserError, match="--cache-mib, --max-tokens: expected a cache of at least 100256 tokens"):
        server.make(*opened, "judge", ["default"], Limits(tokens=100_000), cache_bytes=1 << 20)
    with pytest.raises(UserError, match=r"--best-of: expected at most --max-candidates \(128\), got 129"):
        server.make(*opened, "judge", ["default"], Limits(), best_of=129)
