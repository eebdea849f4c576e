"""Answers that are cut and closed, with their final labels: what a head judges if it prunes answers while they grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dph.chat import Encoded
from dph.data.labels import EncodedAnswers
from dph.data.sampler import draw


@dataclass(frozen=True)
class Prefixes:
    """Function from encoded answers to one prompt to their beginnings, closed with the end-of-turn token.

    All answers of a record are cut after the same number of tokens, as candidates are compared; a shorter one stays
    whole. Which records have beginnings, and where they end, depends on ``seed`` and their tokens alone.

    Attributes:
        share: of the records that have beginnings.
        seed: of the choice.
    """

    share: float
    seed: int

    def __call__(self, answers: Sequence[Encoded]) -> Sequence[Encoded] | None:
        """Return the cut answers with the labels of the whole ones; None for a record that has none."""
        key = repr([answer.tokens for answer in answers])
        if draw(2**32, self.seed, "prefixes", key) >= self.share * 2**32:
            return None
        longest = max(sum(answer.score_mask) for answer in answers)
        if longest < 2:
            return None
        kept = 1 + draw(longest - 1, self.seed, "prefix", key)
        cut = [cut_after(answer, kept) for answer in answers]
        return EncodedAnswers(cut, answers.labels) if isinstance(answers, EncodedAnswers) else tuple(cut)


def cut_after(answer: Encoded, kept: int) -> Encoded:
    """Return an answer with only the first ``kept`` tokens of its content, and the end of its turn."""
    dropped = [i for i, in_content in enumerate(answer.score_mask) if in_content][kept:]  # of the masks
    if not dropped or answer.reward_position is None:
        return answer
    first, end = dropped[0], dropped[-1] + 1
    tokens = answer.tokens[: first + 1] + answer.tokens[end + 1 :]
    return Encoded(
        tokens,
        [*tokens[1:], answer.targets[-1]],
        answer.loss_mask[:first] + answer.loss_mask[end:],
        answer.score_mask[:first] + answer.score_mask[end:],
        answer.reward_position - len(dropped),
    )
