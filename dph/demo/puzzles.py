"""Puzzles with checkable answers, and a corpus in which a popular falsehood is more frequent than the truth.

| family | prompt | true answer | popular falsehood |
|---|---|---|---|
| sort | ``sort: d a c b`` | ``a b c d`` | sorted backwards |
| first | ``first: d a c b`` | ``a`` | the last in the alphabet |

35 % of the corpus's answers are true, 50 % are the popular falsehood and 15 % are wrong at random, so that the
likeliest answer is false, as it can be on the open web.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dph.chat import Message

TRUE_SHARE, FALSEHOOD_SHARE = 0.35, 0.50
LETTERS = "abcdefghij"


@dataclass(frozen=True)
class Puzzle:
    """One puzzle.

    Attributes:
        family: key of ``FAMILIES``.
        prompt: the question.
        truth: the right answer.
        falsehood: the wrong answer that is most frequent in the corpus.
    """

    family: str
    prompt: str
    truth: str
    falsehood: str

    def check(self, answer: str) -> bool:
        """Return whether ``answer`` is right."""
        return answer.strip() == self.truth

    def question(self) -> list[Message]:
        """Return the conversation that the model answers."""
        return [Message(role="user", content=self.prompt)]


def _sort(rng: random.Random) -> Puzzle:
    letters = rng.sample(LETTERS, 4)
    ordered = sorted(letters)
    return Puzzle("sort", f"sort: {' '.join(letters)}", " ".join(ordered), " ".join(reversed(ordered)))


def _first(rng: random.Random) -> Puzzle:
    letters = rng.sample(LETTERS, 4)
    return Puzzle("first", f"first: {' '.join(letters)}", min(letters), max(letters))


FAMILIES: dict[str, Callable[[random.Random], Puzzle]] = {
    "sort": _sort,
    "first": _first,
}


def held_out(prompt: str) -> bool:
    """Return whether a prompt belongs to the tenth that no stage trains on; depends on the prompt alone."""
    return zlib.crc32(prompt.encode()) % 10 == 0


def puzzles(seed: int, *, evaluation: bool = False) -> Iterator[Puzzle]:
    """Iterate endlessly over puzzles, families in turn: of the held-out tenth if ``evaluation``, else of the rest."""
    rng = random.Random(seed)
    while True:
        for make in FAMILIES.values():
            puzzle = make(rng)
            while held_out(puzzle.prompt) != evaluation:
                puzzle = make(rng)
            yield puzzle


def corpus_answer(puzzle: Puzzle, rng: random.Random) -> str:
    """Draw an answer of the corpus: the truth, the popular falsehood, or a random wrong one."""
    kind = rng.random()
    if kind < TRUE_SHARE:
        return puzzle.truth
    if kind < TRUE_SHARE + FALSEHOOD_SHARE:
        return puzzle.falsehood
    return _wrong(puzzle, rng)


def _wrong(puzzle: Puzzle, rng: random.Random) -> str:
    """Draw an answer of the right form that is neither the truth nor the falsehood."""
    letters = puzzle.prompt.split()[1:]
    while True:
        answer = " ".join(rng.sample(letters, len(puzzle.truth.split())))
        if answer not in (puzzle.truth, puzzle.falsehood):
            return answer
