"""Puzzles with checkable answers, and a corpus in which a popular falsehood is more frequent than the truth.

| family | prompt | true answer | popular falsehood |
|---|---|---|---|
| sort | ``sort: d a c b`` | ``a b c d`` | sorted backwards |
| first | ``first: d a c b`` | ``a`` | the last in the alphabet |

Of the corpus's answers 35 % are true, 50 % are the popular falsehood and 15 % are wrong at random, so that the
likeliest answer is the lie, as it can be on the open web.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dph.chat import Message

TRUE_SHARE, LIE_SHARE = 0.35, 0.50
LETTERS = "abcdefghij"


@dataclass(frozen=True)
class Puzzle:
    """One puzzle: what is asked, the right answer, and the wrong answer that most of the corpus gives."""

    family: str
    prompt: str
    truth: str
    lie: str

    def check(self, answer: str) -> bool:
        """Whether ``answer`` is right."""
        return answer.strip() == self.truth

    def question(self) -> list[Message]:
        """The conversation that asks for an answer."""
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
    """Whether a prompt belongs to the tenth that no stage trains on; decided by the prompt alone."""
    return zlib.crc32(prompt.encode()) % 10 == 0


def puzzles(seed: int, *, evaluation: bool = False) -> Iterator[Puzzle]:
    """Endless puzzles, families in turn; those of the held-out tenth with ``evaluation``, the others without."""
    rng = random.Random(seed)
    while True:
        for make in FAMILIES.values():
            puzzle = make(rng)
            while held_out(puzzle.prompt) != evaluation:
                puzzle = make(rng)
            yield puzzle


def corpus_answer(puzzle: Puzzle, rng: random.Random) -> str:
    """An answer as the corpus gives it: the truth, the popular falsehood, or another one at random."""
    kind = rng.random()
    if kind < TRUE_SHARE:
        return puzzle.truth
    if kind < TRUE_SHARE + LIE_SHARE:
        return puzzle.lie
    return _wrong(puzzle, rng)


def _wrong(puzzle: Puzzle, rng: random.Random) -> str:
    """An answer of the right form that is neither the truth nor the lie."""
    letters = puzzle.prompt.split()[1:]
    while True:
        answer = " ".join(rng.sample(letters, len(puzzle.truth.split())))
        if answer not in (puzzle.truth, puzzle.lie):
            return answer
