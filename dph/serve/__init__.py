"""The server: an OpenAI-compatible API, rewards, reranking and a page over one engine (``dph serve``)."""
