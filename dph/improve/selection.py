"""The records that a head learns from sampled answers: hard ones first."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dph import chat
from dph.errors import UserError

RIGHT = 0.5  # share from which an answer counts as right
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Selection:
    """The records that a head learns from sampled answers.

    Attributes:
        form: "pairs", a right answer against a wrong one; or "labels", each answer as good or bad alone.
        most: pairs, or right and wrong answers each, of a prompt at most.
        seed: of the choice among answers without rewards.
    """

    form: Literal["pairs", "labels"] = "pairs"
    most: int = 2
    seed: int = 0

    def rows(self, lines: Sequence[Line], tokenizer: Any) -> tuple[list[dict[str, Any]], int]:
        """Return the rows of a source, hard ones first, and the number of answers that the chat format refuses.

        Hard are wrong answers with a high reward and right ones with a low one.
        """
        found, refused = [], 0
        for number, line in enumerate(lines):
            kept, left_out = _encodable(_different(line, self.seed, number), line["prompt"], tokenizer)
            refused += left_out
            right = sorted(answer for answer in kept if answer[2] >= RIGHT)
            wrong = sorted((-reward, text, correct) for reward, text, correct in kept if correct < RIGHT)
            found += self._pairs(line, right, wrong) if self.form == "pairs" else self._labels(line, right, wrong)
        found.sort(key=lambda pair: -pair[0])  # equal ones in their order
        return [row for _, row in found], refused

    def _pairs(self, line: Line, right: Sequence[Any], wrong: Sequence[Any]) -> Iterator[tuple[float, dict[str, Any]]]:
        """Yield difficulty and row of pairs of different answers; each answer is in as few as possible."""
        rounds = 0
        for i in range(min(self.most, len(right) * len(wrong))):
            if i and i % len(right) == 0 and i % len(wrong) == 0:
                rounds += 1  # all pairs of this shift have been made
            reward, chosen, _ = right[i % len(right)]
            negative, rejected, _ = wrong[(i + rounds) % len(wrong)]
            yield -negative - reward, {"prompt": line["prompt"], "chosen": chosen, "rejected": rejected}

    def _labels(self, line: Line, right: Sequence[Any], wrong: Sequence[Any]) -> Iterator[tuple[float, dict[str, Any]]]:
        """Yield difficulty and row of the hardest answers, each with its label."""
        for side, label in ((right, True), (wrong, False)):
            for value, text, _ in side[: self.most]:
                yield -value, {"prompt": line["prompt"], "completion": text, "label": label}


def _different(line: Line, seed: int, number: int) -> list[tuple[float, str, float]]:
    """Return reward, text and correctness of the different finished answers; without a head the reward is random."""
    rng, answers = random.Random(f"{seed}/{number}"), {}
    columns = zip(line["candidates"], line["correct"], line["finished"], line["rewards"], strict=True)
    for text, correct, finished, reward in columns:
        if finished and text not in answers:
            answers[text] = (rng.random() if reward is None else reward, text, correct)
    return list(answers.values())


def _encodable(
    answers: Sequence[tuple[float, str, float]], prompt: Sequence[chat.Message], tokenizer: Any
) -> tuple[list[tuple[float, str, float]], int]:
    """Return the answers that the chat format takes as they are, and the number of the others."""
    kept = []
    for answer in answers:
        try:
            chat.encode([*prompt, {"role": "assistant", "content": answer[1]}], tokenizer)
        except UserError:  # such as white space that a chat template removes
            continue
        kept.append(answer)
    return kept, len(answers) - len(kept)
