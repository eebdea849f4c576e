"""Share of right answers against tokens: a fixed number of candidates, rounds that stop early, and pruning.

    python -m benchmarks.answer_tokens RUN --prompts prompts.jsonl --judge reference --normalise number -n 16
    python -m benchmarks.answer_tokens RUN --puzzles 300 -n 16 --max-new-tokens 8 --prune-every 1 2

RUN is a model with a reward head. The checker is one of ``dph improve``; ``--puzzles`` takes held-out puzzles of the
quickstart and their own. The head is calibrated on a third of the prompts, and the ways are compared on the others:
N candidates of which the best by reward is kept, for each N; rounds of --round-size that stop once the best one is good
with a probability; and N candidates of which the weaker half is dropped again and again. All ways draw the same
candidates, as these depend on the seed and their number alone. Tokens are those that were drawn for a prompt, dropped
candidates included. Intervals are those of the bootstrap over prompts.
"""

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dph import chat
from dph.demo import puzzles
from dph.evaluate import calibration
from dph.evaluate.best_of import NORMALISERS
from dph.evaluate.metrics import resampled
from dph.evaluate.tables import table
from dph.improve.checkers import FunctionChecker, open_checker
from dph.improve.prompt_files import read_prompts
from dph.improve.prompts import Prompt
from dph.infer.best_of_n import Choice
from dph.infer.engine import answered
from dph.infer.request import Answer
from dph.infer.sampling import Sampling
from dph.model.loading import load_model, load_tokenizer

CONFIDENCES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
RESAMPLES = 1000


class Outcome(NamedTuple):
    """One prompt answered in one way: whether the kept answer is right, and the tokens drawn."""

    right: float
    tokens: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the curve as a table, and as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.answer_tokens",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="RUN", help="a run or model directory with a reward head")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", metavar="FILE", help="rows with prompt, and what the checker needs")
    source.add_argument("--puzzles", type=int, metavar="P", help="number of the quickstart's held-out puzzles")
    parser.add_argument("--judge", default="reference", help="checker, as of dph improve (default: reference)")
    parser.add_argument("--normalise", choices=sorted(NORMALISERS), default="words", help="of reference answers")
    parser.add_argument("--limit", type=int, help="first prompts of the file")
    parser.add_argument("-n", type=int, default=16, help="candidates (default: 16)")
    parser.add_argument("--round-size", type=int, default=2, help="candidates of a round (default: 2)")
    parser.add_argument("--prune-every", type=int, nargs="*", default=[8], metavar="TOKENS", help="(default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    model, tokenizer = load_model(args.model).eval(), load_tokenizer(args.model)
    head = next(name for name in model.head_names if name not in model.untrained_heads)
    with contextlib.ExitStack() as stack:
        if args.puzzles is None:
            prompts = read_prompts(args.prompts)[: args.limit]
            normalise = NORMALISERS[args.normalise]
            checker = stack.enter_context(open_checker(args.judge, prompts, normalise=normalise))
        else:
            asked = list(itertools.islice(puzzles.puzzles(args.seed, evaluation=True), args.puzzles))
            prompts = [Prompt(puzzle.question(), {"number": i}, puzzle.prompt) for i, puzzle in enumerate(asked)]
            checker = FunctionChecker(lambda row, answer: asked[row["number"]].check(answer), "puzzles")
        rows = curve(model, tokenizer, head, prompts, checker, args)
    headers = ["way", "right", "95% interval", "tokens a prompt", "of all N"]
    print(table(headers, [[row[name] for name in ("way", "right", "interval", "tokens", "share")] for row in rows]))
    print(json.dumps(rows))
    return 0


def curve(
    model: Any, tokenizer: Any, head: str, prompts: Sequence[Prompt], checker: Callable[..., Any], args: Any
) -> list[dict[str, Any]]:
    """Return a row for each way."""
    sampling = Sampling(max_new_tokens=args.max_new_tokens)
    tokens = [chat.prompt(prompt.messages, tokenizer) for prompt in prompts]

    def sampled(choice: Choice) -> list[list[Answer]]:
        requests = [choice.request(model, prompt, sampling, args.seed) for prompt in tokens]
        return [request.answers for request in answered(model, tokenizer, requests)]

    def correct(prompt: Prompt, answers: Sequence[Answer]) -> list[float]:
        texts = [tokenizer.decode(answer.tokens[: len(answer.tokens) - answer.finished]) for answer in answers]
        return [float(answer.finished) * right for answer, right in zip(answers, checker(prompt, texts), strict=True)]

    groups = sampled(Choice(n=args.n, head=head))
    right = [correct(prompt, answers) for prompt, answers in zip(prompts, groups, strict=True)]
    third = len(prompts) // 3
    finished = [
        (answer.rewards[head], value)
        for answers, values in zip(groups[:third], right[:third], strict=True)
        for answer, value in zip(answers, values, strict=True)
        if answer.finished
    ]
    rewards, labels = np.array(finished).T
    model.head_records[head] = {"calibration": calibration.fit(rewards, labels >= 0.5)._asdict()}
    tested = list(zip(prompts, groups, right, strict=True))[third:]

    def kept(answers: Sequence[Answer], values: Sequence[float]) -> Outcome:
        places = [i for i, answer in enumerate(answers) if answer.finished]
        best = max(places, key=lambda i: answers[i].rewards[head], default=None)
        return Outcome(0.0 if best is None else values[best], sum(len(answer.tokens) for answer in answers))

    ways: dict[str, list[Outcome]] = {}
    for n in (2**i for i in range(args.n.bit_length())):
        ways[f"N = {n}"] = [kept(answers[:n], values[:n]) for _, answers, values in tested]
    for confidence in CONFIDENCES:
        plan = Choice(n=args.n, head=head, confidence=confidence, round_size=args.round_size).plan(model)
        outcomes = []
        for _, answers, values in tested:
            n = 0
            while more := plan(answers[:n]):
                n += more
            outcomes.append(kept(answers[:n], values[:n]))
        ways[f"rounds of {args.round_size}, until {confidence}"] = outcomes
    for every in args.prune_every:
        pruned = sampled(Choice(n=args.n, head=head, prune_every=every))[third:]
        ways[f"N = {args.n}, pruned every {every}"] = [
            kept(answers, values) for answers, (_, _, values) in zip(pruned, tested, strict=True)
        ]
    keys = [prompt.key for prompt, _, _ in tested]
    weights = resampled(keys, RESAMPLES)
    every_token = np.mean([outcome.tokens for outcome in ways[f"N = {2 ** (args.n.bit_length() - 1)}"]])
    rows = []
    for way, outcomes in ways.items():
        shares, counts = np.array(outcomes, dtype=float).T
        low, high = np.percentile(weights @ shares / weights.sum(1), [2.5, 97.5])
        rows.append(
            {
                "way": way, "right": float(shares.mean()), "interval": f"{low:.3f} to {high:.3f}",
                "tokens": float(counts.mean()), "share": float(counts.mean() / every_token),
            }
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
