"""OpenAI's client and the server."""

import pytest
from helpers.server_process import Server
from helpers.serving import QUESTION

import dph
from dph.model.loading import load_model, load_tokenizer

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the server needs the extra serve")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.ecosystem


def test_the_client_of_openai(models, tmp_path):
    with Server(models / "judge", tmp_path / "log") as server:
        opened = load_model(models / "judge").eval(), load_tokenizer(models / "judge")
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["judge"]
        options = {"model": "judge", "messages": QUESTION, "max_tokens": 8, "seed": 3}
        expected = dph.best_of_n(*opened, QUESTION, 6, seed=3, max_new_tokens=8)
        extra = {"best_of": 6, "return_candidates": True}
        whole = client.chat.completions.create(**options, n=2, extra_body=extra)
        assert [choice.message.content for choice in whole.choices] == [one.text for one in expected[:2]]
        assert [one["text"] for one in whole.candidates] == [one.text for one in expected]
        first = client.chat.completions.create(**options)
        text = ""
        for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
            for choice in chunk.choices:
                text += choice.delta.content or ""
        assert text == first.choices[0].message.content
        assert chunk.usage == first.usage
        talk = [*QUESTION, first.choices[0].message, *QUESTION]  # as its documentation continues a conversation
        assert client.chat.completions.create(**{**options, "messages": talk}).choices
        with pytest.raises(openai.BadRequestError, match="n: expected a number from 1 to 128, got 1000"):
            client.chat.completions.create(**options, n=1000)
        with pytest.raises(openai.NotFoundError, match="model: expected judge"):
            client.chat.completions.create(**{**options, "model": "gpt"})
        assert server.stop() == 0
