"""Records for benchmarks of training: random tokens with the lengths of real prompts and answers.

The lengths are those of three data sets in equal shares: SST-2 (``task:glue/sst2``), BoolQ (``task:boolq``) and right
and wrong solutions of maths problems, read from ``../shared/data`` if it exists, rendered by our tasks and counted at
``CHARACTERS`` per token. Otherwise they are drawn, the same in every run, from ``SYNTHETIC``, whose ranges are the 10 %
and 90 % quantiles of these data sets. Speed depends on no other property of the data.
"""

import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dph.chat import Encoded, continuation
from dph.data import dataset, tokenizer
from dph.data.formats import Preference

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SOURCES = ("task:glue/sst2", "task:boolq", str(SHARED / "preferences" / "math_solutions.jsonl"))
CHARACTERS = 4  # per token, typical of BPE on English text
LIMIT = 400  # records read from each source
HEAD, TAIL = 3, 2  # tokens of "<|im_start|>ROLE\n" and of "<|im_end|>\n"

# Minimum and maximum number of tokens of prompt, chosen and rejected; uniformly distributed.
SYNTHETIC = (
    ((90, 117), (2, 2), (2, 2)),  # SST-2: a sentence in an instruction, and a word
    ((143, 327), (1, 1), (1, 1)),  # BoolQ: a passage and a question; yes or no
    ((44, 97), (38, 108), (35, 107)),  # maths: a problem, and two solutions
)


class Lengths(NamedTuple):
    """Number of tokens of a prompt with its markup, and of the two answers' content."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def longest(self) -> int:
        """Length of the longer conversation, with the answer's ``<|im_end|>`` and line end."""
        return self.prompt + max(self.chosen, self.rejected) + TAIL


def of_record(record: Preference) -> Lengths:
    """Return the lengths of a preference at ``CHARACTERS`` per token."""
    count = lambda message: -(-len(message["content"]) // CHARACTERS)  # noqa: E731
    prompt = 1 + sum(HEAD + count(m) + TAIL for m in record.chosen[:-1]) + HEAD
    return Lengths(prompt, count(record.chosen[-1]), count(record.rejected[-1]))


@functools.cache
def by_source() -> tuple[str, tuple[tuple[Lengths, ...], ...]]:
    """Return the origin of the lengths ("real lengths" or "synthetic lengths"), and those of each data set."""
    if not all((SHARED / name).exists() for name in ("glue/sst2", "boolq", "preferences")):
        return "synthetic lengths", tuple(_drawn(ranges, seed) for seed, ranges in enumerate(SYNTHETIC))
    sources = []
    for source in SOURCES:
        records = dataset.load(source, "preference", directory=SHARED, limit=LIMIT)
        sources.append(tuple(of_record(record) for record in records if record is not None))
    return "real lengths", tuple(sources)


def _drawn(ranges: Sequence[tuple[int, int]], seed: int) -> tuple[Lengths, ...]:
    draw = random.Random(seed)
    return tuple(Lengths(*(draw.randint(*bounds) for bounds in ranges)) for _ in range(LIMIT))


def sample(count: int, longest: int) -> list[Lengths]:
    """Return ``count`` lengths up to ``longest``: evenly spaced quantiles, in equal shares of the data sets."""
    _, sources = by_source()
    chosen = []
    for i, source in enumerate(sources):
        fitting = sorted((x for x in source if x.longest <= longest), key=lambda x: (sum(x), x))
        share = (count + len(sources) - 1 - i) // len(sources)
        chosen += [fitting[(2 * k + 1) * len(fitting) // (2 * share)] for k in range(share)]
    return chosen


@functools.cache
def small_tokenizer() -> Any:
    """Return a tokenizer for the markup; its first ids are the special tokens of ``dph.data.tokenizer``."""
    return tokenizer.from_iterator(["user assistant system"] * 2, 300)


def pairs(count: int, vocabulary: int, longest: int) -> list[tuple[Encoded, Encoded]]:
    """Return preference pairs with the lengths of ``sample``; the answers differ from their first token on."""
    draw, first = random.Random(0), len(tokenizer.SPECIAL_TOKENS)
    marks, made = small_tokenizer(), []
    end = marks.convert_tokens_to_ids("<|im_end|>")
    for lengths in sample(count, longest):
        prompt, *answers = ([draw.randrange(first, vocabulary) for _ in range(n)] for n in lengths)
        if answers[0][0] == answers[1][0]:
            answers[1][0] = first + (answers[0][0] + 1 - first) % (vocabulary - first)
        made.append(tuple(continuation(prompt, [*answer, end], marks) for answer in answers))
    return made


def conversations(count: int, vocabulary: int, longest: int) -> list[Encoded]:
    """Return the chosen sides of ``pairs``, the data sets in turn."""
    return [chosen for chosen, _ in pairs(count, vocabulary, longest)]
