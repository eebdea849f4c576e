"""``dph serve``: an OpenAI-compatible server with best-of-N, rewards and reranking."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from pathlib import Path

from dph.cli import common
from dph.errors import UserError
from dph.serve.limits import Limits

HELP = "serve a model by an OpenAI-compatible API with best-of-N, rewards and reranking, and a page to try it"
EXAMPLE = """dph serve runs/align
dph serve MODEL --head runs/helpful --head runs/harmless --port 8080 --best-of 8
dph serve runs/align --host 0.0.0.0 --api-key-file key.txt"""
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
KEY_VARIABLE = "DPH_API_KEY"

BYTES = common.number_type(int, lambda size: 1 <= size <= 1 << 30, "a number of bytes from 1 to 2**30")
SECONDS = common.number_type(float, lambda seconds: 0 < seconds <= 86400, "a number of seconds up to 86400")
PORT = common.number_type(int, lambda port: 0 <= port < 65536, "a port from 0 (any free one) to 65535")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph serve``."""
    parser.description = f"""{HELP}.

Paths: / (the page), /v1/chat/completions, /v1/models, /v1/score, /v1/rerank, /health and /metrics. Clients send the
key of --api-key-file, or of the environment variable {KEY_VARIABLE}, as a bearer token; / and /health need none."""
    common.add_model(parser)
    parser.add_argument(
        "--head",
        action="append",
        help="reward head to serve: its name, a head's directory, or a run's for all of its heads; may be repeated, "
        "the first is the default (default: the model's own heads)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=PORT, default=8000, help="port; 0 for any free one (default: 8000)")
    parser.add_argument("--name", help="the model's name in requests (default: that of its directory)")
    parser.add_argument("--api-key-file", metavar="FILE", help="file with the key that clients have to send")
    for name, kind, default, text in (
        ("best-of", common.COUNT, 1, "candidates for a request that does not give best_of"),
        ("max-body-bytes", BYTES, Limits.body_bytes, "largest body of a request (413)"),
        ("max-candidates", common.COUNT, Limits.candidates, "largest n and best_of (400)"),
        ("max-tokens", common.COUNT, Limits.tokens, "most tokens of a prompt with its answer (400)"),
        ("max-documents", common.COUNT, Limits.documents, "most documents or conversations of a request (400)"),
        ("max-requests", common.COUNT, Limits.requests, "most requests at once, running or waiting (503)"),
        ("timeout", SECONDS, Limits.seconds, "seconds for a request (504)"),
        ("body-timeout", SECONDS, Limits.body_seconds, "seconds for a request's headers, then for its body (408)"),
        ("stop-timeout", SECONDS, 30, "seconds to finish requests after SIGINT or SIGTERM"),
        ("cache-mib", common.COUNT, 1024, "MiB of keys and values"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, default=default, metavar="N", help=f"{text} (default: {default:.15g})"
        )
    parser.add_argument("--log-text", action="store_true", help="log prompts and answers too")


def run(args: argparse.Namespace) -> None:
    """Open the model, and answer requests until SIGINT or SIGTERM."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"dph serve: expected the packages {', '.join(missing)}, got none: pip install 'dph[serve]'")
    key = read_key(args.api_key_file)
    common.check_model(args)

    from dph.serve import server

    bound = server.listen(args.host, args.port)
    loopback = server.is_loopback(bound)
    limits = Limits(
        body_bytes=args.max_body_bytes, candidates=args.max_candidates, tokens=args.max_tokens,
        documents=args.max_documents, requests=args.max_requests, seconds=args.timeout, body_seconds=args.body_timeout,
    )  # fmt: skip
    model, tokenizer, names = common.open_model(args, args.head, "without --head the model answers by log-probability")
    if args.head is None:
        names = [name for name in model.head_names if name not in model.untrained_heads]
    name = args.name or _name(args.model)
    app = server.make(
        model, tokenizer, name, names, limits, best_of=args.best_of, cache_bytes=args.cache_mib << 20, key=key,
        loopback=loopback, log_text=args.log_text,
    )  # fmt: skip
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("dph.serve").setLevel(logging.INFO)
    if not loopback and key is None:
        print("dph serve: other machines may send requests, and no key is set (--api-key-file)", file=sys.stderr)
    host, port = bound.getsockname()[:2]
    bound.listen(server.BACKLOG)  # before the line below: programs may connect once they have read it
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    common.print_text(f"{name} at {address}, heads: {', '.join(names) or 'none'}")
    sys.stdout.flush()
    server.serve(app, bound, limits, args.stop_timeout)


def _name(model: str) -> str:
    """Return the name of a model from its path or hub name."""
    return Path(model).resolve().name if Path(model).exists() else model


def read_key(file: str | None) -> str | None:
    """Return the key of a file or of the environment; None if neither is given.

    Raises UserError for a key that is empty or that a header cannot hold.
    """
    where, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
    if file is not None:
        where, key = file, Path(file).read_text(encoding="utf-8", errors="replace").strip()
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{where}: expected a key of visible ASCII characters, got another text or none")
    return key
